"""Tokyo Cabinet's databases: what an original ttserver keeps its records in, read and written as they are.

``cabinet:///var/lib/app/state.tcb#bnum=1000#opts=l``: behind the path, tuning as ttserver takes it. Before that, behind
a ``?`` and joined by ``&``:

``sync``
    When a change reaches the disk. With ``always``, the default, before it is answered: once for each batch. With
    ``os``, when the operating system writes it out, or upon `CabinetStore.sync`; a tree is then in this process's
    memory until a sync, and lost if the process is killed.
``reserve``
    How much of the disk has to be free, 64MiB unless it is said. With less than that, nothing is written, and with less
    than half of it nothing is removed either, since the library does not survive a full disk. A tree with an ``lcnum``
    above 1024 wants 16 KiB more for each.

Hash databases (``.tch``) and B+ trees (``.tcb``) are stores. Fixed-length (``.tcf``) and table databases (``.tct``) and
those in memory (``*``, ``+``) have rules of their own about keys and values, and can only be served.

What becomes of a batch of writes when the process is killed: with ``always`` it is done or not, since it is one
transaction of the library's, with a log beside the file (``.wal``) that whoever opens it next applies. With ``os`` a
part may have been done; the library writes in place, so the record or, in a tree, the page that was being written in
that very moment can be damaged. A power cut in that moment can do the same with either.

When an operation raises, what the batch has changed is put back, all values of a key in order. Not put back are
``optimize``, what ``misc search`` removes with ``out``, and records that were cleared all at once if the database has
more than `LARGEST_UNDO` bytes; for databases that are only served also what a key such as ``next`` led to, and what
``capnum`` has thrown out.

When writing the file fails in spite of the reserve, nothing more is written until the process is restarted. What is
there can still be read, and may have a part of the batch that failed. Whoever then opens a hash database that had
``always`` finds it without that batch; a tree, and what had ``os``, may need its backup. Who else may open the file:
see `cabinetfile`.
"""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Any, Final, TypeVar

from beaker_statestore.exceptions import ConfigurationError, StateStoreError, StoreUnavailable
from beaker_statestore.stores.base import PAGE, LocalStore, LocalVerbs
from beaker_statestore.stores.cabinetfile import LEAST_RESERVE, RESERVE, CabinetFile, CabinetName, is_cabinet_name
from beaker_statestore.stores.urls import byte_size, file_path, options, redacted, split

