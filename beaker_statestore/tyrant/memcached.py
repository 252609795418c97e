"""memcached's text protocol as Tokyo Tyrant speaks it: lines <-> the same commands. No sockets, clocks or threads."""

from __future__ import annotations

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant.calls import Call
from beaker_statestore.tyrant.wire import Limits, Reading

__all__ = ["read", "speaks"]


def speaks(line: bytes) -> bool:
    """Whether ``line`` begins a request of this protocol."""
    return False


def read(line: bytes, limits: Limits) -> Reading[Call]:
    """The request that ``line`` begins, with its data if it has some."""
    raise ProtocolError("not yet")
    yield 0
