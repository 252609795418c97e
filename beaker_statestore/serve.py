"""``statestore serve``: the options of a Tyrant server. What it does with them is in `service`."""

from __future__ import annotations

import faulthandler
import logging
import os
import re
import resource
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from ssl import CERT_REQUIRED, SSLContext
from typing import Any, Final

import click

from beaker_statestore import __version__, extensions, statistics
from beaker_statestore.console import Seconds, store_url
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.service import INHERITED, SWEEP_LARGEST, Service, events, log_to
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore, Store
from beaker_statestore.stores.cabinet import CabinetStore, is_cabinet_name
from beaker_statestore.stores.urls import redacted, split
from beaker_statestore.sweeper import MARGIN
from beaker_statestore.tyrant import tls
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.backups import Backups
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.listening import SOCKET_MODE
from beaker_statestore.tyrant.mask import CLOSED, FUNCTIONS, OPEN, Mask
from beaker_statestore.tyrant.server import Server, ServerLimits, ServerOptions
from beaker_statestore.tyrant.verbs import Function

__all__ = ["serve"]

logger = logging.getLogger(__name__)

_LIMITS: Final = ServerLimits()
_MIB: Final = 1024 * 1024
#: Open files that a server needs besides its connections: the store's, the listening sockets, the log.
_OTHER_FILES: Final = 64
_STANDARD_ERROR: Final = 2
#: Seconds between syncs where a store needs them.
_SYNC_INTERVAL: Final = 1.0
#: Refused, whatever the mask says.
_NEVER: Final = {"restore", "setmst"}

_ON_SWEEPS: Final = (
    'Every {:g} s it removes expired documents: JSON objects with an "_expires" that has passed, under keys such as '
    "session:... and shop:cache:..., and nothing else (--sweep 0: never)."
)
_ON_NO_SWEEPS: Final = "It removes no expired documents (--sweep 0); `statestore sweep` does."


class _Mode(click.ParamType[int]):
    """The mode of a file, as chmod takes it."""

    name = "mode"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            mode = int(str(value), 8)
        except ValueError:
            mode = -1
        if not 0 <= mode <= 0o777:
            self.fail(f"{value!r} is no mode; write it as chmod takes it, 600 or 660.", param, ctx)
        return mode


def _mebibytes(name: str, default: int, help_: str, most: int | None = None) -> Any:
    return click.option(
        name, type=click.IntRange(1, most), default=default // _MIB, show_default=True, metavar="MIB", help=help_
    )


