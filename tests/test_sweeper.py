"""What is expired goes, and nothing else does: not what was touched meanwhile, nor what is none of ours."""

from __future__ import annotations

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from beaker_statestore import documents
from beaker_statestore.cli import main
from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.keys import KINDS
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.sweeper import ENOUGH, Sweep, Sweeper, sweep
from beaker_statestore.testing import FaultyStore, ServerProcess
from tests.serving import PATIENCE

PAST = time.time() - 3600
FUTURE = time.time() + 3600


def document(expires: Any = PAST, **fields: Any) -> bytes:
    return json.dumps({**fields, "_expires": expires}).encode()


def session(number: int, prefix: str = "") -> bytes:
    return f"{prefix}session:{random.Random(number).getrandbits(128):032x}".encode()


@pytest.fixture
def prefix(options: dict[str, Any]) -> str:
    return str(options["prefix"])


def content(store: Store, prefix: str) -> dict[bytes, bytes]:
    return store.get_many(store.keys(prefix.encode()))


# -- what goes and what stays


def test_the_expired_of_every_kind_goes_and_the_rest_stays_byte_for_byte(store: Store, prefix: str) -> None:
    stays = {}
    for kind in KINDS:
        store.put(f"{prefix}{kind}:gone".encode(), document())
        stays[f"{prefix}{kind}:later".encode()] = document(FUTURE)
        stays[f"{prefix}{kind}:never".encode()] = b'{ "a" : 1 }'
        stays[f"{prefix}{kind}:just now".encode()] = document(time.time() - 1)
    store.put_many(stays)
    found = sweep(store, prefix)
    assert content(store, prefix) == stays
    assert found == Sweep(seen=4 * len(KINDS), kinds=dict.fromkeys(KINDS, 1), removed=len(KINDS), place=None)  # type: ignore[arg-type]


FOREIGN = [
    b"\x80\x04}\x94_expires.",
    b"_expires",
    b'["_expires", 1]',
    b'{"_expires": 1',
    b'{"_expires": "1"}',
    b'{"_expires": null}',
    b'{"_expires": true}',
]


def test_what_is_no_document_of_ours_stays_and_is_counted(store: Store, prefix: str) -> None:
    stays = {f"{prefix}session:{number}".encode(): value for number, value in enumerate(FOREIGN)}
    store.put_many(stays)
    assert sweep(store, prefix) == Sweep(seen=len(FOREIGN), unreadable=len(FOREIGN), place=None)
    assert content(store, prefix) == stays


def test_other_keys_and_prefixes_are_not_even_read(store: Store, prefix: str) -> None:
    names = ["", "session", "sessions:x", "a", "Session:x", "x", "shop:session:x", "shop.cache:ns:key", "lock"]
    stays = {f"{prefix}{name}".encode(): document() for name in names}
    store.put_many(stays)
    assert sweep(store, prefix).seen == 0
    assert sweep(store, f"{prefix}sho").seen == 0
    assert content(store, prefix) == stays
    assert sweep(store, f"{prefix}shop:").removed == 1


def test_all_prefixes_are_all_our_kinds_and_nothing_else() -> None:
    store = MemoryStore()
    ours = [b"session:x", b"shop:session:x", b"a/b/cache:ns:k", b"lock:session:cache:x"]
    others = [b"sessions:x", b"", b"user 1 session:x", b"\xff\xfesession:x", b"x" * 65 + b"session:x", b"SESSION:x"]
    store.put_many(dict.fromkeys([*ours, *others], document()))
    assert sweep(store, None).removed == len(ours)
    assert set(store.keys()) == set(others)


@pytest.mark.parametrize("scope", ["", None])
@pytest.mark.parametrize("length", [-1, 0, 300, 999_999_999.5])
def test_what_may_be_a_length_of_time_stays(scope: str | None, length: float) -> None:
    store = MemoryStore()
    store.put_many({b"queue:job": document(length), b"session:x": document()})
    assert sweep(store, scope).removed == 1
    assert list(store.keys()) == [b"queue:job"]


