"""What each command does to the records, as Tokyo Tyrant 1.1.41 does it, on any `LocalStore`.

An `Executor` is given requests and answers the bytes of their replies. It knows what the wire means, but no sockets
and no connections.

Where the original's types of database differ, this one is its in-memory tree ``+``: keys in byte order, one value a
key. An engine may carry out some of them itself (`LocalVerbs.native`), in its own way. Three things are better on
purpose: the iterator visits every key, also when each is deleted as it is returned; ``misc regex`` and ``misc range``
leave the iterator alone; no reply is longer than the executor allows.

Not carried out are ``restore``, ``setmst`` and ``repl``, with which any client of the original can write without end or
turn the server into another's slave. ``copy`` writes to one directory only (`backups`). ``ext`` has functions of our
own, for `swap`, `paging` and memcached's commands, and those of the operator.
"""

from __future__ import annotations

import logging
import math
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

from beaker_statestore import observe
from beaker_statestore.complaints import Complaints
from beaker_statestore.exceptions import OutcomeUnknown, ProtocolError, StateStoreError
from beaker_statestore.stores.base import LocalStore, LocalVerbs, Verbs
from beaker_statestore.tyrant import commands, paging, swap
from beaker_statestore.tyrant.apart import Backup, Job, Scan, Statistics, scan_for, wait_for
from beaker_statestore.tyrant.backups import Backups
from beaker_statestore.tyrant.calls import Call
from beaker_statestore.tyrant.commands import FAILURE, STORE_FAILED, SUCCESS, TOO_MUCH, Command, Reply, Request
from beaker_statestore.tyrant.stat import stat_text
from beaker_statestore.tyrant.texts import function_name, number, wrapped
from beaker_statestore.tyrant.wire import Encoded, decimal_to_float, encoded_length

__all__ = ["BUILT_IN", "Executor", "Function", "Reach", "waits_for_disk"]

logger = logging.getLogger(__name__)

#: Once the replies of a transaction have so many bytes, the rest of its requests waits for the next.
ENOUGH: Final = 4 * 1024 * 1024
#: The same once it has taken so many seconds: a reply of a few bytes can cost the reading of a whole value.
LONG_ENOUGH: Final = 0.01
#: A page of a scan has no more keys than this, whatever was asked for.
LONGEST_PAGE: Final = 10_000

OK: Final = Reply(SUCCESS)
FAILED: Final = Reply(FAILURE)

# addint and adddouble store a number as the server's machine represents it.
_INT: Final = struct.Struct("=i")
_DOUBLE: Final = struct.Struct("=d")
_INT_MIN: Final = -(2**31)

#: An ``ext`` function of the operator's: gets the verbs of the transaction, the key and the value of the request, and
#: answers the reply's value, or ``None`` for failure. It must have no effect but through the verbs, as it may be called
#: again (see `LocalStore.apply`).
Function = Callable[[Verbs, bytes, bytes], bytes | None]


