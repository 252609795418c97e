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

A key of a tree may have several values, which only old clients of a server can give it: the first counts, ``put``
replaces that, and `Verbs.delete` removes all.

When an operation raises, what the batch has changed is put back, all values of a key in order. Not put back are
``optimize``, what ``misc search`` removes with ``out``, and records that were cleared all at once if the database has
more than `LARGEST_UNDO` bytes; for databases that are only served also what a key such as ``next`` led to, and what
``capnum`` has thrown out. With ``always``, the batch is two transactions if it clears or optimizes the database
or makes an index, and a process that is killed may leave the first of them done.

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
from functools import cached_property, lru_cache, partial
from typing import Any, Final, TypeVar

from beaker_statestore.exceptions import ConfigurationError, StateStoreError, StoreUnavailable
from beaker_statestore.stores.base import PAGE, PAGE_BYTES, LocalStore, LocalVerbs
from beaker_statestore.stores.cabinetfile import (
    LEAST_RESERVE,
    RESERVE,
    CabinetFile,
    CabinetName,
    Snapshot,
    is_cabinet_name,
)
from beaker_statestore.stores.urls import byte_size, file_path, options, redacted, split

__all__ = ["CabinetStore", "is_cabinet_name"]

T = TypeVar("T")

logger = logging.getLogger(__name__)

#: How long a thread waits for the others, in seconds.
PATIENCE: Final = 30.0
#: Clearing a database that has more bytes cannot be undone.
LARGEST_UNDO: Final = 64 * 2**20
#: A key and all its values may have so many bytes, as much as the wire takes. The library keeps sizes as C ints, adds
#: to them, and dies of an overflow.
LARGEST_RECORD: Final = 256 * 2**20
#: So many records are looked for at once.
MOST_FOUND: Final = 1_000_000
#: The repetitions in braces of one regular expression, multiplied, may be so many; glibc writes each of them out.
MOST_REPETITIONS: Final = 1000
#: Bytes of one regular expression.
LONGEST_EXPRESSION: Final = 1000

_STORES: Final = ("hash", "B+ tree")
#: Those whose values are not what was put, so that nothing can be done to them by getting and putting.
_CHANGE_VALUES: Final = ("fixed-length", "table")
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
_ADD: Final = frozenset({b"putcat", b"putdup", b"putdupback", b"putlist"})
_OUTSIDE: Final = frozenset({b"defrag", b"cacheclear", b"setindex"})
#: What a server's own scans do for a store.
_SCANS: Final = frozenset({b"regex", b"range"})
_DECIMAL: Final = re.compile(rb"[ \t]*[+-]?\d{1,18}")


class _TooLargeError(StateStoreError):
    """A record would be larger than any may be."""


