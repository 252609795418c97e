"""``statestore serve``: a Tyrant server as a process, from its options to its signals."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
import time
from collections.abc import Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import click

from beaker_statestore import __version__
from beaker_statestore.console import Seconds
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.stores.urls import redacted
from beaker_statestore.sweeper import BATCH, MARGIN, Sweeper
from beaker_statestore.tyrant.server import Server, ServerLimits

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_LIMITS: Final = ServerLimits()
_MIB: Final = 1024 * 1024
#: Open files that a server needs besides its connections: the store's, the listening sockets, the log.
_OTHER_FILES: Final = 64

#: The part of the time that sweeping may take while it is under way, and how long clients may have to wait for one
#: step of it, in seconds. A commit alone may take a third of a millisecond, and steps that do little else would last
#: for hours; where each waits for the disk, smaller ones would not be sooner done.
_SWEEP_SHARE: Final = 0.05
_SWEEP_STEP: Final = 0.001
_SWEEP_STEP_ON_DISK: Final = 0.02
#: Values above this many bytes are not looked into, as reading one would hold up all clients. A document of ours has a
#: megabyte at most, and a third more encrypted, unless the application's ``max_value`` says otherwise.
_SWEEP_LARGEST: Final = 4 * _MIB

_ON_SWEEPS: Final = (
    'Every {:g} s it removes expired documents: JSON objects with an "_expires" that has passed, under keys such as '
    "session:... and shop:cache:..., and nothing else (--sweep 0: never)."
)
_ON_NO_SWEEPS: Final = "It removes no expired documents (--sweep 0); `statestore sweep` does."


@click.command()
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    default=["127.0.0.1:1978"],
    show_default=True,
    metavar="HOST:PORT|unix:PATH",
    help="Where clients connect; may be given several times. Port 0 is any free one.",
)
@click.option(
    "--db",
    default="var/state.lmdb",
    show_default=True,
    metavar="PATH|URL",
    help="The store: a path ending in .lmdb, an lmdb:/// URL, or memory: (forgets all when it stops).",
)
@click.option(
    "--sync",
    type=click.Choice(["always", "os"]),
    help="For LMDB: when a change is written to the disk, before it is answered or when the system chooses. The death "
    "of the server loses nothing either way; a power cut loses nothing only with always.  [default: os]",
)
@click.option("--allow-remote", is_flag=True, help="Permit --listen at addresses that other machines can reach.")
@click.option(
    "--max-connections", type=click.IntRange(min=1), default=_LIMITS.connections, show_default=True, metavar="N"
)
@click.option(
    "--max-message",
    type=click.IntRange(1, 256),
    default=_LIMITS.message // _MIB,
    show_default=True,
    metavar="MIB",
    help="The largest request, value or reply.",
)
@click.option(
    "--max-memory",
    type=click.IntRange(min=1),
    default=_LIMITS.memory // _MIB,
    show_default=True,
    metavar="MIB",
    help="What half requests and unread replies of all clients may take up.",
)
@click.option(
    "--patience",
    type=Seconds(min_open=True),
    default=_LIMITS.patience,
    show_default=True,
    metavar="SECONDS",
    help="How long a client may take to finish a request it has begun, or not read a reply.",
)
@click.option(
    "--sweep",
    "interval",
    type=Seconds(),
    default=600.0,
    show_default=True,
    metavar="SECONDS",
    help=f"Remove expired records, of all applications, at the start and so long after each time; 0: never. A record "
    "goes if its key is one of ours, under no prefix or one that does not end in a letter or digit (session:..., "
    'shop:cache:...), and its value a JSON object of 4 MiB or less with an "_expires" that was '
    f"{MARGIN:.0f} seconds ago or more.",
)
@click.option("--verbose", is_flag=True, help="Log each connection that is closed for cause, and each sweep.")
def serve(
    addresses: Sequence[str],
    db: str,
    sync: Literal["always", "os"] | None,
    allow_remote: bool,
    max_connections: int,
    max_message: int,
    max_memory: int,
    patience: float,
    interval: float,
    verbose: bool,
) -> None:
    """Serve a store to Tokyo Tyrant clients, until SIGTERM or Ctrl-C."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if verbose else None)
    _permit_open_files(max_connections + _OTHER_FILES)
    limits = ServerLimits(max_message * _MIB, max_memory * _MIB, max_connections, patience)
    store = _open_local_store(_url(db, sync))
    with store:
        store.ping()
        server = Server(store, limits=limits, allow_remote=allow_remote)
        _run(_serve(server, store, addresses, db, interval))
        store.sync()


