"""What is counted, that it is counted exactly, and the shape in which it is shown."""

from __future__ import annotations

import ast
import gc
import itertools
import json
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from beaker.session import Session

import beaker_statestore
from beaker_statestore import observe, statistics
from beaker_statestore.exceptions import StateStoreError, StoreUnavailable
from beaker_statestore.statistics import EVENTS, Statistics, extrapolate_statistics, jsonable
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.testing import ServerProcess, fork, free_port

PATIENCE = 30.0


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> Iterator[Statistics]:
    """Statistics that are installed and have counted nothing."""
    monkeypatch.setattr(observe, "listener", observe.Listener())
    monkeypatch.setattr(logging, "statistics", {}, raising=False)
    yield statistics.install()
    statistics.own.namespace["Enabled"] = True


def shown(own: Statistics) -> dict[str, Any]:
    """The namespace as everybody sees it."""
    found: dict[str, Any] = extrapolate_statistics(logging.statistics)[statistics.NAMESPACE]  # type: ignore[attr-defined]
    return found


def in_threads(work: Callable[[int], object], number: int) -> None:
    """Do ``work`` in so many threads at once, and let them end."""
    threads = [threading.Thread(target=work, args=(n,)) for n in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


# -- exactness


def test_the_sums_of_a_hundred_threads_are_exact_while_they_count_and_after_they_ended(own: Statistics) -> None:
    rounds, done = 50, threading.Event()
    seen: list[int] = []

    def ask() -> None:
        while not done.is_set():
            seen.append(shown(own)["Total Operations"])

    def work(n: int) -> None:
        for _ in range(rounds):
            own.operation(
                "here", "get", own.clock(), hits=1, misses=2, sent=3, received=4, retries=1, failed=n % 2 == 0
            )
            observe.count("session.saved")
            observe.count("something.else", 2)

    asker = threading.Thread(target=ask)
    asker.start()
    try:
        for _ in range(3):
            in_threads(work, 100)
    finally:
        done.set()
        asker.join(PATIENCE)

    total = 3 * 100 * rounds
    figures = shown(own)
    assert seen == sorted(seen), "a count never falls, so nothing is ever missing while a thread is folded in"
    assert figures["Total Operations"] == figures["Hits"] == total
    assert figures["Misses"] == 2 * total
    assert figures["Errors"] == total / 2
    assert figures["Bytes Sent"] == 3 * total
    assert figures["Bytes Received"] == 4 * total
    assert figures["Sessions Saved"] == total
    assert figures["something.else"] == 2 * total
    assert figures["Servers"]["here"]["Retries"] == total
    assert figures["Operations"]["get"]["Count"] == total


def test_threads_that_have_ended_leave_no_cells_though_nobody_asks(own: Statistics) -> None:
    for _ in range(10):
        in_threads(lambda _: observe.count("session.saved"), 50)
    gc.collect()
    in_threads(lambda _: observe.count("session.saved"), 200)

    assert len(own._entries) < 400
    assert own.events()["session.saved"] == 700
    assert len(own._entries) <= 1 + threading.active_count()


def test_a_child_begins_anew_and_its_parent_goes_on(own: Statistics) -> None:
    observe.count("session.saved", 5)
    own.operation("here", "get", own.clock())

    def child() -> None:
        assert shown(own)["Sessions Saved"] == 0
        assert shown(own)["Operations"] == {}
        observe.count("session.saved")
        in_threads(lambda _: own.operation("here", "get", own.clock()), 3)
        assert shown(own)["Sessions Saved"] == 1
        assert shown(own)["Operations"]["get"]["Count"] == 3
        assert shown(own)["Process ID"] == os.getpid()

    with own._lock:  # as when another thread of the parent asks just then
        fork(child)
    assert shown(own)["Sessions Saved"] == 5
    assert shown(own)["Total Operations"] == 1


@pytest.mark.parametrize("seed", range(3))
def test_quantiles_are_off_by_less_than_a_tenth(own: Statistics, seed: int) -> None:
    generator = random.Random(seed)
    took = sorted(generator.lognormvariate(-7, 1.5 + seed / 2) for _ in range(2000))
    for seconds in took:
        own.operation("here", "get", time.perf_counter_ns() - int(seconds * 1e9))

    total = own.total(kind="get")
    assert total.count == 2000
    for share in (0.5, 0.9, 0.99):
        exact = took[int(share * 2000) - 1]
        assert total.quantile(share) == pytest.approx(exact, rel=0.1, abs=20e-6)
    assert total.longest == pytest.approx(took[-1], rel=0.01, abs=1e-4)
    assert total.quantile(1.0) <= total.longest


@pytest.mark.parametrize("seconds", [0.0, 1e-9, 200.0, 1e6])
def test_no_latency_is_too_short_or_too_long_to_be_counted(own: Statistics, seconds: float) -> None:
    own.operation("here", "get", time.perf_counter_ns() - int(seconds * 1e9))
    assert own.total().count == 1
    assert own.total().longest == pytest.approx(seconds, abs=1.0)
    assert shown(own)["Operations"]["get"]["Max (ms)"] == pytest.approx(1000 * seconds, abs=1000)


# -- the form


def test_the_form_is_that_of_the_specification(own: Statistics, store: Store) -> None:
    store.get(b"there is none")
    own.operation("slow", "get", own.clock() - 10**9)
    namespace = logging.statistics["beaker_statestore"]  # type: ignore[attr-defined]
    scalars = (bool, int, float, str)
    for name, value in namespace.items():
        assert isinstance(name, str)
        if isinstance(value, dict):
            for record in value.values():
                assert isinstance(record, dict)
                assert all(callable(member) or isinstance(member, scalars) for member in record.values())
                assert all(isinstance(m(record), scalars) for m in record.values() if callable(m))
        else:
            assert callable(value) or isinstance(value, scalars)
    assert json.loads(json.dumps(shown(own), sort_keys=True, default=None)) is not None
    assert isinstance(namespace["Start Time"], float)
    assert namespace["Enabled"] is True


def test_nothing_is_divided_by_zero_before_anything_has_happened() -> None:
    figures = extrapolate_statistics(Statistics().namespace)
    assert figures["Hit Ratio"] == 0
    assert figures["Operations/Second"] == 0
    assert figures["Uptime (Seconds)"] > 0


def test_installing_twice_changes_nothing_and_others_statistics_stay(own: Statistics) -> None:
    logging.statistics["Another"] = {"Hits": 1}  # type: ignore[attr-defined]
    observe.count("session.saved")
    namespace = logging.statistics["beaker_statestore"]  # type: ignore[attr-defined]
    assert statistics.install() is own
    assert observe.listener is own
    assert logging.statistics["beaker_statestore"] is namespace  # type: ignore[attr-defined]
    assert extrapolate_statistics(logging.statistics)["Another"] == {"Hits": 1}  # type: ignore[attr-defined]
    assert shown(own)["Sessions Saved"] == 1


def test_what_is_not_enabled_is_reported_but_no_longer_counted(own: Statistics, store: Store) -> None:
    store.get(b"a")
    before = shown(own)
    own.namespace["Enabled"] = False
    store.get(b"a")
    observe.count("session.saved")
    after = shown(own)
    assert after["Total Operations"] == before["Total Operations"] == 1
    assert after["Sessions Saved"] == 0
    own.namespace["Enabled"] = True
    store.get(b"a")
    assert shown(own)["Total Operations"] == 2


def test_slow_operations_are_listed_the_last_ones_and_without_what_they_were_about(own: Statistics) -> None:
    for n in range(120):
        own.operation("here", f"get{n % 2}", own.clock() - 10**9 * (n + 1), failed=n % 3 == 0)
    own.operation("here", "get", own.clock())
    own.operation("here", "wait", own.clock() - 10**10)
    slow = shown(own)["Slow Operations"]
    assert len(slow) == 50
    assert [round(record["Seconds"]) for record in slow.values()] == list(range(71, 121))
    assert set(slow[120]) == {"When", "Server", "Kind", "Seconds", "Failed"}


@pytest.mark.parametrize("name", ["Slow Operations", "Servers", "Operations", "Enabled"])
def test_whatever_others_remove_counting_never_raises(own: Statistics, name: str) -> None:
    del own.namespace[name]
    own.operation("here", "get", own.clock() - 10**9)
    observe.count("session.saved")
    assert own.total().count == (name != "Enabled")
    own.begin()
    assert name in own.namespace


def test_it_can_be_read_while_it_is_being_folded(own: Statistics) -> None:
    in_threads(lambda _: observe.count("session.saved"), 20)
    gc.collect()
    read: list[int] = []

    def again() -> object:
        # As a signal handler would, in the middle of it.
        read.append(statistics.snapshot()["Sessions Saved"])
        return None

    with own._lock:
        for entry in own._entries[1:]:
            own._entries[own._entries.index(entry)] = entry._replace(life=again)
    assert statistics.snapshot()["Sessions Saved"] == 20
    assert set(read) == {20}
    assert own.events()["session.saved"] == 20


def test_servers_and_kinds_without_end_take_no_memory_without_end(own: Statistics) -> None:
    for n in range(1000):
        own.operation(f"server {n}", f"kind {n}", own.clock())
    figures = shown(own)
    assert len(figures["Servers"]) == len(figures["Operations"]) == 101
    assert figures["Operations"]["other"]["Count"] == 900
    assert figures["Total Operations"] == 1000


def test_every_event_that_the_package_tells_has_a_name_for_people() -> None:
    told = set()
    for path in Path(beaker_statestore.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "observe.count":
                names = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                told |= {name for name in names if isinstance(name, str) and "." in name}
    assert told == EVENTS.keys()
    assert len({event.name for event in EVENTS.values()}) == len(EVENTS)


def test_the_page_of_the_manual_explains_every_figure(own: Statistics) -> None:
    own.operation("here", "get", own.clock() - 10**9)
    manual = (Path(__file__).parent.parent / "docs" / "statistics.rst").read_text()
    figures = shown(own)
    names = {*figures, *figures["Operations"]["get"], *figures["Servers"]["here"], *figures["Slow Operations"][1]}
    assert [name for name in sorted(names) if f"``{name}``" not in manual] == []


# -- what happens in the package


def test_a_store_tells_what_is_done_with_it(own: Statistics, options: dict[str, Any], store: Store) -> None:
    key = options["prefix"].encode()
    store.put(key, b"value")
    assert store.get(key) == b"value"
    assert store.get(key + b"2") is None
    assert store.get_many([key, key + b"2", key + b"3", key, key + b"2"]) == {key: b"value"}
    assert store.compare_and_swap(key, b"value", b"other")
    assert not store.add(key, b"value")
    assert store.delete(key)

    figures = shown(own)
    kinds = {
        kind: (record["Count"], record["Hits"], record["Misses"], record["Errors"])
        for kind, record in figures["Operations"].items()
        if kind != "connect"
    }
    assert kinds == {
        "put": (1, 0, 0, 0),
        "get": (2, 1, 1, 0),
        "get_many": (1, 1, 2, 0),
        "compare_and_swap": (1, 0, 0, 0),
        "add": (1, 0, 0, 0),
        "delete": (1, 0, 0, 0),
    }
    assert (figures["Total Operations"], figures["Hits"], figures["Misses"]) == (7, 2, 3)
    ((name, server),) = figures["Servers"].items()
    assert server["Operations"] == 7
    if options["url"] == "memory:":
        assert name == "MemoryStore"
    else:
        assert name == options["url"].removeprefix("tyrant://")
        assert figures["Operations"]["get"]["Bytes Sent"] == 2 * (2 + 4 + len(key)) + 1
        assert figures["Operations"]["get"]["Bytes Received"] == (1 + 4 + len("value")) + 1


def test_a_servers_pool_is_seen(own: Statistics, tyrant_server: ServerProcess) -> None:
    with open_store(f"tyrant://{tyrant_server.url}?pool_size=2") as store:
        store.ping()
        ((_, server),) = shown(own)["Servers"].items()
        assert server["Connections Opened"] == 1
        assert server["Connections Open"] >= 1
        assert server["Pool Size"] >= 2
        pool = store._client.pool  # type: ignore[attr-defined]
        lent = [pool.acquire(time.monotonic() + PATIENCE) for _ in range(2)]
        waiting = threading.Thread(target=store.ping)
        waiting.start()
        end = time.monotonic() + PATIENCE
        while pool.gauges()["waiting"] != 1 and time.monotonic() < end:
            time.sleep(0.001)
        assert pool.gauges() == {"open": 2, "idle": 0, "size": 2, "waiting": 1}
        for connection in lent:
            pool.release(connection)
        waiting.join(PATIENCE)
        assert pool.gauges() == {"open": 2, "idle": 2, "size": 2, "waiting": 0}


def test_failures_are_counted_where_they_happen(own: Statistics) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    with open_store(nobody) as store:
        with pytest.raises(StoreUnavailable):
            store.get(b"a")
        store.close()
        with pytest.raises(StateStoreError):
            store.put(b"a", b"")
        with pytest.raises(StateStoreError):
            store.compare_and_swap(b"a", None, b"")
    figures = shown(own)
    kinds = {kind: (record["Count"], record["Errors"]) for kind, record in figures["Operations"].items()}
    assert kinds == dict.fromkeys(("connect", "get", "put", "compare_and_swap"), (1, 1))
    assert figures["Servers"][nobody]["Errors"] == figures["Servers"][nobody]["Operations"] == 3
    assert figures["Total Operations"] == figures["Errors"] == 3
    assert figures["Servers"][nobody]["Connections Opened"] == 0


def test_a_request_that_is_sent_again_is_one_operation_and_a_retry(own: Statistics) -> None:
    with ServerProcess("memory:") as server, open_store(server.url) as store:
        store.ping()
        connection = store._client.pool._idle[0]  # type: ignore[attr-defined]
        connection.is_alive = lambda: True
        connection._transport.close()
        store.get(b"a")
        ((_, record),) = shown(own)["Servers"].items()
    assert (record["Operations"], record["Retries"], record["Errors"]) == (2, 1, 0)
    assert shown(own)["Retries"] == 1


def test_a_local_file_is_timed_and_a_servers_batches_are_not(own: Statistics, tmp_path: Path) -> None:
    with LMDBStore(tmp_path / "s.lmdb") as store:
        store.get(b"a")
        store.apply([lambda verbs: verbs.get(b"a"), lambda verbs: verbs.get(b"b")])
        figures = shown(own)
        assert figures["Servers"][str(tmp_path / "s.lmdb")]["Operations"] == 1
        assert figures["Misses"] == 1


def test_sessions_tell_what_became_of_their_saves(own: Statistics, options: dict[str, Any]) -> None:
    def session(session_id: str | None = None) -> Any:
        return Session({}, id=session_id, type="ext:tcjson", use_cookies=False, data_serializer="json", **options)

    first = session()
    first["a"] = 1
    first.save()
    one, other = session(first.id), session(first.id)
    one["b"] = 1
    one.save()
    other["c"] = 2
    other.save()
    again = session(first.id)
    again.save(accessed_only=True)
    figures = shown(own)
    assert figures["Sessions Saved"] == 3
    assert figures["Sessions Merged"] == 1
    assert figures["Writes Avoided"] + figures["Touches Written"] == 1
    assert first.id not in json.dumps(figures)


# -- extrapolation


def test_extrapolation_copies_and_calls_with_the_enclosing_dictionary() -> None:
    original: dict[str, Any] = {
        "Mine": {
            "Hits": 3,
            "Twice": lambda scope: 2 * scope["Hits"],
            "Servers": {"a": {"N": 2, "Half": lambda scope: scope["N"] / 2}},
            "List": [{"N": 5, "Same": lambda scope: scope["N"]}],
        }
    }
    copy = extrapolate_statistics(original)
    assert copy == {
        "Mine": {"Hits": 3, "Twice": 6, "Servers": {"a": {"N": 2, "Half": 1.0}}, "List": [{"N": 5, "Same": 5}]}
    }
    copy["Mine"]["Servers"]["a"]["N"] = 0
    assert original["Mine"]["Servers"]["a"]["N"] == 2


def test_extrapolation_takes_what_cpstats_does_not() -> None:
    around: dict[str, Any] = {"Scalars": [1, "two", 3.0], "Bad": lambda scope: scope["none"], "Worse": lambda: 1}
    around["Itself"] = around
    figures = extrapolate_statistics({"Other": around})["Other"]
    assert figures["Scalars"] == [1, "two", 3.0]
    assert figures["Bad"] == "KeyError: 'none'"
    assert figures["Worse"].startswith("TypeError: ")
    assert "..." in json.dumps(figures)


def test_extrapolation_ends_whatever_refers_to_what() -> None:
    knot: dict[Any, Any] = {}
    knot.update(dict.fromkeys(range(4), knot))
    assert jsonable(extrapolate_statistics({"knot": knot})) == {"knot": {str(n): "..." for n in range(4)}}
    assert jsonable({"knot": knot}) == {"knot": {str(n): "..." for n in range(4)}}
    # Nothing here contains itself, and still it is 10 ** 10 members.
    bush: Any = 1
    for _ in range(10):
        bush = dict.fromkeys(range(10), bush)
    for copy in (extrapolate_statistics(bush), jsonable(bush)):
        assert len(json.dumps(copy)) < 10_000_000
        assert copy["..."] == "..."
    shared = {"N": 1}
    assert extrapolate_statistics({"a": shared, "b": [shared]}) == {"a": shared, "b": [shared]}


class RudeError(Exception):
    def __str__(self) -> str:
        raise SystemExit(1)


class Rude:
    @property  # type: ignore[misc]
    def __class__(self) -> type:
        raise RudeError


class RudeList(list[Any]):
    def __iter__(self) -> Any:
        raise RudeError


class RudeDict(dict[Any, Any]):
    def keys(self) -> Any:
        raise RudeError

    __iter__ = keys


class EndlessList(list[Any]):
    def __iter__(self) -> Any:
        return itertools.count()


def test_no_value_is_rude_enough_to_end_the_report() -> None:
    def leave(_scope: Any) -> None:
        raise SystemExit(3)

    rude = {"a": Rude(), "b": RudeList(), "c": RudeDict({1: 1}), "d": leave, "e": EndlessList(), "f": 1}
    for figures in (jsonable(extrapolate_statistics({"Rude": rude, "After": 2})), jsonable({"Rude": rude, "After": 2})):
        json.dumps(figures)
        assert figures["Rude"]["a"] == figures["Rude"]["b"] == figures["Rude"]["c"] == "RudeError"
        assert figures["Rude"]["e"][-1] == "..."
    assert extrapolate_statistics({"d": leave}) == {"d": "SystemExit: 3"}


def test_extrapolation_stands_others_who_change_what_it_reads() -> None:
    scope: dict[str, Any] = {"Records": {}}
    done = threading.Event()

    def change() -> None:
        n = 0
        while not done.is_set():
            n += 1
            scope["Records"][n] = {"N": n, "Twice": lambda own: 2 * own["N"]}
            scope["Records"].pop(n - 100, None)

    changing = threading.Thread(target=change)
    changing.start()
    try:
        end = time.monotonic() + 0.2
        while time.monotonic() < end:
            found = extrapolate_statistics(scope)["Records"]
            assert all(record["Twice"] == 2 * n for n, record in found.items())
    finally:
        done.set()
        changing.join(PATIENCE)


def test_a_snapshot_has_nothing_that_json_lacks(own: Statistics) -> None:
    own.operation("here", "get", own.clock() - 10**9)
    text = json.dumps(statistics.snapshot(), sort_keys=True, allow_nan=False)
    assert json.loads(text)["Slow Operations"]["1"]["Kind"] == "get"

    class Rude:
        def __str__(self) -> str:
            raise ValueError("no")

    odd = {1: float("nan"), "b": b"\xff", "c": {2}, "d": Rude(), "e": 10**5000, "f": float("-inf"), (1, 2): None}
    assert json.loads(json.dumps(jsonable(odd), sort_keys=True, allow_nan=False)) == {
        "1": None,
        "b": "\\xff",
        "c": [2],
        "d": "ValueError: no",
        "e": jsonable(odd["e"]),
        "f": None,
        "(1, 2)": None,
    }
