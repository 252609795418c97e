"""Long polls: ``ext("wait", key, milliseconds)`` on the wire, and `Store.wait` over it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import statistics
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import pytest

from beaker_statestore.complaints import Complaints
from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.stores import open_store
from beaker_statestore.stores import tyrant as tyrant_module
from beaker_statestore.stores.base import LocalStore, LocalVerbs, Store, Verbs
from beaker_statestore.stores.cabinet import CabinetStore
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.stores.tyrant import TyrantStore
from beaker_statestore.testing import ServerProcess, fork
from beaker_statestore.tyrant import apart, swap, waiting
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.apart import Wait
from beaker_statestore.tyrant.client import Client, Pool
from beaker_statestore.tyrant.commands import (
    ADDDOUBLE,
    ADDINT,
    APPEND,
    CAS,
    DECR,
    EXT,
    FAILURE,
    FORBIDDEN,
    GET,
    INCR,
    MISC,
    OUT,
    PREPEND,
    PROBE,
    PUT,
    PUTCAT,
    PUTKEEP,
    PUTNR,
    PUTSHL,
    REPLACE,
    RNUM,
    STORE_FAILED,
    SUCCESS,
    TOO_MUCH,
    VSIZ,
    WAIT,
    Reply,
    Request,
)
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import CLOSED, OPEN, Mask
from beaker_statestore.tyrant.server import READ_AHEAD, ServerLimits, ServerOptions
from beaker_statestore.tyrant.waiting import LONGEST_KEY, WaitingRoom
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import LOOPS, PATIENCE, RawClient, ServerThread

T = TypeVar("T")

OK = Reply(SUCCESS)
PRESENT = Reply(SUCCESS, b"1")
ABSENT = Reply(SUCCESS, b"0")
#: A wait that no test sits out, in milliseconds.
LONG = 55_000
#: The bytes of the two answers.
YES, NO = b"\0\0\0\0\x011", b"\0\0\0\0\x010"


def wait(key: bytes, milliseconds: int | bytes = LONG) -> Request:
    value = milliseconds if isinstance(milliseconds, bytes) else b"%d" % milliseconds
    return EXT(WAIT, key, value, 0)


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "lmdb os", "lmdb always", "cabinet tree", "cabinet hash always"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    """One that the server closes."""
    engines: dict[str, Callable[[], LocalStore]] = {
        "memory": MemoryStore,
        "lmdb os": lambda: LMDBStore(tmp_path / "state.lmdb"),
        "lmdb always": lambda: LMDBStore(tmp_path / "state.lmdb", sync="always"),
        "cabinet tree": lambda: CabinetStore(f"{tmp_path}/casket.tcb", sync="os"),
        "cabinet hash always": lambda: CabinetStore(f"{tmp_path}/casket.tch", sync="always"),
    }
    return engines[request.param]()


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def waiters(server: ServerThread) -> int:
    """How many wait, besides whoever asks."""
    return len(server._server._waiting_room)


def reset(client: RawClient) -> None:
    """Close in disorder, as a crashed machine does."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


# -- the answers


def test_what_is_there_is_told_at_once_and_what_is_not_when_the_time_is_over(store: LocalStore) -> None:
    with ServerThread(store) as server, server.connect() as client:
        began = time.monotonic()
        assert client.ask(PUT(b"k", b""), wait(b"k"), wait(b"k", 0), wait(b"none", 0)) == [OK, PRESENT, PRESENT, ABSENT]
        assert time.monotonic() - began < LONG / 1000 / 2
        began = time.monotonic()
        assert client.ask(wait(b"none", 80)) == [ABSENT]
        assert time.monotonic() - began >= 0.08
        assert waiters(server) == 0


@pytest.mark.parametrize("value", [b"", b"-1", b"1.5", b" 1", b"1x", b"9" * 16, b"\xb2"])
def test_a_time_that_is_no_number_fails(value: bytes) -> None:
    with ServerThread(MemoryStore()) as server, server.connect() as client:
        assert client.ask(PUT(b"k", b"v"), wait(b"k", value), RNUM()) == [OK, Reply(FAILURE), Reply(SUCCESS, 1)]


