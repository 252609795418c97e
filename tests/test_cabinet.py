"""Tokyo Cabinet: the files of others, all its types, what goes to the library itself, and what must do no harm."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from beaker_statestore.exceptions import (
    ConfigurationError,
    MissingDriverError,
    OutcomeUnknown,
    StateStoreError,
    StoreUnavailable,
)
from beaker_statestore.stores import cabinet, cabinetfile, open_store, tokyocabinet
from beaker_statestore.stores.base import LocalVerbs
from beaker_statestore.stores.cabinet import CabinetStore, is_cabinet_name
from beaker_statestore.testing import fork

SUFFIXES = ["tch", "tcb", "tcf", "tct"]
EVERY_TYPE = [*SUFFIXES, "*", "+"]
#: Disks of test machines may be nearly full.
RESERVE = 2**20
#: Seconds that anything here may take.
DEADLINE = 60.0


def make_store(directory: Path, kind: str, tuning: str = "", sync: str = "os") -> CabinetStore:
    place = kind if kind in "*+" else f"{directory}/state.{kind}"
    return CabinetStore(place + tuning, sync=sync, reserve=RESERVE)


@pytest.fixture(params=["tch", "tcb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[CabinetStore]:
    with make_store(tmp_path, request.param) as store:
        yield store


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[CabinetStore]:
    with make_store(tmp_path, "tcb") as store:
        yield store


def tool(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=True)
    return done.stdout


def misc(store: CabinetStore, name: str, *arguments: bytes) -> Any:
    return store.native["misc"](name.encode(), list(arguments), 0)


# -- files of others, and ours for others


@pytest.mark.parametrize(("suffix", "manager"), [("tch", "tchmgr"), ("tcb", "tcbmgr")])
@pytest.mark.parametrize("tuning", ["", "#bnum=1000#opts=ld"])
def test_files_are_the_originals(tmp_path: Path, suffix: str, manager: str, tuning: str) -> None:
    path = str(tmp_path / f"state.{suffix}")
    tool(manager, "create", path)
    tool(manager, "put", path, "theirs", "value")
    tool(manager, "put", "-sx", path, "00 ff", "0a 00")
    with make_store(tmp_path, suffix, tuning) as store:
        assert dict(store.get_many([b"theirs", b"\0\xff"])) == {b"theirs": b"value", b"\0\xff": b"\n\0"}
        assert store.count() == 2
        store.put(b"ours", b"new value")
        assert store.delete(b"theirs")
    assert tool(manager, "get", path, "ours") == "new value\n"
    assert tool(manager, "list", "-px", path).split() == (
        ["00", "FF", "6F", "75", "72", "73"] if suffix == "tcb" else tool(manager, "list", "-px", path).split()
    )


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("state.tch#bnum=5000#apow=3#opts=l", ["bucket number: 5119", "alignment: 8", "large"]),
        ("state.tcb#lmemb=64#nmemb=32#opts=d", ["max leaf member: 64", "max node member: 32", "deflate"]),
        ("state.tcf#width=11", ["width of the value: 11"]),
        ("state.tct#idx=name:lexical", ["name=name, type=lexical"]),
    ],
)
def test_tuning_reaches_the_file(tmp_path: Path, name: str, told: list[str]) -> None:
    with CabinetStore(tmp_path / name, reserve=RESERVE) as store:
        store.put(b"1", b"v\0w")
    path = name.partition("#")[0]
    information = tool(f"tc{path[-1]}mgr", "inform", f"{tmp_path}/{path}")
    for part in told:
        assert part in information.replace("  ", " ")


def test_a_memory_database_throws_out_what_is_beyond_its_capacity(tmp_path: Path) -> None:
    with make_store(tmp_path, "*", "#capnum=100") as store:
        store.put_many({b"%d" % number: b"" for number in range(2000)})
        assert 100 <= store.count() < 1000
        assert store.get(b"1999") == b""


def test_files_are_for_their_owner_only(tmp_path: Path, store: CabinetStore) -> None:
    with make_store(tmp_path / ".", "tct", sync="always") as other:
        seen: set[str] = set()
        for change in (
            lambda: other.put(b"key", b"a\0b"),
            lambda: misc(other, "setindex", b"a", b"lexical"),
            lambda: other.put(b"key", b"a\0b"),
            lambda: other.native["optimize"](b"bnum=100"),
            lambda: other.put(b"key", b"a\0c"),
            lambda: other.backup(str(tmp_path / "copy.tct")),
        ):
            change()
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.tct*")}
            assert set(modes.values()) == {0o600}, modes
            seen |= modes.keys()
    files = {f"{file}{index}" for file in ("state.tct", "copy.tct") for index in ("", ".idx.a.lex")}
    assert seen == files | {"state.tct.wal", "state.tct.idx.a.lex.wal"}
    (tmp_path / "other").touch()
    assert stat.S_IMODE((tmp_path / "other").stat().st_mode) & 0o044, "other files are as they were"


# -- names


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("*", "on-memory hash"),
        ("+#capnum=10", "on-memory tree"),
        ("casket.tch#bnum=1000000", "hash"),
        ("a/b.TCB", "B+ tree"),
        ("x.tcf", "fixed-length"),
        ("/x.tct", "table"),
        ("x.hdb", "hash"),
    ],
)
def test_names_are_understood_as_ttserver_does(text: str, kind: str) -> None:
    assert is_cabinet_name(text)
    store = CabinetStore(text)
    assert store.kind == kind
    assert store.path is None if text[0] in "*+" else store.path == os.path.abspath(text.partition("#")[0])


@pytest.mark.parametrize(
    "text", ["state.lmdb", "memory:", "lmdb:///x.tch", "cabinet:///x.tch", "tch", "", "**", ".", "#"]
)
def test_other_names_are_not_taken_for_its(text: str) -> None:
    assert not is_cabinet_name(text)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("state.db", "ends in .tch"),
        ("x.tch#bnun=5", "bnun=5"),
        ("x.tch#bnum", "#name=value"),
        ("x.tch#mode=wct", "never emptied"),
        ("x.tch#mode=r", "mode"),
        ("x.tch#dbgfd=1", "dbgfd"),
        ("x.tch\0#mode=wct", "NUL"),
        ("x.tch#bnum=5\0", "NUL"),
    ],
)
def test_other_names_are_refused(name: str, told: str) -> None:
    with pytest.raises(ConfigurationError, match=told):
        CabinetStore(name)


def test_no_directory_may_end_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other.tch#x").mkdir()
    monkeypatch.chdir(tmp_path / "other.tch#x")
    with pytest.raises(ConfigurationError, match="# ends a path"):
        CabinetStore("state.tch")
    with pytest.raises(ConfigurationError, match="# ends a path"):
        open_store("cabinet:///a.tch%23bnum=5/b.tch")


@pytest.mark.parametrize("arguments", [{"sync": "sometimes"}, {"reserve": 1000}])
def test_options_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(arguments))):
        CabinetStore("x.tch", **arguments)


def test_urls(tmp_path: Path) -> None:
    store = open_store(f"cabinet://{tmp_path}/state.tcb?sync=os&reserve=1MiB#bnum=1000#opts=l")
    assert isinstance(store, CabinetStore)
    with store:
        assert store.path == f"{tmp_path}/state.tcb"
        store.put(b"key", b"value")
        assert "large" in tool("tcbmgr", "inform", "-nl", store.path)
    with open_store(f"cabinet://{tmp_path}/state.tcb?reserve=1MiB") as again:
        assert again.get(b"key") == b"value"


@pytest.mark.parametrize("suffix", ["tcf", "tct"])
def test_urls_of_what_can_only_be_served_are_refused(suffix: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"serve --db /x\.{suffix}"):
        open_store(f"cabinet:///x.{suffix}")


def test_mode_w_makes_no_file(tmp_path: Path) -> None:
    with make_store(tmp_path, "tch", "#mode=w") as store, pytest.raises(ConfigurationError, match="no file"):
        store.count()
    assert not list(tmp_path.iterdir())


# -- what is missing or wrong


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "cffi", None)
    tokyocabinet._library.cache_clear()
    with make_store(tmp_path, "tch") as store, pytest.raises(MissingDriverError, match=r'pip install ".*\[cabinet\]"'):
        store.count()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tokyocabinet, "LIBRARY", "libnosuchcabinet.so.9")
    tokyocabinet._library.cache_clear()
    with make_store(tmp_path, "tch") as store, pytest.raises(MissingDriverError, match="apt install libtokyocabinet9"):
        store.count()
    tokyocabinet._library.cache_clear()


def _foreign(path: Path) -> None:
    path.write_bytes(b"not a database at all\n" * 1000)


def _cut(path: Path) -> None:
    with make_store(path.parent, path.suffix[1:]) as store:
        store.put_many({b"%d" % number: b"a\0" + b"v" * 100 for number in range(1, 1000)})
    os.truncate(path, path.stat().st_size - 5000)


def _short(path: Path) -> None:
    path.write_bytes(b"ToKyO CaBiNeT\n")


def _another_type(path: Path) -> None:
    other = "tcb" if path.suffix == ".tch" else "tch"
    with make_store(path.parent, other) as store:
        store.put(b"key", b"value")
    shutil.move(path.with_suffix(f".{other}"), path)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("harm", "told"),
    [(_foreign, "no Tokyo Cabinet"), (_cut, "cut short"), (_short, "damaged"), (_another_type, "another type")],
)
def test_what_is_no_such_database_is_left_alone(
    tmp_path: Path, suffix: str, harm: Callable[[Path], None], told: str
) -> None:
    path = tmp_path / f"state.{suffix}"
    harm(path)
    before = path.read_bytes()
    for _ in range(2):
        with make_store(tmp_path, suffix) as store, pytest.raises(ConfigurationError, match=told) as caught:
            store.get(b"1")
        assert str(path) in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(("place", "told"), [("none/x.tch", "no directory"), (".", "cannot read and write")])
def test_a_place_where_no_file_can_be(tmp_path: Path, place: str, told: str) -> None:
    (tmp_path / "state.tch").mkdir()
    path = tmp_path / "state.tch" if place == "." else tmp_path / place
    with CabinetStore(path, reserve=RESERVE) as store, pytest.raises(ConfigurationError, match=told):
        store.count()


def test_damage_within_is_an_error_and_no_absence(tmp_path: Path) -> None:
    with make_store(tmp_path, "tch", "#bnum=10") as store:
        store.put_many({b"%d" % number: b"v" * 100 for number in range(500)})
    path = tmp_path / "state.tch"
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 3)
        file.write(b"\xff" * (path.stat().st_size // 3))
    errors = 0
    with make_store(tmp_path, "tch") as store:
        for number in range(500):
            try:
                store.get(b"%d" % number)
            except StateStoreError:
                errors += 1
    assert errors > 100


# -- one process at a time

_OPEN = """
import sys
from beaker_statestore.stores.cabinet import CabinetStore
try:
    print(CabinetStore(sys.argv[1], reserve=2**20).count())