@dataclass(frozen=True, slots=True)
class Reach:
    """How far requests may go."""

    #: Bytes of one value.
    value: int = commands.MAX_BLOB
    #: Bytes of all values of one reply.
    reply: int = commands.MAX_BLOB
    #: Keys that one request may look for.
    keys: int = 100_000
    #: The operator's functions, by name.
    functions: Mapping[bytes, Function] = field(default_factory=dict)
    #: Where copies go; ``None``: there are none.
    backups: Backups | None = None
    #: What the server knows of itself, by names for people.
    figures: Callable[[], Mapping[str, Any]] = dict
    #: Makes the reply to ``ext statistics`` of that; ``None``: there are no statistics.
    report: Callable[[Mapping[str, Any]], bytes] | None = None


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
    """Carries out calls on a store, many in one transaction. Not for several threads at once."""

    def __init__(self, store: LocalStore, reach: Reach = Reach()) -> None:
        self._store = store
        self._reach = reach
        #: The server has one iterator, shared by all clients.
        self._position: Position | None = None
        self._calls: Counter[Command] = Counter()
        self._misses: Counter[Command] = Counter()
        #: How many requests have been answered with `STORE_FAILED`.
        self.failures = 0
        self._complain = Complaints(logger)

    def execute(self, calls: Sequence[Call]) -> list[Encoded]:
        """Carry out the first of ``calls`` and answer their replies.

        Not all of them when the replies become long; the others are to be given again. What the store fails to do is
        answered with `STORE_FAILED`. If all together fail, each is tried by itself, so that one that cannot be done
        (a write, when the disk is full) does not fail its neighbours.

        :raises OutcomeUnknown: some may have been carried out, and must not be tried again. Nothing is known about any
            of ``calls``, and no reply would be true.
        """
        try:
            return self._attempt(calls)
        except OutcomeUnknown as error:
            report(error)
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, each client gets an answer
            observe.count("server.batches_repeated")
            logger.debug("a batch is carried out one by one: %r", error)  # and then it is known whose fault it was
        replies: list[Encoded] = []
        room = min(self._reach.reply, ENOUGH)
        for call in calls:
            try:
                replies += self._attempt([call])
            except OutcomeUnknown as error:
                report(error)
                raise
            except Exception as error:  # noqa: BLE001 - as above
                report(error)
                self.failures += 1
                replies.append(call.encode(Reply(STORE_FAILED)))
            room -= encoded_length(replies[-1])
            if room < 0:
                break
        return replies

    def apart(self, request: Request) -> Job | None:
        """The job that ``request`` is, if it is to be carried out by itself and not by `execute`.

        Only one that the store does not do by itself, in whatever time it takes, is. For the server's own thread.
        """
        if request.command is commands.COPY:
            self._calls[request.command] += 1
            return Backup(request.arguments[0], self._store, self._reach.backups, self._complain)
        job: Job | None = None
        if request.command is commands.EXT:
            job = self._own_function(request)
        elif request.command in _MAY_SCAN and not self._store.scans_itself:
            plan = scan_for(request, ordered=self._store.kind != "hash")
            if plan is not None:
                job = Scan(plan, self._store, self._complain, keys=self._reach.keys, longest=self._reach.reply)
        if job is not None:
            self._calls[request.command] += 1
        return job

    def _own_function(self, request: Request) -> Job | None:
        name = request.arguments[0]
        if name == commands.WAIT:
            return wait_for(request, self._store)
        if name == commands.STATISTICS and self._reach.report is not None:
            calls, misses = self._calls.copy(), self._misses.copy()
            commands_ = {
                command.name: {"Requests": count, "Misses": misses[command]} for command, count in calls.items()
            }
            figures = {**self._reach.figures(), "Requests": calls.total(), "Commands": commands_}
            return Statistics(figures, self._store, self._reach.report, self._reach.reply)
        return None

    def _attempt(self, calls: Sequence[Call]) -> list[Encoded]:
        # An operation must not touch the store but through its verbs, so this is asked before.
        wanted = any(call.request is not None and call.request.command in _TELLS_SIZE for call in calls)
        figures = Figures(self._store.size() if wanted else 0, self._calls, self._misses)
        (run,) = self._store.apply([partial(self._run, calls, figures)])
        self._position = run.position
        self._calls.update(run.counted)
        self._misses.update(run.misses)
        if run.awaiting_sync:
            self._sync(calls, run)
        return run.replies

    def _run(self, calls: Sequence[Call], figures: Figures, records: LocalVerbs) -> Run:
        run = Run(records, self._position, self._reach, figures, self._store)
        room = min(self._reach.reply, ENOUGH)
        enough = time.monotonic() + LONG_ENOUGH
        for call in calls:
            room -= run.answer(call)
            if room < 0 or time.monotonic() > enough:
                break
        return run

    def _sync(self, calls: Sequence[Call], run: Run) -> None:
        try:
            self._store.sync()
        except Exception as error:  # noqa: BLE001 - the transaction stands, only its durability is in doubt
            report(error)
            self.failures += len(run.awaiting_sync)
            for place in run.awaiting_sync:
                run.replies[place] = calls[place].encode(Reply(STORE_FAILED))