@pytest.mark.parametrize("word", ["realestate", "bigblock", "dateindex", "taskqueue", "shop7session"])
def test_a_word_that_ends_like_a_kind_is_taken_for_one_only_if_its_prefix_is_named(word: str) -> None:
    store = MemoryStore()
    key = f"{word}:42".encode()
    store.put(key, document())
    assert sweep(store, None) == Sweep(place=None)
    assert store.get(key) == document()
    kind = max(kind for kind in KINDS if word.endswith(kind))
    assert sweep(store, word.removesuffix(kind)).removed == 1


class Watched(MemoryStore):
    """Remembers how many bytes were read since the last scan."""

    read = 0

    def get(self, key: bytes) -> bytes | None:
        value = super().get(key)
        self.read += len(value or b"")
        return value

    def scan(self, prefix: bytes = b"", cursor: bytes | None = None, limit: int = 1000) -> Any:
        self.read = 0
        return super().scan(prefix, cursor, limit)


@pytest.mark.parametrize("scope", ["", None])
def test_a_step_in_this_process_reads_no_more_than_is_enough_and_one_record(scope: str | None) -> None:
    store = Watched()
    sizes = [10, 100_000, 2, 300_000, 70_000, 5, 200_000, 1] * 4
    store.put_many({b"cache:a:%03d" % number: document(x="x" * size) for number, size in enumerate(sizes)})
    store.put(b"other:z", b"")
    sweeper = Sweeper(store, scope)
    steps = 0
    while not sweeper.done:
        sweeper.step(100)
        steps += store.read > 0
        assert store.read < ENOUGH + 300_100
    assert (sweeper.sweep.seen, sweeper.sweep.removed) == (len(sizes), len(sizes))
    assert 8 <= steps <= 16


