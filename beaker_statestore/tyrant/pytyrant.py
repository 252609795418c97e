"""pytyrant's interface, so that code written for pytyrant runs with one changed import::

    from beaker_statestore.tyrant import pytyrant

Names and behaviour are those of pytyrant 1.1.17. What is different:

- Keys and values are ``bytes``. A ``str`` given is encoded as UTF-8; what comes back is ``bytes``.
- A call ends at a deadline. An outage raises `TyrantUnavailable`, which is an OSError as it was in pytyrant (whose
  ``socket.error`` is today's name for it), and a `StoreUnavailable` like everywhere in this package. It is no
  `TyrantError`: programs take that to mean "no such record". A write without an answer raises `TyrantOutcomeUnknown`.
- An object can be shared by threads, used after a fork, and used on when the server has been restarted. It still has
  one connection at a time.
- ``adddouble``, ``restore`` and ``setmst`` send what the protocol says, ``addint`` knows negative numbers, and
  ``multi_get`` can tell a record that is not there.

Writing something new? `beaker_statestore.stores.open_store` gives a store with a pool of connections and
compare-and-swap.
"""

from __future__ import annotations

import itertools
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from types import SimpleNamespace
from typing import Any, Final, TypeAlias, TypeVar

from beaker_statestore.exceptions import OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.tyrant import commands
from beaker_statestore.tyrant.address import DEFAULT_PORT, Address
from beaker_statestore.tyrant.client import (
    DEFAULT_CONNECT_TIMEOUT,
    DEFAULT_TIMEOUT,
    Client,
    Connection,
    Pool,
    RefusedError,
    connect,
)
from beaker_statestore.tyrant.commands import MAGIC, NO_UPDATE_LOG, Request
from beaker_statestore.tyrant.wire import float_to_decimal

__all__ = [
    "DEFAULT_PORT",
    "MAGIC",
    "QUERY_OPERATIONS",
    "RDBMONOULOG",
    "RDBQONUMASC",
    "RDBQONUMDESC",
    "RDBQOSTRASC",
    "RDBQOSTRDESC",
    "RDBXOLCKGLB",
    "RDBXOLCKREC",
    "C",
    "PyTableTyrant",
    "PyTyrant",
    "Query",
    "Tyrant",
    "TyrantError",
    "TyrantFailure",
    "TyrantOutcomeUnknown",
    "TyrantUnavailable",
    "dict_to_list",
    "list_to_dict",
]

#: The version of pytyrant whose interface this is.
__version__ = "1.1.17"

Text: TypeAlias = bytes | str
#: A row of a table: columns and their values.
Row: TypeAlias = Mapping[Any, Text]
P = TypeVar("P", bound="PyTyrant")
T = TypeVar("T", bound="Tyrant")

#: Every command's id, as ``C.put``.
C: Final = SimpleNamespace(**{command.name: command.id for command in commands.COMMANDS.values()})

#: Option of ``misc``: keep the call out of the update log.
RDBMONOULOG: Final = NO_UPDATE_LOG
#: Options of ``ext``: one call at a time for each key, or for all.
RDBXOLCKREC: Final = 1 << 0
RDBXOLCKGLB: Final = 1 << 1

#: How a table's search orders what it found.
RDBQOSTRASC, RDBQOSTRDESC, RDBQONUMASC, RDBQONUMDESC = range(4)
#: What a table's search can ask of a column (tctdb.h, TDBQC...).
QUERY_OPERATIONS: Final = {
    "streq": "0",  # the text is equal
    "strinc": "1",  # includes
    "strbw": "2",  # begins with
    "strew": "3",  # ends with
    "strand": "4",  # includes all tokens
    "stror": "5",  # includes one of the tokens
    "stroreq": "6",  # is one of the tokens
    "strrx": "7",  # matches the regular expression
    "numeq": "8",  # the number is equal
    "numgt": "9",
    "numge": "10",
    "numlt": "11",
    "numle": "12",
    "numbt": "13",  # is between two tokens
    "numoreq": "14",  # is one of the tokens
}


class TyrantError(StateStoreError):
    """The server answered that it did not do it. ``args[0]`` is the status.

    It is 3 for what the server's operator has forbidden and 4 for more than one reply may hold, and then the message
    says what to do; see `TyrantFailure` for 1.
    """

    def __str__(self) -> str:
        return str(self.args[-1])


class TyrantFailure(TyrantError):  # noqa: N818 - named like the status
    """The status is 1, the only one that Tyrant knows: mostly, the record is not there. A mapping says so."""


