"""Slates: documents that are committed one by one, and tokens that end when they should, on whatever store."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
import re
import secrets
import string
import sys
import threading
import time
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from salmon import queue, routing
from salmon.server import SMTPReceiver

from beaker_statestore import tokens
from beaker_statestore.exceptions import (
    ConfigurationError,
    Conflict,
    ContentionError,
    DocumentError,
    DocumentRefusedError,
    OutcomeUnknown,
    StoreUnavailable,
    ValueTooLargeError,
)
from beaker_statestore.router import install
from beaker_statestore.slates import Slate, Slates
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.sweeper import sweep
from beaker_statestore.testing import FaultyStore, ServerProcess
from tests.rivals import Overtaken

#: Seconds until a test gives up waiting.
PATIENCE = 20.0

_numbers = itertools.count(1)


@pytest.fixture(params=["memory", "tyrant", "lmdb"])
def options(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """As everywhere, and also a file of this process's own."""
    if request.param == "lmdb":
        url = f"lmdb://{tmp_path_factory.getbasetemp()}/slates.lmdb"
    else:
        url = "memory:" if request.param == "memory" else request.getfixturevalue("tyrant_server").url
    return {"url": url, "prefix": f"slates{next(_numbers)}."}


@pytest.fixture
def slates(options: dict[str, Any]) -> Slates:
    return Slates(options["url"], prefix=options["prefix"])


@pytest.fixture
def slate(slates: Slates) -> Slate:
    return slates["zed"]


@pytest.fixture
def faulty() -> FaultyStore:
    return FaultyStore(open_store("memory:slate-faults"))


class Clock:
    """What `time.time` says, as far on as a test wants."""

    def __init__(self) -> None:
        self.ahead = 0.0
        self._time = time.time

    def __call__(self) -> float:
        return self._time() + self.ahead


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


#: Names of anybody and anything; "_auth" and "_tokens" are namespaces of ours.
ODD = ["zed", "_auth", "_tokens", "%5Fauth", "", ":", "zed:user", "a:b%3Ac", "nul\x00 and\n", "lone \udcff", "é" * 900]


# Reading and writing


def test_nothing_is_there_at_first(slate: Slate) -> None:
    assert slate.user == {}
    assert slate.get("new_id_set") is None
    assert slate.get("new_id_set", 7) == 7
    assert "new_id_set" not in slate
    assert slate.names() == []
    with pytest.raises(KeyError, match="new_id_set"):
        slate["new_id_set"]
    with pytest.raises(KeyError, match="new_id_set"):
        del slate["new_id_set"]


def test_documents_are_written_and_read_one_by_one(slate: Slate) -> None:
    slate["user"] = {"name": "Zed", "langs": ["py"]}
    slate["new_id_set"] = {"addresses": []}
    assert slate.user == {"name": "Zed", "langs": ["py"]}
    assert slate["new_id_set"] == {"addresses": []}
    assert slate.names() == ["new_id_set", "user"]
    slate["new_id_set"] = {"other": 1}
    assert slate["new_id_set"] == {"other": 1}
    del slate["user"]
    assert slate.names() == ["new_id_set"]
    slate.clear()
    assert "new_id_set" not in slate


def test_to_change_what_was_read_fails_at_once(slates: Slates, slate: Slate) -> None:
    slate["user"] = {"name": "Zed"}
    for document in (slate.user, slate["user"], slate.setdefault("user", {"a": 1}), slates["nobody"].user):
        with pytest.raises(TypeError):
            document["name"] = "Ada"  # type: ignore[index]
    slate.increment("user", "n")
    assert slate.user == {"name": "Zed", "n": 1}


def test_an_empty_document_is_as_good_as_none(slate: Slate, store: Store, options: dict[str, Any]) -> None:
    slate["a"] = {"x": 1}
    slate["a"] = {}
    assert "a" not in slate
    assert slate.setdefault("a", {}) == {}
    assert list(store.keys(options["prefix"].encode())) == []


def test_what_is_stored_is_the_document(slate: Slate, store: Store, options: dict[str, Any]) -> None:
    slate["user"] = {"name": "Zed"}
    (key,) = store.keys(options["prefix"].encode())
    assert key == f"{options['prefix']}slate:zed:user".encode()
    stored = json.loads(store.get(key) or b"")
    assert stored == {"name": "Zed", "_commit": stored["_commit"]}


@pytest.mark.parametrize("name", ODD)
def test_a_user_and_a_document_may_be_called_anything(slates: Slates, name: str) -> None:
    for user in ODD:
        slates[user]["which"] = {"user": ascii(user)}
    mine = slates[name]
    mine[name] = {"x": 1}
    token = slates.auth.issue(name)
    assert mine[name] == {"x": 1}
    assert slates.auth.check(token) == name
    assert mine.names() == sorted(["which", name])
    assert {ascii(user): slates[user]["which"]["user"] for user in ODD} == {ascii(u): ascii(u) for u in ODD}
    mine.clear()
    assert mine.names() == []
    assert slates.auth.check(token) == name
    assert all(slates[user].names() == ["which"] for user in ODD if user != name)


def test_names_are_text_and_not_endless(slates: Slates) -> None:
    for name in (None, 7, b"zed"):
        with pytest.raises(TypeError, match="has to be a str"):
            slates[name]  # type: ignore[index]
        with pytest.raises(TypeError, match="has to be a str"):
            slates["zed"][name]  # type: ignore[index]
    long = "x" * 1001
    for function in (slates.__getitem__, slates["zed"].get, slates["zed"].pop, slates.auth.issue):
        with pytest.raises(ValueTooLargeError, match="1,001 characters"):
            function(long)


