"""Leases: one holder at a time, whatever fails, stops or dies."""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from beaker_statestore import locks
from beaker_statestore.exceptions import ContentionError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.locks import PATIENCE, Lease
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore, ServerProcess, fork

#: A lease that ends while a test waits, and one that does not, in seconds.
SHORT = 0.4
LONG = 60.0
KEY = b"lock:test"

forking = multiprocessing.get_context("fork")


@pytest.fixture
def key(options: dict[str, Any]) -> bytes:
    prefix: str = options["prefix"]
    return prefix.encode() + KEY


def elsewhere(function: Callable[[], Any]) -> Any:
    """What ``function`` answers in another thread."""
    with ThreadPoolExecutor(1) as threads:
        return threads.submit(function).result(30)


@contextmanager
def holder(url: str, key: bytes, seconds: float) -> Iterator[SimpleNamespace]:
    """Another process that has the lock, until it is told to release it (``release``), and says so (``released``)."""
    held, release, released = (forking.Event() for _ in range(3))

    def hold() -> None:
        lease = Lease(open_store(url), key, seconds)
        assert lease.acquire()
        held.set()
        release.wait(30)
        lease.release()
        released.set()

    process = forking.Process(target=hold)
    process.start()
    try:
        assert held.wait(10)
        yield SimpleNamespace(pid=process.pid, release=release, released=released)
    finally:
        process.kill()
        process.join(10)


def test_one_has_it_at_a_time(store: Store, key: bytes) -> None:
    lease = Lease(store, key, LONG)
    assert lease.acquire()
    assert elsewhere(lambda: Lease(store, key, LONG).acquire(wait=False)) is False
    assert Lease(store, key + b"2", LONG).acquire(wait=False)
    lease.release()
    assert elsewhere(lambda: Lease(store, key, LONG).acquire(wait=False)) is True


def test_the_same_thread_may_take_it_again(store: Store, key: bytes) -> None:
    assert Lease(store, key, LONG).acquire()
    assert Lease(store, key, LONG).acquire(wait=False)
    Lease(store, key, LONG).release()
    assert store.get(key) is not None
    Lease(store, key, LONG).release()
    assert store.get(key) is None
    Lease(store, key, LONG).release()


def test_a_thread_cannot_release_what_another_has(store: Store, key: bytes) -> None:
    lease = Lease(store, key, LONG)
    lease.acquire()
    elsewhere(lease.release)
    assert store.get(key) is not None


def test_the_record_is_a_document_that_a_sweeper_can_clear(store: Store, key: bytes) -> None:
    tokens = set()
    for _ in range(2):
        lease = Lease(store, key, LONG)
        lease.acquire()
        document = json.loads(store.get(key) or b"")
        assert set(document) == {"token", "_expires"}
        assert document["_expires"] > time.time() + LONG + 3600
        tokens.add(document["token"])
        lease.release()
    assert len(tokens) == 2


def test_no_increment_is_lost_under_it(store: Store, key: bytes) -> None:
    total = [0]

    def increment() -> None:
        for _ in range(5):
            lease = Lease(store, key, LONG)
            assert lease.acquire()
            seen = total[0]
            time.sleep(0.001)
            total[0] = seen + 1
            lease.release()

    with ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(increment) for _ in range(8)]:
            done.result(30)
    assert total == [40]


def test_without_a_rival_it_takes_two_calls() -> None:
    store = FaultyStore(MemoryStore())
    lease = Lease(store, KEY, LONG)
    lease.acquire()
    lease.release()
    assert store.calls == ["compare_and_swap"] * 2


def test_one_thread_of_a_process_asks_for_all() -> None:
    store = FaultyStore(MemoryStore())
    lease = Lease(store, KEY, LONG)
    lease.acquire()

    def wait() -> None:
        lease.acquire()
        lease.release()

    with ThreadPoolExecutor(20) as threads:
        waiting = [threads.submit(wait) for _ in range(20)]
        wait_until(lambda: store.calls.count("compare_and_swap") == 21)
        locks._process.wake((store, KEY))  # one release is no reason to look for ever without a pause
        begun = time.monotonic()
        time.sleep(0.5)
        looks = store.calls.count("get") / (time.monotonic() - begun)
        lease.release()
        for done in waiting:
            done.result(30)
    # One looks every 25 to 50 ms, a little more often at first; twenty would do so 400 times a second and more.
    assert looks < 80


