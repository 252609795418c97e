"""What a crowd of bad clients costs a good one.

    .venv/bin/python -m benchmarks.crowd

A real ``statestore serve`` process and one well-behaved client, which puts and gets values of 2 kB, one request after
the other. It is measured while it is alone, then beside each crowd by itself, then alone again (how much the machine
itself has drifted), then beside all of them together. The crowd is driven by a process of its own, so that it does not
share the good client's interpreter; with two cores, it does share its core.

What is printed stands beside its ratio to the first, quiet phase. "peak" is the most memory that the server had during
the phase (VmHWM, reset before it) and "RSS" what it had at its end, with the crowd still there. "closed" counts
connections, of which some clients open several.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import select
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT
from beaker_statestore.tyrant.wire import encode_request

MIB: Final = 1024 * 1024
#: The server's limits: of a message its default, and of connections enough for every crowd.
MESSAGE: Final = 64 * MIB
CONNECTIONS: Final = 15_000
#: Open files that either process needs besides its connections.
OTHER_FILES: Final = 100
#: What slow readers ask for.
LARGE: Final = 60 * MIB
LARGE_KEY: Final = b"large"
#: What the good client puts and gets: about as much as a session of a web shop, under a few keys.
VALUE: Final = bytes(range(256)) * 8
KEYS: Final = [b"session:%d" % number for number in range(100)]
#: How long the crowd may take for what it is told, in seconds, and how often it looks.
DEADLINE: Final = 60.0
TICK: Final = 0.02


# -- the crowd


@dataclass(frozen=True)
class Crowd:
    """Bad clients of one kind. Each sends ``pieces``, one a second, and reads nothing."""

    name: str
    number: int
    pieces: Sequence[bytes]
    #: Whoever has been closed connects anew a second later, and begins again.
    returns: bool = False


def _announcement(value: int, sent: int = 0) -> bytes:
    """A put of ``value`` bytes that breaks off after ``sent`` of them."""
    head = encode_request(PUT(b"announced", b""))
    return head[:6] + value.to_bytes(4, "big") + head[10:] + bytes(sent)


def crowds(slow_senders: int, slow_readers: int, idle: int, announce: int, memory: int) -> list[Crowd]:
    """All crowds, of so many clients each; fill-ups so many that they exceed the server's ``memory`` by half."""
    put = encode_request(PUT(b"slow", VALUE))
    get = encode_request(GET(LARGE_KEY))
    return [
        Crowd("slow senders", slow_senders, [bytes((byte,)) for byte in put]),
        Crowd("slow readers", slow_readers, [get] * 3600),
        Crowd("slow readers that return", slow_readers, [get] * 3600, returns=True),
        Crowd("idle", idle, []),
        Crowd("announce 256 MiB", announce, [_announcement(256 * MIB)]),
        Crowd("announce 63 MiB", announce, [_announcement(63 * MIB)]),
        Crowd("fill-ups", memory * 3 // 2 // (LARGE // 2) + 1, [_announcement(LARGE, LARGE // 2)]),
    ]


@dataclass
class Casualties:
    """What has become of a crowd. Times are in seconds from its beginning."""

    connected: int = 0
    closed: int = 0
    first: float | None = None
    last: float | None = None


class _Member:
    """One bad client."""

    def __init__(self, crowd: Crowd, casualties: Casualties, due: float) -> None:
        self.crowd = crowd
        self.casualties = casualties
        self.due = due
        self.socket: socket.socket
        self.pieces: Iterator[bytes]
        self.unsent = memoryview(b"")

    def connect(self, address: Address) -> None:
        self.socket = socket.create_connection((address.host, address.port), DEADLINE)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.pieces = iter(self.crowd.pieces)
        self.unsent = memoryview(b"")
        self.casualties.connected += 1

    def send(self) -> None:
        """Send what is due; may raise OSError."""
        if not self.unsent:
            self.unsent = memoryview(next(self.pieces, b""))
        while self.unsent:
            self.unsent = self.unsent[self.socket.send(self.unsent) :]


class _Driver:
    """The crowd's process: one loop over all its sockets, and over the pipe on which it is told what to do."""

    def __init__(self, pipe: Connection, address: Address) -> None:
        self._pipe = pipe
        self._address = address
        self._epoll = select.epoll()
        self._epoll.register(pipe.fileno(), select.EPOLLIN)
        self._members: dict[int, _Member] = {}
        #: Those who have something to do, in the order of time, each once. A second is added each time.
        self._agenda: deque[_Member] = deque()
        self._casualties: dict[str, Casualties] = {}
        self._began = 0.0

    def run(self) -> None:
        """Do what is told until the pipe ends."""
        with suppress(EOFError):
            while True:
                for number, events in self._epoll.poll(TICK):
                    if number == self._pipe.fileno():
                        command, *arguments = self._pipe.recv()
                        self._pipe.send(getattr(self, command)(*arguments))
                    elif number in self._members:
                        self._attend(self._members[number], events)
                self._do_what_is_due()

    # -- what it is told

    def gather(self, crowds: Sequence[Crowd]) -> None:
        """Connect all of ``crowds``."""
        self._casualties = {crowd.name: Casualties() for crowd in crowds}
        for crowd in crowds:
            for _ in range(crowd.number):
                self._join(_Member(crowd, self._casualties[crowd.name], 0.0))

    def begin(self) -> None:
        """Let them begin, each kind spread over a second."""
        self._began = time.monotonic()
        for member in self._members.values():
            place = len(self._agenda) / max(1, len(self._members))
            member.due = self._began + place
            self._agenda.append(member)

    def casualties(self) -> dict[str, Casualties]:
        """What has become of each crowd, by its name."""
        return self._casualties

    def dismiss(self) -> None:
        """Close all."""
        for member in self._members.values():
            member.socket.close()
        self._members.clear()
        self._agenda.clear()

    # -- its own affairs

    def _join(self, member: _Member) -> None:
        member.connect(self._address)
        self._members[member.socket.fileno()] = member
        self._epoll.register(member.socket, select.EPOLLRDHUP)

    def _attend(self, member: _Member, events: int) -> None:
        if events & (select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR):
            self._closed(member)
        else:
            self._let_send(member)

    def _let_send(self, member: _Member) -> None:
        try:
            member.send()
        except BlockingIOError:
            self._epoll.modify(member.socket, select.EPOLLRDHUP | select.EPOLLOUT)
        except OSError:
            self._closed(member)
        else:
            self._epoll.modify(member.socket, select.EPOLLRDHUP)

    def _closed(self, member: _Member) -> None:
        now = time.monotonic() - self._began
        casualties = member.casualties
        casualties.closed += 1
        casualties.first = now if casualties.first is None else casualties.first
        casualties.last = now
        del self._members[member.socket.fileno()]
        member.socket.close()

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        while self._agenda and self._agenda[0].due <= now:
            member = self._agenda.popleft()
            if member.socket.fileno() >= 0:
                if not member.unsent:
                    self._let_send(member)
            elif member.crowd.returns:
                self._join(member)
                self._let_send(member)
            else:
                continue
            member.due += 1.0
            self._agenda.append(member)


def _drive(pipe: Connection, address: Address) -> None:
    _permit_open_files()
    _Driver(pipe, address).run()


def _permit_open_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = CONNECTIONS + OTHER_FILES
    permitted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (permitted, hard))