def report(error: Exception) -> None:
    """Count and log that the store failed."""
    observe.count("server.store_failed")
    # Our own errors say what is wrong; anything else is a defect, and its place is wanted.
    logger.error("the store failed: %s", error, exc_info=None if isinstance(error, StateStoreError) else error)


def waits_for_disk(request: Request) -> bool:
    """Whether ``request`` waits for the disk even on a store that otherwise does not."""
    return request.command is commands.SYNC or (
        request.command is commands.MISC and function_name(request.arguments[0]) == b"sync"
    )


class _TooLongError(Exception):
    """A reply would be longer than any may be."""


class Run:
    """Requests being carried out within one transaction: a method a command, a method a ``misc`` or ``ext`` function.

    All that they change besides the records is kept here until the transaction has been committed, since an engine
    may run them again from the start.
    """

    def __init__(
        self, records: LocalVerbs, position: Position | None, reach: Reach, figures: Figures, store: LocalStore
    ) -> None:
        """:param store: only to tell what it is."""
        self.records = records
        self.position = position
        self.replies: list[Encoded] = []
        #: Which of the replies are true only once the store has been synchronised.
        self.awaiting_sync: list[int] = []
        #: What was asked for, for ``stat``, and what of it failed.
        self.counted: list[Command] = []
        self.misses: list[Command] = []
        self._reach = reach
        self._figures = figures
        self._store = store

    def answer(self, call: Call) -> int:
        """Carry out ``call``, keep its reply, and answer how long that is."""
        reply = OK if call.request is None else self._carry_out(call.request)
        encoded = call.encode(reply)
        self.replies.append(encoded)
        return encoded_length(encoded)

    def _carry_out(self, request: Request) -> Reply:
        command, arguments = request
        native = self.records.native.get(command.name)
        try:
            reply = _COMMANDS[command](self, *arguments) if native is None else self._bounded(native, request)
        except _TooLongError:
            reply = Reply(TOO_MUCH)
        counted = _COUNTED_AS.get(arguments[0], command) if command is commands.EXT else command
        self.counted.append(counted)
        if reply.status != SUCCESS:
            self.misses.append(counted)
        return reply

    def _bounded(self, native: Callable[..., Any], request: Request) -> Reply:
        """What the engine itself answers, unless it is more than a reply may hold."""
        command, arguments = request
        most = self._reach.keys
        if command is commands.FWMKEYS:
            prefix, maximum = arguments
            arguments = prefix, maximum if 0 <= maximum <= most else most + 1
        value = native(*arguments)
        if value is None:
            return FAILED
        if isinstance(value, list):
            self._gather(value)
            # Of misc, keys and values in turn.
            if len(value) > (most if command is commands.FWMKEYS else 2 * most):
                raise _TooLongError
        return Reply(SUCCESS, value)

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
        return self.put(key, value) if len(value) <= self._reach.value else FAILED

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
        room = self._reach.reply
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
        return Reply(
            SUCCESS, stat_text(self._store.kind, self._store.path, self.records.count(), size, calls, misses).encode()
        )

    def sync(self) -> Reply:
        self.awaiting_sync.append(len(self.replies))
        return OK

    def optimize(self, parameters: bytes = b"") -> Reply:
        return OK  # there is nothing to tune; the original, too, takes any parameters

    def refuse(self, *arguments: Any) -> Reply:
        return FAILED

    # -- ext

    def ext(self, name: bytes, key: bytes, value: bytes, options: int) -> Reply:
        built_in = _EXTENSIONS.get(name)
        if built_in is not None:
            return built_in(self, key, value)
        function = self._reach.functions.get(name)
        result = None if function is None else function(self.records, key, value)
        if result is None:
            return FAILED
        if not isinstance(result, (bytes, bytearray, memoryview)):  # of a number, bytes() makes so many zeros
            raise TypeError(f"the function {name.decode()} answers {type(result).__name__}, not bytes or None")
        if len(result) > self._reach.reply:
            raise _TooLongError
        return Reply(SUCCESS, bytes(result))

    def probe(self, key: bytes, value: bytes) -> Reply:
        apart = [commands.WAIT] if self._reach.report is None else [commands.WAIT, commands.STATISTICS]
        return Reply(SUCCESS, b" ".join([*_EXTENSIONS, *apart, *self._reach.functions]))

    def replace(self, key: bytes, value: bytes) -> Reply:
        return self._changed(key, lambda _stored: value)

    def append(self, key: bytes, value: bytes) -> Reply:
        return self._changed(key, lambda stored: stored + value)

    def prepend(self, key: bytes, value: bytes) -> Reply:
        return self._changed(key, lambda stored: value + stored)

    def incr(self, key: bytes, amount: bytes) -> Reply:
        return self._changed(key, lambda stored: _sum(stored, number(amount)), answers=True)

    def decr(self, key: bytes, amount: bytes) -> Reply:
        return self._changed(key, lambda stored: _sum(stored, -number(amount)), answers=True)

    def _changed(self, key: bytes, change: Callable[[bytes], bytes], *, answers: bool = False) -> Reply:
        stored = self.records.get(key)
        if stored is None:
            return FAILED
        value = change(stored)
        if len(value) > self._reach.value:
            raise _TooLongError
        self.records.put(key, value)
        return Reply(SUCCESS, value if answers else b"")

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
        least, function = _FUNCTIONS.get(function_name(name), (0, Run.refuse_function))
        results = function(self, arguments) if len(arguments) >= least else None
        return FAILED if results is None else Reply(SUCCESS, results)

    def refuse_function(self, arguments: list[bytes]) -> list[bytes] | None:
        return None

    def misc_get(self, arguments: list[bytes]) -> list[bytes] | None:
        value = self.records.get(arguments[0])
        return None if value is None else [value]

    def misc_getpart(self, arguments: list[bytes]) -> list[bytes] | None:
        value = self.records.get(arguments[0])
        offset = max(number(arguments[1]), 0) if len(arguments) > 1 else 0
        length = number(arguments[2]) if len(arguments) > 2 else -1
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


