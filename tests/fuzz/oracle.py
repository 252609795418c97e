"""What must hold whatever bytes come: for the server's ear, all that it does with them, and for the client's ear.

The server's side: nothing but `ProtocolError` leaves the decoder, and behind that, or behind a call that is the last,
it gives nothing more. The calls are the same however the bytes were split, each is what its own bytes are by
themselves, and a binary one is written with the very bytes that it was read from. No more is held than has come.
Every call can be answered and refused; an answer is well-formed, and a refusal no success. Carrying the calls out
raises and logs nothing, one by one comes to the same as in a batch, and changes no record that none of them named.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest.mock import patch

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import wire
from beaker_statestore.tyrant.calls import Call, Door
from beaker_statestore.tyrant.commands import (
    COMMANDS,
    EXT,
    FAILURE,
    FORBIDDEN,
    FWMKEYS,
    MISC,
    PUTNR,
    SIZE,
    STAT,
    STORE_FAILED,
    SUCCESS,
    VANISH,
    Body,
    Reply,
    Request,
)
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import OPEN, Mask
from beaker_statestore.tyrant.protocols import CallDecoder
from beaker_statestore.tyrant.texts import function_name
from beaker_statestore.tyrant.verbs import Executor, Reach
from beaker_statestore.tyrant.wire import Limits, ReplyDecoder, encode_request
from tests.serving import joined

__all__ = ["LIMITS", "POLICY", "Defect", "check_client", "check_server", "hear", "in_pieces"]

#: Small, so that it does not take much to come to them.
LIMITS = Limits(blob=4096, count=64, name=32, message=8192, line=2048)
REACH = Reach(value=4096, reply=16384, keys=16)
POLICY = HTTPPolicy()
#: No frame names it, unless somebody was lucky.
SENTINEL = b"\x9d\x11sentinel\xe7\x02"
RECORDS = {SENTINEL: b"still here", b"k": b"value", b"n": b"7", b"key": b'{"a": 1}', b"\0": b"four"}

#: Everything is masked, with the doors and without.
SHUT = (Mask.of(["all"], [], OPEN), Mask.of(["all", *(door.value for door in Door)], [], OPEN))
_REPLIES = {
    Body.NO_REPLY: None,
    Body.NOTHING: None,
    Body.BLOB: b"1",
    Body.BLOBS: [b"", b"b"],
    Body.PAIRS: [(b"", b"v"), (b"k", b"")],
    Body.INT32: -1,
    Body.INT64: 2**40,
    Body.DECIMAL: -1.5,
}
_HEADER = re.compile(rb"[A-Za-z_-]+: [\t\x20-\x7e\x80-\xff]+")
_CONTENT_LENGTH = re.compile(rb"^content-length:[ \t]*0*([0-9]+)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)
_WRITERS = frozenset(["put", "putkeep", "putcat", "putshl", "putnr", "out", "addint", "adddouble"])
_READERS = frozenset((b"get", b"getlist", b"getpart", b"regex", b"range", b"iterinit", b"iternext", b"sync", b"error"))


class Defect(AssertionError):  # noqa: N818 - it is the word for it
    """Something that must hold does not."""


class _Watch(logging.Handler):
    """Anything that is logged as an error is a defect."""

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            raise Defect(f"logged: {record.getMessage()}") from (record.exc_info[1] if record.exc_info else None)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name of logging
        raise Defect(f"it cannot be logged: {record.msg} {record.args}")


_log = logging.getLogger("beaker_statestore")
_watch = _Watch()


def in_pieces(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    """``data`` in pieces of these lengths, and the rest."""
    pieces = []
    for cut in cuts:
        pieces.append(data[:cut])
        data = data[cut:]
    return [*pieces, data]


def in_volleys(data: bytes, cuts: Sequence[int]) -> list[list[bytes]]:
    """The same, with those together that arrive before anybody looks: those of odd lengths, and what follows them."""
    volleys: list[list[bytes]] = [[]]
    for piece, cut in zip(in_pieces(data, cuts), [*cuts, 0], strict=True):
        volleys[-1].append(piece)
        if cut % 2 == 0:
            volleys.append([])
    return [volley for volley in volleys if volley]


def _with_short_strings_in_parts() -> AbstractContextManager[object]:
    """While it lasts, strings of few bytes are received and sent as otherwise only long ones are."""
    return patch.object(wire, "LONG", 5)


# -- the server's side


class Heard(NamedTuple):
    """What a decoder made of some bytes."""

    calls: list[Call]
    #: For each, up to which byte it goes; not for one that is the last, behind which nothing is looked at.
    ends: list[int]
    #: Why there are no more: ``error``, ``last``, ``refused`` (by the server), or ``open``: more may come.
    why: str
    #: Part of a request is there.
    midway: bool = False


def hear(volleys: Sequence[Sequence[bytes]], policy: HTTPPolicy | None = POLICY, limits: Limits = LIMITS) -> Heard:
    """What a server's decoder makes of ``volleys``, asked after each."""
    decoder = CallDecoder(limits, policy)
    heard = Heard([], [], "open")
    fed = 0
    for volley in volleys:
        for piece in volley:
            decoder.feed(piece)
            fed += len(piece)
        heard = heard._replace(why=_hear_on(decoder, heard, fed), midway=decoder.midway)
        if decoder.buffered > fed - (heard.ends or [0])[-1]:
            raise Defect(f"{decoder.buffered} bytes are held of {fed}")
        if heard.why != "open":
            break
    if heard.why in ("error", "last"):
        for more in (encode_request(VANISH()), b"version\r\n"):
            decoder.feed(more)
            behind = Heard([], [], "")
            if _hear_on(decoder, behind, fed) != {"error": "error", "last": "open"}[heard.why] or behind.calls:
                raise Defect(f"behind its end ({heard.why}) something is read")
            if decoder.buffered:
                raise Defect("what nobody will read is kept")
    return heard