except Exception as error:
    print(type(error).__name__, error)
"""


def seen_by_another_process(path: Path) -> str:
    return tool(sys.executable, "-c", _OPEN, str(path)).strip()


def test_a_file_is_for_one_process(tmp_path: Path, store: CabinetStore) -> None:
    store.put(b"key", b"value")
    assert store.path is not None
    path = Path(store.path)
    copy = tmp_path / f"copy{path.suffix}"
    for use in (
        lambda: None,
        lambda: store.backup(str(copy)),
        lambda: store.native["optimize"](b""),
        lambda: store.clear(),
        lambda: store.put(b"key", b"value"),
    ):
        use()
        told = seen_by_another_process(path)
        assert told.startswith("StoreUnavailable"), f"another process could open it: {told}"
        assert str(path) in told
        with pytest.raises(subprocess.CalledProcessError):
            tool(f"tc{path.suffix[-1]}mgr", "inform", "-nb", str(path))
    store.close()
    assert seen_by_another_process(path) == "1"
    assert seen_by_another_process(copy) == "1"


def test_a_file_that_another_program_uses_is_refused_at_once(tmp_path: Path) -> None:
    path = tmp_path / "state.tch"
    code = "import sys, time; from beaker_statestore.stores.tokyocabinet import Database\n"
    code += "Database(sys.argv[1].encode()); print('open', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"open\n"
        store = make_store(tmp_path, "tch")
        with pytest.raises(StoreUnavailable, match="another process"):
            store.count()
        other.kill()
        other.wait(DEADLINE)
    assert store.count() == 0
    store.close()


def test_a_file_is_open_once_in_a_process(tmp_path: Path, store: CabinetStore) -> None:
    store.put(b"key", b"value")
    assert store.path is not None
    (tmp_path / "linked").symlink_to(tmp_path)
    store.native["optimize"](b"")
    link = tmp_path / f"hard{Path(store.path).suffix}"
    link.hardlink_to(store.path)
    for name in (store.path, f"{tmp_path}/linked/{Path(store.path).name}", link):
        with CabinetStore(name, reserve=RESERVE) as other, pytest.raises(ConfigurationError, match="already open"):
            other.count()
    # The refusal has not ended the lock.
    assert seen_by_another_process(Path(store.path)).startswith("StoreUnavailable")


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_a_child_neither_uses_nor_closes_what_its_parent_opened(tmp_path: Path, kind: str) -> None:
    store = make_store(tmp_path, kind)
    store.put(b"1", b"a\0b")

    def in_child() -> str:
        with pytest.raises(StoreUnavailable) as caught:
            store.get(b"1")
        store.close()
        with pytest.raises(StateStoreError):
            store.get(b"1")
        return str(caught.value)

    assert "belongs to the process" in fork(in_child)
    assert store.get(b"1") == b"a\0b"
    store.close()


def test_a_child_may_open_what_its_parent_has_not(tmp_path: Path, store: CabinetStore) -> None:
    def in_child() -> bytes | None:
        store.put(b"key", b"the child's")
        value = store.get(b"key")
        store.close()
        return value

    assert fork(in_child) == b"the child's"
    assert store.get(b"key") == b"the child's"


def test_a_child_that_cannot_open_what_its_parent_had_open_is_told_why(tmp_path: Path, store: CabinetStore) -> None:
    store.put(b"key", b"value")
    path = store.path
    assert path is not None
    started, closed = os.pipe(), os.pipe()

    def in_child() -> str:
        os.write(started[1], b"x")
        os.read(closed[0], 1)
        with CabinetStore(path, reserve=RESERVE) as other, pytest.raises(ConfigurationError) as caught:
            other.get(b"key")
        return str(caught.value)

    def close() -> None:
        os.read(started[0], 1)
        store.close()
        os.write(closed[1], b"x")

    thread = threading.Thread(target=close)
    thread.start()
    try:
        assert "was open in the process that this one was forked from" in fork(in_child)
    finally:
        os.write(started[1], b"x")
        thread.join(DEADLINE)
        for descriptor in (*started, *closed):
            os.close(descriptor)


def test_a_fork_while_another_thread_is_at_work(tmp_path: Path, store: CabinetStore) -> None:
    inside, finished = threading.Event(), threading.Event()

    def work(_verbs: LocalVerbs) -> None:
        inside.set()
        finished.wait(DEADLINE)

    thread = threading.Thread(target=store.apply, args=([work],))
    thread.start()
    try:
        assert inside.wait(DEADLINE)

        def in_child() -> str:
            with pytest.raises(StoreUnavailable) as caught:
                store.get(b"key")
            return str(caught.value)

        assert "belongs to the process" in fork(in_child)
    finally:
        finished.set()
        thread.join(DEADLINE)


def test_a_store_that_nobody_closes_is_closed_at_the_end(tmp_path: Path) -> None:
    code = "import sys; from beaker_statestore.stores.cabinet import CabinetStore\n"
    code += "CabinetStore(sys.argv[1], sync='os', reserve=2**20).put(b'a', b'1')\n"
    code += "s = CabinetStore(sys.argv[1], sync='os', reserve=2**20); s.put(b'b', b'2')"
    tool(sys.executable, "-c", code, f"{tmp_path}/state.tcb")
    with make_store(tmp_path, "tcb") as store:
        assert store.get_many([b"a", b"b"]) == {b"a": b"1", b"b": b"2"}


# -- crashes

_CRASH = """
import os, sys
from beaker_statestore.stores.cabinet import CabinetStore
store = CabinetStore(sys.argv[1], sync="always", reserve=2**20)
store.put_many({b"%d" % number: b"old" for number in range(300)})
def half(verbs):
    verbs.put_many({b"%d" % number: b"new" * 100 for number in range(200)})
    verbs.delete(b"299")
    os.kill(os.getpid(), 9)