class TyrantUnavailable(StoreUnavailable, OSError):  # noqa: N818 - named like its base
    """The server did not answer in time, refused, or broke off."""


class TyrantOutcomeUnknown(OutcomeUnknown, TyrantUnavailable):
    """The server may have carried out the request, and no answer came."""


def dict_to_list(dct: Row) -> list[Text]:
    """Keys and values in turn."""
    return list(itertools.chain.from_iterable(dct.items()))


def list_to_dict(lst: Iterable[bytes]) -> dict[bytes, bytes]:
    """A dictionary of what `dict_to_list` makes."""
    iterator = iter(lst)
    return dict(zip(iterator, iterator, strict=True))


def _bytes(text: Text) -> bytes:
    # Not bytes(text), which would make five zeros of a 5.
    return text.encode() if isinstance(text, str) else memoryview(text).tobytes()


class Tyrant:
    """The commands of the protocol, one method each, over one connection.

    Arguments are keys and values unless their names say otherwise. A method raises `TyrantError` when the server
    answers that it did not do it, and `TyrantUnavailable` when no answer comes; else it returns what came with the
    answer, or None.
    """

    @classmethod
    def open(
        cls: type[T],
        host: str = "127.0.0.1",
        port: int = DEFAULT_PORT,
        timeout: float = DEFAULT_TIMEOUT,
        connect_timeout: float = DEFAULT_CONNECT_TIMEOUT,
    ) -> T:
        """Connect to the server at ``host`` and ``port``, or, if that is below 1, at the Unix socket ``host``.

        :param timeout: how long one call may take in all, in seconds.
        :param connect_timeout: how long connecting may take, in seconds.
        """
        address = Address(host, port) if port > 0 else Address(path=host)
        try:
            sock = connect(address, time.monotonic() + connect_timeout)
        except StoreUnavailable as error:
            raise TyrantUnavailable(str(error)) from error
        return cls(sock, timeout)

    def __init__(self, sock: socket.socket, timeout: float | None = None) -> None:
        """
        :param sock: a socket connected to a server; it belongs to this object from now on.
        :param timeout: how long one call may take in all, in seconds; by default the socket's own timeout.
        """
        timeout = timeout or sock.gettimeout() or DEFAULT_TIMEOUT
        address = Address.of(sock.getpeername())
        self._client = Client(Pool(address, size=1, opened=[Connection(sock, address)]), timeout=timeout)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._client.pool.address}>"

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    def _call(self, request: Request) -> Any:
        try:
            status, value = self._client.call(request)
        except RefusedError as error:
            raise TyrantError(error.status, str(error)) from error
        except OutcomeUnknown as error:
            raise TyrantOutcomeUnknown(str(error)) from error
        except StoreUnavailable as error:
            raise TyrantUnavailable(str(error)) from error
        if status:
            raise TyrantFailure(status, f"{request.command.name}: {request.command.failure.value} (status {status})")
        return value

    def put(self, key: Text, value: Text) -> None:
        """Store ``value``, whatever was there."""
        self._call(commands.PUT(_bytes(key), _bytes(value)))

    def putkeep(self, key: Text, value: Text) -> None:
        """Store ``value`` if there is no such record; else it is an error."""
        self._call(commands.PUTKEEP(_bytes(key), _bytes(value)))

    def putcat(self, key: Text, value: Text) -> None:
        """Append ``value`` to the record, or begin it."""
        self._call(commands.PUTCAT(_bytes(key), _bytes(value)))

    def putshl(self, key: Text, value: Text, width: int) -> None:
        """Append ``value`` to the record and keep its last ``width`` bytes; one that is begun so is kept whole."""
        self._call(commands.PUTSHL(_bytes(key), _bytes(value), width))

    def putnr(self, key: Text, value: Text) -> None:
        """Send ``value`` to be stored; no answer comes, not even of failure."""
        self._call(commands.PUTNR(_bytes(key), _bytes(value)))

    def out(self, key: Text) -> None:
        """Remove the record; it is an error if there is none."""
        self._call(commands.OUT(_bytes(key)))

    def get(self, key: Text) -> bytes:
        """The record's value; it is an error if there is none."""
        value: bytes = self._call(commands.GET(_bytes(key)))
        return value

    def mget(self, klst: Iterable[Text]) -> list[tuple[bytes, bytes]]:
        """Key and value of those records of ``klst`` that there are."""
        pairs: list[tuple[bytes, bytes]] = self._call(commands.MGET([_bytes(key) for key in klst]))
        return pairs

    def vsiz(self, key: Text) -> int:
        """The length of the record's value; it is an error if there is none."""
        return int(self._call(commands.VSIZ(_bytes(key))))

    def iterinit(self) -> None:
        """Begin to iterate over all keys. The server has one iterator, for everybody."""
        self._call(commands.ITERINIT())

    def iternext(self) -> bytes:
        """The next key; it is an error if there is none."""
        key: bytes = self._call(commands.ITERNEXT())
        return key

    def fwmkeys(self, prefix: Text, maxkeys: int) -> list[bytes]:
        """Up to ``maxkeys`` keys that begin with ``prefix``; all, if it is negative."""
        keys: list[bytes] = self._call(commands.FWMKEYS(_bytes(prefix), maxkeys))
        return keys

    def addint(self, key: Text, num: int) -> int:
        """Add to a record that holds an integer of 4 bytes, or begin it; the sum."""
        return int(self._call(commands.ADDINT(_bytes(key), num)))

    def adddouble(self, key: Text, num: float) -> float:
        """Add to a record that holds a double of 8 bytes, or begin it; the sum."""
        return float(self._call(commands.ADDDOUBLE(_bytes(key), *float_to_decimal(num))))

    def ext(self, func: Text, opts: int, key: Text, value: Text) -> bytes:
        """What the server's own function ``func`` answers; ``opts`` is of `RDBXOLCKREC` and `RDBXOLCKGLB`."""
        result: bytes = self._call(commands.EXT(_bytes(func), _bytes(key), _bytes(value), opts))
        return result

    def sync(self) -> None:
        """Return once all records are on the disk."""
        self._call(commands.SYNC())

    def vanish(self) -> None:
        """Remove all records, whoever they belong to."""
        self._call(commands.VANISH())

    def copy(self, path: Text) -> None:
        """Copy the database to a path on the server."""
        self._call(commands.COPY(_bytes(path)))

    def restore(self, path: Text, msec: int, opts: int = 0) -> None:
        """Replay the update log at a path on the server, from a time on: microseconds since 1970, despite the name."""
        self._call(commands.RESTORE(_bytes(path), msec, opts))

    def setmst(self, host: Text, port: int, ts: int = 0, opts: int = 0) -> None:
        """Make the server follow the one at ``host`` and ``port``, from the time ``ts`` (microseconds) on."""
        self._call(commands.SETMST(_bytes(host), port, ts, opts))

    def rnum(self) -> int:
        """How many records there are."""
        return int(self._call(commands.RNUM()))

    def size(self) -> int:
        """How many bytes they take."""
        return int(self._call(commands.SIZE()))

    def stat(self) -> bytes:
        """What the server tells of itself: lines of name, tab and value."""
        text: bytes = self._call(commands.STAT())
        return text

    def misc(self, func: Text, opts: int, args: Iterable[Text]) -> list[bytes]:
        """What the database's function ``func`` answers; ``opts`` may be `RDBMONOULOG`."""
        result: list[bytes] = self._call(commands.MISC(_bytes(func), [_bytes(arg) for arg in args], opts))
        return result


