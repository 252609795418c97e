"""Removal of records whose time has come.

Readers treat an expired document as absent, so a sweep only gives room back, and nothing waits for it. It may be
interrupted at any moment, run again, and run twice at once: a record is removed only if it still is, byte for byte,
what was found to be expired, so one that somebody has touched meanwhile stays.

A sweep knows the keys that our records have, and ``_expires`` in a document. All else stays as it is: records of other
keys are not even read, and what has an ``_expires`` and is no document of ours is counted.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from beaker_statestore import documents, observe
from beaker_statestore.exceptions import ConfigurationError, DocumentDamagedError, OutcomeUnknown
from beaker_statestore.keys import KINDS, kind_prefix, prefix_and_kind, shortened
from beaker_statestore.stores.base import LocalStore, Store, Verbs

__all__ = ["BATCH", "ENOUGH", "LARGEST_BATCH", "MARGIN", "Sweep", "Sweeper", "sweep"]

#: How many keys are looked at in one step. With a megabyte each, that many values fit into memory.
BATCH: Final = 100
LARGEST_BATCH: Final = 10_000
#: On a store in this process, a step reads no more once it has read so many bytes: a server's clients wait for it.
ENOUGH: Final = 256 * 1024
#: An ``_expires`` before this (September 2001) is no time of ours: in other programs' records it may be a length.
EARLIEST: Final = 1e9
#: How long records stay behind their expiry, in seconds. Times are compared with this host's clock, and others have
#: written them. Too late costs a little room, for nobody sees what is expired; too early costs somebody his state,
#: and only a session's ``_expires`` has minutes to spare.
MARGIN: Final = 60.0

#: The most bytes of a record key that stand in a `Sweep.place`.
_LONGEST_PLACE: Final = 1000


@dataclass(slots=True)
class Sweep:
    """What a sweep has done, in whole steps."""

    #: Records that were read.
    seen: int = 0
    #: How many of them were expired, by kind.
    kinds: Counter[str] = field(default_factory=Counter)
    removed: int = 0
    #: Expired ones that somebody else has changed, or removed, before we could.
    changed: int = 0
    #: Those with an ``_expires`` that are no documents of ours, and those too large to be looked into; they stay.
    unreadable: int = 0
    #: Where to go on, as printable text for ``start``; None when all has been looked at. No session's id is in it.
    place: str | None = ""

    @property
    def expired(self) -> int:
        """How many records were expired."""
        return self.kinds.total()


class Sweeper:
    """A sweep, to be carried out step by step. What an outage interrupts can go on with the next `step`."""

    def __init__(
        self,
        store: Store,
        prefix: str | None = "",
        *,
        start: str | None = None,
        margin: float = MARGIN,
        largest: float = math.inf,
        dry_run: bool = False,
    ) -> None:
        """
        :param prefix: the application's; None: all records of our kinds, under no prefix or one that does not end in a
            letter or digit. (``realestate:42`` is more likely another program's than a ``state:`` under ``reale``.)
        :param start: a `Sweep.place` of an earlier sweep of the same prefix, to go on there.
        :param margin: how long records stay behind their expiry, in seconds.
        :param largest: what has more bytes is not looked into, and stays.
        :param dry_run: find out, and remove nothing.
        :raises ConfigurationError: the prefix is not valid, or ``start`` is no place of it.
        """
        self._store = store
        self._margin = margin
        self._largest = largest
        self._dry_run = dry_run
        self._all_prefixes = prefix is None
        #: What the keys of each part of the sweep begin with, in the order in which they are looked at.
        self._parts = [b""] if prefix is None else [kind_prefix(prefix, kind) for kind in sorted(KINDS)]
        self._part, self._cursor = self._parse(start) if start else (0, None)
        #: What has been done so far. It changes with each step.
        self.sweep = Sweep(place=start or self._place())

    @property
    def done(self) -> bool:
        """Whether all has been looked at."""
        return self._part == len(self._parts)

    def step(self, batch: int = BATCH) -> None:
        """Look at the next keys, ``batch`` of them at most, and remove the expired of them.

        :raises StoreUnavailable: in an outage. Nothing of this step is counted; it may be repeated.
        """
        page, cursor = self._store.scan(self._parts[self._part], self._cursor, batch)
        kinds = {key: kind for key in page if (kind := self._kind(key)) is not None}
        if isinstance(self._store, LocalStore):
            values, cut = _read_enough(self._store, kinds)
            # The cursor of such a store is the last key of a page, whatever its length.
            cursor = cut or cursor
        else:
            values = self._store.get_many(kinds)
        latest = time.time() - self._margin
        expired, unreadable = {}, 0
        for key, value in values.items():
            try:
                if len(value) > self._largest:
                    unreadable += 1
                elif _is_expired(value, latest):
                    expired[key] = value
            except DocumentDamagedError:
                unreadable += 1
        removed = 0
        if expired and not self._dry_run:
            # One transaction, where the store has them.
            removed = sum(self._store.apply([partial(_remove, key, value) for key, value in expired.items()]))
            self.sweep.changed += len(expired) - removed
        observe.count("sweeper.removed", removed)
        observe.count("sweeper.unreadable", unreadable)
        self.sweep.seen += len(values)
        self.sweep.kinds.update(kinds[key] for key in expired)
        self.sweep.removed += removed
        self.sweep.unreadable += unreadable
        self._cursor = cursor
        if cursor is None:
            self._part += 1
        self.sweep.place = self._place()

    def run(self, max_seconds: float | None = None, batch: int = BATCH) -> Iterator[Sweep]:
        """Step by step until all is done or the time is over; ``sweep`` after each step.

        :param max_seconds: after so long no step is begun, once the place is another one: each run gets on, however
            short its steps and its time, and however many keys begin alike.
        """
        deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        start = self.sweep.place
        while not self.done:
            self.step(batch)
            yield self.sweep
            if time.monotonic() >= deadline and self.sweep.place != start:
                return

    def _kind(self, key: bytes) -> str | None:
        """Of which kind the record is; None: it does not belong to this sweep."""
        found = prefix_and_kind(key)
        if found is None or (self._all_prefixes and found[0][-1:].isalnum()):
            return None
        return found[1]

    def _place(self) -> str | None:
        """The place where the sweep is: what the keys looked at begin with, an ``@``, a key to go on behind.

        Our stores' cursors are keys. They have to go on behind one that is gone, so the beginning of a key is as good
        a cursor, and only a little earlier.
        """
        if self.done:
            return None
        begins = shortened(self._cursor or b"").partition("…")[0]
        cursor = begins.encode("utf-8", "surrogateescape")[:_LONGEST_PLACE]
        return f"{self._parts[self._part].decode('ascii')}@{quote(cursor, safe=':/')}"

    def _parse(self, place: str) -> tuple[int, bytes | None]:
        start, at, text = place.partition("@")
        cursor = unquote_to_bytes(text)
        for number, part in enumerate(self._parts):
            if at and part.decode("ascii") == start and (not cursor or cursor.startswith(part)):
                return number, cursor or None
        raise ConfigurationError(
            f"{place[:80]!r} is no place where a sweep of this prefix has ended: give the same prefix as then, or "
            "leave the place out, to begin again"
        )


def _read_enough(store: LocalStore, keys: Iterable[bytes]) -> tuple[dict[bytes, bytes], bytes | None]:
    """The values of the first of ``keys``, and the last one looked at if that are not all: `ENOUGH` was read before."""
    values: dict[bytes, bytes] = {}
    room, last = ENOUGH, None
    for key in keys:
        if room <= 0:
            return values, last
        value, last = store.get(key), key
        if value is not None:
            values[key] = value
            room -= len(value)
    return values, None


def _is_expired(value: bytes, latest: float) -> bool:
    expiry = documents.expires_at(value)
    return expiry is not None and EARLIEST <= expiry <= latest


def _remove(key: bytes, value: bytes, verbs: Verbs) -> bool:
    """Remove the record unless it has become another; ``False`` if it has."""
    try:
        return verbs.compare_and_swap(key, value, None)
    except OutcomeUnknown:
        current = verbs.get(key)
        if current == value:
            raise
        return current is None


def sweep(
    store: Store,
    prefix: str | None = "",
    *,
    start: str | None = None,
    max_seconds: float | None = None,
    batch: int = BATCH,
    margin: float = MARGIN,
    dry_run: bool = False,
) -> Sweep:
    """Remove the records of an application that are expired.

    :param prefix: the application's; None: all records of our kinds, as for `Sweeper`.
    :param start: the `Sweep.place` where an earlier sweep of this prefix has ended, to go on there.
    :param max_seconds: end after so long; what is answered then has a ``place``.
    :param batch: how many keys are looked at in one step.
    :param margin: how long records stay behind their expiry, in seconds.
    :param dry_run: find out, and remove nothing.
    :raises ConfigurationError: the prefix is not valid, or ``start`` is no place of it.
    :raises StoreUnavailable: in an outage; use a `Sweeper` to learn how far it came.
    """
    sweeper = Sweeper(store, prefix, start=start, margin=margin, dry_run=dry_run)
    for _ in sweeper.run(max_seconds, batch):
        pass
    return sweeper.sweep
