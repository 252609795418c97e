"""Servers that are killed: at any moment of their work, of their start, and of the growth of their map."""

from __future__ import annotations

import contextlib
import itertools
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from beaker_statestore.exceptions import OutcomeUnknown, StoreUnavailable
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.client import Client, Pool
from beaker_statestore.tyrant.commands import ADDINT, MISC, SUCCESS
from tests.faults.killing import found, kill_under_load
from tests.faults.servers import PATIENCE, eventually
from tests.serving import RawClient

# -- under load


def test_what_a_server_without_a_file_has_acknowledged_is_counted_as_lost() -> None:
    """So the counting below does find what is lost."""
    with ServerProcess("memory:") as server:
        tally = kill_under_load(server, 1, after=(0.1, 0.1))
    assert tally.lost == tally.acknowledged > 0
    assert 0.1 < tally.oldest_lost < PATIENCE
    assert not tally.kept


def test_a_value_that_nobody_wrote_there_is_counted_as_wrong(tmp_path: Path) -> None:
    path = tmp_path / "state.lmdb"

    class Muddler(ServerProcess):
        def start(self) -> None:
            with LMDBStore(path) as store:
                first, second = list(store.keys())[:2] or (b"0:1", b"0:2")
                store.put(first, store.get(second) or b"")
            super().start()

    with Muddler(str(path)) as server:
        tally = kill_under_load(server, 1)
    assert tally.wrong == 1


@pytest.mark.parametrize("sync", ["os", pytest.param("always", marks=pytest.mark.long)])
def test_killed_while_its_map_grows_it_has_all_that_it_acknowledged(tmp_path: Path, sync: str) -> None:
    # From 64 KiB the map is doubled about nine times while so much is written.
    db = f"lmdb://{tmp_path}/state.lmdb?map_size=64KiB"
    with ServerProcess(db, arguments=["--sync", sync]) as server:
        tally = kill_under_load(server, 1, after=(0.0, 0.1), size=20_000)
    assert tally.kept, tally


@pytest.mark.parametrize(
    ("file", "sync"), [("casket.tch", "interval"), ("casket.tch", "always"), ("casket.tcb", "always")]
)
def test_tokyo_cabinet_has_all_that_was_acknowledged_before_a_kill(tmp_path: Path, file: str, sync: str) -> None:
    with ServerProcess(str(tmp_path / file), arguments=["--sync", sync]) as server:
        tally = kill_under_load(server, 1)
    assert tally.kept, tally


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_tree_of_tokyo_cabinets_loses_only_what_came_after_its_last_sync(tmp_path: Path, kills: int) -> None:
    arguments = ["--sync", "interval", "--sync-interval", "0.2"]
    with ServerProcess(str(tmp_path / "casket.tcb"), arguments=arguments) as server:
        tally = kill_under_load(server, kills, after=(1.6, 1.8))
    assert not tally.wrong
    # A sync takes its time too, and the machine may be busy. Without any, it would be all.
    assert tally.lost < tally.acknowledged / 2


class PairWriter(threading.Thread):
    """Puts the same value under three keys with one request, again and again, until the server is gone."""

    KEYS = (b"a", b"b", b"c" * 600)

    def __init__(self, address: Address) -> None:
        super().__init__()
        self._address = address
        self.acknowledged = 0
        self.start()

    def run(self) -> None:
        with contextlib.suppress(AssertionError, OSError), RawClient(self._address) as client:
            while True:
                value = self.value(self.acknowledged + 1)
                (reply,) = client.ask(MISC(b"putlist", [part for key in self.KEYS for part in (key, value)], 0))
                assert reply.status == SUCCESS
                self.acknowledged += 1

    @staticmethod
    def value(number: int) -> bytes:
        return b"%d " % number * 2000


def test_of_several_records_put_together_all_are_there_after_a_kill_or_none(tmp_path: Path) -> None:
    with ServerProcess(str(tmp_path / "state.lmdb")) as server:
        address = Address.parse(server.url)
        for _ in range(2):
            writer = PairWriter(address)
            eventually(lambda writer=writer: writer.acknowledged > 20, "some are put")  # type: ignore[misc]
            server.kill()
            writer.join(PATIENCE)
            server.start()
            (value,) = {value for _, value in found(address, PairWriter.KEYS)}
            assert value in (writer.value(writer.acknowledged), writer.value(writer.acknowledged + 1))


class Adder(threading.Thread):
    """Adds 1 to the same record, through an outage too."""

    def __init__(self, client: Client, times: int) -> None:
        super().__init__()
        self._client, self._times = client, times
        self.acknowledged = self.unknown = 0
        self.start()

    def run(self) -> None:
        while self.acknowledged < self._times:
            try:
                self._client.call(ADDINT(b"sum", 1))
                self.acknowledged += 1
            except OutcomeUnknown:
                self.unknown += 1
            except StoreUnavailable:
                time.sleep(0.01)  # it was not carried out


