"""A `Store` in a Tyrant server, over the wire.

Each verb is one command, so that a verb is as atomic as the server makes the command; this module knows which, and
nothing of sockets. There are three kinds of server, told apart by a probe on every new connection:

- our own has ``compare_and_swap`` and ``scan`` as functions (`tyrant.swap`, `tyrant.paging`), and its other commands
  are atomic towards them;
- an original ttserver with our script (`tyrant.original`) has functions for all changes, and only they heed each other;
- an original ttserver without it cannot compare and swap: it is refused, or overwritten plainly where that is wanted.
"""

from __future__ import annotations

import logging
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from typing import Final, TypeVar

from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.stores.base import PAGE, Store
from beaker_statestore.stores.urls import options
from beaker_statestore.tyrant import original, paging, swap
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.client import (
    DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_POOL_SIZE,
    DEFAULT_TIMEOUT,
    Choice,
    Client,
    MissingFunctionError,
    Pool,
    RefusedError,
    check_status,
    describe,
)
from beaker_statestore.tyrant.commands import (
    CAS,
    EXT,
    FWMKEYS,
    GET,
    MGET,
    MISC,
    NO_UPDATE_LOG,
    OUT,
    PUT,
    PUTKEEP,
    REPEATABLE_MISC,
    RNUM,
    SCAN,
    SIZE,
    STAT,
    STATISTICS,
    SUCCESS,
    SYNC,
    TOO_MUCH,
    WAIT,
    Reply,
    Request,
)
from beaker_statestore.tyrant.tls import TLS, client_context

__all__ = ["NotAtomicWarning", "TyrantStore"]

log = logging.getLogger(__name__)

T = TypeVar("T")
N = TypeVar("N", int, float)

#: How many records one command of `get_many`, `put_many` and `delete_many` is about at most: our server answers others
#: between two commands. With a megabyte each they fit into what it takes for one message; where they do not, `get_many`
#: asks for fewer at once.
BATCH: Final = 50

#: A page of a scan has no more keys than this, whatever was asked for; our server gives no more either.
LONGEST_PAGE: Final = 10_000

#: One request to wait is for so many seconds at most, so that a server that hangs is found out.
LONGEST_POLL: Final = 20.0
#: How many connections may wait at a time, as the server has a limit of its own; and how many are kept for the next.
_WAITING: Final = 10_000
_KEPT_FOR_WAITING: Final = 8
#: How long a store looks again and again by itself, in seconds, before it asks anew a server that had no room for one
#: more who waits, and one that cannot let anybody wait.
_UNTIL_ROOM: Final = 5.0
_UNTIL_UPGRADE: Final = 60.0

#: Types of database, as ``stat`` names them, that change the values they are given, and do not say so.
_UNFIT: Final = frozenset({"fixed-length", "table"})


_TLS_SCHEME: Final = "tyrants://"
_TLS_OPTIONS: Final = ("ca", "cert", "key", "server_name")


class NotAtomicWarning(UserWarning):
    """A store overwrites records without being able to tell whether others have changed them."""