def test_the_server_tells_that_it_has_it() -> None:
    with ServerThread(MemoryStore()) as server, server.connect() as client:
        ((_, names),) = client.ask(EXT(PROBE, b"", b"", 0))
        assert WAIT in names.split()


def test_no_wait_is_longer_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "LONGEST_WAIT", 0.05)
    with ServerThread(MemoryStore()) as server, server.connect() as client:
        assert client.ask(wait(b"k", 10**14)) == [ABSENT]


# -- whatever writes wakes


def mine(records: Verbs, key: bytes, value: bytes) -> bytes:
    """A function of the operator's, which writes another record than it is asked for."""
    records.put(value, key)
    return b""


def http(method: bytes, head: bytes = b"", body: bytes = b"", path: bytes = b"k") -> bytes:
    return b"%b /%b HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n%b" % (
        method,
        path,
        head,
        len(body),
        body,
    )


def misc(name: bytes, *arguments: bytes) -> bytes:
    return encode_request(MISC(name, list(arguments), 0))


#: Requests after which there is a record ``k``.
WRITING: dict[str, bytes] = {
    "put": encode_request(PUT(b"k", b"v")),
    "putkeep": encode_request(PUTKEEP(b"k", b"v")),
    "putcat": encode_request(PUTCAT(b"k", b"v")),
    "putshl": encode_request(PUTSHL(b"k", b"v", 3)),
    "putnr": encode_request(PUTNR(b"k", b"v")),
    "addint": encode_request(ADDINT(b"k", 1)),
    "adddouble": encode_request(ADDDOUBLE(b"k", 1, 0)),
    "cas": encode_request(EXT(CAS, b"k", swap.pack(None, b"v"), 0)),
    "the operator's function": encode_request(EXT(b"mine", b"other", b"k", 0)),
    "misc put": misc(b"put", b"k", b"v"),
    "misc put with a zero": misc(b"put\0x", b"k", b"v"),
    "misc putkeep": misc(b"putkeep", b"k", b"v"),
    "misc putcat": misc(b"putcat", b"k", b"v"),
    "misc putlist": misc(b"putlist", b"a", b"1", b"k", b"2", b"z", b"3"),
    "memcached set": b"set k 0 0 1\r\nv\r\n",
    "memcached add": b"add k 0 0 1 noreply\r\nv\r\n",
    "HTTP PUT": http(b"PUT", body=b"v"),
    "HTTP PUT, as putkeep": http(b"PUT", b"X-TT-PDMODE: 1\r\n", b"v"),
    "HTTP PUT, as putcat": http(b"PUT", b"X-TT-PDMODE: 2\r\n", b"v"),
    "HTTP POST of misc": http(b"POST", b"X-TT-MNAME: putlist\r\n", b"a=k&b=v"),
    "HTTP POST of ext": http(b"POST", b"X-TT-XNAME: cas\r\n", swap.pack(None, b"v")),
}


#: What only Tokyo Cabinet's databases do, by the names of these; waited for is the key before the request.
CABINETS: list[tuple[str, bytes, bytes]] = [
    ("casket.tcb", b"k", misc(b"putdup", b"k", b"v")),
    ("casket.tcb", b"k", misc(b"putdupback", b"k", b"v")),
    ("casket.tcb", b"k", misc(b"putlist", b"k", b"v")),
    ("casket.tch", b"k", encode_request(ADDINT(b"k", 1))),
    ("casket.tcf", b"7", encode_request(PUT(b"7", b"v"))),
    ("casket.tcf", b"7", encode_request(PUT(b"007", b"v"))),
    ("casket.tcf", b"1", encode_request(PUT(b"next", b"v"))),
    ("casket.tct", b"k", misc(b"put", b"k", b"name", b"value")),
    ("casket.tct", b"k", encode_request(PUT(b"k", b"name\0value"))),
]