@pytest.mark.parametrize(("kills", "times"), [(0, 50), (2, 150), pytest.param(50, 10_000, marks=pytest.mark.long)])
def test_additions_are_carried_out_once_however_often_the_server_is_killed(
    tmp_path: Path, kills: int, times: int
) -> None:
    # Where a commit takes its time, most kills come between one and its reply.
    with ServerProcess(str(tmp_path / "state.lmdb"), arguments=["--sync", "always"]) as server:
        address = Address.parse(server.url)
        with Client(Pool(address, size=8)) as client:
            adders = [Adder(client, times) for _ in range(8)]
            for kill in range(1, kills + 1):
                part = 8 * times * kill // (kills + 1)
                eventually(lambda part=part: sum(adder.acknowledged for adder in adders) > part, "a part is added")  # type: ignore[misc]
                server.kill()
                server.start()
                before = [adder.acknowledged for adder in adders]
                # Soon after it is back, all of them are at work again.
                eventually(
                    lambda before=before: all(  # type: ignore[misc]
                        adder.acknowledged > was or adder.acknowledged == times
                        for adder, was in zip(adders, before, strict=True)
                    ),
                    "all go on",
                    10.0,
                )
            for adder in adders:
                adder.join(10 * PATIENCE)
                assert not adder.is_alive()
            total = client.call(ADDINT(b"sum", 0)).value
    acknowledged, unknown = (sum(getattr(adder, name) for adder in adders) for name in ("acknowledged", "unknown"))
    assert acknowledged == 8 * times
    assert acknowledged <= total <= acknowledged + unknown
    assert kills or not unknown


# -- at each single step

#: All that change files or how they are seen, and two of those, to be quick.
_ALL_CALLS: Final = (
    *("openat", "ftruncate", "pwrite64", "pwritev", "write", "writev", "fsync", "fdatasync", "mmap", "flock"),
    *("linkat", "rename", "unlink"),
)

#: Opens a store, puts records of a map's size into it, and tells which are acknowledged.
_PUTS: Final = """
import sys
from beaker_statestore.stores.lmdb import LMDBStore
with LMDBStore(sys.argv[1], sync="always", map_size=65536) as store:
    for number in range(3):
        store.put(b"%d" % number, b"v" * 30000)
        print(number, flush=True)
"""

#: Copies the store, as ``copy`` does.
_COPIES: Final = """
import sys
from pathlib import Path
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.tyrant.backups import Backups
with LMDBStore(sys.argv[1]) as store:
    Backups(Path(sys.argv[1]).parent / "backups").write(b"copy.lmdb", store)
"""


def _killed_at_each(call: str, program: str, path: Path, watched: list[Path]) -> Iterator[list[str]]:
    """Run ``program`` again and again, killed at its first such system call to what is watched, the second, and so on.

    What it has printed is given out each time. The last time it gets to its end.
    """
    tracer = ["strace", "-f", "-qq", "-o", "/dev/null", *(part for file in watched for part in ("-P", str(file)))]
    for number in itertools.count(1):
        done = subprocess.run(
            [*tracer, "-e", f"inject={call}:signal=KILL:when={number}", sys.executable, "-c", program, str(path)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        yield done.stdout.split()
        if done.returncode == 0:
            return


def _calls(*quick: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "call", [pytest.param(call, marks=() if call in quick else pytest.mark.long) for call in _ALL_CALLS]
    )


@_calls("pwrite64", "mmap")
def test_killed_at_any_step_of_its_start_its_commits_and_its_growth_the_file_opens_and_has_all(
    tmp_path: Path, call: str
) -> None:
    path = tmp_path / "state.lmdb"
    lock = tmp_path / "state.lmdb-lock"
    for acknowledged in _killed_at_each(call, _PUTS, path, [path, lock]):
        with LMDBStore(path) as store:
            there = {key.decode() for key in store.keys()}  # noqa: SIM118
            assert set(acknowledged) <= there <= {"0", "1", "2"}
            assert all(store.get(key.encode()) == b"v" * 30000 for key in there)
            store.put(b"next", b"life")
        path.unlink()
        lock.unlink()
    assert acknowledged == ["0", "1", "2"]


@_calls("linkat", "fsync")
def test_killed_at_any_step_of_a_copy_the_store_is_whole_and_what_has_the_copys_name_too(
    tmp_path: Path, call: str
) -> None:
    path, backups = tmp_path / "state.lmdb", tmp_path / "backups"
    copy, unfinished = backups / "copy.lmdb", backups / ".copy.lmdb.unfinished"
    records = {b"%d" % number: b"v" * 30000 for number in range(20)}
    with LMDBStore(path) as store:
        store.put_many(records)
    backups.mkdir()
    copies = 0
    for _ in _killed_at_each(call, _COPIES, path, [backups, copy, unfinished]):
        with LMDBStore(path) as store:
            assert store.get_many(records) == records
        if copy.exists():
            copies += 1
            with LMDBStore(copy) as store:
                assert store.get_many(records) == records
            copy.unlink()
            copy.with_name("copy.lmdb-lock").unlink()
    assert copies > 0
    assert list(backups.iterdir()) == []
