"""``copy``: backups, complete or not there, in one directory and nowhere else."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from beaker_statestore.exceptions import ConfigurationError, StoreUnavailable
from beaker_statestore.stores.cabinet import CabinetStore
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant import server as server_module
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.backups import Backups
from beaker_statestore.tyrant.commands import COPY, FAILURE, FORBIDDEN, GET, PUT, RNUM, SUCCESS, Reply
from beaker_statestore.tyrant.mask import OPEN
from beaker_statestore.tyrant.server import ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import PATIENCE, RawClient, ServerThread

OK = Reply(SUCCESS)
FAILED = Reply(FAILURE)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


class Copied(MemoryStore):
    """Copies itself as an engine with a file does."""

    def backup(self, path: str) -> None:
        with open(path, "xb") as copy:
            copy.write(b"a copy")


class Stalled(MemoryStore):
    """A copy of it takes long: until somebody says that it may end."""

    def __init__(self) -> None:
        super().__init__()
        self.copying, self.go_on = threading.Event(), threading.Event()

    def backup(self, path: str) -> None:
        with open(path, "xb") as copy:
            copy.write(b"half of ")
            self.copying.set()
            assert self.go_on.wait(PATIENCE)
            copy.write(b"a copy")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    directory = tmp_path / "backups"
    directory.mkdir()
    return directory


# -- names


def tree(path: Path) -> dict[str, bytes | str]:
    """Everything below ``path``, with what is in it."""
    return {
        str(found.relative_to(path)): os.readlink(found) if found.is_symlink() else found.read_bytes()
        for found in path.rglob("*")
        if found.is_symlink() or not found.is_dir()
    }


_EVIL = [b"..", b"/", b".", b"@", b"\0", b"~", b"backups", b"inside", b"outside", b"link", b"new", b"\n", b"\xff", b"-"]


@given(st.lists(st.sampled_from(_EVIL), max_size=5).map(b"".join) | st.binary(max_size=20))
@example(b"new.lmdb")
@example(b"/etc/passwd")
@example(b"../outside")
@example(b"@/bin/touch")
def test_whatever_the_name_nothing_but_a_new_file_in_the_directory_comes_of_it(name: bytes) -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place, "backups")
        (directory / "directory").mkdir(parents=True)
        Path(place, "outside").write_bytes(b"outside")
        (directory / "inside").write_bytes(b"inside")
        (directory / "link").symlink_to("../outside")
        (directory / "nowhere").symlink_to("../new")
        before = tree(Path(place))
        try:
            written = Backups(directory).write(name, Copied())
        except ConfigurationError:
            assert tree(Path(place)) == before
        else:
            assert written == directory.resolve() / os.fsdecode(name)
            assert tree(Path(place)) == {**before, f"backups/{os.fsdecode(name)}": b"a copy"}


@pytest.mark.parametrize(
    "name",
    [
        b"",
        b".",
        b"..",
        b"../x",
        b"/tmp/x",
        b"a/b",
        b"@touch",
        b".hidden",
        b".x.unfinished",
        b"-rf",
        b"a\0b",
        b"a b",
        b"a\n",
        b"$(x)",
        b"a;b",
        b"a*",
        "ä".encode(),
        b"x.tcb#bnum=1",
        # What an engine keeps beside its file, and would believe.
        b"state.tcb.wal",
        b"state.lmdb-lock",
    ],
)
def test_what_is_no_plain_name_is_refused(directory: Path, name: bytes) -> None:
    with pytest.raises(ConfigurationError, match="is not the name of a backup"):
        Backups(directory).write(name, Copied())
    assert not tree(directory)


@pytest.mark.parametrize("name", [b"a" * 201, b"\xff" * 100_000])
def test_a_long_name_is_refused_for_its_length(directory: Path, name: bytes) -> None:
    with pytest.raises(ConfigurationError, match=rf"has 200 letters at most, not {len(name)}$"):
        Backups(directory).write(name, Copied())


def test_a_copy_is_called_as_what_it_is_a_copy_of(tmp_path: Path, directory: Path) -> None:
    """By its name alone `serve` and ttserver know what a file is."""
    store = CabinetStore(tmp_path / "casket.tcb")
    with store:
        for name in ("monday.lmdb", "monday.tch", "monday"):
            with pytest.raises(ConfigurationError, match=r"does not end as .*: call the backup monday\.tcb$"):
                Backups(directory).write(name.encode(), store)
        assert not tree(directory)
        Backups(directory).write(b"monday.tcb", store)
    assert list(tree(directory)) == ["monday.tcb"]


def test_of_a_table_the_records_are_copied_and_nothing_else_is_left(tmp_path: Path, directory: Path) -> None:
    leftover = directory / ".sunday.tct.unfinished.idx.name.lex"
    leftover.touch()  # by a server that was killed
    backups = Backups(directory)
    assert not tree(directory)
    with CabinetStore(tmp_path / "casket.tct") as store:
        assert store.native["misc"](b"setindex", [b"name", b"0"]) is not None
        assert store.native["misc"](b"put", [b"k", b"name", b"ann"]) is not None
        assert (tmp_path / "casket.tct.idx.name.lex").exists()
        backups.write(b"monday.tct", store)
    assert list(tree(directory)) == ["monday.tct"]
    with CabinetStore(directory / "monday.tct") as copy:
        assert copy.native["misc"](b"search", [b"addcond\0name\0STREQ\0ann"]) == [b"k"]


@pytest.mark.parametrize("name", [b"a", b"_", b"0", b"state.lmdb", b"2026-11-21.tcb", b"a" * 200, b"x=1+y", b"a..b"])
def test_a_plain_name_is_taken(directory: Path, name: bytes) -> None:
    assert Backups(directory).write(name, Copied()) == directory / name.decode()
    assert tree(directory) == {name.decode(): b"a copy"}


def test_no_file_is_replaced(directory: Path) -> None:
    taken = directory / "taken"
    things: list[Callable[[], None]] = [taken.touch, lambda: taken.symlink_to("nothing"), taken.mkdir]
    for make in things:
        make()
        with pytest.raises(ConfigurationError, match=r"there is a .*taken already; give the backup another name"):
            Backups(directory).write(b"taken", Stalled())  # without a copy of perhaps gigabytes being written first
        taken.rmdir() if taken.is_dir() else taken.unlink()


def test_not_even_one_that_came_while_the_copy_was_written(directory: Path) -> None:
    class Outrun(Copied):
        def backup(self, path: str) -> None:
            super().backup(path)
            (directory / "taken").write_bytes(b"another's")

    with pytest.raises(ConfigurationError, match="taken already"):
        Backups(directory).write(b"taken", Outrun())
    assert tree(directory) == {"taken": b"another's"}


@pytest.mark.parametrize("engine", [LMDBStore, CabinetStore])
def test_a_copy_beside_the_database_does_not_harm_it(
    tmp_path: Path, engine: Callable[[Path], LMDBStore | CabinetStore]
) -> None:
    suffix = "lmdb" if engine is LMDBStore else "tcb"
    backups = Backups(tmp_path)
    with engine(tmp_path / f"state.{suffix}") as store:
        store.put(b"k", b"v")
        for name in (f"state.{suffix}", f"state.{suffix}-lock", f"state.{suffix}.wal"):
            with pytest.raises(ConfigurationError):
                backups.write(name.encode(), store)
        path = backups.write(f"copy.{suffix}".encode(), store)
        assert store.get(b"k") == b"v"
        store.put(b"later", b"v")
    assert path.stat().st_mode & 0o777 == 0o600
    with engine(path) as copy:
        assert copy.get_many([b"k", b"later"]) == {b"k": b"v"}


# -- the directory


def test_a_directory_that_is_not_there_or_no_directory_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("nowhere", "file"):
        with pytest.raises(ConfigurationError, match=f"there is no directory .*{name} for backups; make it first"):
            Backups(tmp_path / name)


def test_a_directory_that_may_not_be_written_to_is_named(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # as who runs the tests may be root
    with pytest.raises(ConfigurationError, match=r"may not make files in .*backups"):
        Backups(directory)


# -- complete or not there


def test_a_copy_has_its_name_only_when_it_is_complete(directory: Path) -> None:
    store = Stalled()
    thread = threading.Thread(target=Backups(directory).write, args=(b"x", store))
    thread.start()
    assert store.copying.wait(PATIENCE)
    assert list(tree(directory)) == [".x.unfinished"]
    store.go_on.set()
    thread.join(PATIENCE)
    assert tree(directory) == {"x": b"half of a copy"}


def test_of_a_copy_that_fails_nothing_is_left(directory: Path) -> None:
    class Full(Copied):
        def backup(self, path: str) -> None:
            super().backup(path)
            raise StoreUnavailable("the disk is full")

    class Broken(Copied):
        def backup(self, path: str) -> None:
            super().backup(path)
            raise OSError(5, "Input/output error")

    for store in (Full(), Broken()):
        with pytest.raises(StoreUnavailable, match=r"the disk is full|the backup .*/x failed: Input/output error"):
            Backups(directory).write(b"x", store)
        assert not tree(directory)


#: Is killed while it copies.
KILLED = """
import sys, time
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant.backups import Backups
class Stalled(MemoryStore):
    def backup(self, path):
        with open(path, "xb") as copy:
            copy.write(b"half")
            copy.flush()
            print("copying", flush=True)
            time.sleep(60)