@pytest.fixture(scope="module")
def shared() -> Iterator[ServerThread]:
    """A server that does everything, for tests that leave it as it was."""
    options = ServerOptions(tcp_mask=OPEN, http=HTTPPolicy(), functions={b"mine": mine})
    with ServerThread(MemoryStore(), options=options) as server:
        yield server


def is_woken_by(server: ServerThread, key: bytes, writing: bytes) -> None:
    with server.connect() as waiter, server.connect() as stranger, server.connect() as writer:
        waiter.send(encode_request(wait(key)))
        stranger.send(encode_request(wait(b"strange")))
        eventually(lambda: waiters(server) == 2)
        began = time.monotonic()
        writer.send(writing)
        assert waiter.receive(len(YES)) == YES
        assert time.monotonic() - began < LONG / 1000 / 4
        assert waiters(server) == 1  # the stranger
    eventually(lambda: waiters(server) == 0)


@pytest.mark.parametrize("writing", WRITING.values(), ids=list(WRITING))
def test_whatever_writes_the_record_wakes_who_waits_for_it(shared: ServerThread, writing: bytes) -> None:
    try:
        is_woken_by(shared, b"k", writing)
    finally:
        shared._store.clear()


@pytest.mark.parametrize(("name", "key", "writing"), CABINETS, ids=[f"{case[0]} {case[2]!r}" for case in CABINETS])
def test_so_does_what_the_engine_itself_does(tmp_path: Path, name: str, key: bytes, writing: bytes) -> None:
    with ServerThread(CabinetStore(f"{tmp_path}/{name}", sync="os")) as server:
        is_woken_by(server, key, writing)


def test_on_every_engine(store: LocalStore) -> None:
    with ServerThread(store) as server:
        is_woken_by(server, b"k" * 600, encode_request(PUT(b"k" * 600, b"v")))
        is_woken_by(server, b"", encode_request(PUTNR(b"", b"")))


READING = [
    GET(b"k"),
    VSIZ(b"k"),
    OUT(b"k"),
    MISC(b"getlist", [b"k"], 0),
    MISC(b"outlist", [b"k"], 0),
    *(EXT(name, b"k", b"1", 0) for name in (PROBE, REPLACE, APPEND, PREPEND, INCR, DECR)),
    EXT(CAS, b"k", swap.pack(b"other", b"v"), 0),
    PUT(b"other", b""),
]


def test_what_makes_no_such_record_wakes_nobody(shared: ServerThread) -> None:
    with shared.connect() as waiter, shared.connect() as other:
        waiter.send(encode_request(wait(b"k", 300)))
        eventually(lambda: waiters(shared) == 1)
        other.ask(*READING)
        assert waiters(shared) == 1
        assert waiter.receive(len(NO)) == NO
    shared._store.clear()


