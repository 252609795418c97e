"""Servers under a fault: started by another program that limits, traces or misleads them."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from beaker_statestore.testing import ServerProcess

__all__ = ["Misled", "cpu_seconds", "descriptors", "eventually", "resident"]

#: How long to wait for what has to come, in seconds.
PATIENCE = 20.0

#: Starts the same command where uvloop cannot be imported, as if it were not installed.
_WITHOUT_UVLOOP = "import sys; sys.modules['uvloop'] = None; from beaker_statestore.cli import main; main()"


class Misled(ServerProcess):
    """A server whose process another program has prepared, and then become (exec), so that signals reach it."""

    def __init__(self, db: str, *, by: Sequence[str] = (), loop: str = "uvloop", arguments: Sequence[str] = ()) -> None:
        """
        :param by: the program and its arguments, in front of the server's own command.
        :param loop: ``uvloop`` or ``asyncio``.
        """
        super().__init__(db, arguments=arguments)
        python, *command = self._command
        if loop == "asyncio":
            command = ["-c", _WITHOUT_UVLOOP, *command[2:]]  # instead of -m and the package
        self._command = [*by, python, *command]

    def start_and_kill(self, after: float) -> None:
        """Begin to start it, and kill it so many seconds later, wherever it is then."""
        process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        time.sleep(after)
        process.kill()
        process.wait(PATIENCE)

    def __enter__(self) -> Misled:
        super().__enter__()
        return self


def eventually(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Return when ``condition`` holds.

    :raises AssertionError: it does not within ``patience`` seconds; the message says ``what`` was waited for.
    """
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        time.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    """The processor time that the process has used, in seconds."""
    # Behind the name, which may contain anything: fields 14 and 15 of proc(5), utime and stime.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> int:
    """How much memory the process has, in bytes, without the pages of files (those of an LMDB map, say)."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def descriptors(pid: int) -> int:
    """How many files the process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))
