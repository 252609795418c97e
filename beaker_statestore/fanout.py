"""A fan-out queue in the store: every consumer gets every message, in order, at least once, at a pace of its own.

::

    queue = Queue("127.0.0.1:1978", "orders")
    queue.push({"order": 17})

    with queue.consumer("mailer") as consumer:
        for message in consumer:
            send_mail(message.body)
            consumer.acknowledge(message)

It must not know any framework or engine.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from beaker_statestore import observe
from beaker_statestore.consumers import FAR_LOOK, FEW, SLICE, Consumer, LeaseLost, Start
from beaker_statestore.deadletters import DeadLetters
from beaker_statestore.documents import Document
from beaker_statestore.exceptions import ConfigurationError, QueueFullError
from beaker_statestore.keys import kind_prefix
from beaker_statestore.queuelog import QueueLog, WhenFull
from beaker_statestore.queuerecords import Cursor, DeadLetter, Entry, Message, is_name, is_number, valid_name, whole
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store

__all__ = [
    "Consumer",
    "ConsumerReport",
    "DeadLetter",
    "Follower",
    "LeaseLost",
    "Message",
    "Queue",
    "Report",
]

#: How many messages a queue has at most, where nobody says.
LIMIT: Final = 100_000
#: How many messages a follower reads at once, at most.
PAGE: Final = 100
#: How many dead letters may wait to be delivered again, as the cursor has their numbers.
MAX_AGAIN: Final = 100


@dataclass(frozen=True, slots=True)
class ConsumerReport:
    """How far a consumer is."""

    name: str
    #: The number of the first message that it has not acknowledged.
    next: int
    #: How many messages that are.
    behind: int
    #: How many dead letters it has.
    dead: int
    #: Whether some process has the lease, or died with it.
    held: bool
    #: How many messages were gone before it had seen them.
    missed: int
    #: How often the message ``next`` has failed, and how it did the last time.
    tries: int
    error: str | None
    #: When a process of its was last heard of, in epoch seconds by that one's clock; None: never.
    heard_of: float | None


@dataclass(frozen=True, slots=True)
class Report:
    """What there is in a queue."""

    #: The lowest number that may be there, and the one that the next message gets.
    floor: int
    end: int
    #: The one furthest behind first.
    consumers: list[ConsumerReport]


class Queue:
    """The queue ``name`` in a store. Safe for threads, and for processes that share the store.

    :param store: a store, its URL, or settings.
    :param name: letters A to Z and a to z, digits, and ``. _ -``; at most 64.
    :param limit: how many messages there may be that some consumer has not acknowledged.
    :param when_full: ``refuse``: `push` raises `QueueFullError` (a `StoreUnavailable`: try again later); ``forget``:
        the oldest messages go, and consumers that had not seen them are told how many they have missed.
    :param options: as for `Settings.from_options`: ``prefix``, ``store_key``, ``max_value`` ...
    :raises ConfigurationError: one of these is wrong.

    Every method raises `StoreUnavailable` when the store fails.
    """

    def __init__(
        self,
        store: Store | str | Settings,
        name: str,
        *,
        limit: int = LIMIT,
        when_full: WhenFull = "refuse",
        **options: Any,
    ) -> None:
        self._log = QueueLog(Settings.at(store, **options), name, limit, when_full)
        self.name = name

    @classmethod
    def from_settings(
        cls,
        application: Mapping[str, Any] | str | os.PathLike[str],
        name: str,
        *,
        section: str | None = None,
        **options: Any,
    ) -> Queue:
        """By the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :param options: ``limit`` and ``when_full``, as above.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        return cls(Settings.of(application, section), name, **options)

    @classmethod
    def all(cls, store: Store | str | Settings, **options: Any) -> list[Queue]:
        """All queues of a store (and a prefix), by their names. It looks at every message, so it is not for hot paths.

        :param options: as above, but for ``limit`` and ``when_full``.
        """
        settings = Settings.at(store, **options)
        start = kind_prefix(settings.prefix, "queue")
        names = set()
        for page in open_store(settings.url, **settings.timing).pages(start):
            names |= {record[len(start) :].partition(b":")[0].decode("ascii", "replace") for record in page}
        return [cls(settings, name) for name in sorted(names) if is_name(name)]

    def push(self, body: Any) -> int:
        """Put ``body``, any JSON value, behind all other messages, and answer its number.

        :raises DocumentRefusedError: JSON cannot hold it, or it is too large.
        :raises QueueFullError: there is no room; nothing was written.
        :raises OutcomeUnknown: the store failed, and nobody knows whether the message is there. Any other
            `StoreUnavailable` means that it is not.
        """
        number = self._log.append(body)
        observe.count("fanout.pushed")
        return number

    def consumer(self, name: str, *, start: Start = "now", **options: Any) -> Consumer:
        """The consumer ``name``, which gets every message from ``start`` on.

        :param start: where it begins if there is no such consumer yet: ``now``, ``beginning`` (the oldest message that
            is there) or a message's number.
        :param options: ``lease`` (30 s), how long a process may be silent before another takes over; ``retries`` (8),
            how often a message that failed is delivered again; ``backoff`` (1 s) and ``longest_backoff`` (300 s), the
            pauses before that; ``prefetch`` (100), how many messages are read ahead at most.
        """
        return Consumer(self._log, name, start=start, **options)

    def follow(self, start: int | Literal["now", "beginning"] = "now") -> Follower:
        """A reader of which the store knows nothing, from ``start`` on; for pages that show what happens."""
        return Follower(self._log, start)

    def report(self) -> Report:
        """What there is, and who is behind. It counts dead letters, so it is not for hot paths."""
        head, end = self._log.head(), self._log.end()
        consumers = []
        for name, cursor in self._log.cursors(head).items():
            consumers.append(
                ConsumerReport(
                    name=name,
                    next=cursor.next,
                    behind=max(0, end - max(cursor.next, head.floor)),
                    dead=len(DeadLetters(self._log, name).numbers()),
                    held=cursor.owner is not None,
                    missed=cursor.missed,
                    tries=cursor.tries,
                    error=cursor.error,
                    heard_of=cursor.at or None,
                )
            )
        return Report(head.floor, end, sorted(consumers, key=lambda consumer: (consumer.next, consumer.name)))

    def trim(self, keep: int = 0, *, before: int | None = None) -> int:
        """Remove what all consumers have acknowledged, and answer how many messages that was.

        Producers do so now and then. A queue without consumers is not trimmed.

        :param keep: leave so many of them, for followers and for consumers to come.
        :param before: remove all messages below this number instead, whether somebody has read them or not.
        """
        whole(keep, "keep", 0)
        end = self._log.end()
        if before is None:
            removed = self._log.trim(end, keep)
        else:
            removed = self._log.raise_floor(min(whole(before, "before"), end))
        self._log.remove_strays()
        return removed

    def forget(self, name: str) -> bool:
        """End the consumer ``name``, its cursor and its dead letters, so that trimming waits for it no longer.

        Stop its processes before. One that still runs is a new consumer within about a second, and begins at the oldest
        message that is there.

        :return: whether there was one.
        """
        was = self._log.strike(valid_name(name, "consumer"))
        self._log.documents.delete(f"consumer={name}")
        letters = DeadLetters(self._log, name)
        for number in letters.numbers():
            letters.discard(number)
        return was

    def dead_letters(self, consumer: str) -> DeadLetters:
        """The messages that this consumer has given up, to iterate over."""
        return DeadLetters(self._log, valid_name(consumer, "consumer"))

    def redeliver(self, consumer: str, number: int) -> bool:
        """Deliver a dead letter once more, to this consumer only; out of order, by its nature.

        It stays a dead letter until it is acknowledged.

        :return: False: there is no such dead letter, or what it was made of is damaged.
        :raises QueueFullError: too many wait for that already.
        """
        letter = self.dead_letters(consumer).get(whole(number, "a dead letter"))
        if letter is None or letter.damaged:
            return False

        def noted(document: Document | None) -> Document | None:
            if document is None:
                return None
            cursor = Cursor.of(document)
            if number in cursor.again:
                return document
            if len(cursor.again) >= MAX_AGAIN:
                raise QueueFullError(
                    f"{MAX_AGAIN} dead letters wait to be delivered to {consumer} again; let it take them"
                )
            return replace(cursor, again=[*cursor.again, number], beat=cursor.beat + 1).document

        return self._log.documents.modify(f"consumer={consumer}", noted) is not None


