"""memcached's protocol as data: one golden table of exchanges, and what is done about clients that break it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pymemcache
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymemcache.exceptions import MemcacheClientError, MemcacheServerError

from beaker_statestore import __version__
from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant.calls import Call, Door
from beaker_statestore.tyrant.commands import (
    APPEND,
    DECR,
    EXT,
    FAILURE,
    FORBIDDEN,
    GET,
    INCR,
    MGET,
    OUT,
    PREPEND,
    PUT,
    PUTKEEP,
    REPLACE,
    STAT,
    STORE_FAILED,
    SUCCESS,
    VANISH,
    Reply,
    Request,
)
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import Mask
from beaker_statestore.tyrant.protocols import CallDecoder
from beaker_statestore.tyrant.server import ServerLimits, ServerOptions
from beaker_statestore.tyrant.wire import LIMITS, Limits, encode_request
from tests.serving import PATIENCE, ServerThread

OK = Reply(SUCCESS)
FAILED = Reply(FAILURE)
BROKEN = Reply(STORE_FAILED)
MASKED = Reply(FORBIDDEN)

FORBIDDEN_LINE = b"CLIENT_ERROR forbidden\r\n"
BROKEN_LINE = b"SERVER_ERROR the store failed\r\n"

#: What is sent, what is to be carried out, and the answer to each reply. Where the transcripts of an original server
#: have the same exchange, it is the same.
GOLDEN: list[tuple[bytes, Request | None, list[tuple[Reply, bytes]]]] = [
    (
        b"set mc 5 0 3\r\nabc\r\n",
        PUT(b"mc", b"abc"),
        [(OK, b"STORED\r\n"), (FAILED, b"SERVER_ERROR unexpected\r\n")],
    ),
    (b"set \xff\x00\x0b -1 -5 4\r\n\r\n\r\n\r\n", PUT(b"\xff\x00\x0b", b"\r\n\r\n"), [(OK, b"STORED\r\n")]),
    (b"\t set  mc\t0 0 0 \r\n\r\n", PUT(b"mc", b""), [(OK, b"STORED\r\n")]),
    (b"add mc 0 0 1\r\nx\r\n", PUTKEEP(b"mc", b"x"), [(OK, b"STORED\r\n"), (FAILED, b"NOT_STORED\r\n")]),
    (
        b"replace mc 0 0 1\r\nx\r\n",
        EXT(REPLACE, b"mc", b"x", 0),
        [(Reply(SUCCESS, b"x"), b"STORED\r\n"), (FAILED, b"NOT_STORED\r\n")],
    ),
    (
        b"append mc 0 0 1\r\nz\r\n",
        EXT(APPEND, b"mc", b"z", 0),
        [(Reply(SUCCESS, b"yz"), b"STORED\r\n"), (FAILED, b"NOT_STORED\r\n")],
    ),
    (
        b"prepend mc 0 0 1\r\nw\r\n",
        EXT(PREPEND, b"mc", b"w", 0),
        [(Reply(SUCCESS, b"wyz"), b"STORED\r\n"), (FAILED, b"NOT_STORED\r\n")],
    ),
    (
        b"get mc\r\n",
        GET(b"mc"),
        [(Reply(SUCCESS, b"a\r\nc"), b"VALUE mc 0 4\r\na\r\nc\r\nEND\r\n"), (FAILED, b"END\r\n")],
    ),
    (b"get mc\n", GET(b"mc"), [(Reply(SUCCESS, b""), b"VALUE mc 0 0\r\n\r\nEND\r\n")]),
    (b"get " + b"k" * 300 + b"\r\n", GET(b"k" * 300), [(FAILED, b"END\r\n")]),
    (b"gets mc\r\n", GET(b"mc"), [(Reply(SUCCESS, b"abc"), b"VALUE mc 0 3\r\nabc\r\nEND\r\n")]),
    (
        b"get mc nope mc\r\n",
        MGET([b"mc", b"nope", b"mc"]),
        [
            (
                Reply(SUCCESS, [(b"mc", b"abc"), (b"mc", b"abc")]),
                b"VALUE mc 0 3\r\nabc\r\nVALUE mc 0 3\r\nabc\r\nEND\r\n",
            ),
            (Reply(SUCCESS, []), b"END\r\n"),
        ],
    ),
    (b"delete q\r\n", OUT(b"q"), [(OK, b"DELETED\r\n"), (FAILED, b"NOT_FOUND\r\n")]),
    (b"delete q 0\r\n", OUT(b"q"), [(OK, b"DELETED\r\n")]),
    (b"delete noreply\r\n", OUT(b"noreply"), [(OK, b"DELETED\r\n")]),
    (b"incr q 5\r\n", EXT(INCR, b"q", b"5", 0), [(Reply(SUCCESS, b"12"), b"12\r\n"), (FAILED, b"NOT_FOUND\r\n")]),
    (b"decr q -50\r\n", EXT(DECR, b"q", b"-50", 0), [(Reply(SUCCESS, b"0"), b"0\r\n"), (FAILED, b"NOT_FOUND\r\n")]),
    (b"flush_all\r\n", VANISH(), [(OK, b"OK\r\n")]),
    (b"flush_all 0\r\n", VANISH(), [(OK, b"OK\r\n")]),
    (b"version\r\n", None, [(OK, b"VERSION " + __version__.encode() + b"\r\n")]),
]
#: The same with ``noreply``.
SILENT: list[tuple[bytes, Request]] = [
    (b"set k 0 0 1 noreply\r\n7\r\n", PUT(b"k", b"7")),
    (b"add k 0 0 1 noreply\r\n7\r\n", PUTKEEP(b"k", b"7")),
    (b"append k 0 0 1 noreply\r\n7\r\n", EXT(APPEND, b"k", b"7", 0)),
    (b"delete k noreply\r\n", OUT(b"k")),
    (b"delete k 0 noreply\r\n", OUT(b"k")),
    (b"incr k 1 noreply\r\n", EXT(INCR, b"k", b"1", 0)),
    (b"flush_all noreply\r\n", VANISH()),
    (b"flush_all 0 noreply\r\n", VANISH()),
]
REQUESTS = [(data, request) for data, request, _ in GOLDEN] + SILENT
ANSWERS = [(data, reply, answer) for data, _, answers in GOLDEN for reply, answer in answers]

#: What follows everything that is refused, in the same packet: a write in each of the protocols.
WRITES = {
    "binary": encode_request(PUT(b"stolen", b"1")),
    "memcached": b"set stolen 0 0 1\r\n1\r\n",
    "http": b"PUT /stolen HTTP/1.1\r\nContent-Length: 1\r\n\r\n1",
}
EVERYBODY = HTTPPolicy()


def call_of(data: bytes, limits: Limits = LIMITS) -> Call:
    """The only call in ``data``."""
    decoder = CallDecoder(limits, EVERYBODY)
    decoder.feed(data)
    call = decoder.next()
    assert call is not None
    assert call.last or decoder.buffered == 0
    return call


def told(call: Call, reply: Reply) -> bytes:
    encoded = call.encode(reply)
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)


def fed_whole(data: bytes) -> Call | None:
    return call_of(data)


def fed_byte_by_byte(data: bytes) -> Call | None:
    decoder = CallDecoder()
    for place in range(len(data) - 1):
        decoder.feed(data[place : place + 1])
        assert decoder.next() is None, f"complete after {place + 1} of {len(data)} bytes"
        assert decoder.midway
        assert decoder.buffered == place + 1
    decoder.feed(data[-1:])
    return decoder.next()


def fed_with_garbage_behind(data: bytes) -> Call | None:
    decoder = CallDecoder()
    decoder.feed(data + b"garbage")
    call = decoder.next()
    assert decoder.buffered == len(b"garbage")
    return call


def shown(value: Any) -> str:
    return repr(value)[:60]


@pytest.mark.parametrize("feed", [fed_whole, fed_byte_by_byte, fed_with_garbage_behind])
@pytest.mark.parametrize(("data", "request_"), REQUESTS, ids=shown)
def test_requests_are_decoded(data: bytes, request_: Request | None, feed: Callable[[bytes], Call | None]) -> None:
    call = feed(data)
    assert call is not None
    assert call[:1] + call[2:] == (request_, Door.MEMCACHED, False)


@pytest.mark.parametrize(("data", "reply", "answer"), ANSWERS, ids=shown)
def test_replies_are_encoded(data: bytes, reply: Reply, answer: bytes) -> None:
    assert call_of(data).encode(reply) == answer


@pytest.mark.parametrize("data", [data for data, request, _ in GOLDEN if request is not None], ids=shown)
def test_no_failure_looks_like_absence_or_success(data: bytes) -> None:
    call = call_of(data)
    assert call.encode(BROKEN) == BROKEN_LINE
    assert call.encode(MASKED) == FORBIDDEN_LINE
    refused = call.refused()
    assert (refused.request, refused.encode(OK), refused.last) == (None, FORBIDDEN_LINE, False)


@pytest.mark.parametrize(("data", "request_"), SILENT, ids=shown)
def test_noreply_hears_nothing_but_the_end_if_it_is_forbidden(data: bytes, request_: Request) -> None:
    call = call_of(data)
    assert [call.encode(reply) for reply in (OK, FAILED, BROKEN, MASKED)] == [b""] * 4
    refused = call.refused()
    assert (refused.request, refused.encode(OK), refused.last) == (None, b"", True)


def test_even_the_version_can_be_forbidden() -> None:
    assert call_of(b"version\r\n").refused().encode(OK) == FORBIDDEN_LINE


def test_quit_is_the_last() -> None:
    call = call_of(b"quit\r\n")
    assert (call.request, call.encode(OK), call.last) == (None, b"", True)


def test_statistics_have_the_names_of_the_original() -> None:
    text = (
        b"version\t9\ntime\t1700000000.5\npid\t7\nrnum\t3\nsize\t900\nru_user\t0.25\nru_sys\t0.125\nru_real\t61.9\n"
        b"cnt_put\t5\ncnt_putkeep\t2\ncnt_out\t4\ncnt_get\t10\ncnt_mget\t1\ncnt_vanish\t1\n"
        b"cnt_put_miss\t1\ncnt_out_miss\t3\ncnt_get_miss\t6\n"
    )
    call = call_of(b"stats\r\n")
    assert call.request == STAT()
    *lines, end = told(call, Reply(SUCCESS, text)).split(b"\r\n")[:-1]
    assert end == b"END"
    assert [line.split(b" ", 2)[0] for line in lines] == [b"STAT"] * len(lines)
    figures = {name.decode(): value.decode() for name, value in (line.split(b" ", 2)[1:] for line in lines)}
    assert figures == {
        "pid": "7",
        "uptime": "61",
        "time": "1700000000",
        "version": __version__,
        "pointer_size": "64",
        "rusage_user": "0.25",
        "rusage_system": "0.125",
        "cmd_set": "7",
        "cmd_set_hits": "6",
        "cmd_set_misses": "1",
        "cmd_delete": "4",
        "cmd_delete_hits": "1",
        "cmd_delete_misses": "3",
        "cmd_get": "11",
        "cmd_get_hits": "5",
        "cmd_get_misses": "6",
        "cmd_flush": "1",
        "curr_items": "3",
        "total_items": "3",
        "bytes": "900",
    }
    assert call.encode(MASKED) == FORBIDDEN_LINE
    assert call_of(b"stats items\r\n").request == STAT()


# -- clients that break the protocol

#: What is answered with a line, whereupon the connection ends.
REFUSED: dict[str, tuple[bytes, bytes]] = {
    "words missing": (b"set k 0 1\r\nx\r\n", b"CLIENT_ERROR error"),
    "words too many": (b"set k 0 0 1 x\r\nx\r\n", b"CLIENT_ERROR error"),
    "a length that is no number": (b"set k 0 0 x\r\n", b"CLIENT_ERROR error"),
    "a negative length": (b"set k 0 0 -1\r\n", b"CLIENT_ERROR error"),
    "a signed length": (b"set k 0 0 +1\r\nx\r\n", b"CLIENT_ERROR error"),
    "a length in other digits": (b"set k 0 0 \xd9\xa1\r\nx\r\n", b"CLIENT_ERROR error"),
    "a length of many digits": (b"set k 0 0 00000000001\r\nx\r\n", b"CLIENT_ERROR error"),
    "flags that are no number": (b"set k x 0 1\r\nx\r\n", b"CLIENT_ERROR error"),
    "a length above the limit": (b"set k 0 0 268435457\r\n", b"SERVER_ERROR object too large for cache"),
    "data longer than announced": (b"set k 0 0 1\r\nxyz", b"CLIENT_ERROR bad data chunk"),
    "data without an end": (b"set k 0 0 1\r\nx\n\n", b"CLIENT_ERROR bad data chunk"),
    "a carriage return in a line": (b"get a\rb\r\n", b"CLIENT_ERROR error"),
    "two carriage returns": (b"get a\r\r\n", b"CLIENT_ERROR error"),
    "get of nothing": (b"get\r\n", b"CLIENT_ERROR error"),
    "delete of nothing": (b"delete\r\n", b"CLIENT_ERROR error"),
    "delete of two": (b"delete a b\r\n", b"CLIENT_ERROR error"),
    "delete with too much": (b"delete a 0 0\r\n", b"CLIENT_ERROR error"),
    "incr by nothing": (b"incr k\r\n", b"CLIENT_ERROR error"),
    "incr by text": (b"incr k x\r\n", b"CLIENT_ERROR error"),
    "incr by too long a number": (b"incr k " + b"1" * 21 + b"\r\n", b"CLIENT_ERROR error"),
    "flush_all later": (b"flush_all 10\r\n", b"CLIENT_ERROR error"),
    "version of something": (b"version 1\r\n", b"CLIENT_ERROR error"),
}
#: What is not answered at all.
UNKNOWN: dict[str, bytes] = {
    "an empty line": b"\r\n",
    "a verb of memcached's that ttserver has not": b"cas k 0 0 1 1\r\nx\r\n",
    "another one": b"touch k 0\r\n",
    "capital letters": b"GET k\r\n",
    "binary memcached": b"\x80\x00\x00\x01\x00\x00\x00\x00\n",
    "a verb with more behind it": b"setx k 0 0 1\r\nx\r\n",
}


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize(("data", "answer"), REFUSED.values(), ids=list(REFUSED))
def test_behind_what_is_refused_nothing_is_read_any_more(data: bytes, answer: bytes, behind: bytes) -> None:
    decoder = CallDecoder(LIMITS, EVERYBODY)
    decoder.feed(b"get before\r\n" + data + behind)
    first = decoder.next()
    assert first is not None
    assert first.request == GET(b"before")
    call = decoder.next()
    assert call is not None
    assert (call.request, call.encode(OK), call.last) == (None, answer + b"\r\n", True)
    decoder.feed(behind)
    assert decoder.next() is None
    assert decoder.buffered == 0


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("data", UNKNOWN.values(), ids=list(UNKNOWN))
def test_behind_what_is_unknown_nothing_is_read_any_more(data: bytes, behind: bytes) -> None:
    decoder = CallDecoder(LIMITS, EVERYBODY)
    decoder.feed(data + behind)
    for _ in range(2):
        with pytest.raises(ProtocolError):
            decoder.next()
        decoder.feed(behind)
    assert decoder.buffered == 0


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
def test_behind_quit_nothing_is_read_any_more(behind: bytes) -> None:
    decoder = CallDecoder(LIMITS, EVERYBODY)
    decoder.feed(b"quit\r\n" + behind)
    call = decoder.next()
    assert call is not None
    assert call.last
    assert decoder.next() is None


@pytest.mark.parametrize("method", [b"flush_all", b"get", b"version", b"stats", b"quit"])
def test_a_line_that_a_browser_could_send_is_none_of_memcached(method: bytes) -> None:
    line = method + b" / HTTP/1.1\r\n"
    decoder = CallDecoder()
    decoder.feed(line)
    with pytest.raises(ProtocolError, match="HTTP"):
        decoder.next()
    decoder = CallDecoder(LIMITS, EVERYBODY)
    decoder.feed(line + b"Host: localhost\r\n\r\n")
    call = decoder.next()
    assert call is not None
    assert (call.request, call.door, call.last) == (None, Door.HTTP, True)


@pytest.mark.parametrize(
    ("within", "beyond", "limits", "answer"),
    [
        (b"set k 0 0 8\r\n12345678\r\n", b"set k 0 0 9\r\n", Limits(blob=8), b"SERVER_ERROR object too large"),
        (b"set k 0 0 3\r\n123\r\n", b"set k 0 0 4\r\n", Limits(message=18), b"SERVER_ERROR object too large"),
        (b"get 12345678\r\n", b"get 123456789\r\n", Limits(blob=8), b"CLIENT_ERROR too long a key"),
        (b"get 1 2 3\r\n", b"get 1 2 3 4\r\n", Limits(count=3), b"CLIENT_ERROR too many words"),
    ],
)
def test_each_limit_holds_to_the_byte(within: bytes, beyond: bytes, limits: Limits, answer: bytes) -> None:
    assert call_of(within, limits).request is not None
    call = call_of(beyond, limits)
    assert call.request is None
    assert told(call, OK).startswith(answer)


def test_a_line_has_a_limit() -> None:
    call_of(b"get 45\r\n", Limits(line=8))
    for data in (b"get 456\r\n", b"get 45678"):
        decoder = CallDecoder(Limits(line=8))
        decoder.feed(data)
        with pytest.raises(ProtocolError, match="a line of 9 is above the limit of 8"):
            decoder.next()


words = st.binary(min_size=1, max_size=20).map(
    lambda key: bytes(byte for byte in key if byte not in b" \t\r\n") or b"k"
)


@given(words, st.binary(max_size=60))
def test_any_record_arrives_as_it_was(key: bytes, value: bytes) -> None:
    call = call_of(b"set %b 0 0 %d\r\n%b\r\n" % (key, len(value), value))
    assert call.request == PUT(key, value)
    assert call_of(b"get %b\r\n" % key).encode(Reply(SUCCESS, value)) == b"VALUE %b 0 %d\r\n%b\r\nEND\r\n" % (
        key,
        len(value),
        value,
    )


@pytest.mark.parametrize("length", [10, 300_000, 1_000_000])
def test_long_records_arrive_as_they_were_however_they_are_fed(length: int) -> None:
    value = bytes(range(251)) * (length // 251)
    data = b"set k 0 0 %d\r\n%b\r\n" % (len(value), value)
    decoder = CallDecoder()
    for place in range(0, 3 * len(data), 100_000):
        decoder.feed((data * 3)[place : place + 100_000])
        if place == 0 and length > 100_000:
            assert decoder.next() is None  # and is not asked again until all is there
    for _ in range(3):
        call = decoder.next()
        assert call is not None
        assert call.request == PUT(b"k", value)
    assert decoder.buffered == 0
    answer = b"VALUE k 0 %d\r\n%b\r\nEND\r\n" % (len(value), value)
    assert told(call_of(b"get k\r\n"), Reply(SUCCESS, value)) == answer
    assert told(call_of(b"get k l\r\n"), Reply(SUCCESS, [(b"k", value)])) == answer


# -- the real thing: another's client against a server


def client_of(server: ServerThread) -> contextlib.closing[pymemcache.Client]:
    address = (server.address.host, server.address.port)
    return contextlib.closing(
        pymemcache.Client(address, connect_timeout=PATIENCE, timeout=PATIENCE, default_noreply=False)
    )


def test_a_client_of_memcached_finds_all_it_needs() -> None:
    store = MemoryStore()
    with ServerThread(store) as server, client_of(server) as client:
        assert client.set("k", b"a\r\nb") is True
        assert client.get("k") == b"a\r\nb"
        assert client.add("k", b"x") is False
        assert client.add("new", b"x") is True
        assert client.replace("absent", b"x") is False
        assert client.append("new", b"y") is True
        assert client.prepend("new", b"w") is True
        assert client.get_many(["k", "absent", "new"]) == {"k": b"a\r\nb", "new": b"wxy"}
        assert client.gets("absent") == (None, None)
        assert client.set("n", b"40", noreply=True) is True
        assert client.incr("n", 2) == 42
        assert client.decr("n", 100) == 0
        assert client.incr("absent", 1) is None
        assert client.delete("n") is True
        assert client.delete("n") is False
        assert client.version() == __version__.encode()
        assert client.stats()[b"curr_items"] == 2
        assert client.set_many({f"many{number}": b"%d" % number for number in range(200)}) == []
        assert len(client.get_many([f"many{number}" for number in range(200)])) == 200
        assert client.flush_all() is True
        assert client.get("k") is None
        client.quit()


def test_a_client_of_memcached_hears_that_something_is_forbidden() -> None:
    store = MemoryStore()
    store.put(b"k", b"v")
    options = ServerOptions(tcp_mask=Mask(frozenset({"put", "get", "stat", "vanish"})))
    with ServerThread(store, options=options) as server, client_of(server) as client:
        for forbidden in (
            lambda: client.set("k", b"x"),
            lambda: client.replace("k", b"x"),
            lambda: client.get("k"),
            lambda: client.get_many(["k", "l"]),
            client.stats,
            client.flush_all,
        ):
            with pytest.raises(MemcacheClientError) as refusal:
                forbidden()
            assert refusal.value.args == (b"forbidden",)
        # It will not hear an answer, so it is the connection that ends.
        client.set("k", b"x", noreply=True)
        with pytest.raises((pymemcache.MemcacheUnexpectedCloseError, ConnectionError)):
            client.add("new", b"x")
        assert store.get(b"k") == b"v"
        assert store.get(b"new") is None


def test_a_client_of_memcached_hears_that_something_is_too_large() -> None:
    with ServerThread(MemoryStore(), limits=ServerLimits(message=10_000)) as server, client_of(server) as client:
        with pytest.raises(MemcacheServerError) as refusal:
            client.set("k", b"x" * 10_000)
        assert refusal.value.args == (b"object too large for cache",)
        assert client.get("k") is None
