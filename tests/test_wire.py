"""The wire as data: one golden table of exchanges, read both ways, and what is done about peers that break it."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant import swap
from beaker_statestore.tyrant.commands import (
    ADDDOUBLE,
    ADDINT,
    CAS,
    COMMANDS,
    COPY,
    EXT,
    FAILURE,
    FWMKEYS,
    GET,
    ITERINIT,
    ITERNEXT,
    MGET,
    MISC,
    OPTIMIZE,
    OUT,
    PROBE,
    PUT,
    PUTCAT,
    PUTKEEP,
    PUTNR,
    PUTSHL,
    REPL,
    RESTORE,
    RNUM,
    SETMST,
    SIZE,
    STAT,
    STORE_FAILED,
    SUCCESS,
    SYNC,
    VANISH,
    VSIZ,
    Body,
    Command,
    Kind,
    Reply,
    Request,
    is_repeatable,
)
from beaker_statestore.tyrant.wire import (
    LIMITS,
    Limits,
    ReplyDecoder,
    RequestDecoder,
    decimal_to_float,
    encode_reply,
    encode_request,
    float_to_decimal,
)

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
OK = Reply(SUCCESS)
FAILED = Reply(FAILURE)

#: Request, its bytes, reply, its bytes; as in ttserver's specification and as an original server was seen to answer.
GOLDEN: list[tuple[Request, str, Reply, str]] = [
    (PUT(b"one", b"first"), "C8 10 00000003 00000005 6F6E65 6669727374", OK, "00"),
    (PUT(b"one", b"first"), "C8 10 00000003 00000005 6F6E65 6669727374", FAILED, "01"),
    (PUT(b"one", b"first"), "C8 10 00000003 00000005 6F6E65 6669727374", Reply(STORE_FAILED), "02"),
    (PUT(b"", b""), "C8 10 00000000 00000000", OK, "00"),
    (PUT(b"\x00\xff", b"\xc8\x10"), "C8 10 00000002 00000002 00FF C810", OK, "00"),
    (PUTKEEP(b"one", b"first"), "C8 11 00000003 00000005 6F6E65 6669727374", OK, "00"),
    (PUTKEEP(b"one", b"first"), "C8 11 00000003 00000005 6F6E65 6669727374", FAILED, "01"),
    (PUTCAT(b"one", b"first"), "C8 12 00000003 00000005 6F6E65 6669727374", OK, "00"),
    (PUTSHL(b"shl", b"XY", 5), "C8 13 00000003 00000002 00000005 73686C 5859", OK, "00"),
    (PUTSHL(b"shl", b"Z", 0), "C8 13 00000003 00000001 00000000 73686C 5A", FAILED, "01"),
    (PUTNR(b"nr", b"silent"), "C8 18 00000002 00000006 6E72 73696C656E74", OK, ""),
    (OUT(b"one"), "C8 20 00000003 6F6E65", OK, "00"),
    (OUT(b"one"), "C8 20 00000003 6F6E65", FAILED, "01"),
    (GET(b"one"), "C8 30 00000003 6F6E65", Reply(SUCCESS, b"first"), "00 00000005 6669727374"),
    (GET(b"one"), "C8 30 00000003 6F6E65", Reply(SUCCESS, b""), "00 00000000"),
    (GET(b"one"), "C8 30 00000003 6F6E65", FAILED, "01"),
    (MGET([]), "C8 31 00000000", Reply(SUCCESS, []), "00 00000000"),
    (
        MGET([b"one", b"", b"one"]),
        "C8 31 00000003  00000003 6F6E65  00000000  00000003 6F6E65",
        Reply(SUCCESS, [(b"one", b"uno"), (b"", b"nil"), (b"one", b"")]),
        "00 00000003  00000003 00000003 6F6E65 756E6F  00000000 00000003 6E696C  00000003 00000000 6F6E65",
    ),
    (VSIZ(b"one"), "C8 38 00000003 6F6E65", Reply(SUCCESS, 5), "00 00000005"),
    (VSIZ(b"one"), "C8 38 00000003 6F6E65", FAILED, "01"),
    (ITERINIT(), "C8 50", OK, "00"),
    (ITERNEXT(), "C8 51", Reply(SUCCESS, b"one"), "00 00000003 6F6E65"),
    (ITERNEXT(), "C8 51", FAILED, "01"),
    (
        FWMKEYS(b"f", 3),
        "C8 58 00000001 00000003 66",
        Reply(SUCCESS, [b"f0", b"f1"]),
        "00 00000002  00000002 6630  00000002 6631",
    ),
    (FWMKEYS(b"", -1), "C8 58 00000000 FFFFFFFF", Reply(SUCCESS, []), "00 00000000"),
    (ADDINT(b"n", 5), "C8 60 00000001 00000005 6E", Reply(SUCCESS, 42), "00 0000002A"),
    (ADDINT(b"n", -50), "C8 60 00000001 FFFFFFCE 6E", Reply(SUCCESS, -8), "00 FFFFFFF8"),
    (ADDINT(b"n", -(2**31)), "C8 60 00000001 80000000 6E", FAILED, "01"),
    (
        ADDDOUBLE(b"d", 1, 500_000_000_000),
        "C8 61 00000001 0000000000000001 000000746A528800 64",
        Reply(SUCCESS, 1.5),
        "00 0000000000000001 000000746A528800",
    ),
    (
        ADDDOUBLE(b"d", -1, -750_000_000_000),
        "C8 61 00000001 FFFFFFFFFFFFFFFF FFFFFF5160843400 64",
        Reply(SUCCESS, -1.75),
        "00 FFFFFFFFFFFFFFFF FFFFFF5160843400",
    ),
    (
        ADDDOUBLE(b"d", INT64_MIN, INT64_MIN),
        "C8 61 00000001 8000000000000000 8000000000000000 64",
        Reply(SUCCESS, math.nan),
        "00 8000000000000000 8000000000000000",
    ),
    (
        ADDDOUBLE(b"d", INT64_MAX, 0),
        "C8 61 00000001 7FFFFFFFFFFFFFFF 0000000000000000 64",
        Reply(SUCCESS, math.inf),
        "00 7FFFFFFFFFFFFFFF 0000000000000000",
    ),
    (
        ADDDOUBLE(b"d", INT64_MIN, 0),
        "C8 61 00000001 8000000000000000 0000000000000000 64",
        Reply(SUCCESS, -math.inf),
        "00 8000000000000000 0000000000000000",
    ),
    (ADDDOUBLE(b"d", 0, 0), "C8 61 00000001 0000000000000000 0000000000000000 64", FAILED, "01"),
    (
        EXT(b"cas", b"k", b"vv", 1),
        "C8 68 00000003 00000001 00000001 00000002 636173 6B 7676",
        Reply(SUCCESS, b"1"),
        "00 00000001 31",
    ),
    (EXT(b"nope", b"", b"", 0), "C8 68 00000004 00000000 00000000 00000000 6E6F7065", FAILED, "01"),
    (SYNC(), "C8 70", OK, "00"),
    (SYNC(), "C8 70", Reply(STORE_FAILED), "02"),
    (OPTIMIZE(b"bnum=1"), "C8 71 00000006 626E756D3D31", OK, "00"),
    (VANISH(), "C8 72", OK, "00"),
    (COPY(b"/t"), "C8 73 00000002 2F74", FAILED, "01"),
    (RESTORE(b"/t", 2**40, 1), "C8 74 00000002 0000010000000000 00000001 2F74", FAILED, "01"),
    (
        SETMST(b"host", 1978, -1, 0),
        "C8 78 00000004 000007BA FFFFFFFFFFFFFFFF 00000000 686F7374",
        FAILED,
        "01",
    ),
    (RNUM(), "C8 80", Reply(SUCCESS, 2**33), "00 0000000200000000"),
    (SIZE(), "C8 81", Reply(SUCCESS, 525_000), "00 00000000000802C8"),
    (STAT(), "C8 88", Reply(SUCCESS, b"pid\t1\n"), "00 00000006 706964 09 31 0A"),
    (
        MISC(b"putlist", [b"a", b"", b"b"], 1),
        "C8 90 00000007 00000001 00000003 7075746C697374  00000001 61  00000000  00000001 62",
        Reply(SUCCESS, []),
        "00 00000000",
    ),
    (
        MISC(b"get", [b"k"], 0),
        "C8 90 00000003 00000000 00000001 676574  00000001 6B",
        Reply(SUCCESS, [b"v"]),
        "00 00000001  00000001 76",
    ),
    (MISC(b"", [], 0), "C8 90 00000000 00000000 00000000", Reply(FAILURE, []), "01 00000000"),
    (MISC(b"sync", [], 0), "C8 90 00000004 00000000 00000000 73796E63", Reply(STORE_FAILED, []), "02 00000000"),
    (REPL(2**40, 7), "C8 A0 0000010000000000 00000007", OK, "no reply is spoken"),
]

REQUESTS = [(request, bytes.fromhex(text)) for request, text, _, _ in GOLDEN]
REPLIES = [
    (request, reply, bytes.fromhex(text))
    for request, _, reply, text in GOLDEN
    if request.command.body not in (Body.NO_REPLY, Body.STREAM)
]


def shown(value: Any) -> str:
    if isinstance(value, Request):
        return value.command.name
    return value.hex() if isinstance(value, bytes) else repr(value)


def same(one: Reply, other: Reply) -> bool:
    """Equal, where "not a number" equals itself."""
    return repr(one) == repr(other)


def fed_whole(decoder: RequestDecoder | ReplyDecoder, data: bytes) -> Any:
    decoder.feed(data)
    return decoder.next()


def fed_byte_by_byte(decoder: RequestDecoder | ReplyDecoder, data: bytes) -> Any:
    for place in range(len(data) - 1):
        decoder.feed(data[place : place + 1])
        assert decoder.next() is None, f"complete after {place + 1} of {len(data)} bytes"
        assert decoder.midway
        assert decoder.buffered == place + 1
    decoder.feed(data[-1:])
    return decoder.next()


def fed_with_garbage_behind(decoder: RequestDecoder | ReplyDecoder, data: bytes) -> Any:
    decoder.feed(data + b"\x00garbage")
    message = decoder.next()
    assert decoder.buffered == len(b"\x00garbage")
    return message


feedings = pytest.mark.parametrize("feed", [fed_whole, fed_byte_by_byte, fed_with_garbage_behind])
Feed = Callable[[Any, bytes], Any]


def test_the_table_has_every_command() -> None:
    assert {request.command for request, _ in REQUESTS} == set(COMMANDS.values())
    assert len(COMMANDS) == 26


@pytest.mark.parametrize(("request_", "data"), REQUESTS, ids=shown)
def test_requests_are_encoded(request_: Request, data: bytes) -> None:
    assert encode_request(request_) == data


@feedings
@pytest.mark.parametrize(("request_", "data"), REQUESTS, ids=shown)
def test_requests_are_decoded(request_: Request, data: bytes, feed: Feed) -> None:
    assert feed(RequestDecoder(), data) == request_


@pytest.mark.parametrize(("request_", "reply", "data"), REPLIES, ids=shown)
def test_replies_are_encoded(request_: Request, reply: Reply, data: bytes) -> None:
    assert encode_reply(request_.command, reply) == data


@feedings
@pytest.mark.parametrize(("request_", "reply", "data"), REPLIES, ids=shown)
def test_replies_are_decoded(request_: Request, reply: Reply, data: bytes, feed: Feed) -> None:
    decoder = ReplyDecoder()
    decoder.expect(request_)
    answered, decoded = feed(decoder, data)
    assert answered is request_
    assert same(decoded, reply)


def test_a_failure_has_no_body_whatever_its_value_was_to_be() -> None:
    assert encode_reply(GET, Reply(FAILURE, b"value")) == b"\x01"
    assert encode_reply(MISC, Reply(FAILURE, [b"value"])) == b"\x01\0\0\0\0"


def test_putnr_is_never_answered() -> None:
    assert encode_reply(PUTNR, OK) == encode_reply(PUTNR, FAILED) == encode_reply(PUTNR, Reply(STORE_FAILED)) == b""


def test_replication_is_not_spoken() -> None:
    with pytest.raises(ProtocolError, match="replication"):
        encode_reply(REPL, OK)
    decoder = ReplyDecoder()
    decoder.expect(REPL(1, 1))
    decoder.feed(b"\0\0\0\0\1")
    with pytest.raises(ProtocolError, match="replication"):
        decoder.next()


# -- peers that break the protocol

MALFORMED_REQUESTS = {
    "a wrong first byte": "C9 30 00000001 6B",
    "text": b"get k\r\n".hex(),
    "an unknown command": "C8 99",
    "a key above the limit": "C8 30 10000001",
    "a negative length": "C8 30 FFFFFFFF",
    "a value of negative length": "C8 10 00000001 80000000",
    "a negative width": "C8 13 00000001 00000001 FFFFFFFF",
    "too long a name of a function": "C8 68 00000400 00000000 00000001 00000001",
    "too long a name of a misc function": "C8 90 00000400 00000000 00000001",
    "too many keys": "C8 31 00100001",
    "a negative number of keys": "C8 31 FFFFFFFF",
    "an element of negative length": "C8 31 00000002 00000001 6B FFFFFFFF",
    "an element above the limit": "C8 90 00000001 00000000 00000001 6B 10000001",
}


@pytest.mark.parametrize("text", MALFORMED_REQUESTS.values(), ids=list(MALFORMED_REQUESTS))
def test_behind_a_malformed_request_nothing_is_read_any_more(text: str) -> None:
    decoder = RequestDecoder()
    decoder.feed(encode_request(GET(b"before")) + bytes.fromhex(text) + encode_request(GET(b"behind")))
    assert decoder.next() == GET(b"before")
    with pytest.raises(ProtocolError):
        decoder.next()
    decoder.feed(encode_request(GET(b"later")))
    with pytest.raises(ProtocolError):
        decoder.next()
    assert decoder.buffered == 0
    assert not decoder.midway


@pytest.mark.parametrize(
    ("within", "beyond", "limits"),
    [
        (GET(b"k" * 8), GET(b"k" * 9), Limits(blob=8)),
        (PUT(b"k", b"v" * 8), PUT(b"k", b"v" * 9), Limits(blob=8)),
        (MGET([b"k" * 8]), MGET([b"k" * 9]), Limits(blob=8)),
        (MGET([b"k"] * 3), MGET([b"k"] * 4), Limits(count=3)),
        (MISC(b"", [b"k"] * 3, 0), MISC(b"", [b"k"] * 4, 0), Limits(count=3)),
        (MISC(b"nam", [], 0), MISC(b"name", [], 0), Limits(name=3)),
        (EXT(b"nam", b"long key", b"", 0), EXT(b"name", b"", b"", 0), Limits(name=3)),
        (GET(b"k" * 14), GET(b"k" * 15), Limits(message=20)),
        (MGET([b"1234567", b"123"]), MGET([b"1234567", b"1234"]), Limits(message=24)),
    ],
)
def test_each_limit_holds_to_the_byte(within: Request, beyond: Request, limits: Limits) -> None:
    decoder = RequestDecoder(limits)
    decoder.feed(encode_request(within))
    assert decoder.next() == within
    decoder.feed(encode_request(beyond))
    with pytest.raises(ProtocolError, match="above the limit"):
        decoder.next()


@pytest.mark.parametrize(
    ("request_", "text", "limits"),
    [
        (GET(b"k"), "00 FFFFFFFF", LIMITS),
        (GET(b"k"), "00 00000009", Limits(blob=8)),
        (MGET([b"k"]), "00 00000001 00000009 00000001", Limits(blob=8)),
        (MGET([b"k"]), "00 00000001 00000001 00000009", Limits(blob=8)),
        (MGET([b"k"]), "00 00100001", LIMITS),
        (MISC(b"get", [b"k"], 0), "00 00000001 00000009", Limits(blob=8)),
        (MISC(b"get", [b"k"], 0), "00 FFFFFFFF", LIMITS),
        (FWMKEYS(b"f", 1), "00 00000002  00000001 66  00000001 66", LIMITS),
    ],
)
def test_a_reply_that_cannot_be_right_breaks_the_connection(request_: Request, text: str, limits: Limits) -> None:
    decoder = ReplyDecoder(limits)
    decoder.expect(request_)
    decoder.feed(bytes.fromhex(text))
    with pytest.raises(ProtocolError):
        decoder.next()
    decoder.expect(SYNC())
    decoder.feed(b"\0")
    with pytest.raises(ProtocolError):
        decoder.next()


@pytest.mark.parametrize(
    "text", ["C8 10 00000001 0FFFFFFF 6B", "C8 31 00100000", "C8 90 00000001 00000000 00100000 6B"]
)
def test_what_is_announced_takes_no_room_until_it_comes(text: str) -> None:
    decoder = RequestDecoder()
    tracemalloc.start()
    try:
        decoder.feed(bytes.fromhex(text))
        assert decoder.next() is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000


def test_what_has_been_read_takes_no_room_any_more() -> None:
    decoder = RequestDecoder()
    data = encode_request(PUT(b"k", b"v" * 1000)) * 20 + encode_request(GET(b"k"))[:3]
    rest = encode_request(GET(b"k"))[3:]
    tracemalloc.start()
    try:
        for _ in range(100):
            decoder.feed(data)
            while decoder.next() is not None:
                pass
            decoder.feed(rest)
            assert decoder.next() == GET(b"k")
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 100_000


@pytest.mark.parametrize(
    ("request_", "culprit"),
    [
        (MISC(b"n" * 1024, [], 0), "misc's name of 1024"),
        (MGET([b""] * (2**20 + 1)), "mget's keys of 1048577"),
        (ADDINT(b"k", 2**31), "addint.*2147483648"),
        (RESTORE(b"p", 2**63, 0), "restore"),
    ],
)
def test_what_the_wire_cannot_carry_is_not_sent(request_: Request, culprit: str) -> None:
    with pytest.raises(ProtocolError, match=culprit):
        encode_request(request_)


def test_a_row_knows_how_many_arguments_it_takes() -> None:
    with pytest.raises(TypeError, match="put takes key, value; got 1"):
        PUT(b"key")


# -- replies in order


def test_replies_answer_the_requests_in_order_and_putnr_not_at_all() -> None:
    decoder = ReplyDecoder()
    requests = [GET(b"a"), PUTNR(b"b", b""), VSIZ(b"c"), MISC(b"get", [b"d"], 0)]
    for request in requests:
        decoder.expect(request)
    decoder.feed(b"\x01" + bytes.fromhex("00 00000003") + bytes.fromhex("01 00000000"))
    assert decoder.next() == (requests[0], Reply(FAILURE))
    assert decoder.next() == (requests[2], Reply(SUCCESS, 3))
    assert decoder.next() == (requests[3], Reply(FAILURE, []))
    assert decoder.next() is None
    assert not decoder.midway


def test_waiting_for_a_reply_is_not_being_midway_in_it() -> None:
    decoder = ReplyDecoder()
    decoder.expect(GET(b"a"))
    assert decoder.next() is None
    assert not decoder.midway
    decoder.feed(b"\0")
    assert decoder.next() is None
    assert decoder.midway


def test_bytes_that_nobody_asked_for_break_the_connection() -> None:
    decoder = ReplyDecoder()
    decoder.expect(SYNC())
    decoder.feed(b"\0\0")
    assert decoder.next() == (SYNC(), OK)
    with pytest.raises(ProtocolError, match="nobody asked for"):
        decoder.next()
    decoder.expect(SYNC())
    with pytest.raises(ProtocolError):
        decoder.next()


# -- round trips

blobs = st.binary(max_size=40)
INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(INT64_MIN, INT64_MAX)


@st.composite
def requests(draw: st.DrawFn, having: Callable[[Command], bool] = lambda command: True) -> Request:
    command = draw(st.sampled_from([command for command in COMMANDS.values() if having(command)]))
    arguments: list[Any] = []
    for name in command.parameters:
        field = next(field for field in command.header if field.name == name)
        if field.kind is Kind.LENGTH:
            arguments.append(draw(blobs))
        elif field.kind is Kind.COUNT:
            arguments.append(draw(st.lists(blobs, max_size=4)))
        elif name == "width":
            arguments.append(draw(st.integers(0, 2**31 - 1)))
        else:
            arguments.append(draw(INT64 if field.size == 8 else INT32))
    return Request(command, tuple(arguments))


BODIES: dict[Body, st.SearchStrategy[Any]] = {
    Body.NOTHING: st.none(),
    Body.BLOB: blobs,
    Body.BLOBS: st.lists(blobs, max_size=4),
    Body.PAIRS: st.lists(st.tuples(blobs, blobs), max_size=4),
    Body.INT32: INT32,
    Body.INT64: INT64,
    Body.DECIMAL: st.integers(-(2**52), 2**52).map(lambda number: number / 2**12),
}


@st.composite
def exchanges(draw: st.DrawFn) -> tuple[Request, Reply]:
    request = draw(requests(lambda command: command.body in BODIES))
    command = request.command
    status = draw(st.sampled_from([SUCCESS, FAILURE, STORE_FAILED]))
    if status != SUCCESS:
        return request, Reply(status, [] if command.body_on_failure else None)
    value = draw(BODIES[command.body])
    if command is FWMKEYS and request.arguments[1] >= 0:
        value = value[: request.arguments[1]]
    return request, Reply(status, value)


def in_pieces(draw: Callable[[st.SearchStrategy[Any]], Any], data: bytes) -> Iterator[bytes]:
    while data:
        length = draw(st.integers(1, len(data)))
        yield data[:length]
        data = data[length:]


@given(st.lists(requests(), max_size=5), st.data())
def test_any_requests_arrive_as_they_were_however_they_are_cut(sent: list[Request], data: st.DataObject) -> None:
    decoder = RequestDecoder()
    arrived = []
    for piece in in_pieces(data.draw, b"".join(map(encode_request, sent))):
        decoder.feed(piece)
        while (request := decoder.next()) is not None:
            arrived.append(request)
    assert arrived == sent
    assert not decoder.midway


@given(st.lists(exchanges(), max_size=5), st.data())
def test_any_replies_arrive_as_they_were_however_they_are_cut(
    sent: list[tuple[Request, Reply]], data: st.DataObject
) -> None:
    decoder = ReplyDecoder()
    for request, _ in sent:
        decoder.expect(request)
    arrived = []
    encoded = b"".join(encode_reply(request.command, reply) for request, reply in sent)
    for piece in in_pieces(data.draw, encoded):
        decoder.feed(piece)
        while (message := decoder.next()) is not None:
            arrived.append(message)
    assert arrived == sent
    assert not decoder.midway


@given(st.binary(max_size=200))
def test_no_bytes_do_more_than_break_a_decoder(data: bytes) -> None:
    decoder = RequestDecoder()
    decoder.feed(b"\xc8" + data)
    try:
        while decoder.next() is not None:
            pass
    except ProtocolError:
        assert decoder.buffered == 0


# -- adddouble's numbers


@given(st.floats(-(2.0**52), 2.0**52))
def test_a_number_is_packed_to_within_a_billionth_of_a_thousandth(number: float) -> None:
    assert decimal_to_float(*float_to_decimal(number)) == pytest.approx(number, rel=1e-15, abs=1e-12)


@pytest.mark.parametrize("number", [math.inf, -math.inf, 0.0, 1.5, -0.25, 2.0**62, -(2.0**62)])
def test_these_numbers_are_packed_exactly(number: float) -> None:
    assert decimal_to_float(*float_to_decimal(number)) == number


@pytest.mark.parametrize("number", [2.0**63, 1e300])
def test_numbers_beyond_the_wire_become_the_infinity_of_their_sign(number: float) -> None:
    assert decimal_to_float(*float_to_decimal(number)) == math.inf
    assert decimal_to_float(*float_to_decimal(-number)) == -math.inf


# -- compare and swap


@pytest.mark.parametrize(
    ("expected", "new", "packed"),
    [
        (None, None, "00 00000000"),
        (b"", None, "01 00000000"),
        (None, b"", "02 00000000"),
        (b"", b"", "03 00000000"),
        (b"old", b"new", "03 00000003 6F6C64 6E6577"),
        (b"old", None, "01 00000003 6F6C64"),
        (None, b"new", "02 00000000 6E6577"),
    ],
)
def test_a_swap_is_packed(expected: bytes | None, new: bytes | None, packed: str) -> None:
    assert swap.pack(expected, new) == bytes.fromhex(packed)
    assert swap.unpack(bytes.fromhex(packed)) == (expected, new)


@given(st.none() | blobs, st.none() | blobs)
def test_any_swap_arrives_as_it_was(expected: bytes | None, new: bytes | None) -> None:
    assert swap.unpack(swap.pack(expected, new)) == (expected, new)


@pytest.mark.parametrize(
    "packed",
    ["", "00 000000", "04 00000000", "03 00000004 6F6C64", "00 00000001 6F", "02 00000001 6F 6E", "01 00000001 6F 6E"],
)
def test_what_is_no_swap_is_refused(packed: str) -> None:
    with pytest.raises(ProtocolError, match="cas"):
        swap.unpack(bytes.fromhex(packed))


# -- what may be sent again


def test_only_what_changes_nothing_may_be_sent_again() -> None:
    repeatable = {command for command in COMMANDS.values() if command.repeatable}
    assert repeatable == {GET, MGET, VSIZ, FWMKEYS, SYNC, RNUM, SIZE, STAT}
    assert is_repeatable(GET(b"k"))
    assert not is_repeatable(PUT(b"k", b"v"))
    assert is_repeatable(MISC(b"getlist", [], 0))
    assert not is_repeatable(MISC(b"putlist", [], 0))
    assert is_repeatable(EXT(PROBE, b"", b"", 0))
    assert not is_repeatable(EXT(CAS, b"", b"", 0))
