"""Tokyo Tyrant's binary commands, each described once, as data.

The encoder, the decoder, the client's retries and the server's dispatch all read these rows; nothing else in the
package spells out a command's layout. The facts are those of Tokyo Tyrant 1.1.41 (protocol version 0.91), whose own
description is the chapter "Protocol" of its specification (doc/spex.html). This module knows no sockets, clocks or
threads.

On the wire a request is the byte C8, the command's id, its header of big-endian integers, then the bytes that the
header's lengths announce. A reply is one byte of status and, mostly only if that is 0, a body.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, NamedTuple

MAGIC: Final = 0xC8

#: ttserver's own limits (TTMAXARGSIZ, TTMAXARGNUM, TTMAXNAMESIZ less its terminating zero, and that of a line).
MAX_BLOB: Final = 256 * 1024 * 1024
MAX_COUNT: Final = 1024 * 1024
MAX_NAME: Final = 1023
#: A line of the text protocols, its end included.
MAX_LINE: Final = 16 * 1024 * 1024

#: Reply status of success and, of the original, of every failure.
SUCCESS: Final = 0
FAILURE: Final = 1
#: Our server's answer when its store failed and did nothing, where `FAILURE` would read as "no record". Any client that
#: knows only the original takes every status but 0 for failure, as it should.
STORE_FAILED: Final = 2
#: Our server's answer to a command that it is configured not to carry out, where the original's looks like absence.
FORBIDDEN: Final = 3
#: Our server's answer when what was asked for is more than it lets a reply hold, or a request find.
TOO_MUCH: Final = 4


class Kind(Enum):
    """What an integer in a request's header stands for."""

    LENGTH = "the length of one string of bytes that follows the header"
    COUNT = "how many strings of bytes, each with its own length before it, end the request"
    NUMBER = "a number in its own right"


class Failure(Enum):
    """What a status other than 0 says about a command that got as far as the store."""

    ABSENT = "there is no such record"
    EXISTS = "there is such a record already, or one of a form that the command cannot work on"
    FAILED = "the command was not carried out"
    NEVER = "such a reply is not sent"


class Body(Enum):
    """What follows the status byte of a reply."""

    NO_REPLY = "not even the status is sent"
    NOTHING = "nothing"
    BLOB = "length (4 bytes), bytes"
    BLOBS = "count (4 bytes), then for each: length, bytes"
    PAIRS = "count (4 bytes), then for each: length of key, length of value, key, value"
    INT32 = "a signed number of 4 bytes"
    INT64 = "a signed number of 8 bytes"
    DECIMAL = "an adddouble number: integral part (8 bytes), fractional part in 10**-12 (8 bytes)"
    STREAM = "the server's id, then messages without end"


class Field(NamedTuple):
    """One integer of a request's header."""

    name: str
    kind: Kind
    size: int = 4


class Request(NamedTuple):
    """A command with its arguments, in the order of `Command.parameters`."""

    command: Command
    arguments: tuple[Any, ...]


class Reply(NamedTuple):
    """A status, and what came with it: ``None``, bytes, an int, a float, a list of bytes or of pairs of bytes."""

    status: int
    value: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """One row of the table, equal only to itself.

    Calling a row makes a `Request`: ``PUT(b"key", b"value")``.
    """

    id: int
    name: str
    #: The header's integers in the order of the wire. Bytes follow in the same order, a list last.
    header: tuple[Field, ...]
    body: Body
    failure: Failure
    #: Sending it again when the answer did not come changes neither the store nor the answer. ``put`` is not among
    #: these: between the two, somebody else may have written.
    repeatable: bool = False
    #: Its body is sent whatever the status (only ``misc``, with a count of 0).
    body_on_failure: bool = False
    #: Names of the arguments: strings of bytes and lists as on the wire, numbers last.
    parameters: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        numbers = tuple(f.name for f in self.header if f.kind is Kind.NUMBER)
        lists = tuple(f.name for f in self.header if f.kind is Kind.COUNT)
        blobs = tuple(f.name for f in self.header if f.kind is Kind.LENGTH)
        object.__setattr__(self, "parameters", blobs + lists + numbers)

    def __call__(self, *arguments: Any) -> Request:
        if len(arguments) != len(self.parameters):
            raise TypeError(f"{self.name} takes {', '.join(self.parameters) or 'no arguments'}; got {len(arguments)}")
        return Request(self, arguments)

    def __repr__(self) -> str:
        return f"<command {self.name}>"


_KEY: Final = Field("key", Kind.LENGTH)
_VALUE: Final = Field("value", Kind.LENGTH)
_OPTIONS: Final = Field("options", Kind.NUMBER)

