"""Round trips of what a web application does all day, counted on the wire, beside those of Beaker's own ext:redis.

A round trip costs what the network costs, which is more than all else that happens here. Counted is what comes on a
connection that has been used before: opening one, and what is asked once on each (our probe of the server's
functions, Redis's greeting), is over before counting begins.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from beaker.cache import Cache
from beaker.session import Session

from beaker_statestore.stores import open_store
from beaker_statestore.testing import ServerProcess
from tests.proxy import Proxy
from tests.redis_server import running_redis

# Beaker's back end calls a method of its driver that the driver's newest versions want to be rid of.
pytestmark = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

#: What is done: how many round trips it takes with ext:tcjson, and with ext:redis.
ROUND_TRIPS = {
    "a new session is saved": (1, 1),
    "a session is read": (1, 2),
    "a session is changed": (2, 2),
    "a session is deleted": (2, 2),
    "a cached value is found": (1, 2),
    "a cached value is made": (5, 11),
    "a creation lock is taken and given back": (2, 8),
}


class Bench:
    """One back end behind a proxy."""

    def __init__(self, proxy: Proxy, options: dict[str, Any]) -> None:
        self.proxy = proxy
        self.options = options
        self.cache = Cache("round trips", expire=60, **options)

    def session(self, session_id: str) -> Session:
        # With a timeout, as sessions have; and as the middleware makes it, but for the cookies.
        return Session({}, id=session_id, use_cookies=False, timeout=3600, **self.options)

    def measure(self, what: str) -> int:
        """How many round trips ``what`` takes."""
        visitor, key = uuid.uuid4().hex, uuid.uuid4().hex
        self._change(visitor)
        if what == "a cached value is found":
            self._cached(key)
        actions: dict[str, Callable[[], object]] = {
            "a new session is saved": self._save_new,
            "a session is read": lambda: self.session(visitor).save(accessed_only=True),
            "a session is changed": lambda: self._change(visitor),
            "a session is deleted": lambda: self._delete(visitor),
            "a cached value is found": lambda: self._cached(key),
            "a cached value is made": lambda: self._cached(key),
            "a creation lock is taken and given back": lambda: self._lock(key),
        }
        self.proxy.mark()
        connections = self.proxy.connections
        actions[what]()
        assert self.proxy.connections == connections, "a new connection was opened, whose cost is counted as well"
        return self.proxy.round_trips

    def _save_new(self) -> None:
        session = Session({}, use_cookies=False, timeout=3600, **self.options)
        session["user"] = "zed"
        session.save()

    def _change(self, visitor: str) -> None:
        session = self.session(visitor)
        session["n"] = session.get("n", 0) + 1
        session.save()

    def _delete(self, visitor: str) -> None:
        session = self.session(visitor)
        session.delete()
        session.save()

    def _cached(self, key: str) -> None:
        assert self.cache.get(key, createfunc=lambda: "value") == "value"

    def _lock(self, key: str) -> None:
        lock = self.cache.namespace.get_creation_lock(key)
        assert lock.acquire()
        lock.release()


@pytest.fixture(scope="module")
def ours(tyrant_server: ServerProcess) -> Iterator[Bench]:
    port = int(tyrant_server.url.rpartition(":")[2])
    with Proxy(port) as proxy:
        url = f"127.0.0.1:{proxy.port}"
        with contextlib.closing(open_store(url)):
            yield Bench(proxy, {"type": "ext:tcjson", "url": url, "prefix": "round-trips."})


@pytest.fixture(scope="module")
def peer() -> Iterator[Bench]:
    with running_redis() as port, Proxy(port) as proxy, redis.Redis(port=proxy.port) as client:
        yield Bench(proxy, {"type": "ext:redis", "url": client})


@pytest.mark.parametrize("what", ROUND_TRIPS)
def test_round_trips_of_ours(ours: Bench, what: str) -> None:
    assert ours.measure(what) == ROUND_TRIPS[what][0]


@pytest.mark.parametrize("what", ROUND_TRIPS)
def test_round_trips_of_beakers_own(peer: Bench, what: str) -> None:
    assert peer.measure(what) == ROUND_TRIPS[what][1]


def test_the_proxy_counts_turns_of_the_flow_not_messages(ours: Bench) -> None:
    """Several requests that are sent together and answered together are one round trip."""
    store = open_store(ours.options["url"])
    store.ping()
    ours.proxy.mark()
    store.get_many([b"a", b"b", b"c"])
    store.ping()
    (first, second) = ours.proxy.exchanges
    assert ours.proxy.round_trips == 2
    assert first.connection == second.connection
    assert (bytes(first.request[:2]), bytes(second.request)) == (b"\xc8\x31", b"\xc8\x80")
    assert bytes(first.reply) == bytes(5)
