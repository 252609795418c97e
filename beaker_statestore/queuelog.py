"""The numbered messages of one queue, and what is kept of it besides: the floor, and where its consumers began.

Records of kind ``queue``, in the namespace that is the queue's name, all of them documents:

    0000000000000001 ...    ``{"body": ..., "token": ..., "at": epoch seconds}``, the messages, numbered without a gap
    floor                   ``{"floor": n, "swept": m, "consumers": {name: number}}``
    end                     ``{"end": n}``, the number of some message that is there, or was; only to find the end soon
    consumer=<name>         a cursor (`beaker_statestore.consumers`)
    dead=<name>=<number>    a dead letter

**Why nothing is lost.** A message is written by `add`, under the first free number; of several producers one gets it,
and the others go on to the next. So nobody takes a number before the one below it was taken: that stays true of an
`add` that a stalled server carries out late. Numbers below the *floor* are nobody's any more: the floor only rises, and
always before anything below it is removed. So at or above the floor nothing is ever removed, each number has had one
message at most, and a consumer that has passed a number has seen what was there.

What goes wrong with that is a producer that is late: it believes a number to be free which is so because its message
has been read by everybody and removed. Hence it reads the floor again *after* its message is there. If the number is
at or above the floor, then it was so before, too, and no cursor has passed it without its message. If it is below,
perhaps nobody will see it: it is removed and written again behind the end. (Perhaps everybody has seen it, too, if all
consumers and a trimmer came by between the two steps; then it comes twice. That is what "at least once" is for.) A
producer that dies between the two steps leaves a message that it never reported as pushed. Whoever reads messages reads
the floor with them, not before them, and passes over what is below it.

It must not know any framework or engine.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final, Literal

from beaker_statestore import observe
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.collection import Collection
from beaker_statestore.documents import Document
from beaker_statestore.exceptions import (
    ConfigurationError,
    ContentionError,
    DocumentDamagedError,
    OutcomeUnknown,
    QueueFullError,
    StoreUnavailable,
)
from beaker_statestore.queuerecords import Entry, Head, Page, is_number, valid_name
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import CONTENTION_DEADLINE, PAGE

__all__ = ["QueueLog", "WhenFull"]

log = logging.getLogger(__name__)

WhenFull = Literal["refuse", "forget"]

#: A producer tries so many numbers one by one before it looks for the end.
EAGER_NUMBERS: Final = 3
#: One message in so many leaves word of the end.
MARKED: Final = 64
#: One message in so many makes its producer trim, and a queue that forgets, forgets so many at once (but never more
#: than a tenth of the limit).
TRIMMED: Final = 1000
#: What the queue's own documents may have beyond the size of a message, in bytes.
LETTERHEAD: Final = 64 * 1024
#: The most consumers of a queue; all are named in one small document, which every producer reads.
MAX_CONSUMERS: Final = 200

_FLOOR: Final = "floor"
_END: Final = "end"


class QueueLog:
    """The messages of the queue ``name``. Safe for threads, and for processes that share the store.

    :param limit: how many messages there may be from the floor to the end. With n producers it may be up to n more.
    :param when_full: ``refuse``: `append` raises `QueueFullError`; ``forget``: the oldest messages go, read or not.
    :raises ConfigurationError: ``name`` is no name.

    Methods raise `StoreUnavailable` when the store fails.
    """

    def __init__(self, settings: Settings, name: str, limit: int, when_full: WhenFull) -> None:
        if limit < 1:
            raise ConfigurationError(f"a queue of at most {limit} messages can have none; give a limit of 1 or more")
        if when_full not in ("refuse", "forget"):
            raise ConfigurationError(f"when_full is {when_full!r}: write 'refuse' or 'forget'")
        self.name = valid_name(name, "queue")
        # What fitted as a message has to fit as a dead letter.
        self.documents = Collection(replace(settings, max_value=settings.max_value + LETTERHEAD), "queue", name)
        self._messages = DocumentCodec.of(settings)
        self.store = self.documents.store
        self._limit = limit
        self._when_full = when_full
        self._amortised = max(1, min(TRIMMED, limit // 10))
        #: The number to try next; 0: not known. Threads may set it back; then it is only a worse guess.
        self._next = 0
        #: The floor as last seen.
        self._floor = 1

    # -- writing

    def append(self, body: Any) -> int:
        """Write a message behind all others, and answer its number.

        :raises DocumentRefusedError: JSON cannot hold it, or it is too large.
        :raises OutcomeUnknown: the store failed, and the message may be there or not, or may be there yet.
        :raises StoreUnavailable: the store failed, or is full (`QueueFullError`), and the message is not there.
        """
        document = {"body": body, "token": secrets.token_hex(8), "at": round(time.time(), 3)}
        number = self._next or self.end()
        deadline = time.monotonic() + CONTENTION_DEADLINE
        refused = 0
        while time.monotonic() < deadline:
            data = self._encoded(number, document)
            self._make_room(number)
            if not self._add(number, data):
                observe.count("fanout.contention")
                refused += 1
                number = number + 1 if refused % EAGER_NUMBERS else self._first_free(number)
                continue
            try:
                floor = self.head().floor
                if number >= floor:
                    break
                observe.count("fanout.behind_floor")
                self.store.compare_and_swap(self._record(number), data, None)
            except StoreUnavailable as error:
                raise OutcomeUnknown(
                    f"message {number} of the queue {self.name} may have been lost: {error}"
                ) from error
            number = self.end()
        else:
            raise ContentionError(f"others kept taking the next number of the queue {self.name} before us")
        self._next = number + 1
        self._keep_house(number)
        return number

    def _add(self, number: int, data: bytes) -> bool:
        """Whether ``data`` is the message ``number`` now."""
        record = self._record(number)
        try:
            return self.store.add(record, data)
        except OutcomeUnknown as error:
            observe.count("fanout.outcome_unknown")
            doubt = error
        try:
            current = self.store.get(record)
            # Whichever of the two is carried out, the bytes are the same; they are nobody else's for their token.
            if current is None and self.store.add(record, data):
                return True
            return (current or self.store.get(record)) == data
        except StoreUnavailable as error:
            raise OutcomeUnknown(str(error)) from doubt

    def _make_room(self, number: int) -> None:
        """Return if the message ``number`` may be written."""
        if number - self._floor < self._limit:
            return
        self._floor = self.head().floor
        if number - self._floor < self._limit:
            return
        self.trim()
        if number - self._floor < self._limit:
            return
        if self._when_full == "forget":
            observe.count("fanout.forgotten", self._amortised)
            self.raise_floor(number - self._limit + self._amortised)
            return
        observe.count("fanout.refused")
        cursors = self.cursors(self.head())
        slowest = min(cursors, key=lambda name: cursors[name], default=None)
        culprit = (
            "it has no consumers" if slowest is None else f"its slowest consumer, {slowest}, is at {cursors[slowest]}"
        )
        raise QueueFullError(
            f"the queue {self.name} is full: {number - self._floor} messages of {self._limit}, and {culprit} "
            f"(statestore fanout show {self.name})"
        )

    def _keep_house(self, number: int) -> None:
        """What is done for others now and then. The message is there already, so no failure is its producer's."""
        try:
            if number % MARKED == 0:
                self.documents.put(_END, {"end": number})
            if number % self._amortised == 0:
                self.trim(self._amortised)
        except (StoreUnavailable, DocumentDamagedError) as error:
            log.warning("the queue %s has not been trimmed: %s", self.name, error)

    # -- reading

    def head(self) -> Head:
        """The floor, and who consumes."""
        head = Head.of(self.documents.read(_FLOOR))
        self._floor = max(self._floor, head.floor)
        return head

    def read(self, first: int, count: int) -> Page:
        """Up to ``count`` messages from the number ``first`` on, in one round trip.

        The floor is read last: what was at or above it then had not been removed before. What is below it is nobody's,
        so whoever asks looks at the floor first.
        """
        numbers = {self._record(number): number for number in range(first, first + count)}
        floor_record, end_record = map(self.documents.records.record, (_FLOOR, _END))
        found = self.store.get_many([*numbers, end_record, floor_record])
        head = Head.of(self.documents.codec.current(found.get(floor_record), floor_record))
        stored = {number: found[record] for record, number in numbers.items() if record in found}
        known = max(stored, default=0)
        if (end := self._marked_end(found.get(end_record))) > known:
            known = end
        entries = []
        for number in range(first, first + count):
            if number not in stored:
                break
            entries.append(self._entry(number, stored[number]))
        return Page(head.floor, entries, known or None)

    def wait(self, number: int, seconds: float) -> None:
        """Return when there is a message ``number``, or after so many seconds."""
        self.store.wait(self._record(number), seconds)

    def end(self) -> int:
        """The number that the next message gets."""
        head = self.head()
        while True:
            number = self._first_free(max(head.floor - 1, self._reliable_end()))
            # What was trimmed while we looked for the end looks free, too.
            head = self.head()
            if number >= head.floor:
                return number

    def after_gap(self, first: int, known: int) -> int | None:
        """The next number behind a gap that begins with ``first``; None if there is no gap after all.

        Only damage makes one: somebody has removed a record by other means.

        :param known: a higher number that is said to be taken.
        """
        if not self._has(known) or self._has(first) or self.head().floor > first:
            return None
        for start in range(first, known + 1, PAGE):
            page = range(start, min(start + PAGE, known + 1))
            taken = self.store.get_many([self._record(number) for number in page])
            for number in page:
                if self._record(number) in taken:
                    return number
        return None

    def _first_free(self, taken: int) -> int:
        """The first free number above ``taken``, of which it is known that it is taken, or below the floor.

        It takes steps of twice the length each until one is free, and then halves what is in between; what is taken
        has no gaps. Should one have been torn, a number within it would be found, and the cursors be past it: so the
        numbers behind are looked at, too, as far as the record ``end`` may lag.
        """
        while True:
            free = self._search(taken)
            behind = {self._record(number): number for number in range(free + 1, free + MARKED + 1)}
            torn = self.store.get_many(behind)
            if not torn:
                return free
            if self._has(free):
                taken = free  # others were quicker
                continue
            if self.head().floor > free:
                return free  # a trimmer was; whoever asks finds out
            observe.count("fanout.gaps")
            log.error("message %d of the queue %s is missing, and later ones are there", free, self.name)
            taken = max(behind[record] for record in torn)

    def _search(self, taken: int) -> int:
        step = 1
        while self._has(taken + step):
            taken, step = taken + step, 2 * step
        free = taken + step
        while free - taken > 1:
            middle = (taken + free) // 2
            if self._has(middle):
                taken = middle
            else:
                free = middle
        return free

    def _reliable_end(self) -> int:
        """The number of a message that is there, and near the end; or 0."""
        record = self.documents.records.record(_END)
        number = self._marked_end(self.store.get(record))
        return number if number and self._has(number) else 0

    def _marked_end(self, data: bytes | None) -> int:
        try:
            document = self.documents.codec.current(data, self.documents.records.record(_END))
        except DocumentDamagedError:
            return 0  # it is only there to save time
        number = (document or {}).get("end")
        return number if is_number(number) else 0

    def _has(self, number: int) -> bool:
        return self.store.get(self._record(number)) is not None

    def _entry(self, number: int, data: bytes) -> Entry:
        try:
            document = self.documents.codec.current(data, self._record(number))
        except DocumentDamagedError as error:
            return Entry(number, None, str(error), len(data))
        if document is None or "body" not in document:
            return Entry(number, None, "it is a document, but no message", len(data))
        return Entry(number, document, "", len(data))

    # -- trimming

    def cursors(self, head: Head) -> dict[str, int]:
        """Where each consumer is: the number of the first message that it has not acknowledged."""
        found = self.documents.read_many([f"consumer={name}" for name in head.consumers])
        cursors = {}
        for name, start in head.consumers.items():
            number = found.get(f"consumer={name}", {}).get("next")
            cursors[name] = max(start, number) if is_number(number) else start
        return cursors

    def trim(self, keep: int = 0) -> int:
        """Remove what all consumers have acknowledged but for the last ``keep`` of it, and answer how much that was.

        Without consumers nothing is removed.
        """
        cursors = self.cursors(self.head())
        return self._raise(
            # A cursor only moves on, so one that was read a while ago, or a start, is only too careful.
            lambda head: min((cursors.get(name, start) for name, start in head.consumers.items()), default=0) - keep
        )

    def raise_floor(self, number: int) -> int:
        """Remove all below ``number``, read or not, and answer how much that was."""
        return self._raise(lambda _: number)

    def remove_strays(self) -> None:
        """Remove messages below the floor: those of producers that came late and died. Looks at every record."""
        for page in self.documents.pages():
            below = [key for key in page if key is not None and key.isdigit() and int(key) < self._floor]
            self.store.delete_many(map(self.documents.records.record, below))

    def _raise(self, target: Callable[[Head], int]) -> int:
        before = after = Head()

        def raised(document: Document | None) -> Document | None:
            nonlocal before, after
            before = Head.of(document)
            after = Head(max(before.floor, target(before)), before.swept, before.consumers)
            return after.document if after.floor > before.floor else document

        self.documents.modify(_FLOOR, raised)
        self._floor = max(self._floor, after.floor)
        self._sweep(after)
        return after.floor - before.floor

    def _sweep(self, head: Head) -> None:
        """Remove what is below the floor; if this ends half-way, the next one goes on."""
        if head.swept >= head.floor:
            return
        for start in range(head.swept, head.floor, PAGE):
            self.store.delete_many(map(self._record, range(start, min(start + PAGE, head.floor))))

        def swept(document: Document | None) -> Document | None:
            current = Head.of(document)
            return Head(current.floor, max(current.swept, head.floor), current.consumers).document

        self.documents.modify(_FLOOR, swept)

    # -- consumers

    def enrol(self, name: str, start: int | None) -> int:
        """Make ``name`` a consumer from ``start`` on (None: the floor), unless it is one; answer where it began.

        From then on nothing is trimmed that it has not acknowledged: its name is in the record that trimming changes.

        :raises ConfigurationError: there are too many consumers.
        """
        began = 0

        def enrolled(document: Document | None) -> Document | None:
            nonlocal began
            head = Head.of(document)
            if name in head.consumers:
                began = head.consumers[name]
                return document
            if len(head.consumers) >= MAX_CONSUMERS:
                raise ConfigurationError(
                    f"the queue {self.name} has {MAX_CONSUMERS} consumers, and no more are possible; forget "
                    f"those that are gone (statestore fanout forget {self.name} NAME)"
                )
            began = head.floor if start is None else max(start, head.floor)
            return Head(head.floor, head.swept, {**head.consumers, name: began}).document

        self.documents.modify(_FLOOR, enrolled)
        return began

    def strike(self, name: str) -> bool:
        """Make ``name`` a consumer no more, so that it holds up no trimming; False: it was none."""
        was = False

        def struck(document: Document | None) -> Document | None:
            nonlocal was
            head = Head.of(document)
            # It stays true if this is called again after a lost answer.
            was = was or name in head.consumers
            if name not in head.consumers:
                return document
            others = {other: start for other, start in head.consumers.items() if other != name}
            return Head(head.floor, head.swept, others).document

        self.documents.modify(_FLOOR, struck)
        return was

    def keys(self, start: str) -> Iterator[str]:
        """The keys of the records that begin with ``start``. Not for hot paths."""
        for page in self.store.pages(self.documents.records.scan_prefix + start.encode("ascii")):
            yield from (self.documents.records.key(record) or "" for record in page)

    def _encoded(self, number: int, document: Document) -> bytes:
        return self._messages.encode(document, self._record(number), "message")

    def _record(self, number: int) -> bytes:
        return self.documents.records.record(f"{number:016d}")
