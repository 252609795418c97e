"""What the package has done since the process began, in ``logging.statistics``.

    from beaker_statestore import statistics
    statistics.install()

The convention is CherryPy's (the docstring of ``cherrypy.lib.cpstats`` describes it): a dictionary on the logging
module, in it a *namespace* for each package, in that numbers by names for people, or functions of the namespace that
answer them, or *collections*: dictionaries of *records*, which again hold numbers or functions. Nobody needs anybody
else's package to take part, and any tool can show it all; ours is `beaker_statestore.report`.

Neither counting nor reading waits for anything, so both may be done anywhere, in a signal handler too. Each thread
adds up in cells of its own, which nobody else writes, and the functions in the namespace add up the cells of all
threads when somebody asks. What threads that have ended leave behind is folded into one more set of cells. After a
fork, the child begins anew.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import count as numbers
from itertools import islice
from time import perf_counter_ns
from typing import Any, Final, NamedTuple

from beaker_statestore import observe

__all__ = [
    "EVENTS",
    "GAUGES",
    "NAMESPACE",
    "Statistics",
    "Totals",
    "extrapolate_statistics",
    "install",
    "own",
    "snapshot",
]

#: Our key in ``logging.statistics``.
NAMESPACE: Final = "beaker_statestore"

#: Operations that take so long, in seconds, are listed as slow.
SLOW: Final = 0.1
#: How many slow operations are listed; the last ones.
SLOW_KEPT: Final = 50
#: How many servers, and how many kinds of operations, are told apart; what comes later counts as `OTHER`.
LIMIT: Final = 100
OTHER: Final = "other"
#: Getting a connection: no operation on records, but part of one.
CONNECT: Final = "connect"
#: These wait because they are asked to, so they are never slow.
_PATIENT: Final = frozenset({"wait"})
#: Nobody's statistics go deeper than this, and all together have no more members.
_DEEPEST: Final = 12
_MOST: Final = 100_000
#: What stands in place of the rest.
_MORE: Final = "..."
#: What others' code may raise without ending a report. It is not for them to end the process in it.
_MISTAKES: Final = (Exception, SystemExit)


class Event(NamedTuple):
    """What people call a figure, and what it counts."""

    name: str
    meaning: str


#: Each event that the package tells, by its name there. Others are shown under that.
EVENTS: Final[Mapping[str, Event]] = {
    "tyrant.connections": Event("Connections Opened", "connections to Tyrant servers that were opened"),
    "tyrant.retries": Event("Retries", "requests that were sent again, on a new connection"),
    "session.saved": Event("Sessions Saved", "saves that stored what the application had changed"),
    "session.merged": Event("Sessions Merged", "of these, those that took in what others had changed meanwhile"),
    "session.conflict": Event("Session Conflicts", "keys of sessions that two requests had changed; the later counts"),
    "session.dropped": Event("Saves Dropped", "saves that stored nothing, as others had ended the session"),
    "session.touched": Event("Touches Written", "saves of which the time of access was all there was to write"),
    "session.touch_skipped": Event("Writes Avoided", "touches that were not written, as the last one was recent"),
    "session.touch_dropped": Event("Touches Dropped", "touches that somebody else's write made superfluous"),
    "session.touch_unknown": Event("Touches of Unknown Outcome", "touches whose answer was lost"),
    "session.discard_failed": Event("Discards Failed", "unknown sessions whose removal was left to their expiry"),
    "sessions.revoked": Event("Sessions Revoked", "sessions that were ended by who was signed in"),
    "index.listed": Event("Index Entries Written", "sessions that were listed under who is signed in"),
    "documents.damaged": Event("Documents Damaged", "records met that hold none of our documents"),
    "store.contention": Event("Swaps Repeated", "commits that had to begin anew, as somebody else was quicker"),
    "store.outcome_unknown": Event("Swaps of Unknown Outcome", "commits whose answer was lost, then read back"),
    "store.disk_full": Event("Writes Refused for Disk Space", "writes that would have filled the disk"),
    "store.broken": Event("Files Broken", "files of records that are written no more, since something is wrong"),
    "locks.taken_over": Event("Locks Taken Over", "leases taken from holders that had not renewed them"),
    "locks.lost": Event("Locks Lost", "leases that somebody else had when they were to be released"),
    "locks.release_failed": Event("Lock Releases Failed", "leases that stay until they are taken over"),
    "locks.outcome_unknown": Event("Lock Swaps of Unknown Outcome", "swaps of leases whose answer was lost"),
    "sweeper.removed": Event("Expired Records Removed", "records that the sweeper has removed"),
    "sweeper.unreadable": Event("Unreadable Records Swept By", "records that the sweeper left as they are"),
    "slates.committed": Event("Slates Committed", "edits of slates' documents that met no other change"),
    "slates.merged": Event("Slates Merged", "edits of slates' documents that took in what others had changed"),
    "slates.conflicts": Event("Slate Conflicts", "edits that others' changes made impossible"),
    "tokens.issued": Event("Tokens Issued", "login tokens that were given out"),
    "tokens.renewed": Event("Tokens Renewed", "login tokens whose end was put off"),
    "tokens.revoked": Event("Tokens Revoked", "login tokens that were ended together"),
    "confirmations.claimed": Event("Confirmations Claimed", "confirmations that were given"),
    "confirmations.cancelled": Event("Confirmations Cancelled", "confirmations that were declined"),
    "fanout.pushed": Event("Messages Pushed", "messages that queues took"),
    "fanout.acknowledged": Event("Messages Acknowledged", "messages that consumers were done with"),
    "fanout.retries": Event("Messages Retried", "messages that consumers put off after an error"),
    "fanout.dead_letters": Event("Dead Letters", "messages that consumers gave up"),
    "fanout.missed": Event("Messages Missed", "messages that were gone before a consumer came to them"),
    "fanout.taken_over": Event("Consumers Taken Over", "leases of consumers that stood still, taken by another"),
    "fanout.lease_lost": Event("Consumer Leases Lost", "leases that a consumer found taken by another"),
    "fanout.refused": Event("Messages Refused", "messages that a full queue did not take"),
    "fanout.forgotten": Event("Messages Forgotten", "messages that a full queue dropped unread for new ones"),
    "fanout.contention": Event("Queue Numbers Contended", "numbers that another producer took first"),
    "fanout.outcome_unknown": Event("Pushes of Unknown Outcome", "appends whose answer was lost, then read back"),
    "fanout.behind_floor": Event("Pushes Behind the Floor", "appends that came too late, and were made anew"),
    "fanout.gaps": Event("Messages Missing", "numbers without a message that consumers passed over"),
    "events.lost": Event("Events Lost", "events that an outage kept from being published"),
    "mails.pushed": Event("Mails Queued", "mails that were put into a queue"),
    "mails.refused": Event("Mails Refused", "mails that a queue did not take"),
    "mails.redelivered": Event("Mails Redelivered", "mails that were delivered again"),
    "server.connections_refused": Event("Connections Refused", "connections that the server had no room for"),
    "server.connections_aborted": Event("Connections Aborted", "connections that the server broke off"),
    "server.requests_forbidden": Event("Requests Forbidden", "requests that the server's mask forbids"),
    "server.requests_malformed": Event("Requests Malformed", "requests that are not the protocol"),
    "server.batches_repeated": Event("Batches Repeated", "batches carried out one by one, as one request failed"),
    "server.store_failed": Event("Store Failures", "times that the store behind the server failed"),
    "server.tls_failed": Event("TLS Failures", "handshakes that failed at the server"),
}

#: What people call the gauges of a pool of connections.
GAUGES: Final = {
    "open": Event("Connections Open", "connections to the server that there are"),
    "idle": Event("Connections Idle", "of these, those that wait to be used"),
    "size": Event("Pool Size", "connections that there may be"),
    "waiting": Event("Threads Waiting", "threads that wait for a connection to come free"),
}


# -- cells: what one thread has counted of one kind of operation on one server, as one list of numbers

_HITS, _MISSES, _ERRORS, _SENT, _RECEIVED, _RETRIES, _TOTAL, _LONGEST, _HEADER = range(9)

# Behind that, a histogram of the latency, as HdrHistogram's: eight buckets to each power of two nanoseconds, so that
# the middle of a bucket is off by at most a sixteenth.
_FIRST_BITS, _LAST_BITS = 9, 37
_FASTEST: Final = 1 << _FIRST_BITS - 1
_SLOWEST: Final = (1 << _LAST_BITS) - 1
#: What the formula in `Statistics.operation` answers for `_FASTEST`, less where it belongs.
_OFFSET: Final = (_FIRST_BITS << 3) + 8 - _HEADER
_WIDTH: Final = _HEADER + 8 * (_LAST_BITS - _FIRST_BITS + 1)

_Cells = dict[tuple[str, str], list[int]]


def _sum_of(cells: Iterable[list[int]]) -> list[int]:
    found = list(cells)
    if not found:
        return [0] * _WIDTH
    total = list(map(sum, zip(*found, strict=True)))
    total[_LONGEST] = max(cell[_LONGEST] for cell in found)
    return total


class Totals:
    """What operations of some kinds, on some servers, have come to in all threads."""

    def __init__(self, cell: list[int]) -> None:
        self.hits, self.misses, self.errors, self.sent, self.received, self.retries = cell[:_TOTAL]
        #: How long all took together, and the longest, in seconds.
        self.seconds, self.longest = cell[_TOTAL] / 1e9, cell[_LONGEST] / 1e9
        self._buckets = cell[_HEADER:]
        #: How many there were, the failed ones included.
        self.count = sum(self._buckets)

    def quantile(self, share: float) -> float:
        """So many seconds is what ``share`` (0.99, say) of the operations took at most, off by 7 % or less."""
        rank = max(1, math.ceil(share * self.count))
        for number, n in enumerate(self._buckets):
            rank -= n
            if rank <= 0:
                octave, eighth = divmod(number, 8)
                return min((17 + 2 * eighth << octave + _FIRST_BITS - 5) / 1e9, self.longest)
        return 0.0

    def cumulative(self, first_bits: int = 14, last_bits: int = 34) -> Iterator[tuple[float, int]]:
        """For powers of two nanoseconds: that many seconds, and how many operations took less."""
        for bits in range(first_bits, last_bits + 1):
            yield (1 << bits) / 1e9, sum(self._buckets[: 8 * (bits + 1 - _FIRST_BITS)])


# -- threads


class _Life:
    """Lives as long as the thread."""


class _Thread(threading.local):
    """What one thread has counted."""

    def __init__(self, enter: Callable[[_Entry], object]) -> None:
        # Called anew in each thread that meets this object.
        self.counts: dict[str, int] = {}
        self.operations: _Cells = {}
        self._life = _Life()
        enter(_Entry(weakref.ref(self._life), self.counts, self.operations))


class _Entry(NamedTuple):
    """A thread's numbers, as others see them."""

    #: ``None`` once the thread has ended: then nobody writes any more.
    life: Callable[[], object]
    counts: dict[str, int]
    operations: _Cells