class Watched(MemoryStore):
    """Counts how often its records are looked at by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        self.operations += [getattr(operation, "__name__", "batch") for operation in operations]
        return super().apply(operations)


def test_writes_of_other_records_cost_those_who_wait_no_look() -> None:
    store = Watched()
    with ServerThread(store) as server, server.connect() as waiter, server.connect() as other:
        waiter.send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == 1)
        for number in range(50):
            assert other.ask(PUT(b"other%d" % number, b""), MISC(b"putlist", [b"x", b"y"], 0), OUT(b"k"))
        assert store.operations.count("look") == 0
        other.ask(PUT(b"k", b""))
        assert waiter.receive(len(YES)) == YES
        assert store.operations.count("look") == 1


# -- many who wait


def test_hundreds_wait_each_for_its_own_and_others_are_served(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, ExitStack() as opened, server.connect() as writer:
        many = [opened.enter_context(server.connect()) for _ in range(200)]
        for number, client in enumerate(many):
            client.send(encode_request(wait(b"k%d" % number)) + encode_request(GET(b"k%d" % number)))
        eventually(lambda: waiters(server) == 200)
        assert writer.ask(*(PUT(b"k%d" % number, b"%d" % number) for number in range(0, 200, 2)))
        for number, client in enumerate(many[::2]):
            value = b"%d" % (2 * number)
            assert client.receive(len(YES) + 5 + len(value)) == YES + b"\0" + len(value).to_bytes(4, "big") + value
        assert waiters(server) == 100


def test_all_who_wait_for_the_same_are_woken(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, ExitStack() as opened, server.connect() as writer:
        many = [opened.enter_context(server.connect()) for _ in range(50)]
        for client in many:
            client.send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == 50)
        writer.ask(PUT(b"k", b""))
        for client in many:
            assert client.receive(len(YES)) == YES


@pytest.mark.parametrize("most", [0, 3])
def test_one_too_many_is_told_so_at_once_until_another_goes(most: int, caplog: pytest.LogCaptureFixture) -> None:
    limits = ServerLimits(waiters=most)
    with ServerThread(MemoryStore(), limits=limits) as server, ExitStack() as opened, server.connect() as client:
        for _ in range(most):
            opened.enter_context(server.connect()).send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == most)
        assert client.ask(wait(b"k"), PUT(b"k", b"v")) == [Reply(TOO_MUCH), OK]
        assert "--max-waiters" in caplog.text
        if most:
            eventually(lambda: waiters(server) == 0)
            assert client.ask(wait(b"k")) == [PRESENT]


def test_those_who_wait_leave_half_of_the_connections_to_others() -> None:
    limits = ServerLimits(connections=6, waiters=500)
    with ServerThread(MemoryStore(), limits=limits) as server, ExitStack() as opened, server.connect() as client:
        for _ in range(3):
            opened.enter_context(server.connect()).send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == 3)
        assert client.ask(wait(b"k"), PUT(b"k", b"v")) == [Reply(TOO_MUCH), OK]


def test_a_key_that_is_too_long_to_keep_cannot_be_waited_for() -> None:
    key = b"k" * (LONGEST_KEY + 1)
    with ServerThread(MemoryStore()) as server, server.connect() as client:
        assert client.ask(wait(key), PUT(key[1:], b""), wait(key[1:])) == [Reply(TOO_MUCH), OK, PRESENT]


@pytest.mark.parametrize("blocking", [False, True])
def test_a_look_takes_no_longer_than_it_may_and_goes_on_where_it_ended(
    loop: str, blocking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.0)
    store = Watched()
    store.blocking = blocking
    options = ServerOptions(tcp_mask=OPEN, functions={b"mine": mine})
    with ServerThread(store, loop=loop, options=options) as server, ExitStack() as opened, server.connect() as writer:
        many = [opened.enter_context(server.connect()) for _ in range(30)]
        for number, client in enumerate(many):
            client.send(encode_request(wait(b"k%d" % number)))
        eventually(lambda: waiters(server) == 30)
        writer.ask(EXT(b"mine", b"", b"k29", 0))
        assert many[29].receive(len(YES)) == YES
        assert store.operations.count("look") >= 30


def test_looks_pause_so_that_they_take_a_part_of_the_time_only(loop: str) -> None:
    class Sluggish(Watched):
        """Takes its time for each look."""

        def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
            if getattr(operations[0], "__name__", "") == "look":
                enough = time.thread_time() + 0.02
                while time.thread_time() < enough:
                    pass
            return super().apply(operations)

    store = Sluggish()
    with ServerThread(store, loop=loop) as server, server.connect() as waiter, server.connect() as writer:
        waiter.send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == 1)
        began = time.monotonic()
        for _ in range(100):
            # The record is gone again before anybody looks, so that each time there is a reason for the next look.
            writer.ask(PUT(b"k", b""), OUT(b"k"))
            time.sleep(0.001)
        took = time.monotonic() - began
        assert 1 <= store.operations.count("look") <= 2 + took / (0.02 / waiting.LOOK_PART)
        # None is lost for that: the timer has the last one.
        writer.ask(PUT(b"k", b""))
        assert waiter.receive(len(YES)) == YES


# -- no wake-up is lost


def woken_by(request: Request, after: str) -> Reply:
    """The answer to a wait for ``k`` if that is written, by ``request``, just after a look of this name saw nothing."""
    store = MemoryStore()

    async def run() -> Reply:
        async def between(job: Callable[[], T]) -> T:
            found = job()
            if (
                getattr(job, "__name__", None) == after
                or getattr(getattr(job, "func", None), "__name__", None) == after
            ):
                await asyncio.sleep(0)
                if store.add(b"k", b""):
                    room.carried_out([request])
            return found

        tasks: set[asyncio.Task[None]] = set()
        room = WaitingRoom(
            store, 1, between, lambda job: tasks.add(asyncio.ensure_future(job)), Complaints(logging.getLogger())
        )
        waits = asyncio.ensure_future(room.wait("client", Wait(b"k", 2.0, store), patient=True))
        await asyncio.sleep(0.01)
        if after == "_look_at":
            room.carried_out([PUT(b"k", b"")])  # a reason for it
        return await waits

    return asyncio.run(run())


@pytest.mark.parametrize("after", ["step", "_look_at"])
@pytest.mark.parametrize("request_", [PUT(b"k", b""), MISC(b"invented", [b"x"], 0)], ids=["put", "who knows what"])
def test_what_is_written_between_a_look_and_what_comes_of_it_wakes(request_: Request, after: str) -> None:
    began = time.monotonic()
    assert woken_by(request_, after) == PRESENT
    assert time.monotonic() - began < 1.9  # before its time is over


@pytest.mark.parametrize("engine", ["memory", "always"])
def test_in_a_storm_every_wait_for_what_gets_written_is_answered_so(loop: str, engine: str, tmp_path: Path) -> None:
    storm(loop, engine, tmp_path, rounds=20)


@pytest.mark.long
@pytest.mark.parametrize("engine", ["memory", "always"])
def test_in_a_long_storm_too(loop: str, engine: str, tmp_path: Path) -> None:
    storm(loop, engine, tmp_path, rounds=500)


def storm(loop: str, engine: str, directory: Path, rounds: int, writers: int = 3, each: int = 8) -> None:
    """Writers add numbered records; so many wait for each, one after the other."""
    local: LocalStore = MemoryStore() if engine == "memory" else LMDBStore(directory / "storm.lmdb", sync="always")
    # An operator's function may write any key, so that all that are waited for are looked at again and again.
    options = ServerOptions(tcp_mask=OPEN, functions={b"mine": mine})

    def write(writer: int) -> None:
        with server.connect() as client:
            for number in range(rounds):
                key = b"%d-%d" % (writer, number)
                request = EXT(b"mine", b"", key, 0) if number % 2 else PUTKEEP(key, b"")
                assert client.ask(request)[0].status == SUCCESS

    def follow(writer: int) -> None:
        with server.connect() as client:
            for number in range(rounds):
                key = b"%d-%d" % (writer, number)
                assert client.ask(wait(key), GET(key))[0] == PRESENT, key

    with ServerThread(local, loop=loop, options=options) as server, ThreadPoolExecutor(writers * (each + 1)) as pool:
        tasks = [pool.submit(follow, writer) for writer in range(writers) for _ in range(each)]
        tasks += [pool.submit(write, writer) for writer in range(writers)]
        for task in tasks:
            task.result(PATIENCE + rounds / 20)


# -- the connection


def test_what_is_behind_a_wait_is_answered_after_it_in_order(store: LocalStore) -> None:
    with ServerThread(store) as server, server.connect() as client, server.connect() as other:
        client.send(
            b"".join(
                map(
                    encode_request,
                    [PUT(b"a", b""), wait(b"k"), GET(b"k"), wait(b"none", 0), wait(b"l"), GET(b"l"), RNUM()],
                )
            )
        )
        eventually(lambda: waiters(server) == 1)
        assert client.receive(1) == b"\0"
        assert other.ask(PUT(b"k", b"v")) == [OK]
        assert client.receive(18) == YES + b"\0\0\0\0\1v" + NO
        eventually(lambda: waiters(server) == 1)
        assert other.ask(PUT(b"l", b"w")) == [OK]
        assert client.receive(21) == YES + b"\0\0\0\0\1w" + b"\0" + (3).to_bytes(8, "big")


@pytest.mark.parametrize("leave", [RawClient.close, reset], ids=["in order", "reset"])
def test_whoever_leaves_waits_no_more(loop: str, leave: Callable[[RawClient], None]) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server:
        many = [server.connect() for _ in range(20)]
        for client in many:
            client.send(encode_request(wait(b"k")) + encode_request(wait(b"l")))
        eventually(lambda: waiters(server) == 20)
        for client in many:
            leave(client)
        eventually(lambda: waiters(server) == 0)


def test_whoever_has_ended_sending_is_told_what_is_there_now(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        client.ask(PUT(b"k", b""))
        client.send(encode_request(wait(b"none")) + encode_request(wait(b"k")) + encode_request(wait(b"none")))
        eventually(lambda: waiters(server) == 1)
        client.socket.shutdown(socket.SHUT_WR)
        assert client.receive_to_end() == NO + YES + NO


def test_whoever_sends_so_much_behind_it_that_its_end_could_not_be_seen_does_not_wait(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        client.send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == 1)
        client.send(encode_request(PUT(b"other", bytes(READ_AHEAD))) * 4)
        assert client.receive(len(NO) + 4) == NO + bytes(4)
        assert client.ask(wait(b"other")) == [PRESENT]


def test_a_connection_that_waits_is_not_idle(loop: str) -> None:
    limits = ServerLimits(idle=0.05)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as waiter:
        began = time.monotonic()
        assert waiter.ask(wait(b"k", 250)) == [ABSENT]
        assert time.monotonic() - began >= 0.25
        assert waiter.is_closed()  # now it is


def test_a_server_that_is_stopped_answers_them_and_does_not_wait(store: LocalStore) -> None:
    with ServerThread(store) as server, ExitStack() as opened:
        many = [opened.enter_context(server.connect()) for _ in range(10)]
        for client in many:
            client.send(encode_request(wait(b"k")) + encode_request(wait(b"l")) + encode_request(RNUM()))
        eventually(lambda: waiters(server) == 10)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < LONG / 1000 / 4
        for client in many:
            assert client.receive_to_end() == NO + NO + bytes(9)


def test_an_outage_of_the_store_is_told_to_those_who_wait(loop: str) -> None:
    class Failing(MemoryStore):
        failing = False

        def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
            if self.failing and getattr(operations[0], "__name__", "") in ("look", "<lambda>"):
                raise StoreUnavailable("the disk is gone")
            return super().apply(operations)

    store = Failing()
    with ServerThread(store, loop=loop) as server, server.connect() as waiter, server.connect() as other:
        waiter.send(encode_request(wait(b"k")))
        eventually(lambda: waiters(server) == 1)
        store.failing = True
        assert other.ask(PUT(b"k", b""), wait(b"k")) == [OK, Reply(STORE_FAILED)]
        assert waiter.receive(1) == b"\2"
        store.failing = False
        assert waiter.ask(wait(b"k"), wait(b"none", 0)) == [PRESENT, ABSENT]


def test_a_mask_of_vsiz_or_ext_closes_it() -> None:
    for names in ("vsiz", "ext"):
        options = ServerOptions(tcp_mask=Mask.of([names], [], CLOSED))
        with ServerThread(MemoryStore(), options=options) as server, server.connect() as client:
            assert client.ask(wait(b"k"), RNUM()) == [Reply(FORBIDDEN), Reply(SUCCESS, 0)]


# -- the store


@pytest.fixture
def at(loop: str) -> Iterator[Callable[..., tuple[ServerThread, TyrantStore]]]:
    """Makes a server over a memory store, and a store over that."""
    with ExitStack() as opened:

        def make(**more: Any) -> tuple[ServerThread, TyrantStore]:
            server = opened.enter_context(ServerThread(MemoryStore(), loop=loop, **more))
            found = opened.enter_context(open_store(f"tyrant://{server.address}?timeout=10&pool_size=2"))
            assert isinstance(found, TyrantStore)
            return server, found

        yield make


@pytest.fixture
def unpolled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody may look again and again by himself."""

    def wait(self: Store, key: bytes, seconds: float) -> bool:
        raise AssertionError("the store polls")

    monkeypatch.setattr(Store, "wait", wait)


