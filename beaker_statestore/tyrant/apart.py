"""Requests that take long, carried out apart from the batches of the others, a step at a time.

``copy`` may read the whole file, and ``fwmkeys``, ``misc regex`` and ``misc range`` look at any number of keys. Each of
these is a `Job`. What a scan finds is what was there when it came by, as others go on writing between its steps.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import islice
from typing import Final, NamedTuple

from beaker_statestore.complaints import Complaints
from beaker_statestore.exceptions import ConfigurationError, StateStoreError
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.tyrant import commands, ere
from beaker_statestore.tyrant.backups import Backups
from beaker_statestore.tyrant.commands import FAILURE, STORE_FAILED, SUCCESS, Reply, Request
from beaker_statestore.tyrant.texts import function_name, number

__all__ = ["Backup", "Job", "Scan", "scan_for"]

logger = logging.getLogger(__name__)

#: One step of a scan looks at so many keys at most, and goes no further once these and the values that it has found
#: have so many bytes. A pattern takes a tenth of a microsecond for each of a key's.
STEP_KEYS: Final = 500
STEP_BYTES: Final = 256 * 1024


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
            path = self._backups.write(self._name, self._store)
        except ConfigurationError as error:
            self._complain("a copy failed: %s", error)
            self.reply = Reply(FAILURE)
        except StateStoreError as error:
            logger.error("a copy failed: %s", error)
            self.reply = Reply(FAILURE)
        else:
            logger.info("copied the store to %s", path)
            self.reply = Reply(SUCCESS)
        return True


class Plan(NamedTuple):
    """Which keys a scan is to find."""

    start: bytes
    #: Whether a key is still in the range that begins at ``start``.
    within: Callable[[bytes], bool]
    matches: Callable[[bytes], bool]
    #: Negative: all.
    maximum: int
    #: Whether their values are wanted too.
    values: bool


class Found(NamedTuple):
    """What one step came upon."""

    pieces: list[bytes]
    keys: int
    #: Where to go on behind; ``None``: there is no more.
    last: bytes | None


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
        self._start, self._after = plan.start, False

    def step(self) -> bool:
        """Look at the next keys."""
        if self._count == self._plan.maximum:
            return self._end(Reply(SUCCESS, self._found))
        (found,) = self._store.apply([self._look])
        self._found += found.pieces
        self._count += found.keys
        self._room -= sum(map(len, found.pieces))
        if self._room < 0:
            self._complain("a client asked for more than a reply may hold")
            return self._end(Reply(STORE_FAILED))
        if self._count > self._keys:
            self._complain("a client asked for more than %d keys at once", self._keys)
            return self._end(Reply(STORE_FAILED))
        if found.last is None or self._count == self._plan.maximum:
            return self._end(Reply(SUCCESS, self._found))
        self._start, self._after = found.last, True
        return False

    def _end(self, reply: Reply) -> bool:
        self.reply = reply
        return True

    def _look(self, records: LocalVerbs) -> Found:
        plan = self._plan
        pieces: list[bytes] = []
        keys = size = 0
        last = None
        for key in islice(records.ordered_keys(self._start, after=self._after), STEP_KEYS):
            last = key
            if not plan.within(key):
                return Found(pieces, keys, None)
            size += len(key)
            if plan.matches(key):
                pieces.append(key)
                keys += 1
                if plan.values:
                    value = records.get(key) or b""
                    pieces.append(value)
                    size += len(value)
            if size > STEP_BYTES or self._count + keys in (plan.maximum, self._keys + 1):
                break
        return Found(pieces, keys, last)


def scan_for(request: Request) -> Plan | None:
    """What ``request`` looks for, if it looks at keys without end."""
    command, arguments = request
    if command is commands.FWMKEYS:
        prefix, maximum = arguments
        return Plan(prefix, lambda key: key.startswith(prefix), _any, maximum, values=False)
    if command is commands.MISC:
        planned = _FUNCTIONS.get(function_name(arguments[0]))
        return None if planned is None else planned(arguments[1])
    return None


def _any(_key: bytes) -> bool:
    return True


def _regex(arguments: list[bytes]) -> Plan | None:
    if not arguments:
        return None
    source = arguments[0]
    ignore_case = source.startswith(b"*")
    try:
        pattern = ere.Pattern(source[1:] if ignore_case else source, ignore_case=ignore_case)
    except ere.PatternError:
        return None
    return Plan(b"", _any, pattern.found_in, _maximum(arguments), values=True)


def _range(arguments: list[bytes]) -> Plan:
    within = (lambda key: key < arguments[2]) if len(arguments) > 2 else _any
    return Plan(arguments[0] if arguments else b"", within, _any, _maximum(arguments), values=True)


def _maximum(arguments: list[bytes]) -> int:
    """The second argument of ``regex`` and ``range``, where absent and below 1 stand for no limit."""
    maximum = number(arguments[1]) if len(arguments) > 1 else 0
    return maximum if maximum >= 1 else -1


_FUNCTIONS: Final[dict[bytes, Callable[[list[bytes]], Plan | None]]] = {b"regex": _regex, b"range": _range}
