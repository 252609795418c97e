"""Damaged frames in bulk, over real sockets, for a server process: ``python -m tests.fuzz.bulk 2000000``.

Every connection brings a few frames, most of them damaged, whole or in pieces; then it says that it has ended, or it
waits for what the server does. Among them are requests that must be rejected with a write of the sentinel behind. The
server has to live, to answer others meanwhile, to close each connection in time, and to log no traceback; the
sentinel must not change, and neither memory nor the number of open files may grow.
"""

from __future__ import annotations

import contextlib
import random
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import FWMKEYS, GET, MISC, PUT, RNUM, STAT, SUCCESS, Reply
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import OPEN, Mask
from beaker_statestore.tyrant.wire import Limits, encode_request
from tests.faults.servers import descriptors, eventually, resident
from tests.fuzz.frames import damaged, frame
from tests.fuzz.oracle import hear, in_pieces
from tests.fuzz.rejections import REJECTED, writes_of
from tests.serving import RawClient

__all__ = ["Report", "bombard", "server_for"]

MIB = 1024 * 1024
#: The server's, in seconds, and how much later it may be on a busy machine.
PATIENCE = 1.0
SLACK = 15.0
#: Long, so that no damage makes one of another key.
SENTINEL = b"sentinel-0123456789abcdefghijklmnopqrstuvwxyz"
VALUE = b"still here"
#: Connections at a time, and frames on each.
ABREAST = 8
FRAMES = 5
#: After so many frames the store is emptied, so that what is left in memory can be compared.
ROUND = 4000

_LIMITS = Limits(blob=MIB, message=MIB, line=MIB)
_MASK = Mask.of(["vanish"], [], OPEN)
_ARGUMENTS = ["--http", "--mask", "vanish", "--max-message", "1", "--max-reply", "1", "--patience", str(PATIENCE)]


@dataclass
class Report:
    """What came of it."""

    frames: int = 0
    damaged: int = 0
    connections: int = 0
    #: Requests that the server has carried out.
    executed: int = 0
    #: Connections on which the server was to wait for more, then lose its patience.
    abandoned: int = 0
    #: Those on which a write stood behind something that is rejected.
    smuggled: int = 0
    #: The longest that a well-behaved client waited for an answer, in seconds.
    slowest: float = 0.0
    #: By how many bytes the server's memory has grown since the first tenth.
    memory: int = 0
    #: How many files it has open more than before the first connection.
    files: int = 0
    #: Lines of the server's log that say that something was not foreseen.
    defects: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


@contextlib.contextmanager
def server_for(db: str = "memory:") -> Iterator[ServerProcess]:
    """A server that can be bombarded. A Unix socket, since the ports of TCP are used up after some ten thousands."""
    with (
        tempfile.TemporaryDirectory(prefix="fuzz-") as directory,
        ServerProcess(db, unix=f"{directory}/socket", arguments=_ARGUMENTS) as server,
    ):
        yield server


