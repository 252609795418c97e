"""What commands do to records, where the transcripts do not tell, on every local store."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from beaker_statestore.exceptions import OutcomeUnknown, StoreUnavailable
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import paging, swap
from beaker_statestore.tyrant.commands import (
    ADDDOUBLE,
    ADDINT,
    APPEND,
    CAS,
    COPY,
    DECR,
    EXT,
    FAILURE,
    FWMKEYS,
    GET,
    INCR,
    ITERINIT,
    ITERNEXT,
    MGET,
    MISC,
    OPTIMIZE,
    OUT,
    PREPEND,
    PROBE,
    PUT,
    PUTCAT,
    PUTKEEP,
    PUTNR,
    PUTSHL,
    REPLACE,
    RESTORE,
    RNUM,
    SCAN,
    SETMST,
    SIZE,
    STAT,
    STATISTICS,
    STORE_FAILED,
    SUCCESS,
    SYNC,
    TOO_MUCH,
    VANISH,
    VSIZ,
    WAIT,
    Reply,
    Request,
)
from beaker_statestore.tyrant.verbs import BUILT_IN, Executor, Reach
from beaker_statestore.tyrant.wire import ReplyDecoder, decimal_to_float, float_to_decimal
from tests.serving import carry_out

T = TypeVar("T")

OK = Reply(SUCCESS)
FAILED = Reply(FAILURE)
MISC_OK = Reply(SUCCESS, [])
MISC_FAILED = Reply(FAILURE, [])
INT_MIN, INT_MAX = -(2**31), 2**31 - 1
NAN = float_to_decimal(math.nan)


class Client:
    """Asks an executor, and reads its replies as a client does."""

    def __init__(self, store: LocalStore, longest: int = 1 << 20) -> None:
        self.store = store
        self.executor = Executor(store, Reach(longest, longest))

    def __call__(self, request: Request) -> Reply:
        (reply,) = self.all(request)
        return reply

    def all(self, *requests: Request) -> list[Reply]:
        """The replies to ``requests``, carried out together; fewer, if not all were carried out."""
        return self.read(requests, carry_out(self.executor, *requests))

    @staticmethod
    def read(requests: Sequence[Request], encoded: Sequence[bytes]) -> list[Reply]:
        replies = []
        for request, data in zip(requests, encoded, strict=False):
            decoder = ReplyDecoder()
            decoder.expect(request)
            decoder.feed(data)
            message = decoder.next()
            assert message is not None
            assert decoder.buffered == 0
            replies.append(message[1])
        return replies

    def misc(self, name: bytes, *arguments: bytes) -> list[bytes] | None:
        """The results of a ``misc`` function, ``None`` for failure."""
        status, results = self(MISC(name, list(arguments), 0))
        assert status in (SUCCESS, FAILURE)
        found: list[bytes] = results
        return found if status == SUCCESS else None

    def visited(self) -> list[bytes]:
        """The keys that the iterator still gives."""
        keys = []
        while (reply := self(ITERNEXT())).status == SUCCESS:
            keys.append(reply.value)
        return keys


@pytest.fixture(params=["memory", "lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalStore]:
    with MemoryStore() if request.param == "memory" else LMDBStore(tmp_path / "state.lmdb") as store:
        yield store


@pytest.fixture
def client(store: LocalStore) -> Client:
    return Client(store)


# -- the iterator


def test_the_iterator_goes_through_the_keys_in_byte_order(client: Client) -> None:
    keys = [b"", b"\x00", b"a", b"a\x00", b"ab", b"b", b"\xff"]
    for key in reversed(keys):
        client(PUT(key, b""))
    assert client(ITERNEXT()) == FAILED  # not before iterinit
    client(ITERINIT())
    assert client.visited() == keys
    assert client(ITERNEXT()) == FAILED


def test_the_iterator_visits_every_key_when_each_is_deleted_at_once(client: Client) -> None:
    keys = [b"k%d" % number for number in range(10)]
    for key in keys:
        client(PUT(key, b""))
    client(ITERINIT())
    visited = []
    while (reply := client(ITERNEXT())).status == SUCCESS:
        visited.append(reply.value)
        assert client(OUT(reply.value)) == OK
    assert visited == keys
    assert client(RNUM()).value == 0


def test_there_is_one_iterator_for_commands_and_functions(client: Client) -> None:
    for key in (b"a", b"b", b"c"):
        client(PUT(key, b"v" + key))
    assert client.misc(b"iterinit") == []
    assert client(ITERNEXT()).value == b"a"
    assert client.misc(b"iternext") == [b"b", b"vb"]
    assert client(ITERNEXT()).value == b"c"
    assert client.misc(b"iternext") is None


def test_the_iterator_begins_at_or_behind_any_key(client: Client) -> None:
    for key in (b"a", b"c"):
        client(PUT(key, b""))
    assert client.misc(b"iterinit", b"b") == []
    assert client.visited() == [b"c"]
    assert client.misc(b"iterinit", b"d") == []
    assert client.visited() == []


def test_queries_leave_the_iterator_alone(client: Client) -> None:
    for key in (b"a", b"b"):
        client(PUT(key, b""))
    client(ITERINIT())
    client(FWMKEYS(b"", -1))
    client.misc(b"regex", b".")
    client.misc(b"range")
    assert client.visited() == [b"a", b"b"]


# -- single records


def test_putshl_keeps_the_end(client: Client) -> None:
    client(PUTSHL(b"k", b"abcdefgh", 5))
    assert client(GET(b"k")).value == b"abcdefgh"
    client(PUTSHL(b"k", b"", 3))
    assert client(GET(b"k")).value == b"fgh"
    client(PUTSHL(b"k", b"i", 100))
    assert client(GET(b"k")).value == b"fghi"


@pytest.mark.parametrize(
    ("before", "number", "after"),
    [(None, 0, 0), (INT_MAX, 1, INT_MIN), (INT_MAX, 2, INT_MIN + 1), (INT_MIN, -1, INT_MAX), (5, -8, -3)],
)
def test_addint_wraps_and_its_least_sum_looks_like_a_failure(
    client: Client, before: int | None, number: int, after: int
) -> None:
    if before is not None:
        client(ADDINT(b"n", before))
    assert client(ADDINT(b"n", number)) == (FAILED if after == INT_MIN else Reply(SUCCESS, after))
    assert client(ADDINT(b"n", 0)) == (FAILED if after == INT_MIN else Reply(SUCCESS, after))
    assert len(client(GET(b"n")).value) == 4


def test_adddouble_stores_what_is_not_a_number_and_looks_like_a_failure(client: Client) -> None:
    assert client(ADDDOUBLE(b"d", *float_to_decimal(math.inf))).value == math.inf
    assert client(ADDDOUBLE(b"d", 1, 0)).value == math.inf
    assert client(ADDDOUBLE(b"d", *float_to_decimal(-math.inf))) == FAILED
    assert client(ADDDOUBLE(b"d", 1, 0)) == FAILED
    assert client(VSIZ(b"d")).value == 8
    assert client(ADDDOUBLE(b"e", *NAN)) == FAILED
    assert client(VSIZ(b"e")).value == 8


def test_adddouble_adds(client: Client) -> None:
    for number in (1.5, -2.75, 0.25):
        reply = client(ADDDOUBLE(b"d", *float_to_decimal(number)))
    assert reply.value == -1.0
    assert decimal_to_float(*float_to_decimal(reply.value)) == -1.0


@pytest.mark.parametrize("request_", [ADDINT(b"k", 1), ADDDOUBLE(b"k", 1, 0)], ids=lambda request: request.command.name)
def test_numbers_are_not_added_to_what_is_none(client: Client, request_: Request) -> None:
    client(PUT(b"k", b"12345"))
    assert client(request_) == FAILED
    assert client(GET(b"k")).value == b"12345"


def test_putnr_puts_and_says_nothing(client: Client) -> None:
    assert carry_out(client.executor, PUTNR(b"k", b"v")) == [b""]
    assert client(GET(b"k")).value == b"v"


def test_vanish_removes_all(client: Client) -> None:
    client(PUT(b"", b""))
    client(PUT(b"k", b""))
    assert client(VANISH()) == OK
    assert client(RNUM()).value == 0


# -- functions


def test_functions_that_put_and_remove(client: Client) -> None:
    assert client.misc(b"put", b"k", b"v", b"ignored") == []
    assert client.misc(b"putkeep", b"k", b"w") is None
    assert client.misc(b"putcat", b"k", b"w") == []
    assert client.misc(b"get", b"k") == [b"vw"]
    assert client.misc(b"putlist", b"a", b"1", b"b", b"2", b"odd") == []
    assert client.misc(b"getlist", b"b", b"none", b"a", b"b") == [b"b", b"2", b"a", b"1", b"b", b"2"]
    assert client.misc(b"outlist", b"b", b"none", b"a") == []
    assert client.misc(b"out", b"k") == []
    assert client.misc(b"out", b"k") is None
    assert client(RNUM()).value == 0


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((b"k",), b"value"),
        ((b"k", b"1"), b"alue"),
        ((b"k", b"1", b"2"), b"al"),
        ((b"k", b"-3", b"2"), b"va"),
        ((b"k", b"4", b"9"), b"e"),
        ((b"k", b"1", b"-1"), b"alue"),
        ((b"k", b"1", b"0"), b""),
        ((b"k", b"junk"), b"value"),
        ((b"k", b" 2junk"), b"lue"),
        ((b"k", b"5"), None),
        ((b"none",), None),
        ((b"empty",), None),
    ],
)
def test_getpart(client: Client, arguments: tuple[bytes, ...], part: bytes | None) -> None:
    client(PUT(b"k", b"value"))
    client(PUT(b"empty", b""))
    assert client.misc(b"getpart", *arguments) == (None if part is None else [part])


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ((), b"abcd"),
        ((b"b",), b"bcd"),
        ((b"b", b"2"), b"bc"),
        ((b"", b"0", b"c"), b"ab"),
        ((b"b", b"-1", b"b"), b""),
        ((b"bb", b"junk"), b"cd"),
        ((b"x",), b""),
    ],
)
def test_range(client: Client, arguments: tuple[bytes, ...], keys: bytes) -> None:
    for key in (b"a", b"b", b"c", b"d"):
        client(PUT(key, b"v" + key))
    found = client.misc(b"range", *arguments)
    assert found is not None
    assert b"".join(found[::2]) == keys
    assert found[1::2] == [b"v" + key for key in found[::2]]


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        ((b"^a",), [b"a1", b"a2", b"ab"]),
        ((b"[0-9]$", b"2"), [b"a1", b"a2"]),
        ((b"[0-9]$", b"0"), [b"a1", b"a2", b"b1"]),
        ((b"*^A[B]",), [b"ab"]),
        ((b"A",), []),
        ((b"(",), None),
        ((), None),
    ],
)
def test_regex(client: Client, arguments: tuple[bytes, ...], keys: list[bytes] | None) -> None:
    for key in (b"a1", b"a2", b"ab", b"b1"):
        client(PUT(key, b"v"))
    found = client.misc(b"regex", *arguments)
    assert (None if found is None else found[::2]) == keys


@pytest.mark.parametrize(
    "name",
    [
        b"nope", b"PUT", b"putdup", b"putdupback", b"error", b"cacheclear", b"defrag", b"setindex", b"search",
        b"metasearch", b"genuid", b"tranbegin", b"trancommit", b"tranabort", b"",
    ],
)  # fmt: skip
def test_functions_of_other_databases_fail(client: Client, name: bytes) -> None:
    assert client(MISC(name, [b"k", b"v"], 0)) == MISC_FAILED
    assert client(RNUM()).value == 0


@pytest.mark.parametrize("name", [b"sync", b"optimize", b"vanish", b"iterinit", b"range", b"getlist", b"sync\0hronise"])
def test_these_functions_need_no_arguments(client: Client, name: bytes) -> None:
    assert client(MISC(name, [], 1)) == MISC_OK


@pytest.mark.parametrize(
    ("name", "enough"),
    [(b"put", 2), (b"putkeep", 2), (b"putcat", 2), (b"out", 1), (b"get", 1), (b"getpart", 1), (b"regex", 1)],
)
def test_these_functions_need_some(client: Client, name: bytes, enough: int) -> None:
    assert client(MISC(name, [b"k"] * (enough - 1), 0)) == MISC_FAILED
    assert client(RNUM()).value == 0


# -- ext


def test_the_probe_names_our_functions_and_does_nothing(client: Client) -> None:
    reply = client(EXT(PROBE, b"k", b"v", 0))
    assert set(reply.value.split()) == BUILT_IN - {STATISTICS} > {PROBE, CAS, SCAN, WAIT}
    assert client(RNUM()).value == 0


@pytest.mark.parametrize(
    ("function", "stored", "value", "left", "answer"),
    [
        (REPLACE, b"old", b"new", b"new", b""),
        (APPEND, b"old", b"new", b"oldnew", b""),
        (APPEND, b"a secret", b"", b"a secret", b""),  # who may write need not be one who may read
        (PREPEND, b"old", b"new", b"newold", b""),
        (INCR, b"7", b"5", b"12", b"12"),
        (DECR, b"7", b"50", b"0", b"0"),
        (INCR, b"9223372036854775807", b"1", b"0", b"0"),
        (INCR, b"12 apples", b"-2 pears", b"10", b"10"),
        (INCR, b"none", b"4", b"4", b"4"),
    ],
)
def test_memcacheds_changes_are_functions(
    client: Client, function: bytes, stored: bytes, value: bytes, left: bytes, answer: bytes
) -> None:
    assert client(EXT(function, b"k", value, 0)) == FAILED
    assert client(RNUM()).value == 0
    client(PUT(b"k", stored))
    assert client(EXT(function, b"k", value, 0)) == Reply(SUCCESS, answer)
    assert client(GET(b"k")).value == left


@pytest.mark.parametrize("stored", [None, b"", b"old", b"other"])
@pytest.mark.parametrize("expected", [None, b"", b"old"])
@pytest.mark.parametrize("new", [None, b"", b"new"])
def test_cas_swaps_exactly_what_is_expected(
    client: Client, stored: bytes | None, expected: bytes | None, new: bytes | None
) -> None:
    if stored is not None:
        client(PUT(b"k", stored))
    reply = client(EXT(CAS, b"k", swap.pack(expected, new), 0))
    assert reply == Reply(SUCCESS, b"1" if stored == expected else b"0")
    after = new if stored == expected else stored
    assert client(GET(b"k")) == (FAILED if after is None else Reply(SUCCESS, after))


def test_scan_gives_pages_of_keys(client: Client) -> None:
    keys = [b"p%d" % number for number in range(5)]
    for key in [b"o", *keys, b"q"]:
        client(PUT(key, b""))
    found: list[bytes] = []
    cursor = None
    for _ in range(3):
        reply = client(EXT(SCAN, b"p", paging.pack_request(cursor, 2), 0))
        page, cursor = paging.unpack_page(reply.value)
        found += page
    assert found == keys
    assert cursor is None


@pytest.mark.parametrize("name", [b"nope", b"", b"CAS", CAS + b"\0", b"put"])
def test_other_ext_functions_fail(client: Client, name: bytes) -> None:
    assert client(EXT(name, b"k", swap.pack(None, b"v"), 0)) == FAILED
    assert client(RNUM()).value == 0


@pytest.mark.parametrize("name", [CAS, SCAN])
def test_what_is_not_packed_as_agreed_fails(client: Client, name: bytes) -> None:
    assert client(EXT(name, b"k", b"\xff", 0)) == FAILED
    assert client(RNUM()).value == 0


# -- the database


@pytest.mark.parametrize(
    "request_",
    [COPY(b"/tmp/x"), COPY(b"@/bin/true"), RESTORE(b"/tmp", 0, 0), SETMST(b"localhost", 1978, 0, 0)],
    ids=lambda request: request.command.name,
)
def test_dangerous_commands_are_refused(client: Client, request_: Request) -> None:
    assert client(request_) == FAILED


def test_sync_and_optimize_succeed(client: Client) -> None:
    assert client.all(SYNC(), OPTIMIZE(b""), OPTIMIZE(b"bnum=100#opts=ld"), OPTIMIZE(b"junk")) == [OK] * 4


def test_stat_tells_the_figures(client: Client) -> None:
    reads = [GET(b"a"), GET(b"none"), MGET([b"a"])]
    carry_out(client.executor, PUT(b"a", b"value"), PUTNR(b"b", b""), OUT(b"none"), PUTKEEP(b"a", b""), *reads)
    figures = dict(line.split(b"\t") for line in client(STAT()).value.splitlines())
    assert figures[b"rnum"] == b"2"
    assert int(figures[b"size"]) == client(SIZE()).value > 0
    assert figures[b"protver"] == b"0.91"
    assert figures[b"bigend"] in (b"0", b"1")
    assert int(figures[b"memrss"]) > 1_000_000
    counts = {name: int(value) for name, value in figures.items() if name.startswith(b"cnt_")}
    assert {name: count for name, count in counts.items() if count} == {
        b"cnt_put": 1,
        b"cnt_putnr": 1,
        b"cnt_putkeep": 1,
        b"cnt_get": 2,
        b"cnt_out": 1,
        b"cnt_mget": 1,
        b"cnt_put_miss": 1,
        b"cnt_get_miss": 1,
        b"cnt_out_miss": 1,
    }
    assert len(counts) == 29


# -- how long replies may be


@pytest.mark.parametrize(
    "request_",
    [
        MGET([b"k1"] * 6),
        MISC(b"getlist", [b"k1"] * 6, 0),
        MISC(b"range", [], 0),
        MISC(b"regex", [b"k"], 0),
        FWMKEYS(b"long", -1),
        EXT(SCAN, b"long", paging.pack_request(None, 100), 0),
    ],
    ids=lambda request: request.command.name,
)
def test_a_reply_that_would_be_too_long_is_none(store: LocalStore, request_: Request) -> None:
    store.put_many({b"k%d" % number: b"v" * 200 for number in range(6)})
    store.put_many({b"long%d" % number + b"k" * 300: b"" for number in range(4)})
    client = Client(store, longest=1000)
    assert client(request_).status == TOO_MUCH
    assert client(MGET([b"k1"] * 4)).status == SUCCESS


@pytest.mark.parametrize("request_", [PUTCAT(b"k", b"vv"), PUTSHL(b"k", b"vv", 100)])
def test_a_value_does_not_grow_beyond_what_a_reply_can_bring(store: LocalStore, request_: Request) -> None:
    client = Client(store, longest=10)
    client(PUT(b"k", b"v" * 9))
    assert client(request_) == FAILED
    assert client(GET(b"k")).value == b"v" * 9


def test_no_more_is_carried_out_when_the_replies_become_long(store: LocalStore) -> None:
    client = Client(store, longest=1000)
    client(PUT(b"k", b"v" * 300))
    requests = [GET(b"k"), GET(b"k"), GET(b"k"), GET(b"k"), PUT(b"behind", b"")]
    assert len(client.all(*requests)) == 4
    assert client(GET(b"behind")) == FAILED


# -- stores that fail


class Failing(MemoryStore):
    """Cannot take more than ``room`` records, like a full disk: the transaction in which there are more fails."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.syncs = True

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        def operation(records: LocalVerbs) -> list[T]:
            results = [operation(records) for operation in operations]
            if records.count() > self.room:
                raise StoreUnavailable("the disk is full")
            return results

        (results,) = super().apply([operation])
        return results

    def sync(self) -> None:
        if not self.syncs:
            raise StoreUnavailable("the disk is gone")