def _cells_of(entries: Iterable[_Entry]) -> dict[tuple[str, str], list[list[int]]]:
    together: dict[tuple[str, str], list[list[int]]] = {}
    for entry in entries:
        for key, cell in entry.operations.copy().items():
            together.setdefault(key, []).append(cell)
    return together


def _counts_of(entries: Iterable[_Entry]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in entries:
        for name, n in entry.counts.copy().items():
            counts[name] = counts.get(name, 0) + n
    return counts


class Statistics(observe.Listener):
    """A listener that adds up, and the namespace that shows it."""

    clock = staticmethod(perf_counter_ns)

    def __init__(self) -> None:
        #: An operation of more nanoseconds than this is listed as slow.
        self.slow = int(SLOW * 1e9)
        self.namespace: dict[str, Any] = {"Enabled": True}
        self.begin()

    def begin(self) -> None:
        """Begin anew, with nothing counted; no other thread may be counting."""
        self._lock = threading.Lock()
        self._started = time.monotonic()
        #: First what threads that have ended have counted. Others only append; whoever has the lock may replace.
        self._entries = [_Entry(lambda: self, {}, {})]
        self._fold_at = 32
        self._thread = _Thread(self._enter)
        self._numbers = numbers(1)
        self._servers: dict[str, Any] = {}
        self._kinds: dict[str, Any] = {}
        self._slow: dict[int, Any] = {}
        # The same dictionary as before, since others may have it.
        enabled = self.namespace.get("Enabled")
        self.namespace.clear()
        self.namespace.update({"Enabled": enabled, "Start Time": time.time(), **self._scalars()})
        self.namespace.update({"Operations": self._kinds, "Servers": self._servers, "Slow Operations": self._slow})

    # -- counting

    def count(self, name: str, n: int = 1) -> None:
        if not self.namespace.get("Enabled"):
            return
        counts = self._thread.counts
        try:
            counts[name] += n
        except KeyError:
            counts[name] = n
            if name not in EVENTS:
                self.namespace.setdefault(name, partial(self._event, name))

    def operation(
        self,
        server: str,
        kind: str,
        began: int,
        hits: int = 0,
        misses: int = 0,
        sent: int = 0,
        received: int = 0,
        retries: int = 0,
        failed: bool = False,
    ) -> None:
        elapsed = perf_counter_ns() - began
        if not self.namespace.get("Enabled"):
            return
        try:
            cell = self._thread.operations[server, kind]
        except KeyError:
            cell = self._open(server, kind)
        # Nothing between reading a number and writing it gives way to another thread's code in this thread's place.
        within = elapsed if _FASTEST <= elapsed <= _SLOWEST else min(max(elapsed, _FASTEST), _SLOWEST)
        bits = within.bit_length()
        cell[(bits << 3) + (within >> bits - 4) - _OFFSET] += 1
        cell[_TOTAL] += elapsed
        if elapsed > cell[_LONGEST]:
            cell[_LONGEST] = elapsed
        if hits:
            cell[_HITS] += hits
        if misses:
            cell[_MISSES] += misses
        if sent:
            cell[_SENT] += sent
            cell[_RECEIVED] += received
        if retries:
            cell[_RETRIES] += retries
        if failed:
            cell[_ERRORS] += 1
        if elapsed > self.slow and kind not in _PATIENT:
            self._note(server, kind, elapsed, failed)

    def _open(self, server: str, kind: str) -> list[int]:
        """This thread's cell, made if need be."""
        servers, kinds = self._servers, self._kinds
        if server not in servers and len(servers) >= LIMIT:
            server = OTHER
        if kind not in kinds and len(kinds) >= LIMIT:
            kind = OTHER
        if server not in servers:
            servers.setdefault(server, self._server(server))
        if kind not in kinds:
            kinds.setdefault(kind, self._kind(kind))
        return self._thread.operations.setdefault((server, kind), [0] * _WIDTH)

    def _note(self, server: str, kind: str, elapsed: int, failed: bool) -> None:
        number = next(self._numbers)
        self._slow[number] = {
            "When": time.time(),
            "Server": server,
            "Kind": kind,
            "Seconds": round(elapsed / 1e9, 6),
            "Failed": failed,
        }
        self._slow.pop(number - SLOW_KEPT, None)

    def _enter(self, entry: _Entry) -> None:
        self._entries.append(entry)
        # Where threads come and go and nobody asks.
        if len(self._entries) > self._fold_at:
            self._fold()

    # -- adding up

    def _fold(self) -> None:
        """Add up what threads that have ended have counted, unless that is under way."""
        if not self._lock.acquire(blocking=False):
            return
        try:
            known = self._entries.copy()
            past = known[:1]
            living: list[_Entry] = []
            for entry in known[1:]:
                (past if entry.life() is None else living).append(entry)
            if len(past) > 1:
                together = _Entry(known[0].life, _counts_of(past), {k: _sum_of(c) for k, c in _cells_of(past).items()})
                # In one go, so that whoever reads meanwhile finds each number once. What is behind is new.
                self._entries[: len(known)] = [together, *living]
            self._fold_at = 32 + 2 * len(living)
        finally:
            self._lock.release()

    def _all(self) -> list[_Entry]:
        """What has been counted, each number in one place only."""
        self._fold()
        return self._entries.copy()

    def total(self, server: str | None = None, kind: str | None = None) -> Totals:
        """What the operations of ``kind`` on ``server`` have come to; None: of all but `CONNECT`, on all servers."""
        return Totals(
            _sum_of(
                cell
                for (of_server, of_kind), cells in _cells_of(self._all()).items()
                if server in (None, of_server) and (of_kind != CONNECT if kind is None else of_kind == kind)
                for cell in cells
            )
        )

    def totals(self) -> dict[tuple[str, str], Totals]:
        """The same for each server and kind."""
        return {key: Totals(_sum_of(cells)) for key, cells in sorted(_cells_of(self._all()).items())}

    def events(self) -> dict[str, int]:
        """How often each event has happened, those of `EVENTS` in any case, by their names in `observe`."""
        return {**dict.fromkeys(EVENTS, 0), **_counts_of(self._all())}

    def gauges(self) -> dict[str, dict[str, int]]:
        """What can be asked for its present state, added up for each server."""
        found: dict[str, dict[str, int]] = {}
        for reference in observe.watched.valuerefs():
            source = reference()
            if source is not None:
                sums = found.setdefault(source.name, {})
                for name, n in source.gauges().items():
                    sums[name] = sums.get(name, 0) + n
        return found

    def _event(self, name: str, _: Any = None) -> int:
        return sum(entry.counts.get(name, 0) for entry in self._all())

    # -- the namespace

    def _of(
        self, figure: Callable[[Totals], float], server: str | None = None, kind: str | None = None
    ) -> Callable[[Any], float]:
        return lambda _: figure(self.total(server, kind))

    def _scalars(self) -> dict[str, Any]:
        of = self._of
        return {
            "Process ID": os.getpid(),
            "Uptime (Seconds)": lambda _: self._uptime(),
            "Slow Threshold (Seconds)": lambda _: self.slow / 1e9,
            "Total Operations": of(lambda total: total.count),
            "Operations/Second": of(lambda total: round(total.count / self._uptime(), 3)),
            "Hits": of(lambda total: total.hits),
            "Misses": of(lambda total: total.misses),
            "Hit Ratio": of(lambda total: round(total.hits / max(1, total.hits + total.misses), 4)),
            "Errors": of(lambda total: total.errors),
            "Bytes Sent": of(lambda total: total.sent),
            "Bytes Received": of(lambda total: total.received),
            **{event.name: partial(self._event, name) for name, event in EVENTS.items()},
        }

    def _uptime(self) -> float:
        return max(0.001, round(time.monotonic() - self._started, 3))

    def _kind(self, kind: str) -> dict[str, Any]:
        of = partial(self._of, kind=kind)
        return {
            "Count": of(lambda total: total.count),
            "Hits": of(lambda total: total.hits),
            "Misses": of(lambda total: total.misses),
            "Errors": of(lambda total: total.errors),
            "p50 (ms)": of(lambda total: round(1000 * total.quantile(0.5), 4)),
            "p90 (ms)": of(lambda total: round(1000 * total.quantile(0.9), 4)),
            "p99 (ms)": of(lambda total: round(1000 * total.quantile(0.99), 4)),
            "Max (ms)": of(lambda total: round(1000 * total.longest, 4)),
            "Bytes Sent": of(lambda total: total.sent),
            "Bytes Received": of(lambda total: total.received),
        }

    def _server(self, server: str) -> dict[str, Any]:
        of = partial(self._of, server=server)
        record: dict[str, Any] = {
            "Operations": of(lambda total: total.count),
            "Errors": of(lambda total: total.errors),
            "Retries": of(lambda total: total.retries),
            "Bytes Sent": of(lambda total: total.sent),
            "Bytes Received": of(lambda total: total.received),
        }
        if server in self.gauges():
            record["Connections Opened"] = of(lambda total: total.count - total.errors, kind=CONNECT)
            for name, gauge in GAUGES.items():
                record[gauge.name] = partial(self._gauge, server, name)
        return record

    def _gauge(self, server: str, name: str, _: Any = None) -> int:
        return self.gauges().get(server, {}).get(name, 0)


#: This process's. Nobody tells it anything before `install`.
own: Final = Statistics()
os.register_at_fork(after_in_child=own.begin)


def install(*, slow: float = SLOW) -> Statistics:
    """Count from now on, and show it in ``logging.statistics[NAMESPACE]``. Doing so again changes nothing but ``slow``.

    Takes the place of `observe.listener`. A child after a fork counts as well, from 0.

    :param slow: an operation that takes more than so many seconds is listed among the slow ones.
    :return: what counts, for who wants more than the namespace has.
    """
    own.slow = int(slow * 1e9)
    vars(logging).setdefault("statistics", {})[NAMESPACE] = own.namespace
    if observe.listener is not own:
        own.begin()
        observe.listener = own
    return own


def snapshot() -> dict[str, Any]:
    """Our own namespace, extrapolated, of nothing but what JSON has; as it is before `install`, too."""
    namespace: dict[str, Any] = jsonable(extrapolate_statistics(own.namespace))
    return namespace


# -- anybody's statistics


def extrapolate_statistics(scope: Mapping[Any, Any]) -> dict[Any, Any]:
    """A deep copy of statistics in which each function has been called with the dictionary that it is in.

    Statistics may change meanwhile. In place of what raises there is its error, as text: whoever reports can do nothing
    about the others' mistakes. ``"..."`` stands for what contains itself, and for what is deeper than `_DEEPEST` or
    more than `_MOST` members.

    :param scope: ``logging.statistics``, or a part of it.
    """

    def called(value: Any, scope: Any) -> Any:
        return value(scope) if callable(value) else value

    return _Copy(called, lambda name: name, (list, tuple)).of_members(scope)


def jsonable(value: Any) -> Any:
    """``value``, or what comes nearest to it that JSON has; no more of it than `extrapolate_statistics` takes."""
    return _Copy(_jsonable, _text, (list, tuple, set, frozenset)).of(value, None)


class _Copy:
    """One deep copy of what others have made, which comes to an end whatever that is."""

    def __init__(self, leaf: Callable[[Any, Any], Any], name: Callable[[Any], Any], lists: tuple[type, ...]) -> None:
        """
        :param leaf: makes what is to stand for a value that is no collection, of it and the dictionary that it is in.
        :param name: makes what is to stand for a key.
        :param lists: what becomes a list.
        """
        self._leaf = leaf
        self._name = name
        self._lists = lists
        self._left = _MOST
        #: The ids of the collections that contain what is being copied.
        self._path: list[int] = []

    def of(self, value: Any, scope: Any) -> Any:
        try:
            if isinstance(value, dict):
                return self._within(value, partial(self.of_members, value))
            if isinstance(value, self._lists):
                return self._within(value, partial(self._of_list, value, scope))
            return self._leaf(value, scope)
        except _MISTAKES as error:
            return _described(error)

    def _within(self, collection: Any, copy: Callable[[], Any]) -> Any:
        if len(self._path) > _DEEPEST or id(collection) in self._path:
            return _MORE
        self._path.append(id(collection))
        try:
            return copy()
        finally:
            self._path.pop()

    def of_members(self, scope: Mapping[Any, Any]) -> dict[Any, Any]:
        copy: dict[Any, Any] = {}
        for name, member in _copied(dict, scope).items():
            if not self._left:
                copy[_MORE] = _MORE
                break
            self._left -= 1
            copy[self._name(name)] = self.of(member, scope)
        return copy

    def _of_list(self, members: Any, scope: Any) -> list[Any]:
        copy: list[Any] = []
        for member in _copied(lambda members: list(islice(members, _MOST)), members):
            if not self._left:
                copy.append(_MORE)
                break
            self._left -= 1
            copy.append(self.of(member, scope))
        return copy


def _copied(copy: Callable[[Any], Any], value: Any) -> Any:
    """A shallow copy, of a dictionary in one go; of what iterates in Python, when nobody changes it just then."""
    for _ in range(100):
        try:
            return copy(value)
        except RuntimeError:
            continue
    return copy(value)


def _jsonable(value: Any, _scope: Any) -> Any:
    if value is None or (isinstance(value, int) and value.bit_length() < 1024):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value)


def _text(value: Any) -> str:
    try:
        return str(value)
    except _MISTAKES as error:
        return _described(error)


def _described(error: BaseException) -> str:
    try:
        return f"{type(error).__name__}: {error}"
    except _MISTAKES:  # it cannot be shown
        return type(error).__name__
