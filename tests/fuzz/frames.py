"""Frames of random commands in all three protocols, whole and damaged, out of any source of random numbers."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

from beaker_statestore.tyrant import commands, paging, swap
from beaker_statestore.tyrant.commands import COMMANDS, MAGIC, Body, Kind, Reply, Request
from beaker_statestore.tyrant.wire import encode_reply, encode_request

__all__ = ["ANSWERED", "KEYS", "MISC", "damaged", "frame", "reply_to", "request"]

#: Few, so that commands meet each other's records; short, so that lengths and data are easily taken for each other.
KEYS = [b"", b"k", b"n", b"key", b"web key", b"session:a", b"\0", b"\xc8\x10", b"1", b"noreply"]
VALUES = [b"", b"1", b"-7", b'{"a": 1}', b"four", b"eight...", b"\r\n", b"\xc8\x72", b"set k 0 0 1\r\n1\r\n"]
#: The functions of ``misc``, those that ttserver has and ours has not, and one that nobody has.
MISC = (
    b"put putkeep putcat putdup putdupback putlist out outlist get getlist getpart iterinit iternext sync optimize"
    b" vanish regex range error defrag cacheclear setindex search metasearch genuid tranbegin nothing"
).split()
EXT = [b"statestore", b"cas", b"scan", b"replace", b"append", b"prepend", b"incr", b"decr", b"nothing", b""]
NUMBERS = [0, 1, -1, 2, 5, 255, 2**31 - 1, -(2**31), 10**9]
LONG_NUMBERS = [*NUMBERS, 2**63 - 1, -(2**63), 10**12]
LINE_ENDS = [b"\r\n", b"\n", b"\r\r\n", b"\r", b""]
PATTERNS = [b"k", b"*K", b"^s.*a$", b"(k|n)+", b"[[:alpha:]]{1,3}", b"(", b"a{9999}", b""]

#: Commands whose replies our client understands.
ANSWERED = [command for command in COMMANDS.values() if command.body not in (Body.STREAM, Body.NO_REPLY)]


# -- the binary protocol


def request(draw: random.Random) -> Request:
    """A request of the binary protocol."""
    command = draw.choice([*COMMANDS.values()])
    if command is commands.MISC and draw.random() < 0.9:
        name = draw.choice(MISC)
        arguments = [draw.choice(PATTERNS)] if name == b"regex" else []
        arguments += [draw.choice(KEYS + VALUES) for _ in range(draw.randrange(4))]
        return commands.MISC(name, arguments, draw.choice((0, 1)))
    if command is commands.EXT and draw.random() < 0.9:
        name = draw.choice(EXT)
        return commands.EXT(name, draw.choice(KEYS), _extension_value(draw, name), draw.choice((0, 1, 2)))
    return Request(command, tuple(_argument(draw, command, name) for name in command.parameters))


def _extension_value(draw: random.Random, name: bytes) -> bytes:
    if name == commands.CAS:
        return swap.pack(draw.choice([None, *VALUES]), draw.choice([None, *VALUES]))
    if name == commands.SCAN:
        return paging.pack_request(draw.choice([None, *KEYS]), draw.choice((1, 3, 2**32 - 1)))
    return draw.choice(VALUES)


def _argument(draw: random.Random, command: commands.Command, name: str) -> object:
    field = next(field for field in command.header if field.name == name)
    if field.kind is Kind.LENGTH:
        return draw.choice(KEYS if name == "key" else VALUES)
    if field.kind is Kind.COUNT:
        return [draw.choice(KEYS) for _ in range(draw.randrange(5))]
    if name == "width":
        return abs(draw.choice(NUMBERS[:-2]))
    return draw.choice(LONG_NUMBERS if field.size == 8 else NUMBERS)


def reply_to(draw: random.Random, asked: Request) -> bytes:
    """The bytes of a reply that a good server might give."""
    if draw.random() < 0.2:
        return encode_reply(asked.command, Reply(draw.choice((1, 2, 3, 255))))
    items = [draw.choice(KEYS + VALUES) for _ in range(draw.randrange(4))]
    values: dict[Body, object] = {
        Body.BLOB: draw.choice(VALUES),
        Body.BLOBS: items,
        Body.PAIRS: [(key, draw.choice(VALUES)) for key in items],
        Body.INT32: draw.choice(NUMBERS),
        Body.INT64: draw.choice(LONG_NUMBERS),
        Body.DECIMAL: float(draw.choice(NUMBERS)),
    }
    return encode_reply(asked.command, Reply(commands.SUCCESS, values.get(asked.command.body)))


# -- memcached


def _memcached(draw: random.Random) -> bytes:
    verb = draw.choice(
        b"set add replace append prepend get gets delete incr decr flush_all version stats quit cas touch".split()
    )
    words = [verb]
    data = b""
    if verb in (b"set", b"add", b"replace", b"append", b"prepend", b"cas"):
        value = draw.choice(VALUES)
        length = len(value) if draw.random() < 0.9 else draw.choice(NUMBERS)
        words += [_word(draw), b"%d" % draw.choice(NUMBERS), b"%d" % draw.choice(NUMBERS), b"%d" % length]
        data = value + _line_end(draw)
    elif verb in (b"incr", b"decr"):
        words += [_word(draw), b"%d" % draw.choice(LONG_NUMBERS)]
    elif verb in (b"get", b"gets", b"delete"):
        words += [_word(draw) for _ in range(draw.choice((0, 1, 1, 1, 2, 3)))]
    if draw.random() < 0.2:
        words.append(draw.choice((b"noreply", b"0", b"x")))
    return b" ".join(words) + _line_end(draw) + data


def _word(draw: random.Random) -> bytes:
    return draw.choice(KEYS).replace(b" ", b"_") or b"k"


def _line_end(draw: random.Random) -> bytes:
    return b"\r\n" if draw.random() < 0.95 else draw.choice(LINE_ENDS)


# -- HTTP

_HEADERS = [
    b"Host: localhost",
    b"Host: 127.0.0.1:1978",
    b"Host: evil.example",
    b"Origin: http://localhost",
    b"Origin: null",
    b"Sec-Fetch-Site: cross-site",
    b"Sec-Fetch-Site: none",
    b"Connection: close",
    b"Connection: keep-alive, x",
    b"Content-Length: 1",
    b"Content-Length: 4, 4",
    b"Transfer-Encoding: chunked",
    b"Expect: 100-continue",
    b"X-TT-PDMODE: 1",
    b"X-TT-PDMODE: 2",
    b"X-TT-PDMODE: x",
    b"X-TT-XOPTS: 1",
    b"X-TT-MOPTS: 1",
    b"X-Other: \xff",
    b" folded",
]
_TARGETS = [b"/", b"/k", b"/web%20key", b"/n", b"*", b"http://localhost/k", b"/%", b"/a+b?c=%00", b"k", b"//k"]


def _http(draw: random.Random) -> bytes:
    method = draw.choice((b"GET", b"HEAD", b"PUT", b"PUT", b"POST", b"POST", b"DELETE", b"OPTIONS", b"TRACE", b"get"))
    version = b"HTTP/1.1" if draw.random() < 0.85 else draw.choice((b"HTTP/1.0", b"HTTP/2.0", b"HTTP/1", b""))
    lines = [b" ".join((method, draw.choice(_TARGETS), version))]
    lines += [draw.choice(_HEADERS) for _ in range(draw.choice((0, 0, 0, 1, 2)))]
    body = b""
    if method in (b"PUT", b"POST"):
        body = draw.choice(VALUES)
    if method == b"POST":
        if draw.random() < 0.5:
            lines.append(b"X-TT-XNAME: " + draw.choice(EXT))
        else:
            lines.append(b"X-TT-MNAME: " + draw.choice(MISC))
            body = b"&".join(b"a%d=%b" % (n, draw.choice((b"k", b"v", b"%00", b"1+2", b"%"))) for n in range(3))
    if body or method == b"PUT":
        lines.append(b"Content-Length: %d" % (len(body) if draw.random() < 0.9 else draw.choice(NUMBERS)))
    end = _line_end(draw)
    return end.join([*lines, b"", b""]) + body


def frame(draw: random.Random) -> bytes:
    """One request in any of the protocols; a few of the text protocols' are malformed."""
    kind = draw.random()
    if kind < 0.5:
        return encode_request(request(draw))
    return _memcached(draw) if kind < 0.75 else _http(draw)


