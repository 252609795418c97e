"""What reaches the disk, and when: syncs before replies, power cuts, copies, a full disk."""

from __future__ import annotations

import bisect
import os
import random
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT, STORE_FAILED, SUCCESS, Reply
from beaker_statestore.tyrant.wire import encode_request
from tests.faults.killing import found
from tests.faults.servers import Misled
from tests.faults.tracing import Call, Disk, Traced, calls_of, commits
from tests.serving import PATIENCE, RawClient


class Client(threading.Thread):
    """Puts its records one after the other, each when the last is acknowledged."""

    def __init__(self, server: ServerProcess, number: int, writes: int) -> None:
        super().__init__()
        self._address, self._number, self._writes = Address.parse(server.url), number, writes
        self.acknowledged = 0
        self.start()

    def run(self) -> None:
        with RawClient(self._address) as client:
            for turn in range(self._writes):
                client.send(encode_request(PUT(_key(self._number, turn), _value(turn))))
                assert client.receive(1) == b"\0"
                self.acknowledged += 1


def _key(client: int, turn: int) -> bytes:
    return b"%d:%d" % (client, turn)


def _value(turn: int) -> bytes:
    return b"%d " % turn * 20


def _written(server: ServerProcess, clients: int, writes: int) -> int:
    """How many of ``writes`` puts were acknowledged, of so many clients at the same time."""
    at_work = [Client(server, number, writes // clients) for number in range(clients)]
    for client in at_work:
        client.join(10 * PATIENCE)
        assert not client.is_alive()
    return sum(client.acknowledged for client in at_work)


# -- before the reply


def _asked_and_answered(calls: list[Call]) -> Iterator[tuple[Call, Call]]:
    """Each put as it was read, with the reply as it was sent; a client asks only when the last is answered."""
    asked: dict[str, Call] = {}
    for call in calls:
        if not call.file.startswith("socket:"):
            continue
        if call.name in ("read", "recvfrom", "recvmsg") and call.data.startswith(b"\xc8\x10"):
            asked[call.file] = call
        elif call.name in ("write", "writev", "sendto", "sendmsg") and call.file in asked:
            yield asked.pop(call.file), call


@pytest.mark.parametrize(
    ("loop", "writes"),
    [
        ("uvloop", 1_600),
        pytest.param("uvloop", 10_000, marks=pytest.mark.long),
        pytest.param("asyncio", 10_000, marks=pytest.mark.long),
    ],
)
def test_with_sync_always_each_write_is_on_the_disk_before_its_reply_is_sent(
    tmp_path: Path, loop: str, writes: int
) -> None:
    path, trace = tmp_path / "state.lmdb", tmp_path / "trace"
    with Traced(str(path), trace, contents=False, loop=loop, arguments=("--sync", "always")) as server:
        assert _written(server, 16, writes) == writes
    calls = calls_of(trace)
    done = list(commits(calls, path))
    assert all(commit.ordered for commit in done)
    began = [commit.began for commit in done]
    answered = violations = 0
    for asked, answer in _asked_and_answered(calls):
        answered += 1
        # The first that can have the write in it.
        first = bisect.bisect(began, asked.ended)
        violations += first == len(done) or done[first].ended > answer.began
    print(f"{answered} writes, {len(done)} commits, {violations} violations")
    assert answered == writes
    assert violations == 0
    # Those who wait for the disk together wait once.
    assert writes / 16 <= len(done) < 0.9 * writes


def test_with_sync_os_no_write_waits_for_the_disk(tmp_path: Path) -> None:
    path, trace = tmp_path / "state.lmdb", tmp_path / "trace"
    with Traced(str(path), trace, contents=False, arguments=("--sync", "os")) as server:
        assert _written(server, 4, 400) == 400
    calls = calls_of(trace)
    answers = [answer.began for _, answer in _asked_and_answered(calls)]
    syncs = [call.began for call in calls if call.name in ("fsync", "fdatasync") and call.file == str(path)]
    assert len(answers) == 400
    assert not [sync for sync in syncs if answers[0] < sync < answers[-1]]
    assert len(syncs) == 1, "at the end, the server does sync"


# -- a power cut


@pytest.mark.parametrize("cuts", [100, pytest.param(2_000, marks=pytest.mark.long)])
def test_after_a_power_cut_at_any_moment_all_is_there_that_was_acknowledged(tmp_path: Path, cuts: int) -> None:
    path, trace, after = tmp_path / "state.lmdb", tmp_path / "trace", tmp_path / "after.lmdb"
    clients, writes = 4, 200
    with Traced(str(path), trace, contents=True, arguments=("--sync", "always")) as server:
        _written(server, clients, writes)
    calls = calls_of(trace)
    answers = {id(answer): asked.data for asked, answer in _asked_and_answered(calls)}
    first = next(place for place, call in enumerate(calls) if id(call) in answers)
    chance = random.Random(4)
    moments = Counter(chance.choices(range(first, len(calls)), k=cuts))
    disk, acknowledged = Disk(path), []
    for place, call in enumerate(calls):
        disk.feed(call)
        if id(call) in answers:
            acknowledged.append(answers[id(call)])
        for _ in range(moments[place]):
            after.write_bytes(disk.after_power_cut(chance))
            with LMDBStore(after) as store:
                there = {encode_request(PUT(key, store.get(key) or b"")) for key in store.keys()}  # noqa: SIM118
                assert set(acknowledged) <= there
            after.with_name("after.lmdb-lock").unlink()
    assert len(acknowledged) == writes


# -- copies


def test_a_copy_made_while_others_write_has_what_was_written_up_to_one_moment(tmp_path: Path) -> None:
    path = tmp_path / "state.lmdb"
    with ServerProcess(str(path)) as server, LMDBStore(path) as store:
        writer = Client(server, 0, 3_000)
        moments: list[tuple[Path, int, int]] = []
        while writer.is_alive():
            copy = tmp_path / f"copy{len(moments)}.lmdb"
            before = writer.acknowledged
            store.backup(str(copy))
            moments.append((copy, before, writer.acknowledged))
        writer.join(PATIENCE)
    for copy, before, later in moments:
        with LMDBStore(copy) as store:
            written = store.count()
            # The one that is being acknowledged may be in it.
            assert before <= written <= later + 1
            assert all(store.get(_key(0, turn)) == _value(turn) for turn in range(written))
    assert len(moments) > 2
    assert any(0 < before < 3_000 for _, before, _ in moments)


# -- a full disk

#: Becomes the server, on a disk of 4 MiB that nobody else sees, of which a file that is in the way takes up half.
_SMALL_DISK = """
set -e
# In a chroot, / is no mount; then the disk is seen outside, and goes when the server has gone.
mount --make-rprivate / 2>/dev/null || true
mount -t tmpfs -o size=4m statestore "$0"
head -c 2M /dev/zero >"$0/in-the-way"
exec "$@"
"""


@contextmanager
def _on_a_small_disk(directory: Path, *arguments: str) -> Iterator[ServerProcess]:
    assert os.geteuid() == 0, "a disk that is full takes a mount, and that takes root: run the tests as root"
    by = ["unshare", "--mount", "--propagation", "unchanged", "sh", "-c", _SMALL_DISK, str(directory)]
    try:
        with Misled(str(directory / "state.lmdb"), by=by, arguments=arguments) as server:
            yield server
    finally:
        if os.path.ismount(directory):
            subprocess.run(["umount", str(directory)], check=True)


@pytest.mark.parametrize("sync", ["os", "always"])
def test_a_full_disk_fails_writes_only_loses_nothing_and_passes(tmp_path: Path, sync: str) -> None:
    with _on_a_small_disk(tmp_path, "--sync", sync) as server:
        pid = server.pid
        with RawClient(Address.parse(server.url)) as client:
            written = 0
            while client.ask(PUT(b"%d" % written, b"%d " % written * 5_000)) == [Reply(SUCCESS)]:
                written += 1
                assert written < 1_000, "the disk has not become full"
            assert written > 10
            for _ in range(20):
                assert client.ask(PUT(b"more", b"m" * 30_000)) == [Reply(STORE_FAILED)]
                assert client.ask(GET(b"1")) == [Reply(SUCCESS, b"1 " * 5_000)]
            keys = [b"%d" % number for number in range(written)]
            acknowledged = {key: key + b" " for key in keys}
            _all_there(server, acknowledged)
            # What is on the server's disk is seen by its own eyes only (namespaces(7)).
            Path(f"/proc/{pid}/root{tmp_path}/in-the-way").unlink()
            assert client.ask(PUT(b"more", b"m" * 30_000), GET(b"more")) == [
                Reply(SUCCESS),
                Reply(SUCCESS, b"m" * 30_000),
            ]
            _all_there(server, acknowledged)
        assert server.pid == pid


def _all_there(server: ServerProcess, acknowledged: dict[bytes, bytes]) -> None:
    there = dict(found(Address.parse(server.url), list(acknowledged)))
    assert [key for key, unit in acknowledged.items() if there[key] != unit * 5_000] == []
