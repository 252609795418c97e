"""What a server asks of the system, in order, and what of its file is on the disk at any moment of it.

The order is that of strace, which stops a thread at the beginning and at the end of each call: what one thread does
because another's call has returned stands behind the end of that call.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, NamedTuple

from tests.faults.servers import Misled

__all__ = ["Call", "Commit", "Disk", "Traced", "calls_of", "commits"]

#: What disks write whole, or not at all.
SECTOR: Final = 512

_CALLS: Final = (
    "openat,close,lseek,write,writev,pwrite64,pwritev,ftruncate,fsync,fdatasync,msync,"
    "read,recvfrom,recvmsg,sendto,sendmsg"
)
_WRITES: Final = ("write", "writev", "pwrite64", "pwritev")
_BEGUN: Final = re.compile(r"(\d+) +(\w+)\((.*) <unfinished \.\.\.>$")
_ENDED: Final = re.compile(r"(\d+) +<\.\.\. (\w+) resumed>(.*)$")
_WHOLE: Final = re.compile(r"(\d+) +(\w+)\((.*)$")
_RESULT: Final = re.compile(r"\) += (-?\d+)")
_OFFSET: Final = re.compile(r", (\d+)\) += ")
_FILE: Final = re.compile(r"(\d+)<((?:\\x..)*)>")
_TEXT: Final = re.compile(r'"((?:\\x..)*)"')


class Traced(Misled):
    """A server under strace, as the child of a tracer that ends with it."""

    def __init__(self, db: str, trace: Path, *, contents: bool, loop: str = "uvloop", arguments: tuple[str, ...] = ()):
        """
        :param trace: the file that gets the calls, for `calls_of`.
        :param contents: note what is written whole, and not only its beginning; the trace becomes long.
        """
        tracer = ["strace", "-D", "-f", "-y", "-xx", "--seccomp-bpf", "-qq", "-s", "1000000" if contents else "64"]
        # Not of interest, and many: what is done at signals.
        tracer += ["-e", "signal=none", "-e", f"trace={_CALLS}", "-o", str(trace)]
        super().__init__(db, by=tracer, loop=loop, arguments=arguments)


@dataclass
class Call:
    """A system call that succeeded."""

    name: str
    arguments: str
    result: int
    #: Its places in the order of all beginnings and ends.
    began: int
    ended: int
    descriptor: int = field(init=False)
    #: What the descriptor is: a path, or ``socket:[number]``.
    file: str = field(init=False)

    def __post_init__(self) -> None:
        match = _FILE.match(self.arguments)
        self.descriptor = int(match[1]) if match else -1
        self.file = _decoded(match[2]).decode() if match else ""

    @property
    def data(self) -> bytes:
        """What was read or written, as far as it was noted."""
        return b"".join(map(_decoded, _TEXT.findall(self.arguments)))

    def opens(self, path: Path) -> bool:
        """Whether it opens ``path``; then its result is the descriptor."""
        return self.name == "openat" and self.arguments.endswith(f"<{_encoded(str(path))}>")


def _decoded(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def calls_of(trace: Path) -> list[Call]:
    """The calls in ``trace``, in the order of their ends."""
    calls: list[Call] = []
    begun: dict[str, tuple[int, str]] = {}
    with trace.open() as lines:
        for place, line in enumerate(lines):
            line = line.rstrip("\n")
            began = place
            if match := _BEGUN.match(line):
                begun[match[1]] = place, match[3]
                continue
            if match := _ENDED.match(line):
                began, arguments = begun.pop(match[1])
                rest = arguments + match[3]
            elif match := _WHOLE.match(line):
                rest = match[3]
            else:
                continue
            result = _RESULT.search(rest)
            if result is not None and int(result[1]) >= 0:
                calls.append(Call(match[2], rest, int(result[1]), began, place))
    return calls


class Commit(NamedTuple):
    """One of LMDB's, with ``sync=always``: pages, a sync, and the page that makes it count, which is waited for."""

    began: int
    ended: int
    #: The pages were on the disk before the one that makes them count was written.
    ordered: bool


def commits(calls: list[Call], path: Path) -> Iterator[Commit]:
    """Those to the LMDB file at ``path``."""
    waiting: set[int] = set()
    pages: list[Call] = []
    synced = -1  # when the last sync began that has ended
    for call in calls:
        if call.opens(path):
            (waiting.add if "O_DSYNC" in call.arguments else waiting.discard)(call.result)
        if call.file != str(path):
            continue
        if call.name in ("fsync", "fdatasync"):
            synced = call.began
        elif call.name in _WRITES:
            if call.descriptor not in waiting:
                pages.append(call)
                continue
            yield Commit(pages[0].began if pages else call.began, call.ended, all(p.ended < synced for p in pages))
            pages.clear()


class Disk:
    """A file as it is after a power cut, by the calls that have ended before it.

    What was written is there if a sync began after that, or if it was written in the way that waits (O_DSYNC). Of all
    else any part may be there: each sector by itself, in any order.
    """

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._synced = bytearray()
        #: Where, what, and where in the order it ended.
        self._unsynced: list[tuple[int, bytes, int]] = []
        self._offsets: dict[int, int] = {}
        self._waiting: set[int] = set()

    def feed(self, call: Call) -> None:
        """The next call."""
        if call.opens(Path(self._path)):
            (self._waiting.add if "O_DSYNC" in call.arguments else self._waiting.discard)(call.result)
        if call.file != self._path:
            return
        if call.name == "lseek":
            self._offsets[call.descriptor] = call.result
        elif call.name in ("fsync", "fdatasync"):
            for offset, data, _ in [write for write in self._unsynced if write[2] < call.began]:
                _write(self._synced, offset, data)
            self._unsynced = [write for write in self._unsynced if write[2] >= call.began]
        elif call.name in ("pwrite64", "pwritev"):
            match = _OFFSET.search(call.arguments)
            assert match, f"no offset in {call.name}"
            self._written(call, int(match[1]))
        elif call.name in ("write", "writev"):
            self._written(call, self._offsets.get(call.descriptor, 0))
            self._offsets[call.descriptor] = self._offsets.get(call.descriptor, 0) + call.result
        elif call.name in ("ftruncate", "msync"):
            raise NotImplementedError(f"{call.name} of the file was not expected of LMDB")

    def _written(self, call: Call, offset: int) -> None:
        data = call.data
        assert len(data) == call.result, "the trace has not all of what was written"
        if call.descriptor in self._waiting:
            _write(self._synced, offset, data)
        else:
            self._unsynced.append((offset, data, call.ended))

    def after_power_cut(self, chance: Random) -> bytes:
        """One of the files that may be there."""
        file = bytearray(self._synced)
        sectors = [sector for offset, data, _ in self._unsynced for sector in _sectors(offset, data)]
        kept = chance.choice((0.0, 0.1, 0.5, 0.9, 1.0))
        for offset, data in sectors:
            if chance.random() < kept:
                _write(file, offset, data)
        return bytes(file)


def _encoded(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def _sectors(offset: int, data: bytes) -> Iterator[tuple[int, bytes]]:
    for start in range(0, len(data), SECTOR):
        yield offset + start, data[start : start + SECTOR]


def _write(file: bytearray, offset: int, data: bytes) -> None:
    if len(file) < offset:
        file.extend(bytes(offset - len(file)))
    file[offset : offset + len(data)] = data