class _Transaction(LocalVerbs):
    """The verbs within a batch: they work on the database itself and remember what to put back."""

    def __init__(self, file: CabinetFile) -> None:
        self._file = file
        self._database = file.database
        #: The values of each key that was changed, before that; a key has more than one only in a B+ tree.
        self._before: dict[bytes, list[bytes]] = {}
        #: How many bytes each of those records has now, at most.
        self._sizes: dict[bytes, int] = {}
        self._lost: list[str] = []

    def end(self) -> None:
        self._file.end(acknowledge=True)

    def roll_back(self) -> None:
        if not self._file.is_broken:
            self._put_back()
        self._file.end(acknowledge=False)

    def _put_back(self) -> None:
        database = self._database
        failed = 0
        for key, values in self._before.items():
            if database.is_tree:
                database.out_all(key)
                # One by one behind each other, which no other function does.
                done = database.misc(b"putlist", [piece for value in values for piece in (key, value)]) is not None
            elif values:
                done = database.put(key, values[0])
            else:
                done = database.out(key) or database.get(key) is None
            failed += not done
        if failed:
            self._lost.append(f"changes of {failed} records ({database.failure().text})")
        if self._lost:
            logger.error("%s: not undone: %s", self._file.name.place, ", ".join(self._lost))

    def _values(self, key: bytes) -> list[bytes]:
        if self._database.is_tree:
            values = self._database.values(key)
            if values is None:
                self._file.found_nothing()
            return values or []
        value = self.get(key)
        return [] if value is None else [value]

    def _size(self, key: bytes) -> int:
        """How many bytes all values of ``key`` have."""
        database = self._database
        if database.is_tree and database.value_count(key) > 1:
            return sum(map(len, self._values(key)))
        return database.vsiz(key) or 0

    def _change(self, key: bytes, size: int = 0, *, removes: bool = False, adds: bool = False) -> list[bytes]:
        """Get ready to change the record of ``key``; its values, as they are at the beginning of the batch.

        :param size: so many bytes of a value are about to be written.
        :param adds: what is there stays.
        """
        total = len(key) + size
        if adds:
            total += self._sizes.get(key, LARGEST_RECORD)
            if total > LARGEST_RECORD:
                total = len(key) + size + self._size(key)
            self._sizes[key] = total
        else:
            self._sizes.pop(key, None)
        if total > LARGEST_RECORD:
            raise _TooLargeError(f"a record would have {total} bytes; Tokyo Cabinet bears {LARGEST_RECORD} here")
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
            self._file.found_nothing()
        return value

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        if not self._put(key, value):
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
        if self._database.out_all(key) if self._database.is_tree else self._database.out(key):
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
            # A fixed-length database has no record of any other key than a number.
            return self._put(key, new) is True
        return True

    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        return self._file.ordered_keys(start, after)

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """As promised in `Verbs`. Where the database has no order, a scan begins by sorting all keys that it is about.

        They are kept until it ends, for a few scans of different prefixes at the same time.
        """
        file = self._file
        if file.database.is_tree:
            return super().scan(prefix, cursor, limit)
        snapshot = None if cursor is None else file.snapshot(prefix)
        if snapshot is None:
            snapshot = file.all_keys(prefix)
        page, cursor = _page_of(snapshot, prefix, cursor, limit)
        file.keep_snapshot(prefix, None if cursor is None else snapshot)
        return page, cursor

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
        return {name: partial(self._bounded, function) for name, function in _native_of(self._file.name.kind).items()}

    def _bounded(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(self, *arguments)
        except _TooLargeError:
            return None

    def _refused(self) -> None:
        """Raise if the file failed; otherwise it was the record, and the answer says so."""
        self._file.found_nothing("refused a change")

    def _put(self, key: bytes, value: bytes) -> bool | None:
        self._change(key, len(value))
        if self._database.put(key, value):
            return True
        self._refused()
        return None

    def _putcat(self, key: bytes, value: bytes) -> bool | None:
        before = self._change(key, len(value), adds=True)
        if before:  # it may have to move
            self._file.take_room(len(before[0]))
        if self._database.putcat(key, value):
            return True
        self._refused()
        return None

    def _putshl(self, key: bytes, value: bytes, width: int) -> bool | None:
        stored = self.get(key)
        joined = value if stored is None else stored + value
        return self._put(key, value if stored is None else joined[max(len(joined) - width, 0) :])

    def _out(self, key: bytes) -> bool | None:
        """The first of its values."""
        if self.get(key) is None:
            return None
        self._change(key, removes=True)
        if self._database.out(key):
            return True
        self._refused()
        return None

    def _vsiz(self, key: bytes) -> int | None:
        size = self._database.vsiz(key)
        if size is None:
            self._file.found_nothing()
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
        if self._database.is_tree:
            self._file.iterator = (b"", -1)
            return True
        return self._database.iterinit() or None

    def _iternext(self) -> bytes | None:
        if not self._database.is_tree:
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
        if name in _SCANS:
            if self._file.name.kind in _STORES:
                return None
            arguments = _with_maximum(name, arguments)
        if arguments[keys] and sum(map(len, arguments)) > LARGEST_RECORD:
            return None
        for place, key in enumerate(arguments[keys]):
            before = self._change(key, _added(name, arguments, place), adds=name in _ADD)
            # What is there may have to move.
            self._file.take_room(sum(map(len, before)))
        if arguments[keys]:
            self._file.take_room(sum(map(len, arguments)))
        elif name in _OUTSIDE:
            return self._file.outside(name, arguments)
        elif name == b"genuid":
            self._file.begin()
        elif name.endswith(b"search") and _removes(arguments):
            self._file.begin()
            self._lost.append(name.decode())
        elif name in (b"get", b"getlist") and self._is_too_much(arguments if name == b"getlist" else arguments[:1]):
            return None
        return self._database.misc(name, arguments)

    def _is_too_much(self, keys: Sequence[bytes]) -> bool:
        """Whether these records together are larger than any answer may be."""
        room = LARGEST_RECORD
        for key in keys:
            room -= len(key) + self._size(key)
            if room < 0:
                return True
        return False

    @cached_property
    def _own_functions(self) -> Mapping[bytes, Callable[[Sequence[bytes]], list[bytes] | None]]:
        functions: dict[bytes, Callable[[Sequence[bytes]], list[bytes] | None]] = {
            b"sync": self._misc_sync,
            b"vanish": self._misc_vanish,
            b"optimize": self._misc_optimize,
        }
        if self._database.is_tree:
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
    "iterinit": _Transaction._iterinit,
    "iternext": _Transaction._iternext,
    "addint": _Transaction._addint,
    "adddouble": _Transaction._adddouble,
    "optimize": _Transaction._optimize,
    "misc": _Transaction._misc,
}
_NATIVE_OF_TREES: Final[dict[str, Callable[..., Any]]] = {"out": _Transaction._out}
_NATIVE_OF_NO_STORES: Final[dict[str, Callable[..., Any]]] = {"fwmkeys": _Transaction._fwmkeys}
_NATIVE_WHERE_VALUES_CHANGE: Final[dict[str, Callable[..., Any]]] = {
    "putcat": _Transaction._putcat,
    "putshl": _Transaction._putshl,
    "vsiz": _Transaction._vsiz,
}


