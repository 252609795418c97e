"""The `Store` interface: records of bytes under keys of bytes, and one atomic primitive.

Nothing here or below knows JSON, Beaker or mail. Every store passes the suite in `beaker_statestore.testing`, and a
Tyrant client is a store like any other, so that whatever is written against this interface runs on all of them.

Keys and values are ``bytes``; both may be empty and hold any byte. Absence is ``None`` or ``False``, never an
exception. A store that cannot answer raises `StoreUnavailable`; one that cannot tell whether a write was done raises
`OutcomeUnknown`. Stores are safe to share between threads, and usable in a child after a fork.
"""

from __future__ import annotations

import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final, TypeVar

from beaker_statestore import observe
from beaker_statestore.exceptions import ConfigurationError, ContentionError, OutcomeUnknown, StateStoreError

__all__ = ["UNREAD", "LocalStore", "LocalVerbs", "Store", "Unread", "Verbs", "back_off"]

T = TypeVar("T")

#: How long `Store.modify` keeps trying against others who change the same record, in seconds.
CONTENTION_DEADLINE: Final = 5.0
#: `Store.modify` tries at once this often before it begins to wait a little between tries.
EAGER_TRIES: Final = 3
#: It waits so for the first so many seconds; from then on it tries at once again.
COURTESY: Final = 1.0
#: The longest such wait, in seconds.
LONGEST_BACKOFF: Final = 0.05
#: The first and the longest pause between two looks of `Store.wait`, in seconds.
FIRST_LOOK: Final = 0.005
LONGEST_LOOK: Final = 0.5
#: How many keys are read at once where nobody says.
PAGE: Final = 1000
#: A page ends before that once its keys have so many bytes.
PAGE_BYTES: Final = 1024 * 1024


def back_off(tries: int, begun: float) -> None:
    """Wait a little before one more try to change a record that others change, too.

    :param tries: how many have failed.
    :param begun: when the first one was, on the monotonic clock.
    """
    # Whoever has tried for long tries hardest, or those who only begin would always be quicker.
    if tries > EAGER_TRIES and time.monotonic() < begun + COURTESY:
        # Jitter keeps rivals out of step; it needs no cryptographic quality.
        time.sleep(random.uniform(0, min(LONGEST_BACKOFF, 0.001 * 2**tries)))  # noqa: S311


class Unread:
    """The type of `UNREAD`, so that it is distinct from ``None``, which means absent."""

    def __repr__(self) -> str:
        return "UNREAD"


UNREAD: Final = Unread()


class Verbs(ABC):
    """What can be done to records, on a store or within one of its transactions."""

    @abstractmethod
    def get(self, key: bytes) -> bytes | None:
        """The value of ``key``, or ``None`` when there is no such record."""

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        """The values of those of ``keys`` that have a record, in the order asked."""
        found = ((key, self.get(key)) for key in keys)
        return {key: value for key, value in found if value is not None}

    @abstractmethod
    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        """Store ``value`` under ``key``, whatever was there.

        ``expires_at`` (epoch seconds) is a hint that only engines with expiry of their own use, here and below.
        """

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        """Put each of ``items``; all at once where the engine can."""
        for key, value in items.items():
            self.put(key, value)

    @abstractmethod
    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        """Store ``value`` only if ``key`` has no record; ``False`` when it has, which is left as it was."""

    @abstractmethod
    def delete(self, key: bytes) -> bool:
        """Remove the record; ``False`` when there was none."""

    def delete_many(self, keys: Iterable[bytes]) -> None:
        """Remove the records of ``keys``; those without one are passed over."""
        for key in keys:
            self.delete(key)

    @abstractmethod
    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        """Replace ``expected`` by ``new`` if and only if the record is, byte for byte, as expected.

        ``None`` means absent, on either side. ``False`` when the record was otherwise, and then nothing changed.
        Atomic with regard to every other verb, thread and process.
        """

    @abstractmethod
    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """A page of the keys that begin with ``prefix``, and the cursor of the next page (``None`` after the last).

        A cursor is opaque and only good for the same prefix. Each key that is there all the time is delivered at
        least once; one that comes or goes meanwhile may or may not be. A page may be empty and not the last. No hot
        path may use this. ``limit`` (1 or more) is how many keys a page has at most.
        """

    def pages(self, prefix: bytes = b"") -> Iterator[list[bytes]]:
        """All keys that begin with ``prefix``, a list for each page, with the promises of `scan`.

        What is done to the records of a page before the next one is asked for does no harm.
        """
        cursor: bytes | None = None
        while True:
            page, cursor = self.scan(prefix, cursor)
            yield page
            if cursor is None:
                return

    def keys(self, prefix: bytes = b"") -> Iterator[bytes]:
        """All keys that begin with ``prefix``, with the promises of `scan`."""
        for page in self.pages(prefix):
            yield from page

    @abstractmethod
    def count(self) -> int:
        """How many records there are."""


