"""Leases: locks that processes share, each one record in the store they all use. They end with their holder's crash.

A holder's record has a random token, so that it is recognised whatever happens on the way, and another for each time
the lock is taken. Whoever waits watches the record: if it has stood unchanged for the length of a lease by the
waiter's own monotonic clock, its holder is taken for dead and the record is swapped for the waiter's. So nobody
compares the clocks of two hosts. (The record's ``_expires`` is only for the sweeper, which clears what crashes leave
behind and nobody asks for again.)

A lease is no proof against a holder that works on for longer than its lease: then there are two. It is for work that
should not be done twice, not for work that must not.
"""

from __future__ import annotations

import json
import logging
import math
import os
import random
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Final, TypeAlias

from beaker_statestore import observe
from beaker_statestore.documents import EXPIRES
from beaker_statestore.exceptions import ContentionError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.stores.base import Store

__all__ = ["Lease"]

log = logging.getLogger(__name__)

#: How many lengths of the lease a waiter waits. Enough for a holder that has crashed, and for its successor to need
#: its own lease to the end; a third, so that the wait does not end where that of others only begins.
PATIENCE: Final = 3
#: The first and the longest pause between two looks at the record, in seconds.
FIRST_PAUSE: Final = 0.001
LONGEST_PAUSE: Final = 0.05
#: How long after its lease a record may be cleared, in seconds: more than clocks of hosts differ.
CLEARED_AFTER: Final = 86400.0
#: How many contested locks a process remembers. More are remembered only for a lease after each was last looked at.
MAX_CONTESTS: Final = 1000
#: How many failed attempts at one lock a process remembers, in case they turn up in the store later.
MAX_ABANDONED: Final = 100

#: One lock: its store and its record key.
Place: TypeAlias = tuple[Store, bytes]


class Lease:
    """A lock of the record ``key`` in ``store``, for all threads of all processes that use this store.

    :param key: the record, for nothing else to use. Messages show it.
    :param seconds: how long the lock stands when its holder is heard of no more. The same for all who use it.

    A thread that holds it may acquire it again, by this object or by another of the same store and key, and releases
    it as often. Once the lease is over, that is another lock: it is taken anew, and released once. So a thread that
    was kept from releasing it does not have it for ever. An instance keeps nothing of its own and may be shared by
    threads. A child of a fork holds none of its parent's locks.

    Of the store it needs only `get` and `compare_and_swap`, so that one that could not release refuses to take.
    """

    def __init__(self, store: Store, key: bytes, seconds: float) -> None:
        self._store = store
        self._key = key
        self._seconds = seconds
        self._place: Place = (store, key)

    def acquire(self, wait: bool = True) -> bool:
        """Take the lock; True if this thread has it now.

        :param wait: whether to wait for as long as others hold it, but not beyond `PATIENCE` lengths of the lease.
            Without, the answer comes at once, and is False if somebody else has it.
        :raises ContentionError: others held it all that time. It is no False, since Beaker's Value.get_value goes on
            to make the value whatever this answers, and all who have waited would do so at the same time.
        :raises StoreUnavailable: the store failed. If it has the lock on record for us nevertheless, or ever will,
            that ends with the lease, or with the next `acquire` in this process.
        """
        holding = _process.holdings.get(self._place)
        now = time.monotonic()
        if holding is not None and now - holding.since < self._seconds:
            holding.depth += 1
            return True
        mine = _Holding.new(self._seconds)
        try:
            taken = self._swap(None if holding is None else holding.value, mine) or (
                self._wait(mine, now + PATIENCE * self._seconds) if wait else self._look(mine)
            )
        except BaseException:  # a greenlet's time-out may end it, too
            self._contest().abandon(mine.value)
            raise
        if taken:
            _process.holdings[self._place] = mine
        elif mine.doubtful:
            # It may be carried out yet, and then nobody has the lock.
            self._contest().abandon(mine.value)
        return taken

    def release(self) -> None:
        """Give the lock back. Does nothing if this thread does not have it, or if somebody has taken it over.

        Never raises for a store that fails: what the lock was taken for is done, and the lock ends with its lease.
        """
        holding = _process.holdings.get(self._place)
        if holding is None:
            return
        holding.depth -= 1
        if holding.depth:
            return
        del _process.holdings[self._place]
        try:
            self._remove(holding.value)
        except StoreUnavailable as error:
            observe.count("locks.release_failed")
            self._contest().abandon(holding.value)
            log.warning("%s could not be released and stands for up to %g s more: %s", self, self._seconds, error)
        _process.wake(self._place)

    def __str__(self) -> str:
        return f"the lock {self._key.decode('utf-8', 'backslashreplace')}"

    def _wait(self, mine: _Holding, deadline: float) -> bool:
        """Whether the lock could be had by ``deadline``; one thread of each process looks, the others queue for it."""
        contest = self._contest()
        begun = time.monotonic()
        if not contest.turn.acquire(timeout=max(0.0, deadline - begun)):
            raise self._contention()
        try:
            failed_at, failure = contest.failure
            if failed_at >= begun:
                # Or a store that hangs would keep a queue for one time-out after the other.
                raise StoreUnavailable(failure)
            pause = FIRST_PAUSE
            while True:
                contest.released.clear()
                try:
                    if self._look(mine):
                        return True
                except StoreUnavailable as error:
                    contest.failure = time.monotonic(), str(error)
                    raise
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._contention()
                # Jitter keeps rivals out of step; it needs no cryptographic quality.
                contest.released.wait(min(left, pause * random.uniform(0.5, 1)))  # noqa: S311
                pause = min(LONGEST_PAUSE, 2 * pause)
        finally:
            contest.turn.release()

    def _look(self, mine: _Holding) -> bool:
        """Look at the record and take the lock if it is free or its holder dead; whether it is ours now."""
        current = self._store.get(self._key)
        if current == mine.value:
            # An attempt of ours was carried out after we had looked for what came of it.
            return True
        if current is None:
            return self._swap(None, mine)
        if not self._contest().stood_for(current, self._seconds):
            return False
        taken = self._swap(current, mine)
        if taken:
            observe.count("locks.taken_over")
        return taken

    def _swap(self, expected: bytes | None, mine: _Holding) -> bool:
        """Whether the record was as expected and is ours now."""
        mine.since = time.monotonic()
        try:
            return self._store.compare_and_swap(self._key, expected, mine.value, mine.expires_at)
        except OutcomeUnknown:
            observe.count("locks.outcome_unknown")
            mine.doubtful = True
        return self._store.get(self._key) == mine.value

    def _remove(self, mine: bytes) -> None:
        try:
            if not self._store.compare_and_swap(self._key, mine, None):
                observe.count("locks.lost")
        except OutcomeUnknown:
            observe.count("locks.outcome_unknown")
            # Nobody else ever has this token, so it does no harm to do it twice.
            self._store.compare_and_swap(self._key, mine, None)

    def _contest(self) -> _Contest:
        return _process.contest(self._place, self._seconds)

    def _contention(self) -> ContentionError:
        return ContentionError(
            f"others had {self} for all of the {PATIENCE * self._seconds:g} s that we waited: see why what they do "
            "under it takes so long, or fails"
        )