Make = Callable[..., tuple[ServerThread, TyrantStore]]


@pytest.mark.usefixtures("unpolled")
def test_a_store_is_told_by_the_server(at: Make) -> None:
    server, store = at()
    with ThreadPoolExecutor(1) as pool:
        assert not store.wait(b"k", 0)
        assert not store.wait(b"k", 0.05)
        waits = pool.submit(store.wait, b"k", 50)
        eventually(lambda: waiters(server) == 1)
        store.put(b"k", b"")
        assert waits.result(PATIENCE)
        assert store.wait(b"k", 0)
        assert store.wait(b"k", 50)


@pytest.mark.usefixtures("unpolled")
def test_a_hundred_threads_that_wait_take_nobodys_connection_and_few_are_kept(at: Make) -> None:
    server, store = at()
    with ThreadPoolExecutor(100) as pool:
        waits = [pool.submit(store.wait, b"k%d" % (number % 10), 50) for number in range(100)]
        eventually(lambda: waiters(server) == 100)
        for number in range(10):
            store.put(b"k%d" % number, b"")
        assert all(task.result(PATIENCE) for task in waits)
    eventually(lambda: len(server._server._connections) <= tyrant_module._KEPT_FOR_WAITING + 2)
    store.close()
    eventually(lambda: not server._server._connections)