def test_what_cannot_expire_is_not_parsed_and_what_is_too_large_is_not_either(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = documents.decode

    def watched(data: bytes) -> documents.Document:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(documents, "decode", watched)
    store = MemoryStore()
    written = {
        b"cache:a:1": b'{"never": 1}',
        b"cache:a:2": document(),
        b"cache:a:3": document(x="x" * 2000),
        b"cache:a:4": rb'{"\u005fexpires": 1600000000}',
    }
    store.put_many(written)
    sweeper = Sweeper(store, largest=1000)
    list(sweeper.run())
    assert decoded == [written[b"cache:a:2"], written[b"cache:a:4"]]
    assert (sweeper.sweep.removed, sweeper.sweep.unreadable) == (2, 1)
    assert sweep(store).removed == 1


def test_the_margin_is_kept(store: Store, prefix: str) -> None:
    store.put(session(1, prefix), document(time.time() - 30))
    assert sweep(store, prefix).expired == 0
    assert sweep(store, prefix, margin=20).removed == 1


def test_a_dry_run_removes_nothing(store: Store, prefix: str) -> None:
    store.put(session(1, prefix), document())
    before = content(store, prefix)
    found = sweep(store, prefix, dry_run=True)
    assert (found.expired, found.removed, found.changed) == (1, 0, 0)
    assert content(store, prefix) == before


# -- others at work


class Disturbed(FaultyStore):
    """Somebody else is at work between a sweep's look and its removals."""

    def __init__(self, store: Store, disturb: Callable[[], None]) -> None:
        super().__init__(store)
        self._disturb = disturb

    def get_many(self, keys: Any) -> dict[bytes, bytes]:
        values = super().get_many(keys)
        if values:
            self._disturb()
        return values


def test_what_is_touched_or_removed_meanwhile_is_left_alone(store: Store, prefix: str) -> None:
    expired = [session(number, prefix) for number in range(3)]
    store.put_many(dict.fromkeys(expired, document()))

    def disturb() -> None:
        store.put(expired[0], document(FUTURE))
        store.delete(expired[1])

    found = sweep(Disturbed(store, disturb), prefix)
    assert (found.expired, found.removed, found.changed) == (3, 1, 2)
    assert content(store, prefix) == {expired[0]: document(FUTURE)}


def test_a_removal_whose_answer_was_lost_is_looked_after() -> None:
    store = FaultyStore(MemoryStore())
    for n in itertools.count(1):
        store.store.put(session(1), document())
        store.fail(n, executed=True)
        sweeper = Sweeper(store)
        try:
            list(sweeper.run())
        except OutcomeUnknown:
            raise AssertionError("the record was removed") from None
        except StoreUnavailable:
            list(sweeper.run())
        assert (sweeper.sweep.removed, sweeper.done) == (1, True), store.calls
        if not store.has_failed:
            break


def test_a_removal_that_did_not_happen_is_an_outage_and_what_has_changed_stays() -> None:
    class Unanswering(MemoryStore):
        def apply(self, operations: Any) -> Any:
            return Store.apply(self, operations) if self.doubtful else super().apply(operations)

        def compare_and_swap(self, key: bytes, *_: Any) -> bool:
            self.doubtful = False
            if self.touched:
                self.put(key, document(FUTURE))
            raise OutcomeUnknown("no answer")

        def get(self, key: bytes) -> bytes | None:
            value = super().get(key)
            self.doubtful = value == document()
            return value

        doubtful = touched = False

    store = Unanswering()
    store.put(session(1), document())
    with pytest.raises(OutcomeUnknown):
        sweep(store)
    store.touched, store.doubtful = True, False
    assert sweep(store).changed == 1
    assert store.get(session(1)) == document(FUTURE)


def test_two_sweeps_at_once_remove_each_record_once(store: Store, prefix: str) -> None:
    store.put_many({session(number, prefix): document() for number in range(200)})
    found: list[Sweep] = []
    threads = [threading.Thread(target=lambda: found.append(sweep(store, prefix, batch=7))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sum(each.removed for each in found) == 200
    assert content(store, prefix) == {}


# -- places to go on


@pytest.mark.parametrize("scope", ["own", None])
@pytest.mark.parametrize("batch", [1, 3, 50])
def test_sweeps_that_go_on_where_the_last_has_ended_cover_all(
    store: Store, prefix: str, scope: str | None, batch: int
) -> None:
    if scope is None:
        store = MemoryStore()  # the other one has more in it
    live = {session(number, prefix): document(FUTURE) for number in range(0, 40, 2)}
    store.put_many(live)
    store.put_many({session(number, prefix): document() for number in range(1, 40, 2)})
    store.put(f"{prefix}cache:ü {'long' * 500}:k".encode(), document())
    places: list[str] = []
    removed = 0
    for _ in range(200):
        found = sweep(
            store, prefix if scope else None, start=places[-1] if places else None, batch=batch, max_seconds=1e-9
        )
        removed += found.removed
        if found.place is None:
            break
        assert found.place.isprintable()
        assert " " not in found.place
        places.append(found.place)
    assert removed == 21
    assert len(places) == len(set(places))
    assert content(store, prefix) == live
    ids = [key.rpartition(b":")[2].decode() for key in live]
    assert not [place for place in places for known in ids if known[:9] in place], "a whole session id"


def test_a_place_goes_on_where_the_sweep_was_and_does_not_begin_again(store: Store, prefix: str) -> None:
    store.put_many({session(number, prefix): document(FUTURE) for number in range(50)})
    sweeper = Sweeper(store, prefix)
    seen = 0
    while not sweeper.done:
        sweeper = Sweeper(store, prefix, start=sweeper.sweep.place)
        sweeper.step(10)
        seen += sweeper.sweep.seen
    assert 50 <= seen <= 50 + 5


@pytest.mark.parametrize(
    "stored", [[f"session:tenant-1-000{n}" for n in range(6)], [f"session:{'ab' * 16}:{n}" for n in range(6)]]
)
def test_each_run_gets_on_however_many_keys_begin_alike(store: Store, prefix: str, stored: list[str]) -> None:
    store.put_many({f"{prefix}{key}".encode(): document(FUTURE) for key in stored})
    place: str | None = f"{prefix}session:@{prefix}session:{stored[0][8:14]}"
    for _ in range(20):
        before, place = place, sweep(store, prefix, batch=2, max_seconds=1e-9, start=place).place
        assert place != before
        if place is None:
            break
    assert place is None


@pytest.mark.parametrize(
    "place",
    ["", "nonsense", "session:", "@", "other:session:@", "session@x", "shop:session:@blog:session:", "shop:session:@x"],
)
def test_a_place_of_another_prefix_is_refused(place: str) -> None:
    if not place:
        assert sweep(MemoryStore(), start=place).place is None
        return
    with pytest.raises(ConfigurationError, match="is no place where a sweep of this prefix has ended"):
        sweep(MemoryStore(), "shop:", start=place)


def test_an_outage_at_any_call_loses_nothing_and_the_same_sweeper_goes_on() -> None:
    for n in itertools.count(1):
        store = FaultyStore(MemoryStore())
        store.put_many({session(number): document(PAST if number % 2 else FUTURE) for number in range(20)})
        store.fail(n)
        sweeper = Sweeper(store)
        for _ in range(2):
            try:
                list(sweeper.run(batch=4))
            except StoreUnavailable:
                assert not sweeper.done
        assert sweeper.done
        assert store.store.count() == 10
        if not store.has_failed:
            break


# -- the command


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["sweep", *arguments])


@pytest.fixture
def ini(options: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "app.ini"
    path.write_text(f"[app:main]\nbeaker.session.url = {options['url']}\nbeaker.session.prefix = {options['prefix']}\n")
    return str(path)


def test_the_command_takes_a_url_or_an_ini_file(store: Store, options: dict[str, Any], prefix: str, ini: str) -> None:
    for arguments in (
        [options["url"], "--prefix", prefix],
        ["--url", options["url"], "--prefix", prefix],
        [ini],
        ["--ini", ini],
    ):
        store.put(session(1, prefix), document())
        done = run(*arguments)
        assert done.exit_code == 0, done.output
        assert json.loads(done.output) == {
            "seen": 1,
            "expired": 1,
            "kinds": {"session": 1},
            "removed": 1,
            "changed": 0,
            "unreadable": 0,
            "place": None,
        }
        assert store.get(session(1, prefix)) is None


def test_the_command_stays_within_the_prefix_unless_told_otherwise(
    store: Store, options: dict[str, Any], prefix: str, ini: str
) -> None:
    store.put(session(1, f"{prefix}other."), document())
    assert json.loads(run(ini).output)["seen"] == 0
    assert json.loads(run(options["url"], "--all-prefixes", "--dry-run").output)["expired"] >= 1
    said = run(options["url"], "--all-prefixes", "--dry-run", "--no-json").output
    assert "prefixes that end in a letter or digit were left out" in said
    assert store.delete(session(1, f"{prefix}other."))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["memory:", "--url", "memory:"], "give one of them"),
        (["memory:", "--prefix", "a", "--all-prefixes"], "contradict each other"),
        (["{ini}", "--prefix", "a"], "leave the option out"),
        (["memory:", "--batch", "0"], "--batch"),
        (["memory:", "--margin", "nan"], "'nan' is no number of seconds"),
        (["memory:", "--max-seconds", "inf"], "'inf' is no number of seconds"),
    ],
)
def test_what_contradicts_itself_is_refused(ini: str, arguments: list[str], said: str) -> None:
    refused = run(*(argument.format(ini=ini) for argument in arguments))
    assert refused.exit_code == 2
    assert said in refused.output


