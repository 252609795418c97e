"""The documents of one kind in one namespace, also when answers get lost: what is done is done once, or not at all."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from beaker_statestore.collection import COMMITS, Collection, birth
from beaker_statestore.documents import COMMIT, EXPIRES, Document
from beaker_statestore.exceptions import Conflict, DocumentDamagedError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore
from tests.rivals import Overtaken

_names = itertools.count(1)


@pytest.fixture
def collection(options: dict[str, Any]) -> Collection:
    return Collection(Settings.from_options(options), "confirm", "here")


@pytest.fixture
def faulty() -> Overtaken:
    return Overtaken(open_store("memory:collection-faults"))


@pytest.fixture
def lose_swaps(faulty: Overtaken, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Callable[[], None]]:
    """Have swaps get lost on their way to the store; what it answers ends that."""

    def lost(*arguments: Any) -> bool:
        raise OutcomeUnknown("lost on the way there")

    def begin() -> Callable[[], None]:
        swap = faulty.store.compare_and_swap
        monkeypatch.setattr(faulty.store, "compare_and_swap", lost)
        return lambda: monkeypatch.setattr(faulty.store, "compare_and_swap", swap)

    return begin


def over(store: Store, name: str | None = None) -> Collection:
    """A collection in ``store``, a new one unless it is named."""
    return Collection(Settings.from_options({"url": store}), "confirm", name or f"faults {next(_names)}")


def by_others(collection: Collection, store: FaultyStore) -> Collection:
    """The same collection as others see it, without faults."""
    name = collection.records.name
    return over(store.store, name)


def plain(document: Document | None) -> Document | None:
    return None if document is None else {name: value for name, value in document.items() if name != COMMIT}


def plus_one(document: Document | None) -> Document:
    return {**(document or {}), "n": (document or {}).get("n", 0) + 1}


def in_threads(number: int, function: Callable[[], object]) -> None:
    start = threading.Barrier(number)

    def run() -> None:
        start.wait(10)
        function()

    threads = [threading.Thread(target=run) for _ in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()


# Without faults


def test_of_many_who_add_one_succeeds(collection: Collection) -> None:
    added: list[bool] = []
    in_threads(8, lambda: added.append(collection.add("a", {"by": "me"})))
    assert sorted(added) == [False] * 7 + [True]
    assert plain(collection.read("a")) == {"by": "me"}


def test_what_has_expired_can_be_added_again_and_not_taken(collection: Collection) -> None:
    collection.put("a", {"x": 1, EXPIRES: time.time() - 1})
    assert collection.take("a") is None
    assert collection.add("a", {"x": 2})
    assert plain(collection.read("a")) == {"x": 2}


def test_of_many_who_take_one_gets_it(collection: Collection) -> None:
    collection.put("a", {"x": 1})
    taken: list[Document | None] = []
    in_threads(8, lambda: taken.append(collection.take("a")))
    assert [document for document in taken if document] == [{"x": 1}]
    assert collection.read("a") is None


def test_only_what_meets_the_condition_is_taken(collection: Collection) -> None:
    collection.put("a", {"x": 1})
    assert collection.take("a", lambda document: document["x"] == 2) is None
    assert collection.take("a", lambda document: document["x"] == 1) == {"x": 1}
    assert collection.take("a", lambda document: True) is None


def test_many_who_count_get_all_numbers(collection: Collection) -> None:
    numbers: list[int] = []
    in_threads(8, lambda: numbers.append((collection.modify("a", plus_one, own=True) or {})["n"]))
    assert sorted(numbers) == list(range(1, 9))


def test_a_change_from_what_was_fetched_saves_a_read(faulty: Overtaken) -> None:
    collection = over(faulty)
    collection.put("a", {"x": 1})
    fetched = collection.fetch("a")
    faulty.calls.clear()
    collection.modify("a", plus_one, known=fetched.stored)
    assert faulty.calls == ["compare_and_swap"]
    # What was fetched is no more, so it is read again.
    collection.modify("a", plus_one, known=fetched.stored, own=True)
    assert plain(collection.read("a")) == {"x": 1, "n": 2}


def test_a_change_that_changes_nothing_writes_nothing(faulty: Overtaken) -> None:
    collection = over(faulty)
    collection.modify("a", plus_one, own=True)
    faulty.calls.clear()
    assert plain(collection.modify("a", lambda document: document, own=True)) == {"n": 1}
    assert faulty.calls == ["get"]


def test_the_answer_is_what_was_stored_even_if_it_expires_at_once(collection: Collection) -> None:
    def short(document: Document | None) -> Document:
        return {"x": 1, EXPIRES: time.time()}

    assert (collection.modify("a", short) or {})["x"] == 1
    assert collection.read("a") is None


def test_a_document_keeps_the_tokens_of_the_last_changes_and_of_its_birth(collection: Collection) -> None:
    document = collection.modify("a", plus_one, own=True) or {}
    first = birth(document)
    for _ in range(COMMITS + 3):
        before = document[COMMIT]
        document = collection.modify("a", plus_one, own=True) or {}
        assert document[COMMIT][1:-1] == before[:-1][: COMMITS - 2]
        assert birth(document) == first is not None
    assert len(set(document[COMMIT])) == COMMITS
    collection.delete("a")
    assert birth(collection.modify("a", plus_one, own=True)) not in (None, first)


@pytest.mark.parametrize("commits", ["text", 7, [7, None], {"a": 1}])
def test_tokens_that_somebody_else_has_written_do_no_harm(collection: Collection, commits: Any) -> None:
    collection.put("a", {"n": 1, COMMIT: commits})
    assert plain(collection.modify("a", plus_one, own=True)) == {"n": 2}


def test_damage_is_no_absence(collection: Collection) -> None:
    collection.store.put(collection.records.record("a"), b"garbage")
    for operation in (
        lambda: collection.read("a"),
        lambda: collection.take("a"),
        lambda: collection.add("a", {"x": 1}),
        lambda: collection.modify("a", plus_one),
    ):
        with pytest.raises(DocumentDamagedError):
            operation()
    assert collection.store.get(collection.records.record("a")) == b"garbage"


def test_all_of_a_collection_is_removed_and_nothing_else(collection: Collection, options: dict[str, Any]) -> None:
    neighbour = Collection(Settings.from_options(options), "confirm", "here:and there")
    for name in ("a", "b", "", "c:d"):
        collection.put(name, {"x": 1})
        neighbour.put(name, {"x": 1})
    collection.delete_all()
    assert [key for page in collection.pages() for key in page] == []
    assert sorted(key or "" for page in neighbour.pages() for key in page) == ["", "a", "b", "c:d"]


# When a call fails


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("operation", ["add", "count", "take", "delete"])
def test_whichever_call_fails_it_is_done_once_or_said_to_have_failed(
    faulty: Overtaken, operation: str, executed: bool
) -> None:
    for nth in itertools.count(1):
        collection = over(faulty)
        begun = {} if operation == "add" else {"n": 1}
        if begun:
            collection.put("a", begun)
        faulty.fail(nth, executed=executed)
        failed: StoreUnavailable | None = None
        try:
            if operation == "add":
                assert collection.add("a", {"n": 7})
            elif operation == "count":
                assert plain(collection.modify("a", plus_one, own=True)) == {"n": 2}
            elif operation == "take":
                assert collection.take("a") == {"n": 1}
            else:
                assert collection.delete("a")
        except StoreUnavailable as error:
            failed = error
        met = faulty.has_failed
        faulty.heal()
        done = {"add": {"n": 7}, "count": {"n": 2}}.get(operation, {})
        after = plain(collection.read("a")) or {}
        assert after == done if failed is None else after in (begun, done)
        # A plain failure did nothing at all.
        assert after == begun or failed is None or isinstance(failed, OutcomeUnknown)
        if not met:
            break
    assert nth > 1


def test_an_add_whose_answer_was_lost_is_ones_own(faulty: Overtaken) -> None:
    collection = over(faulty)
    faulty.fail(2, executed=True)
    assert collection.add("a", {"x": 1})
    assert faulty.has_failed


@pytest.mark.parametrize("rivals", [1, COMMITS - 2])
def test_counting_is_exact_although_others_count_on_before_it_is_read_back(faulty: Overtaken, rivals: int) -> None:
    collection = over(faulty)
    others = by_others(collection, faulty)
    others.modify("a", plus_one, own=True)
    faulty.rival = lambda: [others.modify("a", plus_one, own=True) for _ in range(rivals)]
    faulty.fail(2, executed=True)
    assert (collection.modify("a", plus_one, own=True) or {})["n"] == 2
    assert faulty.has_failed
    assert plain(collection.read("a")) == {"n": 2 + rivals}


def test_an_add_whose_answer_was_lost_is_ones_own_although_others_have_changed_it(faulty: Overtaken) -> None:
    collection = over(faulty)
    others = by_others(collection, faulty)
    faulty.rival = lambda: others.modify("a", plus_one, own=True)
    faulty.fail(2, executed=True)
    assert collection.add("a", {"x": 1})
    assert plain(collection.read("a")) == {"x": 1, "n": 1}


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("begun", [0, 1, COMMITS])
@pytest.mark.parametrize("rival", ["counts", "counts often", "puts", "removes", "removes and adds"])
def test_a_change_is_never_done_twice_nor_lost_in_silence(
    faulty: Overtaken, lose_swaps: Callable[[], Callable[[], None]], executed: bool, begun: int, rival: str
) -> None:
    """Whatever others do before it is read back, and whether it was carried out or not."""
    collection = over(faulty)
    others = by_others(collection, faulty)
    for _ in range(begun):
        others.modify("a", plus_one, own=True)
    left = begun + int(executed)

    def count(times: int) -> None:
        for _ in range(times):
            others.modify("a", plus_one, own=True)

    def act() -> None:
        nonlocal left
        faulty.rival = lambda: None
        find_again()
        if rival.startswith("counts"):
            times = COMMITS if "often" in rival else 1
            left += times
            count(times)
        elif rival == "puts":
            others.put("a", {"n": left})
        else:
            others.delete("a")
            left = int("adds" in rival)
            count(left)

    find_again: Callable[[], object] = (lambda: None) if executed else lose_swaps()
    if executed:
        faulty.fail(2, executed=True)
    faulty.rival = act
    try:
        collection.modify("a", plus_one, own=True)
    except OutcomeUnknown:
        # What is left of the lists does not tell.
        assert begun == 0 or rival != "counts"
    else:
        assert rival.startswith("counts")
        left += int(not executed)
    assert (others.read("a") or {}).get("n", 0) == left


def test_no_answer_and_then_contention_is_no_doubt_for_good(
    faulty: Overtaken, lose_swaps: Callable[[], Callable[[], None]]
) -> None:
    """Once it is certain that the change was not done, it begins anew, whatever comes then."""
    collection = over(faulty)
    others = by_others(collection, faulty)
    others.modify("a", plus_one, own=True)
    find_again = lose_swaps()
    faulty.rival = lambda: (find_again(), others.modify("a", plus_one, own=True))
    runs: list[int] = []

    def overtaken(document: Document | None) -> Document:
        runs.append((document or {})["n"])
        if len(runs) == 2:
            others.put("a", {"n": 10})
        return plus_one(document)

    assert plain(collection.modify("a", overtaken, own=True)) == {"n": 11}
    assert runs == [1, 2, 10]


def test_a_change_that_is_refused_on_a_second_run_does_not_hide_that_the_first_is_in_doubt(
    faulty: Overtaken, lose_swaps: Callable[[], Callable[[], None]]
) -> None:
    collection = over(faulty)
    collection.modify("a", plus_one, own=True)
    faulty.rival = lose_swaps()
    runs = 0

    def once(document: Document | None) -> Document | None:
        nonlocal runs
        runs += 1
        if runs > 1:
            raise Conflict(["n"])
        return plus_one(document)

    with pytest.raises(OutcomeUnknown) as raised:
        collection.modify("a", once, own=True)
    assert isinstance(raised.value.__cause__, Conflict)


def test_a_take_whose_answer_was_lost_is_not_said_to_have_succeeded(faulty: Overtaken) -> None:
    collection = over(faulty)
    collection.put("a", {"x": 1})
    faulty.fail(2, executed=True)
    with pytest.raises(OutcomeUnknown):
        collection.take("a")
    assert collection.read("a") is None


def test_a_take_that_got_lost_before_it_was_carried_out_is_tried_again(
    faulty: Overtaken, lose_swaps: Callable[[], Callable[[], None]]
) -> None:
    collection = over(faulty)
    collection.put("a", {"x": 1})
    faulty.rival = lose_swaps()
    assert collection.take("a") == {"x": 1}
    assert collection.read("a") is None


def test_a_take_that_is_carried_out_late_is_not_said_to_be_anothers(
    faulty: Overtaken, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had no answer, and when it was tried again, it had just been done: nobody else has the document."""
    collection = over(faulty)
    collection.put("a", {"x": 1})
    swap = faulty.store.compare_and_swap
    late: list[tuple[Any, ...]] = []

    def stalled(*arguments: Any) -> bool:
        if not late:
            late.append(arguments)
            raise OutcomeUnknown("stalled")
        assert swap(*late[0])
        return swap(*arguments)

    monkeypatch.setattr(faulty.store, "compare_and_swap", stalled)
    with pytest.raises(OutcomeUnknown):
        collection.take("a")
    assert collection.read("a") is None


def test_a_take_that_was_certainly_not_done_goes_on(
    faulty: Overtaken, lose_swaps: Callable[[], Callable[[], None]]
) -> None:
    collection = over(faulty)
    others = by_others(collection, faulty)
    others.modify("a", plus_one, own=True)
    find_again = lose_swaps()
    faulty.rival = lambda: (find_again(), others.modify("a", plus_one, own=True))
    assert plain(collection.take("a")) == {"n": 2}
