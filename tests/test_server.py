"""The server against clients of all manners, over real sockets."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TypeVar

import pytest

from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant import server as server_module
from beaker_statestore.tyrant import swap, verbs
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.client import Client, Pool
from beaker_statestore.tyrant.commands import (
    ADDINT,
    CAS,
    EXT,
    FAILURE,
    GET,
    ITERINIT,
    ITERNEXT,
    MGET,
    MISC,
    PUT,
    PUTCAT,
    PUTKEEP,
    PUTNR,
    REPL,
    RNUM,
    STAT,
    STORE_FAILED,
    SUCCESS,
    SYNC,
    VSIZ,
    Reply,
    Request,
)
from beaker_statestore.tyrant.server import ServerLimits, ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import LOOPS, PATIENCE, RawClient, ServerThread

T = TypeVar("T")

OK = Reply(SUCCESS)
MIB = 1024 * 1024


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def executed(server: ServerThread, command: str) -> int:
    """How many commands of that name the server has carried out."""
    with server.connect() as client:
        ((_, text),) = client.ask(STAT())
    figures = dict(line.split("\t") for line in text.decode().splitlines())
    return int(figures[f"cnt_{command}"])


class Slow(MemoryStore):
    """Waits for its disk, which answers when it is told to."""

    blocking = True

    def __init__(self) -> None:
        super().__init__()
        self.disk = threading.Event()
        self.batches = 0

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        self.batches += 1
        assert self.disk.wait(PATIENCE)
        return super().apply(operations)


# -- what comes in pieces, and what comes together


def conversation(count: int) -> tuple[list[Request], bytes]:
    """So many requests, and all that is to be answered to them."""
    requests: list[Request] = []
    replies = []
    for number in range(count // 4):
        key, value = b"k%d" % (number % 50), b"v%d" % number
        requests += [PUT(key, value), GET(key), PUTNR(b"nr", value), GET(b"nr")]
        replies.append(b"\0" + 2 * (b"\0" + len(value).to_bytes(4, "big") + value))
    return requests, b"".join(replies)


def test_a_thousand_requests_in_single_bytes_are_answered_in_order(loop: str) -> None:
    requests, replies = conversation(1000)
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        for byte in b"".join(map(encode_request, requests)):
            client.send(bytes((byte,)))
        assert client.receive(len(replies)) == replies


@pytest.mark.parametrize("sync", ["os", "always"])
def test_a_thousand_requests_in_one_packet_are_answered_in_order(loop: str, tmp_path: Path, sync: str) -> None:
    requests, replies = conversation(1000)
    store = LMDBStore(tmp_path / "state.lmdb", sync=sync)
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.send(b"".join(map(encode_request, requests)))
        assert client.receive(len(replies)) == replies


def test_clients_that_pipeline_at_once_each_get_their_own_replies(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, ExitStack() as opened:
        clients = [opened.enter_context(server.connect()) for _ in range(20)]
        for number, client in enumerate(clients):
            client.send(b"".join(encode_request(ADDINT(b"n%d" % number, number)) for _ in range(500)))
        for number, client in enumerate(clients):
            sums = client.receive(500 * 5)
            expected = b"".join(b"\0" + (number * (times + 1)).to_bytes(4, "big") for times in range(500))
            assert sums == expected


def test_large_values_go_both_ways(loop: str) -> None:
    value = bytes(range(256)) * 4096 * 8
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        assert client.ask(PUT(b"k", value), GET(b"k"), MGET([b"k", b"k"])) == [
            OK,
            Reply(SUCCESS, value),
            Reply(SUCCESS, [(b"k", value)] * 2),
        ]


def test_clients_share_one_iterator() -> None:
    with ServerThread(MemoryStore()) as server, server.connect() as one, server.connect() as other:
        one.ask(*(PUT(b"k%d" % number, b"") for number in range(6)), ITERINIT())
        visited = [client.ask(ITERNEXT())[0].value for _ in range(3) for client in (one, other)]
        assert visited == [b"k%d" % number for number in range(6)]
        assert other.ask(ITERNEXT()) == [Reply(FAILURE)]


def test_whoever_had_a_long_reply_comes_after_others_and_yet_has_a_turn(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "COSTLY", 1000)
    monkeypatch.setattr(server_module, "COSTLY_RATE", 1e-6)
    batches: list[bool] = []

    class Watched(MemoryStore):
        def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
            results = super().apply(operations)
            batches.append(self._get_records().get(b"mark") is not None)
            return results

    with ServerThread(Watched(), loop=loop) as server, server.connect() as costly, server.connect() as busy:
        assert costly.ask(PUT(b"l", b"v" * 2000), GET(b"l")) == [Reply(SUCCESS), Reply(SUCCESS, b"v" * 2000)]
        assert busy.ask(RNUM()) == [Reply(SUCCESS, 1)]
        with server.paused():
            busy.send(encode_request(PUT(b"k", b"v")) * 10_000)
            costly.send(encode_request(PUT(b"mark", b"")))
            del batches[:]
        assert busy.receive(10_000) == bytes(10_000)
        assert costly.receive(1) == b"\0"
    assert len(batches) > 40
    assert batches.index(True) < 10


def test_a_batch_ends_when_it_has_taken_long_enough_and_the_others_go_on_first(
    loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verbs, "LONG_ENOUGH", 0.0)
    executed: list[int] = []

    class Watched(MemoryStore):
        def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
            results = super().apply(operations)
            executed.append(int(self._get_records().get(b"n", b"-1")))
            return results

    with ServerThread(Watched(), loop=loop) as server, server.connect() as many, server.connect() as few:
        for known in (many, few):  # newcomers have turns of their own
            assert known.ask(RNUM()) == [Reply(SUCCESS, 0)]
        with server.paused():
            many.send(b"".join(encode_request(PUT(b"n", b"%d" % number)) for number in range(100)))
            few.send(encode_request(PUT(b"n", b"1000")))
            del executed[:]
        assert many.receive(100) == bytes(100)
        assert few.receive(1) == b"\0"
    assert executed.index(1000) < 4
    assert [number for number in executed if number != 1000] == list(range(100))


def test_a_reply_of_very_many_parts_arrives(loop: str) -> None:
    limits = ServerLimits(items=2**21)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as client:
        client.ask(PUT(b"k", b"v"))
        (reply,) = client.ask(MGET([b"k"] * 700_000))
        assert len(reply.value) == 700_000


def test_a_list_has_no_more_elements_than_may_be(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop, limits=ServerLimits(items=10)) as server, server.connect() as client:
        assert client.ask(MGET([b"k"] * 10), PUT(b"k", b"v")) == [Reply(SUCCESS, []), Reply(SUCCESS)]
        client.send(encode_request(MGET([b"k"] * 11)) + encode_request(PUT(b"k", b"w")))
        assert client.is_closed()
        with server.connect() as other:
            assert other.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]


# -- what is not to be executed

MALFORMED = {
    "an unknown command": bytes.fromhex("C899"),
    "text": b"bogus\r\n",
    "HTTP where it is off": b"POST / HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "a key that is too long": bytes.fromhex("C83010000001"),
    "a negative length": bytes.fromhex("C820FFFFFFFF"),
    "a list whose second element is too long": bytes.fromhex("C831 00000002 00000001 6B 7FFFFFFF"),
    "a negative width": bytes.fromhex("C813 00000001 00000001 FFFFFFFF 6B 76"),
    "a name that is too long": bytes.fromhex("C890 00000400 00000000 00000000"),
    "replication": encode_request(REPL(1, 1)),
}


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=list(MALFORMED))
def test_behind_a_malformed_request_nothing_is_executed(loop: str, malformed: bytes) -> None:
    before, behind = encode_request(PUT(b"before", b"")), encode_request(PUT(b"behind", b""))
    with ServerThread(MemoryStore(), loop=loop) as server:
        with server.connect() as client:
            client.send(before + malformed + behind)
            assert client.receive_to_end() == b"\0"
        with server.connect() as client:
            assert client.ask(GET(b"before"), GET(b"behind")) == [Reply(SUCCESS, b""), Reply(FAILURE)]


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=list(MALFORMED))
def test_not_even_when_it_comes_later(malformed: bytes) -> None:
    with ServerThread(MemoryStore()) as server:
        with server.connect() as client:
            client.send(malformed)
            assert client.is_closed()
            with suppress(ConnectionError):  # it may have noticed
                client.send(encode_request(PUT(b"behind", b"")))
        with server.connect() as client:
            assert client.ask(GET(b"behind")) == [Reply(FAILURE)]


def test_all_that_came_before_a_malformed_request_is_answered_however_much(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        client.send(encode_request(ADDINT(b"n", 1)) * 1001 + bytes.fromhex("C899"))
        assert client.receive_to_end()[-4:] == (1001).to_bytes(4, "big")


# -- clients that leave


def test_a_whole_request_before_the_end_is_executed_and_answered(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        client.send(encode_request(PUT(b"k", b"v")) + encode_request(GET(b"k")))
        client.socket.shutdown(socket.SHUT_WR)
        assert client.receive_to_end() == b"\0" + b"\0\0\0\0\1v"


def test_even_if_it_is_executed_only_after_the_end(loop: str) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.send(encode_request(ADDINT(b"n", 1)) * 1000)
        client.socket.shutdown(socket.SHUT_WR)
        server.catch_up()
        store.disk.set()
        assert client.receive_to_end()[-4:] == (1000).to_bytes(4, "big")


@pytest.mark.parametrize("length", range(1, len(encode_request(PUT(b"k", b"v")))))
def test_half_a_request_before_the_end_is_not(length: int) -> None:
    with ServerThread(MemoryStore()) as server:
        with server.connect() as client:
            client.send(encode_request(PUT(b"k", b"v"))[:length])
            client.socket.shutdown(socket.SHUT_WR)
            assert client.receive_to_end() == b""
        with server.connect() as client:
            assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]


def test_putnr_is_executed_though_its_client_leaves_at_once(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server:
        with server.connect() as client:
            client.send(encode_request(PUTNR(b"k", b"v")))
        with server.connect() as client:
            eventually(lambda: client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")])


def reset(client: RawClient) -> None:
    """Close in disorder, as a crashed machine does: what is under way is lost, and the peer gets an error."""
    client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def test_clients_that_reset_their_connections_do_no_harm(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as witness:
        witness.ask(PUT(b"k", b"v" * MIB))
        for _ in range(20):
            client = server.connect()
            client.send(encode_request(GET(b"k")) * 20 + encode_request(GET(b"k"))[:3])
            reset(client)
        assert witness.ask(GET(b"k")) == [Reply(SUCCESS, b"v" * MIB)]


@pytest.mark.parametrize("malformed", [b"", bytes.fromhex("C899")], ids=["well-formed", "malformed"])
def test_a_connection_that_is_reset_before_its_turn_does_no_harm(loop: str, malformed: bytes) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server, server.connect() as witness:
        witness.send(encode_request(RNUM()))
        eventually(lambda: store.batches == 1)
        client = server.connect()
        client.send(encode_request(PUT(b"k", b"v")) + malformed)
        server.catch_up()
        reset(client)
        server.catch_up()
        store.disk.set()
        assert witness.receive(9) == bytes(9)
        # It was complete, and in time; but newcomers have turns of their own.
        eventually(lambda: witness.ask(GET(b"k")) == [Reply(SUCCESS, b"v")])


@pytest.mark.parametrize("data", [encode_request(PUT(b"k", b"v")), bytes.fromhex("C899")], ids=["put", "malformed"])
def test_connections_that_are_reset_before_they_are_accepted_do_no_harm(loop: str, data: bytes) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server, server.connect() as witness:
        witness.send(encode_request(RNUM()))
        eventually(lambda: store.batches == 1)
        with server.paused():
            for _ in range(5):
                client = server.connect()
                client.send(data)
                reset(client)
        server.catch_up()
        store.disk.set()
        assert witness.receive(9) == bytes(9)
        assert witness.ask(VSIZ(b"none")) == [Reply(FAILURE)]


def test_what_a_reset_connection_still_wanted_is_dropped(loop: str) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server:
        client = server.connect()
        client.send(encode_request(ADDINT(b"n", 1)) * 5000)
        eventually(lambda: store.batches == 1)
        reset(client)
        server.catch_up()
        store.disk.set()
        with server.connect() as witness:
            ((_, executed),) = witness.ask(ADDINT(b"n", 0))
            assert 0 < executed < 1000


# -- clients that dawdle


def test_half_a_request_is_given_up_in_time_though_bytes_keep_coming(loop: str) -> None:
    limits = ServerLimits(patience=0.5)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as good:
        with server.connect() as slow:
            slow.send(encode_request(PUT(b"k", b""))[:4])
            begun = time.monotonic()
            slow.socket.settimeout(0.1)
            closed = False
            while not closed:
                assert time.monotonic() - begun < PATIENCE
                try:
                    slow.send(b"\0" if time.monotonic() - begun < 0.4 else b"")
                    closed = slow.socket.recv(1) == b""
                except TimeoutError:
                    pass
                except ConnectionError:
                    closed = True
            assert time.monotonic() - begun > 0.4
        assert good.ask(RNUM()) == [Reply(SUCCESS, 0)]  # has been idle for as long


def test_half_requests_stop_nobody_else() -> None:
    with ServerThread(MemoryStore()) as server, ExitStack() as opened:
        for _ in range(100):
            opened.enter_context(server.connect()).send(encode_request(PUT(b"k", b"v"))[:-1])
        with server.connect() as client:
            assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]


def test_a_request_that_comes_slowly_but_in_time_is_executed(loop: str) -> None:
    limits = ServerLimits(patience=1.0)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as client:
        for number in range(4):  # each well within the time, all of them together not
            data = encode_request(PUT(b"k%d" % number, b"v"))
            client.send(data[:5])
            time.sleep(0.4)
            client.send(data[5:])
            assert client.receive(1) == b"\0"


LARGE = b"v" * MIB


def test_replies_that_nobody_reads_hold_back_what_is_behind_them(loop: str) -> None:
    limits = ServerLimits(message=2 * MIB)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as slow:
        slow.ask(PUT(b"k", LARGE))
        slow.send(encode_request(GET(b"k")) * 100 + encode_request(PUT(b"behind", b"")))
        eventually(lambda: executed(server, "get") > 0)
        with server.connect() as good:
            for _ in range(50):
                assert good.ask(GET(b"behind")) == [Reply(FAILURE)]
        assert executed(server, "get") - 50 < 30
        # Once it reads, all comes, and in order.
        for _ in range(100):
            assert slow.receive(5 + MIB)[5:] == LARGE
        assert slow.receive(1) == b"\0"


def test_whoever_reads_nothing_for_too_long_is_closed(loop: str) -> None:
    limits = ServerLimits(message=2 * MIB, patience=0.3)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as client:
        client.ask(PUT(b"k", LARGE))
        client.send(encode_request(GET(b"k")) * 100)
        time.sleep(1.0)
        with pytest.raises((AssertionError, ConnectionError)):
            client.receive(100 * (5 + MIB))


def test_whoever_reads_slowly_is_not(loop: str) -> None:
    limits = ServerLimits(message=32 * MIB, patience=0.3)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as client:
        client.ask(PUT(b"k", LARGE * 24))
        client.send(encode_request(GET(b"k")))
        begun = time.monotonic()
        for _ in range(24):
            client.receive(MIB)
            time.sleep(0.05)
        assert time.monotonic() - begun > 3 * 0.3
        assert client.receive(5) == b"v" * 5


def test_what_cannot_be_carried_out_yet_is_not_read_either(loop: str) -> None:
    store = Slow()
    data = encode_request(ADDINT(b"n" * 1000, 1)) * 1000
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.socket.settimeout(0.5)
        sent = 0
        with suppress(TimeoutError):
            while sent < 64 * MIB:
                sent += client.socket.send(data[sent % len(data) :])
        assert sent < 32 * MIB, "much more than the system itself buffers"
        store.disk.set()
        client.socket.settimeout(PATIENCE)
        client.send(data[sent % len(data) :])
        count = -(-sent // len(data)) * 1000
        assert client.receive(count * 5)[-4:] == count.to_bytes(4, "big")


def test_who_holds_the_most_memory_is_closed_first_when_there_is_too_much(loop: str) -> None:
    limits = ServerLimits(message=4 * MIB, memory=13 * MIB // 2)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, ExitStack() as opened:
        good = opened.enter_context(server.connect())
        half = encode_request(PUT(b"k", b"v" * 3 * MIB))
        small, big, bigger = (opened.enter_context(server.connect()) for _ in range(3))
        small.send(half[: MIB // 2])
        big.send(half[: 2 * MIB])
        bigger.send(half[: 3 * MIB])
        assert good.ask(RNUM()) == [Reply(SUCCESS, 0)]
        small.send(half[MIB // 2 : 2 * MIB])
        assert bigger.is_closed()
        big.send(half[2 * MIB :])
        small.send(half[2 * MIB :])
        assert big.receive(1) == small.receive(1) == b"\0"


# -- too many


def test_one_too_many_is_refused_until_another_leaves(loop: str) -> None:
    def is_served(client: RawClient) -> bool:
        try:
            return client.ask(RNUM()) == [Reply(SUCCESS, 0)]
        except (AssertionError, ConnectionError):
            return False

    def another_is_served() -> bool:
        with server.connect() as another:
            return is_served(another)

    limits = ServerLimits(connections=2)
    with ServerThread(MemoryStore(), loop=loop, limits=limits) as server, server.connect() as first:
        assert is_served(first)
        with server.connect() as second:
            assert is_served(second)
            assert not another_is_served()
            assert is_served(first)
            assert is_served(second)
        eventually(another_is_served)


def resident(pid: int) -> int:
    """The memory that a process has, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096


