"""Requests that look at all keys: in steps, between which others are served."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import apart
from beaker_statestore.tyrant import server as server_module
from beaker_statestore.tyrant.commands import (
    FAILURE,
    FWMKEYS,
    GET,
    MISC,
    OUT,
    PUT,
    RNUM,
    STAT,
    STORE_FAILED,
    SUCCESS,
    TOO_MUCH,
    VSIZ,
    Reply,
    Request,
)
from beaker_statestore.tyrant.server import SCANS, ServerLimits
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import LOOPS, PATIENCE, RawClient, ServerThread

T = TypeVar("T")

OK = Reply(SUCCESS)
#: So many keys make a scan of many steps.
MANY = 20 * apart.STEP_KEYS


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["memory", "os", "always"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    """One that the server closes."""
    return MemoryStore() if request.param == "memory" else LMDBStore(tmp_path / "state.lmdb", sync=request.param)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def keys(count: int) -> list[bytes]:
    return [b"k%06d" % number for number in range(count)]


def filled(store: LocalStore, count: int = MANY) -> LocalStore:
    """``store`` with so many records."""
    store.put_many({key: b"v" + key for key in keys(count)})
    return store


def misc(name: bytes, *arguments: bytes) -> Request:
    return MISC(name, list(arguments), 0)


def regex(*arguments: bytes) -> Request:
    return misc(b"regex", *arguments)


def records(found: Sequence[bytes]) -> list[bytes]:
    return [piece for key in found for piece in (key, b"v" + key)]


class Stepping(MemoryStore):
    """Counts transactions, and stands still in those of a scan until each is let go on."""

    blocking = True

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.permits = threading.Semaphore(0)
        self.free = False

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        if any(getattr(operation, "__name__", "") == "_look" for operation in operations):
            if not self.free:
                assert self.permits.acquire(timeout=PATIENCE)
            self.steps += 1
        return super().apply(operations)


class Counting(MemoryStore):
    """Remembers what came in which order: steps of scans, and batches of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.order: list[str] = []
        #: Whose the steps were.
        self.scans: list[object] = []

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        self.order.append(getattr(operations[0], "__name__", "batch"))
        if self.order[-1] == "_look":
            self.scans.append(getattr(operations[0], "__self__", None))
        return super().apply(operations)


# -- the answers


def test_scans_answer_what_there_is_in_byte_order(loop: str, store: LocalStore) -> None:
    all_keys = keys(MANY)
    with ServerThread(filled(store), loop=loop) as server, server.connect() as client:
        assert client.ask(
            FWMKEYS(b"", -1),
            FWMKEYS(b"k0012", -1),
            FWMKEYS(b"k", 1234),
            FWMKEYS(b"k", MANY + 1),
            FWMKEYS(b"", 0),
            FWMKEYS(b"nothing", -1),
            FWMKEYS(b"", -(2**31)),
        ) == [
            Reply(SUCCESS, all_keys),
            Reply(SUCCESS, all_keys[1200:1300]),
            Reply(SUCCESS, all_keys[:1234]),
            Reply(SUCCESS, all_keys),
            Reply(SUCCESS, []),
            Reply(SUCCESS, []),
            Reply(SUCCESS, all_keys),
        ]
        assert client.ask(regex(b"7$"), regex(b"*K.*77$", b"50"), regex(b"K"), regex(b"7", b"-1")) == [
            Reply(SUCCESS, records(all_keys[7::10])),
            Reply(SUCCESS, records([b"k%06d" % number for number in range(77, MANY, 100)][:50])),
            Reply(SUCCESS, []),
            Reply(SUCCESS, records([key for key in all_keys if b"7" in key])),
        ]
        assert client.ask(
            misc(b"range"),
            misc(b"range", b"k000990", b"600"),
            misc(b"range", b"k000990", b"", b"k009991"),
            misc(b"range", b"k000990x", b"0", b"k000992"),
            misc(b"range", b"z"),
            misc(b"range", b"k000002", b"-1", b"k000001"),
        ) == [
            Reply(SUCCESS, records(all_keys)),
            Reply(SUCCESS, records(all_keys[990:1590])),
            Reply(SUCCESS, records(all_keys[990:9991])),
            Reply(SUCCESS, records(all_keys[991:992])),
            Reply(SUCCESS, []),
            Reply(SUCCESS, []),
        ]


