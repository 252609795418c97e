"""Crowds of bad clients, in small: they are closed, the server's memory stays within its limit, and others are served.

What they cost a good client is measured by ``benchmarks.crowd``, which has the same crowds in full size.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT, RNUM, STAT, SUCCESS, Reply
from beaker_statestore.tyrant.server import ServerLimits
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import PATIENCE, RawClient, ServerThread

MIB = 1024 * 1024
#: The server's limits, in MiB and seconds, and what is large within them.
MESSAGE = 16
MEMORY = 64
SHORT = 1.0
LONG = 60.0
LARGE = 14 * MIB
#: How much its memory may differ for reasons of its own: the interpreter's, the allocator's, one batch of requests.
SLACK = 48 * MIB


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"it did not happen: {what}"
        time.sleep(0.02)


def announcement(length: int, sent: int = 0) -> bytes:
    """A put of ``length`` bytes that breaks off after ``sent`` of them."""
    head = encode_request(PUT(b"k", b""))
    return head[:6] + length.to_bytes(4, "big") + head[10:] + bytes(sent)


@dataclass
class Scene:
    """A server process, and a good client of it."""

    pid: int
    address: Address
    store: Store

    def memory(self, name: str = "VmRSS") -> int:
        """Bytes that the server has (VmRSS), or has had since `forget_peak` (VmHWM)."""
        (line,) = (
            line for line in Path(f"/proc/{self.pid}/status").read_text().splitlines() if line.startswith(f"{name}:")
        )
        return int(line.split()[1]) * 1024

    def forget_peak(self) -> None:
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def files(self) -> int:
        """How many files, connections among them, the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def executed(self, command: str) -> int:
        with self.connect() as client:
            ((_, text),) = client.ask(STAT())
        figures = dict(line.split("\t") for line in text.decode().splitlines())
        return int(figures[f"cnt_{command}"])

    def connect(self) -> RawClient:
        return RawClient(self.address)

    def has_room(self) -> bool:
        """Whether one more connection is served."""
        with self.connect() as client, suppress(AssertionError, ConnectionError):
            return client.ask(RNUM())[0].status == SUCCESS
        return False

    def check_good_client(self) -> None:
        for number in range(20):
            value = os.urandom(2048)
            self.store.put(b"good%d" % number, value)
            assert self.store.get(b"good%d" % number) == value


@contextmanager
def scene(patience: float, *arguments: str, db: str = "memory:") -> Iterator[Scene]:
    limits = ["--max-message", str(MESSAGE), "--max-memory", str(MEMORY), "--patience", str(patience), *arguments]
    with ServerProcess(db, arguments=limits) as server, open_store(server.url) as store:
        here = Scene(server.pid, Address.parse(server.url), store)
        store.put(b"large", b"v" * LARGE)
        here.check_good_client()
        here.forget_peak()
        yield here


@pytest.fixture(scope="module")
def patient() -> Iterator[Scene]:
    """With a server that closes nobody for being slow."""
    with scene(LONG) as here:
        yield here


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """With a server whose patience is short, over a store of which each reply is a copy."""
    with scene(SHORT, db=str(tmp_path_factory.mktemp("crowds") / "state.lmdb")) as here:
        yield here


# -- 11: announcements


def test_what_is_announced_above_the_limit_is_refused_at_once_and_nothing_behind_it_is_executed(patient: Scene) -> None:
    before = patient.memory()
    with ExitStack() as opened:
        crowd = [opened.enter_context(patient.connect()) for _ in range(100)]
        for client in crowd:
            client.send(announcement(256 * MIB) + encode_request(PUT(b"behind", b"")))
        assert all(client.is_closed() for client in crowd)  # long before the server's patience ends
        patient.check_good_client()
        assert patient.store.get(b"behind") is None
        assert patient.memory("VmHWM") - before < 50 * MIB


def test_what_is_announced_within_the_limit_takes_no_memory_before_it_comes(short: Scene) -> None:
    before = short.memory()
    with ExitStack() as opened:
        crowd = [opened.enter_context(short.connect()) for _ in range(100)]
        for client in crowd:
            client.send(announcement(15 * MIB))
        short.check_good_client()
        assert all(client.is_closed() for client in crowd)
        assert short.memory("VmHWM") - before < 50 * MIB