class Store(Verbs):
    """A place for records, local or remote."""

    #: Whether `close` has been called.
    closed: bool = False
    #: Whether the engine itself removes records once their ``expires_at`` has passed; others ignore that hint.
    expires: bool = False

    def apply(self, operations: Sequence[Callable[[Verbs], T]]) -> list[T]:
        """Run ``operations`` in order and answer their results in the same order.

        Each is called with the verbs to use, and must use no other way to the store. Engines with transactions run
        them all in one (all or nothing, unseen by others until done) and may run an operation again from the start,
        so it must have no effect but through its verbs; the others, as here, run one after the other. An exception
        of an operation ends the transaction and is raised.
        """
        return [operation(self) for operation in operations]

    def modify(
        self,
        key: bytes,
        function: Callable[[bytes | None], bytes | None],
        *,
        known: bytes | Unread | None = UNREAD,
        expires_at: Callable[[bytes], float | None] | None = None,
    ) -> bytes | None:
        """Replace the record by what ``function`` makes of it, atomically, and answer the new value.

        :param function: gets the current value (``None`` = absent) and returns the new one (``None`` = remove); it
            must be free of side effects, since it is called again whenever somebody else was quicker. Returning what
            it was given writes nothing.
        :param known: the value as last read by the caller; saves a read when it is still current.
        :param expires_at: computes the hint of the same name from the new value; called only if `expires` is true.
        :raises ContentionError: others kept changing the record for `CONTENTION_DEADLINE` seconds.
        :raises StoreUnavailable: the store failed. Where a swap's outcome was unknown, the record has been read back
            first: if it holds the new value, the modification succeeded. (So a function whose results may be the
            same for different callers, as a counter's, can then be done once too few or too often; let it add
            something of the caller's own.)
        """
        begun = time.monotonic()
        deadline = begun + CONTENTION_DEADLINE
        verified = isinstance(known, Unread)
        current = self.get(key) if isinstance(known, Unread) else known
        # What swaps of unknown outcome may have written, or may yet: a stalled server can execute one late.
        unsure: list[bytes | None] = []
        tries = 0
        while True:
            new = function(current)
            if new == current:
                if verified:
                    return current
                # It may have changed since the caller read it, and then there may be something to do after all.
                current, verified = self.get(key), True
                if current == new:
                    return current
                continue
            hint = expires_at(new) if self.expires and expires_at is not None and new is not None else None
            doubt: OutcomeUnknown | None = None
            try:
                if self.compare_and_swap(key, current, new, hint):
                    return new
                observe.count("store.contention")
            except OutcomeUnknown as error:
                observe.count("store.outcome_unknown")
                doubt = error
                unsure.append(new)
            current, verified = self.get(key), True
            if current in unsure:
                return current
            tries += 1
            if time.monotonic() >= deadline:
                # The message has no key: whoever knows a session's key owns the session.
                raise doubt or ContentionError(f"others changed the record while we tried to, {tries} times")
            back_off(tries, begun)

    def wait(self, key: bytes, seconds: float) -> bool:
        """Whether ``key`` has a record, waiting up to so many seconds until it has; False when it has none by then.

        A store that can be told says so at once. Others, as here, look again and again, with growing pauses.

        :param seconds: 0 or more. How much longer than that a call may take is as for every other verb.
        """
        deadline = time.monotonic() + seconds
        pause = FIRST_LOOK
        while self.get(key) is None:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # Jitter keeps those who wait for the same out of step; it needs no cryptographic quality.
            time.sleep(min(left, pause * random.uniform(0.5, 1)))  # noqa: S311
            pause = min(LONGEST_LOOK, 2 * pause)
        return True

    @abstractmethod
    def size(self) -> int:
        """How much room the records take, in bytes, as the engine counts it."""

    @abstractmethod
    def sync(self) -> None:
        """Return once everything written so far would survive a power cut, as far as the engine can promise it."""

    @abstractmethod
    def close(self) -> None:
        """Release connections, files and memory. Closing twice is harmless; other use after it is an error."""

    def ping(self) -> None:
        """Return if the store answers; raise `StoreUnavailable` if it does not."""
        self.get(b"")

    def command(self, name: str, arguments: Sequence[bytes] = ()) -> Any:
        """Something that only this engine can do, under the engine's own name for it."""
        raise StateStoreError(f"{type(self).__name__} has no command {name!r}")

    def __enter__(self: T) -> T:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class LocalVerbs(Verbs):
    """The verbs of an engine in this process, which knows its keys in byte order."""

    #: Commands of Tokyo Tyrant that the engine carries out itself, in its own way, by their names on the wire. Each
    #: gets the arguments of the wire and answers what belongs into the reply (``True`` where nothing does), or
    #: ``None`` if it failed. All others are carried out by the verbs.
    native: Mapping[str, Callable[..., Any]] = {}

    @abstractmethod
    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        """The keys from ``start`` on (from behind it, with ``after``), in byte order; good until the next write.

        Needs no record at ``start``, so any key is a place to go on from.
        """

    @abstractmethod
    def clear(self) -> None:
        """Remove every record."""

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """As promised in `Verbs`; here the cursor is the last key of the page."""
        if limit < 1:
            raise ValueError(f"a page of {limit} keys would never end the scan")
        start, after = (prefix, False) if cursor is None else (cursor, True)
        page: list[bytes] = []
        size = 0
        for key in self.ordered_keys(start, after=after):
            if not key.startswith(prefix):
                break
            if len(page) >= limit or size > PAGE_BYTES:
                return page, page[-1]
            page.append(key)
            size += len(key)
        return page, None