@pytest.mark.parametrize(
    "count", [0, 1, apart.STEP_KEYS - 1, apart.STEP_KEYS, apart.STEP_KEYS + 1, 2 * apart.STEP_KEYS]
)
def test_nothing_is_lost_where_one_step_ends_and_the_next_begins(count: int) -> None:
    with ServerThread(filled(MemoryStore(), count)) as server, server.connect() as client:
        wanted = keys(count)
        assert client.ask(FWMKEYS(b"", -1), FWMKEYS(b"k", count), misc(b"range")) == [
            Reply(SUCCESS, wanted),
            Reply(SUCCESS, wanted),
            Reply(SUCCESS, records(wanted)),
        ]
        for maximum in {max(count - 1, 0), count // 2}:
            assert client.ask(FWMKEYS(b"k", maximum)) == [Reply(SUCCESS, wanted[:maximum])]


def test_keys_of_all_kinds_are_found_whatever_their_neighbours(store: LocalStore) -> None:
    strange = [b"", b"\0", b"\0\0", b"a", b"a\0", b"\xff", b"\xff\xff", b"x" * 600, b"x" * 600 + b"\0", b"x" * 601]
    store.put_many(dict.fromkeys(strange, b""))
    with ServerThread(store) as server, server.connect() as client:
        assert client.ask(FWMKEYS(b"", -1), FWMKEYS(b"x" * 600, -1), FWMKEYS(b"\xff", -1)) == [
            Reply(SUCCESS, sorted(strange)),
            Reply(SUCCESS, [b"x" * 600, b"x" * 600 + b"\0", b"x" * 601]),
            Reply(SUCCESS, [b"\xff", b"\xff\xff"]),
        ]


@pytest.mark.parametrize(
    "request_",
    [regex(), regex(b"("), regex(b"*["), misc(b"regex\0", b"(")],
    ids=["no pattern", "no expression", "none in any case", "behind a zero"],
)
def test_a_pattern_that_is_none_fails_and_does_not_scan(request_: Request) -> None:
    store = Counting()
    with ServerThread(store) as server, server.connect() as client:
        assert client.ask(request_) == [Reply(FAILURE, [])]
    assert "_look" not in store.order


def test_scans_are_counted_once_and_a_refused_one_too() -> None:
    with ServerThread(filled(MemoryStore())) as server, server.connect() as client:
        client.ask(FWMKEYS(b"", -1), regex(b"7"), regex(b"("))
        ((_, text),) = client.ask(STAT())
    figures = dict(line.split("\t") for line in text.decode().splitlines())
    assert (figures["cnt_fwmkeys"], figures["cnt_misc"]) == ("1", "2")


# -- their limits


def test_too_many_keys_fail_and_are_not_cut_off(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    limit = 3 * apart.STEP_KEYS
    server = ServerThread(filled(MemoryStore(), limit), loop=loop, limits=ServerLimits(keys=limit))
    with server, server.connect() as client:
        assert client.ask(FWMKEYS(b"", -1), PUT(b"one more", b"v")) == [Reply(SUCCESS, keys(limit)), OK]
        for request in (FWMKEYS(b"", -1), FWMKEYS(b"", limit + 1), regex(b"."), misc(b"range")):
            (reply,) = client.ask(request)
            assert reply.status == TOO_MUCH
            assert not reply.value
        # Whoever asks for no more than that gets it.
        assert client.ask(FWMKEYS(b"", limit)) == [Reply(SUCCESS, keys(limit))]
        (reply,) = client.ask(regex(b"k", b"%d" % limit))
        assert reply == Reply(SUCCESS, records(keys(limit)))
        assert client.ask(RNUM()) == [Reply(SUCCESS, limit + 1)]
    assert f"a client asked for more than {limit} keys at once" in caplog.text


def test_no_scan_goes_on_once_there_are_too_many(caplog: pytest.LogCaptureFixture) -> None:
    store = Counting()
    filled(store)
    store.order.clear()
    with ServerThread(store, limits=ServerLimits(keys=10)) as server, server.connect() as client:
        assert client.ask(FWMKEYS(b"", -1)) == [Reply(TOO_MUCH)]
    assert store.order == ["_look"]


def test_what_is_too_long_for_a_reply_fails_in_time(caplog: pytest.LogCaptureFixture) -> None:
    store = Counting()
    store.put_many({key: bytes(100_000) for key in keys(500)})
    store.order.clear()
    with ServerThread(store, limits=ServerLimits(reply=1 << 20)) as server, server.connect() as client:
        (reply,) = client.ask(misc(b"range"))
        assert reply.status == TOO_MUCH
        assert len(store.order) <= 6  # of some 200
        (reply,) = client.ask(misc(b"range", b"", b"10"))
        assert reply.status == SUCCESS
        assert len(reply.value) == 20
        assert client.ask(FWMKEYS(b"", -1)) == [Reply(SUCCESS, keys(500))]
    assert "a client asked for more than a reply may hold" in caplog.text


@pytest.mark.parametrize("expression", [b"|" * 60_000, b"(a|" * 90 + b"b" + b")" * 90 + b"{9}", b"a" * 1001])
def test_an_expression_that_is_too_large_is_refused_before_anything_is_looked_at(expression: bytes) -> None:
    store = Counting()
    filled(store)
    store.order.clear()
    with ServerThread(store) as server, server.connect() as client:
        (reply,) = client.ask(regex(expression))
    assert reply == Reply(FAILURE, [])
    assert "_look" not in store.order


def test_an_expression_is_not_looked_for_in_a_key_that_is_too_long_for_it(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    store.put_many({b"a" * 3000 + b"c": b"found", b"k": b""})
    with ServerThread(store) as server, server.connect() as client:
        (reply,) = client.ask(regex(b"a[ab]{9}c"))
        assert reply.value == [b"a" * 3000 + b"c", b"found"]
        assert client.ask(regex(b"a[ab]{200}c")) == [Reply(TOO_MUCH, [])]
    assert "too large to be looked for in a key of 3001 bytes" in caplog.text


def test_a_step_ends_when_it_has_taken_long_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "STEP_SECONDS", 0.0)
    store = Counting()
    store.put_many(dict.fromkeys(keys(50), b"v"))
    store.order.clear()
    with ServerThread(store) as server, server.connect() as client:
        assert client.ask(FWMKEYS(b"", -1), misc(b"range", keys(50)[10]))[0].value == keys(50)
    assert store.order.count("_look") == 50 + 40


def test_a_step_ends_early_where_keys_are_long_though_none_is_found() -> None:
    store = Counting()
    store.put_many({key + bytes(20_000): b"" for key in keys(150)})
    store.order.clear()
    with ServerThread(store) as server, server.connect() as client:
        assert client.ask(regex(b"nothing")) == [Reply(SUCCESS, [])]
    assert len(store.order) >= 150 * 20_000 // (apart.STEP_BYTES + 20_000)


# -- their place among others


def test_replies_come_in_the_order_of_requests(loop: str, store: LocalStore) -> None:
    requests: list[Request] = []
    expected = []
    for number in range(30):
        requests += [PUT(b"k%02d" % number, b"v"), FWMKEYS(b"", -1), OUT(b"absent"), VSIZ(b"k00"), regex(b"9$")]
        there = [b"k%02d" % count for count in range(number + 1)]
        nines = [piece for key in there if key.endswith(b"9") for piece in (key, b"v")]
        expected += [OK, Reply(SUCCESS, there), Reply(FAILURE), Reply(SUCCESS, 1), Reply(SUCCESS, nines)]
    with ServerThread(store, loop=loop) as server, server.connect() as client, server.connect() as other:
        other.send(b"".join(map(encode_request, [FWMKEYS(b"", 0)] * 300)))
        assert client.ask(*requests) == expected
        assert other.receive(300 * 5) == bytes(300 * 5)


def test_replies_are_not_lost_when_the_client_begins_to_read_during_a_scan(loop: str) -> None:
    # The transport then tells that there is room for more, while the connection's next requests have to wait.
    store = Stepping()
    filled(store)
    large = bytes(8_000_000)
    store.put(b"large", large)
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.send(encode_request(GET(b"large")))
        client.receive(5)
        client.send(encode_request(regex(b"^k000007")))
        server.catch_up()
        client.send(encode_request(VSIZ(b"large")) + encode_request(FWMKEYS(b"l", -1)))
        server.catch_up()
        assert client.receive(len(large)) == large
        store.free = True
        for _ in range(2 * MANY // apart.STEP_KEYS):
            store.permits.release()
        assert client.receive(5 + 11 + 12) == b"\0\0\0\0\2\0\0\0\7k000007\0\0\0\x08vk000007"
        assert client.receive(5 + 5 + 9) == b"\0" + len(large).to_bytes(4, "big") + b"\0\0\0\0\1\0\0\0\5large"


def test_a_neighbour_is_served_between_the_steps_of_a_scan(loop: str) -> None:
    store = Stepping()
    filled(store)
    with ServerThread(store, loop=loop) as server, server.connect() as client, server.connect() as other:
        client.send(encode_request(regex(b"nothing")))
        server.catch_up()
        for step in range(1, MANY // apart.STEP_KEYS):
            other.send(encode_request(GET(b"k000001")))
            server.catch_up()
            store.permits.release()
            assert other.receive(5 + 8) == b"\0\0\0\0\x08vk000001"
            assert store.steps == step
        store.free = True
        store.permits.release()
        assert client.receive(5) == bytes(5)


def test_only_so_many_scans_are_under_way_at_a_time_and_all_get_their_turn(loop: str) -> None:
    store = Counting()
    filled(store)
    with ServerThread(store, loop=loop) as server, ExitStack() as clients:
        many = [clients.enter_context(server.connect()) for _ in range(3 * SCANS)]
        with server.paused():
            for number, client in enumerate(many):
                client.send(encode_request(regex(b"k0000%02d" % number)))
        for number, client in enumerate(many):
            assert client.receive(5) == b"\0\0\0\0\2"
            assert client.receive(23) == b"\0\0\0\7k0000%02d" % number + b"\0\0\0\x08vk0000%02d" % number
    first = {scan: place for place, scan in reversed(list(enumerate(store.scans)))}
    last = {scan: place for place, scan in enumerate(store.scans)}
    assert len(first) == len(many)
    under_way = [sum(first[scan] <= place <= last[scan] for scan in first) for place in range(len(store.scans))]
    assert max(under_way) == SCANS


def test_a_client_that_leaves_ends_its_scan(loop: str) -> None:
    store = Stepping()
    filled(store)
    with ServerThread(store, loop=loop) as server:
        with ExitStack() as clients:
            for _ in range(3 * SCANS):
                client = clients.enter_context(server.connect())
                client.send(encode_request(regex(b"k")))
                # Its end is then a reset. After one in order, it might still read what it has asked for.
                client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            store.permits.release()
            eventually(lambda: store.steps == 1)
        server.catch_up()
        store.free = True
        store.permits.release()
        with server.connect() as client:
            assert client.ask(RNUM(), FWMKEYS(b"k00000", -1)) == [Reply(SUCCESS, MANY), Reply(SUCCESS, keys(10))]
    assert store.steps < 3 * SCANS * 2 + 5  # of 21 for each


def test_what_is_there_all_the_time_is_found_whatever_comes_and_goes_between_the_steps() -> None:
    store = Stepping()
    filled(store)
    with ServerThread(store) as server, server.connect() as client:
        client.send(encode_request(FWMKEYS(b"k", -1)))
        store.permits.release()
        eventually(lambda: store.steps == 1)
        last = keys(apart.STEP_KEYS)[-1]
        store.delete(last)  # behind which the next step begins
        store.delete_many(keys(3))
        store.put(last + b"+", b"")
        store.put(b"k", b"")  # which it has passed
        store.delete_many(keys(MANY)[-3:])
        store.free = True
        store.permits.release()
        found = [*keys(apart.STEP_KEYS), last + b"+", *keys(MANY)[apart.STEP_KEYS : -3]]
        assert client.receive(5) == b"\0" + len(found).to_bytes(4, "big")
        expected = b"".join(len(key).to_bytes(4, "big") + key for key in found)
        assert client.receive(len(expected)) == expected


@pytest.mark.parametrize("sync", ["os", "always"])
def test_scans_beside_a_writer_find_what_stays(tmp_path: Path, sync: str) -> None:
    count = 4 * apart.STEP_KEYS
    stopped = threading.Event()

    def write(client: RawClient) -> None:
        number = 0
        while not stopped.is_set():
            number += 1
            key = b"k%06dx" % (number * 7919 % count)
            assert client.ask(PUT(key, b""), OUT(key)) == [OK, OK]

    store = filled(LMDBStore(tmp_path / "state.lmdb", sync=sync), count)
    with ServerThread(store) as server, server.connect() as client, server.connect() as other:
        writer = threading.Thread(target=write, args=(other,))
        writer.start()
        try:
            for _ in range(5):
                ((status, found),) = client.ask(FWMKEYS(b"k", -1))
                assert status == SUCCESS
                assert [key for key in found if not key.endswith(b"x")] == keys(count)
                assert found == sorted(set(found))
        finally:
            stopped.set()
            writer.join(PATIENCE)


# -- what goes wrong


class Failing(MemoryStore):
    """Fails at the third step of a scan."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error
        self.steps = 0

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        if getattr(operations[0], "__name__", "") == "_look":
            self.steps += 1
            if self.steps == 3:
                raise self.error
        return super().apply(operations)


@pytest.mark.parametrize("error", [StoreUnavailable("the disk is gone"), ValueError("a defect"), MemoryError()])
def test_a_scan_in_which_the_store_fails_is_answered_so_and_harms_nobody(
    loop: str, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    store = Failing(error)
    filled(store)
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        (first, second, third) = client.ask(FWMKEYS(b"", -1), PUT(b"k", b"v"), FWMKEYS(b"k000001", -1))
    assert first == Reply(STORE_FAILED)
    assert (second, third) == (OK, Reply(SUCCESS, [b"k000001"]))
    assert "the store failed" in caplog.text


def test_a_server_that_is_stopped_carries_out_a_scan_for_which_there_is_time(loop: str) -> None:
    store = Stepping()
    filled(store)
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.send(encode_request(regex(b"nothing")) + encode_request(RNUM()))
        server.catch_up()
        store.free = True
        store.permits.release()
        server.stop()
        assert client.receive_to_end() == bytes(5) + b"\0" + MANY.to_bytes(8, "big")


def test_a_server_that_is_stopped_waits_for_no_scan_that_takes_longer(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "DRAIN", 0.02)
    store = Stepping()
    filled(store)
    with ServerThread(store, loop=loop) as server, server.connect() as client, ThreadPoolExecutor(1) as pool:
        client.send(encode_request(regex(b"nothing")))
        server.catch_up()
        stopping = pool.submit(server.stop)
        assert client.is_closed()
        store.permits.release()
        stopping.result(PATIENCE)
        assert store.steps == 1
        assert server.run(_nothing()) is None
        assert store.steps == 1


async def _nothing() -> None:
    """What the loop still had to do has been done by then."""
    await asyncio.sleep(0.02)


def test_a_server_can_be_stopped_while_a_step_waits_for_the_disk(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "DRAIN", 0.05)
    store = Stepping()
    filled(store)
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.send(encode_request(regex(b"k")) + encode_request(PUT(b"later", b"v")))
        server.catch_up()
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        assert client.is_closed()
        store.permits.release()
        stopping.join(PATIENCE)
        assert not stopping.is_alive()
        assert store.steps == 1
        assert store.get(b"later") is None