@click.command()
@click.option(
    "--listen",
    "addresses",
    multiple=True,
    default=["127.0.0.1:1978"],
    show_default=True,
    metavar="HOST:PORT|unix:PATH|systemd",
    help="Where clients connect; may be given several times. Port 0 is any free one; systemd stands for the sockets "
    "that it has opened.",
)
@click.option(
    "--db",
    default="var/state.lmdb",
    show_default=True,
    metavar="PATH|URL",
    help="The store: a path ending in .lmdb, an lmdb:/// URL, or memory: (forgets all when it stops); or a database "
    "of Tokyo Cabinet as ttserver names it, such as casket.tcb, casket.tch#bnum=1000000, * or +. Where there is no "
    "such file, a new one is made.",
)
@click.option(
    "--sync",
    type=click.Choice(["always", "interval", "os"]),
    help="When a change is written to the disk: before it is answered; every --sync-interval; or when the system "
    "chooses.  [default: os for LMDB, interval for Tokyo Cabinet]",
)
@click.option(
    "--sync-interval",
    type=Seconds(min_open=True),
    metavar="SECONDS",
    help=f"How often, with --sync interval.  [default: {_SYNC_INTERVAL:g}]",
)
@click.option("--allow-remote", is_flag=True, help="Permit --listen at addresses that other machines can reach.")
@click.option(
    "--socket-mode",
    type=_Mode(),
    default=f"{SOCKET_MODE:o}",
    show_default=True,
    metavar="MODE",
    help="Who may connect to a Unix socket; 660 lets its group in.",
)
@click.option(
    "--tls-cert",
    type=click.Path(),
    help="Speak TLS on TCP, with this certificate (PEM, with its chain). SIGHUP reads it anew.",
)
@click.option("--tls-key", type=click.Path(), help="The certificate's key, if it is in a file of its own.")
@click.option("--tls-ca", type=click.Path(), help="Let in only clients whose certificate one of these has signed.")
@click.option("--http", "with_http", is_flag=True, help="Answer HTTP too, on the same port.")
@click.option(
    "--http-host",
    "http_hosts",
    multiple=True,
    metavar="NAME",
    help="With --http: a host name by which clients may call this server, besides localhost; several times if need be.",
)
@click.option(
    "--mask",
    "masked",
    multiple=True,
    metavar="NAMES",
    help="Commands and groups that no client may use, in ttserver's words, with commas between, such as put, allwrite, "
    "allmc (memcached) or all; functions stands for those of --ext. What is said of a command goes before what is "
    "said of a group, and that before all, whether by --mask or by --unmask.",
)
@click.option(
    "--unmask",
    "unmasked",
    multiple=True,
    metavar="NAMES",
    help="Commands and groups that clients may use. For TCP these are masked unless you unmask them: "
    f"{', '.join(sorted(CLOSED.forbidden - _NEVER))}. (restore and setmst are always refused.)",
)
@click.option(
    "--ext",
    "modules",
    multiple=True,
    metavar="MODULE",
    help="Offer the functions of this Python module (a name, or a path ending in .py) to `ext`; see the manual.",
)
@click.option(
    "--backups",
    type=click.Path(),
    metavar="DIRECTORY",
    help="Where `copy` may make new files. For TCP, `copy` is masked: give --unmask copy, too.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(min=1),
    default=_LIMITS.connections,
    show_default=True,
    metavar="N",
    help="How many clients may be connected; more are sent away at once.",
)
@_mebibytes("--max-message", _LIMITS.message, "The largest request, and the largest value.", 256)
@_mebibytes("--max-reply", _LIMITS.reply, "The largest reply, and so what one client can leave unread.", 256)
@_mebibytes("--max-memory", _LIMITS.memory, "What unfinished requests and unread replies of all clients may take up.")
@click.option(
    "--max-keys",
    type=click.IntRange(min=1),
    default=_LIMITS.keys,
    show_default=True,
    metavar="N",
    help="How many keys one request may find (fwmkeys, misc regex and range).",
)
@click.option(
    "--max-list",
    type=click.IntRange(min=1),
    default=_LIMITS.items,
    show_default=True,
    metavar="N",
    help="How many elements one request may list (mget, misc).",
)
@click.option(
    "--max-waiters",
    type=click.IntRange(min=0),
    default=_LIMITS.waiters,
    show_default=True,
    metavar="N",
    help="How many clients may wait for a record (consumers of a queue do), at most half of --max-connections; others "
    "look again and again. 0: none.",
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
    "--idle",
    type=Seconds(),
    default=_LIMITS.idle,
    show_default=True,
    metavar="SECONDS",
    help="How long a client may stay connected and ask for nothing; 0: for ever.",
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
    f'shop:cache:...), and its value a JSON object of {SWEEP_LARGEST // _MIB} MiB or less with an "_expires" that was '
    f"{MARGIN:.0f} seconds ago or more.",
)
@click.option(
    "--log",
    type=click.Path(dir_okay=False),
    help="Log to this file, starts, ends and copies, too; SIGHUP opens it anew.  [default: stderr]",
)
@click.option(
    "--verbose",
    is_flag=True,
    help="Log, too, each connection that is closed for cause, what is refused, and each sweep and copy.",
)
def serve(
    addresses: Sequence[str],
    db: str,
    sync: str | None,
    sync_interval: float | None,
    allow_remote: bool,
    socket_mode: int,
    tls_cert: str | None,
    tls_key: str | None,
    tls_ca: str | None,
    with_http: bool,
    http_hosts: Sequence[str],
    masked: Sequence[str],
    unmasked: Sequence[str],
    modules: Sequence[str],
    backups: str | None,
    max_connections: int,
    max_message: int,
    max_reply: int,
    max_memory: int,
    max_keys: int,
    max_list: int,
    max_waiters: int,
    patience: float,
    idle: float,
    interval: float,
    log: str | None,
    verbose: bool,
) -> None:
    """Serve a store to Tokyo Tyrant clients, until SIGTERM or Ctrl-C."""
    if http_hosts and not with_http:
        raise click.UsageError("--http-host is for --http; give that too")
    _check_masks(_names(masked), _names(unmasked), functions=bool(modules), copies=backups is not None)
    _check_addresses(addresses, encrypted=tls_cert is not None)
    limits = ServerLimits(
        message=max_message * _MIB,
        reply=max_reply * _MIB,
        memory=max_memory * _MIB,
        connections=max_connections,
        patience=patience,
        idle=idle,
        keys=max_keys,
        items=max_list,
        waiters=max_waiters,
    )
    options = ServerOptions(
        allow_remote=allow_remote,
        socket_mode=socket_mode,
        tls=_tls(tls_cert, tls_key, tls_ca),
        tcp_mask=Mask.of(masked, unmasked, default=CLOSED),
        unix_mask=Mask.of(masked, unmasked, default=OPEN),
        http=HTTPPolicy(http_hosts) if with_http else None,
        functions=_functions(modules),
        backups=None if backups is None else Backups(backups),
        report=lambda figures: service.report(figures),
    )
    _log_to(log, logging.INFO if verbose else logging.WARNING)
    # A damaged file can end the process within LMDB or Tokyo Cabinet: then at least say where.
    faulthandler.enable(_STANDARD_ERROR)
    if allow_remote and tls_ca is None:
        seen = "" if tls_cert is not None else ", everything can be read on the way"
        logger.warning("--allow-remote without --tls-ca: everybody who reaches the port may come in%s", seen)
    _warn_of_weakness(tls_cert, tls_key)
    limits = replace(limits, connections=_permitted_connections(max_connections))
    store, every = _open_local_store(db, sync, sync_interval)

    def tell() -> None:
        where = ", ".join(f"{address}{_protection(address, options.tls)}" for address in server.addresses)
        first = f"statestore {__version__} serves {db}{there} at {where}"
        click.echo(first)
        if log is not None:
            events.info("%s", first)
        click.echo(f"In a crash: {store.crash_can_lose(every)}.")
        click.echo(_ON_SWEEPS.format(interval) if interval else _ON_NO_SWEEPS)

    def renew() -> list[str]:
        if options.tls is None or tls_cert is None:
            return []
        tls.renew(options.tls, tls_cert, tls_key)
        _warn_of_weakness(tls_cert, tls_key)
        return ["the certificate"]

    statistics.install()
    with store:
        is_new = store.path is not None and not os.path.exists(store.path)
        store.ping()
        there = "" if store.path is None else " (new)" if is_new else f" ({store.count():,} records)"
        server = Server(store, limits=limits, options=options)
        service = Service(server, store, interval, every, renew)
        service.run(addresses, tell)
        store.sync()
    events.info("ended in order")


