"""`open_store`: which store a URL means, who shares it, and what is said about one that means none."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from beaker_statestore.exceptions import ConfigurationError, MissingDriverError, StateStoreError
from beaker_statestore.stores import SCHEMES, open_store, urls
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.stores.tyrant import TyrantStore
from beaker_statestore.testing import FaultyStore, ServerProcess, fork

# -- which store


@pytest.mark.parametrize(
    "url",
    [
        "127.0.0.1:1978",
        "127.0.0.1",
        "localhost",
        "localhost:1978",
        "state-store.example.org:1978",
        "redis:6379",
        "[::1]:1978",
        "[::1]",
        "tyrant://127.0.0.1",
        "tyrant://127.0.0.1:1978",
        "tyrant://[::1]:1978",
        "unix:/run/statestore.sock",
        "  127.0.0.1:1978\n",
    ],
)
def test_addresses_mean_a_tyrant_server_and_nothing_is_connected(url: str) -> None:
    assert isinstance(open_store(url), TyrantStore)


@pytest.mark.parametrize("url", ["memory:", "memory:other", "memory:1978"])
def test_memory_means_this_process(url: str) -> None:
    assert isinstance(open_store(url), MemoryStore)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("lmdb:///var/lib/app/state.lmdb", "/var/lib/app/state.lmdb"),
        ("lmdb:/var/lib/app/state.lmdb", "/var/lib/app/state.lmdb"),
        # What lmdb:///%(here)s/state.lmdb becomes in an INI file.
        ("lmdb:////srv/app/state.lmdb", "/srv/app/state.lmdb"),
        ("lmdb:///a%20place/100%25/what%3F.lmdb", "/a place/100%/what?.lmdb"),
        ("lmdb:///state@home.lmdb", "/state@home.lmdb"),
        ("lmdb:var/state.lmdb", os.path.abspath("var/state.lmdb")),
    ],
)
def test_lmdb_means_a_file_which_is_not_opened_yet(url: str, path: str) -> None:
    store = open_store(url)
    assert isinstance(store, LMDBStore)
    assert store.path == path


def test_a_relative_path_is_not_moved_by_a_later_change_of_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    store = open_store("lmdb:state.lmdb")
    monkeypatch.chdir(tmp_path)
    with store:
        store.put(b"key", b"value")
    assert (tmp_path / "here" / "state.lmdb").exists()


@pytest.mark.parametrize(
    ("size", "number"), [("1048576", 2**20), ("1024K", 2**20), ("1m", 2**20), ("1MiB", 2**20), ("64 GiB", 64 * 2**30)]
)
def test_sizes_are_written_as_one_likes(size: str, number: int) -> None:
    assert urls.byte_size(size, "map_size") == number


def test_opening_a_store_imports_no_other_stores_driver() -> None:
    code = "import sys; from beaker_statestore.stores import open_store; open_store(sys.argv[1]); print(*sys.modules)"
    for url, other in (
        ("memory:", "lmdb"),
        ("lmdb:///x", "lmdb"),
        ("localhost", "lmdb"),
        ("localhost", "sortedcontainers"),
    ):
        loaded = subprocess.run([sys.executable, "-c", code, url], capture_output=True, text=True, check=True)
        assert other not in loaded.stdout.split()


# -- who shares it


def test_all_who_ask_alike_share_one_store() -> None:
    assert open_store("localhost:1978") is open_store("localhost:1978")
    assert open_store("localhost:1978") is open_store("tyrant://localhost:1978")
    assert open_store("localhost:1978") is not open_store("localhost:1979")


def test_another_patience_is_another_connection_but_the_same_memory() -> None:
    assert open_store("localhost:1978") is not open_store("localhost:1978", timeout=1.0)
    assert open_store("memory:") is open_store("memory:", timeout=1.0, pool_size=1)


def test_memory_stores_are_kept_apart_by_name() -> None:
    open_store("memory:a").put(b"key", b"a")
    open_store("memory:b").put(b"key", b"b")
    assert open_store("memory:a").get(b"key") == b"a"


def test_threads_that_ask_at_once_share_one_store() -> None:
    together = threading.Barrier(8)

    def ask(_number: int) -> int:
        together.wait(10)
        return id(open_store("memory:threads"))

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(ask, range(8)))) == 1


def test_a_closed_store_is_replaced() -> None:
    store = open_store("memory:closed")
    store.put(b"key", b"value")
    store.close()
    assert open_store("memory:closed") is not store
    assert open_store("memory:closed").get(b"key") is None
    with pytest.raises(StateStoreError, match="closed"):
        store.get(b"key")


def test_a_store_is_answered_unchanged() -> None:
    store = FaultyStore(MemoryStore())
    assert open_store(store, timeout=1.0) is store


def test_a_child_can_open_stores_and_has_a_copy_of_the_memory(tmp_path: Path) -> None:
    memory, file = open_store("memory:fork"), open_store(f"lmdb://{tmp_path}/state.lmdb")
    memory.put(b"key", b"parent's")
    file.put(b"key", b"parent's")

    def in_child() -> tuple[bytes | None, bytes | None, bool]:
        copy, same = open_store("memory:fork"), open_store(f"lmdb://{tmp_path}/state.lmdb")
        found = copy.get(b"key"), same.get(b"key"), copy is memory and same is file
        copy.put(b"key", b"child's")
        same.put(b"key", b"child's")
        return found

    assert fork(in_child) == (b"parent's", b"parent's", True)
    assert (memory.get(b"key"), file.get(b"key")) == (b"parent's", b"child's")
    file.close()


def test_a_fork_amid_a_transaction_copies_none_of_its_half() -> None:
    store = MemoryStore()
    store.put_many({b"a": b"0", b"b": b"0"})
    stop = threading.Event()

    def write() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            store.put_many({b"a": b"%d" % number, b"b": b"%d" % number})

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            for _ in range(50):
                pair = fork(lambda: store.get_many([b"a", b"b"]))
                assert pair[b"a"] == pair[b"b"]
        finally:
            stop.set()
        writer.result(10)


# -- what is said


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("", "host:port"),
        ("nothing at all", "host:port"),
        ("::1:1978", "not the URL of a store"),
        ("127.0.0.1:port", "unknown scheme|not the URL"),
        ("lmdb", "'lmdb' is not the URL of a store"),
        ("lmbd:///x", "did you mean 'lmdb'"),
        ("mem:", "unknown scheme 'mem'"),
        ("tyrnat://localhost", "did you mean 'tyrant'"),
        ("rocksdb:///x", "this version knows cabinet, lmdb, memory, tyrant, tyrants, unix"),
        ("redis://localhost", "this version knows"),
        ("lmdb://var/lib/state.lmdb", "three slashes"),
        ("lmdb:", "names no file"),
        ("lmdb:///", "names no file"),
        ("lmdb:///x?fsync=always", "unknown option 'fsync'.*map_size, sync"),
        ("lmdb:///x?sync=os&sync=always", "twice"),
        ("lmdb:///x?sync=sometimes", "sync=sometimes is unknown; it is os or always"),
        ("lmdb:///x?map_size=big", "map_size = 'big' is not a size"),
        ("lmdb:///x?map_size=0", "more than 0"),
        ("memory:?sync=os", "unknown option 'sync'"),
        ("tyrant://localhost:99999", "localhost:99999"),
        ("unix:", "unix:"),
    ],
)
def test_a_url_that_means_nothing_is_explained(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        open_store(url)


def test_leaving_out_tls_is_never_suggested() -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store("lmdbs://localhost:1978")
    assert "did you mean" not in str(caught.value)
    with pytest.raises(ConfigurationError, match="did you mean 'tyrants'"):
        open_store("tyrnats://localhost:1978")


@pytest.mark.parametrize(
    "url",
    [
        "redis://user:s3cret@localhost:6379/0",
        "redis://:s3cret@localhost",
        "redis://user:s3cret/with@slash@localhost",
        "tyrant://user:s3cret@localhost:1978",
        "tyrant://user:s3cret@localhost:99999",
        "user:s3cret@localhost:1978",
        "//user:s3cret@localhost:1978",
        "lmdb://user:s3cret@localhost/x",
        "lmdb://user:s3cret@[localhost/x",
        "memory://user:s3cret@/?x=y",
    ],
)
def test_a_password_is_in_no_message(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        open_store(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert "s3cret" not in str(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def test_a_missing_driver_is_named_with_the_line_to_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmdb", None)
    store = open_store(f"lmdb://{tmp_path}/state.lmdb")
    with pytest.raises(MissingDriverError, match=r'pip install "beaker-statestore\[server\]"'):
        store.ping()


def test_every_scheme_leads_to_a_class() -> None:
    assert set(SCHEMES) == {"cabinet", "lmdb", "memory", "tyrant", "tyrants", "unix"}


# -- the server helper, which all of the project's end-to-end tests rest on


def test_a_server_process_comes_back_with_its_records_where_it_was(tmp_path: Path) -> None:
    with ServerProcess(f"lmdb://{tmp_path}/state.lmdb") as server, open_store(server.url) as store:
        store.put(b"key", b"value")
        first = server.pid
        server.kill()
        with pytest.raises(StateStoreError):
            store.get(b"key")
        server.start()
        assert server.pid != first
        assert store.get(b"key") == b"value"
        server.stop()
        server.start()
        assert store.get(b"key") == b"value"


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match=r"exit code 1(.|\n)*no directory"),
        ServerProcess(f"lmdb://{tmp_path}/no/x"),
    ):
        pass