def _hear_on(decoder: CallDecoder, heard: Heard, fed: int) -> str:
    while True:
        try:
            call = decoder.next()
        except ProtocolError:
            return "error"
        if call is None:
            return "open"
        if call.request is not None and call.request.command.body is Body.STREAM:
            return "refused"
        heard.calls.append(call)
        if call.last:
            return "last"
        heard.ends.append(fed - decoder.buffered)


def look_of(call: Call) -> tuple[Any, ...]:
    """``call`` as something that can be compared."""
    return (repr(call.request), call.door, call.last, *(joined(call.encode(reply)) for reply in replies_to(call)))


def replies_to(call: Call) -> list[Reply]:
    """A reply of every status that ``call`` may get."""
    value: Any = None
    if call.request is not None:
        value = _REPLIES[call.request.command.body]
        if call.request.command is STAT:
            value = b"version\t1\nrnum\t3\ncnt_put\t2\nru_real\t1.5\n"
    return [Reply(SUCCESS, value), Reply(FAILURE), Reply(STORE_FAILED), Reply(FORBIDDEN)]


def check_server(data: bytes, cuts: Sequence[int], policy: HTTPPolicy | None = POLICY) -> int:
    """Let a server hear ``data``, whole and in pieces of these lengths, and do it; answer how many calls it was.

    :raises Defect: what must hold does not.
    """
    heard = hear([[data]], policy)
    looks = [look_of(call) for call in heard.calls]
    with _with_short_strings_in_parts():
        again = hear(in_volleys(data, cuts), policy)
        other_looks = [look_of(call) for call in again.calls]
    if heard.why != again.why or looks != other_looks:
        raise Defect(f"cut in pieces, it means something else: {heard} and {again}")
    start = 0
    for call, end, look in zip(heard.calls, heard.ends, looks, strict=False):
        own, start = data[start:end], end
        if not _is_whole(call, own):
            raise Defect(f"{call.request} was read from {own!r}")
        alone = hear([[own]], policy)
        if [look_of(call) for call in alone.calls] != [look] or alone.why != "open":
            raise Defect(f"by itself, {own!r} means something else: {alone}")
    for call in heard.calls:
        check_refusal(call)
        for reply in replies_to(call):
            check_answer(call, joined(call.encode(reply)))
    check_deeds(heard.calls)
    return len(heard.calls)