def test_slates_are_kept_apart_by_user_and_by_prefix(slates: Slates, options: dict[str, Any]) -> None:
    neighbours = Slates(options["url"], prefix=options["prefix"] + "x.")
    for one in (slates["zed"], slates["ada"], neighbours["zed"]):
        one["a"] = {"x": 1}
    slates["zed"].clear()
    assert slates["zed"].names() == []
    assert slates["ada"].names() == neighbours["zed"].names() == ["a"]


def test_an_ini_file_says_where_they_are(options: dict[str, Any], slate: Slate, tmp_path: Path) -> None:
    ini = tmp_path / "development.ini"
    ini.write_text(f"[app:main]\nbeaker.session.url = {options['url']}\nbeaker.session.prefix = {options['prefix']}\n")
    slate["a"] = {"x": 1}
    assert Slates.from_settings(ini)["zed"]["a"] == {"x": 1}
    with pytest.raises(ConfigurationError, match="url is not set"):
        Slates.from_settings({})


def test_a_slate_makes_no_round_trip_and_a_read_makes_one(faulty: FaultyStore) -> None:
    faulty.fail(1, for_good=True)
    slate = Slates(faulty)["zed"]
    assert faulty.calls == []
    with pytest.raises(StoreUnavailable):
        _ = slate.user
    faulty.heal()
    faulty.calls.clear()
    _ = slate.user
    assert faulty.calls == ["get"]


@pytest.mark.parametrize("write", ["put", "edit", "modify", "append", "setdefault"])
@pytest.mark.parametrize(
    ("value", "message"),
    [(b"x", r"slate\['a'\]\['f'\].* is bytes"), (float("nan"), "is nan"), ("\udcff", "lone surrogate")],
)
def test_what_json_cannot_hold_is_refused_by_name(slate: Slate, write: str, value: Any, message: str) -> None:
    with pytest.raises(DocumentRefusedError, match=message):
        writing(slate, write, "f", value)
    assert slate.names() == []


@pytest.mark.parametrize(("document", "kind"), [([("a", 1)], "a list"), ("text", "a str"), (None, "a NoneType")])
def test_a_document_has_to_be_a_mapping(slate: Slate, document: Any, kind: str) -> None:
    for write in (slate.__setitem__, slate.setdefault):
        with pytest.raises(DocumentRefusedError, match=f"^the document 'a' has to be a mapping, not {kind}$"):
            write("a", document)
    assert slate.names() == []


@pytest.mark.parametrize("write", ["put", "edit", "modify", "append", "setdefault"])
def test_our_own_fields_names_are_refused(slate: Slate, write: str) -> None:
    with pytest.raises(DocumentRefusedError, match="_expires"):
        writing(slate, write, "_expires", 7)
    assert slate.names() == []


def writing(slate: Slate, write: str, field: str, value: Any) -> None:
    if write == "put":
        slate["a"] = {field: value}
    elif write == "edit":
        with slate.edit("a") as document:
            document[field] = value
    elif write == "modify":
        slate.modify("a", lambda document: document.update({field: value}))
    elif write == "append":
        slate.append("a", field, value)
    else:
        slate.setdefault("a", {field: value})


def test_a_large_document_is_refused(options: dict[str, Any]) -> None:
    slate = Slates(options["url"], prefix=options["prefix"], max_value=1000)["zed"]
    for write in ("put", "edit", "modify", "append", "setdefault"):
        with pytest.raises(ValueTooLargeError, match="1,000 bytes"):
            writing(slate, write, "f", "x" * 1000)
    assert slate.names() == []


def test_what_is_stored_can_be_sealed(options: dict[str, Any], store: Store) -> None:
    key = secrets.token_hex(32)
    slates = Slates(options["url"], prefix=options["prefix"], store_key=key)
    with slates["zed"].edit("a", lifetime=60) as document:
        document["secret"] = "swordfish"
    slates["zed"].increment("a", "n")
    token = slates.auth.issue("zed")
    assert slates["zed"]["a"] == {"secret": "swordfish", "n": 1}
    assert slates.auth.check(token) == "zed"
    stored = store.get_many(list(store.keys(options["prefix"].encode())))
    assert len(stored) == 3
    assert all(b"swordfish" not in value and b'"user"' not in value for value in stored.values())


# Editing


def test_an_edit_commits_what_changed(slate: Slate) -> None:
    with slate.edit("a") as document:
        assert document == {}
        document["list"] = [1]
        document["x"] = 1
    with slate.edit("a") as document:
        document["list"].append(2)
        del document["x"]
    assert slate["a"] == {"list": [1, 2]}
    with slate.edit("a") as document:
        document.clear()
    assert "a" not in slate


def test_two_who_edit_different_fields_both_succeed(slate: Slate, counted: Counter[str]) -> None:
    slate["a"] = {"x": 1, "y": 1, "z": 1}
    with slate.edit("a") as mine, slate.edit("a") as yours:
        mine["x"] = 2
        mine["new"] = [1]
        yours["y"] = 2
        del yours["z"]
    assert slate["a"] == {"x": 2, "y": 2, "new": [1]}
    assert counted["slates.committed"] == counted["slates.merged"] == 1


def test_two_who_begin_the_same_document_both_succeed(slate: Slate) -> None:
    with slate.edit("a") as mine, slate.edit("a") as yours:
        mine["x"] = 1
        yours["y"] = 1
    assert slate["a"] == {"x": 1, "y": 1}


def test_two_who_change_the_same_field_conflict(slate: Slate, counted: Counter[str]) -> None:
    slate["a"] = {"x": 1, "y": 1, "z": 1}

    def overlapping() -> None:
        with slate.edit("a") as mine:
            mine.update(x=2, y=2, z=2, new=1)
            with slate.edit("a") as yours:
                yours.update(x=3, y=3)

    with pytest.raises(Conflict) as raised:
        overlapping()
    assert raised.value.fields == ("x", "y")
    assert slate["a"] == {"x": 3, "y": 3, "z": 1}
    assert counted["slates.conflicts"] == 1