def test_when_the_time_is_over_the_status_says_so_and_the_place_goes_on(store: Store, prefix: str, ini: str) -> None:
    store.put_many({session(number, prefix): document() for number in range(60)})
    place: list[str] = []
    for _ in range(100):
        done = run(ini, "--batch", "10", "--max-seconds", "1e-9", *place)
        found = json.loads(done.output)
        if found["place"] is None:
            break
        assert done.exit_code == 3
        place = ["--from", found["place"]]
    assert done.exit_code == 0
    assert content(store, prefix) == {}
    last = run(ini, "--no-json").output
    assert last == "0 of 0 records are expired; removed 0\n"


def test_an_outage_prints_how_far_it_came(tmp_path: Path) -> None:
    with ServerProcess() as server:
        open_store(server.url).put_many({session(number): document() for number in range(3000)})
        command = [sys.executable, "-m", "beaker_statestore", "sweep", server.url, "--batch", "5", "--json"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            wait_until(lambda: open_store(server.url).count() < 2900)
            server.kill()
            out, err = process.communicate(timeout=PATIENCE)
        assert process.returncode == 1
        assert 0 < json.loads(out)["removed"] < 3000
        assert json.loads(out)["place"].startswith("session:@session:")
        assert err.startswith(b"Error: ")


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_sweep_is_done_again(tmp_path: Path, number: signal.Signals) -> None:
    url = f"lmdb://{tmp_path}/state.lmdb"
    store = open_store(url)
    live = {session(number): document(FUTURE) for number in range(0, 3000, 3)}
    store.put_many({session(number): document() for number in range(3000)})
    store.put_many(live)
    command = [sys.executable, "-m", "beaker_statestore", "sweep", url, "--batch", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        wait_until(lambda: store.count() < 2900)
        process.send_signal(number)
        out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == (130 if number is signal.SIGINT else -number)
    left = store.count()
    assert len(live) < left < 2900
    start = json.loads(out)["place"] if number is signal.SIGINT else None
    found = sweep(store, start=start)
    assert found.removed == left - len(live)
    assert content(store, "") == live


# -- the server


@pytest.mark.parametrize("db", ["memory:", "lmdb:", "lmdb:sync=always"])
def test_the_server_sweeps_while_clients_work(tmp_path: Path, db: str) -> None:
    db = db if db == "memory:" else f"lmdb://{tmp_path}/state.lmdb?{db.partition(':')[2]}".rstrip("?")
    stays = {
        b"shop:session:x": document(FUTURE),
        b"cache:a:b": document(300),
        b"sessions:x": document(),
        b"state:x": b"no",
    }
    with ServerProcess(db, arguments=["--sweep", "0.1"]) as server:
        store = open_store(server.url)
        store.put_many(stays)
        written: dict[bytes, bytes] = {}
        for round_ in range(200):
            # What is touched just when it is swept must be there in the end, and what is not, gone.
            for number in range(10):
                key = session(number, "busy:")
                store.put(key, document(round=round_))
                if number % 2:
                    current = store.get(key)
                    written[key] = document(FUTURE, round=round_)
                    if not store.compare_and_swap(key, current, written[key]):
                        assert store.get(key) is None, "only a sweep can have been at it"
                        store.put(key, written[key])
        wait_until(lambda: content(store, "") == {**stays, **written})
        store.put(session(1, "new:"), document())
        wait_until(lambda: store.get(session(1, "new:")) is None)
        assert content(store, "") == {**stays, **written}


def test_a_server_stops_at_once_while_it_sweeps_and_goes_on_when_it_starts(tmp_path: Path) -> None:
    url = f"lmdb://{tmp_path}/state.lmdb"
    with open_store(url) as store:
        store.put_many({session(number): document() for number in range(20_000)})
    with ServerProcess(url) as server:
        there = open_store(server.url)
        wait_until(lambda: there.count() < 20_000)
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < 5
        with open_store(url) as store:
            left = store.count()
        assert left > 0, "it was done already"
        server.start()
        wait_until(lambda: there.count() < left)


@pytest.mark.long
def test_large_records_hold_no_client_up(tmp_path: Path) -> None:
    url = f"lmdb://{tmp_path}/state.lmdb"
    foreign = b'{"_expires": 4e9, "rows": [' + b'{"a": 1},' * 1_400_000 + b"{}]}"  # 12.6 MB, slow to parse
    with open_store(url) as store:
        store.put_many({b"cache:a:%05d" % number: document(FUTURE) for number in range(3000)})
        store.put_many({b"cache:b:%05d" % number: foreign for number in range(5)})
        store.put_many({b"cache:c:%05d" % number: document(FUTURE, x="x" * 1_000_000) for number in range(50)})
        store.put(b"cache:d:last", document())
    with ServerProcess(url) as server:
        there = open_store(server.url)
        longest = 0.0
        deadline = time.monotonic() + PATIENCE
        while there.get(b"cache:d:last") is not None:
            began = time.perf_counter()
            there.get(b"cache:a:00001")
            longest = max(longest, time.perf_counter() - began)
            assert time.monotonic() < deadline
    assert longest < 0.6  # the foreign ones alone would take more than a second each


def test_a_server_can_be_told_not_to_sweep(tmp_path: Path) -> None:
    with ServerProcess(arguments=["--sweep", "0"]) as server:
        open_store(server.url).put(session(1), document())
        assert "no expired documents (--sweep 0)" in server.output
    with ServerProcess(arguments=["--sweep", "5"]) as server:
        wait_until(lambda: "Every 5 s it removes expired documents" in server.output)
