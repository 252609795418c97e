"""Bytes <-> commands and replies, both ways, driven by the table in `commands`. No sockets, clocks or threads.

A `RequestDecoder` is the server's ear and a `ReplyDecoder` the client's. Each is fed whatever bytes have arrived and
gives what is complete. A peer that breaks the protocol makes it raise `ProtocolError`, and from then on it answers
nothing more: there is no way to tell where the next message would begin, and guessing would execute an attacker's
data (ttserver does guess: bytes behind a rejected frame are run as commands).

A reply does not say which command it answers, so the client's side keeps the requests that wait, first in, first out.
"""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, Generic, TypeVar

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant.commands import (
    COMMANDS,
    FWMKEYS,
    MAGIC,
    MAX_BLOB,
    MAX_COUNT,
    MAX_NAME,
    PUTSHL,
    SUCCESS,
    Body,
    Command,
    Kind,
    Reply,
    Request,
)

__all__ = [
    "LIMITS",
    "Limits",
    "ReplyDecoder",
    "RequestDecoder",
    "decimal_to_float",
    "encode_reply",
    "encode_request",
    "float_to_decimal",
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

#: A generator that asks for so many bytes at each yield, is sent them, and returns what it has read.
Reading = Generator[int, bytes, T]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may announce before it is cut off, in bytes and elements. Defaults are the original's."""

    blob: int = MAX_BLOB
    count: int = MAX_COUNT
    name: int = MAX_NAME
    #: All bytes of one message together.
    message: int = 2 * MAX_BLOB

    def check(self, length: int, limit: int, what: str) -> None:
        """Raise `ProtocolError` if ``length`` is above ``limit``."""
        if length > limit:
            raise ProtocolError(f"{what} of {length} is above the limit of {limit}")


LIMITS: Final = Limits()


# -- adddouble's numbers


def float_to_decimal(number: float) -> tuple[int, int]:
    """``number`` as integral part and 10**-12ths, both with its sign, as ttserver packs it (ttpackdouble).

    Anything from 2**63 up cannot be told from infinity on this wire; that is the original's defect, not ours to mend.
    """
    if math.isnan(number):
        return _INT64_MIN, _INT64_MIN
    if number >= 2.0**63:
        return _INT64_MAX, 0
    if number < -(2.0**63) or number == -(2.0**63):
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


# -- encoding


def encode_request(request: Request) -> bytes:
    """The bytes of ``request``.

    :raises ProtocolError: an argument is too long or too large for the wire.
    """
    command, arguments = request
    named = dict(zip(command.parameters, arguments, strict=True))
    head = bytearray((MAGIC, command.id))
    tail: list[bytes] = []
    items: list[bytes] = []
    for name, kind, size in command.header:
        argument = named[name]
        if kind is Kind.LENGTH:
            LIMITS.check(len(argument), LIMITS.name if name == "name" else LIMITS.blob, f"{command.name}'s {name}")
            head += _U32.pack(len(argument))
            tail.append(argument)
        elif kind is Kind.COUNT:
            LIMITS.check(len(argument), LIMITS.count, f"{command.name}'s number of {name}")
            head += _U32.pack(len(argument))
            for item in argument:
                LIMITS.check(len(item), LIMITS.blob, f"an element of {command.name}'s {name}")
                items += (_U32.pack(len(item)), item)
        else:
            try:
                head += (_I64 if size == 8 else _I32).pack(argument)
            except struct.error as error:
                raise ProtocolError(f"{command.name}'s {name} is {argument!r}: {error}") from error
    return b"".join((head, *tail, *items))


def encode_reply(command: Command, reply: Reply) -> bytes:
    """The bytes of the answer ``reply`` to ``command``; empty for a command that is never answered."""
    status, value = reply
    body = command.body
    if body is Body.NO_REPLY:
        return b""
    code = bytes((status,))
    if status != SUCCESS:
        return code + _U32.pack(0) if command.body_on_failure else code
    return code + _BODIES[body][0](value)


def _encode_blobs(blobs: list[bytes]) -> bytes:
    parts = [_U32.pack(len(blobs))]
    for blob in blobs:
        parts += (_U32.pack(len(blob)), blob)
    return b"".join(parts)


def _encode_pairs(pairs: list[tuple[bytes, bytes]]) -> bytes:
    parts = [_U32.pack(len(pairs))]
    for key, value in pairs:
        parts += (_TWO_U32.pack(len(key), len(value)), key, value)
    return b"".join(parts)


# -- decoding


class Decoder(Generic[T]):
    """Bytes in, messages out. Subclasses say how one message is read."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        self._limits = limits
        self._buffer = bytearray()
        self._position = 0
        self._read_so_far = 0
        self._wanted = 0
        self._reading: Reading[T] | None = None
        self._broken: ProtocolError | None = None

    def feed(self, data: bytes) -> None:
        """Take in bytes that have arrived. Costs no more room than they do, whatever they announce."""
        if self._broken is None:
            self._buffer += data

    @property
    def midway(self) -> bool:
        """Whether part of a message has arrived and its rest has not."""
        return self._broken is None and (self._reading is not None or self._position < len(self._buffer))

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
            self._buffer.clear()
            raise

    def _advance(self) -> T | None:
        if self._reading is None:
            if not self._ready():
                return None
            self._reading = self._read()
            self._read_so_far = 0
            self._wanted = next(self._reading)
        while len(self._buffer) - self._position >= self._wanted:
            end = self._position + self._wanted
            piece = bytes(self._buffer[self._position : end])
            self._position = end
            self._read_so_far += len(piece)
            try:
                self._wanted = self._reading.send(piece)
            except StopIteration as stop:
                self._reading = None
                message: T = stop.value
                self._discard_read()
                return message
            self._limits.check(self._read_so_far + self._wanted, self._limits.message, "a message")
        self._discard_read()
        return None

    def _discard_read(self) -> None:
        # Moving the rest down costs its length, so it waits until at least as much has been read.
        if self._position * 2 >= len(self._buffer):
            del self._buffer[: self._position]
            self._position = 0

    def _ready(self) -> bool:
        return self._position < len(self._buffer)

    def _read(self) -> Reading[T]:
        raise NotImplementedError


def _read_blobs(count: int, limits: Limits) -> Reading[list[bytes]]:
    limits.check(count, limits.count, "a list")
    blobs = []
    for _ in range(count):
        (length,) = _U32.unpack((yield 4))
        limits.check(length, limits.blob, "an element")
        blobs.append((yield length))
    return blobs


class RequestDecoder(Decoder[Request]):
    """The server's ear: bytes of a client -> `Request`."""

    def _read(self) -> Reading[Request]:
        magic, command_id = yield 2
        if magic != MAGIC:
            raise ProtocolError(f"a request begins with {MAGIC:02X}, not with {magic:02X}")
        command = COMMANDS.get(command_id)
        if command is None:
            raise ProtocolError(f"there is no command {command_id:02X}")
        limits = self._limits
        lengths: list[int] = []
        count: int | None = None
        numbers: list[int] = []
        for name, kind, size in command.header:
            if kind is Kind.LENGTH:
                (length,) = _U32.unpack((yield 4))
                limits.check(length, limits.name if name == "name" else limits.blob, f"{command.name}'s {name}")
                lengths.append(length)
            elif kind is Kind.COUNT:
                (count,) = _U32.unpack((yield 4))
                limits.check(count, limits.count, f"{command.name}'s number of {name}")
            else:
                (number,) = (_I64 if size == 8 else _I32).unpack((yield size))
                numbers.append(number)
        if command is PUTSHL and numbers[0] < 0:
            raise ProtocolError(f"putshl's width is {numbers[0]}")
        arguments: list[Any] = []
        for length in lengths:
            arguments.append((yield length))
        if count is not None:
            arguments.append((yield from _read_blobs(count, limits)))
        return Request(command, (*arguments, *numbers))


class ReplyDecoder(Decoder[tuple[Request, Reply]]):
    """The client's ear: bytes of a server -> the oldest waiting request and its `Reply`."""

    def __init__(self, limits: Limits = LIMITS) -> None:
        super().__init__(limits)
        self._waiting: deque[Request] = deque()

    def expect(self, request: Request) -> None:
        """``request`` has been sent. Those that are never answered do not wait."""
        if request.command.body is not Body.NO_REPLY:
            self._waiting.append(request)

    def _ready(self) -> bool:
        if super()._ready() and not self._waiting:
            raise ProtocolError("the server sent bytes that nobody asked for")
        return bool(self._waiting)

    def _read(self) -> Reading[tuple[Request, Reply]]:
        request = self._waiting[0]
        command = request.command
        (status,) = yield 1
        if status == SUCCESS or command.body_on_failure:
            value = yield from _BODIES[command.body][1](self._limits)
        else:
            value = None
        if status == SUCCESS and command is FWMKEYS and 0 <= request.arguments[1] < len(value):
            raise ProtocolError(f"{len(value)} keys came where {request.arguments[1]} were asked for")
        self._waiting.popleft()
        return request, Reply(status, value)


def _read_nothing(_limits: Limits) -> Reading[None]:
    yield from ()


def _read_blob(limits: Limits) -> Reading[bytes]:
    (length,) = _U32.unpack((yield 4))
    limits.check(length, limits.blob, "a value")
    return (yield length)


def _read_counted_blobs(limits: Limits) -> Reading[list[bytes]]:
    (count,) = _U32.unpack((yield 4))
    return (yield from _read_blobs(count, limits))


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


def _unsupported(*_: Any) -> Any:
    raise ProtocolError("replication streams are not spoken here")


#: How each body is written and read.
_BODIES: Final[dict[Body, tuple[Callable[[Any], bytes], Callable[[Limits], Reading[Any]]]]] = {
    Body.NOTHING: (lambda _value: b"", _read_nothing),
    Body.BLOB: (lambda blob: _U32.pack(len(blob)) + blob, _read_blob),
    Body.BLOBS: (_encode_blobs, _read_counted_blobs),
    Body.PAIRS: (_encode_pairs, _read_pairs),
    Body.INT32: (_I32.pack, _read_int32),
    Body.INT64: (_I64.pack, _read_int64),
    Body.DECIMAL: (lambda number: _TWO_I64.pack(*float_to_decimal(number)), _read_decimal),
    Body.STREAM: (_unsupported, _unsupported),
}
