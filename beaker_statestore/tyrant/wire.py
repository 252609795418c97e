"""Bytes <-> commands and replies, both ways, driven by the table in `commands`. No sockets, clocks or threads.

A `ReplyDecoder` is the client's ear; the server's is in `protocols`, since it understands more. Each is fed whatever
bytes have arrived and gives what is complete. A peer that breaks the protocol makes it raise `ProtocolError`, and from
then on it answers nothing more: there is no way to tell where the next message would begin, and guessing would execute
an attacker's data (ttserver does guess: bytes behind a rejected frame are run as commands).

A reply does not say which command it answers, so the client's side keeps the requests that wait, first in, first out.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Final, Generic, NamedTuple, TypeVar

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant.commands import (
    COMMANDS,
    FWMKEYS,
    MAGIC,
    MAX_BLOB,
    MAX_COUNT,
    MAX_LINE,
    MAX_NAME,
    PUTSHL,
    SUCCESS,
    Body,
    Command,
    Field,
    Kind,
    Reply,
    Request,
)

__all__ = [
    "LIMITS",
    "Decoder",
    "Encoded",
    "Limits",
    "Line",
    "Reading",
    "ReplyDecoder",
    "RequestDecoder",
    "decimal_to_float",
    "encode_reply",
    "encode_reply_in_parts",
    "encode_request",
    "encoded_length",
    "float_to_decimal",
    "in_parts",
    "read_request",
]

T = TypeVar("T")

_U32: Final = struct.Struct(">I")
_I32: Final = struct.Struct(">i")
_I64: Final = struct.Struct(">q")
_TWO_I64: Final = struct.Struct(">qq")
_TWO_U32: Final = struct.Struct(">II")
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1
#: adddouble's fractional part counts 10**-12.
_FRACTION: Final = 1_000_000_000_000


class Line(NamedTuple):
    """Asks for the bytes up to and including the next line feed, of which there may be so many."""

    limit: int


#: From this length on, in bytes, strings are not joined to be sent, and are received in pieces of about this length.
LONG: Final = 256 * 1024
#: What a string takes of Python's memory besides its bytes, with its place in a list: 48, but of every two strings of
#: a list one is a length, and not kept.
OBJECT: Final = 24
#: What is to be sent. In parts if it is long: a copy, and room for it, would cost more than all the rest.
Encoded = bytes | tuple[bytes, ...]

#: A generator that asks for so many bytes or a line at each yield, is sent them, and returns what it has read.
Reading = Generator[int | Line, bytes, T]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may announce before it is cut off, in bytes and elements. Defaults are the original's."""

    blob: int = MAX_BLOB
    count: int = MAX_COUNT
    name: int = MAX_NAME
    #: All bytes of one message together; in the original, key and value may both be as long as they may.
    message: int = 2 * MAX_BLOB + 1024
    #: One line of a text protocol.
    line: int = MAX_LINE

    def check(self, length: int, limit: int, what: str) -> None:
        """Raise `ProtocolError` if ``length`` is above ``limit``, which is one of these."""
        if length > limit:
            raise ProtocolError(f"{what} of {length} is above the limit of {limit}")


LIMITS: Final = Limits()


# -- adddouble's numbers


def float_to_decimal(number: float) -> tuple[int, int]:
    """``number`` as integral part and 10**-12ths, both with its sign, as ttserver packs it (ttpackdouble).

    Numbers of 2**63 and more cannot be told from infinity on this wire. They go out as the infinity of their own
    sign; the original makes negative infinity of the positive ones too.
    """
    if math.isnan(number):
        return _INT64_MIN, _INT64_MIN
    if number >= 2.0**63:
        return _INT64_MAX, 0
    if number <= -(2.0**63):
        return _INT64_MIN, 0
    fraction, integral = math.modf(number)
    return int(integral), int(fraction * _FRACTION)


def decimal_to_float(integral: int, fractional: int) -> float:
    """The opposite of `float_to_decimal`, in ttserver's order of checks (ttunpackdouble)."""
    if integral == _INT64_MIN:
        return math.nan if fractional == _INT64_MIN else -math.inf
    if integral == _INT64_MAX:
        return math.inf
    return integral + fractional / _FRACTION


# -- the table, compiled


class _Layout:
    """One command's header as a struct, and what each of its integers stands for."""

    def __init__(self, command: Command) -> None:
        self.header: Final = struct.Struct(">" + "".join(map(_struct_code, command.header)))
        #: For each integer: the place of its argument in a `Request`; if it is only the length of that, which of the
        #: `Limits` holds for it; what to call it.
        self.integers: Final = [
            (command.parameters.index(field.name), _limit_name(field), f"{command.name}'s {field.name}")
            for field in command.header
        ]
        kinds = [field.kind for field in command.header]
        #: So many strings of bytes come first among the arguments, then a list of such if there is one.
        self.blobs: Final = kinds.count(Kind.LENGTH)
        self.has_list: Final = Kind.COUNT in kinds