@dataclass(slots=True)
class _Holding:
    """A lock that a thread has: the bytes of its record, since when, by its own clock, and how often acquired."""

    value: bytes
    expires_at: float
    since: float = -math.inf
    depth: int = 1
    #: Whether a swap for it had an unknown outcome.
    doubtful: bool = False

    @classmethod
    def new(cls, seconds: float) -> _Holding:
        """One with a new token, for a lease of ``seconds``."""
        expires_at = math.ceil(time.time() + seconds + CLEARED_AFTER)
        document = {"token": secrets.token_hex(16), EXPIRES: expires_at}
        return cls(json.dumps(document, separators=(",", ":")).encode(), expires_at)


class _Contest:
    """What a process knows of a lock that others had when it wanted it.

    Without it the process begins to watch the record anew, so whoever looks at least once in a lease must find it
    again: it is forgotten no earlier than that (`_Process.contest`).
    """

    def __init__(self) -> None:
        #: Had by the thread that looks at the record; the others of this process wait for it.
        self.turn = threading.Lock()
        #: Set when a thread of this process releases the lock.
        self.released = threading.Event()
        #: When the store last failed the one whose turn it was, on the monotonic clock, and how.
        self.failure = (-math.inf, "")
        #: Until when it may not be forgotten, on the monotonic clock.
        self.needed_until = -math.inf
        self._seen: tuple[bytes | None, float] = (None, 0.0)
        #: Only appended to and cut in front, each in one step, so threads need no lock for it.
        self._abandoned: list[bytes] = []

    def stood_for(self, value: bytes, seconds: float) -> bool:
        """Whether the record, just seen to be ``value``, was seen so ``seconds`` ago or earlier, or was abandoned.

        It was the same all the time between, as no two ever have the same token.
        """
        if value in self._abandoned:
            return True
        now = time.monotonic()
        seen, since = self._seen
        if seen != value:
            self._seen = seen, since = value, now
        return now - since >= seconds

    def abandon(self, value: bytes) -> None:
        """Note that nobody has the lock, should the record be ``value``, so that nobody here waits for its end."""
        self._abandoned.append(value)
        del self._abandoned[:-MAX_ABANDONED]


class _Holdings(threading.local):
    """The locks that the current thread has."""

    def __init__(self) -> None:
        self.of: dict[Place, _Holding] = {}


class _Process:
    """What the threads of one process know of their locks."""

    def __init__(self) -> None:
        self._holdings = _Holdings()
        self._contests: dict[Place, _Contest] = {}
        self._lock = threading.Lock()

    @property
    def holdings(self) -> dict[Place, _Holding]:
        """The locks that the current thread has."""
        return self._holdings.of

    def contest(self, place: Place, seconds: float) -> _Contest:
        """What is known of the lock, to be remembered for ``seconds`` at least.

        When there are too many, the longest unused are forgotten whose time has come.
        """
        now = time.monotonic()
        with self._lock:
            contest = self._contests.pop(place, None) or _Contest()
            contest.needed_until = now + seconds
            self._contests[place] = contest
            while len(self._contests) > MAX_CONTESTS:
                oldest = next(iter(self._contests))
                if self._contests[oldest].needed_until >= now:
                    break
                del self._contests[oldest]
            return contest

    def wake(self, place: Place) -> None:
        """Tell the thread that waits for the lock, if there is one, that it has been released."""
        contest = self._contests.get(place)
        if contest is not None:
            contest.released.set()


_process = _Process()


def _after_fork_in_child() -> None:
    # What the parent's threads have is theirs, and some of it held by threads that the child does not have.
    global _process
    _process = _Process()


os.register_at_fork(after_in_child=_after_fork_in_child)
