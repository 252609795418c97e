"""Fan-out queues: every consumer gets every message, in order, at least once, whatever fails."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import simplejson
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from beaker_statestore import consumers, queuelog
from beaker_statestore.cli import main
from beaker_statestore.collection import Collection
from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentDamagedError,
    DocumentRefusedError,
    OutcomeUnknown,
    QueueFullError,
    StoreUnavailable,
)
from beaker_statestore.fanout import Consumer, Follower, LeaseLost, Message, Queue
from beaker_statestore.queuerecords import Cursor, Enrolment, Head
from beaker_statestore.sealing import StoreKeyError
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore, ServerProcess, fork
from tests.faults.servers import eventually

_names = itertools.count(1)
#: How long a test waits for what has to come, in seconds.
PATIENCE = 20.0


@pytest.fixture(params=["memory", "tyrant", "lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "tyrant":
        yield open_store(request.getfixturevalue("tyrant_server").url)
        return
    with MemoryStore() if request.param == "memory" else open_store(f"lmdb://{tmp_path}/state.lmdb") as opened:
        yield opened


@pytest.fixture
def name() -> str:
    return f"queue{next(_names)}"


@pytest.fixture
def queue(store: Store, name: str) -> Queue:
    return Queue(store, name)


def records(queue: Queue) -> Collection:
    return Collection(queue._log.documents.settings, "queue", queue.name)


def received(consumer: Consumer, count: int) -> list[Message]:
    """The next messages, each acknowledged."""
    messages = []
    for _ in range(count):
        message = consumer.receive(PATIENCE)
        assert message is not None
        consumer.acknowledge(message)
        messages.append(message)
    return messages


def bodies(messages: list[Message]) -> list[Any]:
    return [message.body for message in messages]


@pytest.fixture
def local(name: str) -> Queue:
    """For what has to do with time, and nothing with the store."""
    return Queue(MemoryStore(), name)


# -- what it is for


def test_every_consumer_gets_every_message_in_order(queue: Queue) -> None:
    both = [queue.consumer(name) for name in ("mailer", "index")]
    sent = [{"n": n, "text": "ä"} for n in range(30)]
    assert [queue.push(body) for body in sent] == list(range(1, 31))
    for consumer in both:
        assert bodies(received(consumer, 30)) == sent
        assert consumer.receive(0) is None


@pytest.mark.parametrize("body", [None, False, 0, "", "text", [1, [2]], {}, {"body": {"token": 1}}])
def test_a_body_is_any_json_value(queue: Queue, body: Any) -> None:
    consumer = queue.consumer("a")
    queue.push(body)
    (message,) = received(consumer, 1)
    assert message.body == body
    assert type(message.body) is type(body)


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(queue: Queue) -> None:
    with pytest.raises(DocumentRefusedError, match=r"message\['body'\]\['when'\]"):
        queue.push({"when": object()})
    assert queue.report().end == 1


def test_what_is_too_large_is_refused(store: Store, name: str) -> None:
    queue = Queue(store, name, max_value=2000)
    consumer = queue.consumer("a", retries=0)
    with pytest.raises(DocumentRefusedError):
        queue.push("x" * 2000)
    queue.push("x" * 1900)
    message = consumer.receive(0)
    assert message is not None
    consumer.retry(message, "ä" * 2000)  # which makes a dead letter that is larger than the limit
    assert consumer.receive(0) is None
    assert [letter.body for letter in queue.dead_letters("a")] == ["x" * 1900]


def test_messages_and_cursors_are_encrypted(store: Store, name: str) -> None:
    queue = Queue(store, name, store_key="k" * 40)
    consumer = queue.consumer("a")
    queue.push("secret text")
    assert bodies(received(consumer, 1)) == ["secret text"]
    prefix = queue._log.documents.records.scan_prefix
    values = store.get_many(list(store.keys(prefix))).values()
    assert values
    assert all(b"secret text" not in value and b"_sealed" in value for value in values)


@pytest.mark.parametrize("wrong", ["", "a:b", "a b", "ä", "x" * 65, "a/b"])
def test_names_are_checked(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match="cannot name a queue"):
        Queue("memory:", wrong)
    with pytest.raises(ConfigurationError, match="cannot name a consumer"):
        Queue("memory:", "good").consumer(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda queue, number: Queue(queue._log.store, "q", limit=number),
        lambda queue, number: queue.trim(keep=number),
        lambda queue, number: queue.trim(before=number),
        lambda queue, number: queue.consumer("b", start=number),
        lambda queue, number: queue.consumer("b", retries=number),
        lambda queue, number: queue.consumer("b", prefetch=number),
        lambda queue, number: queue.follow(number),
        lambda queue, number: queue.redeliver("a", number),
        lambda queue, number: queue.dead_letters("a").get(number),
    ],
)
def test_a_number_that_is_none_is_refused_and_not_stored(local: Queue, wrong: Callable[[Queue, Any], object]) -> None:
    local.consumer("a")
    local.push(1)
    for number in (True, 5.0, -1, "5"):
        with pytest.raises(ConfigurationError):
            wrong(local, number)
    assert local.push(2) == 2
    assert [consumer.name for consumer in local.report().consumers] == ["a"]


def test_nothing_is_written_that_could_not_be_read() -> None:
    for wrong in (Head(floor=5.0), Head(consumers={"a": Enrolment(True, "")})):  # type: ignore[arg-type]
        with pytest.raises(DocumentDamagedError):
            assert wrong.document
    for cursor in (Cursor(1.0), Cursor(1, again=[True]), Cursor(1, error=5)):  # type: ignore[arg-type]
        with pytest.raises(DocumentDamagedError):
            assert cursor.document


@pytest.mark.parametrize("start", ["now", "beginning", 3])
def test_a_new_consumer_starts_where_it_wants_to(queue: Queue, start: Any) -> None:
    for n in range(1, 6):
        queue.push(n)
    first = {"now": 6, "beginning": 1, 3: 3}[start]
    consumer = queue.consumer("late", start=start)
    queue.push(6)
    assert [message.number for message in received(consumer, 7 - first)] == list(range(first, 7))


def test_a_known_consumer_goes_on_where_it_was_whatever_start_says(queue: Queue) -> None:
    with queue.consumer("a") as consumer:
        for n in range(4):
            queue.push(n)
        received(consumer, 2)
        assert consumer.receive(0) is not None  # and not acknowledged
    with queue.consumer("a", start="now") as consumer:
        assert bodies(received(consumer, 2)) == [2, 3]


def test_to_acknowledge_is_to_acknowledge_all_before(queue: Queue) -> None:
    with queue.consumer("a") as consumer:
        for n in range(5):
            queue.push(n)
        messages = [consumer.receive(0) for _ in range(4)]
        assert messages[2] is not None
        assert messages[0] is not None
        consumer.acknowledge(messages[2])
        consumer.acknowledge(messages[0])  # takes nothing back
        assert bodies(received(consumer, 1)) == [4]
    assert queue.report().consumers[0].next == 6


def test_waiting_ends_when_a_message_comes_and_when_it_is_stopped(
    local: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "SLICE", 0.1)
    consumer = local.consumer("a")
    got: list[Any] = []

    def consume() -> None:
        for message in consumer:
            got.append(message.body)
            consumer.acknowledge(message)

    thread = threading.Thread(target=consume)
    thread.start()
    for n in range(3):
        local.push(n)
        eventually(lambda n=n: len(got) == n + 1, "the message")  # type: ignore[misc]
    consumer.close()
    thread.join(PATIENCE)
    assert not thread.is_alive()
    assert got == [0, 1, 2]
    assert not local.report().consumers[0].held


# -- retries and dead letters


def test_what_failed_comes_again_later_and_nothing_before_it(queue: Queue) -> None:
    consumer = queue.consumer("a", backoff=0.05)
    for n in range(3):
        queue.push(n)
    first = consumer.receive(0)
    assert first is not None
    assert consumer.receive(0) is not None  # read ahead, and given back
    for attempt in (2, 3):
        consumer.retry(first, ValueError("no"))
        assert consumer.receive(0) is None
        first = consumer.receive(PATIENCE)
        assert first is not None
        assert (first.body, first.attempt) == (0, attempt)
    assert queue.report().consumers[0].error == "ValueError: no"
    consumer.acknowledge(first)
    assert [message.attempt for message in received(consumer, 2)] == [1, 1]
    assert queue.report().consumers[0].tries == 0


def test_to_retry_one_is_to_acknowledge_those_before(queue: Queue) -> None:
    consumer = queue.consumer("a", backoff=0.01)
    for n in range(3):
        queue.push(n)
    messages = [consumer.receive(0) for _ in range(3)]
    assert messages[1] is not None
    consumer.retry(messages[1], "no")
    assert bodies(received(consumer, 2)) == [1, 2]


def test_what_fails_too_often_becomes_a_dead_letter(queue: Queue, counted: Counter[str]) -> None:
    consumer = queue.consumer("a", retries=2, backoff=0.01)
    queue.consumer("b")
    queue.push({"bad": True})
    queue.push("good")
    for _ in range(3):
        message = consumer.receive(PATIENCE)
        assert message is not None
        assert message.number == 1
        consumer.retry(message, ValueError("bad"))
    assert bodies(received(consumer, 1)) == ["good"]
    (letter,) = queue.dead_letters("a")
    assert (letter.number, letter.body, letter.error, letter.tries) == (1, {"bad": True}, "ValueError: bad", 3)
    assert list(queue.dead_letters("b")) == []
    assert counted["fanout.dead_letters"] == 1
    assert {c.name: c.dead for c in queue.report().consumers} == {"a": 1, "b": 0}


def test_the_end_is_found_in_one_round_trip_by_whoever_has_seen_it_lately() -> None:
    store = FaultyStore(MemoryStore())
    queue, others = Queue(store, "q"), Queue(store, "q")
    others.push(1)
    assert queue.follow("now").position == 2
    for pushed in (1, 40, 60):
        end = max(others.push(number) for number in range(pushed)) + 1
        store.calls.clear()
        assert queue.follow("now").position == end
        assert (store.calls == ["get_many"]) == (pushed < 47)


def test_an_error_that_ends_the_block_counts_and_no_message_can_kill_worker_after_worker(queue: Queue) -> None:
    queue.push("bad")
    queue.push("good")

    def work() -> None:
        with queue.consumer("a", start="beginning", retries=2, backoff=0.01) as consumer:
            for message in consumer:
                if message.body == "bad":
                    raise ValueError("bad")
                consumer.acknowledge(message)
                return

    for _ in range(3):
        with pytest.raises(ValueError, match="bad"):
            work()
    work()
    assert [(letter.body, letter.error, letter.tries) for letter in queue.dead_letters("a")] == [
        ("bad", "ValueError: bad", 3)
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), StoreUnavailable("away")])
def test_what_ends_the_block_and_is_no_messages_fault_does_not_count(queue: Queue, error: BaseException) -> None:
    queue.push("good")

    def work() -> None:
        with queue.consumer("a", start="beginning", retries=0) as consumer:
            assert consumer.receive(PATIENCE) is not None
            raise error

    for _ in range(2):
        with pytest.raises(type(error)):
            work()
    assert list(queue.dead_letters("a")) == []
    with queue.consumer("a") as consumer:
        assert bodies(received(consumer, 1)) == ["good"]


class SpeechlessError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("no such user \ud800"), "ValueError: no such user \\ud800"),
        (SpeechlessError(), "SpeechlessError: (it cannot be told)"),
        ("x" * 5000, "x" * 1000),
    ],
)
def test_whatever_an_error_says_the_message_ends_as_a_dead_letter(queue: Queue, error: object, told: str) -> None:
    consumer = queue.consumer("a", retries=0)
    queue.push("bad")
    queue.push("good")
    message = consumer.receive(PATIENCE)
    assert message is not None
    consumer.retry(message, error)
    assert bodies(received(consumer, 1)) == ["good"]
    assert [letter.error for letter in queue.dead_letters("a")] == [told]


def test_what_is_given_up_is_a_dead_letter_at_once_and_what_comes_next_is_delivered(queue: Queue) -> None:
    consumer = queue.consumer("a")
    queue.push("hopeless")
    queue.push("good")
    hopeless, good = (consumer.receive(PATIENCE) for _ in range(2))
    assert hopeless is not None
    assert good is not None
    consumer.give_up(hopeless, "no such method")
    assert bodies(received(consumer, 1)) == ["good"]
    (letter,) = queue.dead_letters("a")
    assert (letter.number, letter.body, letter.error, letter.tries) == (1, "hopeless", "no such method", 1)
    queue.redeliver("a", 1)
    again = consumer.receive(PATIENCE)
    assert again is not None
    consumer.give_up(again, "still none")
    (letter,) = queue.dead_letters("a")
    assert (letter.error, letter.tries) == ("still none", 2)


def test_who_has_lost_the_lease_can_give_nothing_up(queue: Queue) -> None:
    first = queue.consumer("a")
    queue.push("task")
    message = first.receive(PATIENCE)
    assert message is not None
    first.close()
    with queue.consumer("a") as second:
        assert second.receive(PATIENCE) == message
        with pytest.raises(LeaseLost):
            first.give_up(message, "hopeless")
    assert list(queue.dead_letters("a")) == []


def test_an_outage_is_not_the_messages_fault(queue: Queue) -> None:
    consumer = queue.consumer("a", retries=0, backoff=0.01)
    queue.push(1)
    for _ in range(3):
        message = consumer.receive(PATIENCE)
        assert message is not None
        consumer.retry(message, StoreUnavailable("elsewhere"))
    assert list(queue.dead_letters("a")) == []
    assert bodies(received(consumer, 1)) == [1]


def test_a_dead_letter_is_delivered_once_more_if_asked_for(queue: Queue) -> None:
    with queue.consumer("a", retries=0) as consumer:
        for n in range(3):
            queue.push(n)
        for _ in range(2):
            message = consumer.receive(0)
            assert message is not None
            consumer.retry(message, "no")
        received(consumer, 1)
    assert queue.redeliver("a", 1)
    assert queue.redeliver("a", 2)
    assert not queue.redeliver("a", 3)
    with queue.consumer("a") as consumer:
        again = [consumer.receive(0), consumer.receive(0)]
        assert again[0] is not None
        assert again[1] is not None
        assert [(m.number, m.body, m.redelivered, m.attempt) for m in again if m] == [(1, 0, True, 2), (2, 1, True, 2)]
        consumer.acknowledge(again[0])
        consumer.retry(again[1], "still no")
        assert consumer.receive(0) is None
    (letter,) = queue.dead_letters("a")
    assert (letter.number, letter.error, letter.tries) == (2, "still no", 2)
    assert queue.dead_letters("a").discard(2)
    assert not queue.dead_letters("a").discard(2)


def test_a_dead_letter_soon_reaches_one_who_holds_the_lease_already(
    local: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "SLICE", 0.05)
    consumer = local.consumer("a", retries=0, lease=600.0)
    local.push(1)
    message = consumer.receive(0)
    assert message is not None
    consumer.retry(message, "no")
    assert consumer.receive(0) is None
    meanwhile = threading.Timer(0.1, local.redeliver, ["a", 1])
    began = time.monotonic()
    meanwhile.start()
    again = consumer.receive(PATIENCE)
    meanwhile.join()
    assert time.monotonic() - began < PATIENCE / 2  # at the end it would look once more
    assert again is not None
    assert again.redelivered


def test_a_damaged_dead_letter_is_shown_as_one_and_not_delivered(local: Queue) -> None:
    consumer = local.consumer("a", retries=0)
    for n in range(3):
        local.push(n)
    for _ in range(3):
        message = consumer.receive(0)
        assert message is not None
        consumer.retry(message, "no")
    assert consumer.receive(0) is None
    local.redeliver("a", 1)
    for number in (1, 2):
        records(local).put(f"dead=a={number:016d}", {"number": "x"})
    assert [(letter.number, letter.damaged) for letter in local.dead_letters("a")] == [
        (1, True),
        (2, True),
        (3, False),
    ]
    assert consumer.receive(0) is None
    assert not local.redeliver("a", 2)


class Unlistable(FaultyStore):
    """As a ttserver with a hash database."""

    def scan(self, *_: Any) -> Any:
        raise ConfigurationError("its keys cannot be listed")


def test_a_store_that_cannot_list_its_keys_takes_dead_letters(name: str) -> None:
    queue = Queue(Unlistable(MemoryStore()), name)
    consumer = queue.consumer("a", retries=0)
    queue.push("bad")
    queue.push("good")
    message = consumer.receive(0)
    assert message is not None
    consumer.retry(message, "no")
    assert bodies(received(consumer, 1)) == ["good"]
    letter = queue.dead_letters("a").get(1)
    assert letter is not None
    assert letter.body == "bad"


def test_too_many_dead_letters_stop_a_consumer(local: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(consumers, "MAX_DEAD", 2)
    consumer = local.consumer("a", retries=0, longest_backoff=0.01)
    for n in range(4):
        local.push(n)
    for _ in range(3):
        message = consumer.receive(PATIENCE)
        assert message is not None
        consumer.retry(message, "no")
    assert consumer.receive(0) is None
    assert local.report().consumers[0].dead == 2
    assert local.dead_letters("a").discard(1)
    assert bodies(received(consumer, 1)) == [3]
    assert local.report().consumers[0].dead == 2


def test_what_a_later_one_has_acknowledged_is_not_retried(local: Queue) -> None:
    consumer = local.consumer("a", retries=0)
    for n in range(3):
        local.push(n)
    first, second = consumer.receive(0), consumer.receive(0)
    assert first is not None
    assert second is not None
    consumer.acknowledge(second)
    consumer.retry(first, "too late")
    consumer.give_up(first, "too late")
    assert [(message.body, message.attempt) for message in received(consumer, 1)] == [(2, 1)]
    assert list(local.dead_letters("a")) == []


def test_one_object_runs_in_one_thread(local: Queue) -> None:
    consumer = local.consumer("a")
    local.push(1)

    def handle(message: Message) -> None:
        with pytest.raises(ConfigurationError, match="runs already"):
            consumer.run(print)
        consumer.stop()

    consumer.run(handle)
    assert local.report().consumers[0].next == 2


def test_run_acknowledges_what_was_handled_and_retries_what_was_not(queue: Queue) -> None:
    consumer = queue.consumer("a", retries=1, backoff=0.01)
    for body in ("good", "bad", "last"):
        queue.push(body)
    handled = []

    def handle(message: Message) -> None:
        handled.append(message.body)
        if message.body == "last":
            consumer.stop()
        if message.body == "bad":
            raise ValueError(message.body)

    consumer.run(handle)
    assert handled == ["good", "bad", "bad", "last"]
    report = queue.report().consumers[0]
    assert (report.next, report.dead) == (4, 1)


# -- one name, several processes


def test_of_several_under_one_name_one_gets_the_messages(queue: Queue) -> None:
    one, other = queue.consumer("a"), queue.consumer("a")
    for n in range(3):
        queue.push(n)
    received(one, 1)
    assert other.receive(0.05) is None
    one.close()
    assert bodies(received(other, 2)) == [1, 2]


def test_one_that_is_silent_is_relieved_and_can_move_nothing_any_more(local: Queue, counted: Counter[str]) -> None:
    one, other = local.consumer("a", lease=0.2, backoff=0.01), local.consumer("a", lease=0.2, backoff=0.01)
    for n in range(3):
        local.push(n)
    slow = one.receive(0)
    assert slow is not None
    began = time.monotonic()
    taken = other.receive(PATIENCE)
    assert taken is not None
    assert time.monotonic() - began >= 0.2
    assert (taken.number, taken.attempt) == (1, 2)
    assert counted["fanout.taken_over"] == 1
    with pytest.raises(LeaseLost):
        one.acknowledge(slow)
    with pytest.raises(LeaseLost):
        one.extend()
    assert local.report().consumers[0].next == 1
    other.acknowledge(taken)
    other.close()
    assert bodies(received(one, 2)) == [1, 2]
    with pytest.raises(LeaseLost):  # it has a lease, and not the one under which this was delivered
        one.acknowledge(slow)


def test_one_that_says_so_may_take_longer_than_its_lease(local: Queue) -> None:
    one, other = local.consumer("a", lease=0.2), local.consumer("a", lease=0.2)
    local.push(1)
    message = one.receive(0)
    assert message is not None
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        one.extend()
        assert other.receive(0.02) is None
    one.acknowledge(message)


def test_one_that_waits_keeps_its_lease(local: Queue) -> None:
    one, other = local.consumer("a", lease=0.2), local.consumer("a", lease=0.2)
    assert one.receive(0) is None
    waiting = threading.Thread(target=one.receive, args=(0.5,))
    waiting.start()
    while waiting.is_alive():
        assert other.receive(0.02) is None
        assert local.report().consumers[0].held
    waiting.join(PATIENCE)


KILLED = """
import os, sys
from beaker_statestore.fanout import Queue
consumer = Queue(sys.argv[1], sys.argv[2]).consumer("a", lease=0.3)
print(consumer.receive(20).attempt, flush=True)
sys.stdin.read()
"""


def test_a_message_that_kills_its_consumers_ends_in_the_dead_letters(tyrant_server: ServerProcess, name: str) -> None:
    queue = Queue(tyrant_server.url, name)
    survivor = queue.consumer("a", lease=0.3, retries=0, backoff=0.01)
    queue.push("deadly")
    queue.push("harmless")
    command = [sys.executable, "-c", KILLED, tyrant_server.url, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"1\n"
        assert survivor.receive(0.1) is None
        child.kill()
    assert bodies(received(survivor, 1)) == ["harmless"]
    (letter,) = queue.dead_letters("a")
    assert (letter.body, letter.tries) == ("deadly", 1)
    assert "the process ended" in letter.error


def test_one_that_died_idle_is_no_messages_fault(local: Queue) -> None:
    one = local.consumer("a", lease=0.2)
    assert one.receive(0) is None
    other = local.consumer("a", lease=0.2)
    eventually(lambda: other.receive(0.05) is None and other._holding is not None, "it takes over")
    local.push(1)
    assert [message.attempt for message in received(other, 1)] == [1]


def test_a_forked_child_does_not_have_its_parents_lease_nor_its_locks(local: Queue) -> None:
    consumer = local.consumer("a")
    local.push(1)
    message = consumer.receive(0)
    assert message is not None

    def in_child() -> str:
        try:
            consumer.acknowledge(message)
        except LeaseLost:
            consumer.close()  # the lock is held by a thread that is not here
            return "lost"
        return "kept"

    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with consumer._lock:
            held.set()
            done.wait(PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE)
    try:
        assert fork(in_child) == "lost"
    finally:
        done.set()
        thread.join(PATIENCE)
    consumer.acknowledge(message)


def test_one_that_stands_by_notices_soon_that_the_lease_was_given_up(
    local: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consumers, "SLICE", 0.05)
    one, other = local.consumer("a", lease=600.0), local.consumer("a", lease=600.0)
    local.push(1)
    assert one.receive(0) is not None
    assert other.receive(0) is None
    closing = threading.Timer(0.1, one.close)
    closing.start()
    assert other.receive(PATIENCE) is not None
    closing.join()


def test_the_length_of_the_holders_lease_counts(local: Queue) -> None:
    one, other = local.consumer("a", lease=600.0), local.consumer("a", lease=0.05)
    local.push(1)
    message = one.receive(0)
    assert message is not None
    assert other.receive(0.15) is None
    one.acknowledge(message)


def test_an_outage_is_not_the_holders_silence(name: str) -> None:
    store = FaultyStore(MemoryStore())
    queue = Queue(store, name)
    one, other = queue.consumer("a", lease=0.1, backoff=0.01), queue.consumer("a", lease=0.1, backoff=0.01)
    queue.push(1)
    message = one.receive(0)
    assert message is not None
    assert other.receive(0) is None
    time.sleep(0.13)  # for which the store is away, so that none of them can do anything
    assert other.receive(0) is None
    one.extend()
    one._forget_holding()  # it dies
    for _ in range(2):
        assert other.receive(0) is None
        time.sleep(0.13)
    assert other.receive(0) is None  # it waits for the pause before another try, but has the lease:
    assert other._holding is not None  # however seldom one looks, once is enough of that
    assert other.receive(PATIENCE) == replace(message, attempt=2)


def test_what_was_acknowledged_in_an_outage_is_said_again(name: str) -> None:
    store = FaultyStore(MemoryStore())
    queue = Queue(store, name)
    consumer = queue.consumer("a")
    queue.push(1)
    message = consumer.receive(0)
    assert message is not None
    store.fail(1, for_good=True)
    with pytest.raises(StoreUnavailable):
        consumer.acknowledge(message)
    store.heal()
    consumer.retry(message, "the acknowledgement failed")  # which is not what has to be done again
    consumer.close()
    assert queue.report().consumers[0].next == 2


def test_a_bid_for_the_lease_that_is_carried_out_late_is_known_again(name: str) -> None:
    store = Meddled(MemoryStore())
    queue = Queue(store, name)
    consumer = queue.consumer("a")
    queue.push(1)
    fates = iter(["", "", "late", "", "refused"])
    store.fate = lambda: next(fates, "")
    assert consumer.receive(0) is None
    with pytest.raises(StoreUnavailable):
        consumer.receive(0)
    store.catch_up()
    assert consumer.receive(0) is not None


# -- trimming and limits


def test_what_all_have_acknowledged_is_removed(queue: Queue, store: Store) -> None:
    fast, slow = queue.consumer("fast"), queue.consumer("slow")
    for n in range(10):
        queue.push(n)
    received(fast, 10)
    received(slow, 4)
    assert queue.trim(keep=1) == 3
    assert queue.trim() == 1
    assert queue.trim() == 0
    report = queue.report()
    assert (report.floor, report.end) == (5, 11)
    assert [(c.name, c.next, c.behind) for c in report.consumers] == [("slow", 5, 6), ("fast", 11, 0)]
    prefix = queue._log.documents.records.scan_prefix
    numbers = [key for key in store.keys(prefix) if key.removeprefix(prefix).isdigit()]
    assert len(numbers) == 6
    assert queue.forget("slow")
    assert not queue.forget("slow")
    assert queue.trim() == 6
    assert queue.push("next") == 11
    assert bodies(received(fast, 1)) == ["next"]


def test_without_consumers_nothing_is_removed_unless_that_is_asked_for(queue: Queue) -> None:
    for n in range(5):
        queue.push(n)
    assert queue.trim() == 0
    assert queue.trim(before=4) == 3
    assert queue.trim(before=99) == 2
    assert queue.push(5) == 6


def test_a_forgotten_consumer_that_still_runs_begins_anew(queue: Queue) -> None:
    consumer = queue.consumer("a", start="beginning")
    for n in range(3):
        queue.push(n)
    message = consumer.receive(0)
    assert message is not None
    queue.forget("a")
    with pytest.raises(LeaseLost, match="forgotten"):
        consumer.acknowledge(message)
    assert bodies(received(consumer, 3)) == [0, 1, 2]
    assert [c.name for c in queue.report().consumers] == ["a"]


def test_no_consumer_lives_on_without_its_name(local: Queue) -> None:
    other, consumer = local.consumer("other"), local.consumer("a")
    assert consumer.receive(0) is None
    local._log.strike("a")  # all that is done if whoever forgets it dies
    for n in range(3):
        local.push(n)
    received(other, 3)
    assert consumer.receive(0) is not None
    assert local.trim() == 0
    assert [c.name for c in local.report().consumers] == ["a", "other"]
    consumer.close()
    assert bodies(received(local.consumer("a"), 3)) == [0, 1, 2]


def test_the_cursor_of_one_that_was_forgotten_does_not_count_for_the_next_of_that_name(
    local: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    with local.consumer("a") as consumer:
        for n in range(5):
            local.push(n)
        received(consumer, 5)
    cursors = local._log.cursors

    def meanwhile(head: Head) -> dict[str, Cursor]:
        found = cursors(head)
        local.forget("a")
        local.consumer("a", start="beginning")
        return found

    monkeypatch.setattr(local._log, "cursors", meanwhile)
    assert local.trim() == 0
    with local.consumer("a") as consumer:
        assert bodies(received(consumer, 5)) == [0, 1, 2, 3, 4]
    monkeypatch.undo()
    local._log.strike("a")  # somebody is about to forget it, and its cursor is there yet
    local.consumer("a", start="beginning")
    assert local.report().consumers[0].next == 1


def test_a_push_removes_only_so_much_of_what_others_have_left(local: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queuelog, "SWEPT", 30)
    queue = Queue(local._log.store, local.name, limit=100)  # so that every tenth push trims
    slow, fast = queue.consumer("slow"), queue.consumer("fast")
    for n in range(99):
        queue.push(n)
    received(fast, 99)
    queue.forget(slow.name)
    gone = []
    for n in range(31):
        queue.push(n)
        gone.append(queue._log.head().swept - 1)
    assert gone[0] == 30
    assert gone[-1] == queue.report().floor - 1 > 60
    assert gone == sorted(gone)
    assert all(second - first <= 30 for first, second in itertools.pairwise(gone))


def test_a_queue_keeps_itself_short(store: Store, name: str) -> None:
    queue = Queue(store, name, limit=50)
    consumer = queue.consumer("a")
    for n in range(200):
        queue.push(n)
        received(consumer, 1)
    assert queue.report().floor > 180


def test_a_full_queue_refuses_and_names_who_is_behind(store: Store, name: str) -> None:
    queue = Queue(store, name, limit=20)
    slow, fast = queue.consumer("slow"), queue.consumer("fast")
    for n in range(20):
        queue.push(n)
    received(fast, 20)
    with pytest.raises(
        QueueFullError, match=f"{name} is full: 20 messages of 20, and its slowest consumer, slow, is at 1"
    ):
        queue.push(20)
    with pytest.raises(StoreUnavailable):
        Queue(store, name, limit=20).push(20)
    received(slow, 1)
    assert queue.push("there is room") == 21


def test_a_queue_that_forgets_tells_who_has_missed_what(store: Store, name: str, counted: Counter[str]) -> None:
    queue = Queue(store, name, limit=20, when_full="forget")
    slow, follower = queue.consumer("slow"), queue.follow()
    for n in range(1, 51):
        assert queue.push(n) == n
    floor = queue.report().floor
    assert 30 < floor <= 33
    assert bodies(received(slow, 51 - floor)) == list(range(floor, 51))
    assert slow.missed == floor - 1 == counted["fanout.missed"]
    assert queue.report().consumers[0].missed == floor - 1
    first = follower.receive(0)
    assert first is not None
    assert (first.number, follower.missed) == (floor, floor - 1)


def test_what_a_late_producer_writes_behind_the_cursors_is_written_again(
    store: Store, name: str, counted: Counter[str]
) -> None:
    queue, late = Queue(store, name), Queue(store, name)
    consumer = queue.consumer("a")
    late.push("early")
    for n in range(10):
        queue.push(n)
    received(consumer, 11)
    queue.trim()
    assert late.push("late") == 12
    assert counted["fanout.behind_floor"] == 1
    assert bodies(received(consumer, 1)) == ["late"]
    assert records(queue).read(f"{2:016d}") is None


def test_what_a_producer_left_below_the_floor_is_nobodys(queue: Queue, store: Store) -> None:
    with queue.consumer("behind") as behind:
        for n in range(5):
            queue.push(n)
        received(behind, 2)
    behind = queue.consumer("behind")  # which has read nothing ahead
    queue.trim(before=6)
    stray = records(queue)
    stray.put(f"{3:016d}", {"body": "stray", "token": "x", "at": 0})
    follower = queue.follow(1)
    queue.push("next")
    message = follower.receive(0)
    assert message is not None
    assert (message.body, follower.missed) == ("next", 5)
    assert bodies(received(behind, 1)) == ["next"]
    assert behind.missed == 3
    queue.trim()
    assert stray.read(f"{3:016d}") is None


def test_a_producer_that_knows_nothing_finds_the_end_in_few_steps(name: str) -> None:
    store = FaultyStore(MemoryStore())
    queue = Queue(store, name)
    queue.consumer("a")
    for n in range(2000):
        queue.push(n)
    store.fail(10**9)
    assert Queue(store, name).push("new") == 2001
    assert len(store.calls) < 25
    store.fail(10**9)
    records(queue).delete("end")
    assert Queue(store, name).push("new") == 2002
    assert len(store.calls) < 45
    store.fail(10**9)
    assert queue.push("behind") == 2003
    queue.push("usual")
    assert store.calls[-2:] == ["add", "get_many"]


# -- damage


def test_a_damaged_message_becomes_a_dead_letter_with_its_reason(queue: Queue, store: Store) -> None:
    consumer, follower = queue.consumer("a"), queue.follow()
    for n in range(3):
        queue.push(n)
    store.put(queue._log._record(2), b"no document")
    assert bodies(received(consumer, 2)) == [0, 2]
    (letter,) = queue.dead_letters("a")
    assert (letter.damaged, letter.number) == (True, 2)
    assert letter.error.startswith("damaged: ")
    assert not queue.redeliver("a", 2)
    assert [m.body for m in (follower.receive(0), follower.receive(0)) if m] == [0, 2]
    assert follower.missed == 1


@pytest.mark.parametrize("gone", [[3], [2, 3, 4], range(5, 30)])
def test_a_gap_is_passed_over_and_told(queue: Queue, store: Store, gone: Any, counted: Counter[str]) -> None:
    consumer, follower = queue.consumer("a"), queue.follow()
    for n in range(1, 71):
        queue.push(n)
    store.delete_many(map(queue._log._record, gone))
    there = [n for n in range(1, 71) if n not in gone]
    assert bodies(received(consumer, len(there))) == there
    assert consumer.missed == len(gone) == counted["fanout.missed"]
    assert [m.body for m in (follower.receive(0) for _ in there) if m] == there
    records(queue).delete("end")  # without which a producer has to look for it, and comes upon the gap
    assert Queue(store, queue.name).push(71) == 71
    assert bodies(received(consumer, 1)) == [71]


@pytest.mark.parametrize("harm", ["damaged", "missing"])
def test_what_is_not_delivered_acknowledges_nothing_before_it(local: Queue, harm: str) -> None:
    first = local.consumer("a")
    for n in range(1, 5):
        local.push(n)
    record = local._log._record(3)
    if harm == "damaged":
        local._log.store.put(record, b"no document")
    else:
        local._log.store.delete(record)
    assert [m.body for m in (first.receive(0) for _ in range(3)) if m] == [1, 2, 4]
    first.close()
    second = local.consumer("a")
    assert bodies(received(second, 3)) == [1, 2, 4]
    assert local.report().consumers[0].next == 5


def test_nobody_writes_where_the_cursors_have_been(local: Queue) -> None:
    late = Queue(local._log.store, local.name)
    consumer = local.consumer("a")
    late.push(1)
    for n in range(2, 10):
        local.push(n)
    local._log.store.delete_many(map(local._log._record, (2, 3)))
    assert bodies(received(consumer, 7)) == [1, *range(4, 10)]
    assert late.push("late") == 10
    assert bodies(received(consumer, 1)) == ["late"]
    local._log.store.delete(local._log._record(10))  # the last one, after it was acknowledged
    assert local.push("filled") == 10
    assert bodies(received(consumer, 8)) == [1, *range(4, 10), "filled"]


def test_a_long_gap_raises_the_floor(local: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queuelog, "MENDED", 5)
    consumer = local.consumer("a")
    for n in range(1, 21):
        local.push(n)
    local._log.store.delete_many(map(local._log._record, range(2, 11)))
    local._log._next = 30  # a producer that remembers an end that there is no more
    assert bodies(received(consumer, 1)) == [1]
    assert local.push(30) == 30
    assert local.report().floor == 30
    assert bodies(received(consumer, 1)) == [30]
    assert consumer.missed == 28


@pytest.mark.parametrize("reader", [lambda queue: queue.consumer("a"), lambda queue: queue.follow()])
def test_who_waits_finds_what_is_behind_a_gap_that_is_longer_than_a_page(
    local: Queue, reader: Callable[[Queue], Consumer | Follower]
) -> None:
    waiting = reader(local)
    for n in range(1, 42):
        local.push(n)
    local._log.store.delete_many(map(local._log._record, range(1, 21)))
    message = waiting.receive(PATIENCE)
    assert message is not None
    assert message.body == 21


def test_a_store_that_begins_anew_loses_nothing_that_it_takes_from_then_on(name: str) -> None:
    """As one in memory does, with producers and consumers that remember how it was."""
    store = MemoryStore()
    old, new = Queue(store, name), Queue(store, name)
    running = old.consumer("a")
    for n in range(20):
        old.push(n)
    received(running, 20)
    store.delete_many(list(store.keys(old._log.documents.records.scan_prefix)))
    pushed = [new.push("first"), *(queue.push(n) for n in range(20) for queue in (old, new))]
    assert len(set(pushed)) == 41
    assert bodies(received(running, 41)) == ["first", *(n for n in range(20) for _ in "12")]
    with old.consumer("a") as consumer:
        assert consumer.receive(0) is None


def test_a_producer_that_sees_the_floor_fall_begins_at_the_end(local: Queue) -> None:
    with local.consumer("a") as consumer:
        for n in range(20):
            local.push(n)
        received(consumer, 20)
        local.trim()
    local._log.store.delete_many(list(local._log.store.keys(local._log.documents.records.scan_prefix)))
    assert Queue(local._log.store, local.name).push("new") == 1
    assert local.push("old") == 2
    assert bodies(received(local.consumer("b", start="beginning"), 2)) == ["new", "old"]
    assert local.report().end == 3


def test_a_consumer_beyond_the_end_says_so_and_goes_on_at_the_oldest(
    local: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    consumer, follower = local.consumer("a"), local.follow(4711)
    for n in range(1, 21):
        local.push(n)
    received(consumer, 19)
    last = consumer.receive(0)
    assert last is not None
    local._log.store.delete_many(map(local._log._record, range(11, 21)))  # as in a backup of yesterday
    assert Queue(local._log.store, local.name).push("new") == 11
    assert bodies(received(consumer, 11)) == [*range(1, 11), "new"]
    assert "the store has lost records" in caplog.text
    with pytest.raises(LeaseLost):
        consumer.acknowledge(last)
    assert follower.receive(0) is None
    assert Queue(local._log.store, local.name).push("next") == 12
    assert bodies(received(consumer, 1)) == ["next"]
    message = follower.receive(0)
    assert message is not None
    assert message.body == "next"


def test_what_no_key_is_here_for_stops_nothing_before_it(name: str) -> None:
    store = MemoryStore()
    queue = Queue(store, name, store_key="k" * 40)
    consumer = queue.consumer("a")
    for n in range(3):
        queue.push(n)
    store.put(queue._log._record(3), b'{"body": 3, "token": "x", "at": 1}')
    assert bodies(received(consumer, 2)) == [0, 1]
    with pytest.raises(StoreKeyError):
        consumer.receive(0)


def test_who_has_lost_the_lease_does_not_complain_of_what_was_trimmed(
    local: Queue, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick = local.consumer("a", prefetch=1), local.consumer("a")
    for n in range(3):
        local.push(n)
    assert slow.receive(0) is not None
    records(local).modify("consumer=a", lambda document: {**(document or {}), "owner": None})  # as if it had stood
    received(quick, 3)
    local.trim()
    assert slow.receive(0) is None
    assert "were forgotten" not in caplog.text


def test_a_damaged_floor_is_an_error_and_no_new_beginning(queue: Queue, store: Store) -> None:
    consumer = queue.consumer("a")
    queue.push(1)
    records(queue).put("floor", {"floor": "high"})
    with pytest.raises(DocumentDamagedError):
        consumer.receive(0)
    with pytest.raises(DocumentDamagedError):
        Queue(store, queue.name).push(2)


# -- failures


@pytest.mark.parametrize("executed", [False, True])
def test_whatever_call_fails_a_push_that_returns_is_there_once_and_one_that_fails_says_so(executed: bool) -> None:
    for n in itertools.count(1):
        store = FaultyStore(MemoryStore())
        queue = Queue(store, "q", limit=10)
        consumer = queue.consumer("a")
        for body in range(8):
            queue.push(body)
        received(consumer, 8)
        store.fail(n, executed=executed)
        try:
            outcome = [queue.push(body) for body in ("x", "y", "z")]
        except OutcomeUnknown:
            outcome = None
        except StoreUnavailable:
            outcome = []
        failed = store.has_failed
        store.heal()
        seen = []
        while (message := consumer.receive(0)) is not None:
            seen.append(message.body)
            consumer.acknowledge(message)
        if not failed:
            assert n > 6
            break
        if outcome:
            assert seen == ["x", "y", "z"]
        else:
            assert seen == ["x", "y", "z"][: len(seen)]
        assert queue.push("last")
        assert bodies(received(consumer, 1)) == ["last"]


def test_an_append_whose_answer_was_lost_recognises_itself() -> None:
    store = FaultyStore(MemoryStore())
    queue = Queue(store, "q")
    consumer = queue.consumer("a")
    queue.push(0)
    store.fail(1, executed=True)
    assert queue.push(1) == 2
    assert store.calls == ["add", "get", "get_many"]
    assert bodies(received(consumer, 2)) == [0, 1]


@pytest.mark.parametrize("executed", [False, True])
def test_whatever_call_of_a_consumer_fails_nothing_is_lost_or_out_of_order(executed: bool) -> None:
    for n in itertools.count(1):
        store = FaultyStore(MemoryStore())
        queue = Queue(store, "q")
        for body in range(4):
            queue.push(body)
        store.fail(n, executed=executed)
        failures = 0
        seen: list[Any] = []
        consumer = None
        while len(set(seen)) < 4:
            assert failures < 3
            try:
                consumer = consumer or queue.consumer("a", start="beginning", backoff=0.001)
                message = consumer.receive(PATIENCE)
                assert message is not None
                seen.append(message.body)
                if message.body == 2 and message.attempt == 1:
                    consumer.retry(message, "no")
                else:
                    consumer.acknowledge(message)
            except StoreUnavailable:
                failures += 1
        assert list(dict.fromkeys(seen)) == [0, 1, 2, 3]
        assert len(seen) <= 7
        assert consumer is not None
        consumer.close()
        has_failed = store.has_failed
        store.heal()
        report = queue.report().consumers[0]
        assert (report.next, report.dead, report.held) in [(5, 0, False), (4, 0, False), (5, 0, True), (4, 0, True)]
        if not has_failed:
            assert n > 8
            assert (report.next, report.held, seen) == (5, False, [0, 1, 2, 2, 3])
            break


@pytest.mark.parametrize("executed", [False, True])
def test_at_whatever_call_a_consumer_dies_what_it_gave_up_is_a_dead_letter(executed: bool) -> None:
    for n in itertools.count(1):
        store = FaultyStore(MemoryStore())
        queue = Queue(store, "q")
        dying, next_one = (
            queue.consumer("a", start="beginning", retries=1, lease=0.02, backoff=0.001) for _ in range(2)
        )
        queue.push("bad")
        queue.push("good")
        store.fail(n, executed=executed, for_good=True)
        with suppress(StoreUnavailable):
            while (message := dying.receive(PATIENCE)) is not None and message.body == "bad":
                dying.retry(message, "no")
        if not store.has_failed:
            assert n > 6
            break
        store.heal()
        while (message := next_one.receive(PATIENCE)) is not None and message.body == "bad":
            next_one.retry(message, "no")
        assert message is not None
        assert message.body == "good"
        assert [letter.body for letter in queue.dead_letters("a")] == ["bad"]


class Meddled(FaultyStore):
    """Before each call something else happens, as ``fate`` decides; it may say what becomes of the call."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.fate: Callable[[], str] = lambda: ""
        #: Calls that a stalled server may carry out later.
        self.late: list[Callable[[], object]] = []
        self._busy = False

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any, writes: bool = True) -> Any:
        if self._busy:
            return function(*arguments)
        self._busy = True
        try:
            fate = self.fate()
        finally:
            self._busy = False
        if fate == "refused":
            raise StoreUnavailable("refused")
        if fate == "late" and name in ("add", "compare_and_swap"):
            self.late.append(lambda: function(*arguments))
            raise OutcomeUnknown("late")
        result = function(*arguments)
        if fate == "unanswered":
            raise OutcomeUnknown("unanswered") if writes else StoreUnavailable("unanswered")
        return result

    def catch_up(self) -> None:
        for call in self.late:
            call()
        self.late.clear()