store.apply([half])
"""


@pytest.mark.parametrize("suffix", ["tch", "tcb"])
def test_a_batch_that_is_killed_half_way_has_not_happened(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"state.{suffix}"
    killed = subprocess.run([sys.executable, "-c", _CRASH, path], timeout=DEADLINE)
    assert killed.returncode == -signal.SIGKILL
    with make_store(tmp_path, suffix) as store:
        assert dict.fromkeys(store.get_many([b"%d" % number for number in range(300)]).values()) == {b"old": None}
        assert store.count() == 300


@pytest.mark.parametrize("suffix", ["tch", "tcb"])
def test_the_log_of_another_file_is_never_applied(
    tmp_path: Path, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A backup is put in the place of a killed server's file, whose log is left."""
    path = tmp_path / f"state.{suffix}"
    backup = tmp_path / f"backup.{suffix}"
    log = tmp_path / f"state.{suffix}.wal"
    records = {b"%d" % number: b"backup" * number for number in range(100)}
    with make_store(tmp_path, suffix) as store:
        store.put_many(records)
        store.backup(str(backup))
        store.clear()
    assert subprocess.run([sys.executable, "-c", _CRASH, path], timeout=DEADLINE).returncode == -signal.SIGKILL
    assert log.stat().st_size
    shutil.copyfile(backup, path)
    code = "import os, sys; from beaker_statestore.stores.cabinet import CabinetStore\n"
    code += "store = CabinetStore(sys.argv[1], sync='os', reserve=2**20); store.put(b'new', b''); store.sync()\n"
    code += "os.kill(os.getpid(), 9)"
    assert subprocess.run([sys.executable, "-c", code, path], timeout=DEADLINE).returncode == -signal.SIGKILL
    with make_store(tmp_path, suffix, sync="always") as store:
        assert store.get_many(records) == records
        assert set(store.keys()) == {*records, b"new"}
    assert (tmp_path / f"{log.name}.stale").stat().st_size
    shutil.copyfile(f"{log}.stale", log)
    with make_store(tmp_path, suffix) as store:
        assert store.count() == 101
    assert "is the log of another file" in caplog.text
    # Nor to a file that is made anew.
    shutil.copyfile(f"{log}.stale", log)
    path.unlink()
    assert subprocess.run([sys.executable, "-c", code, path], timeout=DEADLINE).returncode == -signal.SIGKILL
    with make_store(tmp_path, suffix) as store:
        assert list(store.keys()) == [b"new"]