class _Bombardment:
    def __init__(self, server: ServerProcess, seed: int) -> None:
        self.report = Report()
        self._server = server
        self._address = Address.parse(server.url)
        self._draw = random.Random(seed)
        #: Connections on which nothing more is sent, and since when.
        self._abandoned: list[tuple[RawClient, float, bytes]] = []

    def fire(self) -> None:
        """One volley: some connections side by side."""
        opened: list[tuple[RawClient, bytes]] = []
        for _ in range(ABREAST):
            client, data = RawClient(self._address), self._stream()
            self.report.connections += 1
            with contextlib.suppress(ConnectionError):  # it may have been rejected by now
                for piece in in_pieces(data, [self._draw.randrange(60)] if self._draw.random() < 0.2 else []):
                    client.send(piece)
            opened.append((client, data))
        for client, data in opened:
            if self._draw.random() < 0.03:
                self._stay(client, data)
                continue
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
            self._read_out(client, data)
            client.close()

    def _stream(self) -> bytes:
        draw = self._draw
        self.report.frames += FRAMES
        if draw.random() < 0.05:
            self.report.smuggled += 1
            good = [encode_request(GET(b"%d" % number)) for number in range(FRAMES - 2)]
            rejected = draw.choice(list(REJECTED.values()))
            return b"".join([*good, rejected, draw.choice(list(writes_of(SENTINEL, b"stolen").values()))])
        frames = []
        share = draw.choice((0.3, 1.0, 1.0))
        for _ in range(FRAMES):
            whole = frame(draw)
            if draw.random() < share:
                self.report.damaged += 1
                whole = damaged(draw, whole)
            frames.append(whole)
        return b"".join(frames)

    def _read_out(self, client: RawClient, data: bytes) -> bytes:
        client.socket.settimeout(SLACK)
        try:
            return client.receive_to_end()
        except TimeoutError:
            raise AssertionError(f"the server neither answers nor closes after {data!r}") from None
        except ConnectionResetError:
            return b""

    def _stay(self, client: RawClient, data: bytes) -> None:
        """Do not say that nothing more comes: what the server does now depends on what has come."""
        heard = hear([[data]], HTTPPolicy(), _LIMITS)
        refused = any(_MASK.forbids(call) and call.refused().last for call in heard.calls)
        if heard.why != "open" or refused or heard.midway:
            self.report.abandoned += 1
            self._abandoned.append((client, time.monotonic(), data))
            return
        client.send(encode_request(RNUM()))
        client.socket.shutdown(socket.SHUT_WR)
        answer = self._read_out(client, data)
        assert answer[-9:-8] == b"\0", f"the server closed after {data!r}"
        client.close()

    def see_off(self, everybody: bool = False) -> None:
        """See that the server has closed those that were abandoned; without ``everybody``, those whose time it is."""
        while self._abandoned:
            client, since, data = self._abandoned[0]
            if not everybody and time.monotonic() < since + PATIENCE + 0.5:
                return
            client.socket.settimeout(max(since + PATIENCE + SLACK - time.monotonic(), 0.001))
            try:
                with contextlib.suppress(ConnectionResetError):
                    client.receive_to_end()
            except TimeoutError:
                raise AssertionError(f"the server keeps a connection that hangs in {data!r}") from None
            client.close()
            del self._abandoned[0]

    def look(self) -> None:
        """Be a well-behaved client: the sentinel is there, writes are kept; and empty the store but for it."""
        self.report.slowest = max(self.report.slowest, self._look())

    def _look(self) -> float:
        with RawClient(self._address) as client:
            start = time.monotonic()
            answers = client.ask(GET(SENTINEL), PUT(b"good", b"client"), GET(b"good"))
            taken = time.monotonic() - start
            assert answers == [Reply(SUCCESS, VALUE), Reply(SUCCESS), Reply(SUCCESS, b"client")]
            while True:
                ((status, keys),) = client.ask(FWMKEYS(b"", 1000))
                assert status == SUCCESS
                others = [key for key in keys if key != SENTINEL]
                if not others:
                    return taken
                client.ask(MISC(b"outlist", others, 0))

    def executed(self) -> int:
        with RawClient(self._address) as client:
            ((_, text),) = client.ask(STAT())
        figures = dict(line.split(b"\t", 1) for line in text.splitlines())
        return sum(
            int(value) for name, value in figures.items() if name.startswith(b"cnt_") and not name.endswith(b"_miss")
        )

    def place_sentinel(self) -> None:
        with RawClient(self._address) as client:
            assert client.ask(PUT(SENTINEL, VALUE)) == [Reply(SUCCESS)]

    def close(self) -> None:
        for client, _, _ in self._abandoned:
            client.close()


def bombard(server: ServerProcess, frames: int, seed: int) -> Report:
    """Send ``server`` so many frames, most of them damaged.

    :raises AssertionError: it does not take it as it should.
    """
    fight = _Bombardment(server, seed)
    report = fight.report
    memory, files = 0, descriptors(server.pid)
    try:
        fight.place_sentinel()
        looked = 0
        while report.frames < frames:
            fight.fire()
            if report.frames - looked >= ROUND:
                looked = report.frames
                fight.look()
                fight.see_off()
                if not memory and report.frames >= frames / 10:
                    memory = resident(server.pid)
        fight.look()
        fight.see_off(everybody=True)
    finally:
        fight.close()
    eventually(lambda: descriptors(server.pid) <= files, "the server closes its sockets", SLACK)
    report.memory, report.files = resident(server.pid) - memory, descriptors(server.pid) - files
    report.executed = fight.executed()
    report.defects = sum(map(_is_defect, server.output.splitlines()))
    assert not report.defects, server.output
    return report


def _is_defect(line: str) -> bool:
    return line.startswith("Traceback") or any(word in line for word in ("ERROR", "CRITICAL", "the store failed"))


def main(arguments: Sequence[str]) -> None:
    """Send as many frames as the first argument says, with the seed that the second is."""
    frames, seed = int(arguments[0]), int(arguments[1]) if len(arguments) > 1 else random.randrange(2**32)
    print(f"seed {seed}")
    start = time.monotonic()
    with server_for() as server:
        report = bombard(server, frames, seed)
        log = len(server.output)
    print(f"{report}, log {log} bytes, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
