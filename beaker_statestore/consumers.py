"""A consumer of a queue: a cursor of its own, which its processes share by a lease, retries, and dead letters.

A cursor is a document, ``consumer=<name>``::

    {"next": 17, "enrolment": "<random token>", "owner": "<random token>", "lease": 30.0, "beat": 42,
     "tries": 1, "error": "...", "missed": 0, "again": [], "at": ...}

Whoever has its own token there is the holder; every change is a compare-and-swap that expects it to be there still. So
one that has lost the lease can change nothing any more, however late it wakes up. Others stand by: when the record has
stood unchanged for the length of the holder's lease by their own monotonic clock, they put their token there (as in
`beaker_statestore.locks`). A cursor of another ``enrolment`` than the queue's head has is one of a consumer that was
forgotten, and void. ``beat`` makes each version of the record another one; ``at`` is for people only.

It must not know any framework or engine.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import takewhile
from types import TracebackType
from typing import Final, Literal, TypeAlias
from weakref import WeakSet

from beaker_statestore import observe
from beaker_statestore.deadletters import DeadLetters
from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.queuelog import QueueLog
from beaker_statestore.queuerecords import Cursor, DeadLetter, Entry, Message, is_number, time_of, valid_name, whole

__all__ = ["Consumer", "LeaseLost", "Start"]

log = logging.getLogger(__name__)

Start: TypeAlias = int | Literal["now", "beginning"]

#: A wait is cut into pieces of so many seconds; in between, one looks at the cursor, and whether one was stopped.
SLICE: Final = 1.0
#: Of a lease: the holder writes at least so often.
BEATS: Final = 3
#: How often one who finds nothing looks whether there is something behind a gap, in seconds.
FAR_LOOK: Final = 10.0
#: How many messages are read at once, at first and at least.
FEW: Final = 8
#: How many bytes of messages are read ahead, more or less.
READ_AHEAD: Final = 4 * 1024 * 1024
#: How much of an error is kept, in characters.
ERROR_LENGTH: Final = 1000
#: The most dead letters of one consumer. Then it stands still until somebody has looked.
MAX_DEAD: Final = 10_000
#: They are counted when there are so many more, as that takes a scan.
UNCOUNTED: Final = 100
#: How long `Consumer.__iter__` pauses when the store fails, in seconds.
PAUSE: Final = 1.0


class LeaseLost(StateStoreError):  # noqa: N818 - what happened, and often nobody's fault
    """Another process has taken over meanwhile, and will handle the message (again); nothing was changed.

    Or the consumer was forgotten, or the store has lost records; then it begins anew.
    """


@dataclass(slots=True)
class _Holding:
    """The lease, while this object has it."""

    token: str
    cursor: Cursor
    #: The record as last written or read.
    stored: bytes | None
    #: When it was last written, on the monotonic clock.
    since: float
    #: Behind the highest number that has been acknowledged, whether the record says so or that was lost.
    acknowledged: int = 0


@dataclass(slots=True)
class _Seen:
    """Somebody else's lease."""

    record: bytes | None
    #: Since when it has been the same, and when that was last seen, on the monotonic clock.
    since: float
    looked: float
    #: It was not looked at for so long that an outage may have kept its holder from writing.
    pardoned: bool = False


