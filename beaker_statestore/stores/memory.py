"""Records in this process's memory: for tests, for trying things out, and for a server that may forget.

Ordered and transactional like the engines that keep files. After a fork, parent and child each go on with a copy of
their own.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

from sortedcontainers import SortedDict

from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.stores.urls import options

__all__ = ["MemoryStore"]

T = TypeVar("T")

#: One for all stores of the process, so that a fork has just this one to hold: a child must get neither a lock that
#: nobody is left to release nor the half of a transaction. Reentrant, so that an operation that goes to the store
#: itself, which it must not, meets no deadlock.
_lock: Final = threading.RLock()
os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


class _Transaction(LocalVerbs):
    """Verbs that work on the records themselves and remember what to put back."""

    def __init__(self, records: SortedDict) -> None:
        self._records = records
        self._before: dict[bytes, bytes | None] = {}
        #: By how many bytes of keys and values there are more now.
        self.growth = 0

    def roll_back(self) -> None:
        for key, value in self._before.items():
            if value is None:
                self._records.pop(key, None)
            else:
                self._records[key] = value

    def get(self, key: bytes) -> bytes | None:
        value: bytes | None = self._records.get(key)
        return value

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        old = self._records.get(key)
        self._before.setdefault(key, old)
        self._records[key] = value
        self.growth += len(value) - len(old) if old is not None else len(key) + len(value)

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        if key in self._records:
            return False
        self.put(key, value)
        return True

    def delete(self, key: bytes) -> bool:
        old = self._records.pop(key, None)
        if old is None:
            return False
        self._before.setdefault(key, old)
        self.growth -= len(key) + len(old)
        return True

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        if self._records.get(key) != expected:
            return False
        if new is None:
            self.delete(key)
        else:
            self.put(key, new)
        return True

    def ordered_keys(self, start: bytes = b"", *, after: bool = False) -> Iterator[bytes]:
        return iter(self._records.irange(start, inclusive=(not after, True)))

    def count(self) -> int:
        return len(self._records)

    def clear(self) -> None:
        self._before = {**self._records, **self._before}
        self.growth -= sum(len(key) + len(value) for key, value in self._records.items())
        self._records.clear()


class MemoryStore(LocalStore):
    """A store that is gone when it is closed, or its process ends."""

    def __init__(self) -> None:
        self._records = SortedDict()
        self._size = 0

    @classmethod
    def from_url(cls, url: str, **_timing: Any) -> MemoryStore:
        """A new store for ``memory:`` or ``memory:name``, which `open_store` keeps apart by name."""
        options(url, ())
        return cls()

    def _get_records(self) -> SortedDict:
        if self.closed:
            raise StateStoreError("this memory store has been closed")
        return self._records

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        with _lock:
            transaction = _Transaction(self._get_records())
            try:
                results = [operation(transaction) for operation in operations]
            except BaseException:
                transaction.roll_back()
                raise
            self._size += transaction.growth
            return results

    def size(self) -> int:
        """How many bytes all keys and values have together."""
        self._get_records()
        return self._size

    def sync(self) -> None:
        """Return at once: memory cannot promise to survive anything."""
        self._get_records()

    def close(self) -> None:
        with _lock:
            self.closed = True
            self._records = SortedDict()

    def crash_can_lose(self, interval: float | None = None) -> str:
        return "everything: the records are only in this process's memory"