_OPTIMIZE = """
import sys
from beaker_statestore.stores.cabinet import CabinetStore
store = CabinetStore(sys.argv[1], sync="os", reserve=2**20)
store.count()
store.native["optimize"](b"bnum=100")
"""


@pytest.mark.parametrize(
    ("suffix", "call"),
    [
        ("tch", "linkat"),
        ("tch", "rename"),
        ("tct", "rename"),
        *(
            pytest.param(suffix, call, marks=pytest.mark.long)
            for suffix in SUFFIXES
            for call in ("linkat", "unlink", "rename", "fsync", "ftruncate", "pwrite64", "msync")
        ),
    ],
)
def test_killed_while_it_is_optimized_a_database_is_as_before(tmp_path: Path, suffix: str, call: str) -> None:
    records = {b"%d" % number: b"a\0%d" % number for number in range(1, 101)}
    path = tmp_path / f"state.{suffix}"
    for number in range(1, 30):
        with make_store(tmp_path, suffix) as store:
            store.put_many(records)
            if suffix == "tct":
                assert misc(store, "setindex", b"a", b"lexical") == []
        tracer = ["strace", "-qq", "-o", os.devnull, "-e", f"inject={call}:signal=KILL:when={number}"]
        done = subprocess.run([*tracer, sys.executable, "-c", _OPTIMIZE, path], timeout=DEADLINE, check=False)
        with make_store(tmp_path, suffix) as store:
            assert store.get_many(records) == records
            assert store.count() == 100
            if suffix == "tct":
                assert misc(store, "search", b"addcond\0a\0STREQ\x0070") == [b"70"]
        assert not list(tmp_path.glob("*.tmp.*"))
        assert not (tmp_path / f"{path.name}.before-optimize").exists()
        for file in tmp_path.iterdir():
            file.unlink()
        if done.returncode == 0:
            return
        assert done.returncode == -signal.SIGKILL
    raise AssertionError("it never came to its end")


@pytest.mark.parametrize("suffix", ["tch", "tcb"])
def test_what_an_optimize_has_left_does_not_take_the_place_of_a_newer_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"state.{suffix}"
    with make_store(tmp_path, suffix) as store:
        store.put(b"k", b"old")
    path.rename(f"{path}.before-optimize")
    with CabinetStore(tmp_path / f"other.{suffix}") as store:
        store.put(b"k", b"restored")
    (tmp_path / f"other.{suffix}").rename(path)
    (tmp_path / f"{path.name}.before-optimize.stale").write_bytes(b"of an earlier time")
    with make_store(tmp_path, suffix) as store:
        assert store.get(b"k") == b"restored"
    assert (tmp_path / f"{path.name}.before-optimize.stale").read_bytes() == b"of an earlier time"
    assert (tmp_path / f"{path.name}.before-optimize.stale1").exists()
    # But what somebody has left open may be half of it.
    header = bytearray(path.read_bytes())
    header[33] |= 1
    path.write_bytes(header)
    (tmp_path / f"{path.name}.before-optimize.stale1").rename(f"{path}.before-optimize")
    with make_store(tmp_path, suffix) as store:
        assert store.get(b"k") == b"old"
    assert (tmp_path / f"{path.name}.stale").exists()


@pytest.mark.parametrize("option", ["-cd", "-ci", "-cj"])
def test_a_tree_of_another_order_is_no_store(tmp_path: Path, option: str) -> None:
    path = str(tmp_path / "state.tcb")
    tool("tcbmgr", "create", option, path)
    with make_store(tmp_path, "tcb") as store, pytest.raises(ConfigurationError, match="in another order"):
        store.count()


@pytest.mark.parametrize("sync", ["always", "os"])
@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_what_a_crash_can_lose_is_told_in_words(tmp_path: Path, kind: str, sync: str) -> None:
    told = make_store(tmp_path, kind, sync=sync).crash_can_lose(1.0)
    if kind in "*+":
        assert told.startswith("everything")
    elif sync == "always":
        assert told.startswith("nothing that was acknowledged")
    elif kind in ("tcb", "tct"):
        assert "in the last 1 s" in told
        assert "the process is killed" in told
    else:
        assert "a dying process loses nothing" in told


# -- a full disk


def test_nothing_is_written_while_the_disk_is_nearly_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, store: CabinetStore
) -> None:
    store.put_many({b"a": b"1", b"b": b"2"})
    real = os.fstatvfs(os.open(tmp_path, os.O_RDONLY))
    free = RESERVE

    def scarce(_descriptor: int) -> os.statvfs_result:
        values = list(real)
        values[4] = free // real.f_frsize
        return os.statvfs_result(values)

    monkeypatch.setattr(os, "fstatvfs", scarce)
    for write in (
        lambda: store.put(b"c", b"3"),
        lambda: store.add(b"c", b"3"),
        lambda: store.native["put"](b"a", b"3"),
        lambda: store.native["addint"](b"c", 3),
        lambda: misc(store, "putlist", b"c", b"3"),
        lambda: store.native["optimize"](b""),
    ):
        with pytest.raises(StoreUnavailable, match="nearly full"):
            write()
    with pytest.raises(StoreUnavailable, match="nearly full"):
        store.apply([lambda verbs: verbs.delete(b"a"), lambda verbs: verbs.put(b"c", b"3")])
    assert store.get_many([b"a", b"b", b"c"]) == {b"a": b"1", b"b": b"2"}
    assert store.delete(b"b"), "what is there can be removed"
    free = RESERVE // 2
    with pytest.raises(StoreUnavailable, match="nearly full"):
        store.delete(b"a")
    free = 4 * RESERVE
    store.put(b"c", b"3")
    with pytest.raises(StoreUnavailable, match="nearly full"):
        store.put(b"huge", b"v" * 2 * RESERVE)
    assert store.get_many([b"a", b"b", b"c"]) == {b"a": b"1", b"c": b"3"}