class Follower:
    """Reads a queue without leaving a trace. Made by `Queue.follow`; for one thread."""

    def __init__(self, log: QueueLog, start: int | Literal["now", "beginning"]) -> None:
        self._log = log
        self._ahead: deque[Entry] = deque()
        self._count = FEW
        self._far_at = 0.0
        #: How many messages were gone before they could be read here.
        self.missed = 0
        if start not in ("now", "beginning") and not is_number(start):
            raise ConfigurationError(f"start is {start!r}: write 'now', 'beginning' or a number from 1 on")
        #: The number of the next message.
        self.position: int = log.end() if start == "now" else log.head().floor if start == "beginning" else int(start)

    def receive(self, timeout: float) -> Message | None:
        """The next message; None if there is none within ``timeout`` seconds.

        :raises StoreUnavailable: the store failed. Just call it again.
        """
        deadline = time.monotonic() + timeout
        while True:
            if self._ahead or self._fetch():
                while self._ahead:
                    entry = self._ahead.popleft()
                    self.position = entry.number + 1
                    if entry.document is not None:
                        return Message.of(entry)
                    self.missed += 1
                continue
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._log.wait(self.position, min(left, SLICE))

    def _fetch(self) -> bool:
        far = time.monotonic() >= self._far_at
        page = self._log.read(self.position, self._count, far=far)
        if page.head.floor > self.position:
            self.missed += page.head.floor - self.position
            self.position = page.head.floor
            return True
        if page.is_torn:
            # Either it was given a position from elsewhere, or the store has lost records; or one only.
            end = self._log.end()
            if end < self.position:
                self.position = end
            else:
                self._log.add_tombstone(self.position - 1)
            return True
        if page.entries:
            self._count = PAGE if len(page.entries) == self._count else FEW
            self._ahead.extend(page.entries)
        elif far:
            self._far_at = time.monotonic() + FAR_LOOK
        return bool(page.entries)
