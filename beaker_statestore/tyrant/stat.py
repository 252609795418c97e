"""The text that ``stat`` answers: a line a figure, name and value apart by a tab, in ttserver's order.

Knows this process and its machine, as far as Linux tells of them; what it does not tell is left out.
"""

from __future__ import annotations

import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from beaker_statestore import __version__

#: The protocol that is spoken, and the library version that spoke it first, in the original's numbering.
PROTOCOL_VERSION: Final = "0.91"
LIBRARY_VERSION: Final = 324


def stat_text(
    kind: str, path: str | None, records: int, size: int, calls: Mapping[str, int], misses: Mapping[str, int]
) -> str:
    """The figures of a database of so many ``records`` and bytes, and how often each command came and found nothing.

    :param kind: as which of the original's types of database it behaves.
    """
    lines = [
        ("version", __version__),
        ("libver", LIBRARY_VERSION),
        ("protver", PROTOCOL_VERSION),
        ("os", platform.system()),
        ("time", f"{time.time():.6f}"),
        ("pid", os.getpid()),
        ("sid", 0),
        ("type", kind),
        *((("path", path),) if path is not None else ()),
        ("rnum", records),
        ("size", size),
        ("bigend", int(sys.byteorder == "big")),
        *_machine(),
        *((f"cnt_{name}", count) for name, count in calls.items()),
        *((f"cnt_{name}_miss", count) for name, count in misses.items()),
    ]
    return "".join(f"{name}\t{value}\n" for name, value in lines)


def _machine() -> Iterator[tuple[str, object]]:
    page = os.sysconf("SC_PAGE_SIZE")
    process = Path("/proc/self")
    if process.exists():
        yield "fd", len(os.listdir(process / "fd"))
    yield "loadavg", f"{os.getloadavg()[0]:.6f}"
    yield "memsize", page * os.sysconf("SC_PHYS_PAGES")
    if process.exists():
        yield "memrss", page * int((process / "statm").read_text().split()[1])
    usage = resource.getrusage(resource.RUSAGE_SELF)
    yield "ru_user", f"{usage.ru_utime:.6f}"
    yield "ru_sys", f"{usage.ru_stime:.6f}"
    yield "ru_real", f"{time.monotonic() - _STARTED:.6f}"


_STARTED: Final = time.monotonic()