def _names(options: Sequence[str]) -> set[str]:
    return {name.strip() for text in options for name in text.split(",")}


def _check_masks(masked: set[str], unmasked: set[str], *, functions: bool, copies: bool) -> None:
    """Refuse what an operator cannot have meant."""
    for name in sorted(masked & unmasked):
        raise ConfigurationError(f"{name} stands in --mask and in --unmask; take it out of one of them")
    for name in sorted(unmasked & _NEVER):
        raise ConfigurationError(f"--unmask {name}: there is no update log here, so {name} is always refused")
    if "copy" in unmasked and not copies:
        raise ConfigurationError("--unmask copy needs --backups DIRECTORY, where the copies go")
    if FUNCTIONS in unmasked and not functions:
        raise ConfigurationError(f"--unmask {FUNCTIONS} needs --ext MODULE, whose functions these are")


def _check_addresses(addresses: Sequence[str], *, encrypted: bool) -> None:
    for address in addresses:
        if re.fullmatch("[0-9]+", address):
            raise ConfigurationError(f"--listen {address} is a port without a host; did you mean 127.0.0.1:{address}?")
    own = [Address.parse(address, lowest_port=0) for address in addresses if address != INHERITED]
    if encrypted and len(own) == len(addresses) and all(address.path is not None for address in own):
        raise ConfigurationError("--tls-cert is for TCP, and every --listen is a Unix socket; give --listen HOST:PORT")


