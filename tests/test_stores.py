"""Every store keeps the promises of the interface, and so does a real server's over each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore, Store
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import (
    AtomicityConformance,
    LocalStoreConformance,
    ProcessConformance,
    ServerProcess,
    StoreConformance,
)


class TestMemoryStore(LocalStoreConformance, AtomicityConformance):
    @pytest.fixture
    def store(self) -> Iterator[LocalStore]:
        with MemoryStore() as store:
            yield store


@pytest.mark.parametrize("sync", ["os", "always"])
class TestLMDBStore(LocalStoreConformance, AtomicityConformance, ProcessConformance):
    @pytest.fixture
    def reopen(self, tmp_path: Path, sync: str) -> str:
        return f"lmdb://{tmp_path}/state.lmdb?sync={sync}"

    @pytest.fixture
    def store(self, tmp_path: Path, sync: str) -> Iterator[LocalStore]:
        with LMDBStore(tmp_path / "state.lmdb", sync=sync) as store:
            yield store


@pytest.fixture(scope="module", params=["memory", "lmdb", "lmdb, sync=always", "unix socket"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server over each local store, one for all the tests that share its parameter."""
    directory = tmp_path_factory.mktemp("server")
    servers = {
        "memory": lambda: ServerProcess("memory:"),
        "lmdb": lambda: ServerProcess(f"lmdb://{directory}/state.lmdb"),
        "lmdb, sync=always": lambda: ServerProcess(f"lmdb://{directory}/state.lmdb?sync=always"),
        "unix socket": lambda: ServerProcess("memory:", unix=directory / "socket"),
    }
    with servers[request.param]() as server:
        yield server


class TestTyrantStore(StoreConformance, AtomicityConformance, ProcessConformance):
    @pytest.fixture
    def reopen(self, server: ServerProcess) -> str:
        return server.url

    @pytest.fixture
    def store(self, server: ServerProcess) -> Iterator[Store]:
        with open_store(server.url) as store:
            store.delete_many(list(store.keys()))
            yield store