@pytest.mark.parametrize("sync", ["os", "always"])
@pytest.mark.parametrize("name", ["tch", "tcb", "tch#xmsiz=0", "tcb#xmsiz=0"])
def test_a_write_that_failed_is_no_success_and_the_last(tmp_path: Path, name: str, sync: str) -> None:
    """Here it is the process that may make no larger files."""
    suffix, _, tuning = name.partition("#")

    def in_child() -> tuple[int, int, str, list[bytes]]:
        store = make_store(tmp_path, suffix, f"#{tuning}" if tuning else "", sync)
        store.put(b"first", b"1")
        store.sync()
        size = os.path.getsize(f"{tmp_path}/state.{suffix}")
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 200_000, size + 200_000))
        done = 0
        told = ""
        for _ in range(100):
            try:
                store.put(b"%d" % done, b"v" * 20_000)
                store.sync()
            except StoreUnavailable as error:
                told = str(error)
                break
            done += 1
        later = []
        for write in (lambda: store.put(b"x", b"1"), lambda: store.sync(), lambda: store.native["put"](b"x", b"1")):
            try:
                write()
            except StoreUnavailable as error:
                later.append(str(error))
        found = [store.get(b"first") or b"", store.get(b"0") or b""]
        store.close()
        return done, len(later), told, found

    done, refused, told, found = fork(in_child)
    assert 0 < done < 100
    assert refused == 3
    assert "until this process is restarted" in told
    assert found == [b"1", b"v" * 20_000]
    # A tree's fails only as it is committed, and then the library throws away what would undo it.
    if sync == "always" and suffix == "tch":
        with make_store(tmp_path, suffix) as store:
            assert sorted(store.keys()) == sorted([b"first", *(b"%d" % number for number in range(done))])
            assert set(store.get_many([b"%d" % number for number in range(done)]).values()) == {b"v" * 20_000}
            store.put(b"life", b"goes on")


# -- copies


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_backup_is_a_database(tmp_path: Path, suffix: str) -> None:
    records = {b"%d" % number: b"a\0%d" % number for number in range(1, 200)}
    with make_store(tmp_path, suffix) as store:
        store.put_many(records)
        store.backup(f"{tmp_path}/copy.{suffix}")
        store.put(b"1", b"a\0later")
        assert store.get(b"1") == b"a\0later"
    with CabinetStore(f"{tmp_path}/copy.{suffix}", reserve=RESERVE) as copy:
        assert copy.get_many(records) == records
        assert copy.count() == len(records)


def test_a_backup_replaces_nothing(tmp_path: Path, store: CabinetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put(b"key", b"value")
    assert store.path is not None
    (tmp_path / "taken").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    for path in (store.path, "taken", "link", "none/copy", "@touch ran"):
        if path.startswith("@"):
            store.backup(path)  # a name like any other
            assert (tmp_path / path).is_file()
        else:
            with pytest.raises(ConfigurationError, match="cannot write a copy"):
                store.backup(path)
    assert (tmp_path / "taken").read_text() == "kept"
    assert not (tmp_path / "ran").exists()
    assert store.get(b"key") == b"value"


def test_closing_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: CabinetStore) -> None:
    store.put(b"key", b"value")
    monkeypatch.setattr(cabinet, "PATIENCE", 0.05)
    refused = []

    def close(_verbs: LocalVerbs) -> None:
        def in_thread() -> None:
            with pytest.raises(StoreUnavailable, match="another thread"):
                store.close()
            refused.append(True)

        thread = threading.Thread(target=in_thread)
        thread.start()
        thread.join(DEADLINE)

    store.apply([close])
    assert refused
    assert store.get(b"key") == b"value"


def test_after_an_optimize_whose_old_file_would_come_back_nothing_is_written(
    store: CabinetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(b"key", b"value")

    def fails(_self: cabinetfile.CabinetFile) -> None:
        raise PermissionError(1, "not permitted")

    monkeypatch.setattr(cabinetfile.CabinetFile, "_keep_old_files", lambda _self: None)
    monkeypatch.setattr(cabinetfile.CabinetFile, "_remove_old_files", fails)
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="could not be optimized"):
            store.native["optimize"](b"")
    with pytest.raises(StoreUnavailable, match="could not be optimized"):
        store.put(b"key", b"another")