__all__ = ["CabinetStore", "is_cabinet_name"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: How long a thread waits for the others, in seconds.
PATIENCE: Final = 30.0
#: Clearing a database that has more bytes cannot be undone.
LARGEST_UNDO: Final = 64 * 2**20
#: The repetitions in braces of one regular expression, multiplied, may be so many; glibc writes each of them out.
MOST_REPETITIONS: Final = 1000
#: Bytes of one regular expression.
LONGEST_EXPRESSION: Final = 1000

_STORES: Final = ("hash", "B+ tree")
_INT64_MIN: Final = -(2**63)
_INT64_MAX: Final = 2**63 - 1

#: The library's functions for ``misc`` (tcadbmisc) and which of their arguments are keys of records that they change,
#: so that these can be put back. There is none that names a file or runs a program; and none but these is called.
_FUNCTIONS: Final[dict[bytes, slice]] = {
    **dict.fromkeys((b"put", b"putkeep", b"putcat", b"putdup", b"putdupback", b"out"), slice(1)),
    b"putlist": slice(None, None, 2),
    b"outlist": slice(None),
    **dict.fromkeys((b"get", b"getlist", b"getpart", b"iterinit", b"iternext", b"regex", b"range", b"error"), slice(0)),
    **dict.fromkeys((b"defrag", b"cacheclear", b"setindex", b"search", b"metasearch", b"genuid"), slice(0)),
}
#: Those of them that the library may refuse in a transaction.
_OUTSIDE: Final = frozenset({b"defrag", b"cacheclear", b"setindex"})


class _Transaction(LocalVerbs):
    """The verbs within a batch: they work on the database itself and remember what to put back."""

    def __init__(self, file: CabinetFile) -> None:
        self._file = file
        self._database = file.database
        #: The values of each key that was changed, before that; a key has more than one only in a B+ tree.
        self._before: dict[bytes, list[bytes]] = {}
        self._lost: list[str] = []

    def end(self) -> None:
        self._file.end(acknowledge=True)

    def roll_back(self) -> None:
        if not self._file.is_broken:
            self._put_back()
        self._file.end(acknowledge=False)

    def _put_back(self) -> None:
        database = self._database
        for key, values in self._before.items():
            if database.is_tree:
                database.misc(b"outlist", [key])
                # One by one behind each other, which no other function does.
                database.misc(b"putlist", [piece for value in values for piece in (key, value)])
            elif values:
                database.put(key, values[0])
            else:
                database.out(key)
        if self._lost:
            logger.error("%s: not undone: %s", self._file.name.place, ", ".join(self._lost))

    def _values(self, key: bytes) -> list[bytes]:
        if self._database.is_tree:
            values = self._database.values(key)
            if values is None:
                self._file.found_nothing(self._database.failure())
            return values or []
        value = self.get(key)
        return [] if value is None else [value]

    def _change(self, key: bytes, size: int = 0, *, removes: bool = False) -> list[bytes]:
        """Get ready to change the record of ``key``; its values, as they are at the beginning of the batch."""
        file = self._file
        file.begin(removes=removes)
        file.take_room(len(key) + size, removes=removes)
        before = self._before.get(key)
        if before is None:
            before = self._before[key] = self._values(key)
        return before

    # -- the verbs

    def get(self, key: bytes) -> bytes | None:
        value = self._database.get(key)
        if value is None and self._file.name.is_file:
            self._file.found_nothing(self._database.failure())
        return value

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        self._change(key, len(value))
        if not self._database.put(key, value):
            self._file.fail("refused a record")

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        if self.get(key) is not None:
            return False
        self._change(key, len(value))
        if self._database.putkeep(key, value):
            return True
        self._refused()
        return False

    def delete(self, key: bytes) -> bool:
        if self.get(key) is None:
            return False
        self._change(key, removes=True)
        if self._database.out(key):
            return True
        self._refused()
        return False

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        if self.get(key) != expected:
            return False
        if new is None:
            self.delete(key)
        elif new != expected:
            self.put(key, new)
        return True

    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        return self._file.ordered_keys(start, after)

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """As promised in `Verbs`. Where the database has no order, a scan begins by sorting all keys that it is about.

        They are kept until it ends. Of scans at the same time, those with the narrower prefixes may have to sort them
        again.
        """
        file = self._file
        if file.database.is_ordered:
            return super().scan(prefix, cursor, limit)
        if limit < 1:
            raise ValueError(f"a page of {limit} keys would never end the scan")
        snapshot = file.snapshot
        if snapshot is None or cursor is None or not snapshot.covers(prefix):
            snapshot = file.snapshot = file.all_keys(prefix)
        start, after = (prefix, False) if cursor is None else (cursor, True)
        page = snapshot.page(start, after, limit + 1)
        if len(page) > limit and page[limit].startswith(prefix):
            return page[:limit], page[limit - 1]
        file.snapshot = None
        return [key for key in page[:limit] if key.startswith(prefix)], None

    def count(self) -> int:
        return self._database.rnum()

    def clear(self) -> None:
        if not self._database.rnum():
            return
        self._file.begin()
        if self._database.size() > LARGEST_UNDO:
            self._lost.append("all records were cleared")
        else:
            for key in self.ordered_keys():
                self._before.setdefault(key, self._values(key))
        if not self._file.vanish():
            self._file.fail("could not be cleared")

    # -- what goes straight to the library

    @cached_property
    def native(self) -> Mapping[str, Callable[..., Any]]:  # type: ignore[override]
        return {name: partial(function, self) for name, function in _NATIVE.items()}

    def _refused(self) -> None:
        """Raise if the file failed; otherwise it was the record, and the answer says so."""
        self._file.found_nothing(self._database.failure())

    def _put(self, key: bytes, value: bytes) -> bool | None:
        self._change(key, len(value))
        if self._database.put(key, value):
            return True
        self._refused()
        return None

    def _putcat(self, key: bytes, value: bytes) -> bool | None:
        before = self._change(key, len(value))
        if before:  # it may have to move
            self._file.take_room(len(before[0]))
        if self._database.putcat(key, value):
            return True
        self._refused()
        return None

    def _vsiz(self, key: bytes) -> int | None:
        size = self._database.vsiz(key)
        if size is None:
            self._refused()
        return size

    def _addint(self, key: bytes, number: int) -> int | None:
        self._change(key)
        total = self._database.addint(key, number)
        if total is None:
            self._refused()
        return total

    def _adddouble(self, key: bytes, integral: int, fractional: int) -> float | None:
        self._change(key)
        total = self._database.adddouble(key, _number(integral, fractional))
        if total is None:
            self._refused()
        return total

    def _fwmkeys(self, prefix: bytes, maximum: int) -> list[bytes]:
        keys = self._database.fwmkeys(prefix, maximum)
        return keys.take(0, len(keys))

    def _optimize(self, parameters: bytes) -> bool | None:
        if self._file.optimize(parameters):
            return True
        self._refused()
        return None

    # The library's own cursor of a tree goes on to the next record when the one that it is at is deleted, and then to
    # the one behind that. So a tree's iterator is here, and a place among the keys.

    def _iterinit(self) -> bool | None:
        if self._database.is_ordered:
            self._file.iterator = (b"", -1)
            return True
        return self._database.iterinit() or None

    def _iternext(self) -> bytes | None:
        if not self._database.is_ordered:
            return self._database.iternext()
        record = self._next_record()
        return None if record is None else record[0]

    def _next_record(self) -> tuple[bytes, int] | None:
        """The next key of a tree, and which of its values."""
        file = self._file
        if file.iterator is None:
            return None
        key, left = file.iterator
        if left > 0:
            # Those that were deleted meanwhile were the first.
            there = self._database.value_count(key)
            left = min(left, there)
            if left:
                file.iterator = key, left - 1
                return key, there - left
        found = self._database.range(key, left < 0, 1)
        if not found:
            file.iterator = None
            return None
        file.iterator = found[0], self._database.value_count(found[0]) - 1
        return found[0], 0

    # -- misc

    def _misc(self, name: bytes, arguments: Sequence[bytes], _options: int = 0) -> list[bytes] | None:
        name = name.partition(b"\0")[0]  # the library reads it as a C string
        if name in self._own_functions:
            return self._own_functions[name](arguments)
        keys = _FUNCTIONS.get(name)
        if keys is None or not all(map(_is_bearable, _expressions(name, arguments))):
            return None
        for key in arguments[keys]:
            before = self._change(key)
            # What is there may have to move.
            self._file.take_room(sum(map(len, before)))
        if arguments[keys]:
            self._file.take_room(sum(map(len, arguments)))
        elif name in _OUTSIDE:
            self._file.begin()
            self._file.pause()
            results = self._database.misc(name, arguments)
            self._file.resume()
            return results
        elif name == b"genuid":
            self._file.begin()
        elif name.endswith(b"search") and _removes(arguments):
            self._file.begin()
            self._lost.append(name.decode())
        return self._database.misc(name, arguments)

    @cached_property
    def _own_functions(self) -> Mapping[bytes, Callable[[Sequence[bytes]], list[bytes] | None]]:
        functions: dict[bytes, Callable[[Sequence[bytes]], list[bytes] | None]] = {
            b"sync": self._misc_sync,
            b"vanish": self._misc_vanish,
            b"optimize": self._misc_optimize,
        }
        if self._database.is_ordered:
            functions |= {b"iterinit": self._misc_iterinit, b"iternext": self._misc_iternext}
        return functions

    def _misc_sync(self, _arguments: Sequence[bytes]) -> list[bytes]:
        self._file.pause()
        self._file.sync()
        self._file.resume()
        return []

    def _misc_vanish(self, _arguments: Sequence[bytes]) -> list[bytes]:
        self.clear()
        return []

    def _misc_optimize(self, arguments: Sequence[bytes]) -> list[bytes] | None:
        return [] if self._optimize(arguments[0] if arguments else b"") else None

    def _misc_iterinit(self, arguments: Sequence[bytes]) -> list[bytes] | None:
        start = arguments[0] if arguments else b""
        if arguments and not self._database.range(start, True, 1):
            return None
        self._file.iterator = (start, -1)
        return []

    def _misc_iternext(self, _arguments: Sequence[bytes]) -> list[bytes] | None:
        record = self._next_record()
        if record is None:
            return None
        key, number = record
        return [key, (self._database.values(key) or [b""])[number]]


_NATIVE: Final[dict[str, Callable[..., Any]]] = {
    "put": _Transaction._put,
    "putnr": _Transaction._put,
    "putcat": _Transaction._putcat,
    "vsiz": _Transaction._vsiz,
    "iterinit": _Transaction._iterinit,
    "iternext": _Transaction._iternext,
    "fwmkeys": _Transaction._fwmkeys,
    "addint": _Transaction._addint,
    "adddouble": _Transaction._adddouble,
    "optimize": _Transaction._optimize,
    "misc": _Transaction._misc,
}


def _number(integral: int, fractional: int) -> float:
    """What ``adddouble`` gets as two integers, in ttserver's order of checks (ttunpackdouble)."""
    if integral == _INT64_MIN:
        return math.nan if fractional == _INT64_MIN else -math.inf
    if integral == _INT64_MAX:
        return math.inf
    return integral + fractional / 10**12


def _removes(arguments: Sequence[bytes]) -> bool:
    return any(argument.lower().startswith((b"out", b"remove")) for argument in arguments)


def _expressions(name: bytes, arguments: Sequence[bytes]) -> list[bytes]:
    """The regular expressions among the arguments of a ``misc`` function."""
    if name == b"regex":
        return list(arguments[:1])
    if not name.endswith(b"search"):
        return []
    conditions = (argument.split(b"\0") for argument in arguments)
    # Only some operators take one; what bears the check is no condition that anybody misses.
    return [parts[3] for parts in conditions if len(parts) > 3 and parts[0].lower() == b"addcond"]


def _is_bearable(expression: bytes) -> bool:
    """Whether glibc can compile and match a regular expression in reasonable time and memory.

    Repetitions within repetitions are written out, a reference back to a group has it try all possibilities, and a
    group within a group takes a piece of its stack.
    """
    if len(expression) > LONGEST_EXPRESSION or re.search(rb"\\[1-9]", expression):
        return False
    counts = (max(map(int, re.findall(rb"\d+", braces)), default=1) for braces in re.findall(rb"\{[^}]*\}", expression))
    return math.prod(max(count, 1) for count in counts) <= MOST_REPETITIONS


class CabinetStore(LocalStore):
    """The records of one Tokyo Cabinet database, opened when it is first used, by one process.

    A child of that process must have a store of its own; it cannot use this one.
    """

    blocking = True

    def __init__(self, name: str | os.PathLike[str], *, sync: str = "always", reserve: int = RESERVE) -> None:
        """
        :param name: as ttserver takes it: ``casket.tch#bnum=1000000``, ``*``, ``+#capnum=1000``. A file is made if
            need be; its directory must be there.
        :param sync: ``always`` or ``os``, as described above.
        :param reserve: how much of the disk has to be free, in bytes.
        :raises ConfigurationError: ``name`` or ``sync`` is something else.
        """
        if sync not in ("always", "os"):
            raise ConfigurationError(f"sync={sync} is unknown; it is always or os")
        if reserve < LEAST_RESERVE:
            raise ConfigurationError(
                f"reserve={reserve} is too little for Tokyo Cabinet; leave {LEAST_RESERVE} bytes or more"
            )
        # Now, as a daemon may change its directory before the file is first used.
        self._name = CabinetName.parse(os.fspath(name))
        self.kind = self._name.kind
        self.path = self._name.place if self._name.is_file else None
        self._always = sync == "always"
        self._reserve = reserve
        self._file: CabinetFile | None = None
        # Reentrant, so that an operation that goes to the store itself, which it must not, meets no deadlock.
        self._lock = threading.RLock()
        self._closing: weakref.finalize[..., CabinetStore] | None = None
        _stores.add(self)

    @classmethod
    def from_url(cls, url: str, **_timing: Any) -> CabinetStore:
        """The store that ``url`` names, as described above; timeouts concern no local store.

        :raises ConfigurationError: it is a database that can only be served.
        """
        found = options(url, ("sync", "reserve"))
        reserve = byte_size(found["reserve"], "reserve") if "reserve" in found else RESERVE
        tuning = split(url).fragment
        store = cls(
            file_path(url) + (f"#{tuning}" if tuning else ""), sync=found.get("sync", "always"), reserve=reserve
        )
        if store.kind not in _STORES:
            raise ConfigurationError(
                f"{redacted(url)} is a {store.kind} database, which has rules of its own about keys and values: "
                f"it can only be served (statestore serve --db {store._name}); a store ends in .tch or .tcb"
            )
        return store

    def __repr__(self) -> str:
        return f"<CabinetStore {self._name}>"

    @cached_property
    def native(self) -> Mapping[str, Callable[..., Any]]:  # type: ignore[override]
        """Each as a transaction of its own."""
        return {name: partial(self._native, name) for name in _NATIVE}

    def _native(self, name: str, *arguments: Any) -> Any:
        return self._alone(lambda verbs: verbs.native[name](*arguments))

    def _enter(self) -> CabinetFile:
        """The file, open, with the lock held: to be released by whoever calls this."""
        if not self._lock.acquire(timeout=PATIENCE):
            raise StoreUnavailable(f"another thread has been using {self._name.place} for {PATIENCE:.0f} s")
        try:
            if self.closed:
                raise StateStoreError(f"the store on {self._name.place} has been closed")
            file = self._file
            if file is None:
                file = self._file = CabinetFile(self._name, always=self._always, reserve=self._reserve)
                # A tree that nobody closes is lost.
                self._closing = weakref.finalize(self, _close_at_last, file)
            if file.pid != os.getpid():
                raise StoreUnavailable(
                    f"{self._name.place} belongs to the process that opened it before the fork ({file.pid}); "
                    "serve it with `statestore serve` and connect to that from several processes"
                )
            file.forget_old_snapshot()
            return file
        except BaseException:
            self._lock.release()
            raise

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        """As promised in `Store`; what a crash leaves of it is told above."""
        file = self._enter()
        try:
            transaction = _Transaction(file)
            try:
                results = [operation(transaction) for operation in operations]
            except BaseException:
                transaction.roll_back()
                raise
            transaction.end()
            return results
        finally:
            self._lock.release()

    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        """As promised in `LocalStore`. Where the database has no order, these are the keys of one moment."""
        file = self._enter()
        try:
            keys = None if file.database.is_ordered else file.all_keys()
        finally:
            self._lock.release()
        while page := self._page(start, after) if keys is None else keys.page(start, after, PAGE):
            yield from page
            start, after = page[-1], True

    def size(self) -> int:
        """How many bytes the file has, or the records in memory take."""
        file = self._enter()
        try:
            return file.database.size()
        finally:
            self._lock.release()

    def sync(self) -> None:
        file = self._enter()
        try:
            file.sync()
        finally:
            self._lock.release()

    def backup(self, path: str) -> None:
        """As promised in `LocalStore`; whoever uses the store meanwhile waits."""
        if not self._name.is_file:
            raise ConfigurationError(f"the database {self._name} keeps no file that could be copied")
        file = self._enter()
        try:
            file.copy(path)
        finally:
            self._lock.release()

    def close(self) -> None:
        """As promised in `Store`.

        :raises StoreUnavailable: what was not synchronised could not all be written.
        """
        with self._lock:
            self.closed = True
            file, self._file = self._file, None
            if self._closing is not None:
                self._closing.detach()
            if file is not None:
                file.close()

    def crash_can_lose(self, interval: float | None = None) -> str:
        since = "since the last sync" if interval is None else f"in the last {interval:g} s"
        if not self._name.is_file:
            return "everything: the records are only in this process's memory"
        if self._always:
            return (
                "nothing that was acknowledged: each batch is on the disk first; but a power cut can damage what is "
                "being written in that moment, as Tokyo Cabinet writes in place"
            )
        if self.kind in ("B+ tree", "table"):
            return (
                f"all that was written {since}, also when only the process is killed, since it is in its memory until "
                "then; and if that happens while it is being written out, the file can be damaged"
            )
        return (
            f"a dying process loses nothing but what it is writing in that moment; a power cut loses what was written "
            f"{since}, and can damage the file"
        )


def _close_at_last(file: CabinetFile) -> None:
    try:
        file.close()
    except StateStoreError as error:
        logger.error("%s", error)


_stores: weakref.WeakSet[CabinetStore] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for store in _stores:
        # A thread that the child does not have may hold it.
        store._lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork_in_child)