def test_what_clients_announce_takes_no_memory() -> None:
    with ServerProcess("memory:") as server, ExitStack() as opened:
        address = Address.parse(server.url)
        witness = opened.enter_context(RawClient(address))
        witness.ask(RNUM())
        before = resident(server.pid)
        for header in ["C810 00000001 03FFFF00 6B", "C831 00100000", "C890 00000003 00000000 00100000 676574"]:
            for _ in range(50):
                opened.enter_context(RawClient(address)).send(bytes.fromhex(header))
        witness.ask(RNUM())
        assert resident(server.pid) - before < 30 * MIB


# -- batches, and stores that fail


def test_what_comes_while_the_disk_is_busy_is_one_batch(loop: str) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server, ExitStack() as opened:
        clients = [opened.enter_context(server.connect()) for _ in range(50)]
        clients[0].send(encode_request(PUT(b"first", b"")))
        eventually(lambda: store.batches == 1)
        for number, client in enumerate(clients):
            client.send(encode_request(PUT(b"k%d" % number, b"")))
        server.catch_up()
        store.disk.set()
        assert clients[0].receive(1) == b"\0"
        for client in clients:
            assert client.receive(1) == b"\0"
        assert store.batches == 2
        assert store.count() == 51


def test_whoever_pipelines_a_lot_gets_no_more_than_a_share_of_a_batch(loop: str) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server, ExitStack() as opened:
        first, *pipelining, last = (opened.enter_context(server.connect()) for _ in range(5))
        first.send(encode_request(RNUM()))
        eventually(lambda: store.batches == 1)
        for number, client in enumerate(pipelining):
            client.send(encode_request(ADDINT(b"n%d" % number, 1)) * 5000)
        server.catch_up()
        last.send(b"".join(encode_request(ADDINT(b"n%d" % number, 0)) for number in range(3)))
        server.catch_up()
        store.disk.set()
        for _ in range(3):
            assert last.receive(1) == b"\0"
            assert 0 < int.from_bytes(last.receive(4), "big") <= 200