class TyrantStore(Store):
    """The records of one Tyrant server."""

    def __init__(self, client: Client, *, atomic: bool = True) -> None:
        """
        :param client: belongs to the store from now on, and is closed with it.
        :param atomic: as for `from_url`.
        """
        self._client = client
        self._atomic = atomic
        pool = client.pool
        # Of their own, so that however many threads wait, the others find a connection.
        waiting = Pool(
            pool.address,
            tls=pool.tls,
            size=_WAITING,
            connect_timeout=pool.connect_timeout,
            keep=_KEPT_FOR_WAITING,
        )
        self._waiting = Client(waiting, timeout=client.timeout)
        #: Until when the server is not asked to let anybody wait, on the monotonic clock.
        self._polls_until = -math.inf
        #: The processes that have been warned.
        self._warned: dict[int, object] = {}

    @classmethod
    def from_url(
        cls,
        url: str,
        *,
        connect_timeout: float = DEFAULT_CONNECT_TIMEOUT,
        timeout: float = DEFAULT_TIMEOUT,
        pool_size: int = DEFAULT_POOL_SIZE,
        atomic: bool = True,
    ) -> TyrantStore:
        """The store that ``url`` names. No connection is made yet.

        :param url: ``host``, ``host:port``, ``tyrant://host:port``, ``tyrants://host:port`` (TLS) or ``unix:/path``.
            ``?timeout=3`` and the like, joined by ``&``, count instead of the parameters of the same names. Those of
            TLS: ``ca`` (a file of certificates to trust; by default those that the system trusts), ``cert`` and
            ``key`` (files of the client's own), ``server_name`` (what the server's certificate is for, if not the
            host). The files are read now.
        :param connect_timeout: how long opening a connection may take, in seconds.
        :param timeout: how long one call may take in all, in seconds.
        :param pool_size: the most connections to open.
        :param atomic: whether to refuse an original ttserver without ``statestore.lua``. If not, its records are read,
            compared and overwritten in steps, so that simultaneous changes overwrite each other. Wherever the server
            can compare and swap, this makes no difference.
        :raises ConfigurationError: the URL, or a number or a file in it, is wrong.
        """
        encrypted = url.lower().startswith(_TLS_SCHEME)
        where = f"tyrant://{url[len(_TLS_SCHEME) :]}" if encrypted else url
        address = Address.parse(where.partition("?")[0])
        given = options(url, ("connect_timeout", "timeout", "pool_size", *_TLS_OPTIONS))
        pool = Pool(
            address,
            tls=_tls(address, given, encrypted=encrypted),
            size=_number(given, "pool_size", int, pool_size),
            connect_timeout=_number(given, "connect_timeout", float, connect_timeout),
        )
        return cls(Client(pool, timeout=_number(given, "timeout", float, timeout)), atomic=atomic)

    def __repr__(self) -> str:
        return f"<TyrantStore {self._client.pool.address}>"

    def get(self, key: bytes) -> bytes | None:
        status, value = self._client.call(GET(key))
        found: bytes | None = value if status == SUCCESS else None
        return found

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for batch in _batches(keys):
            found.update(self._get_batch(batch))
        return found

    def _get_batch(self, batch: list[bytes]) -> dict[bytes, bytes]:
        request = MGET(batch)
        if len(batch) == 1:
            return dict(self._done(request).value)
        (reply,) = self._client.pipeline([request])
        if reply.status == TOO_MUCH:
            middle = len(batch) // 2
            return {**self._get_batch(batch[:middle]), **self._get_batch(batch[middle:])}
        check_status(self._client.pool.address, request, reply.status)
        self._check_done(request, reply)
        return dict(reply.value)

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        self._change(lambda server: [_put(server, key, value)])

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        for batch in _batches(items.items()):
            self._change(partial(_put_many, batch))

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        return self._decide(original.ADD, PUTKEEP(key, value), key, value)

    def delete(self, key: bytes) -> bool:
        return self._decide(original.DELETE, OUT(key), key)

    def delete_many(self, keys: Iterable[bytes]) -> None:
        for batch in _batches(keys):
            self._change(partial(_delete_many, batch))

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        """As promised in `Verbs`, unless the server is an original one without our script.

        :raises ConfigurationError: it is, and the store is to be atomic.
        """
        request = EXT(CAS, key, swap.pack(expected, new), original.LOCK_RECORD)
        try:
            return self._verdict(request, self._done(request, requires=CAS))
        except MissingFunctionError as error:
            if self._atomic:
                raise ConfigurationError(
                    f"{error}; or set atomic = no and let simultaneous changes overwrite each other"
                ) from error
        self._warn()
        return self._overwrite(key, expected, new)

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """As promised in `Verbs`.

        :raises ConfigurationError: the server is an original one, and its database does not know its keys in order.
        """
        if limit < 1:
            raise ValueError(f"a page of {limit} keys would never end the scan")
        limit = min(limit, LONGEST_PAGE)
        try:
            reply = self._done(EXT(SCAN, prefix, paging.pack_request(cursor, limit), 0), requires=SCAN)
        except MissingFunctionError:
            return self._page(prefix, cursor, limit)
        return paging.unpack_page(reply.value)

    def wait(self, key: bytes, seconds: float) -> bool:
        """As promised in `Store`: told at once, where the server can do so and has room for one more who waits."""
        deadline = time.monotonic() + seconds
        while True:
            now = time.monotonic()
            left = max(0.0, deadline - now)
            polls = self._polls_until - now
            if super().wait(key, min(left, polls)) if polls > 0 else self._poll(key, min(left, LONGEST_POLL)):
                return True
            if time.monotonic() >= deadline:
                return False

    def _poll(self, key: bytes, seconds: float) -> bool:
        """Whether there is a record by then; perhaps sooner, if not."""
        end = time.monotonic() + seconds

        def choose(server: frozenset[bytes]) -> list[Request]:
            left = max(0.0, end - time.monotonic())
            return [EXT(WAIT, key, b"%d" % math.ceil(left * 1000), 0)] if WAIT in server else []

        try:
            answers = self._waiting.call_suitable(choose, extra=seconds)
        except RefusedError as error:
            self._polls_until = time.monotonic() + (_UNTIL_ROOM if error.status == TOO_MUCH else _UNTIL_UPGRADE)
            return False
        for request, reply in answers:
            self._check_done(request, reply)
            return self._verdict(request, reply)
        self._polls_until = time.monotonic() + _UNTIL_UPGRADE
        return False

    def statistics(self) -> bytes:
        """The server's own statistics, as JSON: namespaces by name, each of scalars and collections of records.

        :raises MissingFunctionError: it has none.
        """
        report: bytes = self._done(EXT(STATISTICS, b"", b"", 0), requires=STATISTICS).value
        return report

    def count(self) -> int:
        return int(self._done(RNUM()).value)

    def size(self) -> int:
        return int(self._done(SIZE()).value)

    def sync(self) -> None:
        self._done(SYNC())

    def ping(self) -> None:
        self._done(RNUM())

    def command(self, name: str, arguments: Sequence[bytes] = ()) -> list[bytes]:
        """What the server's ``misc`` function ``name`` answers.

        :raises StateStoreError: the server does not have it, or it failed; the protocol does not tell which.
        """
        function = name.encode()
        flags = NO_UPDATE_LOG if function in REPEATABLE_MISC else 0
        status, values = self._client.call(MISC(function, list(arguments), flags))
        if status != SUCCESS:
            raise StateStoreError(
                f"the Tyrant server at {self._client.pool.address} did not carry out misc {name!r}: it does not know "
                "it, or its arguments do not fit its records"
            )
        result: list[bytes] = values
        return result

    def close(self) -> None:
        self.closed = True
        self._client.close()
        self._waiting.close()

    def _done(self, request: Request, requires: bytes | None = None) -> Reply:
        """The reply to a request that only fails when something is wrong with the server."""
        reply = self._client.call(request, requires=requires)
        self._check_done(request, reply)
        return reply

    def _check_done(self, request: Request, reply: Reply) -> None:
        if reply.status != SUCCESS:
            raise StoreUnavailable(
                f"the Tyrant server at {self._client.pool.address} refused {describe(request)}: see its log, and "
                "whether the command is masked"
            )

    def _change(self, choose: Choice) -> None:
        """Have done all that ``choose`` makes for the server, whatever was there before."""
        for request, reply in self._client.call_suitable(choose):
            self._check_done(request, reply)
            if request.command is EXT:
                self._verdict(request, reply)

    def _decide(self, function: bytes, command: Request, key: bytes, value: bytes = b"") -> bool:
        """Whether ``function`` of our script or, where the server does not have it, ``command`` found what it needs."""

        def choose(server: frozenset[bytes]) -> list[Request]:
            return [EXT(function, key, value, original.LOCK_RECORD) if function in server else command]

        ((request, reply),) = self._client.call_suitable(choose)
        if request is command:
            return reply.status == SUCCESS
        self._check_done(request, reply)
        return self._verdict(request, reply)

    def _verdict(self, request: Request, reply: Reply) -> bool:
        """What one of our functions answered that it has or has not done."""
        if reply.value not in (swap.SWAPPED, swap.NOT_SWAPPED):
            raise OutcomeUnknown(
                f"the Tyrant server at {self._client.pool.address} answered {describe(request)} with {reply.value!r}"
            )
        return bool(reply.value == swap.SWAPPED)

    # -- an original server

    def _page(self, prefix: bytes, cursor: bytes | None, limit: int) -> tuple[list[bytes], bytes | None]:
        kind = self._database_type()
        if kind not in original.ORDERED:
            raise ConfigurationError(
                f"the keys of the ttserver at {self._client.pool.address} cannot be listed page by page, since its "
                f"database ({kind}) does not know them in order: run `statestore serve` in its place, or start it "
                f"with a B+ tree: {original.start_line()}"
            )
        return original.page(self._first_keys, prefix, cursor, limit)

    def _first_keys(self, prefixes: Sequence[bytes], most: int) -> list[list[bytes]]:
        requests = [FWMKEYS(prefix, most) for prefix in prefixes]
        answers = self._client.call_suitable(lambda _: requests)
        for request, reply in answers:
            self._check_done(request, reply)
        return [reply.value for _, reply in answers]

    def _database_type(self) -> str:
        text: str = self._done(STAT()).value.decode(errors="replace")
        lines = dict(line.partition("\t")[::2] for line in text.splitlines())
        # Where stat is masked, it says nothing of the database.
        return lines.get("type", "of a type that its masked stat hides")

    def _overwrite(self, key: bytes, expected: bytes | None, new: bytes | None) -> bool:
        """compare_and_swap in steps, between which others may do what they like."""
        if expected is None and new is not None:
            return self.add(key, new)
        if self.get(key) != expected:
            return False
        if new is not None:
            self.put(key, new)
            return True
        return expected is None or self.delete(key)

    def _warn(self) -> None:
        """Warn once in each process."""
        process, ticket = os.getpid(), object()
        if process in self._warned:
            return
        address = self._client.pool.address
        kind = self._database_type()
        if kind in _UNFIT:
            raise ConfigurationError(
                f"the database of the ttserver at {address} ({kind}) does not keep values as they are given: start it "
                f"with a B+ tree: {original.start_line()}"
            )
        if self._warned.setdefault(process, ticket) is not ticket:
            return  # another thread was quicker
        message = (
            f"atomic = no, and the ttserver at {address} cannot compare and swap: simultaneous changes of a session "
            "overwrite each other, and a request that was under way when a session was deleted brings it back. To lose "
            f"nothing, run `statestore serve` in its place, or start it with our script: {original.start_line()}"
        )
        log.warning("%s", message)
        warnings.warn(message, NotAtomicWarning, stacklevel=3)


