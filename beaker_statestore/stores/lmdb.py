"""Records in an LMDB file: the store behind a server of one's own. Knows nothing of the wire.

``lmdb:///var/lib/app/state.lmdb``, or ``lmdb:relative/path``. Behind a ``?``, joined by ``&``:

``sync``
    When a commit reaches the disk. With ``os``, the default, when the operating system writes it out, or upon
    `LMDBStore.sync`: no death of a process loses anything, but a power cut can. With ``always``, before it returns.
``map_size``
    How large the file can become without a pause, as ``64GiB``, which is the default on 64-bit machines. It takes
    address space and no room on the disk, and is doubled when it must be.

Beside the file there is another, with ``-lock`` behind its name. Any number of threads and processes of one machine
may share them, but no network file system. A process that is stopped while it writes makes the writes of the others
fail after two seconds; reads go on. (Not so a program that writes with LMDB alone: see `lmdbfile`.)
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Final, TypeVar

from beaker_statestore.exceptions import ConfigurationError, StateStoreError
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.stores.lmdbfile import LMDBFile, close_file, open_file
from beaker_statestore.stores.urls import byte_size, file_path, options, redacted

if TYPE_CHECKING:
    import lmdb

__all__ = ["LMDBStore"]

T = TypeVar("T")

#: Not more than half of what a 32-bit process has.
DEFAULT_MAP_SIZE: Final = 64 * 2**30 if sys.maxsize > 2**32 else 2**30

_SYNC_MODES: Final = {
    "os": "a dying process loses nothing; a power cut loses what was written {since}, and can damage the "
    "file where the file system reorders writes",
    "always": "nothing that was acknowledged: each commit is on the disk first",
}

# LMDB's own keys have 1 to 511 bytes (mdb_env_get_maxkeysize). Ours are stored behind one byte, which makes the empty
# key legal and keeps apart what is not a record. A long one is stored as its head and a digest, 511 bytes in all,
# which no other has; its value then begins with the full key.
_TAG: Final = b"/"
_LONGEST: Final = 511
_DIGEST_SIZE: Final = 32
_HEAD_SIZE: Final = _LONGEST - len(_TAG) - _DIGEST_SIZE
_KEY_LENGTH: Final = struct.Struct(">I")


def _store_key(key: bytes) -> bytes:
    if len(key) <= _HEAD_SIZE:
        return _TAG + key
    return _TAG + key[:_HEAD_SIZE] + hashlib.blake2b(key, digest_size=_DIGEST_SIZE).digest()


def _store_value(key: bytes, value: bytes) -> bytes:
    return value if len(key) <= _HEAD_SIZE else _KEY_LENGTH.pack(len(key)) + key + value


def _load_value(key: bytes, data: bytes) -> bytes:
    return data if len(key) <= _HEAD_SIZE else data[_KEY_LENGTH.size + len(key) :]


def _load_key(stored: bytes, cursor: lmdb.Cursor[bytes]) -> bytes:
    """The key that is stored as ``stored``, where ``cursor`` is."""
    if len(stored) < _LONGEST:
        return stored[len(_TAG) :]
    data = cursor.value()
    (length,) = _KEY_LENGTH.unpack_from(data)
    return data[_KEY_LENGTH.size : _KEY_LENGTH.size + length]


def _head(stored: bytes) -> bytes:
    """What keys have in common that are perhaps not stored in their order; all else is."""
    return stored[: len(_TAG) + _HEAD_SIZE]


class _WriteNeeded(BaseException):
    """An operation writes, and is only in a read transaction. Not for its ``except Exception`` to catch."""


class _Transaction(LocalVerbs):
    """The verbs within a transaction of LMDB's."""

    def __init__(self, file: LMDBFile, txn: lmdb.Transaction[bytes], may_write: bool) -> None:
        self._file = file
        self._txn = txn
        self._may_write = may_write

    def _before_write(self) -> None:
        if not self._may_write:
            raise _WriteNeeded

    def get(self, key: bytes) -> bytes | None:
        data = self._txn.get(_store_key(key))
        return None if data is None else _load_value(key, data)

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        self._before_write()
        self._txn.put(_store_key(key), _store_value(key, value))

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        if self.get(key) is not None:
            return False
        self.put(key, value)
        return True

    def delete(self, key: bytes) -> bool:
        if not self._may_write and self.get(key) is None:
            return False
        self._before_write()
        return self._txn.delete(_store_key(key))

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
        with self._txn.cursor() as cursor:
            if cursor.set_range(_head(_TAG + start)):
                for _, together in groupby(cursor.iternext(values=False), _head):
                    for key in sorted(_load_key(stored, cursor) for stored in together):
                        if key > start or (key == start and not after):
                            yield key

    def count(self) -> int:
        return self._file.entries(self._txn) - 1

    def clear(self) -> None:
        if self.count():
            self._before_write()
            self._file.clear(self._txn)