class Moody(MemoryStore):
    """Fails while it is told to."""

    failing = False

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        if self.failing:
            raise StoreUnavailable("the disk is gone")
        return super().apply(operations)


def test_an_outage_of_the_store_is_not_absence_and_closes_nothing(loop: str) -> None:
    store = Moody()
    with ServerThread(store, loop=loop) as server, server.connect() as client:
        client.ask(PUT(b"k", b"v"))
        store.failing = True
        assert client.ask(GET(b"k"), PUTNR(b"l", b""), MISC(b"get", [b"k"], 0), PUT(b"k", b"w")) == [
            Reply(STORE_FAILED),
            Reply(STORE_FAILED, []),
            Reply(STORE_FAILED),
        ]
        store.failing = False
        assert client.ask(GET(b"k"), RNUM()) == [Reply(SUCCESS, b"v"), Reply(SUCCESS, 1)]


@pytest.mark.parametrize("blocking", [False, True])
def test_what_may_have_been_carried_out_is_neither_repeated_nor_answered(loop: str, blocking: bool) -> None:
    class Doubtful(MemoryStore):
        doubt = False

        def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
            results = super().apply(operations)
            if self.doubt:
                self.doubt = False
                raise OutcomeUnknown("a commit failed half way")
            return results

    store = Doubtful()
    store.blocking = blocking
    packed = swap.pack(None, b"v")
    with (
        ServerThread(store, loop=loop) as server,
        Client(Pool(server.address)) as client,
        server.connect() as one,
        server.connect() as another,
        server.connect() as idle,
    ):
        for known in (one, another, idle):  # newcomers have turns of their own
            assert known.ask(GET(b"k")) == [Reply(FAILURE)]
        changes = [ADDINT(b"n", 5), PUTCAT(b"k", b"x"), PUTKEEP(b"l", b""), EXT(CAS, b"m", packed, 0)]
        for change in changes:
            store.doubt = True
            with pytest.raises(OutcomeUnknown):
                client.call(change)
        assert [store.get(key) for key in (b"n", b"k", b"l", b"m")] == [struct.pack("=i", 5), b"x", b"", b"v"]
        store.doubt = True
        assert client.call(GET(b"k")) == Reply(SUCCESS, b"x")
        assert not store.doubt
        server.catch_up()
        with server.paused():  # so that these are one batch
            one.send(encode_request(PUTCAT(b"k", b"y")) + encode_request(GET(b"k")))
            another.send(encode_request(GET(b"k")))
            store.doubt = True
        assert one.is_closed()
        assert another.is_closed()
        assert idle.ask(GET(b"k")) == [Reply(SUCCESS, b"xy")]