def test_half_requests_together_stay_within_the_limit_of_memory_again_and_again(patient: Scene) -> None:
    files, before = patient.files(), patient.memory()
    patient.forget_peak()
    room = MEMORY * MIB // (LARGE // 2)
    for _ in range(4):  # whatever one crowd were to leave behind would add up
        with ExitStack() as opened:
            for _ in range(2 * room):
                client = opened.enter_context(patient.connect())
                with suppress(ConnectionError):  # some are closed before they have sent it all
                    client.send(announcement(LARGE, LARGE // 2))
            eventually(lambda: patient.files() - files <= room, "those that hold most are closed")
            assert patient.files() > files, "the others are kept"
            patient.check_good_client()
        eventually(lambda: patient.files() <= files, "the server notices that they have left")
        assert patient.memory("VmHWM") - before < MEMORY * MIB + SLACK


# -- 12: slow readers


def test_replies_that_nobody_reads_stay_within_the_limit_of_memory_and_are_given_up(short: Scene) -> None:
    files, before = short.files(), short.memory()
    short.forget_peak()
    with ExitStack() as opened:
        crowd = [opened.enter_context(short.connect()) for _ in range(40)]
        for client in crowd:
            client.send(encode_request(GET(b"large")) * 10)
        short.check_good_client()
        eventually(lambda: short.files() <= files, "all of them are closed")
        for client in crowd:
            with pytest.raises((AssertionError, ConnectionError)):
                client.receive(10 * (5 + LARGE))
    # Beyond the limit there are the page cache's part of the file, a reply being made and one being thrown away. All 40
    # of them, less what the system takes in, would be three times as much.
    assert short.memory("VmHWM") - before < MEMORY * MIB + 3 * LARGE + SLACK // 2
    short.check_good_client()


def test_asking_again_without_reading_is_not_answered(patient: Scene) -> None:
    before = patient.executed("get")
    with patient.connect() as client:
        for number in range(1, 6):
            client.send(encode_request(GET(b"large")))
            if number == 1:
                eventually(lambda: patient.executed("get") > before, "it is answered")
            patient.check_good_client()  # so that the server has seen the request
        assert patient.executed("get") - before == 1 + 5 * 20
        # Once it reads, all comes.
        for _ in range(5):
            assert client.receive(5 + LARGE)[5:] == b"v" * LARGE


# -- 13: slow senders


def test_a_request_has_one_deadline_however_many_bytes_come_of_it(short: Scene) -> None:
    with ExitStack() as opened:
        crowd = [opened.enter_context(short.connect()) for _ in range(100)]
        for client in crowd:
            client.socket.setblocking(False)
        begun = time.monotonic()
        alive = set(crowd)
        for byte in announcement(2000, 2000):
            for client in list(alive):
                try:
                    client.send(bytes((byte,)))
                    assert client.socket.recv(1) == b""
                except BlockingIOError:
                    continue
                except ConnectionError:
                    pass
                alive.discard(client)
                assert time.monotonic() - begun > SHORT * 0.9
            if not alive:
                break
            short.check_good_client()
            assert time.monotonic() - begun < PATIENCE
        assert not alive


def test_a_byte_that_comes_just_at_the_deadline_buys_no_time() -> None:
    limits = ServerLimits(patience=2.0)
    with ServerThread(MemoryStore(), limits=limits) as server, server.connect() as slow, server.connect() as good:
        begun = time.monotonic()
        slow.send(announcement(100))
        time.sleep(1.5)
        with server.paused():  # for the byte and the deadline to come together
            slow.send(b"v")
            time.sleep(0.7)
        assert slow.is_closed()
        assert time.monotonic() - begun < 3.9
        assert good.ask(RNUM()) == [Reply(SUCCESS, 0)]


# -- 14: idle connections


def test_idle_connections_cost_little_and_those_above_the_limit_are_refused_at_once() -> None:
    with scene(SHORT, "--max-connections", "301") as here, ExitStack() as opened:
        before = here.memory()
        idle = [opened.enter_context(here.connect()) for _ in range(300)]  # the good client is one more
        assert idle[-1].ask(RNUM())[0].status == SUCCESS
        refused = [opened.enter_context(here.connect()) for _ in range(50)]
        assert all(client.is_closed() for client in refused)
        here.check_good_client()
        assert here.memory("VmHWM") - before < 300 * 32 * 1024
        assert all(client.ask(RNUM())[0].status == SUCCESS for client in idle)
        idle.pop().close()
        eventually(here.has_room, "the place of one that has left is free")
