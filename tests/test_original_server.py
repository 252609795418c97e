"""An original ttserver behind our store: with ``statestore.lua`` it keeps every promise, without it none is feigned.

What stands in for the server, and on which facts that rests, is said in `tests.original`.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, ProtocolError, StoreUnavailable
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.stores.tyrant import NotAtomicWarning, TyrantStore
from beaker_statestore.testing import AtomicityConformance, ServerProcess, StoreConformance, fork
from beaker_statestore.tyrant import swap
from beaker_statestore.tyrant.commands import CAS, EXT, FAILURE, MISC, PROBE, SUCCESS, Reply, Request
from beaker_statestore.tyrant.original import ADD, DELETE, LOCK_RECORD, PUT, SCRIPT, page, start_line
from beaker_statestore.tyrant.wire import encode_reply
from tests.original import LuaState, Original, host
from tests.peer import Answer, Peer, Script
from tests.visitor import Visitor

#: Commands that change nothing.
READING = {"get", "mget", "fwmkeys", "rnum", "size", "stat", "sync"}


def changes_past_the_lock(requests: Sequence[Request]) -> list[Request]:
    """Those of ``requests`` that can change records while a function of the script is at them."""
    return [
        request
        for request in requests
        if not (
            request.command.name in READING
            or (request.command is EXT and (request.arguments[0] == PROBE or request.arguments[3] == LOCK_RECORD))
        )
    ]


@pytest.fixture
def server() -> Iterator[Original]:
    with Original() as server:
        yield server


@pytest.fixture
def bare() -> Iterator[Original]:
    """A server without the script."""
    with Original(script=None) as server:
        yield server


@pytest.fixture
def overwriting(bare: Original) -> Iterator[TyrantStore]:
    """A store that makes do with ``bare``, and has been warned about."""
    with TyrantStore.from_url(bare.url, atomic=False) as store:
        with pytest.warns(NotAtomicWarning):
            store.compare_and_swap(b"", b"never", b"")
        yield store


# -- with the script


class TestTyrantStoreAtAnOriginalServer(StoreConformance, AtomicityConformance):
    @pytest.fixture
    def store(self, server: Original) -> Iterator[Store]:
        with TyrantStore.from_url(server.url) as store:
            yield store
        assert changes_past_the_lock(server.requests) == []


def test_every_change_is_a_function_of_the_script_under_the_record_lock(server: Original) -> None:
    with TyrantStore.from_url(server.url, atomic=False) as store:
        store.put(b"put", b"")
        store.put_many({b"%d" % number: b"v" for number in range(120)})
        store.add(b"add", b"v")
        store.compare_and_swap(b"put", b"", b"new")
        store.modify(b"modify", lambda _: b"v")
        store.delete(b"put")
        store.delete_many([b"%d" % number for number in range(121)])
        assert sorted(store.keys()) == [b"add", b"modify"]
    assert changes_past_the_lock(server.requests) == []
    sent = [request.arguments[0] for request in server.requests if request.command is EXT]
    assert sent.count(PROBE) == 1
    assert (sent.count(PUT), sent.count(ADD), sent.count(DELETE)) == (121, 1, 122)


def test_each_new_connection_finds_out_by_itself_what_the_server_has(server: Original) -> None:
    with TyrantStore.from_url(server.url) as store:
        store.put(b"k", b"with")
        server.script = None
        server.peer.break_connections()
        server.peer.wait_until_open(0)
        with pytest.raises(ConfigurationError, match=r"statestore\.lua"):
            store.compare_and_swap(b"k", b"with", b"without")
        assert store.get(b"k") == b"with"


#: Every change, of a single record and of two.
CHANGES: dict[str, Callable[[Store], object]] = {
    "put": lambda store: store.put(b"k", b"v"),
    "put_many": lambda store: store.put_many({b"k": b"v", b"l": b"w"}),
    "add": lambda store: store.add(b"k", b"v"),
    "delete": lambda store: store.delete(b"k"),
    "delete_many": lambda store: store.delete_many([b"k", b"l"]),
    "compare_and_swap": lambda store: store.compare_and_swap(b"k", b"old", b"new"),
}


def telling(data: bytes, then: Literal["go on", "close"] = "go on") -> Script:
    """A server with the script, which answers this to everything but the probe."""
    names = encode_reply(EXT, Reply(SUCCESS, b" ".join((PROBE, CAS, PUT, ADD, DELETE))))
    return lambda request, *_: names if request == EXT(PROBE, b"", b"", 0) else Answer(data, then)


@pytest.mark.parametrize("verb", CHANGES)
def test_a_change_without_an_answer_is_sent_once_and_its_outcome_is_unknown(verb: str) -> None:
    with (
        Peer(telling(b"", "close")) as peer,
        TyrantStore.from_url(str(peer.address)) as store,
        pytest.raises(OutcomeUnknown),
    ):
        CHANGES[verb](store)
    assert len([request for request in peer.requests if request.arguments[1] == b"k"]) == 1


@pytest.mark.parametrize("verb", CHANGES)
@pytest.mark.parametrize("answer", [b"", b"2", b"true", b"ok"])
def test_a_change_answered_with_nonsense_has_an_unknown_outcome(verb: str, answer: bytes) -> None:
    with (
        Peer(telling(encode_reply(EXT, Reply(SUCCESS, answer)))) as peer,
        TyrantStore.from_url(str(peer.address)) as store,
        pytest.raises(OutcomeUnknown, match=r"answered ext \w+ with"),
    ):
        CHANGES[verb](store)


@pytest.mark.parametrize("verb", CHANGES)
def test_a_function_that_fails_is_an_outage(verb: str) -> None:
    with (
        Peer(telling(encode_reply(EXT, Reply(FAILURE)))) as peer,
        TyrantStore.from_url(str(peer.address)) as store,
        pytest.raises(StoreUnavailable, match=r"refused ext \w+: see its log"),
    ):
        CHANGES[verb](store)


@pytest.fixture
def visitor(server: Original) -> Visitor:
    visitor = Visitor({"url": server.url})
    visitor.saves(user="zed")
    return visitor


def test_two_tabs_keep_each_others_changes(server: Original, visitor: Visitor) -> None:
    tab, other = visitor.request(), visitor.request()
    tab["cart"] = ["book"]
    other["color"] = "red"
    tab.save()
    other.save()
    assert visitor.sees() == {"user": "zed", "cart": ["book"], "color": "red"}
    assert changes_past_the_lock(server.requests) == []


def test_a_logout_stands_against_a_slow_request(server: Original, visitor: Visitor) -> None:
    slow = visitor.request()
    visitor.leaves()
    slow["cart"] = ["book"]
    slow.save()
    assert visitor.sees() == {}
    assert server.store.count() == 0
    assert changes_past_the_lock(server.requests) == []


# -- without it


@pytest.mark.parametrize("verb", ["compare_and_swap", "modify"])
def test_a_server_without_the_script_is_refused_with_the_line_to_type(bare: Original, verb: str) -> None:
    verbs = {
        "compare_and_swap": lambda store: store.compare_and_swap(b"k", None, b"v"),
        "modify": lambda store: store.modify(b"k", lambda _: b"v"),
    }
    with TyrantStore.from_url(bare.url) as store, pytest.raises(ConfigurationError) as raised:
        verbs[verb](store)
    for said in ("original ttserver", "`statestore serve`", f"ttserver -ext {SCRIPT} casket.tcb", "atomic = no"):
        assert said in str(raised.value)
    assert bare.store.count() == 0


def test_sessions_at_a_server_without_the_script_are_refused(bare: Original) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(start_line())):
        Visitor({"url": bare.url}).saves(user="zed")


def test_where_atomicity_is_not_asked_for_sessions_work_and_one_warning_says_what_is_lost(
    bare: Original, caplog: pytest.LogCaptureFixture
) -> None:
    visitor = Visitor({"url": bare.url}, atomic="no")

    def visit() -> None:
        for number in range(3):
            visitor.saves(number=number)
        assert visitor.sees() == {"number": 2}
        visitor.leaves()
        assert visitor.sees() == {}

    with caplog.at_level(logging.WARNING), pytest.warns(NotAtomicWarning) as caught:
        visit()
    (warned,) = caught
    (logged,) = [r for r in caplog.records if r.name == "beaker_statestore.stores.tyrant"]
    for said in ("overwrite each other", "deleted", f"ttserver -ext {SCRIPT} casket.tcb"):
        assert said in str(warned.message)
        assert said in logged.getMessage()
    assert bare.store.count() == 0


def test_a_forked_child_is_warned_again(overwriting: TyrantStore) -> None:
    def work() -> None:
        overwriting.modify(b"k", lambda _: b"1")
        overwriting.modify(b"k", lambda _: b"2")

    def in_child() -> int:
        with pytest.warns(NotAtomicWarning) as caught:
            work()
        return len(caught)

    assert fork(in_child) == 1
    overwriting.modify(b"k", lambda _: b"3")


@pytest.mark.parametrize("there", [None, b"", b"old", b"new"], ids=repr)
@pytest.mark.parametrize("expected", [None, b"", b"old"], ids=repr)
@pytest.mark.parametrize("new", [None, b"", b"new"], ids=repr)
def test_plain_overwriting_compares_all_the_same(
    overwriting: TyrantStore, there: bytes | None, expected: bytes | None, new: bytes | None
) -> None:
    if there is not None:
        overwriting.put(b"key", there)
    assert overwriting.compare_and_swap(b"key", expected, new) is (there == expected)
    assert overwriting.get(b"key") == (new if there == expected else there)


def test_many_records_are_put_one_by_one_since_putlist_would_add_second_values(
    bare: Original, overwriting: TyrantStore
) -> None:
    items = {b"%d" % number: b"v" for number in range(120)}
    overwriting.put_many(items)
    assert overwriting.get_many(items) == items
    overwriting.delete_many(items)
    assert overwriting.count() == 0
    assert {request.arguments[0] for request in bare.requests if request.command is MISC} == {b"outlist"}


def test_whoever_asks_for_no_atomicity_gets_it_where_it_is_to_be_had(server: Original) -> None:
    with ServerProcess("memory:") as ours:
        for url in (server.url, ours.url):
            store = open_store(url, atomic=False)
            assert store.compare_and_swap(b"k", None, b"v")
            assert not store.compare_and_swap(b"k", None, b"w")
            store.close()
    assert changes_past_the_lock(server.requests) == []


@pytest.mark.parametrize("database", ["fixed-length", "table"])
def test_a_database_that_would_change_the_values_is_refused(database: str) -> None:
    with (
        Original(script=None, database=database) as server,
        TyrantStore.from_url(server.url, atomic=False) as store,
    ):
        for _ in range(2):
            with pytest.raises(ConfigurationError, match=rf"\({database}\) does not keep values.*casket\.tcb"):
                store.compare_and_swap(b"k", None, b"v")
        assert server.store.count() == 0


# -- scans


@pytest.mark.parametrize("database", ["B+ tree", "on-memory tree"])
def test_an_ordered_database_is_scanned_with_or_without_the_script(database: str) -> None:
    keys = [b"a:%04d" % number for number in range(2500)]
    for script in (None, SCRIPT.read_bytes()):
        with Original(script=script, database=database) as server, TyrantStore.from_url(server.url) as store:
            server.store.put_many(dict.fromkeys([*keys, b"b"], b""))
            assert list(store.keys(b"a:")) == keys
            assert len(store.scan(limit=10**10)[0]) == len(keys) + 1
            assert changes_past_the_lock(server.requests) == []
            # The server's one iterator is left to others.
            assert not {"iterinit", "iternext", "misc"} & {request.command.name for request in server.requests}


@pytest.mark.parametrize(("database", "said"), [("hash", r"\(hash\)"), ("on-memory hash", "hash"), ("", r"\(\)")])
def test_a_database_without_order_is_not_scanned(database: str, said: str) -> None:
    with Original(database=database) as server, TyrantStore.from_url(server.url) as store:
        store.put(b"k", b"v")
        with pytest.raises(ConfigurationError, match=rf"{said}.*does not know them in order.*casket\.tcb"):
            store.scan()


# Few bytes, so that keys share beginnings and border on each other; the highest among them.
KEYS = st.lists(st.lists(st.sampled_from(b"ab\xfe\xff"), max_size=6).map(bytes), max_size=30)


@given(KEYS, st.sampled_from([b"", b"a", b"ab", b"\xff", b"\xff\xff"]), st.integers(1, 5), st.integers(1, 6))
def test_pages_by_prefixes_are_the_keys_in_order_each_once(
    keys: list[bytes], prefix: bytes, limit: int, window: int
) -> None:
    ordered = sorted(set(keys))

    def first_keys(prefixes: Sequence[bytes], most: int) -> list[list[bytes]]:
        return [[key for key in ordered if key.startswith(each)][:most] for each in prefixes]

    found: list[bytes] = []
    cursor = None
    while True:
        some, cursor = page(first_keys, prefix, cursor, limit, window=window)
        assert len(some) <= limit
        found += some
        if cursor is None:
            break
    assert found == [key for key in ordered if key.startswith(prefix)]


def test_a_cursor_of_another_prefix_leads_to_none_of_its_keys() -> None:
    ordered = [b"blog:1", b"blog:2", b"shop:1"]

    def first_keys(prefixes: Sequence[bytes], most: int) -> list[list[bytes]]:
        return [[key for key in ordered if key.startswith(each)][:most] for each in prefixes]

    assert page(first_keys, b"shop:", b"blog:", 5) == ([], None)
    assert page(first_keys, b"shop:", b"blog:1", 5) == ([], None)


# -- the script itself


class SecondValues(MemoryStore):
    """A B+ tree with values behind the first one of ``key``, as ``misc putlist`` leaves them."""

    def __init__(self) -> None:
        super().__init__()
        self.behind = [b"second", b"third"]

    def delete(self, key: bytes) -> bool:
        found = super().delete(key)
        if found and self.behind:
            self.put(key, self.behind.pop(0))
        return found


class Cutting(MemoryStore):
    """A fixed-length database."""

    def put(self, key: bytes, value: bytes, expires_at: float | None = None) -> None:
        super().put(key, value[:3])

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        return super().add(key, value[:3])


class Failing(MemoryStore):
    """A database that does nothing any more."""

    def add(self, key: bytes, value: bytes, expires_at: float | None = None) -> bool:
        return False

    def delete(self, key: bytes) -> bool:
        return False


def script_at(store: MemoryStore, **changed: Any) -> LuaState:
    return LuaState({**host(store), **changed}, SCRIPT.read_bytes())


def test_the_script_makes_no_globals_but_its_functions() -> None:
    script = script_at(MemoryStore())
    promised = {b"statestore", b"cas", PUT, ADD, DELETE}
    assert script.names() - script.names_before == promised
    assert set((script.call(PROBE, b"", b"") or b"").split()) == promised
    for name in promised:
        script.call(name, b"key", swap.pack(None, b"v"))
    assert script.names() - script.names_before == promised


def test_the_script_is_text_that_a_c_string_can_hold() -> None:
    assert SCRIPT.read_bytes().isascii()
    assert b"\0" not in SCRIPT.read_bytes()


def test_the_probe_touches_nothing() -> None:
    touched: list[str] = []
    script = LuaState(host(MemoryStore(), touched.append), SCRIPT.read_bytes())
    script.call(PROBE, b"key", b"value")
    assert touched == []


@given(there=st.none() | st.binary(max_size=3), expected=st.none() | st.binary(max_size=3), new=st.none() | st.binary())
def test_cas_in_lua_is_compare_and_swap(there: bytes | None, expected: bytes | None, new: bytes | None) -> None:
    stores = MemoryStore(), MemoryStore()
    for store in stores:
        if there is not None:
            store.put(b"k", there)
    swapped = stores[0].compare_and_swap(b"k", expected, new)
    answer = script_at(stores[1]).call(b"cas", b"k", swap.pack(expected, new))
    assert answer == (swap.SWAPPED if swapped else swap.NOT_SWAPPED)
    assert stores[0].get(b"k") == stores[1].get(b"k")


#: What may come as a swap, most of it malformed.
SWAPS = st.binary(max_size=6) | st.builds(
    lambda flags, length, rest: bytes((flags,)) + length.to_bytes(4, "big") + rest,
    st.integers(0, 5),
    st.integers(0, 4) | st.integers(0, 2**32 - 1),
    st.binary(max_size=4),
)


@given(SWAPS)
def test_cas_in_lua_takes_what_our_server_takes(packed: bytes) -> None:
    try:
        swap.unpack(packed)
    except ProtocolError:
        well_formed = False
    else:
        well_formed = True
    store = MemoryStore()
    assert (script_at(store).call(b"cas", b"k", packed) is not None) == well_formed
    assert well_formed or store.count() == 0


def test_a_long_expected_value_is_told_from_the_new_one() -> None:
    store = MemoryStore()
    old, new = bytes(range(256)) * 300, b"\0" * 70_000
    store.put(b"k", old)
    assert script_at(store).call(b"cas", b"k", swap.pack(old, new)) == b"1"
    assert store.get(b"k") == new


def test_a_binary_command_would_slip_in_between_and_that_is_why_none_is_sent() -> None:
    store = MemoryStore()
    store.put(b"k", b"old")

    def logout(name: str) -> None:
        if name == "_put":
            store.delete(b"k")

    script = LuaState(host(store, logout), SCRIPT.read_bytes())
    assert script.call(b"cas", b"k", swap.pack(b"old", b"new")) == b"1"
    assert store.get(b"k") == b"new"  # the session that was deleted is back


@pytest.mark.parametrize("call", [(DELETE, b""), (b"cas", swap.pack(b"first", None))], ids=["delete", "cas"])
def test_what_lies_behind_a_removed_value_does_not_come_to_light(call: tuple[bytes, bytes]) -> None:
    store = SecondValues()
    store.put(b"k", b"first")
    name, value = call
    assert script_at(store).call(name, b"k", value) == b"1"
    assert store.get(b"k") is None


@pytest.mark.parametrize("call", [(PUT, b"value"), (ADD, b"value"), (b"cas", swap.pack(None, b"value"))], ids=repr)
def test_a_value_that_is_not_kept_as_given_is_a_failure(call: tuple[bytes, bytes]) -> None:
    logged: list[tuple[bytes, int]] = []
    script = script_at(Cutting(), _log=lambda message, level: logged.append((message, level)))
    assert script.call(call[0], b"k", call[1]) is None
    ((message, level),) = logged
    assert b"not stored as it was given" in message
    assert level == 2


@pytest.mark.parametrize(
    "call",
    [(DELETE, b"k", b""), (ADD, b"absent", b"v"), (b"cas", b"k", swap.pack(b"v", None)), (PUT, b"k", b"new")],
    ids=repr,
)
def test_a_failure_of_the_database_is_not_taken_for_absence_or_presence(call: tuple[bytes, bytes, bytes]) -> None:
    store = Failing()
    store.put(b"k", b"v")
    assert script_at(store, _put=lambda key, value: False).call(*call) is None
    assert store.get(b"k") == b"v"