@pytest.mark.usefixtures("unpolled")
def test_a_long_wait_is_several_requests(at: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tyrant_module, "LONGEST_POLL", 0.05)
    server, store = at()
    began = time.monotonic()
    assert not store.wait(b"k", 0.3)
    assert time.monotonic() - began >= 0.3
    assert server._server._waiting_room.in_vain >= 4


@pytest.mark.usefixtures("unpolled")
def test_a_connection_that_breaks_during_a_wait_is_made_anew(at: Make) -> None:
    server, store = at()
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(store.wait, b"k", 50)
        eventually(lambda: waiters(server) == 1)

        async def cut() -> None:
            for connection in list(server._server._connections):
                connection.abort("the test says so")

        server.run(cut())
        eventually(lambda: waiters(server) == 1 and not waits.done())
        store.put(b"k", b"")
        assert waits.result(PATIENCE)


def test_a_server_that_goes_away_is_an_outage() -> None:
    with ServerProcess() as server, open_store(f"tyrant://{server.url}") as store, ThreadPoolExecutor(1) as pool:
        assert isinstance(store, TyrantStore)
        waits = pool.submit(store.wait, b"k", 50)
        eventually(lambda: json.loads(store.statistics())["statestore server"]["Waiting"] == 1)
        server.kill()
        with pytest.raises(StoreUnavailable):
            waits.result(PATIENCE)
        server.start()


