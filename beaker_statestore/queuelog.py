"""The numbered messages of one queue, and what is kept of it besides: the floor, and where its consumers began.

Records of kind ``queue``, in the namespace that is the queue's name, all of them documents:

    0000000000000001 ...    ``{"body": ..., "token": ..., "at": epoch seconds}``, the messages, numbered without a gap
    floor                   ``{"floor": n, "swept": m, "consumers": {name: [number, token]}}``
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

**When the store loses records** (damage, a backup of yesterday, a server in memory that was started anew), numbers are
missing that are not below the floor, and whoever filled them would write behind the cursors. So nobody passes over a
missing number, neither a reader nor a producer whose own message would stand behind one: a tombstone is *added* there
first, ``{"gone": true}``, or, of very many, the floor is raised above them. If it cannot be added, there is a message
now, and nothing is missing. That makes the log dense again. Readers and producers notice because they read the number
before theirs in the round trip that they need for the floor anyway. And a producer that sees the floor fall, which it
never does, takes its message back and begins at the end that there is now.

It must not know any framework or engine.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
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
from beaker_statestore.queuerecords import Cursor, Enrolment, Entry, Head, Page, is_number, number_in, valid_name, whole
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
#: So many numbers ahead one looks for messages behind a gap, where that must not be overlooked.
FAR: Final = 500
#: So many numbers behind the last one seen may be the end's, to be found in a single round trip.
NEAR: Final = 48
#: So many missing numbers are made good one by one; the floor is raised above more than that.
MENDED: Final = 10_000
#: What producers remove below the floor at a time, for others; a few milliseconds' worth. See also `TRIMMED`.
SWEPT: Final = 5 * PAGE
#: What the queue's own documents may have beyond the size of a message, in bytes.
LETTERHEAD: Final = 64 * 1024
#: The most consumers of a queue; all are named in one small document, which every producer reads.
MAX_CONSUMERS: Final = 200

_FLOOR: Final = "floor"
_END: Final = "end"
_TOMBSTONE: Final = "gone"


class QueueLog:
    """The messages of the queue ``name``. Safe for threads, and for processes that share the store.

    :param limit: how many messages there may be from the floor to the end. With n producers it may be up to n more.
    :param when_full: ``refuse``: `append` raises `QueueFullError`; ``forget``: the oldest messages go, read or not.
    :raises ConfigurationError: ``name`` is no name.

    Methods raise `StoreUnavailable` when the store fails.
    """

    def __init__(self, settings: Settings, name: str, limit: int, when_full: WhenFull) -> None:
        if when_full not in ("refuse", "forget"):
            raise ConfigurationError(f"when_full is {when_full!r}: write 'refuse' or 'forget'")
        self.name = valid_name(name, "queue")
        # What fitted as a message has to fit as a dead letter.
        self.documents = Collection(replace(settings, max_value=settings.max_value + LETTERHEAD), "queue", name)
        self._messages = DocumentCodec.of(settings)
        self.store = self.documents.store
        self._limit = whole(limit, "a queue's limit")
        self._when_full = when_full
        self._amortised = max(1, min(TRIMMED, limit // 10))
        #: The number to try next; 0: not known. Threads may set it back; then it is only a worse guess.
        self._next = 0
        #: The floor, and the highest number taken, as last seen; 0: none has been.
        self._floor = 1
        self._seen = 0

    # -- writing

    def append(self, body: Any) -> int:
        """Write a message behind all others, and answer its number.

        :raises DocumentRefusedError: JSON cannot hold it, or it is too large.
        :raises OutcomeUnknown: the store failed, and the message may be there or not, or may be there yet.
        :raises StoreUnavailable: the store failed, or is full (`QueueFullError`), and the message is not there.
        """
        document = {"body": body, "token": secrets.token_hex(8), "at": round(time.time(), 3)}
        # Before the number: of a thread that has found the floor fallen, we see both or neither.
        known_floor = self._floor
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
                if self._stands(number, known_floor):
                    break
                self.store.compare_and_swap(self._record(number), data, None)
            except StoreUnavailable as error:
                raise OutcomeUnknown(
                    f"message {number} of the queue {self.name} may have been lost: {error}"
                ) from error
            known_floor = self._floor
            number = self.end()
        else:
            raise ContentionError(f"others kept taking the next number of the queue {self.name} before us")
        self._next = number + 1
        self._keep_house(number)
        return number

    def _stands(self, number: int, known_floor: int) -> bool:
        """Whether our message ``number``, which is there now, is where consumers will see it.

        :param known_floor: where the floor was before.
        """
        record, floor_record = self._record(number - 1), self.documents.records.record(_FLOOR)
        # The floor last: what was at or above it then had not been removed before.
        found = self.store.get_many([record, floor_record])
        head = self._head_in(found.get(floor_record))
        if head.floor < known_floor:
            log.error(
                "the store has lost records of the queue %s: its floor was %d and is %d; producers begin at its end",
                self.name,
                known_floor,
                head.floor,
            )
            self._next, self._floor = 0, head.floor
            return False
        if number < head.floor:
            observe.count("fanout.behind_floor")
            return False
        if record not in found and number > head.floor:
            self._mend(self._gap_below(number, head.floor), number)
        return True

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
        self.trim(number, most=SWEPT)
        if number - self._floor < self._limit:
            return
        if self._when_full == "forget":
            observe.count("fanout.forgotten", self._amortised)
            self.raise_floor(number - self._limit + self._amortised, most=SWEPT)
            return
        observe.count("fanout.refused")
        cursors = self.cursors(self.head())
        slowest = min(cursors, key=lambda name: cursors[name].next, default=None)
        culprit = (
            "it has no consumers"
            if slowest is None
            else f"its slowest consumer, {slowest}, is at {cursors[slowest].next}"
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
                self.trim(number + 1, self._amortised, most=SWEPT)
        except (StoreUnavailable, DocumentDamagedError) as error:
            log.warning("the queue %s has not been trimmed: %s", self.name, error)

    # -- reading

    def head(self) -> Head:
        """The floor, and who consumes."""
        return self._head_in(self.store.get(self.documents.records.record(_FLOOR)))

    def _head_in(self, data: bytes | None) -> Head:
        head = Head.of(self.documents.codec.current(data, self.documents.records.record(_FLOOR)))
        self._floor = max(self._floor, head.floor)
        return head

    def read(self, first: int, count: int, *, beside: bytes | None = None, far: bool = False) -> Page:
        """Up to ``count`` messages from the number ``first`` on, in one round trip.

        The floor is read last: what was at or above it then had not been removed before. What is below it is nobody's,
        so whoever asks looks at the floor first.

        :param beside: the key of a record that is read with them.
        :param far: if there are none, look for some behind a gap that is longer than ``count``, at some cost.
        """
        before, *wanted = (self._record(number) for number in range(first - 1, first + count))
        floor_record = self.documents.records.record(_FLOOR)
        others = [] if beside is None else [beside]
        found = self.store.get_many([before, *wanted, *others, floor_record])
        head = self._head_in(found.get(floor_record))
        token = None
        with suppress(StoreUnavailable):  # there is no key for it here, and it has been read before
            token = self._entry(first - 1, found[before]).token if before in found else None
        is_torn = first > head.floor and before not in found
        page = Page(head, [], is_torn, token, None if beside is None else found.get(beside))
        if first < head.floor:
            return page
        there = [number for number, record in enumerate(wanted, first) if record in found]
        taken = there[0] if there else self._far_behind(first) if far else None
        if taken is not None and taken > first:
            self._mend(first, taken)
            return self.read(first, count, beside=beside)
        for number, record in enumerate(wanted, first):
            if record not in found:
                break
            try:
                page.entries.append(self._entry(number, found[record]))
            except StoreUnavailable:  # there is no key for it here: that stops whoever has come to it
                if not page.entries:
                    raise
                break
        return page

    def wait(self, number: int, seconds: float) -> None:
        """Return when there is a message ``number``, or after so many seconds."""
        self.store.wait(self._record(number), seconds)

    def end(self) -> int:
        """The number that the next message gets."""
        number = self._near_end()
        if number is not None:
            return number
        head = self.head()
        while True:
            number = self._first_free(max(head.floor - 1, self._reliable_end()))
            # What was trimmed while we looked for the end looks free, too.
            head = self.head()
            if number >= head.floor:
                self._seen = number - 1
                return number

    def _near_end(self) -> int | None:
        """The end, if it is no further than `NEAR` from where it was last seen; in one round trip."""
        seen = self._seen
        numbers = {self._record(number): number for number in range(seen, seen + NEAR)}
        floor_record = self.documents.records.record(_FLOOR)
        found = self.store.get_many([*numbers, floor_record]) if seen else {}
        taken = [number for record, number in numbers.items() if record in found]
        # There was none, it has been trimmed, there is a gap, or it is further on.
        if not taken or taken != list(range(seen, seen + len(taken))) or len(taken) == NEAR:
            return None
        if self._head_in(found.get(floor_record)).floor > taken[-1] + 1:
            return None
        self._seen = taken[-1]
        return taken[-1] + 1

    def add_tombstone(self, number: int) -> bool:
        """Put a tombstone where the message ``number`` is missing; False: it is there."""
        return self.store.add(self._record(number), self._encoded(number, {_TOMBSTONE: True}))

    def _mend(self, first: int, taken: int) -> None:
        """Make the log dense from ``first``, which is missing, to ``taken``, which is not, though others may be.

        If ``first`` is not missing after all, nothing is done: what is read in several steps is of several moments.
        """
        if self._has(first) or self.head().floor > first:
            return
        observe.count("fanout.gaps")
        log.error(
            "messages %d to %d of the queue %s are missing, and later ones are there", first, taken - 1, self.name
        )
        if taken - first > MENDED:
            log.error("so all messages of the queue %s before %d are removed", self.name, taken)
            self.raise_floor(taken, most=SWEPT)
            return
        # Upwards, as producers go, so that one who dies half-way has mended that half.
        for number in range(first, taken):
            if not self.add_tombstone(number):
                return  # this is where the gap ends, or a producer has come: whoever looks again finds out

    def _gap_below(self, number: int, floor: int) -> int:
        """Where the gap begins that ends below ``number``, if it has not more than `MENDED` numbers."""
        lowest = max(floor, number - MENDED - 1)
        for end in range(number, lowest, -PAGE):
            page = range(end - 1, max(end - 1 - PAGE, lowest - 1), -1)
            taken = self.store.get_many(map(self._record, page))
            for below in page:
                if self._record(below) in taken:
                    return below + 1
        return lowest

    def _far_behind(self, number: int) -> int | None:
        """The lowest number above ``number`` that is taken, as far as that can be found in a look or two."""
        marked = self._marked_end(self.store.get(self.documents.records.record(_END)))
        near = range(number + 1, number + FAR)
        beyond = range(max(marked, near.stop), max(marked, near.stop) + MARKED + 1)
        taken = self.store.get_many(map(self._record, (*near, *beyond)))
        return next((higher for higher in (*near, *beyond) if self._record(higher) in taken), None)

    def _first_free(self, taken: int) -> int:
        """The first free number above ``taken``, of which it is known that it is taken, or below the floor.

        It takes steps of twice the length each until one is free, and then halves what is in between; what is taken
        has no gaps. Should one have been torn, a number within it would be found, and the cursors be past it: so it
        looks farther, too.
        """
        while True:
            free = self._search(taken)
            behind = self._far_behind(free)
            if behind is None:
                return free
            if self._has(free):
                taken = free  # others were quicker
                continue
            if self.head().floor > free:
                return free  # a trimmer was; whoever asks finds out
            self._mend(free, behind)
            taken = behind

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
        if document is not None and _TOMBSTONE in document:
            return Entry(number, None, "", len(data), is_tombstone=True)
        if document is None or "body" not in document:
            return Entry(number, None, "it is a document, but no message", len(data))
        return Entry(number, document, "", len(data))

    # -- trimming

    def cursors(self, head: Head) -> dict[str, Cursor]:
        """Where each consumer is. The cursor of one that was forgotten does not count for a new one of that name."""
        found = self.documents.read_many([f"consumer={name}" for name in head.consumers])
        cursors = {}
        for name, enrolment in head.consumers.items():
            cursors[name] = Cursor(enrolment.start, enrolment.token)
            try:
                cursor = Cursor.of(found.get(f"consumer={name}", {}))
            except DocumentDamagedError:
                continue
            if cursor.enrolment == enrolment.token:
                cursors[name] = cursor
        return cursors

    def trim(self, end: int, keep: int = 0, most: int | None = None) -> int:
        """Remove what all consumers have acknowledged but for the last ``keep`` of it, and answer how much that was.

        Without consumers nothing is removed.

        :param end: the floor stays at or below it: a cursor can be beyond the end when the store has lost records.
        :param most: as for `raise_floor`.
        """
        cursors = self.cursors(self.head())

        def target(head: Head) -> int:
            # A cursor only moves on, so one that was read a while ago, or a start, is only too careful.
            numbers = [
                cursors[name].next
                if name in cursors and cursors[name].enrolment == enrolment.token
                else enrolment.start
                for name, enrolment in head.consumers.items()
            ]
            return min(min(numbers, default=0) - keep, end)

        return self._raise(target, most)

    def raise_floor(self, number: int, most: int | None = None) -> int:
        """Remove all below ``number``, read or not, and answer how much that was.

        :param most: that much at once; the next one goes on.
        """
        return self._raise(lambda _: number, most)

    def remove_strays(self) -> None:
        """Remove messages below the floor: those of producers that came late and died. Looks at every record."""
        for page in self.documents.pages():
            numbers = {key: number_in(key) for key in page if key is not None}
            below = [key for key, number in numbers.items() if number is not None and number < self._floor]
            self.store.delete_many(map(self.documents.records.record, below))

    def _raise(self, target: Callable[[Head], int], most: int | None) -> int:
        before = after = Head()

        def raised(document: Document | None) -> Document | None:
            nonlocal before, after
            before = Head.of(document)
            after = Head(max(before.floor, target(before)), before.swept, before.consumers)
            return after.document if after.floor > before.floor else document

        self.documents.modify(_FLOOR, raised)
        self._floor = max(self._floor, after.floor)
        self._sweep(after, after.floor if most is None else min(after.floor, after.swept + most))
        return after.floor - before.floor

    def _sweep(self, head: Head, end: int) -> None:
        """Remove what is below ``end``; if this stops half-way, the next one goes on."""
        if head.swept >= end:
            return
        for start in range(head.swept, end, PAGE):
            self.store.delete_many(map(self._record, range(start, min(start + PAGE, end))))

        def swept(document: Document | None) -> Document | None:
            current = Head.of(document)
            return Head(current.floor, max(current.swept, end), current.consumers).document

        self.documents.modify(_FLOOR, swept)

    # -- consumers

    def enrol(self, name: str, start: int | None) -> Enrolment:
        """Make ``name`` a consumer from ``start`` on (None: the floor), unless it is one; answer since when it is.

        From then on nothing is trimmed that it has not acknowledged: its name is in the record that trimming changes.

        :raises ConfigurationError: there are too many consumers.
        """
        token = secrets.token_hex(8)

        def enrolled(document: Document | None) -> Document | None:
            head = Head.of(document)
            if name in head.consumers:
                return document
            if len(head.consumers) >= MAX_CONSUMERS:
                raise ConfigurationError(
                    f"the queue {self.name} has {MAX_CONSUMERS} consumers, and no more are possible; forget "
                    f"those that are gone (statestore fanout forget {self.name} NAME)"
                )
            enrolment = Enrolment(head.floor if start is None else max(start, head.floor), token)
            return replace(head, consumers={**head.consumers, name: enrolment}).document

        return Head.of(self.documents.modify(_FLOOR, enrolled)).consumers[name]

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
            others = {other: enrolment for other, enrolment in head.consumers.items() if other != name}
            return replace(head, consumers=others).document

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