def _is_whole(call: Call, own: bytes) -> bool:
    """Whether ``own`` is as long as its protocol says, to the byte, by a reader that knows no more than that."""
    if call.door is Door.BINARY:
        return call.request is not None and encode_request(call.request) == own
    if call.door is Door.MEMCACHED:
        line, _, data = own.partition(b"\n")
        verb, *words = line.split()
        if verb not in (b"set", b"add", b"replace", b"append", b"prepend"):
            return data == b""
        return len(data) == int(words[3]) + 2 and data.endswith(b"\r\n")
    head, _, body = own.partition(b"\r\n\r\n")
    lengths = _CONTENT_LENGTH.findall(head) or [b"0"]
    return lengths == [b"%d" % len(body)] and b"transfer-encoding:" not in head.lower()


def check_refusal(call: Call) -> None:
    for mask in SHUT:
        if not mask.forbids(call):
            if call.request is None and mask is SHUT[0]:
                continue  # nothing is done, so nothing can be masked but its protocol
            raise Defect(f"where all is masked, {call.request} is not")
        refused = call.refused()
        if refused.request is not None:
            raise Defect("what is refused would be carried out")
        answers = {joined(refused.encode(Reply(status))) for status in (SUCCESS, FAILURE, STORE_FAILED, FORBIDDEN)}
        if len(answers) != 1:
            raise Defect(f"a refusal that depends on the reply: {answers}")
        (answer,) = answers
        if not answer:
            good = refused.last
        elif call.door is Door.BINARY:
            good = answer in (b"\3", b"\3\0\0\0\0")
        elif call.door is Door.MEMCACHED:
            good = answer == b"CLIENT_ERROR forbidden\r\n"
        else:
            good = answer.startswith(b"HTTP/1.1 403 ")
        if not good:
            raise Defect(f"the refusal of {call.request} reads {answer!r}")


def check_answer(call: Call, answer: bytes) -> None:
    """``answer`` is a whole one of its protocol."""
    if call.door is Door.BINARY:
        assert call.request is not None
        if call.request.command is PUTNR:
            good = not answer
        else:
            decoder = ReplyDecoder()
            # How many keys were asked for is no concern of the table of replies.
            asked = FWMKEYS(b"", -1) if call.request.command is FWMKEYS else call.request
            decoder.expect(asked)
            decoder.feed(answer)
            good = decoder.next() is not None and decoder.buffered == 0
    elif call.door is Door.MEMCACHED:
        good = not answer or answer.endswith(b"\r\n")
    else:
        head, _, body = answer.partition(b"\r\n\r\n")
        first, *lines = head.split(b"\r\n")
        lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"Content-Length:")]
        whole = len(lengths) == 1 and len(body) in (lengths[0], 0)  # that of HEAD is only announced
        good = whole and first.startswith(b"HTTP/1.1 ") and all(map(_HEADER.fullmatch, lines))
    if not good:
        raise Defect(f"{call.request} is answered {answer!r}")


def check_deeds(calls: Sequence[Call]) -> None:
    batch, single = MemoryStore(), MemoryStore()
    for store in (batch, single):
        store.put_many(RECORDS)
    _log.addHandler(_watch)
    try:
        together = carry_out(Executor(batch, REACH), calls, len(calls))
        one_by_one = carry_out(Executor(single, REACH), calls, 1)
    finally:
        _log.removeHandler(_watch)
    # What stat and size answer depends on the time and on the batch.
    steady = [call.request is None or call.request.command not in (SIZE, STAT) for call in calls]
    for call, one, other, compared in zip(calls, together, one_by_one, steady, strict=True):
        if compared and one != other:
            raise Defect(f"{call.request} is answered {one!r} in a batch, {other!r} by itself")
        check_answer(call, one)
    records = _records_of(batch)
    if records != _records_of(single):
        raise Defect(f"in a batch, the calls leave {records}")
    named, emptied = named_by(calls)
    for key in records.keys() | RECORDS.keys():
        if records.get(key) != RECORDS.get(key) and key not in named and not (emptied and key not in records):
            raise Defect(f"no call named {key!r}, and it has become {records.get(key)!r}")
    if batch.size() != sum(len(key) + len(value or b"") for key, value in records.items()):
        raise Defect(f"the store takes itself for {batch.size()} bytes large")