class PyTyrant(MutableMapping[Text, Any]):
    """A server's records as a mapping; ``t`` is the `Tyrant` underneath.

    Iterating uses the server's one iterator: anybody else who iterates meanwhile takes keys away. `prefix_keys` with
    an empty prefix is not disturbed.
    """

    @classmethod
    def open(cls: type[P], *args: Any, **kw: Any) -> P:
        """Connect; arguments as for `Tyrant.open`."""
        return cls(Tyrant.open(*args, **kw))

    def __init__(self, t: Tyrant) -> None:
        self.t = t

    # Comparing as mappings do, and showing as dictionaries do, would fetch every record.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __repr__(self) -> str:
        return f"<{type(self).__name__} over {self.t!r}>"

    def __enter__(self: P) -> P:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __contains__(self, key: object) -> bool:
        try:
            self.t.vsiz(key)  # type: ignore[arg-type]  # what is neither bytes nor str is refused there
        except TyrantFailure:
            return False
        return True

    has_key = __contains__

    def __getitem__(self, key: Text) -> Any:
        try:
            return self.t.get(key)
        except TyrantFailure:
            raise KeyError(key) from None

    def __setitem__(self, key: Text, value: Any) -> None:
        self.t.put(key, value)

    def __delitem__(self, key: Text) -> None:
        try:
            self.t.out(key)
        except TyrantFailure:
            raise KeyError(key) from None

    def setdefault(self, key: Text, value: Any) -> Any:  # type: ignore[override]  # pytyrant knows no default None
        """Store ``value`` if there is no such record, at once on the server; what is there now."""
        try:
            self.t.putkeep(key, value)
        except TyrantFailure:
            return self[key]
        return value

    def __iter__(self) -> Iterator[bytes]:
        return self.iterkeys()

    def iterkeys(self) -> Iterator[bytes]:
        """The keys, one call each."""
        self.t.iterinit()
        while True:
            try:
                key = self.t.iternext()
            except TyrantFailure:
                return
            yield key

    def iteritems(self) -> Iterator[tuple[bytes, Any]]:
        """Keys and values, two calls each; records that go meanwhile are passed over."""
        for key in self.iterkeys():
            try:
                yield key, self[key]
            except KeyError:
                continue

    def itervalues(self) -> Iterator[Any]:
        """The values, two calls each."""
        return (value for _, value in self.iteritems())

    # Lists, as in pytyrant, where mappings of today have views.
    def keys(self) -> list[bytes]:  # type: ignore[override]
        return list(self.iterkeys())

    def items(self) -> list[tuple[bytes, Any]]:  # type: ignore[override]
        return list(self.iteritems())

    def values(self) -> list[Any]:  # type: ignore[override]
        return list(self.itervalues())

    def __len__(self) -> int:
        return self.t.rnum()

    def clear(self) -> None:
        """Remove all records of the server, whoever they belong to."""
        self.t.vanish()

    def update(self, other: Any = (), **kwargs: Any) -> None:  # type: ignore[override]  # bytes and str need no overloads
        """Store what is in a mapping or an iterable of pairs, and ``kwargs``, in one call."""
        self.multi_set(dict(other or (), **kwargs).items())

    def multi_del(self, keys: Iterable[Text], no_update_log: bool = False) -> None:
        """Remove the records that there are of ``keys``."""
        self.t.misc("outlist", _misc_options(no_update_log), keys)

    def multi_get(self, keys: Iterable[Text], no_update_log: bool = False) -> list[Any]:
        """The values of ``keys``, None where there is no record."""
        wanted = [_bytes(key) for key in keys]
        found = list_to_dict(self.t.misc("getlist", _misc_options(no_update_log), wanted))
        return [found.get(key) for key in wanted]

    def multi_set(self, items: Iterable[tuple[Text, Any]], no_update_log: bool = False) -> None:
        """Store pairs of key and value."""
        pairs = [(key, value) for key, value in items]
        self.t.misc("putlist", _misc_options(no_update_log), itertools.chain.from_iterable(pairs))

    def call_func(
        self, func: Text, key: Text, value: Text, record_locking: bool = False, global_locking: bool = False
    ) -> bytes:
        """What the server's own function ``func`` answers."""
        options = (RDBXOLCKREC if record_locking else 0) | (RDBXOLCKGLB if global_locking else 0)
        return self.t.ext(func, options, key, value)

    def get_size(self, key: Text) -> int:
        """The length of the record's value."""
        try:
            return self.t.vsiz(key)
        except TyrantFailure:
            raise KeyError(key) from None

    def get_stats(self) -> dict[str, str]:
        """What the server tells of itself, as text."""
        lines = self.t.stat().decode(errors="surrogateescape").splitlines()
        return dict(line.split("\t", 1) for line in lines if line)

    def prefix_keys(self, prefix: Text, maxkeys: int | None = None) -> list[bytes]:
        """The keys that begin with ``prefix``, up to ``maxkeys`` of them."""
        return self.t.fwmkeys(prefix, -1 if maxkeys is None else maxkeys)

    def concat(self, key: Text, value: Any, width: int | None = None) -> None:
        """Append to a record; keep its last ``width`` bytes, if that is given."""
        if width is None:
            self.t.putcat(key, value)
        else:
            self.t.putshl(key, value, width)

    def sync(self) -> None:
        """Return once all records are on the disk."""
        self.t.sync()

    def close(self) -> None:
        """Close the connection."""
        self.t.close()