def _nothing(_: object) -> tuple[int, int]:
    return 0, 0


def _one(value: bytes | None) -> tuple[int, int]:
    return (0, 1) if value is None else (1, 0)


class LocalStore(LocalVerbs, Store):
    """An engine in this process: what a server may have behind it.

    An engine writes `apply`; every verb on its own is a transaction of one operation.
    """

    #: A write waits for the disk, so it must not run on an event loop.
    blocking: bool = False
    #: What ``stat`` calls it: the type of Tokyo Cabinet's databases that it behaves as.
    kind: str = "on-memory tree"
    #: Of the file that has the records, if there is one.
    path: str | None = None
    #: It carries out ``fwmkeys``, ``misc regex`` and ``misc range`` itself (`LocalVerbs.native`), each in one go.
    scans_itself: bool = False

    @abstractmethod
    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        """As promised in `Store`, always in one transaction."""

    @abstractmethod
    def crash_can_lose(self, interval: float | None = None) -> str:
        """One sentence for operators: what is lost when the process or the machine dies.

        :param interval: somebody calls `sync` every so many seconds.
        """

    def backup(self, path: str) -> None:
        """Write all records, as they are at one moment, to a new file at ``path``, which this store could open.

        May take long; may be called from a thread of its own while the store is used.

        :raises ConfigurationError: the engine keeps no files, or ``path`` is taken or cannot be written.
        """
        raise ConfigurationError(f"{type(self).__name__} keeps no file that could be copied")

    def _alone(
        self, kind: str, operation: Callable[[LocalVerbs], T], found: Callable[[T], tuple[int, int]] = _nothing
    ) -> T:
        """The result of a transaction of this one operation, of which who listens is told.

        :param kind: what statistics call it.
        :param found: how many records the result says were there, and how many were not.
        """
        listener = observe.listener
        began = listener.clock()
        if not began:
            return self.apply([operation])[0]
        server = self.path or type(self).__name__
        try:
            result = self.apply([operation])[0]
        except Exception:
            listener.operation(server, kind, began, failed=True)
            raise
        listener.operation(server, kind, began, *found(result))
        return result

    def get(self, key: bytes) -> bytes | None:
        return self._alone("get", lambda verbs: verbs.get(key), _one)

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        wanted = list(keys)
        return self._alone(
            "get_many", lambda verbs: verbs.get_many(wanted), lambda found: (len(found), len({*wanted}) - len(found))
        )

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        self._alone("put", lambda verbs: verbs.put(key, value, expires_at))

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        self._alone("put_many", lambda verbs: verbs.put_many(items))

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        return self._alone("add", lambda verbs: verbs.add(key, value, expires_at))

    def delete(self, key: bytes) -> bool:
        return self._alone("delete", lambda verbs: verbs.delete(key))

    def delete_many(self, keys: Iterable[bytes]) -> None:
        unwanted = list(keys)
        self._alone("delete_many", lambda verbs: verbs.delete_many(unwanted))

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        return self._alone("compare_and_swap", lambda verbs: verbs.compare_and_swap(key, expected, new, expires_at))

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        return self._alone("scan", lambda verbs: verbs.scan(prefix, cursor, limit))

    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        """As promised in `LocalVerbs`, and good for as long as one likes: each page is a transaction of its own."""
        while page := self._page(start, after):
            yield from page
            start, after = page[-1], True

    def _page(self, start: bytes, after: bool) -> list[bytes]:
        return self._alone("scan", lambda verbs: list(islice(verbs.ordered_keys(start, after=after), PAGE)))

    def count(self) -> int:
        return self._alone("count", lambda verbs: verbs.count())

    def clear(self) -> None:
        self._alone("clear", lambda verbs: verbs.clear())
