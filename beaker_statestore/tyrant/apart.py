"""Requests that take long, carried out apart from the batches of the others, a step at a time.

``copy`` may read the whole file, ``fwmkeys``, ``misc regex`` and ``misc range`` look at any number of keys, what
``ext wait`` wants is yet to come, and of ``ext statistics`` the store knows the least. Each of these is a `Job`. What a
scan finds is what was there when it came by, as others go on writing between its steps.
"""

from __future__ import annotations

import logging
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import islice, takewhile
from typing import Any, Final, NamedTuple

from beaker_statestore.complaints import Complaints
from beaker_statestore.exceptions import ConfigurationError, StateStoreError
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.tyrant import commands, ere
from beaker_statestore.tyrant.backups import Backups
from beaker_statestore.tyrant.commands import FAILURE, SUCCESS, TOO_MUCH, Reply, Request
from beaker_statestore.tyrant.texts import function_name, number

__all__ = ["ABSENT", "PRESENT", "Backup", "Job", "Scan", "Statistics", "Wait", "scan_for", "wait_for"]

logger = logging.getLogger(__name__)

#: One step of a scan looks at so many keys at most, and goes no further once the values that it has found have so many
#: bytes, or so many seconds have passed.
STEP_KEYS: Final = 500
STEP_BYTES: Final = 256 * 1024
STEP_SECONDS: Final = 0.005
#: Bytes of one regular expression, and bytes of a key times the size of the expression that is looked for in it: at
#: worst, each costs 0.15 microseconds, for which all others wait.
LONGEST_EXPRESSION: Final = 1000
LONGEST_MATCH: Final = 256 * 1024
#: No wait is longer, in seconds, whatever was asked for: so whoever has gone without a word is forgotten.
LONGEST_WAIT: Final = 60.0
_MILLISECONDS: Final = re.compile(rb"[0-9]{1,15}")

#: What ``wait`` answers.
PRESENT: Final = Reply(SUCCESS, b"1")
ABSENT: Final = Reply(SUCCESS, b"0")


class Job(ABC):
    """One such request."""

    #: What came of it, once it is done.
    reply: Reply
    #: It waits for the disk, in a thread of its own, and may use the store beside others.
    waits: bool = False

    @abstractmethod
    def step(self) -> bool:
        """Do the next part; whether that was the last one."""


class Backup(Job):
    """``copy``."""

    waits = True

    def __init__(self, name: bytes, store: LocalStore, backups: Backups | None, complain: Complaints) -> None:
        self._complain = complain
        self._name = name
        self._store = store
        self._backups = backups

    def step(self) -> bool:
        """Write the whole copy."""
        if self._backups is None:
            self._complain("a client asked for a copy, and there is no directory for backups")
            self.reply = Reply(FAILURE)
            return True
        try:
            self._backups.write(self._name, self._store)
        except ConfigurationError as error:
            self._complain("a copy failed: %s", error)
            self.reply = Reply(FAILURE)
        except StateStoreError as error:
            logger.error("a copy failed: %s", error)
            self.reply = Reply(FAILURE)
        else:
            self.reply = Reply(SUCCESS)
        return True


class Wait(Job):
    """``ext wait``: a record, once it is there. The step only looks; who has others wait for it is `waiting`."""

    def __init__(self, key: bytes, seconds: float, store: LocalStore) -> None:
        self.key = key
        self.seconds = seconds
        self._store = store

    def step(self) -> bool:
        """Look whether it is there now."""
        (present,) = self._store.apply([lambda records: records.get(self.key) is not None])
        self.reply = PRESENT if present else ABSENT
        return True


def wait_for(request: Request, store: LocalStore) -> Wait | None:
    """What ``request``, an ``ext wait``, waits for and how long, if that is a number of milliseconds."""
    _, key, value, _ = request.arguments
    if not _MILLISECONDS.fullmatch(value):
        return None
    return Wait(key, min(int(value) / 1000, LONGEST_WAIT), store)


class Statistics(Job):
    """``ext statistics``."""

    def __init__(
        self, figures: Mapping[str, Any], store: LocalStore, report: Callable[[Mapping[str, Any]], bytes], longest: int
    ) -> None:
        """
        :param figures: what is known without the store.
        :param report: makes the reply of them and the store's.
        :param longest: so many bytes it may have.
        """
        self._figures = figures
        self._store = store
        self._report = report
        self._longest = longest

    def step(self) -> bool:
        """Make the whole report."""
        store = {"Records": self._store.count(), "Size of Store (Bytes)": self._store.size()}
        report = self._report({**self._figures, **store})
        self.reply = Reply(SUCCESS, report) if len(report) <= self._longest else Reply(TOO_MUCH)
        return True


class Plan(NamedTuple):
    """Which keys a scan is to find."""

    #: Some of the keys to look at: those behind the cursor, or the first ones, and the next cursor (see `Verbs.scan`).
    page: Callable[[LocalVerbs, bytes | None, int], tuple[list[bytes], bytes | None]]
    matches: Callable[[bytes], bool]
    #: Negative: all.
    maximum: int
    #: Whether their values are wanted too.
    values: bool