# -- damage


def _flip(draw: random.Random, data: bytearray) -> None:
    for _ in range(draw.choice((1, 1, 2, 8))):
        if data:
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)


def _overwrite(draw: random.Random, data: bytearray) -> None:
    if data:
        place = draw.randrange(len(data))
        data[place : place + draw.choice((1, 1, 4))] = draw.choice((b"\0", b"\xff", b"\n", b"\xc8", b" ", b"\x7f"))


def _change_length(draw: random.Random, data: bytearray) -> None:
    """Write another number where a frame of the binary protocol has one, or where there are digits."""
    if data[:1] == bytes((MAGIC,)) and len(data) >= 6:
        place = 2 + 4 * draw.randrange(min(3, (len(data) - 2) // 4))
        (known,) = struct.unpack_from(">I", data, place)
        wanted = draw.choice((0, 1, known + 1, known - 1, len(data), 2**31 - 1, 2**31, 2**32 - 1, 65537, 2**26 + 1))
        struct.pack_into(">I", data, place, wanted & (2**32 - 1))
        return
    digits = [place for place, byte in enumerate(data) if 0x30 <= byte <= 0x39]
    if digits:
        place = draw.choice(digits)
        data[place : place + 1] = draw.choice((b"0", b"1", b"9", b"-1", b"00", b"+1", b"99999999999", b"x", b""))


def _cut(draw: random.Random, data: bytearray) -> None:
    if data:
        start = draw.randrange(len(data))
        del data[start : draw.choice((start + 1, start + 4, len(data)))]


def _insert(draw: random.Random, data: bytearray) -> None:
    place = draw.randrange(len(data) + 1)
    data[place:place] = draw.choice((b"\0", b"\r\n", b"\r", b" ", b"\t", b"\xc8", draw.randbytes(4), frame(draw)))


def _repeat(draw: random.Random, data: bytearray) -> None:
    place = draw.randrange(len(data) + 1)
    data[place:place] = data[place : place + draw.choice((1, 4, 16))]


_DAMAGES: Sequence[Callable[[random.Random, bytearray], None]] = (
    _flip,
    _overwrite,
    _change_length,
    _change_length,
    _cut,
    _insert,
    _repeat,
)


def damaged(draw: random.Random, data: bytes) -> bytes:
    """``data`` with a few changes of the kinds that parsers get wrong."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        draw.choice(_DAMAGES)(draw, changed)
    return bytes(changed)
