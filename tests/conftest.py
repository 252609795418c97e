"""What several test modules start from: a real server process, and a place of one's own in it."""

from __future__ import annotations

import itertools
import signal
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from beaker_statestore import observe
from beaker_statestore.namespace import register
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import ServerProcess

_numbers = itertools.count(1)

# Whom a shell starts in the background has SIGINT ignored (POSIX, 2.11), and so would have all whom tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tyrant_server() -> Iterator[ServerProcess]:
    """A real `statestore serve` over a memory store, for all tests that do not harm it."""
    with ServerProcess("memory:") as server:
        yield server


@pytest.fixture(params=["memory", "tyrant"])
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Options of ext:tcjson for a store: within the process, and a server's over a real socket.

    The prefix is the test's own, so that tests can share a store.
    """
    url = "memory:" if request.param == "memory" else request.getfixturevalue("tyrant_server").url
    return {"url": url, "prefix": f"test{next(_numbers)}."}


@pytest.fixture
def store(options: dict[str, Any]) -> Store:
    """The store that ``options`` lead to."""
    return open_store(options["url"])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """What is counted during the test, by its name."""
    counts: Counter[str] = Counter()

    class Counting(observe.Listener):
        def count(self, name: str, n: int = 1) -> None:
            counts[name] += n

    monkeypatch.setattr(observe, "listener", Counting())
    return counts


@pytest.fixture(autouse=True, scope="session")
def _registered() -> None:
    register()
