"""A Tyrant server as a process that runs for years: its signals, its log, its sweeps and syncs. Knows no options."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import logging.handlers
import os
import signal
import socket
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final

from beaker_statestore import statistics
from beaker_statestore.complaints import Complaints
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.sweeper import BATCH, Sweeper
from beaker_statestore.tyrant import backups
from beaker_statestore.tyrant.listening import inherited
from beaker_statestore.tyrant.server import Server

__all__ = ["INHERITED", "SERVER", "SWEEP_LARGEST", "Service", "Sweeps", "events", "log_to"]

logger = logging.getLogger(__name__)
#: For the few things in the life of a server that whoever reads its log later asks for.
events = logging.getLogger(f"{__name__}.events")

#: Among the addresses, stands for the sockets that systemd has opened.
INHERITED: Final = "systemd"

#: The namespace of a server's own statistics.
SERVER: Final = "statestore server"
#: What a client's statistics tell of its store. A server's would tell of its sweeps and looks alone, and be taken for
#: its clients' (which ``Commands`` tells).
_OF_CLIENTS: Final = frozenset(
    {
        "Total Operations",
        "Operations/Second",
        "Hits",
        "Misses",
        "Hit Ratio",
        "Errors",
        "Bytes Sent",
        "Bytes Received",
        "Servers",
    }
)
_OF_CLIENTS_KINDS: Final = frozenset({"Hits", "Misses", "Bytes Sent", "Bytes Received"})

#: The part of the time that sweeping may take while it is under way, and how long clients may have to wait for one
#: step of it, in seconds. A commit alone may take a third of a millisecond, and steps that do little else would last
#: for hours; where each waits for the disk, smaller ones would not be sooner done.
_SWEEP_SHARE: Final = 0.05
_SWEEP_STEP: Final = 0.001
_SWEEP_STEP_ON_DISK: Final = 0.02
#: Values above this many bytes are not looked into, as reading one would hold up all clients. A document of ours has a
#: megabyte at most, and a third more encrypted, unless the application's ``max_value`` says otherwise.
SWEEP_LARGEST: Final = 4 * 1024 * 1024


@dataclass
class Sweeps:
    """What the sweeps of a service have come to."""

    ended: int = 0
    #: Records that were looked at and removed, in all.
    seen: int = 0
    removed: int = 0
    #: When the last one ended, in epoch seconds, and how many seconds it took; nothing before the first.
    latest: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Service:
    """A server over a store, and what is done for the store besides."""

    server: Server
    store: LocalStore
    #: Seconds between sweeps; 0: never.
    sweep_interval: float
    #: Seconds between syncs; ``None``: none, the store needs none.
    sync_interval: float | None
    #: Called upon SIGHUP, for what is to be read anew; answers what was.
    renew: Callable[[], list[str]] = list
    sweeps: Sweeps = field(default_factory=Sweeps)

    def run(self, addresses: Sequence[str], started: Callable[[], None]) -> None:
        """Serve at ``addresses`` until SIGTERM or SIGINT, on the quickest event loop that is installed.

        :param started: called once clients are let in.
        :raises ConfigurationError: an address cannot be listened at.
        """
        _run(self._serve(addresses, started))

    async def _serve(self, addresses: Sequence[str], started: Callable[[], None]) -> None:
        loop = asyncio.get_running_loop()
        stopped = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._end, number, stopped)
        loop.add_signal_handler(signal.SIGHUP, self._begin_anew)
        loop.set_exception_handler(_Report())
        await self.server.start([address for address in addresses if address != INHERITED])
        if INHERITED in addresses:
            try:
                await self._serve_on_inherited()
            except BaseException:
                await self.server.stop()
                raise
        started()
        _notify(b"READY=1")
        tasks = []
        if self.sweep_interval:
            tasks.append(asyncio.create_task(self._sweep_for_ever(), name="sweeping"))
        if self.sync_interval is not None:
            tasks.append(asyncio.create_task(self._sync_for_ever(self.sync_interval), name="syncing"))
        await stopped.wait()
        _notify(b"STOPPING=1")
        for task in tasks:
            task.cancel()
        for task, ended in zip(tasks, await asyncio.gather(*tasks, return_exceptions=True), strict=True):
            if isinstance(ended, Exception):
                logger.warning("%s had ended: %r", task.get_name(), ended)
        await self.server.stop()

    def report(self, figures: Mapping[str, Any]) -> bytes:
        """The reply to ``ext statistics``: all that there is in ``logging.statistics``, and the server's own, as JSON.

        :param figures: what the server knows of itself.
        """
        others = statistics.extrapolate_statistics(vars(logging).get("statistics", {}))
        ours = others.get(statistics.NAMESPACE, {})
        counts = statistics.own.events()
        of_server = {statistics.EVENTS[name].name: n for name, n in counts.items() if name.startswith("server.")}
        # A server knows nothing of sessions, and no news of them is none.
        without = {event.name for name, event in statistics.EVENTS.items() if not counts[name]}
        for name in without | _OF_CLIENTS | of_server.keys():
            ours.pop(name, None)
        for record in ours.get("Operations", {}).values():
            for name in _OF_CLIENTS_KINDS:
                record.pop(name, None)
        own = {
            **figures,
            **of_server,
            "Sweeps": self.sweeps.ended,
            "Records Swept": self.sweeps.seen,
            "Expired Records Removed": self.sweeps.removed,
            **self.sweeps.latest,
        }
        return json.dumps(statistics.jsonable({SERVER: own, **others})).encode()

    def _end(self, number: signal.Signals, stopped: asyncio.Event) -> None:
        events.info("%s: it takes in nothing more, and ends once all that has come is answered", number.name)
        stopped.set()

    def _begin_anew(self) -> None:
        renewed = []
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _LogFile):
                with contextlib.suppress(OSError):  # the next line tells
                    handler.reopenIfNeeded()
                    renewed.append("the log")
        try:
            renewed += self.renew()
        except ConfigurationError as error:
            logger.error("SIGHUP has not renewed the certificate: %s", error)
        events.info("SIGHUP: opened anew: %s", ", ".join(renewed) or "nothing")

    async def _sync_for_ever(self, interval: float) -> None:
        while True:
            await asyncio.sleep(interval)
            try:
                await self.server.waiting(self.store.sync)
            except Exception as error:  # noqa: BLE001 - the next one may do it; until then, more can be lost
                logger.error("a sync failed, so a crash can lose more than the last %g s: %s", interval, error)

    async def _sweep_for_ever(self) -> None:
        while True:
            sweeper = Sweeper(self.store, prefix=None, largest=SWEEP_LARGEST)
            began = time.monotonic()
            try:
                await self._sweep(sweeper, _SWEEP_STEP_ON_DISK if self.store.blocking else _SWEEP_STEP)
            except Exception as error:  # noqa: BLE001 - whatever it was, clients are served, and the next one may do it
                logger.warning("a sweep broke off: %r", error)
            found, sweeps = sweeper.sweep, self.sweeps
            sweeps.ended += 1
            sweeps.seen += found.seen
            sweeps.removed += found.removed
            sweeps.latest = {
                "Last Sweep": time.time(),
                "Last Sweep Took (Seconds)": round(time.monotonic() - began, 3),
            }
            if found.removed or found.unreadable:
                logger.info(
                    "a sweep has removed %d of %d records; %d were too large or no documents of ours",
                    found.removed,
                    found.seen,
                    found.unreadable,
                )
            await asyncio.sleep(self.sweep_interval)

    async def _sweep(self, sweeper: Sweeper, step: float) -> None:
        """Sweep with pauses, in steps of so many records as take ``step`` seconds."""
        batch = 1
        while not sweeper.done:
            began = time.perf_counter()
            await self.server.between(partial(sweeper.step, batch))
            took = time.perf_counter() - began
            batch = max(1, min(BATCH, 2 * batch, int(batch * step / took)))
            await asyncio.sleep(took * (1 / _SWEEP_SHARE - 1))

    async def _serve_on_inherited(self) -> None:
        sockets = inherited(allow_remote=self.server.options.allow_remote)
        if not sockets:
            raise ConfigurationError(
                "--listen systemd: systemd has given this process no sockets (LISTEN_FDS); start its .socket unit"
            )
        for sock in sockets:
            await self.server.serve_on(sock)


class _Report:
    """Logs what nothing expected. That no more files can be opened is told once in a while.

    asyncio asks its handler as often as the queue of a listening socket is long (`BACKLOG`), and again each second.
    """

    def __init__(self) -> None:
        self._complain = Complaints(logger)

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            self._complain("new clients have to wait: %s; see --max-connections and `ulimit -n`", error.strerror)
        else:
            loop.default_exception_handler(context)


class _LogFile(logging.handlers.WatchedFileHandler):
    """As its base, and says on standard error when the file cannot be opened anew, in place of failing who logs."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.handleError(record)


def log_to(path: str | None, level: int) -> None:
    """Log from now on to the file ``path``, or to standard error, what is of ``level`` or above.

    The file is opened anew when it has been moved away: with the next line, or upon SIGHUP. In a file there also are,
    whatever the level, the events of the server's life, since one that says nothing of restarts explains little.

    :raises OSError: the file cannot be written.
    """
    handler = logging.StreamHandler() if path is None else _LogFile(path)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=level, handlers=[handler])
    if path is not None:
        for logged in (events, backups.logger):
            logged.setLevel(logging.INFO)


def _notify(state: bytes) -> None:
    """Tell systemd, if it wants to know (sd_notify(3))."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + path[1:] if path.startswith("@") else path)
            sock.send(state)


def _run(main: Coroutine[Any, Any, None]) -> None:
    # Not run where the import is caught: all that is raised then would be told to have come of that.
    try:
        import uvloop
    except ImportError:
        run: Callable[[Coroutine[Any, Any, None]], None] = asyncio.run
    else:
        run = uvloop.run
    run(main)