def test_two_who_count_to_the_same_number_conflict(slate: Slate) -> None:
    slate["a"] = {"n": 1}

    def overlapping() -> None:
        with slate.edit("a") as mine, slate.edit("a") as yours:
            mine["n"] += 1
            yours["n"] += 1

    with pytest.raises(Conflict, match="'n'"):
        overlapping()
    assert slate["a"] == {"n": 2}


def test_what_sessions_call_times_are_fields_like_any_others(slate: Slate) -> None:
    slate["moved"] = {"_creation_time": 10.0, "_accessed_time": 10.0, "x": 1}
    with slate.edit("moved") as document:
        document["_accessed_time"] = 5.0
        del document["_creation_time"]
    assert slate["moved"] == {"_accessed_time": 5.0, "x": 1}
    with slate.edit("moved") as document:
        document.clear()
    assert "moved" not in slate


def test_two_may_remove_the_same_field(slate: Slate) -> None:
    slate["a"] = {"x": 1, "y": 1}
    with slate.edit("a") as mine, slate.edit("a") as yours:
        del mine["x"]
        del yours["x"]
    assert slate["a"] == {"y": 1}


def test_a_document_that_was_removed_meanwhile_is_not_brought_back(slate: Slate) -> None:
    slate["a"] = {"x": 1}

    def late() -> None:
        with slate.edit("a") as document:
            document["y"] = 1
            slate.pop("a")

    with pytest.raises(Conflict, match="'x', 'y'"):
        late()
    assert "a" not in slate


def test_two_may_remove_the_same(slate: Slate) -> None:
    slate["a"] = {"x": 1}
    with slate.edit("a") as document:
        document.clear()
        slate.pop("a")
    assert "a" not in slate


def test_an_exception_writes_nothing(slate: Slate) -> None:
    slate["a"] = {"x": 1}

    def broken() -> None:
        with slate.edit("a") as document:
            document["x"] = 2
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert slate["a"] == {"x": 1}


def test_to_change_nothing_writes_nothing(faulty: FaultyStore) -> None:
    slate = Slates(faulty)["nobody"]
    slate["a"] = {"x": [1]}
    faulty.calls.clear()
    with slate.edit("a", lifetime=60) as document:
        document["x"] = [1]
    slate.modify("a", lambda document: document.update(x=[1]))
    assert faulty.calls == ["get", "get"]
    faulty.calls.clear()
    with slate.edit("a") as document:
        document["x"].append(2)
    assert faulty.calls == ["get", "compare_and_swap"]


def test_a_function_runs_again_until_it_was_the_only_one(slate: Slate) -> None:
    slate["a"] = {"left": 10, "taken": 0}
    runs = []

    def take(document: dict[str, Any]) -> None:
        runs.append(dict(document))
        if len(runs) < 3:
            slate.increment("a", "left", -1)
        document["left"] -= 1
        document["taken"] += 1

    assert slate.modify("a", take) == {"left": 7, "taken": 1}
    assert [run["left"] for run in runs] == [10, 9, 8]
    assert slate["a"] == {"left": 7, "taken": 1}


def test_a_function_runs_so_often_and_no_more(slate: Slate) -> None:
    slate["a"] = {"left": 10}
    runs = []

    def take(document: dict[str, Any]) -> None:
        runs.append(slate.increment("a", "left", -1))
        document["left"] -= 1

    with pytest.raises(Conflict) as raised:
        slate.modify("a", take, tries=3)
    assert raised.value.fields == ("left",)
    assert slate["a"] == {"left": 7}
    assert len(runs) == 3
    with pytest.raises(ValueError, match="at least once"):
        slate.modify("a", take, tries=0)


# Single steps