def _put(server: frozenset[bytes], key: bytes, value: bytes) -> Request:
    return EXT(original.PUT, key, value, original.LOCK_RECORD) if original.PUT in server else PUT(key, value)


def _put_many(batch: list[tuple[bytes, bytes]], server: frozenset[bytes]) -> list[Request]:
    # Ours alone: an original's putlist heeds no lock, and makes second values of a key in a B+ tree.
    if SCAN in server:
        return [MISC(b"putlist", list(chain.from_iterable(batch)), 0)]
    return [_put(server, key, value) for key, value in batch]


def _delete_many(batch: list[bytes], server: frozenset[bytes]) -> list[Request]:
    if original.DELETE in server:
        return [EXT(original.DELETE, key, b"", original.LOCK_RECORD) for key in batch]
    return [MISC(b"outlist", batch, 0)]


def _batches(items: Iterable[T]) -> Iterable[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _tls(address: Address, given: Mapping[str, str], *, encrypted: bool) -> TLS | None:
    for name in _TLS_OPTIONS:
        if name in given and not encrypted:
            raise ConfigurationError(
                f"{name}= is for TLS, and the URL says to do without it: write {_TLS_SCHEME}{address}?{name}=..."
            )
        if given.get(name) == "":
            raise ConfigurationError(f"{name}= is empty in the URL of a Tyrant server: give it a value or leave it out")
    if not encrypted:
        return None
    tls = TLS(
        client_context(ca=given.get("ca"), cert=given.get("cert"), key=given.get("key")), given.get("server_name")
    )
    tls.channel(address.host)  # a name that cannot be is found out now
    return tls


def _number(given: Mapping[str, str], name: str, kind: Callable[[str], N], default: N) -> N:
    try:
        return kind(given[name]) if name in given else default
    except ValueError as error:
        raise ConfigurationError(f"{name} is {given[name]!r} in the URL of a Tyrant server: give a number") from error