class LMDBStore(LocalStore):
    """The records of one LMDB file, opened by each process when it first uses the store."""

    kind = "B+ tree"
    path: str

    def __init__(self, path: str | os.PathLike[str], *, sync: str = "os", map_size: int = DEFAULT_MAP_SIZE) -> None:
        """
        :param path: of the file, which is made if need be; its directory must be there.
        :param sync: ``os`` or ``always``, as described above.
        :param map_size: in bytes.
        :raises ConfigurationError: ``sync`` is something else.
        """
        if sync not in _SYNC_MODES:
            raise ConfigurationError(f"sync={sync} is unknown; it is {' or '.join(_SYNC_MODES)}")
        # Now, as a daemon may change its directory before the file is first used.
        self.path = os.path.abspath(path)
        self.blocking = sync == "always"
        self._sync_mode = sync
        self._map_size = map_size
        self._file: LMDBFile | None = None

    @classmethod
    def from_url(cls, url: str, **_timing: Any) -> LMDBStore:
        """The store that ``url`` names, as described above; timeouts concern no local store."""
        found = options(url, ("sync", "map_size"))
        map_size = byte_size(found["map_size"], "map_size") if "map_size" in found else DEFAULT_MAP_SIZE
        if not map_size:
            raise ConfigurationError(f"map_size in {redacted(url)} must be more than 0")
        return cls(file_path(url), sync=found.get("sync", "os"), map_size=map_size)

    def __repr__(self) -> str:
        return f"<LMDBStore {self.path}>"

    def _open_file(self) -> LMDBFile:
        file = self._file
        if file is None or not file.alive:
            if self.closed:
                raise StateStoreError(f"the store on {self.path} has been closed")
            file = self._file = open_file(self.path, self, sync=self._sync_mode, map_size=self._map_size)
        return file

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        """As promised in `Store`. The write lock is taken only when an operation does write."""
        file = self._open_file()
        try:
            return file.run(lambda txn: _each(operations, _Transaction(file, txn, may_write=False)), write=False)
        except _WriteNeeded:
            return file.run(lambda txn: _each(operations, _Transaction(file, txn, may_write=True)), write=True)

    def size(self) -> int:
        file = self._open_file()
        return file.run(file.size, write=False)

    def sync(self) -> None:
        self._open_file().sync()

    def close(self) -> None:
        file, self._file, self.closed = self._file, None, True
        if file is not None:
            close_file(file, self)

    def backup(self, path: str) -> None:
        """As promised in `LocalStore`; writers go on meanwhile, and the copy has no gaps."""
        self._open_file().copy(path)

    def crash_can_lose(self, interval: float | None = None) -> str:
        since = "since the last sync" if interval is None else f"in the last {interval:g} s"
        return _SYNC_MODES[self._sync_mode].format(since=since)


def _each(operations: Sequence[Callable[[LocalVerbs], T]], transaction: _Transaction) -> list[T]:
    return [operation(transaction) for operation in operations]