class Consumer:
    """One who gets every message of a queue, in order, at least once. Made by `Queue.consumer`.

    Objects of the same queue and name, in any process, share one cursor: one of them has the lease and gets messages,
    the others stand by. One object is meant for one thread, as to acknowledge a message is to acknowledge all before
    it; `stop` and `close` may be called from any. A child of a fork has none of its parent's leases.
    """

    def __init__(
        self,
        queue: QueueLog,
        name: str,
        *,
        start: Start = "now",
        lease: float = 30.0,
        retries: int = 8,
        backoff: float = 1.0,
        longest_backoff: float = 300.0,
        prefetch: int = 100,
    ) -> None:
        for option, value in (("lease", lease), ("backoff", backoff), ("longest_backoff", longest_backoff)):
            if type(value) not in (int, float) or not 0 < value < float("inf"):
                raise ConfigurationError(f"{option} is {value!r}: give a number of seconds above 0")
        self.name = valid_name(name, "consumer")
        self._queue = queue
        self._lease = lease
        self._retries = whole(retries, "retries", 0)
        self._backoff = backoff
        self._longest_backoff = longest_backoff
        self._prefetch = whole(prefetch, "prefetch")
        self._dead = DeadLetters(queue, self.name)
        self._key = f"consumer={self.name}"
        self._record = queue.documents.records.record(self._key)
        self._holding: _Holding | None
        self._seen: _Seen | None
        self._position = 0
        #: Of the message before the position, if that has been read.
        self._token: str | None = None
        self._ahead: deque[Entry] = deque()
        self._count = min(FEW, prefetch)
        self._far_at = 0.0
        #: Up to this number, what was missed has been counted.
        self._counted = 0
        #: So many more dead letters may be made before they are counted.
        self._room = 0
        self._not_before = 0.0
        self._setbacks = 0
        self._begin_process()
        queue.enrol(self.name, self._number(start))
        _consumers.add(self)

    def _begin_process(self) -> None:
        """What belongs to one process; after a fork it may be held by threads that the child does not have."""
        self._holding = self._seen = None
        #: The token for the next lease. It stays until we have that: a bid may be carried out long after its answer
        #: was lost, and is to be known again then.
        self._bid = secrets.token_hex(16)
        self._ahead.clear()
        self._stopped = threading.Event()
        self._lock = threading.RLock()
        self._running = threading.Lock()

    def _number(self, start: Start) -> int | None:
        """None: the floor."""
        if start == "now":
            return self._queue.end()
        if start == "beginning":
            return None
        if not is_number(start):
            raise ConfigurationError(f"start is {start!r}: write 'now', 'beginning' or a number from 1 on")
        return min(start, self._queue.end())

    @property
    def missed(self) -> int:
        """How many messages were gone before this consumer had seen them: forgotten, or lost by damage."""
        holding = self._holding
        return 0 if holding is None else holding.cursor.missed

    # -- messages

    def receive(self, timeout: float) -> Message | None:
        """The next message; None if there is none within ``timeout`` seconds, or after `stop`.

        Several may be received before one is acknowledged.

        :raises StoreUnavailable: the store failed. Just call it again.
        """
        deadline = time.monotonic() + timeout
        while not self._stopped.is_set():
            with self._lock:
                try:
                    found = self._look()
                except LeaseLost as error:
                    log.warning("%s", error)
                    continue
                position = self._position
            if isinstance(found, Message):
                return found
            left = min(deadline - time.monotonic(), self._lease / BEATS, SLICE)
            if left <= 0:
                return None
            if found is None:
                self._queue.wait(position, left)
            else:
                self._stopped.wait(min(left, found))
        return None

    def _look(self) -> Message | float | None:
        """A message, or how many seconds to wait, or None to wait for the message at the position."""
        while True:
            if self._holding is None and not self._take():
                return SLICE
            holding = self._held()
            if time.monotonic() - holding.since > self._lease / BEATS:
                self._change(lambda cursor: cursor)
            if holding.cursor.again:
                if (message := self._again(holding.cursor.again[0])) is not None:
                    return message
                continue
            if (left := self._not_before - time.monotonic()) > 0:
                return left
            if not self._ahead and not self._fetch():
                return None
            if not self._ahead:
                continue
            if self._ahead[0].is_tombstone:
                missing = list(takewhile(lambda entry: entry.is_tombstone, self._ahead))
                self._pass_over(missing[-1].number + 1, "are missing in the store")
                for _ in missing:
                    self._ahead.popleft()
                continue
            entry = self._ahead.popleft()
            self._position, self._token = entry.number + 1, entry.token
            cursor = holding.cursor
            tries = cursor.tries if entry.number == cursor.next else 0
            if entry.document is not None and tries <= self._retries:
                return Message.of(entry, tries + 1, holding.token)
            self._bury(entry, tries)

    def acknowledge(self, message: Message) -> None:
        """It is handled, and so are all before it: none of them comes again.

        :raises LeaseLost: another process has the lease; the message comes to it.
        :raises StoreUnavailable: the store failed, and if this process ends before it could say so again, the message
            comes again.
        """
        with self._lock:
            holding = self._of(message)
            if message.redelivered:
                self._dead.discard(message.number)
            elif message.number >= holding.cursor.next:
                self._setbacks = 0
                holding.acknowledged = max(holding.acknowledged, message.number + 1)
                self._change(lambda cursor: cursor)
            observe.count("fanout.acknowledged")

    def retry(self, message: Message, error: object) -> None:
        """It could not be handled: deliver it again after a pause, and nothing else before. All before it are handled.

        The pauses grow from ``backoff`` to ``longest_backoff`` seconds. A message that has failed ``retries`` times and
        once more goes to the dead letters; a dead letter that was delivered once more stays one. What has been
        acknowledged, itself or by a later one, counts as handled, and nothing is done.

        :param error: what went wrong. A `StoreUnavailable` is not the message's fault, so it is not counted.
        :raises LeaseLost: another process has the lease; the message comes to it.
        :raises StoreUnavailable: the store failed; the message comes again all the same.
        """
        text = _text(error)
        with self._lock:
            if self._is_done(message):
                return
            if message.redelivered:
                letter = self._dead.get(message.number)
                if letter is not None:
                    self._dead.put(replace(letter, error=text, tries=letter.tries + 1, at=time.time()))
                return
            observe.count("fanout.retries")
            log.warning("%s failed with message %d (%d): %s", self, message.number, message.attempt, text)
            self._setbacks += 1
            self._return_to(message.number)
            self._not_before = time.monotonic() + self._pause(self._setbacks)
            counted = not isinstance(error, StoreUnavailable)

            def failed(cursor: Cursor) -> Cursor:
                there = cursor.moved(message.number)
                return replace(there, tries=there.tries + counted, error=text)

            cursor = self._change(failed)
            if cursor.tries > self._retries:
                self._not_before = 0.0

    def give_up(self, message: Message, error: object) -> None:
        """It cannot be handled, now or later: make it a dead letter at once. All before it are handled.

        :raises LeaseLost: another process has the lease; the message comes to it.
        :raises StoreUnavailable: the store failed; the message comes again all the same.
        """
        if message.redelivered:
            self.retry(message, error)
            return
        with self._lock:
            if self._is_done(message):
                return
            self._return_to(message.number)
            self._change(lambda cursor: replace(cursor.moved(message.number), error=_text(error)))
            self._bury(Entry(message.number, {"body": message.body, "at": message.pushed_at}), message.attempt)

    def extend(self) -> None:
        """Keep the lease for its whole length from now on. For whoever handles a message for longer.

        :raises LeaseLost: it is too late.
        """
        with self._lock:
            self._held()
            self._change(lambda cursor: cursor)

    def __iter__(self) -> Iterator[Message]:
        """All messages, waiting for them until `stop` or `close`. When the store fails, it tries again."""
        while not self._stopped.is_set():
            try:
                message = self.receive(SLICE)
            except StoreUnavailable as error:
                log.warning("%s waits for the store: %s", self, error)
                self._stopped.wait(PAUSE)
                continue
            if message is not None:
                yield message

    def run(self, handler: Callable[[Message], object]) -> None:
        """Call ``handler`` with each message until `stop`, and acknowledge it; if it raises, `retry` it.

        :raises ConfigurationError: it runs already, in another thread.
        """
        if not self._running.acquire(blocking=False):
            raise ConfigurationError(
                f"{self} runs already; one object is for one thread, so let each have its own, by queue.consumer()"
            )
        try:
            self._run(handler)
        finally:
            self._running.release()

    def _run(self, handler: Callable[[Message], object]) -> None:
        for message in self:
            try:
                try:
                    handler(message)
                except Exception as error:  # noqa: BLE001 - whatever it is, the message was not handled
                    self.retry(message, error)
                else:
                    self.acknowledge(message)
            except (LeaseLost, StoreUnavailable) as error:
                log.warning("message %d may come again: %s", message.number, error)

    def stop(self) -> None:
        """End `receive` and iterations; what has been received can be acknowledged until `close`."""
        self._stopped.set()

    def close(self) -> None:
        """`stop`, and give the lease up, so that another goes on within about a second, if not at once.

        Never raises for a store that fails.
        """
        self._close(None)

    def _close(self, failure: str | None) -> None:
        """:param failure: why the first message in hand, if there is one, could not be handled; None: it is none."""
        self.stop()

        def given_up(cursor: Cursor) -> Cursor:
            if failure is not None and self._position > cursor.next:
                cursor = replace(cursor, tries=cursor.tries + 1, error=failure)
            return replace(cursor, owner=None)

        with self._lock:
            if self._holding is None:
                return
            try:
                self._change(given_up)
            except (LeaseLost, StoreUnavailable) as error:
                log.warning("%s could not give up its lease, which stands for up to %g s: %s", self, self._lease, error)
            self._forget_holding()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """`close`. An error that ends the block counts as a failure of the first message that was not acknowledged."""
        counts = isinstance(error, Exception) and not isinstance(error, (LeaseLost, StoreUnavailable))
        self._close(_text(error) if counts else None)

    def __str__(self) -> str:
        return f"the consumer {self.name} of the queue {self._queue.name}"

    # -- what is ahead

    def _fetch(self) -> bool:
        """Read what comes next; False: there is nothing (yet). Afterwards there may be nothing, too, and more to do."""
        holding = self._held()
        far = time.monotonic() >= self._far_at
        page = self._queue.read(self._position, self._count, beside=self._record, far=far)
        enrolment = page.head.consumers.get(self.name)
        if enrolment is None or enrolment.token != holding.cursor.enrolment:
            self._change(lambda cursor: replace(cursor, owner=None))
            self._forget_holding()
            raise LeaseLost(f"{self} was forgotten while it ran")
        if page.beside != holding.stored:
            self._change(lambda cursor: cursor)  # to see what it is; perhaps the lease is gone
            return True
        if page.head.floor > self._position:
            self._pass_over(page.head.floor, "were forgotten before it had seen them")
            return True
        if page.is_torn or (self._token is not None and page.token_before not in (None, self._token)):
            self._turn_back(page.is_torn)
            return True
        if not page.entries:
            if far:
                self._far_at = time.monotonic() + FAR_LOOK
            return False
        largest = max(entry.size for entry in page.entries)
        more = self._count * 2 if len(page.entries) == self._count else len(page.entries) * 2
        self._count = max(1, min(max(more, FEW), self._prefetch, READ_AHEAD // max(1, largest)))
        self._ahead.extend(page.entries)
        return True

    def _turn_back(self, only_gone: bool) -> None:
        """The message before the position is gone, and the floor is not above it; or there is another."""
        end, floor = self._queue.end(), self._queue.head().floor
        if floor >= self._position:
            return  # a trimmer was there
        if only_gone and end >= self._position:
            # So that nobody writes where we have been.
            if not self._queue.add_tombstone(self._position - 1):
                self._return_to(self._position - 1)
            return
        # Whoever pushes now does so behind us. What was received is worth no acknowledgement any more.
        self._held().acknowledged = 0
        self._change(lambda cursor: replace(cursor, next=floor, tries=0, error=None, owner=None))
        observe.count("fanout.gaps")
        log.error(
            "the store has lost records: %s was at message %d, and the queue ends at %d; it goes on at the oldest, %d",
            self,
            self._position,
            end,
            floor,
        )
        self._counted = 0
        self._forget_holding()
        raise LeaseLost(f"{self} begins anew at message {floor}")

    def _pass_over(self, number: int, what: str) -> None:
        """Go on at ``number``."""
        first = self._position
        lost = max(0, number - max(first, self._counted))
        self._change(lambda cursor: replace(cursor.passed(first, number), missed=cursor.missed + lost))
        log.error("%s goes on at message %d: %d %s", self, number, number - first, what)
        observe.count("fanout.missed", lost)
        self._counted = max(self._counted, number)
        self._position, self._token = number, None

    def _again(self, number: int) -> Message | None:
        """A dead letter that is to be delivered once more."""
        # First, so that one that ends this process does not end every process after it.
        cursor = self._change(lambda cursor: replace(cursor, again=[n for n in cursor.again if n != number]))
        letter = self._dead.get(number)
        if letter is None or letter.damaged:
            return None
        lease = cursor.owner or ""
        return Message(number, letter.body, letter.pushed_at, letter.tries + 1, redelivered=True, lease=lease)

    def _bury(self, entry: Entry, tries: int) -> None:
        """Make a dead letter of a message, and go on behind it."""
        if not self._has_room():
            log.error("%s has %d dead letters, and stands still until some are gone", self, MAX_DEAD)
            self._return_to(entry.number)
            self._not_before = time.monotonic() + self._longest_backoff
            return
        error = f"damaged: {entry.damage}" if entry.document is None else self._held().cursor.error
        document = entry.document or {}
        letter = DeadLetter(
            number=entry.number,
            body=document.get("body"),
            pushed_at=time_of(document.get("at")),
            error=_text(error or "the process ended, or took longer than its lease"),
            tries=tries,
            at=time.time(),
            damaged=entry.document is None,
        )
        self._return_to(entry.number)
        self._dead.put(letter)
        self._change(lambda cursor: cursor.passed(entry.number, entry.number + 1))
        self._position = entry.number + 1
        self._room -= 1
        self._setbacks = 0
        observe.count("fanout.dead_letters")
        log.error("%s gave up message %d after %d tries: %s", self, entry.number, tries, letter.error)

    def _has_room(self) -> bool:
        """Whether there may be one more dead letter."""
        if self._room <= 0:
            try:
                self._room = min(UNCOUNTED, MAX_DEAD - len(self._dead.numbers()))
            except ConfigurationError:  # a store that cannot list its keys
                self._room = UNCOUNTED
        return self._room > 0

    def _return_to(self, number: int) -> None:
        self._position, self._token = number, None
        self._ahead.clear()

    def _pause(self, setbacks: int) -> float:
        return float(min(self._longest_backoff, self._backoff * 2 ** min(setbacks - 1, 60)))

    # -- the lease

    def _take(self) -> bool:
        """Whether the lease could be had."""
        began = time.monotonic()
        stored = self._queue.store.get(self._record)
        cursor = self._decoded(stored)
        if cursor is None or cursor.owner != self._bid:
            if cursor is not None and cursor.owner is not None and not self._stood(stored, cursor.lease):
                return False
            # After the record, so that this is no older.
            enrolment = self._queue.enrol(self.name, None)
            if cursor is None or cursor.enrolment != enrolment.token:
                cursor = Cursor(enrolment.start, enrolment.token)
            elif cursor.owner is not None:
                # Most likely it died or hung while it handled that message, which then has something to do with it.
                observe.count("fanout.taken_over")
                there = bool(self._queue.read(cursor.next, 1).entries)
                cursor = replace(cursor, tries=cursor.tries + there)
            cursor = replace(
                cursor, owner=self._bid, lease=float(self._lease), beat=cursor.beat + 1, at=round(time.time(), 3)
            )
            before, stored = stored, self._encoded(cursor)
            try:
                taken = self._queue.store.compare_and_swap(self._record, before, stored)
            except OutcomeUnknown:
                taken = self._queue.store.get(self._record) == stored
            if not taken:
                return False
        self._holding = _Holding(self._bid, cursor, stored, began)
        self._bid = secrets.token_hex(16)
        self._return_to(cursor.next)
        self._setbacks = cursor.tries
        self._not_before = began + self._pause(self._setbacks) if self._setbacks else 0.0
        return True

    def _stood(self, current: bytes | None, lease: float) -> bool:
        """Whether the record has been the same for the length of its holder's lease."""
        now = time.monotonic()
        seen = self._seen
        if seen is None or seen.record != current:
            seen = self._seen = _Seen(current, now, now)
        elif now - seen.looked > 2 * lease / BEATS and not seen.pardoned:
            # Once: a second time it would have written, and who looks once a minute shall have the lease some day.
            seen.since, seen.pardoned = now, True
        seen.looked = now
        return now - seen.since >= lease

    def _held(self) -> _Holding:
        """The lease that we have.

        :raises LeaseLost: we have none.
        """
        holding = self._holding
        if holding is None:
            raise LeaseLost(f"{self} has no lease: it was closed, or another has it now")
        return holding

    def _of(self, message: Message) -> _Holding:
        holding = self._held()
        if message.lease != holding.token:
            raise LeaseLost(f"{self} has lost and taken the lease again since it got message {message.number}")
        return holding

    def _is_done(self, message: Message) -> bool:
        """Whether it has been acknowledged, and so have all before it.

        :raises LeaseLost: it was not delivered under the lease that we have.
        """
        holding = self._of(message)
        done = not message.redelivered and message.number < max(holding.cursor.next, holding.acknowledged)
        if done:
            log.warning("%s has acknowledged message %d, or a later one, so it counts as handled", self, message.number)
        return done

    def _change(self, change: Callable[[Cursor], Cursor]) -> Cursor:
        """Change the record, if we have the lease still; what it says now."""
        holding = self._held()
        now = time.monotonic()

        def changed(current: bytes | None) -> bytes:
            cursor = self._decoded(current)
            if cursor is None or cursor.owner != holding.token:
                raise LeaseLost(f"{self} has lost its lease: another has taken over, or it was forgotten")
            cursor = cursor.moved(holding.acknowledged)
            return self._encoded(replace(change(cursor), beat=cursor.beat + 1, at=time.time()))

        try:
            stored = self._queue.store.modify(self._record, changed, known=holding.stored)
        except LeaseLost:
            observe.count("fanout.lease_lost")
            self._forget_holding()
            raise
        cursor = self._decoded(stored)
        if cursor is None:
            raise LeaseLost(f"{self} was forgotten")
        holding.stored, holding.cursor, holding.since = stored, cursor, now
        return cursor

    def _forget_holding(self) -> None:
        self._holding = None
        self._ahead.clear()

    def _decoded(self, data: bytes | None) -> Cursor | None:
        document = self._queue.documents.codec.current(data, self._record)
        return None if document is None else Cursor.of(document)

    def _encoded(self, cursor: Cursor) -> bytes:
        return self._queue.documents.codec.encode(cursor.document, self._record, self._key)


def _text(error: object) -> str:
    """What an error says, as text that can be stored: its words may come from anybody."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - its author's defect, and no reason to stop a consumer
        text = "(it cannot be told)"
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}"
    return text[:ERROR_LENGTH].encode("utf-8", "backslashreplace").decode("utf-8")


_consumers: WeakSet[Consumer] = WeakSet()


def _after_fork_in_child() -> None:
    for consumer in _consumers:
        consumer._begin_process()


os.register_at_fork(after_in_child=_after_fork_in_child)
