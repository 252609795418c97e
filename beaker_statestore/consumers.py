"""A consumer of a queue: a cursor of its own, which its processes share by a lease, retries, and dead letters.

A cursor is a document, ``consumer=<name>``::

    {"next": 17, "owner": "<random token>", "beat": 42, "tries": 1, "error": "...", "missed": 0, "again": [], "at": ...}

Whoever has its own token there is the holder; every change is a compare-and-swap that expects it to be there still. So
one that has lost the lease can change nothing any more, however late it wakes up. Others stand by: when the record has
stood unchanged for the length of the lease by their own monotonic clock, they put their token there (as in
`beaker_statestore.locks`). ``beat`` makes each version of the record another one; ``at`` is for people only.

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
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import Final, Literal, TypeAlias

from beaker_statestore import observe
from beaker_statestore.deadletters import DeadLetters
from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.queuelog import QueueLog
from beaker_statestore.queuerecords import Cursor, DeadLetter, Entry, Message, time_of, valid_name

__all__ = ["Consumer", "LeaseLost", "Start"]

log = logging.getLogger(__name__)

Start: TypeAlias = int | Literal["now", "beginning"]

#: A wait in the store is cut into pieces of so many seconds, so that `Consumer.stop` is heard in between.
SLICE: Final = 1.0
#: Of a lease: the holder writes at least so often, and those who stand by look.
BEATS: Final = 3
#: How many messages are read at once, at first and at least.
FEW: Final = 8
#: How many bytes of messages are read ahead, more or less.
READ_AHEAD: Final = 4 * 1024 * 1024
#: How much of an error is kept, in characters.
ERROR_LENGTH: Final = 1000
#: The most dead letters of one consumer. Then it stands still until somebody has looked.
MAX_DEAD: Final = 10_000
#: How long `Consumer.__iter__` pauses when the store fails, in seconds.
PAUSE: Final = 1.0


class LeaseLost(StateStoreError):  # noqa: N818 - what happened, and often nobody's fault
    """Another process has taken over meanwhile, and will handle the message (again); nothing was changed."""


@dataclass(slots=True)
class _Holding:
    """The lease, while this object has it."""

    token: str
    cursor: Cursor
    #: The record as last written or read.
    stored: bytes | None
    #: When it was last written, on the monotonic clock.
    since: float
    process: int


class Consumer:
    """One who gets every message of a queue, in order, at least once. Made by `Queue.consumer`.

    Objects of the same queue and name, in any process, share one cursor: one of them has the lease and gets messages,
    the others stand by. One object is meant for one thread; `stop` and `close` may be called from any.
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
            if not 0 < value < float("inf"):
                raise ConfigurationError(f"{option} is {value!r}: give a number of seconds above 0")
        if retries < 0 or prefetch < 1:
            raise ConfigurationError(f"retries is {retries} and prefetch {prefetch}: give 0 or more, and 1 or more")
        self.name = valid_name(name, "consumer")
        self._queue = queue
        self._lease = lease
        self._retries = retries
        self._backoff = backoff
        self._longest_backoff = longest_backoff
        self._prefetch = prefetch
        self._dead = DeadLetters(queue, self.name)
        self._key = f"consumer={self.name}"
        self._record = queue.documents.records.record(self._key)
        self._holding: _Holding | None = None
        #: Of somebody else's lease: the record, and since when it has stood so, on the monotonic clock.
        self._seen: tuple[bytes | None, float] = (None, 0.0)
        self._attempt: _Holding | None = None
        self._position = 0
        self._ahead: deque[Entry] = deque()
        self._count = min(FEW, prefetch)
        self._not_before = 0.0
        self._setbacks = 0
        self._stopped = threading.Event()
        self._lock = threading.RLock()
        self._start = self._number(start)
        queue.enrol(self.name, self._start)

    def _number(self, start: Start) -> int | None:
        """None: the floor."""
        if start == "now":
            return self._queue.end()
        if start == "beginning":
            return None
        if not isinstance(start, int) or start < 1:
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
            left = min(deadline - time.monotonic(), self._lease / BEATS)
            if left <= 0:
                return None
            if found is None:
                self._queue.wait(position, min(left, SLICE))
            else:
                self._stopped.wait(min(left, found))
        return None

    def _look(self) -> Message | float | None:
        """A message, or how many seconds to wait, or None to wait for the message at the position."""
        while True:
            if self._holding is None or self._holding.process != os.getpid():
                self._forget_holding()
                if not self._take():
                    return self._lease / BEATS
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
            entry = self._ahead.popleft()
            self._position = entry.number + 1
            cursor = holding.cursor
            tries = cursor.tries if entry.number == cursor.next else 0
            if entry.document is not None and tries <= self._retries:
                return Message.of(entry, tries + 1, holding.token)
            self._bury(entry, tries)

    def acknowledge(self, message: Message) -> None:
        """It is handled, and so are all before it: none of them comes again.

        :raises LeaseLost: another process has the lease; the message comes to it.
        :raises StoreUnavailable: the store failed, and the message may come again. To acknowledge a later one does for
            both.
        """
        with self._lock:
            cursor = self._of(message).cursor
            if message.redelivered:
                self._dead.discard(message.number)
            elif message.number >= cursor.next:
                self._setbacks = 0
                self._change(lambda cursor: cursor.moved(message.number + 1))
            observe.count("fanout.acknowledged")

    def retry(self, message: Message, error: object) -> None:
        """It could not be handled: deliver it again after a pause, and nothing else before. All before it are handled.

        The pauses grow from ``backoff`` to ``longest_backoff`` seconds. A message that has failed ``retries`` times and
        once more goes to the dead letters; a dead letter that was delivered once more stays one.

        :param error: what went wrong. A `StoreUnavailable` is not the message's fault, so it is not counted.
        :raises LeaseLost: another process has the lease; the message comes to it.
        :raises StoreUnavailable: the store failed; the message comes again all the same.
        """
        text = _text(error)
        with self._lock:
            self._of(message)
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
            self._of(message)
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
        """Call ``handler`` with each message until `stop`, and acknowledge it; if it raises, `retry` it."""
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
        """`stop`, and give the lease up, so that another can go on at once. Never raises for a store that fails."""
        self.stop()
        with self._lock:
            if self._holding is None:
                return
            try:
                self._change(lambda cursor: replace(cursor, owner=None))
            except (LeaseLost, StoreUnavailable) as error:
                log.warning("%s could not give up its lease, which stands for up to %g s: %s", self, self._lease, error)
            self._forget_holding()

    def __enter__(self) -> Consumer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __str__(self) -> str:
        return f"the consumer {self.name} of the queue {self._queue.name}"

    # -- what is ahead

    def _fetch(self) -> bool:
        """Read what comes next; False: there is nothing (yet). Afterwards there may be nothing, too, and more to do."""
        page = self._queue.read(self._position, self._count)
        if page.floor > self._position:
            self._pass_over(page.floor, "were forgotten before it had seen them")
            return True
        if page.entries:
            largest = max(entry.size for entry in page.entries)
            more = self._count * 2 if len(page.entries) == self._count else len(page.entries) * 2
            self._count = max(1, min(max(more, FEW), self._prefetch, READ_AHEAD // max(1, largest)))
            self._ahead.extend(page.entries)
            return True
        if page.known is not None and page.known > self._position:
            behind = self._queue.after_gap(self._position, page.known)
            if behind is not None:
                observe.count("fanout.gaps")
                self._pass_over(behind, "are missing in the store")
                return True
        return False

    def _pass_over(self, number: int, what: str) -> None:
        lost = number - self._position
        log.error("%s goes on at message %d: %d %s", self, number, lost, what)
        self._change(lambda cursor: replace(cursor.moved(number), missed=cursor.missed + lost))
        observe.count("fanout.missed", lost)
        self._position = number

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
        if len(self._dead.numbers()) >= MAX_DEAD:
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
        self._change(lambda cursor: cursor.moved(entry.number + 1))
        self._position = entry.number + 1
        self._setbacks = 0
        observe.count("fanout.dead_letters")
        log.error("%s gave up message %d after %d tries: %s", self, entry.number, tries, letter.error)

    def _return_to(self, number: int) -> None:
        self._position = number
        self._ahead.clear()

    def _pause(self, setbacks: int) -> float:
        return float(min(self._longest_backoff, self._backoff * 2 ** min(setbacks - 1, 60)))

    # -- the lease

    def _take(self) -> bool:
        """Whether the lease could be had."""
        current = self._queue.store.get(self._record)
        attempt = self._attempt
        if attempt is None or current != attempt.stored or attempt.process != os.getpid():
            attempt = self._bid(current)
            if attempt is None:
                return False
        self._attempt = None
        self._holding = attempt
        self._return_to(attempt.cursor.next)
        self._setbacks = attempt.cursor.tries
        self._not_before = attempt.since + self._pause(self._setbacks) if self._setbacks else 0.0
        return True

    def _bid(self, current: bytes | None) -> _Holding | None:
        """The lease, had in place of ``current``; None: it is another's."""
        before = self._decoded(current)
        if before is None:
            before = Cursor(self._queue.enrol(self.name, self._start))
        elif before.owner is not None:
            if not self._stood(current):
                return None
            # Most likely it died or hung while it handled that message, which then has something to do with it.
            observe.count("fanout.taken_over")
            there = bool(self._queue.read(before.next, 1).entries)
            before = replace(before, tries=before.tries + there)
        token = secrets.token_hex(16)
        cursor = replace(before, owner=token, beat=before.beat + 1, at=time.time())
        new = self._encoded(cursor)
        self._attempt = _Holding(token, cursor, new, time.monotonic(), os.getpid())
        try:
            taken = self._queue.store.compare_and_swap(self._record, current, new)
        except OutcomeUnknown:
            taken = self._queue.store.get(self._record) == new
        return self._attempt if taken else None

    def _stood(self, current: bytes | None) -> bool:
        """Whether the record has been the same for the length of the lease."""
        now = time.monotonic()
        seen, since = self._seen
        if seen != current:
            self._seen = seen, since = current, now
        return now - since >= self._lease

    def _held(self) -> _Holding:
        """The lease that we have.

        :raises LeaseLost: we have none.
        """
        holding = self._holding
        if holding is None or holding.process != os.getpid():
            raise LeaseLost(f"{self} has no lease: it was closed, or another has it now")
        return holding

    def _of(self, message: Message) -> _Holding:
        holding = self._held()
        if message.lease != holding.token:
            raise LeaseLost(f"{self} has lost and taken the lease again since it got message {message.number}")
        return holding

    def _change(self, change: Callable[[Cursor], Cursor]) -> Cursor:
        """Change the record, if we have the lease still; what it says now."""
        holding = self._held()
        now = time.monotonic()

        def changed(current: bytes | None) -> bytes:
            cursor = self._decoded(current)
            if cursor is None or cursor.owner != holding.token:
                raise LeaseLost(f"{self} has lost its lease: another has taken over, or it was forgotten")
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
        return self._queue.documents.codec.encode(asdict(cursor), self._record, self._key)


def _text(error: object) -> str:
    """What an error says, as text that can be stored: its words may come from anybody."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001 - its author's defect, and no reason to stop a consumer
        text = "(it cannot be told)"
    if isinstance(error, BaseException):
        text = f"{type(error).__name__}: {text}"
    return text[:ERROR_LENGTH].encode("utf-8", "backslashreplace").decode("utf-8")
