"""What is particular to LMDB: crashes, forks, other processes, a map that grows, limits, and damaged files."""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import lmdb
import pytest

from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.stores import lmdbfile
from beaker_statestore.stores.base import Verbs
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.testing import fork

MIB: Final = 2**20
#: Seconds for what a test waits for.
PATIENCE: Final = 30.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.lmdb"


@pytest.fixture
def store(path: Path) -> Iterator[LMDBStore]:
    with LMDBStore(path) as store:
        yield store


class Program:
    """Python code in a process of its own, which prints lines; ``sys.argv[1]`` is what it is given."""

    def __init__(self, code: str, argument: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", "import sys\n" + code, str(argument)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,  # so that `kill` finds what `line` has not read
        )

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline().decode()
        assert line, f"the program ended with exit code {self._process.wait(PATIENCE)}"
        return line.strip()

    def tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()

    def kill(self) -> list[str]:
        """End it at once; the rest of what it had printed."""
        self._process.send_signal(signal.SIGKILL)
        rest, _ = self._process.communicate(timeout=PATIENCE)
        return rest.decode().splitlines()

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()


# -- crashes

#: Writes without end, a few records in each transaction, and tells what has been acknowledged.
WRITER = """
import itertools
from beaker_statestore.stores.lmdb import LMDBStore
store = LMDBStore(sys.argv[1], map_size=65536)
print("ready", flush=True)
for number in itertools.count():
    value = b"%d " % number * 200
    store.put_many({b"a": value, b"b": value, b"own %d" % (number % 500): value, b"long %d " % number * 100: value})
    print(number, flush=True)
"""


@pytest.mark.parametrize("commits", [0, 1, 2, 5, 20, 50, 100, 200])
def test_killing_a_writer_loses_no_acknowledged_commit_and_leaves_no_half(path: Path, commits: int) -> None:
    # Its map begins tiny, so that it is also killed while that grows.
    with Program(WRITER, path) as writer:
        for _ in range(commits + 1):
            acknowledged = writer.line()
        acknowledged = [acknowledged, *writer.kill()][-1]
    last = -1 if acknowledged == "ready" else int(acknowledged)
    with LMDBStore(path) as store:
        value = store.get(b"a")
        found = -1 if value is None else int(value.split()[0])
        assert found in (last, last + 1)
        for number in range(max(0, found - 450), found + 1):
            assert store.get(b"own %d" % (number % 500)) == b"%d " % number * 200
            assert store.get(b"long %d " % number * 100) == b"%d " % number * 200
        assert store.get(b"b") == value
        # And the dead writer's lock is free.
        store.put(b"next", b"life")
        assert store.get(b"next") == b"life"


def test_records_are_there_when_the_file_is_opened_again(path: Path) -> None:
    records = {b"": b"empty", b"key": b"value", b"k" * 600: b"long", b"v": b"v" * MIB}
    with LMDBStore(path) as store:
        store.put_many(records)
    with LMDBStore(path) as store:
        assert store.get_many(records) == records
        assert sorted(store.keys()) == sorted(records)
        assert store.count() == len(records)


READER = """
import lmdb
txn = lmdb.open(sys.argv[1], subdir=False).begin()
print("reading", flush=True)
sys.stdin.read()
"""


def _overwrite(store: LMDBStore, path: Path) -> int:
    """How long the file is after a record of a megabyte has often been replaced."""
    for number in range(50):
        store.put(b"key", b"%d" % number * MIB)
    return path.stat().st_size


