"""Somebody else who is quick, at the worst moment."""

from __future__ import annotations

from collections.abc import Callable

from beaker_statestore.exceptions import OutcomeUnknown
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore

__all__ = ["Overtaken"]


class Overtaken(FaultyStore):
    """A store over which somebody else does something as soon as the answer to a swap was lost."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        #: What he does.
        self.rival: Callable[[], object] = lambda: None

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        try:
            return super().compare_and_swap(key, expected, new, expires_at)
        except OutcomeUnknown:
            self.rival()
            raise