def _url(db: str, sync: str | None) -> str:
    """The URL of the store that the options name; the directory of a path is made."""
    if db.endswith(".lmdb") and ":" not in db.partition("/")[0]:
        path = Path(db).absolute()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(f"cannot make {path.parent} for --db {db}: {error.strerror}") from error
        db = f"lmdb://{quote(str(path))}"
    if sync is None:
        return db
    if not db.startswith("lmdb:"):
        raise ConfigurationError(f"--sync is for LMDB; --db {db} has nothing to write to the disk")
    return f"{db}{'&' if '?' in db else '?'}sync={sync}"


def _open_local_store(url: str) -> LocalStore:
    store = open_store(url)
    if not isinstance(store, LocalStore):
        store.close()
        raise ConfigurationError(
            f"serve needs a store in this process, and {redacted(url)} is on a network: "
            "let the clients connect there, or give an lmdb:/// URL or a path ending in .lmdb by --db"
        )
    return store


def _permit_open_files(wanted: int) -> None:
    """Raise this process's limit of open files to ``wanted``, as far as it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        permitted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (permitted, hard))


def _run(main: Coroutine[Any, Any, None]) -> None:
    """Run ``main`` on the quickest event loop that is installed."""
    try:
        import uvloop
    except ImportError:
        asyncio.run(main)
    else:
        uvloop.run(main)


async def _serve(server: Server, store: LocalStore, addresses: Sequence[str], db: str, interval: float) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await server.start(addresses)
    click.echo(f"statestore {__version__} serves {db} at {', '.join(map(str, server.addresses))}")
    click.echo(f"In a crash: {store.crash_can_lose()}.")
    click.echo(_ON_SWEEPS.format(interval) if interval else _ON_NO_SWEEPS)
    sweeping = asyncio.create_task(_sweep_for_ever(server, store, interval)) if interval else None
    await stopped.wait()
    if sweeping is not None:
        sweeping.cancel()
        (ended,) = await asyncio.gather(sweeping, return_exceptions=True)
        if isinstance(ended, Exception):
            logger.warning("sweeping had ended: %r", ended)
    await server.stop()


async def _sweep_for_ever(server: Server, store: LocalStore, interval: float) -> None:
    while True:
        sweeper = Sweeper(store, prefix=None, largest=_SWEEP_LARGEST)
        try:
            await _sweep(server, sweeper, _SWEEP_STEP_ON_DISK if store.blocking else _SWEEP_STEP)
        except Exception as error:  # noqa: BLE001 - whatever it was, clients are served, and the next one may do it
            logger.warning("a sweep broke off: %r", error)
        found = sweeper.sweep
        if found.removed or found.unreadable:
            logger.info(
                "a sweep has removed %d of %d records; %d were too large or no documents of ours",
                found.removed,
                found.seen,
                found.unreadable,
            )
        await asyncio.sleep(interval)


async def _sweep(server: Server, sweeper: Sweeper, step: float) -> None:
    """Sweep with pauses, in steps of so many records as take ``step`` seconds."""
    batch = 1
    while not sweeper.done:
        began = time.perf_counter()
        await server.between(partial(sweeper.step, batch))
        took = time.perf_counter() - began
        batch = max(1, min(BATCH, 2 * batch, int(batch * step / took)))
        await asyncio.sleep(took * (1 / _SWEEP_SHARE - 1))