def test_killed_readers_do_not_make_the_file_grow(
    store: LMDBStore, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(b"key", b"v" * MIB)
    with Program(READER, path) as reader:
        assert reader.line() == "reading"
        # LMDB keeps what the reader sees, what everybody else sees, and what is being written.
    monkeypatch.setattr(lmdbfile, "READER_CHECK_INTERVAL", 0.0)
    assert _overwrite(store, path) < 8 * MIB


def test_readers_that_were_killed_before_the_file_was_opened_do_not_either(path: Path) -> None:
    with LMDBStore(path) as store:
        store.put(b"key", b"v" * MIB)
    # LMDB itself forgets all readers when nobody has the file open; so somebody must.
    with Program(READER.replace("txn =", "environment =").replace(".begin()", ""), path) as bystander:
        assert bystander.line() == "reading"
        with Program(READER, path) as reader:
            assert reader.line() == "reading"
        with LMDBStore(path) as store:
            assert _overwrite(store, path) < 8 * MIB


def test_no_read_transaction_is_left_open(store: LMDBStore, path: Path) -> None:
    store.put_many({b"%d" % number: b"value" for number in range(2500)})
    store.get(b"1")
    store.get_many([b"1", b"2"])
    store.scan(limit=3)
    unfinished = store.ordered_keys()
    next(unfinished)
    store.compare_and_swap(b"1", b"other", b"new")
    with pytest.raises(ZeroDivisionError):
        store.apply([lambda verbs: verbs.get(b"1"), lambda _verbs: 1 // 0])
    readers = "import lmdb\nprint(lmdb.open(sys.argv[1], subdir=False).readers().strip(), flush=True)"
    with Program(readers, path) as program:
        assert program.line() == "(no active readers)"


# -- forks


def test_forks_amid_the_work_of_threads_leave_both_sides_working(store: LMDBStore) -> None:
    stop = threading.Event()

    def work(number: int) -> int:
        times = 0
        while not stop.is_set():
            times += 1
            value = b"%d" % times
            store.put_many({b"a%d" % number: value, b"b%d" % number: value})
            assert store.get(b"a%d" % number) == value
        return times

    def in_child() -> None:
        for number in range(3):
            pair = list(store.get_many([b"a%d" % number, b"b%d" % number]).values())
            assert len(set(pair)) <= 1
        store.modify(b"children", lambda old: b"%d" % (int(old or b"0") + 1))

    with ThreadPoolExecutor(3) as pool:
        workers = [pool.submit(work, number) for number in range(3)]
        try:
            for _ in range(40):
                fork(in_child)
        finally:
            stop.set()
        times = [worker.result(PATIENCE) for worker in workers]
    assert [store.get(b"a%d" % number) for number in range(3)] == [b"%d" % number for number in times]
    assert store.get(b"children") == b"40"


def test_a_store_may_be_made_before_a_fork_and_used_behind_it(path: Path) -> None:
    store = LMDBStore(path)
    fork(lambda: store.put(b"child", b"1"))
    assert not store.closed
    assert store.get(b"child") == b"1"
    fork(store.close)
    assert store.get(b"child") == b"1"
    store.close()


# -- several stores, threads and processes on one file


def test_stores_on_the_same_file_share_it_and_close_it_together(tmp_path: Path, path: Path) -> None:
    (tmp_path / "link.lmdb").symlink_to(path)
    first, second = LMDBStore(path), LMDBStore(tmp_path / "link.lmdb")
    first.put(b"key", b"value")
    assert second.get(b"key") == b"value"
    first.close()
    with pytest.raises(StateStoreError, match="closed"):
        first.get(b"key")
    assert second.get(b"key") == b"value"
    second.close()
    # Had it not been closed, the driver would refuse.
    lmdb.open(str(path), subdir=False).close()


def test_threads_that_first_use_a_store_at_once_open_the_file_once(path: Path) -> None:
    store = LMDBStore(path)
    together = threading.Barrier(8)

    def use(number: int) -> None:
        together.wait(PATIENCE)
        store.put(b"%d" % number, b"")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(use, range(8)))
    assert store.count() == 8
    store.close()
    lmdb.open(str(path), subdir=False).close()


def test_one_process_cannot_open_a_file_in_two_modes(store: LMDBStore, path: Path) -> None:
    store.ping()
    with pytest.raises(ConfigurationError, match=r"already open in this process, with sync=os, not always"):
        LMDBStore(path, sync="always").ping()


def test_what_only_reads_does_not_wait_for_a_writer(store: LMDBStore) -> None:
    store.put(b"key", b"old")
    writing, finish = threading.Event(), threading.Event()

    def write() -> None:
        def hold(_verbs: object) -> None:
            writing.set()
            assert finish.wait(PATIENCE)

        store.apply([lambda verbs: verbs.put(b"key", b"new"), hold])

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(write)
        try:
            assert writing.wait(PATIENCE)
            assert store.get(b"key") == b"old"
            assert store.add(b"key", b"other") is False
            assert store.compare_and_swap(b"key", b"other", b"new") is False
            assert store.delete(b"absent") is False
            assert store.apply([lambda verbs: verbs.get(b"key"), lambda verbs: verbs.count()]) == [b"old", 1]
        finally:
            finish.set()
        writer.result(PATIENCE)
    assert store.get(b"key") == b"new"


def test_a_thread_waits_for_another_writer_only_so_long(store: LMDBStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdbfile, "PATIENCE", 0.1)
    writing, finish = threading.Event(), threading.Event()

    def hold(_verbs: object) -> None:
        writing.set()
        assert finish.wait(PATIENCE)

    with ThreadPoolExecutor(1) as pool:
        writer = pool.submit(store.apply, [lambda verbs: verbs.put(b"key", b"first"), hold])
        try:
            assert writing.wait(PATIENCE)
            with pytest.raises(StoreUnavailable, match="another thread has been writing"):
                store.put(b"key", b"second")
        finally:
            finish.set()
        writer.result(PATIENCE)
    assert store.get(b"key") == b"first"


#: Stands still within a transaction that writes, until it is told to go on.
HOLDER = """
from beaker_statestore.stores.lmdb import LMDBStore
def hold(verbs):
    print("writing", flush=True)
    sys.stdin.readline()
store = LMDBStore(sys.argv[1])
store.apply([lambda verbs: verbs.put(b"key", b"theirs"), hold])
print("done", flush=True)
sys.stdin.read()
"""


def test_a_stalled_writer_in_another_process_is_an_outage_for_writes_only_and_passes(
    store: LMDBStore, path: Path
) -> None:
    store.put(b"key", b"value")
    with Program(HOLDER, path) as holder:
        assert holder.line() == "writing"
        begin = time.monotonic()
        with pytest.raises(StoreUnavailable, match=f"another process has been writing to {path} for too long"):
            store.put(b"key", b"ours")
        assert lmdbfile.STALLED <= time.monotonic() - begin < lmdbfile.STALLED + 3
        # The others that wait are not made to wait one after another.
        begin = time.monotonic()
        for _ in range(100):
            with pytest.raises(StoreUnavailable):
                store.put(b"key", b"ours")
        assert time.monotonic() - begin < lmdbfile.STALLED
        assert store.get(b"key") == b"value"
        holder.tell("go on")
        assert holder.line() == "done"
        assert store.get(b"key") == b"theirs"
        store.put(b"key", b"ours")
    assert store.get(b"key") == b"ours"


def test_a_stalled_writer_that_is_killed_holds_up_nobody(store: LMDBStore, path: Path) -> None:
    store.put(b"key", b"value")
    with Program(HOLDER, path) as holder:
        assert holder.line() == "writing"
        holder.kill()
        store.put(b"other", b"ours")
    assert store.get_many([b"key", b"other"]) == {b"key": b"value", b"other": b"ours"}


#: Writes all the time, each transaction for a third of what counts as stalled.
BUSY = """
import time
from beaker_statestore.stores import lmdbfile
from beaker_statestore.stores.lmdb import LMDBStore
store = LMDBStore(sys.argv[1])
for number in range(6):
    store.apply([lambda verbs: verbs.put(b"busy", b"%d" % number), lambda verbs: time.sleep(lmdbfile.STALLED / 3)])
    if not number:
        print("begun", flush=True)
"""


def test_a_writer_waits_for_others_that_do_commit(store: LMDBStore, path: Path) -> None:
    with Program(BUSY, path) as busy:
        assert busy.line() == "begun"
        store.put(b"key", b"value")
    assert store.get(b"key") == b"value"


def test_an_operation_cannot_catch_what_makes_its_transaction_write(store: LMDBStore) -> None:
    def careless(verbs: Verbs) -> bool:
        try:
            verbs.put(b"key", b"value")
        except Exception:  # noqa: BLE001 - what the test is about
            return False
        return True

    assert store.apply([careless]) == [True]
    assert store.get(b"key") == b"value"


# -- the map


def test_a_large_map_takes_no_room_on_the_disk(path: Path) -> None:
    with LMDBStore(path, map_size=2**40) as store:
        store.put(b"key", b"value")
        assert store.size() < MIB
    assert path.stat().st_size < MIB
    assert path.stat().st_blocks * 512 < MIB


def test_a_tiny_map_grows_and_loses_nothing(path: Path) -> None:
    with LMDBStore(path, map_size=1) as store:
        for number in range(30):
            store.put(b"%d" % number, b"%d" % number * 100_000)
        store.put(b"huge", b"h" * 40 * MIB)
        assert all(store.get(b"%d" % number) == b"%d" % number * 100_000 for number in range(30))
        assert store.get(b"huge") == b"h" * 40 * MIB


def test_the_map_grows_under_threads(tmp_path: Path) -> None:
    def work(store: LMDBStore, number: int) -> None:
        for turn in range(10):
            key = b"%d:%d" % (number, turn)
            store.put(key, key * 5_000)
            assert store.get(key) == key * 5_000
            assert key in list(store.keys())

    for name in range(10):
        with LMDBStore(tmp_path / f"{name}.lmdb", map_size=1) as store, ThreadPoolExecutor(4) as pool:
            list(pool.map(work, [store] * 4, range(4)))
            assert store.count() == 40


def test_an_operation_may_run_again_but_counts_once(path: Path) -> None:
    runs = []
    with LMDBStore(path, map_size=1) as store:
        store.put(b"list", b"")

        def append(verbs: Verbs) -> int:
            runs.append(verbs.get(b"list"))
            verbs.put(b"list", (verbs.get(b"list") or b"") + b"x" * MIB)
            return len(verbs.get(b"list") or b"")

        assert store.apply([append]) == [MIB]
        assert store.get(b"list") == b"x" * MIB
    # In a read transaction, then as often as the map was too small.
    assert len(runs) > 2
    assert set(runs) == {b""}


def test_a_process_follows_the_map_that_another_has_grown(path: Path) -> None:
    other = """
from beaker_statestore.stores.lmdb import LMDBStore
store = LMDBStore(sys.argv[1], map_size=1)
print("ready", flush=True)
for line in sys.stdin:
    store.put(b"theirs " + line.strip().encode(), b"t" * 3000000)
    print(store.count(), flush=True)
"""
    with LMDBStore(path, map_size=1) as store, Program(other, path) as program:
        store.put(b"key", b"value")
        assert program.line() == "ready"
        for turn in range(6):
            program.tell(f"{turn}")
            assert program.line() == f"{2 * turn + 2}"
            assert store.get(b"theirs %d" % turn) == b"t" * 3_000_000
            store.put(b"ours %d" % turn, b"o" * 4_000_000)
        assert store.count() == 13


def test_processes_that_grow_the_map_at_the_same_time_lose_nothing(path: Path) -> None:
    other = """
from beaker_statestore.stores.lmdb import LMDBStore
store = LMDBStore(sys.argv[1], map_size=1)
print("ready", flush=True)
sys.stdin.readline()
for number in range(60):
    store.put(b"theirs %d" % number, b"t" * 100000)
print("done", flush=True)
"""
    with LMDBStore(path, map_size=1) as store, Program(other, path) as program:
        store.ping()
        assert program.line() == "ready"
        program.tell("go")
        for number in range(60):
            store.put(b"ours %d" % number, b"o" * 100_000)
        assert program.line() == "done"
        assert store.count() == 120
        assert all(store.get(b"theirs %d" % number) == b"t" * 100_000 for number in range(60))


# -- limits


def _fill(store: LMDBStore) -> None:
    """Put what `_all_there` looks for until the store refuses, which it must before 200 MB."""
    for number in range(2000):
        store.put(b"%d" % number, b"%d " % number * 20_000)


def _all_there(store: LMDBStore, count: int) -> bool:
    return all(store.get(b"%d" % number) == b"%d " % number * 20_000 for number in range(count))


def test_a_map_that_cannot_grow_is_an_outage_that_passes(path: Path) -> None:
    def in_child() -> None:
        store = LMDBStore(path, map_size=4 * MIB)
        store.put(b"key", b"value")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 64 * MIB, hard))
        with pytest.raises(StoreUnavailable, match=f"{path} is full"):
            _fill(store)
        acknowledged = store.count() - 1
        assert acknowledged > 2
        assert store.get(b"key") == b"value"
        assert _all_there(store, acknowledged)
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        store.put(b"more", b"v" * MIB)
        assert _all_there(store, acknowledged)

    fork(in_child)