Backups(sys.argv[1]).write(b"x", Stalled())
"""


def test_a_process_that_is_killed_leaves_no_copy_and_the_next_one_tidies_up(directory: Path) -> None:
    (directory / ".of.a.person").touch()
    (directory / ".directory.unfinished").mkdir()
    with subprocess.Popen([sys.executable, "-c", KILLED, directory], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"copying\n"
        process.kill()
    assert tree(directory) == {".of.a.person": b"", ".x.unfinished": b"half"}
    backups = Backups(directory)
    assert tree(directory) == {".of.a.person": b""}
    backups.write(b"x", Copied())
    assert tree(directory) == {".of.a.person": b"", "x": b"a copy"}


# -- by a server


def test_a_copy_under_load_is_what_there_was_at_one_moment(tmp_path: Path, directory: Path) -> None:
    written = stop = 0

    def write(address: Address) -> None:
        nonlocal written
        with RawClient(address) as client:
            while not stop:
                assert client.ask(PUT(b"k%08d" % written, b"v" * 100)) == [OK]
                written += 1

    arguments = ["--backups", str(directory), "--unmask", "copy", "--verbose"]
    with ServerProcess(f"{tmp_path}/state.lmdb", arguments=arguments) as server:
        address = Address.parse(server.url)
        writer = threading.Thread(target=write, args=(address,))
        writer.start()
        moments: list[tuple[bytes, int, int]] = []
        try:
            with RawClient(address) as client:
                for name in (b"one.lmdb", b"two.lmdb", b"three.lmdb"):
                    eventually(lambda: written >= 200 * (len(moments) + 1))
                    before = written
                    assert client.ask(COPY(name)) == [OK]
                    moments.append((name, before, written + 1))
                assert client.ask(COPY(b"one.lmdb"), COPY(b"../x"), COPY(b"@true")) == [FAILED] * 3
        finally:
            stop = 1
            writer.join(PATIENCE)
        assert "there is a" in server.output
        assert "is not the name of a backup" in server.output
    for name, before, after in moments:
        with LMDBStore(directory / name.decode()) as copy:
            keys = list(copy.keys())
        assert before <= len(keys) <= after
        assert keys == [b"k%08d" % number for number in range(len(keys))]
    assert not list(tmp_path.glob("**/.*"))


def options(directory: Path | None) -> ServerOptions:
    return ServerOptions(tcp_mask=OPEN, backups=None if directory is None else Backups(directory))


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_others_are_served_while_a_copy_is_written_and_its_client_waits(directory: Path, loop: str) -> None:
    store = Stalled()
    with (
        ServerThread(store, loop=loop, options=options(directory)) as server,
        server.connect() as client,
        server.connect() as other,
    ):
        client.send(encode_request(PUT(b"k", b"v")) + encode_request(COPY(b"x")) + encode_request(GET(b"k")))
        assert store.copying.wait(PATIENCE)
        assert other.ask(GET(b"k"), PUT(b"k", b"w")) == [Reply(SUCCESS, b"v"), OK]
        other.send(encode_request(COPY(b"y")))  # the second waits for the first
        server.catch_up()
        assert list(tree(directory)) == [".x.unfinished"]
        store.go_on.set()
        assert client.receive(8) == b"\0\0\0\0\0\0\x01w"
        assert other.receive(1) == b"\0"
    assert tree(directory) == {"x": b"half of a copy", "y": b"half of a copy"}


def test_a_client_that_leaves_does_not_keep_a_copy_from_being_written(directory: Path) -> None:
    store = Stalled()
    with ServerThread(store, options=options(directory)) as server:
        with server.connect() as client:
            client.send(encode_request(COPY(b"x")))
            assert store.copying.wait(PATIENCE)
        server.catch_up()
        store.go_on.set()
        eventually(lambda: tree(directory) == {"x": b"half of a copy"})
        with server.connect() as client:
            assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]


def test_a_server_that_stops_meanwhile_ends_with_a_complete_copy(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "DRAIN", 0.05)
    store = Stalled()
    with ServerThread(store, options=options(directory)) as server, server.connect() as client:
        client.send(encode_request(COPY(b"x")))
        assert store.copying.wait(PATIENCE)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert client.is_closed()  # nobody tells it that a copy is there, before there is one
        assert stopping.is_alive()
        assert list(tree(directory)) == [".x.unfinished"]
        store.go_on.set()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        assert tree(directory) == {"x": b"half of a copy"}


def test_a_store_without_a_file_says_so_in_the_log(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    with ServerThread(MemoryStore(), options=options(directory)) as server, server.connect() as client:
        assert client.ask(COPY(b"x")) == [FAILED]
    assert "a copy failed: MemoryStore keeps no file that could be copied" in caplog.text
    assert not tree(directory)


def test_without_a_directory_there_are_no_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x"
    with ServerThread(LMDBStore(tmp_path / "state.lmdb"), options=options(None)) as server, server.connect() as client:
        assert client.ask(COPY(os.fsencode(path)), COPY(b"x")) == [FAILED] * 2
    assert "there is no directory for backups" in caplog.text
    assert not path.exists()


def test_a_directory_for_backups_does_not_open_copy_by_tcp(directory: Path) -> None:
    with (
        ServerThread(Copied(), options=ServerOptions(backups=Backups(directory))) as server,
        server.connect() as client,
    ):
        assert client.ask(COPY(b"x")) == [Reply(FORBIDDEN)]
    assert not tree(directory)
