"""Where the package tells what happens in it, at next to no cost while nobody listens.

This module does not know what is done with the numbers. `listener` is replaced as a whole by whoever wants them;
the default ignores everything.
"""

from __future__ import annotations


class Listener:
    """What a listener may override. Calls come from any thread and must neither block nor raise."""

    def count(self, name: str, n: int = 1) -> None:
        """``n`` more events called ``name`` have happened."""


listener: Listener = Listener()


def count(name: str, n: int = 1) -> None:
    """Report ``n`` events called ``name``."""
    listener.count(name, n)