PUT: Final = Command(0x10, "put", (_KEY, _VALUE), Body.NOTHING, Failure.FAILED)
PUTKEEP: Final = Command(0x11, "putkeep", (_KEY, _VALUE), Body.NOTHING, Failure.EXISTS)
PUTCAT: Final = Command(0x12, "putcat", (_KEY, _VALUE), Body.NOTHING, Failure.FAILED)
PUTSHL: Final = Command(0x13, "putshl", (_KEY, _VALUE, Field("width", Kind.NUMBER)), Body.NOTHING, Failure.FAILED)
PUTNR: Final = Command(0x18, "putnr", (_KEY, _VALUE), Body.NO_REPLY, Failure.NEVER)
OUT: Final = Command(0x20, "out", (_KEY,), Body.NOTHING, Failure.ABSENT)
GET: Final = Command(0x30, "get", (_KEY,), Body.BLOB, Failure.ABSENT, repeatable=True)
MGET: Final = Command(0x31, "mget", (Field("keys", Kind.COUNT),), Body.PAIRS, Failure.FAILED, repeatable=True)
VSIZ: Final = Command(0x38, "vsiz", (_KEY,), Body.INT32, Failure.ABSENT, repeatable=True)
ITERINIT: Final = Command(0x50, "iterinit", (), Body.NOTHING, Failure.FAILED)
ITERNEXT: Final = Command(0x51, "iternext", (), Body.BLOB, Failure.ABSENT)
FWMKEYS: Final = Command(
    0x58,
    "fwmkeys",
    (Field("prefix", Kind.LENGTH), Field("maximum", Kind.NUMBER)),
    Body.BLOBS,
    Failure.FAILED,
    repeatable=True,
)
ADDINT: Final = Command(0x60, "addint", (_KEY, Field("number", Kind.NUMBER)), Body.INT32, Failure.EXISTS)
ADDDOUBLE: Final = Command(
    0x61,
    "adddouble",
    (_KEY, Field("integral", Kind.NUMBER, 8), Field("fractional", Kind.NUMBER, 8)),
    Body.DECIMAL,
    Failure.EXISTS,
)
EXT: Final = Command(0x68, "ext", (Field("name", Kind.LENGTH), _OPTIONS, _KEY, _VALUE), Body.BLOB, Failure.FAILED)
SYNC: Final = Command(0x70, "sync", (), Body.NOTHING, Failure.FAILED, repeatable=True)
OPTIMIZE: Final = Command(0x71, "optimize", (Field("parameters", Kind.LENGTH),), Body.NOTHING, Failure.FAILED)
VANISH: Final = Command(0x72, "vanish", (), Body.NOTHING, Failure.FAILED)
COPY: Final = Command(0x73, "copy", (Field("path", Kind.LENGTH),), Body.NOTHING, Failure.FAILED)
RESTORE: Final = Command(
    0x74,
    "restore",
    (Field("path", Kind.LENGTH), Field("timestamp", Kind.NUMBER, 8), _OPTIONS),
    Body.NOTHING,
    Failure.FAILED,
)
SETMST: Final = Command(
    0x78,
    "setmst",
    (
        Field("host", Kind.LENGTH),
        Field("port", Kind.NUMBER),
        Field("timestamp", Kind.NUMBER, 8),
        _OPTIONS,
    ),
    Body.NOTHING,
    Failure.FAILED,
)
RNUM: Final = Command(0x80, "rnum", (), Body.INT64, Failure.FAILED, repeatable=True)
SIZE: Final = Command(0x81, "size", (), Body.INT64, Failure.FAILED, repeatable=True)
STAT: Final = Command(0x88, "stat", (), Body.BLOB, Failure.FAILED, repeatable=True)
MISC: Final = Command(
    0x90,
    "misc",
    (Field("name", Kind.LENGTH), _OPTIONS, Field("arguments", Kind.COUNT)),
    Body.BLOBS,
    Failure.FAILED,
    body_on_failure=True,
)
REPL: Final = Command(
    0xA0, "repl", (Field("timestamp", Kind.NUMBER, 8), Field("server_id", Kind.NUMBER)), Body.STREAM, Failure.NEVER
)

COMMANDS: Final[dict[int, Command]] = {
    command.id: command for command in list(globals().values()) if isinstance(command, Command)
}

#: ``misc`` functions that may be sent again, as `Command.repeatable`; ``search`` may delete, so it is not here.
REPEATABLE_MISC: Final = frozenset({b"get", b"getlist", b"getpart", b"regex", b"range", b"error"})
#: Our own ``ext`` functions. `PROBE` has no effect and answers what the server can do; see `tyrant.swap` for it and
#: `CAS`, `tyrant.paging` for `SCAN`, `tyrant.waiting` for `WAIT`. `STATISTICS` answers the server's own, as JSON.
PROBE: Final = b"statestore"
CAS: Final = b"cas"
SCAN: Final = b"scan"
WAIT: Final = b"wait"
STATISTICS: Final = b"statistics"
#: memcached's commands for which the binary protocol has none, as ``ext`` functions: they change a record only if it is
#: there. The last two take it for a decimal number, which does not get below 0, and answer the new one; the others
#: answer nothing, as who may write need not be one who may read.
REPLACE: Final = b"replace"
APPEND: Final = b"append"
PREPEND: Final = b"prepend"
INCR: Final = b"incr"
DECR: Final = b"decr"
_REPEATABLE_EXT: Final = frozenset({PROBE, SCAN, WAIT, STATISTICS})
#: ``misc`` option: keep the call out of the update log. The original logs every call without it, even reads.
NO_UPDATE_LOG: Final = 1


def is_repeatable(request: Request) -> bool:
    """Whether ``request`` may be sent again although it may already have been carried out."""
    if request.command is MISC:
        return bool(request.arguments[0] in REPEATABLE_MISC)
    if request.command is EXT:
        return bool(request.arguments[0] in _REPEATABLE_EXT)
    return request.command.repeatable