def test_an_optimize_for_which_there_is_no_room_is_not_begun(
    store: CabinetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(b"key", b"value")
    monkeypatch.setattr(tokyocabinet.Database, "optimize", lambda _self, _parameters: pytest.fail("it was begun"))
    with pytest.raises(StoreUnavailable, match="nearly full"):
        store.native["optimize"](b"bnum=1000000000000")
    assert store.get(b"key") == b"value"


def test_memory_has_no_backup(tmp_path: Path) -> None:
    with make_store(tmp_path, "*") as store, pytest.raises(ConfigurationError, match="keeps no file"):
        store.backup(f"{tmp_path}/copy.tch")


# -- scans


def test_scans_where_keys_have_no_order_find_all_that_stays(tmp_path: Path) -> None:
    with make_store(tmp_path, "tch", "#bnum=100") as store:
        keys = {b"%05d" % number for number in range(3000)}
        store.put_many(dict.fromkeys(keys, b"v"))
        found = []
        cursor = None
        moved = iter(sorted(keys))
        while True:
            page, cursor = store.scan(b"", cursor, 100)
            found += page
            if cursor is None:
                break
            # These move to the end of the file, and others into their place.
            for key in [next(moved) for _ in range(50)]:
                store.put(key, b"v" * 500)
                store.delete(key + b"!")
                store.put(key + b"!", b"v")
        assert keys <= set(found)
        assert found == sorted(found)


def test_a_whole_scan_collects_the_keys_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    fwmkeys = tokyocabinet.Database.fwmkeys

    def counting(self: tokyocabinet.Database, prefix: bytes, maximum: int = -1) -> tokyocabinet.KeyList:
        collected.append(prefix)
        return fwmkeys(self, prefix, maximum)

    with make_store(tmp_path, "tch") as store:
        store.put_many({b"%s:%05d" % (word, number): b"" for number in range(1000) for word in (b"a", b"b")})
        monkeypatch.setattr(tokyocabinet.Database, "fwmkeys", counting)
        cursor, found = None, 0
        while True:
            page, cursor = store.scan(b"a:", cursor, 10)
            found += len(page)
            store.put(b"c", b"")
            if cursor is None:
                break
        assert found == 1000
        assert collected == [b"a:"]
        assert len(list(store.ordered_keys(b"b"))) == 1001
        assert collected == [b"a:", b""]


def test_a_scan_goes_on_when_its_keys_have_been_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_store(tmp_path, "tch") as store:
        keys = [b"%02d" % number for number in range(50)]
        store.put_many(dict.fromkeys(keys, b""))
        page, cursor = store.scan(b"", None, 20)
        monkeypatch.setattr(cabinetfile, "SNAPSHOT_AGE", -1.0)
        store.get(b"00")
        more, cursor = store.scan(b"", cursor, 20)
        rest, cursor = store.scan(b"", cursor, 20)
        assert (page + more + rest, cursor) == (keys, None)


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_every_type_can_be_scanned(tmp_path: Path, kind: str) -> None:
    keys = sorted(b"%d" % number for number in range(1, 120))
    with make_store(tmp_path, kind) as store:
        store.put_many(dict.fromkeys(keys, b"a\x00b"))
        pages = []
        cursor = None
        while True:
            page, cursor = store.scan(b"1", cursor, 7)
            pages += page
            if cursor is None:
                break
        assert pages == [key for key in keys if key.startswith(b"1")]
        assert list(store.ordered_keys(b"5", after=True)) == [key for key in keys if key > b"5"]
        assert store.apply([lambda verbs: list(verbs.ordered_keys(b"5"))]) == [[key for key in keys if key >= b"5"]]


def test_a_scan_does_not_end_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    collect = cabinetfile.CabinetFile.collect

    def counting(self: cabinetfile.CabinetFile, prefix: bytes = b"") -> tokyocabinet.KeyList:
        collected.append(prefix)
        return collect(self, prefix)

    monkeypatch.setattr(cabinetfile.CabinetFile, "collect", counting)
    with make_store(tmp_path, "tch") as store:
        words = [b"a", b"b", b"c", b"d", b"e"]
        store.put_many({b"%s%02d" % (word, number): b"" for word in words for number in range(50)})
        cursors = {word: store.scan(word, None, 20)[1] for word in words[:4]}
        assert store.apply([lambda verbs: len(list(verbs.keys(b"e")))]) == [50]
        for word in reversed(words[1:4]):
            page, cursor = store.scan(word, cursors[word], 20)
            assert page == [b"%s%02d" % (word, number) for number in range(20, 40)]
            assert store.scan(word, cursor, 20) == ([b"%s%02d" % (word, number) for number in range(40, 50)], None)
        assert collected == words
        assert not store._file._snapshots.keys() - {b"a"}  # type: ignore[union-attr]


def test_others_use_the_store_while_keys_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, finished = threading.Event(), threading.Event()
    sort = tokyocabinet.KeyList.sort

    def slow(self: tokyocabinet.KeyList) -> None:
        begun.set()
        assert finished.wait(DEADLINE)
        sort(self)

    monkeypatch.setattr(tokyocabinet.KeyList, "sort", slow)
    with make_store(tmp_path, "tch") as store:
        store.put_many({b"%d" % number: b"" for number in range(5)})
        found: list[bytes] = []
        for scan in (store.keys, store.ordered_keys):
            begun.clear()
            finished.clear()
            thread = threading.Thread(target=lambda scan=scan: found.extend(scan()))
            thread.start()
            try:
                assert begun.wait(DEADLINE)
                assert store._lock.acquire(timeout=DEADLINE)
                store._lock.release()
            finally:
                finished.set()
                thread.join(DEADLINE)
        assert found == 2 * [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("kind", ["tch", "tcb"])
def test_keys_of_a_store_that_was_closed_meanwhile(tmp_path: Path, kind: str) -> None:
    store = make_store(tmp_path, kind)
    store.put_many({b"%d" % number: b"" for number in range(2000)})
    (keys,) = store.apply([lambda verbs: verbs.ordered_keys()])
    next(keys)
    database = store._file.database  # type: ignore[union-attr]
    store.close()
    with pytest.raises(StateStoreError, match="has been closed"):
        list(keys)
    with pytest.raises(TypeError):
        database.get(b"1")


# -- what goes to the library itself


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_the_iterator_visits_every_key_although_each_is_deleted(tmp_path: Path, kind: str) -> None:
    with make_store(tmp_path, kind) as store:
        keys = {b"%d" % number for number in range(1, 50)}
        store.put_many(dict.fromkeys(keys, b"a\x00b"))
        native = store.native
        assert native["iterinit"]() is True
        seen = []
        while (key := native["iternext"]()) is not None:
            seen.append(key)
            assert store.delete(key)
        assert sorted(seen) == sorted(keys)
        assert native["iternext"]() is None
        assert store.count() == 0


def test_an_iterator_that_was_never_begun_answers_nothing(store: CabinetStore) -> None:
    store.put(b"key", b"value")
    assert store.native["iternext"]() is None
    assert misc(store, "iternext") is None


def test_a_tree_has_several_values_for_a_key(tree: CabinetStore) -> None:
    assert misc(tree, "putlist", b"k", b"1", b"k", b"2", b"m", b"x") == []
    assert misc(tree, "putdup", b"k", b"3") == []
    assert misc(tree, "putdupback", b"k", b"4") == []
    values = misc(tree, "get", b"k")
    assert sorted(values) == [b"1", b"2", b"3", b"4"]
    assert tree.get(b"k") == values[0]
    assert tree.count() == 5
    assert list(tree.keys()) == [b"k", b"m"]
    tree.native["iterinit"]()
    assert [tree.native["iternext"]() for _ in range(6)] == [b"k"] * 4 + [b"m", None]
    misc(tree, "iterinit")
    assert [misc(tree, "iternext") for _ in range(6)] == [*([b"k", value] for value in values), [b"m", b"x"], None]
    # Deleting takes the first value each time, and the iterator goes on with the next.
    misc(tree, "iterinit")
    seen = []
    while (record := misc(tree, "iternext")) is not None:
        seen.append(record[1])
        assert tree.native["out"](record[0])
    assert seen == [*values, b"x"]
    assert tree.native["out"](b"k") is None


@pytest.mark.parametrize(
    "remove",
    [
        lambda verbs: verbs.delete(b"k"),
        lambda verbs: verbs.compare_and_swap(b"k", b"1", None),
        lambda verbs: verbs.delete_many([b"k"]),
    ],
)
def test_what_is_removed_does_not_come_back_as_a_further_value(
    tree: CabinetStore, remove: Callable[[LocalVerbs], Any]
) -> None:
    misc(tree, "putlist", b"k", b"1", b"k", b"2", b"m", b"x")
    remove(tree)
    assert tree.get(b"k") is None
    assert misc(tree, "get", b"k") is None
    assert tree.delete(b"k") is False
    assert tree.count() == 1


def test_several_values_are_put_back_in_order(tree: CabinetStore) -> None:
    misc(tree, "putlist", b"k", b"1", b"k", b"2", b"k", b"3")
    for change in (
        lambda verbs: verbs.put(b"k", b"other"),
        lambda verbs: verbs.delete(b"k"),
        lambda verbs: verbs.clear(),
        lambda verbs: verbs.native["misc"](b"outlist", [b"k"], 0),
        lambda verbs: verbs.native["misc"](b"putdup", [b"k", b"4"], 0),
        lambda verbs: verbs.native["addint"](b"k", 4),
        lambda verbs: verbs.native["misc"](b"putcat", [b"k", b"4"], 0),
        lambda verbs: verbs.native["out"](b"k"),
    ):
        with pytest.raises(ZeroDivisionError):
            tree.apply([change, lambda _verbs: 1 // 0])
        assert misc(tree, "get", b"k") == [b"1", b"2", b"3"]
        assert tree.count() == 3


@pytest.mark.parametrize("sync", ["os", "always"])
@pytest.mark.parametrize("suffix", ["tch", "tcb", "tct"])
def test_native_changes_are_undone_too(tmp_path: Path, suffix: str, sync: str) -> None:
    with make_store(tmp_path, suffix, sync=sync) as store:
        store.put(b"k", b"a\0b")
        operations: list[Callable[[LocalVerbs], Any]] = [
            lambda verbs: verbs.native["put"](b"k", b"a\0c"),
            lambda verbs: verbs.native["misc"](b"putcat", [b"k", b"d\0e"], 0),
            lambda verbs: verbs.native["addint"](b"n", 4),
            lambda verbs: verbs.native["adddouble"](b"d", 4, 0),
            lambda verbs: verbs.native["misc"](b"out", [b"k"], 0),
            lambda verbs: verbs.native["misc"](b"putlist", [b"x", b"a\0b"], 0),
            lambda verbs: verbs.native["optimize"](b""),
            lambda verbs: verbs.native["misc"](b"vanish", [], 0),
            lambda verbs: verbs.native["put"](b"y", b"a\0c"),
            lambda _verbs: 1 // 0,
        ]
        with pytest.raises(ZeroDivisionError):
            store.apply(operations)
        assert (store.count(), store.get(b"k")) == (1, b"a\0b")


def test_numbers_are_as_the_original_stores_them(store: CabinetStore) -> None:
    addint, adddouble = store.native["addint"], store.native["adddouble"]
    assert addint(b"i", 5) == 5
    assert store.get(b"i") == (5).to_bytes(4, sys.byteorder)
    assert addint(b"i", -7) == -2
    assert adddouble(b"d", 1, 500_000_000_000) == 1.5
    assert adddouble(b"d", -3, -250_000_000_000) == -1.75
    store.put(b"text", b"text of another length")
    assert (addint(b"text", 1), adddouble(b"text", 1, 0)) == (None, None)
    assert store.get(b"text") == b"text of another length"
    assert addint(b"least", -(2**31)) is None
    assert store.get(b"least") == (-(2**31)).to_bytes(4, sys.byteorder, signed=True)
    assert adddouble(b"inf", 2**63 - 1, 0) == float("inf")
    assert adddouble(b"inf", -(2**63), 0) is None
    assert adddouble(b"nan", -(2**63), -(2**63)) is None


@pytest.mark.parametrize("kind", ["tcf", "tct", "*", "+"])
def test_what_databases_do_themselves_that_are_no_stores(tmp_path: Path, kind: str) -> None:
    with make_store(tmp_path, kind) as store:
        native = store.native
        assert store.scans_itself
        assert native["put"](b"1", b"a\0b") is True
        assert store.add(b"2", b"a\0b")
        assert native["fwmkeys"](b"[min,max]" if kind == "tcf" else b"", 1) == [b"1"]
        if kind in "*+":
            assert not {"putcat", "putshl", "vsiz"} & native.keys()
            return
        assert native["putcat"](b"1", b"\0c\0d" if kind == "tcf" else b"c\0d") is True
        assert (native["vsiz"](b"1"), native["vsiz"](b"9")) == (7 if kind == "tcf" else 8, None)
        assert native["putshl"](b"1", b"\0e", 3) is True
        assert native["putshl"](b"3", b"a\0b", 1) is True
        assert store.get(b"3") == b"a\0b"


@pytest.mark.parametrize("kind", ["tch", "tcb"])
def test_what_a_store_leaves_to_the_server(tmp_path: Path, kind: str) -> None:
    with make_store(tmp_path, kind) as store:
        store.put(b"k", b"v")
        assert not store.scans_itself
        assert not {"fwmkeys", "putcat", "vsiz"} & store.native.keys()
        assert (misc(store, "regex", b"k"), misc(store, "range", b"")) == (None, None)


@pytest.mark.parametrize("arguments", [[], [b"0"], [b"-1"], [b"x"], [b"5000"], [b"99999999999999999999"]])
def test_no_search_finds_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[bytes]) -> None:
    monkeypatch.setattr(cabinet, "MOST_FOUND", 3)
    with make_store(tmp_path, "+") as store:
        store.put_many({b"%d" % number: b"" for number in range(1, 10)})
        assert misc(store, "regex", b".", *arguments) == [b"1", b"", b"2", b"", b"3", b""]
        assert misc(store, "range", b"", *arguments) == [b"1", b"", b"2", b"", b"3", b""]
        assert misc(store, "range") == [b"1", b"", b"2", b"", b"3", b""]
        assert misc(store, "regex", b".", b"2") == [b"1", b"", b"2", b""]
        assert misc(store, "regex") is None


@pytest.mark.parametrize("kind", ["tch", "tcb", "*", "+"])
def test_no_record_grows_beyond_what_the_library_bears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(cabinet, "LARGEST_RECORD", 1000)
    with make_store(tmp_path, kind) as store:
        for write in (
            lambda: store.put(b"key", b"v" * 998),
            lambda: store.add(b"key", b"v" * 998),
            lambda: store.compare_and_swap(b"key", None, b"v" * 998),
        ):
            with pytest.raises(StateStoreError, match="1001 bytes"):
                write()
        assert store.native["put"](b"key", b"v" * 998) is None
        for _ in range(3):
            store.put(b"key", b"v" * 900)
        assert misc(store, "putcat", b"key", b"v" * 98) is None
        assert misc(store, "putcat", b"key", b"v" * 97) == []
        assert misc(store, "putcat", b"key", b"v") is None
        assert misc(store, "putlist", b"a", b"v" * 500, b"a", b"v" * 500) is None
        assert store.get(b"key") == b"v" * 997
        # In one batch too, of which nothing else knows yet.
        grown = store.apply([lambda verbs: verbs.native["misc"](b"putcat", [b"c", b"v" * 300], 0)] * 5)
        assert grown == [[], [], [], None, None]
        store.put_many({b"1": b"v" * 600, b"2": b"v" * 600})
        assert misc(store, "getlist", b"1", b"2") is None
        assert misc(store, "getlist", b"1", b"1") is None
        assert misc(store, "getlist", b"1", b"none") == [b"1", b"v" * 600]


def test_values_of_one_key_grow_no_further_together(tree: CabinetStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cabinet, "LARGEST_RECORD", 1000)
    for name in ("putdup", "putdupback", "putlist"):
        assert misc(tree, name, b"key", b"v" * 300) == []
    assert misc(tree, "putcat", b"key", b"v" * 200) is None
    for name in ("putdup", "putdupback", "putlist"):
        assert misc(tree, name, b"key", b"v" * 200) is None
    assert misc(tree, "get", b"key") == [b"v" * 300] * 3
    tree.put(b"key", b"v" * 900)
    assert misc(tree, "get", b"key") is None, "more than any answer"


def test_a_fixed_length_database_has_the_originals_rules(tmp_path: Path) -> None:
    with make_store(tmp_path, "tcf", "#width=4") as store:
        assert store.native["put"](b"7", b"longer than four") is True
        assert store.get(b"7") == b"long"
        assert store.native["put"](b"next", b"8") is True
        assert (store.get(b"8"), store.get(b"max")) == (b"8", b"8")
        assert store.native["put"](b"0", b"x") is None
        with pytest.raises(StateStoreError, match="invalid"):
            store.put(b"0", b"x")
        assert store.add(b"0", b"x") is False
        assert store.compare_and_swap(b"x", None, b"v") is False
        assert store.native["putshl"](b"x", b"v", 1) is None
        assert store.native["fwmkeys"](b"[8,10]", -1) == [b"8"]
        assert misc(store, "range", b"[min,max]") is not None


def test_a_table_has_columns_and_queries(tmp_path: Path) -> None:
    with make_store(tmp_path, "tct") as store:
        for number, name in enumerate((b"ann", b"bob", b"bert")):
            assert misc(store, "put", b"%d" % number, b"name", name, b"age", b"%d" % (30 + number)) == []
        assert store.get(b"0") == b"name\0ann\0age\x0030"
        assert misc(store, "get", b"0") == [b"name", b"ann", b"age", b"30"]
        assert misc(store, "setindex", b"name", b"lexical") == []
        assert misc(store, "search", b"addcond\0name\0STRBW\0b", b"setorder\0name\0STRASC") == [b"2", b"1"]
        assert misc(store, "search", b"addcond\0name\0STRRX\0^b.b$") == [b"1"]
        assert misc(store, "genuid") != misc(store, "genuid")
        assert store.native["addint"](b"0", 5) == 5
        assert b"_num" in misc(store, "get", b"0")
        assert misc(store, "search", b"addcond\0name\0STREQ\0bob", b"out") == []
        assert store.count() == 2


@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_misc_functions_on_every_type(tmp_path: Path, kind: str) -> None:
    with make_store(tmp_path, kind) as store:
        assert misc(store, "putlist", b"1", b"a\0b", b"2", b"a\0c", b"odd") == []
        if kind != "tct":
            assert misc(store, "getlist", b"2", b"9", b"1") == [b"2", b"a\0c", b"1", b"a\0b"]
            assert misc(store, "getpart", b"1", b"1", b"1") == [b"\0"]
        if store.scans_itself:
            assert misc(store, "regex", b"^1$")[:1] == [b"1"]
        assert misc(store, "out", b"1") == []
        assert misc(store, "out", b"1") is None
        assert misc(store, "outlist", b"1", b"2") == []
        assert store.count() == 0
        store.put(b"3", b"a\0d")
        assert store.native["optimize"](b"bnum=77#unknown") is True
        assert store.count() == 1
        for name in ("sync", "optimize", "vanish"):
            assert misc(store, name) == []
        assert store.count() == 0


@pytest.mark.parametrize("sync", ["os", "always"])
@pytest.mark.parametrize("kind", EVERY_TYPE)
def test_misc_has_no_transactions_and_nothing_unknown(tmp_path: Path, kind: str, sync: str) -> None:
    with make_store(tmp_path, kind, sync=sync) as store:
        for name in ("tranbegin", "trancommit", "tranabort", "copy", "restore", "path", "exec", "", "put\0", "PUT"):
            assert misc(store, name, b"1", b"a\0b") == ([] if name == "put\0" else None)
        assert store.count() == 1


@pytest.mark.parametrize("expression", [b"((a{1,200}){1,200}){1,200}", b"(a*)*\\1", b"(" * 100_000, b"a{1,2001}"])
def test_expressions_that_glibc_cannot_bear_are_refused(tmp_path: Path, expression: bytes) -> None:
    with make_store(tmp_path, "tct") as store:
        store.put(b"1", b"a\0b")
        assert misc(store, "regex", expression) is None
        assert misc(store, "search", b"addcond\0a\0STRRX\0" + expression) is None


def test_a_batch_is_synchronised_once_and_only_if_it_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced = []
    sync = tokyocabinet.Database.sync

    def counting(self: tokyocabinet.Database) -> bool:
        synced.append(self)
        return sync(self)

    monkeypatch.setattr(tokyocabinet.Database, "sync", counting)
    with make_store(tmp_path, "tch", sync="always") as store:
        store.apply([lambda verbs: verbs.put(b"a", b"1"), lambda verbs: verbs.put(b"b", b"1")])
        assert len(synced) == 1
        store.apply([lambda verbs: verbs.get(b"a"), lambda verbs: verbs.compare_and_swap(b"a", b"2", b"3")])
        assert store.add(b"a", b"other") is False
        assert store.delete(b"none") is False
        store.scan()
        assert len(synced) == 1
        misc(store, "putlist", b"c", b"2")
        assert len(synced) == 2
        monkeypatch.setattr(tokyocabinet.Database, "sync", lambda _self: False)
        with pytest.raises(OutcomeUnknown):
            store.put(b"d", b"4")
        monkeypatch.undo()


def test_blocking_kind_and_path(tmp_path: Path, store: CabinetStore) -> None:
    assert store.blocking
    assert (store.kind, store.path) in {("hash", f"{tmp_path}/state.tch"), ("B+ tree", f"{tmp_path}/state.tcb")}
