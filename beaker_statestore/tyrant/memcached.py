"""memcached's text protocol as Tokyo Tyrant speaks it: lines <-> the same commands. No sockets, clocks or threads.

The verbs are ttserver's: ``set add replace append prepend get gets delete incr decr flush_all version stats quit``.
As there, flags come back as 0, nothing expires, ``gets`` tells no number for ``cas``, and every other verb ends the
connection. Where the original guesses, this module refuses and ends it too: at a number that is none (the original
reads 0 and then runs the data as commands), at data that does not end where it should, at a delay of ``flush_all``
(which it ignores, and deletes at once), and at words too many.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Final

from beaker_statestore import __version__
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
    SUCCESS,
    TOO_MUCH,
    VANISH,
    Reply,
    Request,
)
from beaker_statestore.tyrant.wire import Encoded, Limits, Reading, in_parts

__all__ = ["read", "speaks"]

_FIRST_WORD: Final = re.compile(rb"[ \t]*([a-z_]+)[ \t\r\n]")
_LENGTH: Final = re.compile(rb"[0-9]{1,10}")
_NUMBER: Final = re.compile(rb"-?[0-9]{1,20}")
_END: Final = b"\r\n"


class _Refusal(Exception):  # noqa: N818 - it becomes an answer
    """The request is answered with this line, and the connection ends."""


def speaks(line: bytes) -> bool:
    """Whether ``line`` begins a request of this protocol: its first word is one of the verbs, in small letters."""
    match = _FIRST_WORD.match(line)
    return match is not None and (match[1] in _STORING or match[1] in _OTHERS)


def read(line: bytes, limits: Limits) -> Reading[Call]:
    """The request that ``line`` begins, with its data if it has some.

    What is malformed or too large becomes a call that does nothing, answers so, and is the last of its connection.
    """
    try:
        verb, *words = _words(line, limits)
        storing = _STORING.get(verb)
        if storing is None:
            return _OTHERS[verb](words)
        words, silent = _without_noreply(words)
        key, length = _storage(words, min(limits.blob, limits.message - len(line) - len(_END)))
        data = yield length + len(_END)
        if not data.endswith(_END):
            raise _Refusal("CLIENT_ERROR bad data chunk")
        request, write = storing
        return _call(request(key, data[:length]), write, silent)
    except _Refusal as refusal:
        return _told(str(refusal).encode(), last=True)


def _words(line: bytes, limits: Limits) -> list[bytes]:
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if b"\r" in line:
        raise _Refusal("CLIENT_ERROR error")
    line = line.replace(b"\t", b" ")
    # Counted first, since a million words take far more room than their line.
    if line.count(b" ") > limits.count:
        raise _Refusal("CLIENT_ERROR too many words")
    words = [word for word in line.split(b" ") if word]
    if any(len(word) > limits.blob for word in words):
        raise _Refusal("CLIENT_ERROR too long a key")
    return words


def _without_noreply(words: list[bytes]) -> tuple[list[bytes], bool]:
    return (words[:-1], True) if words[-1:] == [b"noreply"] else (words, False)


# -- the words behind the verb -> call


def _storage(words: list[bytes], most: int) -> tuple[bytes, int]:
    """The key, and how many bytes of data follow, which may be ``most``."""
    if len(words) != 4:
        raise _Refusal("CLIENT_ERROR error")
    key, flags, expiry, announced = words
    if not (_NUMBER.fullmatch(flags) and _NUMBER.fullmatch(expiry) and _LENGTH.fullmatch(announced)):
        raise _Refusal("CLIENT_ERROR error")
    length = int(announced)
    if length > most:
        raise _Refusal("SERVER_ERROR object too large for cache")
    return key, length


def _get(keys: list[bytes]) -> Call:
    if not keys:
        raise _Refusal("CLIENT_ERROR error")
    if len(keys) == 1:
        return _call(GET(keys[0]), partial(_write_record, keys[0]))
    return _call(MGET(keys), _write_records)


def _delete(words: list[bytes]) -> Call:
    # The key may be "noreply", too.
    rest, silent = _without_noreply(words[1:])
    if not words or len(rest) > 1 or not all(map(_NUMBER.fullmatch, rest)):
        raise _Refusal("CLIENT_ERROR error")
    return _call(OUT(words[0]), _write_deleted, silent)


def _change(function: bytes, words: list[bytes]) -> Call:
    words, silent = _without_noreply(words)
    if len(words) != 2 or not _NUMBER.fullmatch(words[1]):
        raise _Refusal("CLIENT_ERROR error")
    key, amount = words
    return _call(EXT(function, key, amount, 0), _write_number, silent)


def _flush(words: list[bytes]) -> Call:
    words, silent = _without_noreply(words)
    if words not in ([], [b"0"]):
        raise _Refusal("CLIENT_ERROR error")
    return _call(VANISH(), _write_flushed, silent)


def _version(words: list[bytes]) -> Call:
    if words:
        raise _Refusal("CLIENT_ERROR error")
    return _told(b"VERSION " + __version__.encode())


def _stats(_words: list[bytes]) -> Call:
    return _call(STAT(), _write_statistics)  # of everything, whatever was asked for


def _quit(_words: list[bytes]) -> Call:
    return Call(None, _silence, Door.MEMCACHED, last=True)


# -- reply -> answer. What is said here is said on success and, most often of what is absent, on FAILURE.

Writer = Callable[[Reply], Iterable[bytes]]


def _call(request: Request, write: Writer, silent: bool = False) -> Call:
    return Call(request, _silence if silent else partial(_encode, write), Door.MEMCACHED)


def _told(line: bytes, last: bool = False) -> Call:
    """A call whose answer is known."""
    return Call(None, partial(_encode, lambda _reply: (line, _END)), Door.MEMCACHED, last)


def _silence(_reply: Reply) -> bytes:
    return b""


def _encode(write: Writer, reply: Reply) -> Encoded:
    if reply.status == FORBIDDEN:
        return b"CLIENT_ERROR forbidden\r\n"
    if reply.status == TOO_MUCH:
        return b"SERVER_ERROR the answer would be above the server's limit\r\n"
    if reply.status not in (SUCCESS, FAILURE):
        return b"SERVER_ERROR the store failed\r\n"
    return in_parts(write(reply))


def _says(success: bytes, failure: bytes) -> Writer:
    lines = {SUCCESS: (success, _END), FAILURE: (failure, _END)}
    return lambda reply: lines[reply.status]


_write_stored: Final = _says(b"STORED", b"SERVER_ERROR unexpected")
_write_stored_if: Final = _says(b"STORED", b"NOT_STORED")
_write_deleted: Final = _says(b"DELETED", b"NOT_FOUND")
_write_flushed: Final = _says(b"OK", b"SERVER_ERROR unexpected")


def _write_number(reply: Reply) -> Iterable[bytes]:
    return (reply.value if reply.status == SUCCESS else b"NOT_FOUND", _END)


def _write_record(key: bytes, reply: Reply) -> Iterable[bytes]:
    yield from _record(key, reply.value) if reply.status == SUCCESS else ()
    yield b"END\r\n"


def _write_records(reply: Reply) -> Iterable[bytes]:
    for key, value in reply.value if reply.status == SUCCESS else ():
        yield from _record(key, value)
    yield b"END\r\n"


def _record(key: bytes, value: bytes) -> Iterable[bytes]:
    return (b"VALUE ", key, b" 0 %d\r\n" % len(value), value, _END)


def _write_statistics(reply: Reply) -> Iterable[bytes]:
    figures = dict(line.split(b"\t", 1) for line in (reply.value or b"").splitlines() if b"\t" in line)
    for name, value in _statistics({name.decode(): value.decode() for name, value in figures.items()}):
        yield f"STAT {name} {value}\r\n".encode()
    yield b"END\r\n"


def _statistics(figures: Mapping[str, str]) -> Iterator[tuple[str, object]]:
    """What ``stat`` tells under ttserver's names for ``stats``; without what it does not tell."""

    def count(*names: str) -> int:
        return sum(int(figures.get(f"cnt_{name}", 0)) for name in names)

    for name, source in (("pid", "pid"), ("uptime", "ru_real"), ("time", "time")):
        if source in figures:
            yield name, int(float(figures[source]))
    yield "version", __version__
    yield "pointer_size", struct.calcsize("P") * 8
    for name, source in (("rusage_user", "ru_user"), ("rusage_system", "ru_sys")):
        if source in figures:
            yield name, figures[source]
    for name, calls, misses in (
        ("cmd_set", count("put", "putkeep", "putcat", "putshl", "putnr"), count("put_miss")),
        ("cmd_delete", count("out"), count("out_miss")),
        ("cmd_get", count("get", "mget"), count("get_miss")),
    ):
        yield name, calls
        yield f"{name}_hits", calls - misses
        yield f"{name}_misses", misses
    yield "cmd_flush", count("vanish")
    for name, source in (("curr_items", "rnum"), ("total_items", "rnum"), ("bytes", "size")):
        if source in figures:
            yield name, figures[source]


# -- the verbs


def _calling(function: bytes) -> Callable[[bytes, bytes], Request]:
    return lambda key, value: EXT(function, key, value, 0)


#: Those that bring data: what it is to be stored with, and what is answered.
_STORING: Final[Mapping[bytes, tuple[Callable[[bytes, bytes], Request], Writer]]] = {
    b"set": (PUT, _write_stored),
    b"add": (PUTKEEP, _write_stored_if),
    b"replace": (_calling(REPLACE), _write_stored_if),
    b"append": (_calling(APPEND), _write_stored_if),
    b"prepend": (_calling(PREPEND), _write_stored_if),
}
_OTHERS: Final[Mapping[bytes, Callable[[list[bytes]], Call]]] = {
    b"get": _get,
    b"gets": _get,
    b"delete": _delete,
    b"incr": partial(_change, INCR),
    b"decr": partial(_change, DECR),
    b"flush_all": _flush,
    b"version": _version,
    b"stats": _stats,
    b"quit": _quit,
}