class Found(NamedTuple):
    """What one step came upon."""

    pieces: list[bytes]
    keys: int
    #: What is left of the page of keys.
    rest: list[bytes]
    #: Where to go on behind it; ``None``: there is no more.
    cursor: bytes | None


class Scan(Job):
    """A request for all keys of some kind, perhaps with their values."""

    def __init__(self, plan: Plan, store: LocalStore, complain: Complaints, *, keys: int, longest: int) -> None:
        """
        :param keys: if there are more than so many, it fails.
        :param longest: so many bytes may be found at most.
        """
        self._complain = complain
        self._plan = plan
        self._store = store
        self._keys = keys
        self._room = longest
        self._found: list[bytes] = []
        self._count = 0
        self._cursor: bytes | None = None
        #: Kept from step to step: where a database has no order, all its keys are sorted for a page.
        self._page: list[bytes] = []

    def step(self) -> bool:
        """Look at the next keys."""
        if self._count == self._plan.maximum:
            return self._end(Reply(SUCCESS, self._found))
        try:
            (found,) = self._store.apply([self._look])
        except _TooLongError as error:
            self._complain("%s", error)
            return self._end(Reply(TOO_MUCH))
        self._found += found.pieces
        self._count += found.keys
        self._room -= sum(map(len, found.pieces))
        if self._room < 0:
            self._complain("a client asked for more than a reply may hold (--max-reply)")
            return self._end(Reply(TOO_MUCH))
        if self._count > self._keys:
            self._complain("a client asked for more than %d keys at once (--max-keys)", self._keys)
            return self._end(Reply(TOO_MUCH))
        self._page, self._cursor = found.rest, found.cursor
        if (not found.rest and found.cursor is None) or self._count == self._plan.maximum:
            return self._end(Reply(SUCCESS, self._found))
        return False

    def _end(self, reply: Reply) -> bool:
        self.reply = reply
        return True

    def _look(self, records: LocalVerbs) -> Found:
        plan, page, cursor = self._plan, self._page, self._cursor
        if not page:
            page, cursor = plan.page(records, cursor, STEP_KEYS)
        pieces: list[bytes] = []
        looked = count = size = 0
        enough = time.monotonic() + STEP_SECONDS
        for looked, key in enumerate(page, 1):  # noqa: B007 - how far it came is wanted behind the loop
            if plan.matches(key):
                value = records.get(key) if plan.values else b""
                if value is None:
                    continue  # it went since the page was read
                pieces += (key, value) if plan.values else (key,)
                count += 1
                size += len(value)
            done = size > STEP_BYTES or self._count + count in (plan.maximum, self._keys + 1)
            if done or time.monotonic() > enough:
                break
        return Found(pieces, count, page[looked:], cursor)


class _TooLongError(Exception):
    """A key is longer than can be matched in the time that others can be made to wait."""


def scan_for(request: Request, *, ordered: bool) -> Plan | None:
    """What ``request`` looks for, if it looks at keys without end.

    :param ordered: whether the database is one of the original's that knows an order of keys; without, it knows no
        ``range``.
    """
    command, arguments = request
    if command is commands.FWMKEYS:
        prefix, maximum = arguments
        return Plan(_keys_with(prefix), lambda _key: True, maximum, values=False)
    if command is commands.MISC:
        name = function_name(arguments[0])
        planned = _FUNCTIONS.get(name) if ordered or name != b"range" else None
        return None if planned is None else planned(arguments[1])
    return None


def _keys_with(prefix: bytes) -> Callable[[LocalVerbs, bytes | None, int], tuple[list[bytes], bytes | None]]:
    return lambda records, cursor, limit: records.scan(prefix, cursor, limit)


def _regex(arguments: list[bytes]) -> Plan | None:
    if not arguments or len(arguments[0]) > LONGEST_EXPRESSION:
        return None
    source = arguments[0]
    ignore_case = source.startswith(b"*")
    try:
        pattern = ere.Pattern(source[1:] if ignore_case else source, ignore_case=ignore_case)
    except ere.PatternError:
        return None

    def matches(key: bytes) -> bool:
        if len(key) * pattern.size > LONGEST_MATCH:
            raise _TooLongError(f"a client's expression is too large to be looked for in a key of {len(key)} bytes")
        return pattern.found_in(key)

    return Plan(_keys_with(b""), matches, _maximum(arguments), values=True)


def _range(arguments: list[bytes]) -> Plan:
    start = arguments[0] if arguments else b""
    end = arguments[2] if len(arguments) > 2 else None

    def page(records: LocalVerbs, cursor: bytes | None, limit: int) -> tuple[list[bytes], bytes | None]:
        keys = records.ordered_keys(start if cursor is None else cursor, after=cursor is not None)
        found = list(islice(keys if end is None else takewhile(lambda key: key < end, keys), limit))
        return found, found[-1] if len(found) == limit else None

    return Plan(page, lambda _key: True, _maximum(arguments), values=True)


def _maximum(arguments: list[bytes]) -> int:
    """The second argument of ``regex`` and ``range``, where absent and below 1 stand for no limit."""
    maximum = number(arguments[1]) if len(arguments) > 1 else 0
    return maximum if maximum >= 1 else -1


_FUNCTIONS: Final[dict[bytes, Callable[[list[bytes]], Plan | None]]] = {b"regex": _regex, b"range": _range}