def test_the_server_goes_on_reading_while_a_store_syncs_that_otherwise_needs_no_disk(loop: str) -> None:
    class SlowSync(MemoryStore):
        def __init__(self) -> None:
            super().__init__()
            self.begun, self.disk = threading.Event(), threading.Event()

        def sync(self) -> None:
            self.begun.set()
            assert self.disk.wait(PATIENCE)

    store = SlowSync()
    with ServerThread(store, loop=loop) as server, server.connect() as syncing:
        syncing.send(encode_request(SYNC()))
        assert store.begun.wait(PATIENCE)
        server.catch_up()
        store.disk.set()
        assert syncing.receive(1) == b"\0"


# -- where it listens


def test_a_unix_socket_is_removed_when_the_server_stops(loop: str, tmp_path: Path) -> None:
    path = tmp_path / "s"
    with ServerThread(MemoryStore(), loop=loop, address=f"unix:{path}") as server:
        with server.connect() as client:
            assert client.ask(PUT(b"k", b"v"), GET(b"k")) == [OK, Reply(SUCCESS, b"v")]
        assert path.is_socket()
    assert not path.exists()


def test_the_socket_of_a_server_that_was_killed_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
        killed.listen()
    assert path.is_socket()
    with ServerThread(MemoryStore(), address=f"unix:{path}") as server, server.connect() as client:
        assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]