def _sum(stored: bytes, amount: int) -> bytes:
    """memcached's sums, as decimal text; the original's wrap at 64 bits, and none is below 0."""
    return b"%d" % max(wrapped(number(stored) + amount), 0)


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
    commands.ADDINT: Run.addint,
    commands.ADDDOUBLE: Run.adddouble,
    commands.EXT: Run.ext,
    commands.SYNC: Run.sync,
    commands.OPTIMIZE: Run.optimize,
    commands.VANISH: Run.vanish,
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
    b"sync": (0, _as_command(Run.sync)),
    b"optimize": (0, _as_command(Run.optimize, 1)),
    b"vanish": (0, _as_command(Run.vanish)),
}

_EXTENSIONS: Final[dict[bytes, Callable[[Run, bytes, bytes], Reply]]] = {
    commands.PROBE: Run.probe,
    commands.CAS: Run.compare_and_swap,
    commands.SCAN: Run.scan,
    commands.REPLACE: Run.replace,
    commands.APPEND: Run.append,
    commands.PREPEND: Run.prepend,
    commands.INCR: Run.incr,
    commands.DECR: Run.decr,
}

#: Their names; the operator's functions have others.
BUILT_IN: Final = frozenset({*_EXTENSIONS, commands.WAIT, commands.STATISTICS})

#: memcached's commands count as the binary ones that are most like them.
_COUNTED_AS: Final = {
    commands.REPLACE: commands.PUT,
    commands.APPEND: commands.PUTCAT,
    commands.PREPEND: commands.PUTCAT,
    commands.INCR: commands.ADDINT,
    commands.DECR: commands.ADDINT,
}

_MAY_SCAN: Final = frozenset({commands.FWMKEYS, commands.MISC})
_TELLS_SIZE: Final = frozenset({commands.SIZE, commands.STAT})
_PUTS: Final = (commands.PUT, commands.PUTKEEP, commands.PUTCAT, commands.PUTSHL)