def test_a_request_that_fails_does_not_fail_its_neighbours() -> None:
    client = Client(Failing(room=2))
    client(PUT(b"a", b"1"))
    requests = [GET(b"a"), PUT(b"b", b"2"), PUT(b"c", b"3"), ADDINT(b"b", 1), MISC(b"put", [b"d", b""], 0), GET(b"b")]
    assert client.all(*requests) == [
        Reply(SUCCESS, b"1"),
        OK,
        Reply(STORE_FAILED),
        FAILED,
        Reply(STORE_FAILED, []),
        Reply(SUCCESS, b"2"),
    ]
    assert carry_out(client.executor, PUTNR(b"e", b"")) == [b""]
    assert client(RNUM()).value == 2


def test_one_by_one_there_are_no_longer_replies_either() -> None:
    client = Client(Failing(room=1), longest=1000)
    client(PUT(b"a", b"v" * 600))
    assert len(client.all(PUT(b"b", b""), GET(b"a"), GET(b"a"), GET(b"a"), GET(b"a"))) == 3


def test_a_failed_sync_fails_only_itself() -> None:
    store = Failing(room=100)
    store.syncs = False
    client = Client(store)
    replies = client.all(ADDINT(b"n", 1), SYNC(), MISC(b"sync", [], 0), ADDINT(b"n", 1))
    assert replies == [Reply(SUCCESS, 1), Reply(STORE_FAILED), Reply(STORE_FAILED, []), Reply(SUCCESS, 2)]
    assert client(ADDINT(b"n", 0)).value == 2