def _misc_options(no_update_log: bool) -> int:
    return RDBMONOULOG if no_update_log else 0


class PyTableTyrant(PyTyrant):
    """The rows of a table database as a mapping of dictionaries. Only an original server has such a database."""

    def __getitem__(self, key: Text) -> dict[bytes, bytes]:
        try:
            return list_to_dict(self.t.misc("get", RDBMONOULOG, [key]))
        except TyrantFailure:
            raise KeyError(key) from None

    def __setitem__(self, key: Text, value: Row) -> None:
        self.t.misc("put", 0, [key, *dict_to_list(value)])

    def setdefault(  # type: ignore[override]  # as in PyTyrant
        self, key: Text, value: Row, no_update_log: bool = False
    ) -> Mapping[Any, Any]:
        try:
            self.t.misc("putkeep", _misc_options(no_update_log), [key, *dict_to_list(value)])
        except TyrantFailure:
            return self[key]
        return value

    def multi_get(self, keys: Iterable[Text], no_update_log: bool = False) -> list[dict[bytes, bytes] | None]:
        rows = super().multi_get(keys, no_update_log)
        return [None if row is None else list_to_dict(row.split(b"\0")) for row in rows]

    def multi_set(self, items: Iterable[tuple[Text, Row]], no_update_log: bool = False) -> None:
        rows = ((key, b"\0".join(map(_bytes, dict_to_list(row)))) for key, row in items)
        super().multi_set(rows, no_update_log)

    def concat(self, key: Text, value: Row, width: int | None = None, no_update_log: bool = False) -> None:
        """Add columns to a row."""
        if width is not None:
            raise ValueError("a row of a table has no width to be cut to")
        self.t.misc("putcat", _misc_options(no_update_log), [key, *dict_to_list(value)])

    @property
    def search(self) -> Query:
        """A search that finds all rows, to be narrowed."""
        return Query(self)


