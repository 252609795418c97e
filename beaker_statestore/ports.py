"""Who holds a TCP port of this machine: for messages about a port that is taken.

Reads what Linux tells the present user (proc(5)); elsewhere, and about other users' processes, nothing is known.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_TABLES: Final = ("/proc/net/tcp", "/proc/net/tcp6")
_LISTENING: Final = "0A"


def holder(port: int) -> str | None:
    """The process that listens at ``port``, as in ``ttserver (process 4711)``, or ``None`` if that is not known."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    if not sockets:
        return None
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(link) in sockets for link in (process / "fd").iterdir()):
                return f"{(process / 'comm').read_text().strip()} (process {process.name})"
        except OSError:
            continue  # another user's, or it has just ended
    return None


def _listening_inodes(port: int) -> Iterator[str]:
    for table in _TABLES:
        try:
            lines = Path(table).read_text().splitlines()
        except OSError:
            continue
        for line in lines[1:]:
            # Columns: number, local address:port, remote address:port, state, queues, timer, retransmits, user,
            # timeout, inode. Numbers are hexadecimal, the inode decimal.
            columns = line.split()
            if columns[3] == _LISTENING and int(columns[1].rpartition(":")[2], 16) == port:
                yield columns[9]