def test_too_large_a_map_is_explained(path: Path) -> None:
    def in_child() -> None:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (4 * 2**30, hard))
        with pytest.raises(ConfigurationError, match="map_size"):
            LMDBStore(path).ping()
        with LMDBStore(path, map_size=64 * MIB) as store:
            store.put(b"key", b"value")

    fork(in_child)


def test_a_disk_that_takes_no_more_is_an_outage_that_passes(path: Path) -> None:
    def in_child() -> None:
        # A limit of the file's length is what a full disk is to the one who writes.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        store = LMDBStore(path)
        store.put(b"key", b"value")
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4 * MIB, hard))
        with pytest.raises(StoreUnavailable, match=f"{path}") as caught:
            _fill(store)
        assert not isinstance(caught.value, OutcomeUnknown), "it is known that nothing was written"
        acknowledged = store.count() - 1
        assert acknowledged > 20
        for _ in range(3):
            with pytest.raises(StoreUnavailable):
                store.put(b"more", b"v" * MIB)
        assert store.get(b"key") == b"value"
        assert store.get(b"more") is None
        assert _all_there(store, acknowledged)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        store.put(b"more", b"v" * MIB)
        assert _all_there(store, acknowledged)

    fork(in_child)


def test_a_commit_that_fails_half_way_has_an_unknown_outcome_and_the_file_is_opened_anew(path: Path) -> None:
    def in_child() -> None:
        store = LMDBStore(path, sync="always")
        store.put(b"key", b"value")
        # What LMDB writes last, the page that makes a commit count, goes through a descriptor of its own.
        links = {int(link.name): os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.exists()}
        opened = [number for number, target in links.items() if target == str(path)]
        last = max(number for number in opened if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, last)
        with pytest.raises(OutcomeUnknown, match=f"{path} failed half way"):
            store.put(b"key", b"other")
        with pytest.raises(StoreUnavailable):
            store.get(b"key")
        assert store.get(b"key") in (b"value", b"other")
        store.put(b"key", b"third")
        assert store.get(b"key") == b"third"

    fork(in_child)