class Query:
    """A search in a table database: keys of rows, found when they are first looked at.

    Narrowing and ordering make new queries. Slicing asks the server for that part only.
    """

    def __init__(self, ptt: PyTableTyrant, conditions: Sequence[bytes] = ()) -> None:
        self.ptt = ptt
        self.conditions = list(conditions)
        self._found: list[bytes] | None = None

    def filter(self, **query: Text | Iterable[Text]) -> Query:
        """Keep the rows that fit all conditions, each ``column__operation=value`` (see `QUERY_OPERATIONS`).

        :raises ValueError: a condition is not of that form.
        """
        narrowed = Query(self.ptt, self.conditions)
        for name, value in query.items():
            column, _, operation = name.partition("__")
            if operation not in QUERY_OPERATIONS:
                known = ", ".join(QUERY_OPERATIONS)
                raise ValueError(f"{name} is not of the form column__operation, with one of {known}")
            tokens = [value] if isinstance(value, (bytes, str)) else value
            expression = b",".join(map(_bytes, tokens))
            narrowed.conditions.append(_condition("addcond", column, QUERY_OPERATIONS[operation], expression))
        return narrowed

    def order_by_str(self, field: str) -> Query:
        """Order by a column as text; descending, if a ``-`` stands before it."""
        return self._ordered(field, RDBQOSTRASC, RDBQOSTRDESC)

    def order_by_num(self, field: str) -> Query:
        """Order by a column as numbers; descending, if a ``-`` stands before it."""
        return self._ordered(field, RDBQONUMASC, RDBQONUMDESC)

    def _ordered(self, field: str, ascending: int, descending: int) -> Query:
        order = descending if field.startswith("-") else ascending
        return Query(self.ptt, [*self.conditions, _condition("setorder", field.removeprefix("-"), str(order))])

    def items(self) -> list[dict[bytes, bytes] | None]:
        """The rows."""
        return self.ptt.multi_get(list(self))

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._fetch())

    def __len__(self) -> int:
        return len(self._fetch())

    def __repr__(self) -> str:
        return repr(self._fetch())

    def __getitem__(self, k: int | slice) -> Any:
        """The key at a place, or None; the keys of a slice. Places count from the front only."""
        places = k if isinstance(k, slice) else slice(k, k + 1)
        start, stop = places.start or 0, places.stop
        if start < 0 or (stop is not None and stop < 0):
            raise ValueError("a search has no negative places")
        if self._found is not None:
            keys = self._found[start:stop]
        else:
            most = -1 if stop is None else max(0, stop - start)
            keys = self._search([*self.conditions, _condition("setlimit", str(most), str(start))])
        if isinstance(k, slice):
            return keys[:: k.step]
        return keys[0] if keys else None

    def _fetch(self) -> list[bytes]:
        if self._found is None:
            self._found = self._search(self.conditions)
        return self._found

    def _search(self, conditions: Sequence[bytes]) -> list[bytes]:
        return self.ptt.t.misc("search", RDBMONOULOG, conditions)


def _condition(*words: Text) -> bytes:
    return b"\0".join(map(_bytes, words))
