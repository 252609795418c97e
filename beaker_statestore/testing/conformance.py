"""What every store must pass: the promises of `beaker_statestore.stores.base`, test by test.

For a store of one's own, inherit the classes that apply and give them the fixture ``store``::

    class TestMyStore(StoreConformance, AtomicityConformance):
        @pytest.fixture
        def store(self) -> Iterator[Store]:
            with MyStore() as store:
                yield store

``store`` is fresh and empty for each test. `LocalStoreConformance` holds more for engines in the process, and
`ProcessConformance` for stores that several processes can share.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore, LocalVerbs, Store, Verbs
from beaker_statestore.testing.processes import fork

__all__ = ["AtomicityConformance", "LocalStoreConformance", "ProcessConformance", "StoreConformance"]

EVERY_BYTE = bytes(range(256))
#: Keys that engines find hard: empty, with zeros, not text, on both sides of usual limits, and huge.
HARD_KEYS = [
    b"",
    b"\0",
    b"\0\0",
    b" ",
    b"\n",
    b"\xff",
    b"\xff\xff",
    EVERY_BYTE,
    *(b"k" * length for length in (250, 251, 477, 478, 479, 510, 511, 512, 600, 1024)),
    b"k" * 599 + b"l",
    b"k" * 100_000,
]
HARD_VALUES = [b"", b"\0", EVERY_BYTE, b"\xff" * 4096, b"v" * 2**20]

#: How many at a time, and how often each, where rivals are let loose on a store.
THREADS = 4
PROCESSES = 3
TIMES = 100
#: Seconds for all of them.
DEADLINE = 60.0

#: How another process gets at a store: a URL, or something to call that `pickle` can carry.
Reopen = str | Callable[[], Store]


def _label(data: bytes) -> str:
    return repr(data) if len(data) < 8 else f"{len(data)}-bytes-{data[-1:].hex()}"


class StoreConformance:
    """For every store."""

    # -- single records

    def test_a_new_store_is_empty(self, store: Store) -> None:
        assert store.count() == 0
        assert list(store.keys()) == []
        assert store.get(b"key") is None

    @pytest.mark.parametrize("value", HARD_VALUES, ids=_label)
    def test_a_value_comes_back_as_it_was_put(self, store: Store, value: bytes) -> None:
        store.put(b"key", value)
        assert store.get(b"key") == value

    @pytest.mark.parametrize("key", HARD_KEYS, ids=_label)
    def test_a_key_may_be_any_bytes(self, store: Store, key: bytes) -> None:
        assert store.get(key) is None
        assert store.delete(key) is False
        assert store.add(key, b"one") is True
        assert store.add(key, b"two") is False
        assert store.get(key) == b"one"
        assert store.get_many([key]) == {key: b"one"}
        assert list(store.keys()) == [key]
        assert store.compare_and_swap(key, b"two", b"three") is False
        assert store.compare_and_swap(key, b"one", b"three") is True
        assert store.get(key) == b"three"
        store.put(key, b"")
        assert store.get(key) == b""
        assert store.count() == 1
        assert store.delete(key) is True
        assert store.get(key) is None
        assert store.count() == 0

    def test_keys_that_are_alike_are_kept_apart(self, store: Store) -> None:
        for number, key in enumerate(HARD_KEYS):
            store.put(key, b"%d" % number)
        assert [store.get(key) for key in HARD_KEYS] == [b"%d" % number for number in range(len(HARD_KEYS))]
        assert sorted(store.keys()) == sorted(HARD_KEYS)
        assert store.count() == len(HARD_KEYS)
        for key in HARD_KEYS[::2]:
            assert store.delete(key) is True
        assert sorted(store.keys()) == sorted(HARD_KEYS[1::2])

    def test_an_empty_value_is_not_absence(self, store: Store) -> None:
        store.put(b"key", b"")
        assert store.get(b"key") == b""
        assert store.add(b"key", b"other") is False
        assert store.compare_and_swap(b"key", None, b"other") is False
        assert store.get_many([b"key"]) == {b"key": b""}
        assert store.delete(b"key") is True

    def test_what_comes_back_is_bytes(self, store: Store) -> None:
        store.put(b"key", b"value")
        keys, _ = store.scan()
        assert [type(data) for data in (store.get(b"key"), *store.get_many([b"key"]).values(), *keys)] == [bytes] * 3

    def test_put_replaces(self, store: Store) -> None:
        store.put(b"key", b"a long first value")
        store.put(b"key", b"second")
        assert store.get(b"key") == b"second"
        assert store.count() == 1

    def test_add_keeps_what_is_there(self, store: Store) -> None:
        assert store.add(b"key", b"first") is True
        assert store.add(b"key", b"second") is False
        assert store.get(b"key") == b"first"

    def test_delete_says_whether_there_was_something(self, store: Store) -> None:
        store.put(b"key", b"value")
        assert store.delete(b"key") is True
        assert store.delete(b"key") is False

    def test_a_time_of_expiry_in_the_future_changes_nothing(self, store: Store) -> None:
        far = 4e9
        store.put(b"put", b"1", far)
        assert store.add(b"add", b"2", far) is True
        assert store.compare_and_swap(b"cas", None, b"3", far) is True
        assert store.get_many([b"put", b"add", b"cas"]) == {b"put": b"1", b"add": b"2", b"cas": b"3"}

    # -- several records

    def test_get_many_answers_what_is_there_in_the_order_asked(self, store: Store) -> None:
        store.put_many({b"%d" % number: b"value %d" % number for number in range(5)})
        found = store.get_many([b"4", b"absent", b"0", b"2"])
        assert list(found.items()) == [(b"4", b"value 4"), (b"0", b"value 0"), (b"2", b"value 2")]

    def test_get_many_takes_repeats_and_any_iterable(self, store: Store) -> None:
        store.put_many({b"a": b"1", b"b": b"2"})
        assert list(store.get_many(iter([b"b", b"a", b"b"])).items()) == [(b"b", b"2"), (b"a", b"1")]
        assert store.get_many([]) == {}

    def test_put_many_and_delete_many_take_any_number(self, store: Store) -> None:
        items = {b"key %d" % number: b"value %d" % number for number in range(1500)}
        store.put_many(items)
        assert store.count() == 1500
        assert store.get_many(items) == items
        store.delete_many(iter([*list(items)[:1499], b"absent"]))
        assert list(store.keys()) == [b"key 1499"]
        store.put_many({})
        store.delete_many([])
        assert store.count() == 1

    # -- compare_and_swap

    @pytest.mark.parametrize("there", [None, b"", b"old", b"new"], ids=repr)
    @pytest.mark.parametrize("expected", [None, b"", b"old"], ids=repr)
    @pytest.mark.parametrize("new", [None, b"", b"new"], ids=repr)
    def test_compare_and_swap_replaces_only_what_is_expected(
        self, store: Store, there: bytes | None, expected: bytes | None, new: bytes | None
    ) -> None:
        if there is not None:
            store.put(b"key", there)
        assert store.compare_and_swap(b"key", expected, new) is (there == expected)
        assert store.get(b"key") == (new if there == expected else there)
        assert store.count() == (store.get(b"key") is not None)

    def test_compare_and_swap_compares_every_byte(self, store: Store) -> None:
        value = b"v" * 2**20
        store.put(b"key", value)
        assert store.compare_and_swap(b"key", value[:-1] + b"w", b"new") is False
        assert store.compare_and_swap(b"key", value[:-1], b"new") is False
        assert store.compare_and_swap(b"key", value + b"\0", b"new") is False
        assert store.compare_and_swap(b"key", value, value[:-1] + b"w") is True
        assert store.get(b"key") == value[:-1] + b"w"

    # -- modify

    def test_modify_makes_changes_and_removes(self, store: Store) -> None:
        assert store.modify(b"key", lambda old: b"made" if old is None else old) == b"made"
        assert store.modify(b"key", lambda old: (old or b"") + b" longer") == b"made longer"
        assert store.get(b"key") == b"made longer"
        assert store.modify(b"key", lambda _old: None) is None
        assert store.get(b"key") is None

    def test_modify_applies_the_function_to_what_a_rival_wrote(self, store: Store) -> None:
        store.put(b"key", b"1")
        seen: list[bytes | None] = []

        def add_one(old: bytes | None) -> bytes:
            if not seen:
                store.put(b"key", b"rival")
            seen.append(old)
            return (old or b"") + b"+"

        assert store.modify(b"key", add_one) == b"rival+"
        assert seen == [b"1", b"rival"]
        assert store.get(b"key") == b"rival+"

    def test_modify_that_changes_nothing_leaves_a_rivals_write(self, store: Store) -> None:
        store.put(b"key", b"1")

        def unchanged(old: bytes | None) -> bytes | None:
            store.put(b"key", b"rival")
            return old

        assert store.modify(b"key", unchanged) == b"1"
        assert store.get(b"key") == b"rival"

    @pytest.mark.parametrize("known", [b"current", b"stale", None], ids=repr)
    def test_modify_starts_from_what_the_caller_knows(self, store: Store, known: bytes | None) -> None:
        store.put(b"key", b"current")
        seen: list[bytes | None] = []

        def exclaim(old: bytes | None) -> bytes:
            seen.append(old)
            return (old or b"") + b"!"

        assert store.modify(b"key", exclaim, known=known) == b"current!"
        assert seen == ([b"current"] if known == b"current" else [known, b"current"])
        assert store.get(b"key") == b"current!"

    def test_modify_does_not_take_the_callers_word_that_nothing_is_to_be_done(self, store: Store) -> None:
        store.put(b"key", b"a rival's")
        assert store.modify(b"key", lambda _old: b"wanted", known=b"wanted") == b"wanted"
        assert store.get(b"key") == b"wanted"
        assert store.modify(b"key", lambda _old: None, known=None) is None
        assert store.get(b"key") is None

    def test_an_exception_of_modifys_function_changes_nothing(self, store: Store) -> None:
        store.put(b"key", b"1")
        with pytest.raises(ZeroDivisionError):
            store.modify(b"key", lambda _old: b"%d" % (1 // 0))
        assert store.get(b"key") == b"1"

    # -- apply

    def test_apply_answers_each_operation_in_order(self, store: Store) -> None:
        operations: list[Callable[[Verbs], object]] = [
            lambda verbs: verbs.get(b"a"),
            lambda verbs: verbs.add(b"a", b"1"),
            lambda verbs: verbs.add(b"a", b"2"),
            lambda verbs: verbs.get(b"a"),
            lambda verbs: verbs.compare_and_swap(b"a", b"1", b"3"),
            lambda verbs: verbs.put(b"b", b"4"),
            lambda verbs: verbs.get_many([b"b", b"a"]),
            lambda verbs: verbs.delete(b"a"),
            lambda verbs: verbs.scan()[0],
            lambda verbs: verbs.count(),
        ]
        assert store.apply(operations) == [
            None,
            True,
            False,
            b"1",
            True,
            None,
            {b"b": b"4", b"a": b"3"},
            True,
            [b"b"],
            1,
        ]
        assert store.get_many([b"a", b"b"]) == {b"b": b"4"}

    def test_apply_of_nothing_is_nothing(self, store: Store) -> None:
        assert store.apply([]) == []

    # -- scan

    def test_scan_gives_every_key_page_by_page(self, store: Store) -> None:
        keys = {b"%03d" % number for number in range(25)}
        store.put_many(dict.fromkeys(keys, b""))
        found: list[bytes] = []
        cursor = None
        for _ in range(1000):
            page, cursor = store.scan(b"", cursor, 4)
            assert len(page) <= 4
            found += page
            if cursor is None:
                break
        assert cursor is None
        assert set(found) == keys

    @pytest.mark.parametrize("limit", [1, 24, 25, 26, 1000])
    def test_pages_of_any_size_end(self, store: Store, limit: int) -> None:
        keys = {b"%03d" % number for number in range(25)}
        store.put_many(dict.fromkeys(keys, b""))
        assert set(_scan_all(store, b"", limit)) == keys

    @pytest.mark.parametrize(
        "prefix", [b"", b"a", b"a:", b"\0", b"\xff", b"\xff\xff", b"a\xff", b"none", b"k" * 600], ids=_label
    )
    @pytest.mark.parametrize("limit", [1, 3, 1000])
    def test_scan_gives_the_keys_with_a_prefix_and_no_others(self, store: Store, prefix: bytes, limit: int) -> None:
        keys = {b"", b"a", b"a:", b"a:1", b"a:2", b"b", b"a\xff", b"a\xff\xff", b"\0", b"\0a", b"\xff", b"\xff\xff\xff"}
        # Long keys that differ behind what an engine may be able to index, and one that sorts among their prefixes.
        keys |= {b"k" * 600, b"k" * 601, b"k" * 600 + b"a", b"k" * 599 + b"l", b"k" * 478, b"k" * 479, b"l"}
        store.put_many(dict.fromkeys(keys, b"x"))
        assert set(_scan_all(store, prefix, limit)) == {key for key in keys if key.startswith(prefix)}

    def test_scan_finds_what_stays_while_others_go(self, store: Store) -> None:
        keys = [b"%03d" % number for number in range(30)]
        store.put_many(dict.fromkeys(keys, b""))
        found: set[bytes] = set()
        cursor = None
        for _ in range(1000):
            page, cursor = store.scan(b"", cursor, 5)
            found |= set(page)
            # The place to go on from is among the deleted.
            store.delete_many([key for key in page if int(key) % 3])
            if cursor is None:
                break
        assert found >= {key for key in keys if int(key) % 3 == 0}
        assert set(store.keys()) == {key for key in keys if int(key) % 3 == 0}

    def test_scan_finds_what_stays_while_others_come(self, store: Store) -> None:
        store.put_many({b"%03d" % number: b"" for number in range(0, 60, 2)})
        found: set[bytes] = set()
        cursor = None
        for number in range(1, 1000, 2):
            page, cursor = store.scan(b"", cursor, 5)
            found |= set(page)
            if cursor is None:
                break
            store.put(b"%03d" % (number % 60), b"")
        assert found >= {b"%03d" % number for number in range(0, 60, 2)}

    def test_keys_can_all_be_deleted_on_the_way(self, store: Store) -> None:
        store.put_many({b"a:%04d" % number: b"" for number in range(1200)} | {b"b": b""})
        for key in store.keys(b"a:"):
            assert store.delete(key) is True
        assert list(store.keys()) == [b"b"]

    # -- the store as a whole

    def test_size_is_in_bytes_and_follows_the_records(self, store: Store) -> None:
        empty = store.size()
        store.put_many({b"%d" % number: b"v" * 1000 for number in range(100)})
        full = store.size()
        assert full - empty >= 100 * 1000
        store.put_many({b"%d" % number: b"v" for number in range(99)})
        assert store.delete(b"99") is True
        assert empty <= store.size() < full

    def test_sync_and_ping_return(self, store: Store) -> None:
        store.put(b"key", b"value")
        store.sync()
        store.ping()
        assert store.get(b"key") == b"value"

    def test_closing_twice_is_harmless(self, store: Store) -> None:
        store.put(b"key", b"value")
        store.close()
        store.close()
        assert store.closed

    def test_use_after_closing_is_an_error(self, store: Store) -> None:
        store.close()
        for use in (lambda: store.get(b"key"), lambda: store.put(b"key", b"value"), store.sync, store.count):
            with pytest.raises(StateStoreError):
                use()

    def test_open_store_answers_a_store_unchanged(self, store: Store) -> None:
        assert open_store(store) is store

    def test_threads_may_share_it(self, store: Store) -> None:
        def work(number: int) -> None:
            key = b"key %d" % number
            for time in range(TIMES):
                value = b"%d:%d" % (number, time) * 20
                store.put(key, value)
                assert store.get(key) == value
                assert store.get_many([key, b"absent"]) == {key: value}
                assert key in store.scan()[0]

        _run_in_threads(work)
        assert store.count() == THREADS

    def test_it_is_usable_on_both_sides_of_a_fork(self, store: Store) -> None:
        store.put(b"before", b"1")

        def in_child() -> tuple[bytes | None, bytes | None, bool]:
            found = store.get(b"before")
            store.put(b"child", b"2")
            return found, store.get(b"child"), store.compare_and_swap(b"before", b"1", b"1")

        for _ in range(3):
            assert fork(in_child) == (b"1", b"2", True)
            store.put(b"parent", b"3")
            assert store.get_many([b"before", b"parent"]) == {b"before": b"1", b"parent": b"3"}


def _scan_all(store: Verbs, prefix: bytes, limit: int) -> Iterator[bytes]:
    cursor = None
    for _ in range(10_000):
        page, cursor = store.scan(prefix, cursor, limit)
        yield from page
        if cursor is None:
            return
    raise AssertionError("the scan does not end")


class LocalStoreConformance(StoreConformance):
    """For every `LocalStore`: its keys are in order, and `apply` is a transaction."""

    def test_keys_are_in_byte_order(self, store: LocalStore) -> None:
        # Long ones too, inserted against their order, and with shorter ones between them.
        keys = [*HARD_KEYS, *(b"k" * 590 + b"%03d" % number for number in range(20)), b"k" * 590 + b"\xff"]
        for key in reversed(keys):
            store.put(key, b"")
        assert list(store.ordered_keys()) == sorted(keys)
        assert store.apply([lambda verbs: list(verbs.ordered_keys())]) == [sorted(keys)]
        assert list(_scan_all(store, b"", 3)) == sorted(keys)

    @pytest.mark.parametrize("start", [*HARD_KEYS, b"a", b"k" * 300, b"k" * 605, b"k" * 478 + b"l"], ids=_label)
    @pytest.mark.parametrize("after", [False, True])
    def test_the_order_can_be_entered_anywhere(self, store: LocalStore, start: bytes, after: bool) -> None:
        store.put_many(dict.fromkeys(HARD_KEYS, b""))
        expected = sorted(key for key in HARD_KEYS if key > start or (key == start and not after))
        assert list(store.ordered_keys(start, after=after)) == expected

    def test_the_order_goes_on_over_many_pages_and_changes(self, store: LocalStore) -> None:
        keys = [b"%05d" % number for number in range(2500)]
        store.put_many(dict.fromkeys(keys, b""))
        found = []
        for key in store.ordered_keys():
            found.append(key)
            store.delete(key)
        assert found == keys
        assert store.count() == 0

    def test_clear_removes_everything(self, store: LocalStore) -> None:
        store.put_many(dict.fromkeys(HARD_KEYS, b"x"))
        store.clear()
        assert store.count() == 0
        assert list(store.keys()) == []
        store.clear()
        store.put(b"key", b"value")
        assert store.get(b"key") == b"value"

    def test_an_exception_undoes_the_whole_transaction(self, store: LocalStore) -> None:
        before = {b"kept": b"1", b"changed": b"2", b"deleted": b"3", b"": b"4", b"k" * 600: b"5"}
        store.put_many(before)
        operations: list[Callable[[LocalVerbs], object]] = [
            lambda verbs: verbs.put(b"changed", b"other"),
            lambda verbs: verbs.put(b"changed", b"another"),
            lambda verbs: verbs.delete(b"deleted"),
            lambda verbs: verbs.put(b"deleted", b"again"),
            lambda verbs: verbs.put(b"new", b"record"),
            lambda verbs: verbs.delete(b"new"),
            lambda verbs: verbs.compare_and_swap(b"k" * 600, b"5", None),
            lambda verbs: verbs.clear(),
            lambda verbs: verbs.add(b"kept", b"after"),
            lambda _verbs: 1 // 0,
        ]
        with pytest.raises(ZeroDivisionError):
            store.apply(operations)
        assert store.get_many(before) == before
        assert sorted(store.keys()) == sorted(before)
        store.put(b"new", b"life goes on")

    def test_operations_see_what_came_before_them(self, store: LocalStore) -> None:
        operations: list[Callable[[LocalVerbs], object]] = [
            lambda verbs: verbs.put(b"b", b"1"),
            lambda verbs: verbs.put(b"a", b"2"),
            lambda verbs: list(verbs.ordered_keys()),
            lambda verbs: verbs.clear(),
            lambda verbs: (verbs.count(), list(verbs.ordered_keys()), verbs.get(b"a")),
        ]
        assert store.apply(operations) == [None, None, [b"a", b"b"], None, (0, [], None)]

    def test_others_see_a_transaction_whole_or_not_at_all(self, store: LocalStore) -> None:
        store.put_many({b"a": b"0", b"b": b"0"})
        done = threading.Event()

        def write(_number: int) -> None:
            for number in range(TIMES):
                value = b"%d" % number
                store.apply([partial(_put, b"a", value), partial(_put, b"b", value)])

        def read() -> None:
            while not done.is_set():
                pair = store.get_many([b"a", b"b"])
                assert pair[b"a"] == pair[b"b"]

        with ThreadPoolExecutor(2) as pool:
            readers = [pool.submit(read) for _ in range(2)]
            try:
                _run_in_threads(write)
            finally:
                done.set()
            for reader in readers:
                reader.result(DEADLINE)

    def test_it_tells_what_a_crash_can_lose(self, store: LocalStore) -> None:
        assert len(store.crash_can_lose()) > 20


def _put(key: bytes, value: bytes, verbs: LocalVerbs) -> None:
    verbs.put(key, value)


class AtomicityConformance:
    """For every store: threads that work on the same records lose nothing."""

    def test_swaps_of_threads_lose_nothing(self, store: Store) -> None:
        _run_in_threads(lambda _number: _swap_increments(store, b"sum", TIMES))
        assert store.get(b"sum") == b"%d" % (THREADS * TIMES)

    def test_modifications_of_threads_lose_nothing(self, store: Store) -> None:
        _run_in_threads(lambda number: _modify_appends(store, b"list", number, TIMES // 4))
        _assert_all_appended(store.get(b"list"), THREADS, TIMES // 4)

    def test_of_threads_that_add_the_same_key_one_wins(self, store: Store) -> None:
        winners: list[bytes] = []
        _run_in_threads(lambda number: winners.extend(_added(store, number, TIMES)))
        assert sorted(winners) == sorted(b"%d" % time for time in range(TIMES))

    def test_of_threads_that_delete_the_same_key_one_wins(self, store: Store) -> None:
        keys = [b"%d" % time for time in range(TIMES)]
        store.put_many(dict.fromkeys(keys, b""))
        winners: list[bytes] = []
        _run_in_threads(lambda _number: winners.extend(key for key in keys if store.delete(key)))
        assert sorted(winners) == sorted(keys)


class ProcessConformance:
    """For stores that processes can share; the fixture ``reopen`` says how another process gets at ``store``."""

    @pytest.fixture
    def reopen(self) -> Reopen:
        raise NotImplementedError("give a URL for open_store, or a callable for pickle, that opens the same store")

    def test_a_process_sees_what_another_wrote(self, store: Store, reopen: Reopen) -> None:
        store.put(b"key", b"ours")
        _run_in_processes(_replace, reopen)
        assert store.get(b"key") == b"ours, theirs"

    def test_swaps_of_processes_lose_nothing(self, store: Store, reopen: Reopen) -> None:
        _run_in_processes(_increment_in_process, reopen, PROCESSES)
        assert store.get(b"sum") == b"%d" % (PROCESSES * TIMES)

    def test_modifications_of_processes_lose_nothing(self, store: Store, reopen: Reopen) -> None:
        _run_in_processes(_append_in_process, reopen, PROCESSES)
        _assert_all_appended(store.get(b"list"), PROCESSES, TIMES)

    def test_of_processes_that_add_the_same_key_one_wins(self, store: Store, reopen: Reopen) -> None:
        _run_in_processes(_add_in_process, reopen, PROCESSES)
        winners = sorted(key for key in store.keys(b"won ") for _ in range(int(store.get(key) or b"0")))
        assert winners == sorted(b"won %d" % time for time in range(TIMES))


# -- what rivals do


def _swap_increments(store: Store, key: bytes, times: int) -> None:
    for _ in range(times):
        while True:
            old = store.get(key)
            if store.compare_and_swap(key, old, b"%d" % (int(old or b"0") + 1)):
                break


def _modify_appends(store: Store, key: bytes, number: int, times: int) -> None:
    for time in range(times):
        store.modify(key, lambda old, word=b"%d:%d " % (number, time): (old or b"") + word)  # type: ignore[misc]


def _assert_all_appended(found: bytes | None, rivals: int, times: int) -> None:
    words = (found or b"").split()
    assert sorted(words) == sorted(b"%d:%d" % (number, time) for number in range(rivals) for time in range(times))
    for number in range(rivals):
        own = [int(word.partition(b":")[2]) for word in words if word.startswith(b"%d:" % number)]
        assert own == sorted(own), "the appends of one rival are out of order"


def _added(store: Store, number: int, times: int) -> list[bytes]:
    keys = [b"%d" % time for time in range(times)]
    return [key for key in keys if store.add(key, b"%d" % number)]


def _run_in_threads(work: Callable[[int], object]) -> None:
    """Run ``work(0)``, ``work(1)``... at the same time; an exception of one is raised."""
    together = threading.Barrier(THREADS)

    def run(number: int) -> None:
        together.wait(DEADLINE)
        work(number)

    interval = sys.getswitchinterval()
    # Otherwise a thread that does little at a time is hardly ever interrupted within it.
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            for future in [pool.submit(run, number) for number in range(THREADS)]:
                future.result(DEADLINE)
    finally:
        sys.setswitchinterval(interval)


def _open(reopen: Reopen) -> Store:
    return open_store(reopen) if isinstance(reopen, str) else reopen()


def _replace(reopen: Reopen, _number: int) -> None:
    with _open(reopen) as store:
        if not store.compare_and_swap(b"key", b"ours", b"ours, theirs"):
            raise AssertionError(f"found {store.get(b'key')!r}")


def _increment_in_process(reopen: Reopen, _number: int) -> None:
    with _open(reopen) as store:
        _swap_increments(store, b"sum", TIMES)


def _append_in_process(reopen: Reopen, number: int) -> None:
    with _open(reopen) as store:
        _modify_appends(store, b"list", number, TIMES)


def _add_in_process(reopen: Reopen, number: int) -> None:
    with _open(reopen) as store:
        for key in _added(store, number, TIMES):
            store.modify(b"won " + key, lambda old: b"%d" % (int(old or b"0") + 1))


def _run_in_processes(work: Callable[[Reopen, int], None], reopen: Reopen, processes: int = 1) -> None:
    """Run ``work(reopen, 0)``, ``work(reopen, 1)``... in processes that share nothing but the store."""
    # Not forked: each is to open the store by itself, as separate programs do.
    context = multiprocessing.get_context("spawn")
    running = [context.Process(target=work, args=(reopen, number)) for number in range(processes)]
    for process in running:
        process.start()
    try:
        for process in running:
            process.join(DEADLINE)
            assert process.exitcode == 0, f"a process ended with {process.exitcode}; its traceback is in the output"
    finally:
        for process in running:
            process.kill()
            process.join(DEADLINE)
            process.close()