def in_threads(number: int, function: Callable[[int], object]) -> list[Any]:
    start = threading.Barrier(number)
    results: list[Any] = []

    def run(which: int) -> None:
        start.wait(10)
        results.append(function(which))

    threads = [threading.Thread(target=run, args=(which,)) for which in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
    assert len(results) == number
    return results


def test_of_many_who_pop_one_gets_it(slate: Slate) -> None:
    slate["task"] = {"x": 1}
    popped = in_threads(8, lambda _: slate.pop("task", None))
    assert [document for document in popped if document is not None] == [{"x": 1}]
    with pytest.raises(KeyError, match="task"):
        slate.pop("task")


def test_all_who_set_a_default_see_the_same(slate: Slate) -> None:
    seen = in_threads(8, lambda which: dict(slate.setdefault("a", {"by": which})))
    assert len({document["by"] for document in seen}) == 1
    assert slate["a"] == seen[0]


def test_nobody_gets_the_same_number(slate: Slate) -> None:
    assert sorted(in_threads(8, lambda _: slate.increment("a", "n"))) == list(range(1, 9))
    assert slate.increment("a", "n", -8) == 0
    assert slate.increment("a", "part", 0.5) == 0.5
    assert slate["a"] == {"n": 0, "part": 0.5}


def test_nothing_appended_is_lost(slate: Slate) -> None:
    assert sorted(in_threads(8, lambda which: slate.append("a", "list", {"by": which}))) == list(range(1, 9))
    assert sorted(item["by"] for item in slate["a"]["list"]) == list(range(8))


@pytest.mark.parametrize("value", ["7", None, True, [1], {"a": 1}])
def test_a_field_that_does_not_fit_is_named(slate: Slate, value: Any) -> None:
    slate["a"] = {"n": value}
    with pytest.raises(DocumentError, match=r"slate\['a'\]\['n'\] is .*, not a number"):
        slate.increment("a", "n")
    if not isinstance(value, list):
        with pytest.raises(DocumentError, match=r"slate\['a'\]\['n'\] is .*, not a list"):
            slate.append("a", "n", 1)
    with pytest.raises(TypeError, match="give a number"):
        slate.increment("a", "n", by="1")  # type: ignore[arg-type]
    assert slate["a"] == {"n": value}


# Expiry


def test_documents_expire_only_if_asked_to(slate: Slate, clock: Clock) -> None:
    slate["a"] = {"x": 1}
    slate.put("b", {"x": 1}, lifetime=100)
    slate.setdefault("c", {"x": 1}, lifetime=100)
    slate.increment("d", "x", lifetime=100)
    slate.append("e", "x", 1, lifetime=100)
    slate.modify("f", lambda document: document.update(x=1), lifetime=100)
    with slate.edit("g", lifetime=100) as document:
        document["x"] = 1
    clock.ahead = 99
    assert slate.names() == list("abcdefg")
    clock.ahead = 101
    assert slate.names() == ["a"]
    clock.ahead = 10**9
    assert slate.names() == ["a"]
    assert "b" not in slate
    assert slate.increment("d", "x") == 1


def test_a_lifetime_is_kept_unless_another_is_given(slate: Slate, clock: Clock) -> None:
    def edit(name: str, **more: Any) -> None:
        with slate.edit(name, **more) as document:
            document["x"] = document.get("x", 0) + 1

    for name in "abcde":
        slate.put(name, {"x": 1}, lifetime=100)
    clock.ahead = 50
    edit("a")
    edit("b", lifetime=100)
    edit("c", lifetime=None)
    slate.increment("d", "x")
    slate["e"] = {"x": 1}
    clock.ahead = 101
    assert slate.names() == ["b", "c", "e"]
    clock.ahead = 151
    assert slate.names() == ["c", "e"]


def test_touching_renews(slate: Slate, clock: Clock) -> None:
    assert not slate.touch("a", 100)
    slate.put("a", {"x": 1}, lifetime=100)
    clock.ahead = 50
    assert slate.touch("a", 100)
    clock.ahead = 149
    assert slate["a"] == {"x": 1}
    assert slate.touch("a", None)
    clock.ahead = 10**9
    assert slate["a"] == {"x": 1}
    assert slate.touch("a", 1)
    clock.ahead += 2
    assert "a" not in slate
    assert not slate.touch("a", 100)


def test_touching_again_and_again_only_reads(faulty: FaultyStore, clock: Clock) -> None:
    slate = Slates(faulty)["toucher"]
    slate.put("a", {"x": 1}, lifetime=100)
    slate["b"] = {"x": 1}
    for ahead, name, lifetime, calls in [
        (9, "a", 100, ["get"]),
        (11, "a", 100, ["get", "compare_and_swap"]),
        (12, "a", 50, ["get", "compare_and_swap"]),
        (12, "b", None, ["get"]),
        (12, "b", 10, ["get", "compare_and_swap"]),
    ]:
        clock.ahead = ahead
        faulty.calls.clear()
        assert slate.touch(name, lifetime)
        assert faulty.calls == calls


def test_an_expiry_takes_nothing_from_an_edit_under_way(
    slate: Slate, store: Store, options: dict[str, Any], clock: Clock
) -> None:
    slate.put("a", {"x": 1, "y": 1}, lifetime=100)
    with slate.edit("a") as document, slate.edit("a") as another:
        document["y"] = 2
        another["x"] = 2
        clock.ahead = 101
        assert "a" not in slate
        assert slate.names() == []
        assert slate.pop("a", None) is None
        assert not slate.touch("a", 100)
        clock.ahead = 3600
        assert sweep(store, options["prefix"]).removed == 0
    assert slate["a"] == {"x": 2, "y": 2}
    clock.ahead += 3500
    with slate.edit("a", lifetime=100) as document:
        document["y"] = 3
        clock.ahead += 200
    assert slate["a"] == {"x": 2, "y": 3}
    clock.ahead += 101
    assert "a" not in slate
    assert sweep(store, options["prefix"]).removed == 0
    clock.ahead += 3700
    assert sweep(store, options["prefix"]).removed == 1


@pytest.mark.parametrize("write", ["put", "edit", "modify", "append", "setdefault"])
def test_what_has_expired_and_what_comes_next_are_two(slate: Slate, clock: Clock, write: str) -> None:
    slate.put("a", {"x": 1}, lifetime=100)

    def late() -> None:
        with slate.edit("a") as document:
            clock.ahead = 101
            writing(slate, write, "f", 7)
            document["x"] = 2

    with pytest.raises(Conflict):
        late()
    assert slate["a"] == {"f": [7] if write == "append" else 7}
    clock.ahead = 10**6
    assert "a" in slate, "the new one has not the old one's lifetime"


@pytest.mark.parametrize("ahead", [101, 101 + 3600])
@pytest.mark.parametrize("removed", [False, True])
def test_a_task_that_was_popped_does_not_come_back_however_late_it_is(
    slate: Slate, clock: Clock, ahead: float, removed: bool
) -> None:
    slate.put("task", {"x": 1}, lifetime=100)

    def late() -> None:
        with slate.edit("task") as document:
            if removed:
                slate.pop("task")
            clock.ahead = ahead
            document["y"] = 1

    if removed or ahead > 3600:
        with pytest.raises(Conflict, match="'x', 'y'"):
            late()
        assert "task" not in slate
    else:
        late()
        assert slate["task"] == {"x": 1, "y": 1}


@pytest.mark.parametrize("write", ["put", "edit", "setdefault"])
def test_an_edit_of_one_document_does_not_get_into_the_next_of_that_name(slate: Slate, write: str) -> None:
    slate["a"] = {"old": 1}

    def late(change: Callable[[dict[str, Any]], object]) -> None:
        with slate.edit("a") as document:
            change(document)
            slate.pop("a")
            writing(slate, write, "f", 7)

    for change in (lambda document: document.update(new=1), dict.clear):
        with pytest.raises(Conflict):
            late(change)
        assert slate["a"] == {"f": 7}


def test_an_edit_is_merged_with_any_number_of_others(slate: Slate) -> None:
    slate["a"] = {"x": 1}
    with slate.edit("a") as document:
        document["x"] = 2
        for _ in range(40):
            slate.increment("a", "n")
    assert slate["a"] == {"x": 2, "n": 40}


def test_an_edit_is_merged_with_what_another_program_has_stored(
    slate: Slate, store: Store, options: dict[str, Any]
) -> None:
    store.put(f"{options['prefix']}slate:zed:a".encode(), b'{"x":1}')
    with slate.edit("a") as document:
        document["x"] = 2
        slate.increment("a", "n")
    assert slate["a"] == {"x": 2, "n": 1}


@pytest.mark.parametrize("lifetime", [0, -1, float("inf"), float("nan"), "60", True])
def test_a_lifetime_is_a_length_of_time(slate: Slate, lifetime: Any) -> None:
    with pytest.raises(ValueError, match="number of seconds above 0"):
        slate.put("a", {"x": 1}, lifetime=lifetime)
    with pytest.raises(ValueError, match="number of seconds above 0"), slate.edit("a", lifetime=lifetime) as document:
        document["x"] = 1
    with pytest.raises(ValueError, match="number of seconds above 0"):
        Slates("memory:").auth.issue("zed", lifetime)
    assert slate.names() == []


# Tokens


def test_a_token_is_good_for_its_user_and_its_time(slates: Slates, clock: Clock) -> None:
    token = slates.auth.issue("zed", lifetime=100)
    assert slates.auth.check(token) == "zed"
    assert slates.auth.check(slates.auth.issue("ada", lifetime=1000)) == "ada"
    clock.ahead = 99
    assert slates.auth.check(token) == "zed"
    clock.ahead = 101
    assert slates.auth.check(token) is None
    assert not slates.auth.renew(token)
    assert not slates.auth.revoke(token)


def test_a_token_is_random_and_nowhere_stored(slates: Slates, store: Store, options: dict[str, Any]) -> None:
    issued = {slates.auth.issue("zed") for _ in range(20)}
    assert len(issued) == 20
    assert {len(token) for token in issued} == {43}
    assert set("".join(issued)) <= set(string.ascii_letters + string.digits + "-_")
    stored = store.get_many(list(store.keys(options["prefix"].encode())))
    assert len(stored) == 21
    everything = b" ".join([*stored, *stored.values()]).decode()
    assert not any(token in everything for token in issued)


@pytest.mark.parametrize("token", [None, "", "x", "x" * 42, "x" * 44, "x" * 10**6, "é" * 43, "x" * 42 + "\n", 7, b"x"])
def test_what_cannot_be_a_token_costs_no_round_trip(faulty: FaultyStore, token: Any) -> None:
    auth = Slates(faulty).auth
    faulty.calls.clear()
    assert auth.check(token) is None
    assert not auth.renew(token)
    assert not auth.revoke(token)
    assert faulty.calls == []
    assert auth.check("x" * 43) is None
    assert faulty.calls == ["get"]


def test_a_damaged_listing_does_not_keep_anybody_signed_in(
    slates: Slates, store: Store, options: dict[str, Any]
) -> None:
    token = slates.auth.issue("zed")
    (listing,) = store.keys(f"{options['prefix']}slate:_tokens:".encode())
    store.put(listing, b"junk")
    assert slates.auth.revoke(token)
    assert slates.auth.check(token) is None


def test_half_a_hash_is_not_enough(slates: Slates, store: Store, options: dict[str, Any]) -> None:
    """A record under one token's key does not vouch for it unless it has the other half of its hash."""
    mine, yours = slates.auth.issue("zed"), slates.auth.issue("ada")
    prefix = f"{options['prefix']}slate:_auth:".encode()
    stored = store.get_many(list(store.keys(prefix)))
    (one, value), (other, another) = stored.items()
    store.put_many({one: another, other: value})
    assert slates.auth.check(mine) is None
    assert slates.auth.check(yours) is None


@pytest.mark.parametrize(
    "record", [b"{}", b'{"user": "zed"}', b'{"user": 7, "proof": 7}', b"garbage", b'{"proof": "\\u00e9"}']
)
def test_a_token_whose_record_is_damaged_is_nobodys(
    slates: Slates, store: Store, options: dict[str, Any], record: bytes
) -> None:
    token = slates.auth.issue("zed")
    (key,) = store.keys(f"{options['prefix']}slate:_auth:".encode())
    store.put(key, record)
    assert slates.auth.check(token) is None
    slates.auth.revoke_all("zed")
    assert slates.auth.check(slates.auth.issue("zed")) == "zed"


def test_renewing_gives_a_token_more_time(slates: Slates, clock: Clock) -> None:
    token = slates.auth.issue("zed", lifetime=100)
    clock.ahead = 50
    assert slates.auth.renew(token, lifetime=10_000)
    clock.ahead = 10_049
    assert slates.auth.check(token) == "zed"
    # And it is still listed: it can be ended by its user's name.
    assert slates.auth.revoke_all("zed") == 1
    assert slates.auth.check(token) is None
    assert not slates.auth.renew(token)


def test_a_revoked_token_is_no_good(slates: Slates) -> None:
    token, other = slates.auth.issue("zed"), slates.auth.issue("zed")
    slates["zed"]["user"] = {"name": "Zed"}
    assert slates.auth.revoke(token)
    assert not slates.auth.revoke(token)
    assert slates.auth.check(token) is None
    assert not slates.auth.renew(token)
    assert slates.auth.check(other) == "zed"
    assert slates["zed"].user == {"name": "Zed"}


def test_logging_out_everywhere(slates: Slates) -> None:
    issued = [slates.auth.issue("zed") for _ in range(4)]
    ada = slates.auth.issue("ada")
    slates.auth.revoke(issued[3])
    assert slates.auth.revoke_all("zed", keep=issued[0]) == 2
    assert [slates.auth.check(token) for token in issued] == ["zed", None, None, None]
    assert slates.auth.revoke_all("zed") == 1
    assert slates.auth.revoke_all("zed") == slates.auth.revoke_all("nobody") == 0
    assert slates.auth.check(ada) == "ada"


def test_a_login_that_is_half_done_comes_to_nothing(slates: Slates, monkeypatch: pytest.MonkeyPatch) -> None:
    enlist = slates.auth._enlist

    def and_then_all_are_revoked(*arguments: Any) -> None:
        enlist(*arguments)
        assert Slates(slates._settings).auth.revoke_all("zed") == 0

    monkeypatch.setattr(slates.auth, "_enlist", and_then_all_are_revoked)
    token = slates.auth.issue("zed")
    assert slates.auth.check(token) is None
    monkeypatch.undo()
    assert slates.auth.check(slates.auth.issue("zed")) == "zed"


def test_a_renewal_does_not_bring_back_what_was_revoked_meanwhile(
    slates: Slates, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = slates.auth.issue("zed")
    enlist = slates.auth._enlist

    def and_then_it_is_revoked(*arguments: Any) -> None:
        enlist(*arguments)
        assert Slates(slates._settings).auth.revoke(token)

    monkeypatch.setattr(slates.auth, "_enlist", and_then_it_is_revoked)
    assert not slates.auth.renew(token)
    assert slates.auth.check(token) is None


def test_a_process_that_stood_still_within_a_login_issues_nothing(
    slates: Slates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mark that a revocation has left may have expired by then."""
    monotonic = time.monotonic
    enlist = slates.auth._enlist

    def slowly(*arguments: Any) -> None:
        enlist(*arguments)
        monkeypatch.setattr(time, "monotonic", lambda: monotonic() + tokens.GRACE)

    monkeypatch.setattr(slates.auth, "_enlist", slowly)
    with pytest.raises(StoreUnavailable, match="stood still"):
        slates.auth.issue("zed")


def listing(store: Store, options: dict[str, Any]) -> dict[str, Any]:
    value = store.get(f"{options['prefix']}slate:_tokens:zed".encode())
    return {} if value is None else {k: v for k, v in json.loads(value).items() if not k.startswith("_")}


def test_a_shorter_renewal_does_not_have_a_listing_forget_a_token(
    slates: Slates, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails between its two writes: the token has its old expiry, and the listing must not have an earlier one."""
    token = slates.auth.issue("zed", lifetime=14 * 86400)

    def fail(*arguments: Any) -> None:
        raise StoreUnavailable("between the two")

    with monkeypatch.context() as patch:
        patch.setattr(slates.auth._logins, "modify", fail)
        with pytest.raises(StoreUnavailable):
            slates.auth.renew(token, 60)
    clock.ahead = 2 * tokens.GRACE
    assert slates.auth.check(token) == "zed"
    assert slates.auth.revoke_all("zed") == 1
    assert slates.auth.check(token) is None


def test_a_token_can_be_renewed_for_so_long_and_no_longer(slates: Slates, clock: Clock) -> None:
    token = slates.auth.issue("zed", lifetime=100, longest=150)
    clock.ahead = 90
    assert slates.auth.renew(token, lifetime=100)
    clock.ahead = 149
    assert slates.auth.renew(token, lifetime=100)
    clock.ahead = 151
    assert slates.auth.check(token) is None
    token = slates.auth.issue("zed", lifetime=100, longest=10)
    clock.ahead += 11
    assert slates.auth.check(token) is None


def test_the_limit_of_documents_is_not_that_of_tokens(options: dict[str, Any]) -> None:
    auth = Slates(options["url"], prefix=options["prefix"], max_value=200).auth
    issued = [auth.issue("é" * 1000) for _ in range(4)]
    assert auth.revoke_all("é" * 1000) == len(issued)
    listed = {secrets.token_hex(16): time.time() + n + 0.123456 for n in range(tokens.MAX_TOKENS)}
    auth._listings.put("zed", listed)
    assert auth.check(auth.issue("zed")) == "zed"


def test_a_listing_forgets_what_has_expired(
    slates: Slates, store: Store, options: dict[str, Any], clock: Clock
) -> None:
    long = slates.auth.issue("zed", lifetime=10_000)
    for _ in range(3):
        slates.auth.issue("zed", lifetime=100)
    assert len(listing(store, options)) == 4
    clock.ahead = 100 + tokens.GRACE + 1
    token = slates.auth.issue("zed", lifetime=100)
    assert len(listing(store, options)) == 2
    slates.auth.revoke(token)
    slates.auth.revoke(long)
    assert listing(store, options) == {}


def test_a_user_has_so_many_tokens_and_no_more(
    slates: Slates, store: Store, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "MAX_TOKENS", 3)
    issued = [slates.auth.issue("zed", lifetime) for lifetime in (300, 100, 200, 400, 500)]
    assert len(listing(store, options)) == 3
    assert [slates.auth.check(token) for token in issued] == ["zed", None, None, "zed", "zed"]


def test_a_tampered_listing_harms_nobody_else(slates: Slates, store: Store, options: dict[str, Any]) -> None:
    token, ada = slates.auth.issue("zed"), slates.auth.issue("ada")
    (zeds, adas) = (f"{options['prefix']}slate:_tokens:{user}".encode() for user in ("zed", "ada"))
    members = {**json.loads(store.get(zeds) or b""), **json.loads(store.get(adas) or b""), "../x": 9e9, "a" * 32: "x"}
    store.put(zeds, json.dumps(members).encode())
    assert slates.auth.revoke_all("zed") == 1
    assert slates.auth.check(token) is None
    assert slates.auth.check(ada) == "ada"


# When the store fails


def steps(slate: Slate, slates: Slates, token: str) -> dict[str, tuple[Callable[[], Any], Any]]:
    """What can be done, each with the document that it leaves; None: the one that was there."""

    def edit() -> None:
        with slate.edit("a") as document:
            document["n"] = 2

    def delete() -> None:
        del slate["a"]

    return {
        "put": (lambda: slate.put("a", {"n": 2}), {"n": 2}),
        "edit": (edit, {"n": 2}),
        "modify": (lambda: slate.modify("a", lambda document: document.update(n=2)), {"n": 2}),
        "increment": (lambda: slate.increment("a", "n"), {"n": 2}),
        "append": (lambda: slate.append("a", "list", 1), {"n": 1, "list": [1]}),
        "pop": (lambda: slate.pop("a"), {}),
        "delete": (delete, {}),
        "clear": (slate.clear, {}),
        "touch": (lambda: slate.touch("a", 100), None),
        "read": (lambda: slate["a"], None),
        "names": (slate.names, None),
        "check": (lambda: slates.auth.check(token), None),
        "renew": (lambda: slates.auth.renew(token), None),
        "revoke": (lambda: slates.auth.revoke(token), None),
        "revoke_all": (lambda: slates.auth.revoke_all(slate.name), None),
        "issue": (lambda: slates.auth.issue(slate.name), None),
    }


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("forever", [False, True])
def test_an_outage_at_any_call_is_an_outage_and_never_absence(
    faulty: FaultyStore, forever: bool, executed: bool
) -> None:
    """Whichever call fails, a step is done, or raises and leaves what was there, or what it was to leave."""
    slates = Slates(faulty)
    for step in steps(slates["zed"], slates, ""):
        for nth in itertools.count(1):
            user = f"outage {next(_numbers)}"
            slate = slates[user]
            slate["a"] = {"n": 1}
            token = slates.auth.issue(user)
            function, left = steps(slate, slates, token)[step]
            faulty.fail(nth, for_good=forever, executed=executed)
            failed: Exception | None = None
            result = None
            try:
                result = function()
            except StoreUnavailable as error:
                failed = error
            met = faulty.has_failed
            faulty.heal()
            before = {"n": 1}
            after = dict(slate.get("a", {}))
            expected = before if left is None else left
            assert after == expected if failed is None else after in (before, expected), step
            if failed is None and step in ("check", "renew", "revoke"):
                assert result == (user if step == "check" else True)
            if step.startswith("revoke") and failed is None:
                assert slates.auth.check(token) is None
            elif not step.startswith("revoke"):
                assert slates.auth.check(token) == user
            if step == "issue":
                assert failed is not None or slates.auth.check(result) == user
            # No good token is unlisted, whatever has failed.
            slates.auth.revoke_all(user)
            assert slates.auth.check(token) is None
            assert result is None or slates.auth.check(result if step == "issue" else None) is None
            if not met:
                break
        assert nth > 1, step


def test_a_number_whose_answer_was_lost_is_given_once(faulty: FaultyStore) -> None:
    slate = Slates(faulty)[f"outage {next(_numbers)}"]
    numbers = []
    for _ in range(5):
        faulty.fail(2, executed=True)
        numbers.append(slate.increment("a", "n"))
        assert faulty.has_failed
    assert numbers == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("increment", {"n": 2, "list": [0, 9]}),
        ("append", {"n": 1, "list": [0, 1, 9]}),
        ("edit", {"n": 2, "list": [0, 9]}),
        ("modify", {"n": 2, "list": [0, 9]}),
    ],
)
def test_what_was_done_and_not_answered_is_done_once_although_others_have_gone_on(
    step: str, left: dict[str, Any]
) -> None:
    overtaken = Overtaken(open_store("memory:slate-faults"))
    user = f"outage {next(_numbers)}"
    slate, others = Slates(overtaken)[user], Slates(overtaken.store)[user]
    slate["a"] = {"n": 1, "list": [0]}

    def add_to_n(document: dict[str, Any]) -> None:
        document["n"] += 1

    def edit() -> None:
        with slate.edit("a") as document:
            document["n"] += 1

    overtaken.rival = lambda: others.append("a", "list", 9)
    overtaken.fail(2, executed=True)
    steps: dict[str, Callable[[], Any]] = {
        "increment": lambda: slate.increment("a", "n"),
        "append": lambda: slate.append("a", "list", 1),
        "edit": edit,
        "modify": lambda: dict(slate.modify("a", add_to_n)),
    }
    # The answer is what it was when it was done, and not what others have made of it.
    assert steps[step]() == {"increment": 2, "append": 2, "modify": {"n": 2, "list": [0]}}.get(step)
    assert overtaken.has_failed
    assert slate["a"] == left


def test_a_pop_whose_answer_was_lost_does_not_look_like_absence(faulty: FaultyStore) -> None:
    slate = Slates(faulty)[f"outage {next(_numbers)}"]
    slate["a"] = {"n": 1}
    faulty.fail(2, executed=True)
    with pytest.raises(OutcomeUnknown):
        slate.pop("a", None)


class Handlers(types.ModuleType):
    """An application's module with one handler, which uses a slate."""

    def __init__(self, router: Any, handle: Callable[[Any], None]) -> None:
        super().__init__("tests_slate_handlers")

        def START(message: Any) -> Any:  # noqa: N802 - states are functions in capitals, as Lamson has it
            handle(message)

        START.__module__ = self.__name__
        self.START = routing.route("news@localhost")(START)
        router.HANDLERS[self.__name__] = routing.DEFAULT_STATE_KEY


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("step", ["read", "edit", "pop", "increment", "check"])
def test_an_outage_within_a_mail_handler_defers_the_mail(
    faulty: FaultyStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, step: str, executed: bool
) -> None:
    router = routing.RoutingBase()
    router.UNDELIVERABLE_QUEUE = queue.Queue(str(tmp_path / "undeliverable"))
    monkeypatch.setattr(routing, "Router", router)
    slates = Slates(faulty)
    slate = slates[f"mail {next(_numbers)}"]
    slate["a"] = {"n": 1}
    function, _ = steps(slate, slates, slates.auth.issue(slate.name))[step]
    handled: list[Any] = []

    def handle(message: Any) -> None:
        faulty.fail(1 if step in ("read", "check") or not executed else 2, for_good=True, executed=executed)
        function()
        handled.append(message)

    handlers = Handlers(router, handle)
    monkeypatch.setitem(sys.modules, handlers.__name__, handlers)
    storage = install(router, {"beaker.session.url": "memory:slate-states"})
    receiver = object.__new__(SMTPReceiver)
    sender = f"{slate.name.replace(' ', '')}@example.com"
    answer = SMTPReceiver.process_message(receiver, "localhost", sender, "news@localhost", b"Subject: hello\n\nbody\n")
    faulty.heal()
    assert answer is not None
    assert re.match(r"451 ", answer)
    assert handled == []
    assert storage.states_of(sender) == {}
    assert len(router.UNDELIVERABLE_QUEUE) == 0


# Many processes on one slate


class Worker:
    """One process: it edits a field of its own and one that all have, counts, appends to a list, and empties that."""

    def __init__(self, slate: Slate, number: int) -> None:
        self.slate = slate
        self.number = number
        self.random = random.Random(number)
        self.done: Counter[str] = Counter()
        self.numbers: list[int] = []
        self.popped: list[list[int]] = []

    def run(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for step in (self.edit_own, self.edit_shared, self.increment, self.append):
                try:
                    step()
                except ContentionError:
                    # Nothing was written, and whoever made the request is told so.
                    self.done["contention"] += 1

    def edit_own(self) -> None:
        own = f"process{self.number}"
        with self.slate.edit("page") as document:
            assert document.get(own, 0) == self.done["own"], f"{own} was changed by somebody else"
            document[own] = self.done["own"] + 1
            time.sleep(self.random.uniform(0, 0.01))
        self.done["own"] += 1

    def edit_shared(self) -> None:
        try:
            with self.slate.edit("page") as document:
                document["shared"] = document.get("shared", 0) + 1
                time.sleep(self.random.uniform(0, 0.01))
        except Conflict as conflict:
            self.done["conflicts"] += conflict.fields == ("shared",)
        else:
            self.done["shared"] += 1

    def increment(self) -> None:
        self.numbers.append(self.slate.increment("counter", "n"))

    def append(self) -> None:
        length = self.slate.append("log", "entries", [self.number, self.done["appended"]])
        self.done["appended"] += 1
        if length >= 100:
            self.popped += self.slate.pop("log", {"entries": []})["entries"]


def _work(url: str, prefix: str, number: int, seconds: float, path: str) -> None:
    # The machine may be busy with other things; no call is to fail for that.
    worker = Worker(Slates(url, prefix=prefix, deadline=30)["zed"], number)
    worker.run(seconds)
    Path(path).write_text(json.dumps({"done": worker.done, "numbers": worker.numbers, "popped": worker.popped}))


@pytest.mark.parametrize(
    ("processes", "seconds"), [(4, 1.0), pytest.param(16, 60.0, marks=pytest.mark.long, id="16 for a minute")]
)
def test_many_processes_edit_one_slate_and_nothing_is_lost(
    tyrant_server: ServerProcess, tmp_path: Path, processes: int, seconds: float
) -> None:
    prefix = f"slates{next(_numbers)}.many."
    paths = [tmp_path / f"{number}.json" for number in range(processes)]
    context = multiprocessing.get_context("fork")
    workers = [
        context.Process(target=_work, args=(tyrant_server.url, prefix, number, seconds, str(path)))
        for number, path in enumerate(paths)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(seconds + 60)
            assert worker.exitcode == 0
    finally:
        for worker in workers:
            worker.kill()
            worker.join(10)
    ends = [json.loads(path.read_text()) for path in paths]
    slate = Slates(tyrant_server.url, prefix=prefix)["zed"]
    totals: Counter[str] = Counter()
    for end in ends:
        totals.update(end["done"])
    page = slate["page"]
    assert [page[f"process{number}"] for number in range(processes)] == [end["done"]["own"] for end in ends]
    assert page["shared"] == totals["shared"]
    numbers = [number for end in ends for number in end["numbers"]]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert slate["counter"]["n"] == len(numbers)
    entries = [tuple(entry) for end in ends for entry in end["popped"]]
    entries += [tuple(entry) for entry in slate.get("log", {"entries": []})["entries"]]
    assert sorted(entries) == [(number, n) for number, end in enumerate(ends) for n in range(end["done"]["appended"])]
    print(
        f"{processes} processes in {seconds:.0f} s: {dict(totals)}, {len(numbers)} increments, {len(entries)} entries"
    )
    assert totals["own"] > 2 * processes
    assert totals["conflicts"] > 0