def _struct_code(field: Field) -> str:
    if field.kind is not Kind.NUMBER:
        return "I"
    return "q" if field.size == 8 else "i"


def _limit_name(field: Field) -> str | None:
    if field.kind is Kind.NUMBER:
        return None
    if field.kind is Kind.COUNT:
        return "count"
    return "name" if field.name == "name" else "blob"


_LAYOUTS: Final = {command: _Layout(command) for command in COMMANDS.values()}


# -- encoding


def encode_request(request: Request) -> bytes:
    """The bytes of ``request``.

    :raises ProtocolError: an argument is too long or too large for the wire.
    """
    command, arguments = request
    layout = _LAYOUTS[command]
    integers = []
    for place, limit, what in layout.integers:
        integer = arguments[place]
        if limit is not None:
            integer = len(integer)
            LIMITS.check(integer, getattr(LIMITS, limit), what)
        integers.append(integer)
    try:
        header = layout.header.pack(*integers)
    except struct.error as error:
        raise ProtocolError(f"{command.name}'s header cannot hold {integers}: {error}") from error
    parts = [bytes((MAGIC, command.id)), header, *arguments[: layout.blobs]]
    if layout.has_list:
        for item in arguments[layout.blobs]:
            LIMITS.check(len(item), LIMITS.blob, f"an element of {command.name}")
            parts += (_U32.pack(len(item)), item)
    return b"".join(parts)


def encode_reply(command: Command, reply: Reply) -> bytes:
    """The bytes of the answer ``reply`` to ``command``; empty for a command that is never answered."""
    encoded = encode_reply_in_parts(command, reply)
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)


def encode_reply_in_parts(command: Command, reply: Reply) -> Encoded:
    """`encode_reply`, not joined if it is long."""
    status, value = reply
    if command.body is Body.NO_REPLY:
        return b""
    if status == SUCCESS:
        return in_parts((b"\0", *_WRITERS[command](value)))
    return bytes((status,)) + (_U32.pack(0) if command.body_on_failure else b"")


def in_parts(parts: Iterable[bytes]) -> Encoded:
    """``parts``, those that are long as they are and the others joined.

    Never one by one: uvloop's transports lose what has more than 2**20 parts.
    """
    joined: list[bytes] = []
    for is_long, some in groupby(parts, lambda part: len(part) > LONG):
        joined += list(some) if is_long else [b"".join(some)]  # noqa: B031 - only one of them uses it
    return joined[0] if len(joined) == 1 else tuple(joined)


def encoded_length(encoded: Encoded) -> int:
    """How many bytes ``encoded`` has."""
    return len(encoded) if isinstance(encoded, bytes) else sum(map(len, encoded))


def _write_nothing(_value: None) -> Sequence[bytes]:
    return ()


def _write_blob(blob: bytes) -> Sequence[bytes]:
    return _U32.pack(len(blob)), blob


def _write_blobs(blobs: Sequence[bytes]) -> Sequence[bytes]:
    parts = [_U32.pack(len(blobs))]
    for blob in blobs:
        parts += (_U32.pack(len(blob)), blob)
    return parts


def _write_pairs(pairs: Sequence[tuple[bytes, bytes]]) -> Sequence[bytes]:
    parts = [_U32.pack(len(pairs))]
    for key, value in pairs:
        parts += (_TWO_U32.pack(len(key), len(value)), key, value)
    return parts


def _write_int32(number: int) -> Sequence[bytes]:
    return (_I32.pack(number),)


def _write_int64(number: int) -> Sequence[bytes]:
    return (_I64.pack(number),)


def _write_decimal(number: float) -> Sequence[bytes]:
    return (_TWO_I64.pack(*float_to_decimal(number)),)


# -- decoding


