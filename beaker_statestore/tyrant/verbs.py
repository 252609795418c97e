"""What each command does to the records, as Tokyo Tyrant 1.1.41 does it, on any `LocalStore`.

An `Executor` is given requests and answers the bytes of their replies. It knows what the wire means, but no sockets
and no connections.

Where the original's types of database differ, this one is its in-memory tree ``+``: keys in byte order, one value a
key. Three things are better on purpose: the iterator visits every key, also when each is deleted as it is returned;
``misc regex`` and ``misc range`` leave the iterator alone; no reply is longer than the executor allows.

Not carried out are ``copy``, ``restore``, ``setmst`` and ``repl``, with which any client of the original can run
programs, write files or turn the server into another's slave, and the functions of table databases. ``ext`` has the
functions that `swap` and `paging` describe.
"""

from __future__ import annotations

import logging
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice, takewhile
from typing import Any, Final, NamedTuple

from beaker_statestore import observe
from beaker_statestore.exceptions import OutcomeUnknown, ProtocolError, StateStoreError
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.tyrant import commands, ere, paging, swap
from beaker_statestore.tyrant.commands import FAILURE, STORE_FAILED, SUCCESS, Command, Reply, Request
from beaker_statestore.tyrant.stat import stat_text
from beaker_statestore.tyrant.wire import decimal_to_float, encode_reply

__all__ = ["Executor", "waits_for_disk"]

logger = logging.getLogger(__name__)

#: Once the replies of a transaction have so many bytes, the rest of its requests waits for the next.
ENOUGH: Final = 4 * 1024 * 1024
#: A page of a scan has no more keys than this, whatever was asked for.
LONGEST_PAGE: Final = 10_000

OK: Final = Reply(SUCCESS)
FAILED: Final = Reply(FAILURE)

# addint and adddouble store a number as the server's machine represents it.
_INT: Final = struct.Struct("=i")
_DOUBLE: Final = struct.Struct("=d")
_INT_MIN: Final = -(2**31)


class Position(NamedTuple):
    """Where the iterator goes on: at the first key from ``key`` on, or behind it."""

    key: bytes
    behind: bool


class Figures(NamedTuple):
    """What ``size`` and ``stat`` tell, as it was before the transaction."""

    size: int
    calls: Counter[Command]
    misses: Counter[Command]


class Executor:
    """Carries out requests on a store, many in one transaction. Not for several threads at once.

    :param longest: bytes that a value, and all values of one reply together, may have.
    """

    def __init__(self, store: LocalStore, longest: int) -> None:
        self._store = store
        self._longest = longest
        #: The server has one iterator, shared by all clients.
        self._position: Position | None = None
        self._calls: Counter[Command] = Counter()
        self._misses: Counter[Command] = Counter()

    def execute(self, requests: Sequence[Request]) -> list[bytes]:
        """Carry out the first of ``requests`` and answer their replies.

        Not all of them when the replies become long; the others are to be given again. What the store fails to do is
        answered with `STORE_FAILED`. If all together fail, each is tried by itself, so that one that cannot be done
        (a write, when the disk is full) does not fail its neighbours.

        :raises OutcomeUnknown: some may have been carried out, and must not be tried again. Nothing is known about any
            of ``requests``, and no reply would be true.
        """
        try:
            return self._attempt(requests)
        except OutcomeUnknown as error:
            _report(error)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, each client gets an answer
            _report(error)
        replies: list[bytes] = []
        room = min(self._longest, ENOUGH)
        for request in requests:
            try:
                replies += self._attempt([request])
            except OutcomeUnknown as error:
                _report(error)
                raise
            except Exception as error:  # noqa: BLE001 - as above
                _report(error)
                replies.append(encode_reply(request.command, Reply(STORE_FAILED)))
            room -= len(replies[-1])
            if room < 0:
                break
        return replies

    def _attempt(self, requests: Sequence[Request]) -> list[bytes]:
        # An operation must not touch the store but through its verbs, so this is asked before.
        size = self._store.size() if any(request.command in _TELLS_SIZE for request in requests) else 0
        figures = Figures(size, self._calls, self._misses)
        (run,) = self._store.apply([partial(self._run, requests, figures)])
        self._position = run.position
        self._calls.update(request.command for request in requests[: len(run.replies)])
        self._misses.update(run.misses)
        if run.awaiting_sync:
            self._sync(requests, run)
        return run.replies

    def _run(self, requests: Sequence[Request], figures: Figures, records: LocalVerbs) -> Run:
        run = Run(records, self._position, self._longest, figures)
        room = min(self._longest, ENOUGH)
        for request in requests:
            room -= run.answer(request)
            if room < 0:
                break
        return run

    def _sync(self, requests: Sequence[Request], run: Run) -> None:
        try:
            self._store.sync()
        except Exception as error:  # noqa: BLE001 - the transaction stands, only its durability is in doubt
            _report(error)
            for place in run.awaiting_sync:
                run.replies[place] = encode_reply(requests[place].command, Reply(STORE_FAILED))