def test_a_server_that_hangs_is_an_outage_not_long_after_the_time_is_over() -> None:
    with ServerProcess() as server, open_store(f"tyrant://{server.url}?timeout=0.5") as store:
        assert not store.wait(b"k", 0.7)  # more than any other call may take
        server.pause()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable):
            store.wait(b"k", 0.2)
        assert time.monotonic() - began < 10
        server.resume()


def test_where_there_is_no_room_the_store_looks_by_itself_and_asks_again_later(
    at: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tyrant_module, "_UNTIL_ROOM", 0.2)
    server, store = at(limits=ServerLimits(waiters=1))
    with server.connect() as other, ThreadPoolExecutor(1) as pool:
        other.send(encode_request(wait(b"other")))
        eventually(lambda: waiters(server) == 1)
        assert not store.wait(b"k", 0.05)
        waits = pool.submit(store.wait, b"k", 50)
        store.put(b"k", b"")
        assert waits.result(PATIENCE)
        assert server._server._waiting_room.refused >= 1
        store.put(b"other", b"")
        assert other.receive(len(YES)) == YES
        waits = pool.submit(store.wait, b"later", 50)
        eventually(lambda: waiters(server) == 1)
        store.put(b"later", b"")
        assert waits.result(PATIENCE)


@pytest.mark.parametrize("masked", ["vsiz", "ext"])
def test_where_it_is_masked_the_store_looks_by_itself(at: Make, masked: str) -> None:
    server, store = at(options=ServerOptions(tcp_mask=Mask.of([masked], [], CLOSED)))
    with ThreadPoolExecutor(1) as pool:
        waits = pool.submit(store.wait, b"k", 50)
        with server.connect() as other:
            other.ask(PUT(b"k", b""))
        assert waits.result(PATIENCE)
        assert server._server._waiting_room.woken == 0