class Decoder(Generic[T]):
    """Bytes in, messages out. Subclasses say how one message is read."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._position = 0
        #: What follows the buffer while a long string is awaited, and how much that is.
        self._pieces: list[bytearray] = []
        self._in_pieces = 0
        self._reading: Reading[T] | None = None
        self._wanted: int | Line = 0
        self._read_so_far = 0
        #: Of how many strings that is.
        self._strings = 0
        #: In so many bytes of what is unread there is no line feed.
        self._searched = 0
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> None:
        """Take in bytes that have arrived. Costs no more room than they do, whatever they announce."""
        if self._broken is not None:
            return
        if not isinstance(self._wanted, int) or self._wanted < LONG:
            self._buffer += data
            return
        # One buffer would be moved each time that it outgrows its place. Not a piece for each call, as a peer that
        # sends single bytes would make us keep much more than those.
        if self._pieces and len(self._pieces[-1]) < LONG:
            self._pieces[-1] += data
        else:
            self._pieces.append(bytearray(data))
        self._in_pieces += len(data)

    def clear(self) -> None:
        """Forget what has been fed, and give its room back now.

        Half a message and this object refer to each other: left alone, both would stay until Python looks for garbage,
        which a server that makes little of it does seldom.
        """
        self._reading = None
        self._wanted = 0
        self._buffer = bytearray()
        self._position = 0
        self._pieces = []
        self._in_pieces = 0

    @property
    def buffered(self) -> int:
        """How many bytes are held here: those of the message that `midway` tells of and those behind it."""
        return self._unread + (self._read_so_far if self._reading is not None else 0)

    @property
    def held(self) -> int:
        """How much memory they take up, at most: a list of short strings takes many times what it has bytes."""
        return self.buffered + (OBJECT * self._strings if self._reading is not None else 0)

    @property
    def _unread(self) -> int:
        return len(self._buffer) - self._position + self._in_pieces

    @property
    def midway(self) -> bool:
        """Whether, once `next` has answered ``None``, part of a message is here and its rest is not."""
        return self.buffered > 0

    def next(self) -> T | None:
        """The next complete message, or ``None`` until more bytes have been fed.

        :raises ProtocolError: the peer broke the protocol, now or before.
        """
        if self._broken is not None:
            raise self._broken
        try:
            return self._advance()
        except ProtocolError as error:
            self._broken = error
            self.clear()
            raise

    def _advance(self) -> T | None:
        if self._reading is None:
            if self._position == len(self._buffer):
                return None
            self._reading = self._read()
            self._wanted = next(self._reading)
            self._read_so_far = self._strings = 0
        message: T | None = None
        while True:
            wanted = self._wanted
            length = wanted if isinstance(wanted, int) else self._line_length(wanted)
            if length is None or self._unread < length:
                break
            piece = self._take(length)
            self._read_so_far += length
            self._strings += 1
            try:
                self._wanted = wanted = self._reading.send(piece)
            except StopIteration as stop:
                self._reading = None
                self._wanted = 0
                message = stop.value
                break
            more = wanted if isinstance(wanted, int) else 0
            self._limits.check(self._read_so_far + more, self._limits.message, "a message")
        # Moving the rest down costs its length, so it waits until at least as much has been read.
        if self._position * 2 >= len(self._buffer):
            del self._buffer[: self._position]
            self._position = 0
        return message

    def _take(self, length: int) -> bytes:
        """The next ``length`` bytes, which are here."""
        end = self._position + length
        if end <= len(self._buffer):
            piece = memoryview(self._buffer)[self._position : end].tobytes()
            self._position = end
            return piece
        # What is beyond them may be in several pieces, if those have come since the last time that somebody asked.
        beyond = self._unread - length
        rest = bytearray()
        while len(rest) + len(self._pieces[-1]) <= beyond:
            rest = self._pieces.pop() + rest
        last = self._pieces.pop()
        cut = len(last) + len(rest) - beyond
        rest = last[cut:] + rest
        del last[cut:]
        piece = b"".join((memoryview(self._buffer)[self._position :], *self._pieces, last))
        self._buffer, self._position, self._pieces, self._in_pieces = rest, 0, [], 0
        return piece

    def _line_length(self, wanted: Line) -> int | None:
        """How long the next line is, or ``None`` if its end has not come."""
        end = self._buffer.find(b"\n", self._position + self._searched)
        length = (len(self._buffer) if end < 0 else end + 1) - self._position
        self._limits.check(length, wanted.limit, "a line")
        self._searched = length if end < 0 else 0
        return None if end < 0 else length

    def _read(self) -> Reading[T]:
        """Ask for the bytes of one message piece by piece, and return it."""
        raise NotImplementedError


def read_request(limits: Limits) -> Reading[Request]:
    """One binary request."""
    magic, command_id = yield 2
    if magic != MAGIC:
        raise ProtocolError(f"a request begins with {MAGIC:02X}, not with {magic:02X}")
    command = COMMANDS.get(command_id)
    if command is None:
        raise ProtocolError(f"there is no command {command_id:02X}")
    layout = _LAYOUTS[command]
    arguments: list[Any] = [None] * len(layout.integers)
    integers = layout.header.unpack((yield layout.header.size))
    for integer, (place, limit, what) in zip(integers, layout.integers, strict=True):
        if limit is not None:
            # A negative length reads as one above every limit.
            limits.check(integer, getattr(limits, limit), what)
        arguments[place] = integer
    if command is PUTSHL and arguments[2] < 0:
        raise ProtocolError(f"putshl's width is {arguments[2]}")
    for place in range(layout.blobs):
        arguments[place] = yield arguments[place]
    if layout.has_list:
        arguments[layout.blobs] = yield from _read_items(arguments[layout.blobs], limits)
    return Request(command, tuple(arguments))


class RequestDecoder(Decoder[Request]):
    """Bytes of a client that speaks the binary protocol only -> `Request`."""

    def _read(self) -> Reading[Request]:
        return read_request(self._limits)


class ReplyDecoder(Decoder[tuple[Request, Reply]]):
    """The client's ear: bytes of a server -> the oldest waiting request and its `Reply`."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        super().__init__(limits)
        self._waiting: deque[Request] = deque()

    def expect(self, request: Request) -> None:
        """``request`` has been sent. Those that are never answered do not wait."""
        if request.command.body is not Body.NO_REPLY:
            self._waiting.append(request)

    def _read(self) -> Reading[tuple[Request, Reply]]:
        if not self._waiting:
            raise ProtocolError("the server sent bytes that nobody asked for")
        request = self._waiting[0]
        command = request.command
        (status,) = yield 1
        value: Any = None
        if status == SUCCESS or command.body_on_failure:
            value = yield from _READERS[command](self._limits)
        if status == SUCCESS and command is FWMKEYS and 0 <= request.arguments[1] < len(value):
            raise ProtocolError(f"{len(value)} keys came where {request.arguments[1]} were asked for")
        self._waiting.popleft()
        return request, Reply(status, value)


