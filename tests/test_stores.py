"""Every store keeps the promises of the interface, and so does a real server's over each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore, Store
from beaker_statestore.stores.cabinet import CabinetStore
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import (
    AtomicityConformance,
    LocalStoreConformance,
    ProcessConformance,
    ServerProcess,
    StoreConformance,
    fork,
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


class _SizeOfFile:
    """For stores whose size is that of a file that never becomes shorter."""

    def test_size_is_in_bytes_and_follows_the_records(self, store: Store) -> None:
        store.put_many({b"%d" % number: b"v" * 1000 for number in range(100)})
        store.sync()
        full = store.size()
        assert full >= 100 * 1000
        store.delete_many(list(store.keys()))
        store.put_many({b"%d" % number: b"v" * 1000 for number in range(99)})
        store.sync()
        assert store.size() < full + 50 * 1000, "the room of what was deleted is not used again"
        store.put_many({b"more %d" % number: b"v" * 1000 for number in range(3000)})
        store.sync()
        assert store.size() - full >= 10 * 1000


@pytest.mark.parametrize(("suffix", "sync"), [("tch", "os"), ("tcb", "always")])
class TestCabinetStore(_SizeOfFile, LocalStoreConformance, AtomicityConformance):
    @pytest.fixture
    def store(self, suffix: str, sync: str) -> Iterator[LocalStore]:
        # In memory where that can be, as thousands of writes wait for the disk here.
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with (
            TemporaryDirectory(dir=memory) as directory,
            CabinetStore(f"{directory}/state.{suffix}", sync=sync, reserve=2**20) as store,
        ):
            yield store

    def test_it_is_usable_on_both_sides_of_a_fork(self, store: Store) -> None:
        """Not so: a file is open in one process. The child is told, and the parent goes on."""
        store.put(b"before", b"1")

        def in_child() -> str:
            with pytest.raises(StoreUnavailable) as caught:
                store.put(b"child", b"2")
            store.close()
            return str(caught.value)

        for _ in range(3):
            assert "before the fork" in fork(in_child)
            store.put(b"parent", b"3")
            assert store.get_many([b"before", b"child", b"parent"]) == {b"before": b"1", b"parent": b"3"}


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


@pytest.fixture(scope="module")
def cabinet_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A real server over a file of Tokyo Cabinet's."""
    with ServerProcess(f"cabinet://{tmp_path_factory.mktemp('server')}/state.tcb?sync=os&reserve=1MiB") as server:
        yield server


class TestServedCabinet(_SizeOfFile, StoreConformance):
    @pytest.fixture
    def store(self, cabinet_server: ServerProcess) -> Iterator[Store]:
        with open_store(cabinet_server.url) as store:
            store.delete_many(list(store.keys()))
            yield store
