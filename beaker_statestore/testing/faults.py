"""A store that fails when it is told to, so that "whatever call fails, ..." can be proven call by call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from beaker_statestore.exceptions import OutcomeUnknown, StoreUnavailable
from beaker_statestore.stores.base import PAGE, Store

__all__ = ["FaultyStore"]

T = TypeVar("T")


class FaultyStore(Store):
    """Another store, with an outage at exactly the n-th call.

    Every verb is one call, as it would be on a wire; ``modify``, ``keys`` and ``apply`` are as many as the verbs they
    use. Fault by fault, until nothing fails any more::

        for n in itertools.count(1):
            store.fail(n)
            ...                     # what is to be proven
            if not store.has_failed:
                break

    `open_store` answers it unchanged, so it can be given wherever a URL can. Threads may share it.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        #: The names of all calls since the last `fail`, the failed ones included.
        self.calls: list[str] = []
        #: Whether a call has failed since the last `fail`.
        self.has_failed = False
        self._fail_at: int | None = None
        self._executed = False
        self._for_good = False
        self._lock = threading.Lock()

    def fail(self, n: int, *, executed: bool = False, for_good: bool = False) -> None:
        """Fail at the ``n``-th call from now; 1 is the next one.

        :param executed: the store carries the call out, and the answer is lost: `OutcomeUnknown` if the call may have
            written, `StoreUnavailable` if it only reads. Otherwise the store never sees the call: `StoreUnavailable`.
        :param for_good: every later call fails as well, unseen by the store, until `heal`. Otherwise only this one.
        """
        if n < 1:
            raise ValueError(f"there is no call number {n} from now; the next is 1")
        with self._lock:
            self.calls = []
            self.has_failed = False
            self._fail_at, self._executed, self._for_good = n, executed, for_good

    def heal(self) -> None:
        """Fail no more."""
        with self._lock:
            self._fail_at = None

    def _call(self, name: str, function: Callable[..., T], *arguments: Any, writes: bool = True) -> T:
        with self._lock:
            self.calls.append(name)
            number = len(self.calls)
            first = number == self._fail_at
            later = self._for_good and self._fail_at is not None and number > self._fail_at
            self.has_failed |= first or later
            executed = self._executed
        if later or (first and not executed):
            raise StoreUnavailable(f"a test's fault before call {number}, {name}")
        result = function(*arguments)
        if first and writes:
            raise OutcomeUnknown(f"a test's fault after call {number}, {name}")
        if first:
            raise StoreUnavailable(f"a test's fault after call {number}, {name}")
        return result

    def get(self, key: bytes) -> bytes | None:
        return self._call("get", self.store.get, key, writes=False)

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        return self._call("get_many", self.store.get_many, keys, writes=False)

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        self._call("put", self.store.put, key, value, expires_at)

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        self._call("put_many", self.store.put_many, items)

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        return self._call("add", self.store.add, key, value, expires_at)

    def delete(self, key: bytes) -> bool:
        return self._call("delete", self.store.delete, key)

    def delete_many(self, keys: Iterable[bytes]) -> None:
        self._call("delete_many", self.store.delete_many, keys)

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        return self._call("compare_and_swap", self.store.compare_and_swap, key, expected, new, expires_at)

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        return self._call("scan", self.store.scan, prefix, cursor, limit, writes=False)

    def count(self) -> int:
        return self._call("count", self.store.count, writes=False)

    def size(self) -> int:
        return self._call("size", self.store.size, writes=False)

    def sync(self) -> None:
        self._call("sync", self.store.sync)

    def ping(self) -> None:
        self._call("ping", self.store.ping, writes=False)

    def command(self, name: str, arguments: Sequence[bytes] = ()) -> Any:
        return self._call(name, self.store.command, name, arguments)

    def close(self) -> None:
        """Close the other store. Not a call, and never fails."""
        self.store.close()
        self.closed = True