def _read_nothing(_limits: Limits) -> Reading[None]:
    return
    yield  # makes it a generator, like the others


def _read_blob(limits: Limits) -> Reading[bytes]:
    (length,) = _U32.unpack((yield 4))
    limits.check(length, limits.blob, "a value")
    return (yield length)


def _read_blobs(limits: Limits) -> Reading[list[bytes]]:
    (count,) = _U32.unpack((yield 4))
    limits.check(count, limits.count, "a list")
    return (yield from _read_items(count, limits))


def _read_items(count: int, limits: Limits) -> Reading[list[bytes]]:
    items = []
    for _ in range(count):
        (length,) = _U32.unpack((yield 4))
        limits.check(length, limits.blob, "an element")
        items.append((yield length))
    return items


def _read_pairs(limits: Limits) -> Reading[list[tuple[bytes, bytes]]]:
    (count,) = _U32.unpack((yield 4))
    limits.check(count, limits.count, "a list")
    pairs = []
    for _ in range(count):
        key_length, value_length = _TWO_U32.unpack((yield 8))
        limits.check(key_length, limits.blob, "a key")
        limits.check(value_length, limits.blob, "a value")
        key = yield key_length
        pairs.append((key, (yield value_length)))
    return pairs


def _read_int32(_limits: Limits) -> Reading[int]:
    return int(_I32.unpack((yield 4))[0])


def _read_int64(_limits: Limits) -> Reading[int]:
    return int(_I64.unpack((yield 8))[0])


def _read_decimal(_limits: Limits) -> Reading[float]:
    return decimal_to_float(*_TWO_I64.unpack((yield 16)))


def _unspoken(*_: Any) -> Any:
    raise ProtocolError("replication streams are not spoken here")


#: How each body is written and read.
_BODIES: Final[dict[Body, tuple[Callable[[Any], Sequence[bytes]], Callable[[Limits], Reading[Any]]]]] = {
    Body.NO_REPLY: (_write_nothing, _read_nothing),
    Body.NOTHING: (_write_nothing, _read_nothing),
    Body.BLOB: (_write_blob, _read_blob),
    Body.BLOBS: (_write_blobs, _read_blobs),
    Body.PAIRS: (_write_pairs, _read_pairs),
    Body.INT32: (_write_int32, _read_int32),
    Body.INT64: (_write_int64, _read_int64),
    Body.DECIMAL: (_write_decimal, _read_decimal),
    Body.STREAM: (_unspoken, _unspoken),
}
# By command, because rows hash faster than members of an enumeration do.
_WRITERS: Final = {command: _BODIES[command.body][0] for command in COMMANDS.values()}
_READERS: Final = {command: _BODIES[command.body][1] for command in COMMANDS.values()}