# -- files that cannot be, and damage


def test_only_the_owner_can_read_the_file(store: LMDBStore, path: Path) -> None:
    store.ping()
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.with_name("state.lmdb-lock").stat().st_mode & 0o777 == 0o600


def _directory(path: Path) -> None:
    path.mkdir()


def _text(path: Path) -> None:
    path.write_text("no database at all\n" * 1000)


def _another_programs(path: Path) -> None:
    with lmdb.open(str(path), subdir=False) as environment, environment.begin(write=True) as txn:
        txn.put(b"key", b"value")


def _another_versions(path: Path) -> None:
    with LMDBStore(path) as store:
        store.ping()
    with lmdb.open(str(path), subdir=False) as environment, environment.begin(write=True) as txn:
        txn.put(b"!statestore", b"2")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_directory, "is a directory; name a file"),
        (_text, "is no LMDB database"),
        (_another_programs, "another program's"),
        (_another_versions, "another version, in format b'2'"),
    ],
)
def test_what_is_no_database_of_ours_is_refused_and_left_alone(
    path: Path, make: Callable[[Path], None], said: str
) -> None:
    make(path)
    before = path.read_bytes() if path.is_file() else None
    for _ in range(2):
        with pytest.raises(ConfigurationError, match=said) as caught:
            LMDBStore(path).ping()
        assert str(path) in str(caught.value)
    assert (path.read_bytes() if path.is_file() else None) == before


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=f"no directory {tmp_path}/missing"):
        LMDBStore(tmp_path / "missing" / "state.lmdb").ping()