#: What comes between two calls, each; and who is on the move.
meddled = given(st.lists(st.integers(0, 14), max_size=150), st.lists(st.integers(0, 4), min_size=1, max_size=40))


def test_a_producer_that_comes_late_at_any_step_of_a_trimmer_is_heard() -> None:
    for n in itertools.count(1):
        store = Meddled(MemoryStore())
        queue, late = Queue(store, "q"), Queue(store, "q")
        consumer = queue.consumer("a")
        late.push("early")
        for body in range(3):
            queue.push(body)
        received(consumer, 4)
        calls = itertools.count(1)

        def fate(calls: Iterator[int] = calls, n: int = n, late: Queue = late) -> str:
            if next(calls) == n:
                late.push("late")
            return ""

        store.fate = fate
        queue.trim()
        if next(calls) <= n:
            assert n > 4
            break
        store.fate = lambda: ""
        assert bodies(received(consumer, 1)) == ["late"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@meddled
def test_whoever_comes_between_any_two_steps_nothing_is_lost_invented_or_out_of_order(
    between: list[int], steps: list[int]
) -> None:
    meddle(between, steps)


@pytest.mark.long
@settings(max_examples=3000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@meddled
def test_whoever_comes_in_between_for_long(between: list[int], steps: list[int]) -> None:
    meddle(between, steps)


def meddle(between: list[int], steps: list[int]) -> None:
    """Two producers, two consumers and a trimmer, each of whose steps may fall between any two calls of another's."""
    store = Meddled(MemoryStore())
    producers = [Queue(store, "q", limit=20) for _ in range(2)]
    both = [producers[0].consumer(name, backoff=0.0001, longest_backoff=0.0001) for name in ("a", "b")]
    serial = itertools.count()
    tried: set[int] = set()
    pushed: list[list[int]] = [[], []]
    refused: set[int] = set()
    seen: dict[str, list[Message]] = {"a": [], "b": []}

    def push(which: int) -> None:
        body = next(serial)
        tried.add(body)
        try:
            producers[which].push(body)
            pushed[which].append(body)
        except OutcomeUnknown:
            pass
        except StoreUnavailable:
            refused.add(body)

    def consume(consumer: Consumer) -> bool:
        try:
            message = consumer.receive(0)
            if message is None:
                return False
            seen[consumer.name].append(message)
            consumer.acknowledge(message)
        except StoreUnavailable:
            pass
        return True

    def trim() -> None:
        with suppress(StoreUnavailable):
            producers[1].trim()

    doings: list[Callable[[], object]] = [
        lambda: push(0),
        lambda: consume(both[0]),
        lambda: push(1),
        lambda: consume(both[1]),
        trim,
    ]
    chosen, busy = iter(between), 0

    def fate() -> str:
        choice = next(chosen, 14)
        if choice < 3:  # somebody else: each object is one thread's, and may be busy
            doings[[which for which in range(4) if which != busy][choice]]()
        elif choice in (3, 4):
            trim()
        elif choice == 5:
            store.catch_up()
        return {6: "late", 7: "unanswered", 8: "refused"}.get(choice, "")

    store.fate = fate
    for busy in steps:
        doings[busy]()
    chosen = iter(())
    store.catch_up()
    for consumer in both:
        while consume(consumer):
            pass
    for consumer in both:
        messages = seen[consumer.name]
        firsts = list(dict.fromkeys(message.number for message in messages))
        assert firsts == sorted(firsts)
        there = {message.number: message.body for message in messages}
        assert all(there[message.number] == message.body for message in messages)
        got = list(dict.fromkeys(there[number] for number in firsts))
        assert set(got) <= tried - refused
        for bodies_of_one in pushed:
            assert [body for body in got if body in set(bodies_of_one)] == bodies_of_one
        assert consumer.missed == 0


def test_producers_and_consumers_of_many_threads(queue: Queue) -> None:
    both = [queue.consumer(name) for name in ("a", "b")]
    took: dict[str, list[Any]] = {"a": [], "b": []}

    def produce(which: int) -> None:
        for n in range(20):
            queue.push([which, n])

    def consume(consumer: Consumer) -> None:
        took[consumer.name] = bodies(received(consumer, 80))

    threads = [threading.Thread(target=produce, args=(which,)) for which in range(4)]
    threads += [threading.Thread(target=consume, args=(consumer,)) for consumer in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert took["a"] == took["b"]
    for which in range(4):
        assert [n for w, n in took["a"] if w == which] == list(range(20))


# -- followers


def test_a_follower_leaves_no_trace(queue: Queue, store: Store) -> None:
    queue.push("before")
    now, beginning = queue.follow(), queue.follow("beginning")
    queue.push("after")
    count = store.count()
    first = now.receive(0)
    assert first is not None
    assert first.body == "after"
    assert [m.body for m in (beginning.receive(0), beginning.receive(0)) if m] == ["before", "after"]
    assert now.receive(0) is None
    assert (now.position, beginning.position) == (3, 3)
    assert store.count() == count
    late = threading.Timer(0.05, queue.push, ["later"])
    late.start()
    message = now.receive(PATIENCE)
    late.join()
    assert message is not None
    assert message.body == "later"


# -- the commands


@pytest.fixture
def run(tyrant_server: ServerProcess, name: str) -> Callable[..., Any]:
    def run(command: str, *arguments: str) -> Any:
        result = CliRunner().invoke(main, ["fanout", command, name, *arguments, "--url", tyrant_server.url])
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_the_commands(run: Callable[..., Any], tyrant_server: ServerProcess, name: str) -> None:
    queue = Queue(tyrant_server.url, name)
    with queue.consumer("a", retries=0) as consumer:
        assert simplejson.loads(run("push", '{"n": 1}')) == {"number": 1}
        assert "message 2" in run("push", '"\\u001b[31m"', "--no-json")
        message = consumer.receive(0)
        assert message is not None
        consumer.retry(message, "no")
        received(consumer, 1)
    shown = simplejson.loads(run("show"))
    assert (shown["floor"], shown["end"]) == (1, 3)
    assert shown["consumers"][0]["dead"] == 1
    assert "2 messages, 1 to 2" in run("show", "--no-json")
    followed = run("follow", "--beginning", "--count", "2")
    assert [simplejson.loads(line)["body"] for line in followed.splitlines()] == [{"n": 1}, "\x1b[31m"]
    assert "\x1b" not in run("follow", "--from", "2", "--count", "1", "--no-json")
    assert run("follow", "--max-seconds", "0.01") == ""
    assert simplejson.loads(run("dead", "a"))["body"] == {"n": 1}
    assert "after 1 tries: no" in run("dead", "a", "--no-json")
    assert simplejson.loads(run("dead", "a", "--redeliver", "1")) == {"number": 1}
    assert simplejson.loads(run("dead", "a", "--discard", "1")) == {"number": 1}
    assert simplejson.loads(run("trim")) == {"removed": 2}
    assert simplejson.loads(run("forget", "a")) == {"forgotten": True}
    assert "no consumers" in run("show", "--no-json")
    Queue(tyrant_server.url, f"{name}-b").consumer("b")
    listed = CliRunner().invoke(main, ["fanout", "list", "--no-json", "--url", tyrant_server.url])
    rows = [line.split() for line in listed.output.splitlines()]
    assert [name, "0"] in rows
    assert [f"{name}-b", "0", "b"] in rows
    listed = CliRunner().invoke(main, ["fanout", "list", "--url", tyrant_server.url])
    assert name in [simplejson.loads(line)["name"] for line in listed.output.splitlines()]
    typo = CliRunner().invoke(main, ["fanout", "show", f"{name}-typo", "--url", tyrant_server.url])
    assert typo.exit_code == 1
    assert "there is no queue" in typo.output
    wrong = CliRunner().invoke(main, ["fanout", "push", name, "text", "--url", tyrant_server.url])
    assert wrong.exit_code == 2
    assert "it is not JSON" in wrong.output


def test_it_is_made_by_the_applications_settings(options: dict[str, Any], name: str) -> None:
    application = {f"beaker.session.{option}": value for option, value in options.items()}
    queue = Queue.from_settings(application, name)
    assert queue.push(1) == 1
    assert Queue(Settings.of(application), name).report().end == 2
    assert Queue(options["url"], name).report().end == 1  # without the prefix, another queue