def _report(error: Exception) -> None:
    observe.count("server.store_failed")
    # Our own errors say what is wrong; anything else is a defect, and its place is wanted.
    logger.error("the store failed: %s", error, exc_info=None if isinstance(error, StateStoreError) else error)


def waits_for_disk(request: Request) -> bool:
    """Whether ``request`` waits for the disk even on a store that otherwise does not."""
    return request.command is commands.SYNC or (
        request.command is commands.MISC and _function_name(request.arguments[0]) == b"sync"
    )


class _TooLongError(Exception):
    """A reply would be longer than any may be."""


class Run:
    """Requests being carried out within one transaction: a method a command, a method a ``misc`` or ``ext`` function.

    All that they change besides the records is kept here until the transaction has been committed, since an engine
    may run them again from the start.
    """

    def __init__(self, records: LocalVerbs, position: Position | None, longest: int, figures: Figures) -> None:
        self.records = records
        self.position = position
        self.replies: list[bytes] = []
        #: Which of the replies are true only once the store has been synchronised.
        self.awaiting_sync: list[int] = []
        self.misses: list[Command] = []
        self._longest = longest
        self._figures = figures

    def answer(self, request: Request) -> int:
        """Carry out ``request``, keep its reply, and answer how long that is."""
        command, arguments = request
        try:
            reply = _COMMANDS[command](self, *arguments)
        except _TooLongError:
            reply = Reply(STORE_FAILED)
        if reply.status != SUCCESS:
            self.misses.append(command)
        encoded = encode_reply(command, reply)
        self.replies.append(encoded)
        return len(encoded)

    # -- single records

    def put(self, key: bytes, value: bytes) -> Reply:
        self.records.put(key, value)
        return OK

    def putkeep(self, key: bytes, value: bytes) -> Reply:
        return OK if self.records.add(key, value) else FAILED

    def putcat(self, key: bytes, value: bytes) -> Reply:
        return self._put_grown(key, (self.records.get(key) or b"") + value)

    def putshl(self, key: bytes, value: bytes, width: int) -> Reply:
        stored = self.records.get(key)
        if stored is None:
            return self.put(key, value)  # whole, whatever the width
        joined = stored + value
        return self._put_grown(key, joined[max(len(joined) - width, 0) :])

    def _put_grown(self, key: bytes, value: bytes) -> Reply:
        return self.put(key, value) if len(value) <= self._longest else FAILED

    def out(self, key: bytes) -> Reply:
        return OK if self.records.delete(key) else FAILED

    def get(self, key: bytes) -> Reply:
        value = self.records.get(key)
        return FAILED if value is None else Reply(SUCCESS, value)

    def vsiz(self, key: bytes) -> Reply:
        value = self.records.get(key)
        return FAILED if value is None else Reply(SUCCESS, len(value))

    def addint(self, key: bytes, number: int) -> Reply:
        stored = self.records.get(key)
        if stored is not None:
            if len(stored) != _INT.size:
                return FAILED
            number = (_INT.unpack(stored)[0] + number + 2**31) % 2**32 - 2**31
        self.records.put(key, _INT.pack(number))
        # The original's interface takes this one sum for its sign of failure, although it has been stored.
        return FAILED if number == _INT_MIN else Reply(SUCCESS, number)

    def adddouble(self, key: bytes, integral: int, fractional: int) -> Reply:
        number = decimal_to_float(integral, fractional)
        stored = self.records.get(key)
        if stored is not None:
            if len(stored) != _DOUBLE.size:
                return FAILED
            number += _DOUBLE.unpack(stored)[0]
        self.records.put(key, _DOUBLE.pack(number))
        # As with addint: "not a number" is both a possible sum and the sign of failure.
        return FAILED if math.isnan(number) else Reply(SUCCESS, number)

    # -- many records

    def _gather(self, pieces: Iterable[bytes]) -> list[bytes]:
        room = self._longest
        gathered = []
        for piece in pieces:
            room -= len(piece)
            if room < 0:
                raise _TooLongError
            gathered.append(piece)
        return gathered

    def _gather_records(self, keys: Iterable[bytes]) -> list[bytes]:
        """Key and value, one after the other, of those of ``keys`` that have a record."""
        return self._gather(piece for key in keys for piece in self._record(key))

    def _record(self, key: bytes) -> tuple[bytes, ...]:
        value = self.records.get(key)
        return () if value is None else (key, value)

    def mget(self, keys: list[bytes]) -> Reply:
        found = self._gather_records(keys)
        return Reply(SUCCESS, list(zip(found[::2], found[1::2], strict=True)))

    def fwmkeys(self, prefix: bytes, maximum: int) -> Reply:
        keys = takewhile(lambda key: key.startswith(prefix), self.records.ordered_keys(prefix))
        return Reply(SUCCESS, self._gather(_at_most(maximum, keys)))

    def iterinit(self, start: bytes = b"") -> Reply:
        self.position = Position(start, behind=False)
        return OK

    def iternext(self) -> Reply:
        if self.position is None:
            return FAILED
        key = next(self.records.ordered_keys(self.position.key, after=self.position.behind), None)
        if key is None:
            return FAILED
        self.position = Position(key, behind=True)
        return Reply(SUCCESS, key)

    def vanish(self) -> Reply:
        self.records.clear()
        return OK

    # -- the database

    def rnum(self) -> Reply:
        return Reply(SUCCESS, self.records.count())

    def size(self) -> Reply:
        return Reply(SUCCESS, self._figures.size)

    def stat(self) -> Reply:
        size, called, missed = self._figures
        calls = {command.name: called[command] for command in commands.COMMANDS.values()}
        misses = {
            "put": sum(missed[command] for command in _PUTS),
            "out": missed[commands.OUT],
            "get": missed[commands.GET],
        }
        return Reply(SUCCESS, stat_text(self.records.count(), size, calls, misses).encode())

    def sync(self) -> Reply:
        self.awaiting_sync.append(len(self.replies))
        return OK

    def optimize(self, parameters: bytes = b"") -> Reply:
        return OK  # there is nothing to tune; the original, too, takes any parameters

    def refuse(self, *arguments: Any) -> Reply:
        return FAILED

    # -- ext

    def ext(self, name: bytes, key: bytes, value: bytes, options: int) -> Reply:
        function: Callable[[Run, bytes, bytes], Reply] = _EXTENSIONS.get(name, Run.refuse)
        return function(self, key, value)

    def probe(self, key: bytes, value: bytes) -> Reply:
        return Reply(SUCCESS, b" ".join(_EXTENSIONS))

    def compare_and_swap(self, key: bytes, packed: bytes) -> Reply:
        try:
            expected, new = swap.unpack(packed)
        except ProtocolError:
            return FAILED
        swapped = self.records.compare_and_swap(key, expected, new)
        return Reply(SUCCESS, swap.SWAPPED if swapped else swap.NOT_SWAPPED)

    def scan(self, prefix: bytes, packed: bytes) -> Reply:
        try:
            cursor, limit = paging.unpack_request(packed)
        except ProtocolError:
            return FAILED
        keys, cursor = self.records.scan(prefix, cursor, min(limit, LONGEST_PAGE))
        return Reply(SUCCESS, paging.pack_page(self._gather(keys), cursor))

    # -- misc: arguments in, results or None for failure out

    def misc(self, name: bytes, arguments: list[bytes], options: int) -> Reply:
        least, function = _FUNCTIONS.get(_function_name(name), (0, Run.refuse_function))
        results = function(self, arguments) if len(arguments) >= least else None
        return FAILED if results is None else Reply(SUCCESS, results)

    def refuse_function(self, arguments: list[bytes]) -> list[bytes] | None:
        return None

    def misc_get(self, arguments: list[bytes]) -> list[bytes] | None:
        value = self.records.get(arguments[0])
        return None if value is None else [value]

    def misc_getpart(self, arguments: list[bytes]) -> list[bytes] | None:
        value = self.records.get(arguments[0])
        offset = max(_integer(arguments[1]), 0) if len(arguments) > 1 else 0
        length = _integer(arguments[2]) if len(arguments) > 2 else -1
        if value is None or offset >= len(value):
            return None
        return [value[offset:] if length < 0 else value[offset : offset + length]]

    def misc_putlist(self, arguments: list[bytes]) -> list[bytes] | None:
        for key, value in zip(arguments[::2], arguments[1::2], strict=False):  # an odd one at the end is ignored
            self.records.put(key, value)
        return []

    def misc_outlist(self, arguments: list[bytes]) -> list[bytes] | None:
        self.records.delete_many(arguments)
        return []

    def misc_getlist(self, arguments: list[bytes]) -> list[bytes] | None:
        return self._gather_records(arguments)

    def misc_iternext(self, arguments: list[bytes]) -> list[bytes] | None:
        reply = self.iternext()
        return list(self._record(reply.value)) if reply.status == SUCCESS else None

    def misc_regex(self, arguments: list[bytes]) -> list[bytes] | None:
        source = arguments[0]
        ignore_case = source.startswith(b"*")
        try:
            pattern = ere.Pattern(source[1:] if ignore_case else source, ignore_case=ignore_case)
        except ere.PatternError:
            return None
        matching = filter(pattern.found_in, self.records.ordered_keys())
        return self._gather_records(_at_most(_maximum(arguments), matching))

    def misc_range(self, arguments: list[bytes]) -> list[bytes] | None:
        keys = self.records.ordered_keys(arguments[0] if arguments else b"")
        if len(arguments) > 2:
            keys = takewhile(lambda key: key < arguments[2], keys)
        return self._gather_records(_at_most(_maximum(arguments), keys))


