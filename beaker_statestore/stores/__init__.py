"""Stores by URL: `open_store`, and the table of what schemes there are.

Each engine is imported when a URL first asks for it, so that nobody needs the drivers of the others.
"""

from __future__ import annotations

import difflib
import importlib
import os
import re
import threading
from typing import Any, Final

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores.base import LocalStore, Store
from beaker_statestore.stores.urls import redacted

__all__ = ["SCHEMES", "open_store"]

#: Scheme -> the class that serves it, as "module:name"; it has ``from_url``, as `open_store` calls it.
SCHEMES: Final[dict[str, str]] = {
    "cabinet": "beaker_statestore.stores.cabinet:CabinetStore",
    "lmdb": "beaker_statestore.stores.lmdb:LMDBStore",
    "memory": "beaker_statestore.stores.memory:MemoryStore",
    "tyrant": "beaker_statestore.stores.tyrant:TyrantStore",
    "tyrants": "beaker_statestore.stores.tyrant:TyrantStore",
    "unix": "beaker_statestore.stores.tyrant:TyrantStore",
}

#: ``host``, ``host:port``, ``[::1]`` and ``[::1]:port``.
_BARE_ADDRESS: Final = re.compile(r"(\[[0-9A-Fa-f:.%\w]+\]|[^:/?#\s\[\]]+)(:\d+)?")

_stores: dict[tuple[object, ...], Store] = {}
_lock = threading.Lock()


def open_store(
    url: str | Store,
    *,
    connect_timeout: float = 2.0,
    timeout: float = 5.0,
    pool_size: int = 16,
    atomic: bool = True,
) -> Store:
    """The store that ``url`` names: one shared instance for all who ask with the same arguments in this process.

    Nothing is connected or opened until the store is first used, so this may be called before a fork. A store that
    has been closed is replaced by a new one. A `Store` given instead of a URL is answered unchanged.

    ========================================  ======================================================================
    ``127.0.0.1:1978``, ``localhost``,        a Tyrant server; the port is 1978 when it is left out
    ``tyrant://host:port``, ``[::1]:1978``
    ``tyrants://host:port?ca=/path``          a Tyrant server behind TLS, whose certificate is always verified; options:
                                              see `beaker_statestore.stores.tyrant.TyrantStore.from_url`
    ``unix:/path/to/socket``                  a Tyrant server on a Unix socket
    ``lmdb:///path/to/file``                  an LMDB file; options: see `beaker_statestore.stores.lmdb`
    ``cabinet:///path/to/file.tch``           a Tokyo Cabinet file, ``.tch`` or ``.tcb``; options and tuning: see
                                              `beaker_statestore.stores.cabinet`
    ``memory:``, ``memory:name``              this process's memory; each name is a store of its own
    ========================================  ======================================================================

    :param connect_timeout: how long connecting may take, in seconds (network stores).
    :param timeout: how long one call may take, in seconds (network stores).
    :param pool_size: how many connections are kept at most (network stores).
    :param atomic: whether to refuse an original ttserver that has no ``statestore.lua`` (Tyrant servers).
    :raises ConfigurationError: the URL is not understood. Passwords in it are not shown.
    :raises MissingDriverError: the engine needs a package that is not installed; the message says how to install it.
    """
    if isinstance(url, Store):
        return url
    full = _full_url(url)
    store_class = _store_class(full)
    timing = {"connect_timeout": connect_timeout, "timeout": timeout, "pool_size": pool_size, "atomic": atomic}
    # What happens on a network concerns no local store: it must be the same one whatever the caller's patience.
    local = issubclass(store_class, LocalStore)
    key = (full,) if local else (full, connect_timeout, timeout, pool_size, atomic)
    with _lock:
        store = _stores.get(key)
        if store is None or store.closed:
            store = _stores[key] = store_class.from_url(full, **timing)
        return store


def _full_url(url: str) -> str:
    """``url`` with its scheme, which an address alone need not have."""
    url = url.strip()
    scheme = url.partition(":")[0]
    if "://" not in url and scheme not in SCHEMES and _BARE_ADDRESS.fullmatch(url):
        return f"tyrant://{url}"
    return url


def _store_class(url: str) -> Any:
    scheme, colon, _ = url.partition(":")
    if not colon or not re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", scheme):
        raise ConfigurationError(
            f"{redacted(url)!r} is not the URL of a store; write host:port, or one of "
            "tyrant://host:port, unix:/path/to/socket, lmdb:///path/to/file, cabinet:///path/to/file.tch, memory:"
        )
    target = SCHEMES.get(scheme.lower())
    if target is None:
        # A scheme that only adds TLS's s is no typo: without it, the connection would be in the clear.
        near = [name for name in difflib.get_close_matches(scheme.lower(), SCHEMES) if f"{name}s" != scheme.lower()]
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ConfigurationError(
            f"unknown scheme {scheme!r} in {redacted(url)}{hint} (this version knows {', '.join(SCHEMES)})"
        )
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def _after_fork_in_child() -> None:
    # A thread that the child does not have may have held it. The stores themselves survive a fork.
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