def _records_of(store: MemoryStore) -> dict[bytes, bytes | None]:
    return {key: store.get(key) for key in list(store.keys())}


def carry_out(executor: Executor, calls: Sequence[Call], most: int) -> list[bytes]:
    """The answers to ``calls``, in batches of so many; those that have no place in one come alone, as in the server."""
    answers: list[bytes] = []
    batch: list[Call] = []

    def flush() -> None:
        waiting = batch[:]
        batch.clear()
        while waiting:
            done = executor.execute(waiting)
            if not done:
                raise Defect("a batch in which nothing is done")
            answers.extend(map(joined, done))
            del waiting[: len(done)]

    for call in calls:
        job = None if call.request is None else executor.apart(call.request)
        if job is None:
            batch.append(call)
            if len(batch) >= most:
                flush()
            continue
        flush()
        for _ in range(1000):
            if job.step():
                break
        else:
            raise Defect(f"{call.request} does not end")
        answers.append(joined(call.encode(job.reply)))
    flush()
    return answers


def named_by(calls: Sequence[Call]) -> tuple[set[bytes], bool]:
    """The keys that ``calls`` may write to, and whether they may remove all; without asking what carries them out."""
    named: set[bytes] = set()
    emptied = False
    for call in calls:
        if call.request is None:
            continue
        command, arguments = call.request
        if command is MISC:
            function = function_name(arguments[0])
            emptied |= function == b"vanish"
            if function not in _READERS:
                named.update(arguments[1])
        elif command is EXT:
            named.add(arguments[1])
        elif command.name in _WRITERS:
            named.add(arguments[0])
        emptied |= command is VANISH
    return named, emptied


# -- the client's side


def check_client(asked: Sequence[Request], data: bytes, cuts: Sequence[int]) -> int:
    """Let a client that has sent ``asked`` hear ``data``, whole and in pieces; answer how many replies it was.

    :raises Defect: what must hold does not.
    """
    whole, end = _listen(asked, [[data]])
    with _with_short_strings_in_parts():
        again = _listen(asked, in_volleys(data, cuts))
    if repr((whole, end)) != repr(again):  # "not a number" equals nothing, not even itself
        raise Defect(f"cut in pieces, it means something else: {whole} {end} and {again}")
    expected = [request for request in asked if request.command is not PUTNR]
    if [request for request, _ in whole] != expected[: len(whole)]:
        raise Defect(f"replies to what was not asked: {whole}")
    return len(whole)


def _listen(asked: Sequence[Request], volleys: Sequence[Sequence[bytes]]) -> tuple[list[tuple[Request, Reply]], str]:
    decoder = ReplyDecoder(LIMITS)
    for request in asked:
        decoder.expect(request)
    replies: list[tuple[Request, Reply]] = []
    fed = 0
    for volley in volleys:
        for piece in volley:
            decoder.feed(piece)
            fed += len(piece)
        try:
            while (message := decoder.next()) is not None:
                replies.append(message)
        except ProtocolError:
            if decoder.buffered:
                raise Defect("it keeps what nobody will read") from None
            return replies, "error"
        if decoder.buffered > fed:
            raise Defect(f"{decoder.buffered} bytes are held of {fed}")
    return replies, "midway" if decoder.midway else "open"


assert all(command.body in _REPLIES for command in COMMANDS.values() if command.name != "repl")