def _at_most(maximum: int, keys: Iterator[bytes]) -> Iterator[bytes]:
    return keys if maximum < 0 else islice(keys, maximum)


def _maximum(arguments: list[bytes]) -> int:
    """The second argument of ``regex`` and ``range``, where absent and below 1 stand for no limit."""
    number = _integer(arguments[1]) if len(arguments) > 1 else 0
    return number if number >= 1 else -1


def _integer(text: bytes) -> int:
    """``text`` as the original reads numbers: what follows the digits is ignored, no digits are 0."""
    match = re.match(rb"\s*([+-]?[0-9]{1,18})", text)
    return int(match[1]) if match else 0


def _function_name(name: bytes) -> bytes:
    return name.partition(b"\0")[0]  # the original reads it as a C string


def _as_command(command: Callable[..., Reply], takes: int = 0) -> Callable[[Run, list[bytes]], list[bytes] | None]:
    """The function that does what ``command`` does with its first so many arguments, and answers no results."""

    def function(run: Run, arguments: list[bytes]) -> list[bytes] | None:
        return [] if command(run, *arguments[:takes]).status == SUCCESS else None

    return function


_COMMANDS: Final[dict[Command, Callable[..., Reply]]] = {
    commands.PUT: Run.put,
    commands.PUTKEEP: Run.putkeep,
    commands.PUTCAT: Run.putcat,
    commands.PUTSHL: Run.putshl,
    commands.PUTNR: Run.put,
    commands.OUT: Run.out,
    commands.GET: Run.get,
    commands.MGET: Run.mget,
    commands.VSIZ: Run.vsiz,
    commands.ITERINIT: Run.iterinit,
    commands.ITERNEXT: Run.iternext,
    commands.FWMKEYS: Run.fwmkeys,
    commands.ADDINT: Run.addint,
    commands.ADDDOUBLE: Run.adddouble,
    commands.EXT: Run.ext,
    commands.SYNC: Run.sync,
    commands.OPTIMIZE: Run.optimize,
    commands.VANISH: Run.vanish,
    commands.COPY: Run.refuse,
    commands.RESTORE: Run.refuse,
    commands.SETMST: Run.refuse,
    commands.RNUM: Run.rnum,
    commands.SIZE: Run.size,
    commands.STAT: Run.stat,
    commands.MISC: Run.misc,
}

