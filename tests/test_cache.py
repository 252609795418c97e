"""Beaker's caches over ext:tcjson: made once, by whomever, and read in one round trip."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from beaker.cache import Cache, CacheManager
from beaker.container import Value

from beaker_statestore.exceptions import ConfigurationError, StoreUnavailable
from beaker_statestore.namespace import DocumentManager, TCJSONNamespaceManager
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore, ServerProcess
from tests.original import Original

#: A lease that ends while a test waits, in seconds.
SHORT_LEASE = 0.5
STORE_KEY = "0123456789abcdef" * 2

forking = multiprocessing.get_context("fork")
_numbers = itertools.count(1)


@pytest.fixture
def shared(tyrant_server: ServerProcess) -> dict[str, Any]:
    """Options for a store that several processes can use."""
    return {"url": tyrant_server.url, "prefix": f"cache-test{next(_numbers)}."}


@pytest.fixture
def counting() -> FaultyStore:
    """A store that tells its calls, as they would be on a wire."""
    return FaultyStore(MemoryStore())


def beaker_cache(options: dict[str, Any], **more: Any) -> Cache:
    return Cache("app/views.py|front page", type="ext:tcjson", **options, **more)


def stale(cache: Cache, key: str = "key") -> None:
    """Let the cache have a value that has expired a second ago."""
    cache.namespace.set_value(key.encode(), (time.time() - 2, 1, "stale"), expiretime=1)


# Made once


def test_a_stampede_makes_one_value(shared: dict[str, Any], tmp_path: Path) -> None:
    made = tmp_path / "made"
    processes, threads = 4, 50
    ready = forking.Barrier(processes)
    answers = forking.SimpleQueue()

    def create() -> str:
        with made.open("ab") as file:
            file.write(b"%d " % os.getpid())
        time.sleep(0.1)
        return "value"

    def stampede() -> None:
        cache = CacheManager(type="ext:tcjson", **shared).get_cache("ns")
        gate = threading.Barrier(threads + 1)

        def one() -> Any:
            gate.wait(20)
            return cache.get("key", createfunc=create)

        with ThreadPoolExecutor(threads) as pool:
            got = [pool.submit(one) for _ in range(threads)]
            ready.wait(20)
            gate.wait(20)
            answers.put([answer.result(30) for answer in got])

    children = [forking.Process(target=stampede) for _ in range(processes)]
    for child in children:
        child.start()
    try:
        for child in children:
            child.join(40)
            assert child.exitcode == 0
    finally:
        for child in children:
            child.kill()
    assert [answers.get() for _ in children] == [["value"] * threads] * processes
    assert len(made.read_bytes().split()) == 1
    assert open_store(shared["url"]).scan(f"{shared['prefix']}lock:".encode()) == ([], None)


def test_caches_that_look_alike_have_locks_of_their_own(options: dict[str, Any]) -> None:
    alike = [
        TCJSONNamespaceManager("a:b", **options).get_creation_lock("c"),
        TCJSONNamespaceManager("a", **options).get_creation_lock("b:c"),
        TCJSONNamespaceManager("a:", **options).get_creation_lock("b:c"),
        TCJSONNamespaceManager("a%3Ab", **options).get_creation_lock("c"),
        TCJSONNamespaceManager("a", **{**options, "prefix": options["prefix"] + "x"}).get_creation_lock("b:c"),
        DocumentManager("a:b", kind="slate", **options).get_creation_lock("c"),
    ]
    for lock in alike:
        # Each in a thread of its own, for a thread gets again what it has.
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(lock.acquire, wait=False).result(10)
    same = TCJSONNamespaceManager("a:b", **options).get_creation_lock(b"c")
    assert not same.acquire(wait=False)


def test_locks_of_long_keys_are_their_own_too(options: dict[str, Any]) -> None:
    """Also of the longest that a cache can have, which would be too long when escaped once more."""
    cache = beaker_cache(options)
    longest = "x:" * 16_000
    locks = [cache.namespace.get_creation_lock(key) for key in (longest, longest[:-1], "k" * 300, "k" * 301)]
    for lock in locks:
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(lock.acquire, wait=False).result(10)
    for key in (longest + "y", "y" + longest):
        assert cache.get(key, createfunc=lambda: "made") == "made"


def test_nothing_is_made_where_the_lock_could_not_be_given_back() -> None:
    """At an original ttserver without our script, whose own commands could take a lock and store a value."""
    with Original(script=None) as server:
        cache = beaker_cache({"url": server.url})
        made: list[int] = []
        for _ in range(2):
            with pytest.raises(ConfigurationError, match="atomic = no"):
                cache.get("key", createfunc=lambda: made.append(1))
        assert made == []
        assert server.store.count() == 0


def test_clearing_a_cache_leaves_its_locks(options: dict[str, Any]) -> None:
    """Whoever makes a value meanwhile goes on making it alone."""
    cache = beaker_cache(options)
    lock = cache.namespace.get_creation_lock(b"key")
    assert lock.acquire()
    cache.clear()
    with ThreadPoolExecutor(1) as threads:
        assert not threads.submit(cache.namespace.get_creation_lock(b"key").acquire, wait=False).result(10)
    lock.release()


def test_a_value_may_be_made_of_another_of_the_same_cache_and_of_itself(options: dict[str, Any]) -> None:
    cache = beaker_cache(options)

    def outer() -> list[Any]:
        return [cache.get("other", createfunc=lambda: 1), cache.get("key", createfunc=lambda: 2)]

    assert cache.get("key", createfunc=outer) == [1, 2]


@contextmanager
def maker(options: dict[str, Any]) -> Iterator[SimpleNamespace]:
    """A process in the middle of making the value of ``key``, which it ends when told to (``end``, ``ended``)."""
    begun, end, ended = (forking.Event() for _ in range(3))

    def make() -> None:
        def create() -> str:
            begun.set()
            end.wait(30)
            return "the first maker's"

        beaker_cache(options).get("key", createfunc=create)
        ended.set()

    process = forking.Process(target=make)
    process.start()
    try:
        assert begun.wait(10)
        yield SimpleNamespace(pid=process.pid, end=end, ended=ended)
    finally:
        process.kill()
        process.join(10)


def test_a_maker_that_is_killed_is_succeeded_after_its_lease_and_not_before(shared: dict[str, Any]) -> None:
    shared["creation_lease"] = str(SHORT_LEASE)
    with maker(shared) as first:
        os.kill(first.pid, signal.SIGKILL)
        begun = time.monotonic()
        assert beaker_cache(shared).get("key", createfunc=lambda: "mine") == "mine"
        assert SHORT_LEASE <= time.monotonic() - begun < SHORT_LEASE + 5
    assert beaker_cache(shared).get("key") == "mine"


def test_a_maker_that_was_stopped_does_not_release_its_successors_lock(shared: dict[str, Any]) -> None:
    shared["creation_lease"] = str(SHORT_LEASE)
    cache = beaker_cache(shared)
    store = open_store(shared["url"])

    def create() -> str:
        """While this goes on, the first maker goes on too, and ends."""
        before = list(store.keys(f"{shared['prefix']}lock:".encode()))
        assert len(before) == 1
        mine = store.get(before[0])
        os.kill(first.pid, signal.SIGCONT)
        first.end.set()
        assert first.ended.wait(10)
        assert store.get(before[0]) == mine
        return "the successor's"

    with maker(shared) as first:
        os.kill(first.pid, signal.SIGSTOP)
        assert cache.get("key", createfunc=create) == "the successor's"
    assert cache.get("key") == "the successor's"


def test_a_stale_value_is_served_at_once_while_another_process_makes_a_new_one(shared: dict[str, Any]) -> None:
    cache = beaker_cache(shared, expire=60)
    stale(cache)
    with maker(shared) as first:
        begun = time.monotonic()
        assert cache.get("key", createfunc=lambda: "not called") == "stale"
        assert time.monotonic() - begun < 10
        first.end.set()
        assert first.ended.wait(10)
        assert cache.get("key", createfunc=lambda: "not called") == "the first maker's"


def test_a_stale_value_is_made_anew_though_its_maker_was_killed(shared: dict[str, Any]) -> None:
    shared["creation_lease"] = str(SHORT_LEASE)
    cache = beaker_cache(shared, expire=1)
    stale(cache)
    with maker(shared) as first:
        os.kill(first.pid, signal.SIGKILL)
        begun = time.monotonic()
        wait_until(lambda: cache.get("key", createfunc=lambda: "fresh") == "fresh")
        assert SHORT_LEASE <= time.monotonic() - begun < SHORT_LEASE + 5


def test_a_failing_maker_leaves_the_lock_to_the_next(options: dict[str, Any]) -> None:
    cache = beaker_cache(options)
    with pytest.raises(ZeroDivisionError):
        cache.get("key", createfunc=lambda: 1 / 0)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(cache.get, "key", createfunc=lambda: "made").result(10) == "made"


# Round trips


def test_a_hit_is_one_call(counting: FaultyStore) -> None:
    cache = beaker_cache({"url": counting})
    cache.put("key", "value")
    counting.calls.clear()
    assert cache.get("key") == "value"
    assert counting.calls == ["get"]
    counting.calls.clear()
    assert "key" in cache
    assert counting.calls == ["get"]


def test_a_missing_value_is_made_in_five_calls(counting: FaultyStore) -> None:
    cache = beaker_cache({"url": counting})
    assert cache.get("key", createfunc=lambda: "made") == "made"
    looked, locked, looked_again, stored, released = counting.calls
    assert [looked, looked_again, stored] == ["get", "get", "put"]
    assert [locked, released] == ["compare_and_swap"] * 2


def test_a_stale_value_that_another_makes_anew_is_served_in_three_calls(counting: FaultyStore) -> None:
    cache = beaker_cache({"url": counting})
    stale(cache)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(cache.namespace.get_creation_lock(b"key").acquire).result(10)
    counting.calls.clear()
    assert cache.get("key", createfunc=lambda: "not called") == "stale"
    assert counting.calls == ["get", "compare_and_swap", "get"]


def test_what_is_read_under_a_lock_is_forgotten_with_it(counting: FaultyStore) -> None:
    cache = beaker_cache({"url": counting})
    manager = cache.namespace
    cache.put("key", "old")
    manager.acquire_read_lock()
    manager.acquire_read_lock()
    assert b"key" in manager
    manager.release_read_lock()
    TCJSONNamespaceManager("app/views.py|front page", url=counting)["key"] = (1.0, None, "new")
    assert manager[b"key"][2] == "old"
    assert manager[b"key"][2] == "new"
    assert b"key" in manager
    manager.release_read_lock()
    TCJSONNamespaceManager("app/views.py|front page", url=counting)["key"] = (1.0, None, "newer")
    assert manager[b"key"][2] == "newer"


def test_without_a_read_lock_nothing_is_remembered(counting: FaultyStore) -> None:
    manager = TCJSONNamespaceManager("ns", url=counting)
    manager["key"] = (1.0, None, "old")
    assert "key" in manager
    TCJSONNamespaceManager("ns", url=counting)["key"] = (1.0, None, "new")
    assert manager["key"][2] == "new"
    manager.release_read_lock()  # once too often
    manager.acquire_read_lock()
    counting.calls.clear()
    assert "key" in manager
    assert manager["key"][2] == "new"
    assert counting.calls == ["get"]


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (lambda manager: manager.set_value("key", (2.0, None, "new")), "new"),
        (lambda manager: manager.__setitem__("key", (2.0, None, "new")), "new"),
        (lambda manager: manager.modify("key", lambda document: {**document, "value": "new"}), "new"),
        (lambda manager: manager.__delitem__("key"), None),
        (lambda manager: manager.remove(), None),
    ],
)
def test_a_thread_reads_what_it_has_written_itself(
    options: dict[str, Any], write: Callable[[Any], None], expected: str | None
) -> None:
    manager = TCJSONNamespaceManager("ns", **options)
    manager["key"] = (1.0, None, "old")
    manager.acquire_read_lock()
    assert "key" in manager
    write(manager)
    if expected is None:
        with pytest.raises(KeyError):
            manager["key"]
    else:
        assert manager["key"][2] == expected
    manager.release_read_lock()


def test_what_was_found_under_one_key_is_no_answer_for_another(options: dict[str, Any]) -> None:
    manager = TCJSONNamespaceManager("ns", **options)
    manager["key"], manager["other"] = (1.0, None, "key's"), (1.0, None, "other's")
    manager.acquire_read_lock()
    assert "key" in manager
    assert manager["other"][2] == "other's"
    manager.release_read_lock()


def test_one_threads_memory_is_not_anothers(options: dict[str, Any]) -> None:
    manager = TCJSONNamespaceManager("ns", **options)
    manager["key"] = (1.0, None, "old")
    manager.acquire_read_lock()
    assert "key" in manager
    with ThreadPoolExecutor(1) as threads:
        threads.submit(manager.set_value, "key", (1.0, None, "new")).result(10)
        assert threads.submit(manager.__getitem__, "key").result(10)[2] == "new"
    assert manager["key"][2] == "old"
    manager.release_read_lock()


def test_a_value_is_its_readers_own(options: dict[str, Any]) -> None:
    cache = beaker_cache(options)
    cache.put("key", [1])
    for _ in range(2):
        value = cache.get("key")
        assert value == [1]
        value.append(2)


def test_a_value_of_the_oldest_form_is_brought_up_to_date(options: dict[str, Any]) -> None:
    """Beaker does it in the middle of a read, between releasing the read lock and taking it again."""
    manager = TCJSONNamespaceManager("ns", **options)
    manager["key"] = (1.0, "old")
    value = Value("key", manager, createfunc=lambda: "not called")
    assert [value.get_value() for _ in range(2)] == ["old", "old"]
    assert manager["key"] == (1.0, None, "old")


# Damage


def damage(cache: Cache, store: Store, key: str, data: bytes = b"[1]") -> bytes:
    """Let the cache have a damaged entry; answers its record key."""
    record: bytes = cache.namespace.records.record(key)
    store.put(record, data)
    return record


@pytest.mark.parametrize("data", [b"garbage", b"", b"[1]", b'{"_expires":"soon"}', b'{"_sealed":1}'])
def test_a_damaged_entry_is_made_anew(
    options: dict[str, Any],
    store: Store,
    data: bytes,
    caplog: pytest.LogCaptureFixture,
    counted: Counter[str],
) -> None:
    """Nobody can mend it, so an error would come with every request."""
    cache = beaker_cache({**options, "store_key": f"{STORE_KEY} plaintext"})
    key = "k" * 1000
    record = damage(cache, store, key, data)
    assert cache.get(key, createfunc=lambda: "made") == "made"
    assert cache.get(key) == "made"
    assert store.get(record) != data
    assert set(counted) == {"documents.damaged"}
    (said,) = caplog.messages
    assert f"the entry {record[:100].decode()} is damaged and counts as absent: the record" in said
    assert len(said) < 300


def test_a_damaged_entry_counts_as_absent(options: dict[str, Any], store: Store) -> None:
    cache = beaker_cache(options)
    record = damage(cache, store, "key")
    with pytest.raises(KeyError):
        cache.get("key")
    assert "key" not in cache
    assert store.get(record) == b"[1]"
    cache.put("key", "new")
    assert cache.get("key") == "new"


def test_a_damaged_entry_can_be_removed(options: dict[str, Any], store: Store) -> None:
    cache = beaker_cache(options)
    record = damage(cache, store, "key")
    cache.remove_value("key")
    assert store.get(record) is None


def test_an_entry_without_its_key_is_an_outage(options: dict[str, Any], store: Store) -> None:
    """A process that was given no key, or a wrong one, must not overwrite what the others have."""
    cache = beaker_cache({**options, "store_key": STORE_KEY})
    cache.put("key", "sealed")
    record = cache.namespace.records.record("key")
    sealed = store.get(record)
    with pytest.raises(StoreUnavailable, match="is sealed"):
        beaker_cache(options).get("key", createfunc=lambda: "not called")
    with pytest.raises(StoreUnavailable, match="is sealed"):
        beaker_cache(options).namespace[b"key"]
    assert store.get(record) == sealed


# Failures


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("state", ["missing", "stale", "fresh"])
def test_whatever_call_fails(state: str, executed: bool) -> None:
    """The answer is right or an error; and nothing is left behind that this process does not get over at once."""
    for n in itertools.count(1):
        store = FaultyStore(MemoryStore())
        cache = beaker_cache({"url": store})
        if state == "stale":
            stale(cache)
        elif state == "fresh":
            cache.put("key", "made")
        store.fail(n, executed=executed)
        try:
            assert cache.get("key", createfunc=lambda: "made") == "made"
        except StoreUnavailable:
            assert store.has_failed
        if not store.has_failed:
            return
        store.heal()
        with ThreadPoolExecutor(1) as threads:
            assert threads.submit(cache.get, "key", createfunc=lambda: "made").result(10) == "made"


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