@contextmanager
def driver(address: Address) -> Iterator[Callable[..., Any]]:
    """A process that drives the crowd, as a function: of a command of `_Driver`'s and its arguments to the answer."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_drive, args=(theirs, address), name="crowd")
    process.start()
    theirs.close()

    def tell(*command: Any) -> Any:
        ours.send(command)
        if not ours.poll(DEADLINE):
            raise click.ClickException(f"the crowd did not {command[0]} in {DEADLINE:.0f} s")
        return ours.recv()

    try:
        yield tell
    finally:
        ours.close()
        process.join(DEADLINE)
        if process.is_alive():
            process.kill()
            process.join()


# -- the good client, and the server


@dataclass
class Phase:
    """What was measured of the good client (seconds), of the server (bytes), and of the crowd."""

    name: str
    p50: float
    p99: float
    worst: float
    rate: float
    #: Requests of the good client that failed, or were answered wrongly.
    failed: int
    rss: int
    peak: int
    #: Seconds of processor time that the server used in a second.
    busy: float
    crowds: dict[str, Casualties]


def measure(store: Store, seconds: float) -> tuple[list[float], int]:
    """How long each request took in so many ``seconds``, and how many went wrong."""
    took: list[float] = []
    failed = 0
    end = time.perf_counter() + seconds
    number = 0
    before = time.perf_counter()
    while before < end:
        key = KEYS[number // 2 % len(KEYS)]
        try:
            if number % 2:
                failed += store.get(key) != VALUE
            else:
                store.put(key, VALUE)
        except StateStoreError:
            failed += 1
        now = time.perf_counter()
        took.append(now - before)
        before = now
        number += 1
    return took, failed


def status(pid: int, name: str) -> int:
    """The bytes that ``/proc/PID/status`` gives under ``name``."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def processor_time(pid: int) -> float:
    """Seconds that the process has used, in the kernel or not."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Stage:
    """A server, the good client, and a crowd to be."""

    def __init__(self, server: ServerProcess, store: Store, tell: Callable[..., Any], seconds: float) -> None:
        self._pid = server.pid
        self._store = store
        self._tell = tell
        self._seconds = seconds

    def phase(self, name: str, crowds: Sequence[Crowd] = (), *, until_closed: float = 0.0) -> Phase:
        """Measure beside ``crowds``.

        :param until_closed: so many seconds after their beginning at most, wait for all to be closed by the server;
            the good client is not measured in the meantime.
        """
        self._tell("gather", list(crowds))
        Path(f"/proc/{self._pid}/clear_refs").write_text("5")  # VmHWM begins anew (proc(5))
        used = processor_time(self._pid)
        began = time.monotonic()
        self._tell("begin")
        took, failed = measure(self._store, self._seconds)
        busy = (processor_time(self._pid) - used) / (time.monotonic() - began)
        rss, peak = status(self._pid, "VmRSS"), status(self._pid, "VmHWM")
        casualties: dict[str, Casualties] = self._tell("casualties")
        while time.monotonic() - began < until_closed and any(c.closed < c.connected for c in casualties.values()):
            time.sleep(0.1)
            casualties = self._tell("casualties")
        self._tell("dismiss")
        self._settle()
        took.sort()
        return Phase(
            name,
            took[len(took) // 2],
            took[len(took) * 99 // 100],
            took[-1],
            len(took) / sum(took),
            failed,
            rss,
            peak,
            busy,
            casualties,
        )

    def _settle(self) -> None:
        """Wait until the server has noticed that the crowd has left."""
        deadline = time.monotonic() + DEADLINE
        used = -1.0
        while time.monotonic() < deadline and used != (used := processor_time(self._pid)):
            time.sleep(0.1)


def run(db: str, seconds: float, patience: float, memory: int, everyone: Sequence[Crowd]) -> list[Phase]:
    """All phases over a server of our own."""
    arguments = ["--max-connections", str(CONNECTIONS), "--max-message", str(MESSAGE // MIB)]
    arguments += ["--max-memory", str(memory // MIB), "--patience", str(patience), "--sweep", "0"]
    with (
        ServerProcess(db, arguments=arguments) as server,
        open_store(server.url) as store,
        driver(Address.parse(server.url)) as tell,
    ):
        stage = Stage(server, store, tell, seconds)
        store.put(LARGE_KEY, bytes(LARGE))
        measure(store, 0.5)  # to warm up
        phases = [stage.phase("quiet")]
        for crowd in everyone:
            waiting = 2 * patience + 3.0 if crowd.pieces and not crowd.returns else 0.0
            phases.append(stage.phase(f"{crowd.number:,} {crowd.name}", [crowd], until_closed=waiting))
        phases.append(stage.phase("quiet again"))
        phases.append(stage.phase("all together", everyone))
        phases.append(stage.phase("quiet at last"))
        return phases


# -- the report


def _fate(phase: Phase) -> str:
    known = phase.crowds.values()
    connected, closed = sum(c.connected for c in known), sum(c.closed for c in known)
    if not closed:
        return f"0 of {connected:,}" if connected else ""
    first = min(c.first for c in known if c.first is not None)
    last = max(c.last for c in known if c.last is not None)
    return f"{closed:,} of {connected:,}, {first:.1f} to {last:.1f} s"


def table(db: str, phases: Sequence[Phase]) -> Table:
    """For people."""
    names = ["phase", "p50 ms", "ratio", "p99 ms", "ratio", "worst ms", "ops/s", "ratio", "failed"]
    names += ["RSS MiB", "ratio", "peak MiB", "server's CPU", "closed by the server"]
    made = Table(title=f"statestore serve --db {db}", box=None)
    for name in names:
        made.add_column(name, justify="left" if name in (names[0], names[-1]) else "right")
    quiet = phases[0]
    for phase in phases:
        made.add_row(
            phase.name,
            f"{phase.p50 * 1e3:.2f}",
            f"{phase.p50 / quiet.p50:.2f}",
            f"{phase.p99 * 1e3:.2f}",
            f"{phase.p99 / quiet.p99:.2f}",
            f"{phase.worst * 1e3:.1f}",
            f"{phase.rate:,.0f}",
            f"{phase.rate / quiet.rate:.2f}",
            str(phase.failed),
            f"{phase.rss / MIB:,.0f}",
            f"{phase.rss / quiet.rss:.2f}",
            f"{phase.peak / MIB:,.0f}",
            f"{phase.busy:.0%}",
            _fate(phase),
        )
    return made


@click.command()
@click.option("--db", "engines", multiple=True, type=click.Choice(["memory", "lmdb"]), default=["memory", "lmdb"])
@click.option("--seconds", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Of each phase.")
@click.option("--slow-senders", type=click.IntRange(0, 4000), default=1000, show_default=True)
@click.option("--slow-readers", type=click.IntRange(0, 1000), default=100, show_default=True)
@click.option("--idle", type=click.IntRange(0, 6000), default=5000, show_default=True)
@click.option("--announce", type=click.IntRange(0, 1000), default=100, show_default=True)
@click.option("--patience", type=click.FloatRange(min=1.0), default=5.0, show_default=True, help="The server's.")
@click.option("--max-memory", type=click.IntRange(min=64), default=512, show_default=True, help="The server's, in MiB.")
@click.option("--only", multiple=True, help="Crowds whose name begins so, instead of all; may be given several times.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: seconds and bytes.")
def main(
    engines: Sequence[str],
    seconds: float,
    slow_senders: int,
    slow_readers: int,
    idle: int,
    announce: int,
    patience: float,
    max_memory: int,
    only: Sequence[str],
    as_json: bool,
) -> None:
    """What crowds of bad clients cost a good one."""
    everyone = crowds(slow_senders, slow_readers, idle, announce, max_memory * MIB)
    everyone = [crowd for crowd in everyone if not only or crowd.name.startswith(tuple(only))]
    found: dict[str, list[Phase]] = {}
    with tempfile.TemporaryDirectory() as directory:
        for engine in engines:
            db = "memory:" if engine == "memory" else str(Path(directory, "state.lmdb"))
            found[engine] = run(db, seconds, patience, max_memory * MIB, everyone)
            if not as_json:
                Console(width=200).print(table(engine, found[engine]))
    if as_json:
        click.echo(json.dumps({engine: [asdict(phase) for phase in phases] for engine, phases in found.items()}))


if __name__ == "__main__":
    main()
