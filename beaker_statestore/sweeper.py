"""Removal of records whose time has come.

Readers treat an expired document as absent, so a sweep only gives room back, and nothing waits for it. It may be
interrupted at any moment, run again, and run twice at once: a record is removed only if it still is, byte for byte,
what was found to be expired, so one that somebody has touched meanwhile stays.

A sweep knows the keys that our records have, and ``_expires`` in a document. All else stays as it is: records of other
keys are not even read, and what is no document of ours is counted.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from urllib.parse import quote, unquote_to_bytes

from beaker_statestore import documents, observe
from beaker_statestore.exceptions import ConfigurationError, DocumentDamagedError, OutcomeUnknown
from beaker_statestore.keys import KINDS, kind_prefix, prefix_and_kind, shortened
from beaker_statestore.stores.base import Store, Verbs

__all__ = ["BATCH", "LARGEST_BATCH", "MARGIN", "Sweep", "Sweeper", "sweep"]

#: How many keys are looked at in one step. With a megabyte each, that many values fit into memory.
BATCH: Final = 100
LARGEST_BATCH: Final = 10_000
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
    #: Those under a key of ours that are no documents of ours; they stay.
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
        earliest: float = -math.inf,
        dry_run: bool = False,
    ) -> None:
        """
        :param prefix: the application's; None: all records of our kinds, under whatever prefix.
        :param start: a `Sweep.place` of an earlier sweep of the same prefix, to go on there.
        :param margin: how long records stay behind their expiry, in seconds.
        :param earliest: what expired before this, in epoch seconds, stays.
        :param dry_run: find out, and remove nothing.
        :raises ConfigurationError: the prefix is not valid, or ``start`` is no place of it.
        """
        self._store = store
        self._margin = margin
        self._earliest = earliest
        self._dry_run = dry_run
        #: What the keys of each part of the sweep begin with, in the order in which they are looked at.
        self._parts = [b""] if prefix is None else [kind_prefix(prefix, kind) for kind in sorted(KINDS)]
        self._part, self._cursor = self._parse(start) if start else (0, None)
        #: A place may be a little before where it was made, by one key, so that even the smallest steps get on.
        self._again = 1 if start else 0
        #: What has been done so far. It changes with each step.
        self.sweep = Sweep(place=start or self._place([]))

    @property
    def done(self) -> bool:
        """Whether all has been looked at."""
        return self._part == len(self._parts)

    def step(self, batch: int = BATCH) -> None:
        """Look at the next keys, ``batch`` of them at most, and remove the expired of them.

        :raises StoreUnavailable: in an outage. Nothing of this step is counted; it may be repeated.
        """
        start = self._parts[self._part]
        page, cursor = self._store.scan(start, self._cursor, batch + self._again)
        kinds = {key: found[1] for key in page if (found := prefix_and_kind(key)) is not None}
        values = self._store.get_many(kinds)
        latest = time.time() - self._margin
        expired, unreadable = {}, 0
        for key, value in values.items():
            try:
                if self._is_expired(value, latest):
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
        self._cursor, self._again = cursor, 0
        if cursor is None:
            self._part += 1
        self.sweep.place = self._place(page)

    def run(self, max_seconds: float | None = None, batch: int = BATCH) -> Iterator[Sweep]:
        """Step by step until all is done or the time is over; ``sweep`` after each step.

        :param max_seconds: after so long no step is begun. The first one always is, so that each run gets on.
        """
        deadline = math.inf if max_seconds is None else time.monotonic() + max_seconds
        while not self.done:
            self.step(batch)
            yield self.sweep
            if time.monotonic() >= deadline:
                return

    def _is_expired(self, value: bytes, latest: float) -> bool:
        document = documents.decode(value)
        return documents.is_expired(document, latest) and document[documents.EXPIRES] >= self._earliest

    def _place(self, page: list[bytes]) -> str | None:
        """The place behind ``page``: what the keys looked at begin with, an ``@``, the store's cursor."""
        if self.done:
            return None
        cursor = self._cursor or b""
        if cursor in page[-1:]:
            # So the store goes by the keys in their order, and has to go on behind one that is gone: the beginning of
            # a key is as good a cursor, and only a little earlier.
            begins = shortened(cursor).partition("…")[0]
            cursor = begins.encode("utf-8", "surrogateescape")[:_LONGEST_PLACE]
        return f"{self._parts[self._part].decode('ascii')}@{quote(cursor, safe=':/')}"

    def _parse(self, place: str) -> tuple[int, bytes | None]:
        start, at, cursor = place.partition("@")
        for number, part in enumerate(self._parts):
            if at and part.decode("ascii") == start:
                return number, unquote_to_bytes(cursor) or None
        raise ConfigurationError(
            f"{place[:80]!r} is no place where a sweep of this prefix has ended: give the same prefix as then, or "
            "leave the place out, to begin again"
        )


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

    :param prefix: the application's; None: all records of our kinds, under whatever prefix.
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