def test_the_socket_of_a_server_that_lives_is_not(tmp_path: Path) -> None:
    address = f"unix:{tmp_path}/s"
    with ServerThread(MemoryStore(), address=address) as server:
        with pytest.raises(ConfigurationError, match=r"another server answers there.*--listen"):
            ServerThread(MemoryStore(), address=address)
        with server.connect() as client:
            assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]


def test_a_file_is_never_replaced_by_a_socket(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(ConfigurationError, match="a file is there"):
        ServerThread(MemoryStore(), address=f"unix:{tmp_path}/s")
    assert (tmp_path / "s").read_text() == "precious"


def test_a_taken_port_is_named_with_its_holder_and_the_remedy() -> None:
    with ServerThread(MemoryStore()) as server:
        port = server.address.port
        with pytest.raises(ConfigurationError, match=rf"port {port} of 127.0.0.1 is taken by .*process.*--listen"):
            ServerThread(MemoryStore(), address=f"127.0.0.1:{port}")
        with server.connect() as client:
            assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]


@pytest.mark.parametrize("address", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0"])
def test_other_machines_are_kept_out_unless_that_is_asked_for(address: str) -> None:
    with pytest.raises(ConfigurationError, match=r"other machines.*--allow-remote"):
        ServerThread(MemoryStore(), address=address)


@pytest.mark.parametrize(
    ("address", "culprit"),
    [
        ("1978:", "not the address"),
        ("unix:", "not the address"),
        ("127.0.0.1:65536", "not the address"),
        ("no..where:0", "no host"),
        ("192.0.2.1:0", "cannot listen"),  # is not ours, though it would be permitted here
        ("unix:/nowhere/s", "No such file or directory"),
        ("unix:/" + "x" * 200, "too long"),
    ],
)
def test_an_address_that_cannot_be_is_named(address: str, culprit: str) -> None:
    with pytest.raises(ConfigurationError, match=culprit):
        ServerThread(MemoryStore(), address=address, options=ServerOptions(allow_remote=True))


# -- the end


def test_what_has_come_is_answered_before_the_server_stops(loop: str) -> None:
    store = Slow()
    with ServerThread(store, loop=loop) as server, server.connect() as client, server.connect() as idle:
        client.send(encode_request(ADDINT(b"n", 1)) * 1000)
        eventually(lambda: store.batches == 1)
        threading.Timer(0.1, store.disk.set).start()
        server.stop()
        assert client.receive_to_end()[-4:] == (1000).to_bytes(4, "big")
        assert idle.is_closed()
        with pytest.raises(ConnectionRefusedError):
            server.connect()


def test_who_does_not_read_does_not_keep_the_server_from_stopping() -> None:
    with ServerThread(MemoryStore(), loop="uvloop") as server, server.connect() as client:
        client.ask(PUT(b"k", LARGE))
        client.send(encode_request(GET(b"k")) * 100)
        eventually(lambda: executed(server, "get") > 0)
        begun = time.monotonic()
        server.stop()
        assert time.monotonic() - begun < 5


class Writer(threading.Thread):
    """Puts one record after the other until the server is gone, and knows which were acknowledged."""

    def __init__(self, address: Address, name: str) -> None:
        super().__init__(name=name)
        self.address = address
        self.acknowledged = 0
        self.start()

    def run(self) -> None:
        with RawClient(self.address) as client:
            try:
                while True:
                    number = self.acknowledged
                    client.send(encode_request(PUT(b"%s:%d" % (self.name.encode(), number), b"v%d" % number)))
                    assert client.receive(1) == b"\0"
                    self.acknowledged += 1
            except (AssertionError, ConnectionError):
                pass

    def missing(self, store: LocalStore) -> list[int]:
        """Which of the acknowledged records are not there, or wrong."""
        return [
            number
            for number in range(self.acknowledged)
            if store.get(b"%s:%d" % (self.name.encode(), number)) != b"v%d" % number
        ]


def written_until(server: ServerProcess, round_: int, end: Callable[[], None]) -> list[Writer]:
    """What four writers had written when ``end`` ended the server."""
    address = Address.parse(server.url)
    writers = [Writer(address, f"{round_}.{number}") for number in range(4)]
    eventually(lambda: all(writer.acknowledged > 20 for writer in writers))
    end()
    for writer in writers:
        writer.join(PATIENCE)
        assert not writer.is_alive()
    return writers


@pytest.mark.parametrize("sync", ["os", "always"])
@pytest.mark.parametrize("rounds", [3, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_it_has_all_that_it_acknowledged(tmp_path: Path, sync: str, rounds: int) -> None:
    db = tmp_path / "state.lmdb"
    writers: list[Writer] = []
    server = ServerProcess(str(db), arguments=["--sync", sync])
    with server:
        for round_ in range(rounds):
            writers += written_until(server, round_, server.kill)
            server.start()
            with RawClient(Address.parse(server.url)) as client:
                ((status, count),) = client.ask(RNUM())
                assert status == SUCCESS
                assert count >= sum(writer.acknowledged for writer in writers)
    with LMDBStore(db) as store:
        assert [writer.missing(store) for writer in writers] == [[]] * len(writers)


def test_terminated_under_load_it_has_all_that_it_acknowledged(tmp_path: Path) -> None:
    db = tmp_path / "state.lmdb"
    with ServerProcess(str(db)) as server:
        begun = time.monotonic()
        writers = written_until(server, 0, server.stop)  # which asserts exit code 0
        assert time.monotonic() - begun < 5
        with LMDBStore(db) as store:
            assert [writer.missing(store) for writer in writers] == [[]] * len(writers)