def test_a_released_lock_is_soon_had_by_a_waiting_process(tyrant_server: ServerProcess) -> None:
    waits = []
    for n in range(5):
        key = b"lock:soon%d" % n
        with holder(tyrant_server.url, key, LONG) as other:
            lease = Lease(open_store(tyrant_server.url), key, LONG)
            begun = time.monotonic()
            threading.Timer(0.2, other.release.set).start()
            assert lease.acquire()
            waits.append(time.monotonic() - begun - 0.2)
            lease.release()
    assert min(waits) >= 0
    assert sorted(waits)[2] < 0.15  # about 0.015; Beaker's own looks every 0.2


def test_within_a_process_a_release_ends_the_pause(store: Store, key: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "FIRST_PAUSE", 20.0)
    monkeypatch.setattr(locks, "LONGEST_PAUSE", 20.0)
    lease = Lease(store, key, LONG)
    lease.acquire()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(lease.acquire)
        wait_until(locks._process.contest((store, key), LONG).turn.locked)
        lease.release()
        assert waiting.result(5)


def test_a_crashed_holder_is_succeeded_after_its_lease_and_not_before(
    tyrant_server: ServerProcess, counted: Counter[str]
) -> None:
    key = b"lock:crash"
    lease = Lease(open_store(tyrant_server.url), key, SHORT)
    with holder(tyrant_server.url, key, SHORT) as other:
        os.kill(other.pid, signal.SIGKILL)
        begun = time.monotonic()
        assert lease.acquire()
        assert SHORT <= time.monotonic() - begun < SHORT + 5
        assert counted == {"locks.taken_over": 1}
    lease.release()


def test_who_does_not_wait_succeeds_a_crashed_holder_too(store: Store, key: bytes) -> None:
    """Beaker waits for no lock while it has a stale value to serve, so nobody else would succeed the holder."""
    store.put(key, b"a crashed holder's")
    lease = Lease(store, key, SHORT)
    begun = time.monotonic()
    wait_until(lambda: lease.acquire(wait=False))
    assert SHORT <= time.monotonic() - begun < SHORT + 5


def test_a_lock_that_changes_hands_is_not_taken_over(store: Store, key: bytes) -> None:
    lease = Lease(store, key, SHORT)
    deadline = time.monotonic() + 2.5 * SHORT
    for n in itertools.count():
        store.put(key, b"holder %d's" % n)
        assert not lease.acquire(wait=False)
        time.sleep(SHORT / 4)
        if time.monotonic() > deadline:
            return


def test_a_holder_that_was_stopped_leaves_its_successors_lock_alone(tyrant_server: ServerProcess) -> None:
    key = b"lock:stop"
    store = open_store(tyrant_server.url)
    lease = Lease(store, key, SHORT)
    with holder(tyrant_server.url, key, SHORT) as other:
        os.kill(other.pid, signal.SIGSTOP)
        assert lease.acquire()
        mine = store.get(key)
        os.kill(other.pid, signal.SIGCONT)
        other.release.set()
        assert other.released.wait(10)
    assert store.get(key) == mine
    lease.release()
    assert store.get(key) is None


def test_a_lock_that_was_lost_is_counted(store: Store, key: bytes, counted: Counter[str]) -> None:
    lease = Lease(store, key, LONG)
    lease.acquire()
    store.put(key, b"somebody else's")
    lease.release()
    assert store.get(key) == b"somebody else's"
    assert counted == {"locks.lost": 1}


class HandedOn(FaultyStore):
    """A store in which the lock has another holder whenever somebody looks."""

    def get(self, key: bytes) -> bytes | None:
        self.store.put(key, b"holder %d's" % next(_numbers))
        return super().get(key)


