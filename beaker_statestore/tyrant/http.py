"""HTTP/1.1 as Tokyo Tyrant speaks it: requests <-> the same commands. No sockets, clocks or threads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant.calls import Call
from beaker_statestore.tyrant.wire import Limits, Reading

__all__ = ["HTTPPolicy", "read", "speaks"]


@dataclass(frozen=True, slots=True)
class HTTPPolicy:
    """Whose requests are answered: those of programs, and of pages of the same origin."""

    #: Besides loopback addresses, names that a ``Host`` may have.
    hosts: Iterable[str] = ()


def speaks(line: bytes) -> bool:
    """Whether ``line`` begins a request of this protocol."""
    return False


def read(line: bytes, limits: Limits, policy: HTTPPolicy) -> Reading[Call]:
    """The request that ``line`` begins, with its headers and body."""
    raise ProtocolError("not yet")
    yield 0