#: ``misc`` functions by name, each with the fewest arguments that it takes.
_FUNCTIONS: Final[dict[bytes, tuple[int, Callable[[Run, list[bytes]], list[bytes] | None]]]] = {
    b"put": (2, _as_command(Run.put, 2)),
    b"putkeep": (2, _as_command(Run.putkeep, 2)),
    b"putcat": (2, _as_command(Run.putcat, 2)),
    b"out": (1, _as_command(Run.out, 1)),
    b"get": (1, Run.misc_get),
    b"getpart": (1, Run.misc_getpart),
    b"putlist": (0, Run.misc_putlist),
    b"outlist": (0, Run.misc_outlist),
    b"getlist": (0, Run.misc_getlist),
    b"iterinit": (0, _as_command(Run.iterinit, 1)),
    b"iternext": (0, Run.misc_iternext),
    b"regex": (1, Run.misc_regex),
    b"range": (0, Run.misc_range),
    b"sync": (0, _as_command(Run.sync)),
    b"optimize": (0, _as_command(Run.optimize, 1)),
    b"vanish": (0, _as_command(Run.vanish)),
}

_EXTENSIONS: Final[dict[bytes, Callable[[Run, bytes, bytes], Reply]]] = {
    commands.PROBE: Run.probe,
    commands.CAS: Run.compare_and_swap,
    commands.SCAN: Run.scan,
}

_TELLS_SIZE: Final = frozenset({commands.SIZE, commands.STAT})
_PUTS: Final = (commands.PUT, commands.PUTKEEP, commands.PUTCAT, commands.PUTSHL)