def test_where_there_is_no_such_function_the_store_looks_by_itself(at: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    server, store = at()
    asked: list[float] = []

    def capabilities(self: object, deadline: float) -> frozenset[bytes]:
        asked.append(deadline)
        return frozenset({CAS})

    monkeypatch.setattr("beaker_statestore.tyrant.client.Connection.capabilities", capabilities)
    with ThreadPoolExecutor(1) as pool, server.connect() as other:
        assert not store.wait(b"k", 0.02)
        assert not store.wait(b"k", 0.02)
        assert len(asked) == 1  # and remembers it
        waits = pool.submit(store.wait, b"k", 50)
        other.ask(PUT(b"k", b""))
        assert waits.result(PATIENCE)


def test_a_child_waits_on_connections_of_its_own(tyrant_server: ServerProcess) -> None:
    with open_store(tyrant_server.url) as store, ThreadPoolExecutor(2) as pool:
        store.put(b"fork", b"")
        assert store.wait(b"fork", 5)  # which leaves a connection for the next
        waits = pool.submit(store.wait, b"forked", 50)

        def child() -> bool:
            found = store.wait(b"fork", 5)
            store.put(b"forked", b"")
            return found and store.wait(b"forked", 5)

        assert fork(child)
        assert waits.result(PATIENCE)
        assert store.wait(b"fork", 5)
        store.delete_many([b"fork", b"forked"])


def test_a_store_that_has_been_closed_waits_for_nothing(tyrant_server: ServerProcess) -> None:
    store = open_store(tyrant_server.url)
    assert not store.wait(b"nothing", 0)
    store.close()
    with pytest.raises(Exception, match="has been closed"):
        store.wait(b"nothing", 1)


def test_a_pool_keeps_no_more_idle_connections_than_it_may(tyrant_server: ServerProcess) -> None:
    with Client(Pool(Address.parse(tyrant_server.url), keep=1)) as client:
        deadline = time.monotonic() + PATIENCE
        first, second = client.pool.acquire(deadline), client.pool.acquire(deadline)
        client.pool.release(first)
        client.pool.release(second)
        assert (first.closed, second.closed) == (False, True)


def test_replies_that_follow_each_other_do_not_wait_for_an_acknowledgement(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        client.ask(RNUM())
        (connection,) = server._server._connections
        accepted = connection._transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- what it costs others


@pytest.mark.long
def test_five_hundred_who_wait_are_hardly_noticed() -> None:
    """Prints the figures: pytest -s."""
    with ServerProcess("memory:") as server, ExitStack() as opened, RawClient(Address.parse(server.url)) as good:

        def median() -> float:
            times = []
            for number in range(3000):
                began = time.perf_counter()
                good.ask(PUT(b"k%d" % (number % 100), b"v" * 2000))
                times.append(time.perf_counter() - began)
            return statistics.median(times)

        median()
        alone = median()
        for number in range(500):
            client = opened.enter_context(RawClient(Address.parse(server.url)))
            client.send(encode_request(wait(b"w%d" % number)))
        beside = median()
        print(f"a put alone: {alone * 1e6:.0f} us; beside 500 who wait: {beside * 1e6:.0f} us")
        assert beside < 5 * alone