@lru_cache
def _native_of(kind: str) -> Mapping[str, Callable[..., Any]]:
    """What a database of ``kind`` does its own way; all else is the same by the verbs."""
    return {
        **_NATIVE,
        **(_NATIVE_OF_TREES if kind == "B+ tree" else {}),
        **(_NATIVE_OF_NO_STORES if kind not in _STORES else {}),
        **(_NATIVE_WHERE_VALUES_CHANGE if kind in _CHANGE_VALUES else {}),
    }


def _page_of(snapshot: Snapshot, prefix: bytes, cursor: bytes | None, limit: int) -> tuple[list[bytes], bytes | None]:
    """A page of the scan of ``prefix``, as `Verbs.scan` answers it."""
    if limit < 1:
        raise ValueError(f"a page of {limit} keys would never end the scan")
    start, after = (prefix, False) if cursor is None else (cursor, True)
    page: list[bytes] = []
    size = 0
    for key in snapshot.page(start, after, limit + 1):
        if not key.startswith(prefix):
            break
        if len(page) >= limit or size > PAGE_BYTES:
            return page, page[-1]
        page.append(key)
        size += len(key)
    return page, None


def _added(name: bytes, arguments: Sequence[bytes], place: int) -> int:
    """How many bytes a ``misc`` function writes under the key of that ``place``."""
    if name == b"putlist":
        return sum(map(len, arguments[2 * place + 1 : 2 * place + 2]))
    return sum(map(len, arguments[1:])) if name.startswith(b"put") else 0


def _with_maximum(name: bytes, arguments: Sequence[bytes]) -> list[bytes]:
    """The arguments of ``regex`` or ``range``, of which the second says how many records are wanted, 0 for all."""
    if not arguments:
        if name == b"regex":
            return []
        arguments = [b""]
    given = _DECIMAL.match(arguments[1]) if len(arguments) > 1 else None
    maximum = int(given[0]) if given else 0
    if not 1 <= maximum <= MOST_FOUND:
        maximum = MOST_FOUND
    return [arguments[0], b"%d" % maximum, *arguments[2:]]


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
        self.scans_itself = self.kind not in _STORES
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
        path = file_path(url)
        if "#" in path:
            raise ConfigurationError(
                f"{redacted(url)}: for the library, # ends a path, so no file or directory may have it"
            )
        store = cls(path + (f"#{tuning}" if tuning else ""), sync=found.get("sync", "always"), reserve=reserve)
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
        return {name: partial(self._native, name) for name in _native_of(self.kind)}

    def _native(self, name: str, *arguments: Any) -> Any:
        return self._alone(name, lambda verbs: verbs.native[name](*arguments))

    def _acquire(self) -> None:
        if not self._lock.acquire(timeout=PATIENCE):
            raise StoreUnavailable(f"another thread has been using {self._name.place} for {PATIENCE:.0f} s")

    def _enter(self) -> CabinetFile:
        """The file, open, with the lock held: to be released by whoever calls this."""
        self._acquire()
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
            file.forget_old_snapshots()
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

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """As promised in `Verbs`; others may use the store while keys are sorted."""
        file = self._enter()
        try:
            if file.database.is_tree:
                return super().scan(prefix, cursor, limit)
            snapshot = None if cursor is None else file.snapshot(prefix)
            keys = file.collect(prefix) if snapshot is None else None
        finally:
            self._lock.release()
        if keys is not None:
            snapshot = Snapshot(keys)
        assert snapshot is not None
        page, cursor = _page_of(snapshot, prefix, cursor, limit)
        file = self._enter()
        try:
            file.keep_snapshot(prefix, None if cursor is None else snapshot)
        finally:
            self._lock.release()
        return page, cursor

    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        """As promised in `LocalStore`. Where the database has no order, these are the keys of one moment."""
        file = self._enter()
        try:
            collected = None if file.database.is_tree else file.collect()
        finally:
            self._lock.release()
        keys = None if collected is None else Snapshot(collected)
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

        :raises StoreUnavailable: what was not synchronised could not all be written, or another thread is still using
            the store, which then is as before.
        """
        self._acquire()
        try:
            self.closed = True
            file, self._file = self._file, None
            if self._closing is not None:
                self._closing.detach()
            if file is not None:
                file.close()
        finally:
            self._lock.release()

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