@pytest.mark.parametrize("exists", [False, True])
def test_a_file_or_directory_without_permission_is_named(tmp_path: Path, path: Path, exists: bool) -> None:
    if exists:
        with LMDBStore(path) as store:
            store.ping()
        os.chmod(path, 0)
    else:
        os.chmod(tmp_path, 0o500)

    def in_child() -> str:
        if os.geteuid() == 0:
            # Root may do anything, and pytest's directories are closed to others.
            for directory in path.parent.parents:
                if directory.stat().st_uid == 0 and directory != Path("/"):
                    os.chmod(directory, directory.stat().st_mode | 0o011)
            os.chmod(tmp_path, os.stat(tmp_path).st_mode | 0o055)
            os.setresuid(65534, 65534, 65534)
        with pytest.raises(ConfigurationError) as caught:
            LMDBStore(path).ping()
        return str(caught.value)

    try:
        said = fork(in_child)
    finally:
        os.chmod(tmp_path, 0o700)
    assert f"may not read and write {path}" in said if exists else f"may not make files in {tmp_path}" in said


@pytest.fixture(scope="module")
def sound_file(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A database with pages of all kinds."""
    path = tmp_path_factory.mktemp("sound") / "state.lmdb"
    with LMDBStore(path) as store:
        for number in range(200):
            store.put(b"key %d" % number, b"%d" % number * (10 if number % 3 else 5000))
        store.delete_many([b"key %d" % number for number in range(0, 200, 7)])
    return path.read_bytes()


def test_a_file_that_was_cut_short_is_an_error_and_not_the_end_of_the_process(path: Path, sound_file: bytes) -> None:
    # Reading behind the end of a mapped file is SIGBUS, so the children's survival is what is tested here.
    def open_it() -> str:
        with pytest.raises(StateStoreError) as caught, LMDBStore(path) as store:
            store.ping()
        return str(caught.value)

    lengths = [1, 100, 4096, 8191, 8192, *range(12_288, len(sound_file), 40_000), len(sound_file) - 1]
    for length in lengths:
        path.write_bytes(sound_file[:length])
        said = fork(open_it)
        assert str(path) in said
        assert "damaged" in said
        assert path.stat().st_size == length


def test_a_file_whose_last_pages_were_never_written_is_sound(path: Path) -> None:
    with LMDBStore(path) as store:
        for number in range(30):
            store.put(b"%d" % number, b"v" * 3000)
        for number in range(30):
            store.delete(b"%d" % number)
        for _ in range(5):
            store.put(b"key", b"value")
        # Pages at the end of the file, used and freed in one transaction.
        store.apply([lambda verbs: verbs.put(b"z", b"z" * MIB), lambda verbs: verbs.delete(b"z")])
    with lmdb.open(str(path), subdir=False) as environment:
        assert (environment.info()["last_pgno"] + 1) * 4096 > path.stat().st_size, "the test is about such a file"
    with LMDBStore(path) as store:
        assert list(store.keys()) == [b"key"]
        store.put(b"z", b"z" * MIB)
        assert store.get(b"z") == b"z" * MIB


@pytest.mark.parametrize("page", [2, 10, 100])
def test_a_damaged_file_is_never_taken_for_an_outage_or_absence(path: Path, sound_file: bytes, page: int) -> None:
    damaged = bytearray(sound_file)
    damaged[page * 4096 : (page + 1) * 4096] = b"\xff" * 4096
    path.write_bytes(damaged)

    def read() -> list[str]:
        answers = []
        with LMDBStore(path) as store:
            for number in range(200):
                expected = None if number % 7 == 0 else b"%d" % number * (10 if number % 3 else 5000)
                try:
                    found = store.get(b"key %d" % number)
                except StoreUnavailable:
                    answers.append("outage")
                except StateStoreError as error:
                    answers.append("damage" if f"{path} is damaged" in str(error) else str(error))
                else:
                    answers.append("right" if found == expected else "wrong" if found else "absent")
        return answers

    assert set(fork(read)) <= {"right", "damage"}