def _warn_of_weakness(cert: str | None, key: str | None) -> None:
    weakness = None if cert is None else tls.weakness(cert, key)
    if weakness is not None:
        logger.warning("no client will accept the certificate in %s (--tls-cert): %s", cert, weakness)


def _open_local_store(db: str, sync: str | None, sync_interval: float | None) -> tuple[LocalStore, float | None]:
    """The store that the options name, and how often it is to be synchronised; the directory of a path is made."""
    if sync is None and sync_interval is not None:
        sync = "interval"
    if sync_interval is not None and sync != "interval":
        raise ConfigurationError(f"--sync-interval is for --sync interval, not for --sync {sync}")
    if db.startswith("cabinet:"):
        parts = split(db)
        if "sync=" not in parts.query:
            # As without a scheme: a URL's own default is for programs, which have nobody to sync for them.
            query = [*filter(None, [parts.query]), f"sync={'always' if sync == 'always' else 'os'}"]
            sync = sync or "interval"
            store: Store = open_store(parts._replace(query="&".join(query)).geturl())
        elif sync is not None:
            raise ConfigurationError(f"the URL of --db {db} says sync, and --sync does; take out one of them")
        else:
            store = open_store(db)
    elif is_cabinet_name(db):
        _make_directory_of(db.partition("#")[0], db)
        cabinet = CabinetStore(db, sync="always" if sync == "always" else "os")
        if cabinet.path is not None and sync is None:
            sync = "interval"
        store = cabinet
    else:
        url = store_url(db)
        if ":" not in url:
            raise ConfigurationError(
                f"--db {db} is neither a URL nor the name of a file ending in .lmdb, .tcb, .tch, .tcf or .tct"
            )
        if url != db:
            _make_directory_of(db, db)
        if url.startswith("lmdb:") and sync is not None:
            url += f"{'&' if '?' in url else '?'}sync={'always' if sync == 'always' else 'os'}"
        store = open_store(url)
    if not isinstance(store, LocalStore):
        store.close()
        raise ConfigurationError(
            f"serve needs a store in this process, and {redacted(db)} is on a network: "
            "let the clients connect there, or give an lmdb:/// URL or a path ending in .lmdb by --db"
        )
    if sync is not None and store.path is None:
        raise ConfigurationError(f"--sync is for stores with a file; --db {db} has nothing to write to the disk")
    return store, (sync_interval or _SYNC_INTERVAL) if sync == "interval" else None


def _make_directory_of(file: str, db: str) -> None:
    directory = Path(file).absolute().parent
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(f"cannot make {directory} for --db {db}: {error.strerror}") from error


def _tls(cert: str | None, key: str | None, ca: str | None) -> SSLContext | None:
    if cert is None:
        if key is not None or ca is not None:
            raise click.UsageError(f"{'--tls-key' if key is not None else '--tls-ca'} needs --tls-cert")
        return None
    return tls.server_context(cert, key, ca)


def _protection(address: Address, context: SSLContext | None) -> str:
    if context is None or address.path is not None:
        return ""
    # All that the option --tls-ca does.
    return " (TLS with client certificates)" if context.verify_mode is CERT_REQUIRED else " (TLS)"


def _functions(modules: Sequence[str]) -> dict[bytes, Function]:
    functions: dict[bytes, Function] = {}
    for module in modules:
        for name, function in extensions.load(module).items():
            if name in functions:
                raise ConfigurationError(f"--ext {module}: another module has a function {name.decode()!r} too")
            functions[name] = function
    return functions


def _log_to(path: str | None, level: int) -> None:
    try:
        log_to(path, level)
    except OSError as error:
        raise ConfigurationError(f"cannot write to --log {path}: {error.strerror}") from error


def _permitted_connections(wanted: int) -> int:
    """How many connections there can be, ``wanted`` if possible; the limit of open files is raised as far as may be."""
    files = wanted + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < files:
        files = files if hard == resource.RLIM_INFINITY else min(files, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard))
    permitted = max(files - _OTHER_FILES, files // 2)
    if permitted < wanted:
        logger.warning(
            "this process may have %d open files (ulimit -n), so it lets in %d clients at a time, not %d",
            files,
            permitted,
            wanted,
        )
    return min(permitted, wanted)
