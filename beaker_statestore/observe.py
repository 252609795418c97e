"""Where the package tells what happens in it, at next to no cost while nobody listens.

This module does not know what is done with the numbers. `listener` is replaced as a whole by whoever wants them;
the default ignores everything. What has a present state to show, as a pool has, can be asked for it: it is among
`watched`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol
from weakref import WeakValueDictionary


class Listener:
    """What a listener may override. Calls come from any thread and must neither block nor raise."""

    def count(self, name: str, n: int = 1) -> None:
        """``n`` more events called ``name`` have happened."""

    def clock(self) -> int:
        """The time for `operation` to begin at, in nanoseconds of the listener's own clock; 0: do not call it."""
        return 0

    def operation(
        self,
        server: str,
        kind: str,
        began: int,
        hits: int = 0,
        misses: int = 0,
        sent: int = 0,
        received: int = 0,
        retries: int = 0,
        failed: bool = False,
    ) -> None:
        """An operation has ended, now.

        :param server: the name of the server or the store that carried it out.
        :param kind: what was done, by the name of the `Store`'s verb where there is one.
        :param began: what `clock` said before it; not 0.
        :param hits: how many of the records that it asked for were there.
        :param misses: and how many were not.
        :param sent: how many bytes of requests went over a wire.
        :param received: how many bytes of replies came over it.
        :param retries: how often it was sent again.
        :param failed: it raised an error, or the server answered with one.
        """


class Watched(Protocol):
    """Something whose present state can be asked for."""

    @property
    def name(self) -> str:
        """The server that it belongs to, as `Listener.operation` is told."""

    def gauges(self) -> Mapping[str, int]:
        """What there is now, by names that say what is counted. Neither blocks nor raises."""


listener: Listener = Listener()

#: All that there is to watch, for as long as it lives. Asked by ``valuerefs``, which others may do meanwhile as well.
watched: Final[WeakValueDictionary[int, Watched]] = WeakValueDictionary()


def count(name: str, n: int = 1) -> None:
    """Report ``n`` events called ``name``."""
    listener.count(name, n)


def watch(source: Watched) -> None:
    """Let a listener ask ``source`` for its state. Keeps no reference to it."""
    watched[id(source)] = source
