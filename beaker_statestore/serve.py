"""``statestore serve``: a Tyrant server as a process, from its options to its signals."""

from __future__ import annotations

import asyncio
import logging
import resource
import signal
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import click

from beaker_statestore import __version__
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.stores.urls import redacted
from beaker_statestore.tyrant.server import Server, ServerLimits

__all__ = ["serve"]

_LIMITS: Final = ServerLimits()
_MIB: Final = 1024 * 1024
#: Open files that a server needs besides its connections: the store's, the listening sockets, the log.
_OTHER_FILES: Final = 64


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
    type=click.FloatRange(min=0, min_open=True),
    default=_LIMITS.patience,
    show_default=True,
    metavar="SECONDS",
    help="How long a client may take to finish a request it has begun, or not read a reply.",
)
@click.option("--verbose", is_flag=True, help="Log each connection that is closed for cause.")
def serve(
    addresses: Sequence[str],
    db: str,
    sync: Literal["always", "os"] | None,
    allow_remote: bool,
    max_connections: int,
    max_message: int,
    max_memory: int,
    patience: float,
    verbose: bool,
) -> None:
    """Serve a store to Tokyo Tyrant clients, until SIGTERM or Ctrl-C."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO if verbose else None)
    _permit_open_files(max_connections + _OTHER_FILES)
    limits = ServerLimits(max_message * _MIB, max_memory * _MIB, max_connections, patience)
    store = _open_local_store(_url(db, sync))
    with store:
        store.ping()
        _run(_serve(Server(store, limits=limits, allow_remote=allow_remote), addresses, db, store.crash_can_lose()))
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


async def _serve(server: Server, addresses: Sequence[str], db: str, crash_can_lose: str) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    await server.start(addresses)
    click.echo(f"statestore {__version__} serves {db} at {', '.join(map(str, server.addresses))}")
    click.echo(f"In a crash: {crash_can_lose}.")
    await stopped.wait()
    await server.stop()