_numbers = itertools.count()


def test_waiting_ends(store: Store, key: bytes) -> None:
    """Also for the threads behind the one that looks."""
    store.put(key, b"somebody's")
    others = HandedOn(store)
    with ThreadPoolExecutor(3) as threads:
        begun = time.monotonic()
        for waiting in [threads.submit(Lease(others, key, SHORT / 2).acquire) for _ in range(3)]:
            with pytest.raises(ContentionError, match=r"others had the lock test\d+\.lock:test for all of the 0\.6 s"):
                waiting.result(10)
        assert SHORT / 2 * PATIENCE <= time.monotonic() - begun < SHORT / 2 * PATIENCE + 5


def test_clocks_that_jump_do_not_matter(store: Store, key: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    jumps = itertools.cycle([0.0, 4e9, 86400.0 * 365])
    clock = SimpleNamespace(time=lambda: next(jumps), monotonic=time.monotonic)
    monkeypatch.setattr(locks, "time", clock)
    lease = Lease(store, key, SHORT)
    assert lease.acquire()
    begun = time.monotonic()
    assert not elsewhere(lambda: Lease(store, key, SHORT).acquire(wait=False))
    assert elsewhere(lambda: Lease(store, key, SHORT).acquire())
    assert SHORT <= time.monotonic() - begun < SHORT + 5
    lease.release()
    assert store.get(key) is not None


def test_a_child_has_none_of_its_parents_locks(store: Store, key: bytes) -> None:
    lease = Lease(store, key, LONG)
    lease.acquire()
    mine = store.get(key)

    def in_child() -> bool:
        lease.release()
        return store.get(key) == mine and not lease.acquire(wait=False)

    assert fork(in_child)
    lease.release()
    assert store.get(key) is None


def test_a_child_waits_for_no_thread_of_its_parent(store: Store, key: bytes) -> None:
    lease = Lease(store, key, LONG)
    lease.acquire()

    def wait() -> None:
        lease.acquire()
        lease.release()

    waiting = threading.Thread(target=wait)
    waiting.start()
    contest = locks._process.contest((store, key), LONG)
    wait_until(contest.turn.locked)

    def in_child() -> bool:
        store.delete(key)
        return Lease(store, key, LONG).acquire()

    try:
        assert fork(in_child)
    finally:
        store.delete(key)
        waiting.join(10)
    assert not waiting.is_alive()


# Holds that are never released: Beaker's "try" begins behind its "acquire", and an exception can come in between


def test_a_hold_is_not_believed_in_beyond_its_lease(store: Store, key: bytes) -> None:
    """Others may have the lock by then."""
    lease = Lease(store, key, SHORT)
    assert lease.acquire()
    store.put(key, b"somebody else's")
    assert lease.acquire(wait=False)
    wait_until(lambda: not lease.acquire(wait=False))
    assert store.get(key) == b"somebody else's"
    lease.release()
    assert store.get(key) == b"somebody else's"


def test_a_forgotten_hold_ends_with_the_next_one(store: Store, key: bytes) -> None:
    lease = Lease(store, key, SHORT)
    assert lease.acquire()
    forgotten = store.get(key)
    time.sleep(SHORT)
    assert lease.acquire(wait=False)
    mine = store.get(key)
    # A new token: others who watch have to wait for a lease of their own.
    assert mine != forgotten
    assert lease.acquire(wait=False)
    assert store.get(key) == mine
    lease.release()
    lease.release()
    assert store.get(key) is None


def test_the_lease_of_a_hold_begins_when_it_was_taken(store: Store, key: bytes) -> None:
    """However long it was waited for."""
    store.put(key, b"a crashed holder's")
    lease = Lease(store, key, SHORT)
    assert lease.acquire()
    mine = store.get(key)
    assert lease.acquire(wait=False)
    assert store.get(key) == mine
    lease.release()
    assert store.get(key) == mine


# Failures


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("before", ["free", "dead", "held", "forgotten"])
def test_whatever_call_fails(executed: bool, for_good: bool, before: str) -> None:
    """There is one holder or an error, and the lock can be had again, at the latest after the lease."""
    for n in itertools.count(1):
        store = FaultyStore(MemoryStore())
        lease = Lease(store, KEY, 0.02)
        if before in ("dead", "held"):
            store.store.put(KEY, b"a holder's")
            assert not lease.acquire(wait=False)
        if before == "forgotten":
            assert lease.acquire()
        if before in ("dead", "forgotten"):
            time.sleep(0.02)
        store.fail(n, executed=executed, for_good=for_good)
        acquired = False
        try:
            acquired = lease.acquire()
            assert acquired
            assert b"token" in (store.store.get(KEY) or b"")
        except ContentionError:
            raise
        except StoreUnavailable:
            assert store.has_failed
        lease.release()
        has_failed = store.has_failed
        if not has_failed:
            assert store.store.get(KEY) is None
            return
        store.heal()
        # Another process: it knows nothing of what happened here.
        begun = time.monotonic()
        assert fork(Lease(store, KEY, 0.02).acquire)
        assert time.monotonic() - begun < 5
        # This one knows what it has left behind.
        if acquired or before == "free":
            assert elsewhere(partial(Lease(store, KEY, LONG).acquire, wait=False))


def test_a_release_that_fails_is_told_and_does_no_harm(caplog: pytest.LogCaptureFixture, counted: Counter[str]) -> None:
    """What was made under the lock is made, and Beaker is about to return it."""
    store = FaultyStore(MemoryStore())
    lease = Lease(store, KEY, LONG)
    lease.acquire()
    store.fail(1)
    with caplog.at_level(logging.WARNING):
        lease.release()
    assert "the lock lock:test could not be released and stands for up to 60 s more" in caplog.text
    assert counted == {"locks.release_failed": 1}
    assert store.get(KEY) is not None
    assert elsewhere(lambda: Lease(store, KEY, LONG).acquire(wait=False))


def test_failures_do_not_make_a_watch_begin_anew(counted: Counter[str]) -> None:
    store = FaultyStore(MemoryStore())
    store.put(KEY, b"a crashed holder's")
    lease = Lease(store, KEY, SHORT)
    assert not lease.acquire(wait=False)
    begun = time.monotonic()
    while time.monotonic() - begun < SHORT:
        store.fail(1)
        with pytest.raises(StoreUnavailable):
            lease.acquire(wait=False)
    assert lease.acquire(wait=False)
    assert "locks.taken_over" in counted
    assert len(locks._process.contest((store, KEY), SHORT)._abandoned) <= locks.MAX_ABANDONED


def test_an_answer_that_was_lost_costs_nothing(counted: Counter[str]) -> None:
    store = FaultyStore(MemoryStore())
    lease = Lease(store, KEY, LONG)
    store.fail(1, executed=True)
    assert lease.acquire(wait=False)
    store.fail(1, executed=True)
    lease.release()
    assert store.get(KEY) is None
    assert counted == {"locks.outcome_unknown": 2}


def test_a_release_is_repeated_when_it_may_not_have_been_carried_out(counted: Counter[str]) -> None:
    class Losing(MemoryStore):
        lost = 0

        def compare_and_swap(
            self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
        ) -> bool:
            if new is None and not self.lost:
                self.lost += 1
                raise OutcomeUnknown("the connection broke, maybe before the request arrived")
            return super().compare_and_swap(key, expected, new, expires_at)

    store = Losing()
    lease = Lease(store, KEY, LONG)
    lease.acquire()
    lease.release()
    assert store.lost
    assert store.get(KEY) is None
    assert counted == {"locks.outcome_unknown": 1}


class Late(MemoryStore):
    """A server that hung, and carries the first swap out after we have looked for what came of it: upon `due`."""

    late: tuple[Any, ...] | None = None
    looks = 0

    def compare_and_swap(self, *arguments: Any) -> bool:
        if self.late is None:
            self.late = arguments
            raise OutcomeUnknown("no answer in time")
        return super().compare_and_swap(*arguments)

    def get(self, key: bytes) -> bytes | None:
        self.looks += 1
        if self.looks == 2:
            self.second_look()
        return super().get(key)

    def due(self) -> None:
        assert self.late is not None
        assert super().compare_and_swap(*self.late)

    second_look = due


def test_a_request_that_is_carried_out_late_is_recognised() -> None:
    store = Late()
    lease = Lease(store, KEY, LONG)
    assert lease.acquire(wait=False)
    lease.release()
    assert store.get(KEY) is None


class TimeOut(BaseException):
    """As gevent's and eventlet's."""


@pytest.mark.parametrize("failure", [StoreUnavailable, TimeOut])
def test_it_is_recognised_even_when_the_attempt_has_been_given_up(failure: type[BaseException]) -> None:
    """Whoever tries next finds a lock of this process that no thread has, and need not wait for its end."""

    class Down(Late):
        def second_look(self) -> None:
            raise failure("down")

    store = Down()
    lease = Lease(store, KEY, LONG)
    with pytest.raises(failure, match="down"):
        lease.acquire()
    locks._process.contest((store, KEY), LONG).abandon(b"of a later attempt, which was never carried out")
    store.due()
    assert elsewhere(partial(Lease(store, KEY, LONG).acquire, wait=False))


def test_a_store_that_hangs_keeps_no_queue() -> None:
    """Each waiting thread would else meet a time-out of its own, one after the other."""

    class Hanging(MemoryStore):
        hangs = threading.Event()

        def get(self, key: bytes) -> bytes | None:
            if self.hangs.is_set():
                time.sleep(1)
                raise StoreUnavailable("no answer in time")
            return super().get(key)

    store = Hanging()
    store.put(KEY, b"a holder's")
    with ThreadPoolExecutor(10) as threads:
        waiting = [threads.submit(Lease(store, KEY, LONG).acquire) for _ in range(10)]
        contest = locks._process.contest((store, KEY), LONG)
        wait_until(contest.turn.locked)
        begun = time.monotonic()
        store.hangs.set()
        for one in waiting:
            with pytest.raises(StoreUnavailable, match="no answer in time"):
                one.result(10)
        assert time.monotonic() - begun < 5


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[Lease]:
    """Locks whose holders have died, more of them than a process remembers for good."""
    monkeypatch.setattr(locks, "MAX_CONTESTS", 3)
    monkeypatch.setattr(locks, "_process", locks._Process())
    store = MemoryStore()
    for n in range(10):
        store.put(b"%d" % n, b"a holder's")
    return [Lease(store, b"%d" % n, SHORT) for n in range(10)]


def test_many_locks_of_dead_holders_are_all_taken_over(few: list[Lease]) -> None:
    """Each look at one must not make the process forget another that it watches."""
    begun = time.monotonic()
    wait_until(lambda: sum(lease.acquire(wait=False) for lease in few) == len(few))
    assert SHORT <= time.monotonic() - begun < SHORT + 5


def test_a_process_does_not_remember_every_lock_there_ever_was(few: list[Lease]) -> None:
    for lease in few[:9]:
        assert not lease.acquire(wait=False)
    assert len(locks._process._contests) == 9
    time.sleep(SHORT)
    assert not few[9].acquire(wait=False)
    assert list(locks._process._contests) == [lease._place for lease in few[7:]]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class Stalled(FaultyStore):
    """A store that answers no swap in time, and carries them out when it is told to."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.late: list[tuple[Any, ...]] = []

    def compare_and_swap(self, *arguments: Any) -> bool:
        self.late.append(arguments)
        raise OutcomeUnknown("no answer in time")


def test_an_attempt_that_is_carried_out_after_it_was_given_up_costs_nobody_a_lease() -> None:
    store = MemoryStore()
    stalled = Stalled(store)
    lease = Lease(stalled, KEY, LONG)
    assert not lease.acquire(wait=False)
    assert store.compare_and_swap(*stalled.late[-1])
    stalled.compare_and_swap = store.compare_and_swap  # type: ignore[method-assign]
    assert lease.acquire(wait=False)
