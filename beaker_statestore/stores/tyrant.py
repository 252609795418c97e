"""A `Store` in a Tyrant server, over the wire.

Each verb is one command, so that a verb is as atomic as the server makes the command; this module knows which, and
nothing of sockets. ``compare_and_swap`` and ``scan`` are functions of our own server (`tyrant.swap`,
`tyrant.paging`): whether the server has them is asked on every new connection before it is used for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Final, TypeVar

from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.stores.base import PAGE, Store
from beaker_statestore.stores.urls import options
from beaker_statestore.tyrant import paging, swap
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.client import (
    DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_POOL_SIZE,
    DEFAULT_TIMEOUT,
    Client,
    Pool,
)
from beaker_statestore.tyrant.commands import (
    CAS,
    EXT,
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
    SUCCESS,
    SYNC,
    Reply,
    Request,
)

__all__ = ["TyrantStore"]

T = TypeVar("T")
N = TypeVar("N", int, float)

#: How many records one command of `get_many`, `put_many` and `delete_many` is about at most: with a megabyte each,
#: they fit into what our server takes for one message, and it answers others between two commands.
BATCH: Final = 50

#: The ``ext`` option RDBXOLCKREC: one call at a time for each key. Ours needs no asking.
_LOCK_RECORD: Final = 1


class TyrantStore(Store):
    """The records of one Tyrant server."""

    def __init__(self, client: Client) -> None:
        """:param client: belongs to the store from now on, and is closed with it."""
        self._client = client

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

        :param url: ``host``, ``host:port``, ``tyrant://host:port`` or ``unix:/path``. ``?timeout=3`` and the like,
            joined by ``&``, count instead of the parameters of the same names.
        :param connect_timeout: how long opening a connection may take, in seconds.
        :param timeout: how long one call may take in all, in seconds.
        :param pool_size: the most connections to open.
        :raises ConfigurationError: the URL or a number in it is wrong.
        """
        address = Address.parse(url.partition("?")[0])
        given = options(url, ("connect_timeout", "timeout", "pool_size"))
        pool = Pool(
            address,
            size=_number(given, "pool_size", int, pool_size),
            connect_timeout=_number(given, "connect_timeout", float, connect_timeout),
        )
        return cls(Client(pool, timeout=_number(given, "timeout", float, timeout)))

    def __repr__(self) -> str:
        return f"<TyrantStore {self._client.pool.address}>"

    def get(self, key: bytes) -> bytes | None:
        status, value = self._client.call(GET(key))
        found: bytes | None = value if status == SUCCESS else None
        return found

    def get_many(self, keys: Iterable[bytes]) -> dict[bytes, bytes]:
        found: dict[bytes, bytes] = {}
        for batch in _batches(keys):
            found.update(self._done(MGET(batch)).value)
        return found

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        self._done(PUT(key, value))

    def put_many(self, items: Mapping[bytes, bytes]) -> None:
        for batch in _batches(items.items()):
            self._done(MISC(b"putlist", list(chain.from_iterable(batch)), 0))

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        return self._client.call(PUTKEEP(key, value)).status == SUCCESS

    def delete(self, key: bytes) -> bool:
        return self._client.call(OUT(key)).status == SUCCESS

    def delete_many(self, keys: Iterable[bytes]) -> None:
        for batch in _batches(keys):
            self._done(MISC(b"outlist", batch, 0))

    def compare_and_swap(
        self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
    ) -> bool:
        """As promised in `Verbs`.

        :raises ConfigurationError: the server is an original one.
        """
        reply = self._done(EXT(CAS, key, swap.pack(expected, new), _LOCK_RECORD), requires=CAS)
        if reply.value not in (swap.SWAPPED, swap.NOT_SWAPPED):
            raise OutcomeUnknown(f"the Tyrant server at {self._client.pool.address} answered cas with {reply.value!r}")
        return bool(reply.value == swap.SWAPPED)

    def scan(
        self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = PAGE
    ) -> tuple[list[bytes], bytes | None]:
        """As promised in `Verbs`.

        :raises ConfigurationError: the server is an original one.
        """
        if limit < 1:
            raise ValueError(f"a page of {limit} keys would never end the scan")
        reply = self._done(EXT(SCAN, prefix, paging.pack_request(cursor, limit), 0), requires=SCAN)
        return paging.unpack_page(reply.value)

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

    def _done(self, request: Request, requires: bytes | None = None) -> Reply:
        """The reply to a request that only fails when something is wrong with the server."""
        reply = self._client.call(request, requires=requires)
        if reply.status != SUCCESS:
            raise StoreUnavailable(
                f"the Tyrant server at {self._client.pool.address} refused {request.command.name}: see its log, and "
                "whether the command is masked"
            )
        return reply


def _batches(items: Iterable[T]) -> Iterable[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, BATCH)):
        yield batch


def _number(given: Mapping[str, str], name: str, kind: Callable[[str], N], default: N) -> N:
    try:
        return kind(given[name]) if name in given else default
    except ValueError as error:
        raise ConfigurationError(f"{name} is {given[name]!r} in the URL of a Tyrant server: give a number") from error