class Doubtful(MemoryStore):
    """Carries out transactions and says of those whose numbers are given, from 1, that it does not know."""

    def __init__(self, *doubtful: int) -> None:
        super().__init__()
        self.doubtful = doubtful
        self.transactions = 0

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        self.transactions += 1
        results = super().apply(operations)
        if self.transactions in self.doubtful:
            raise OutcomeUnknown("a commit failed half way")
        return results


def test_what_may_have_been_carried_out_is_not_tried_again() -> None:
    store = Doubtful(1)
    with pytest.raises(OutcomeUnknown):
        carry_out(Executor(store), ADDINT(b"n", 5), PUTCAT(b"k", b"v"), PUTKEEP(b"l", b""))
    assert store.transactions == 1


def test_not_even_when_each_is_tried_by_itself() -> None:
    class Full(Doubtful):
        def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
            if not self.transactions:
                self.transactions = 1
                raise StoreUnavailable("the disk is full")
            return super().apply(operations)

    store = Full(3)
    with pytest.raises(OutcomeUnknown):
        carry_out(Executor(store), PUTCAT(b"a", b"x"), PUTCAT(b"b", b"x"), PUTCAT(b"c", b"x"))
    assert store.transactions == 3
    assert store.get_many([b"a", b"b", b"c"]) == {b"a": b"x", b"b": b"x"}


class Repeating(MemoryStore):
    """Runs everything twice from the start, as an engine may that has to make room."""

    def apply(self, operations: Sequence[Callable[[LocalVerbs], T]]) -> list[T]:
        class AgainError(Exception):
            pass

        def first(records: LocalVerbs) -> None:
            for operation in operations:
                operation(records)
            raise AgainError

        with pytest.raises(AgainError):
            super().apply([first])
        return super().apply(operations)


def test_a_transaction_that_is_run_again_counts_once() -> None:
    client = Client(Repeating())
    for key in (b"a", b"b"):
        client(PUT(key, b""))
    client(ITERINIT())
    assert client.visited() == [b"a", b"b"]
    assert client(ADDINT(b"n", 1)).value == 1
    assert b"cnt_addint\t1\n" in client(STAT()).value
