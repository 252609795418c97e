"""The store that fails when told to, and what `Store.modify` promises whatever call of it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from beaker_statestore.exceptions import ContentionError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.stores import base
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import AtomicityConformance, FaultyStore, StoreConformance


class TestFaultyStoreWithoutFaults(StoreConformance, AtomicityConformance):
    @pytest.fixture
    def store(self) -> Iterator[Store]:
        with FaultyStore(MemoryStore()) as store:
            yield store


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


def _five_puts(store: FaultyStore) -> list[str]:
    """What became of five puts, each of a key of its own."""
    outcomes = []
    for number in range(5):
        try:
            store.put(b"%d" % number, b"")
        except StoreUnavailable as error:
            outcomes.append(type(error).__name__)
        else:
            outcomes.append("done")
    return outcomes


@pytest.mark.parametrize("n", [1, 3, 5])
def test_exactly_the_nth_call_fails_and_is_not_executed(store: FaultyStore, n: int) -> None:
    store.fail(n)
    assert _five_puts(store) == ["StoreUnavailable" if number == n else "done" for number in range(1, 6)]
    assert store.has_failed
    assert store.calls == ["put"] * 5
    assert set(store.store.keys()) == {b"%d" % number for number in range(5)} - {b"%d" % (n - 1)}


def test_an_executed_call_has_its_effect_and_an_unknown_outcome(store: FaultyStore) -> None:
    store.fail(2, executed=True)
    assert _five_puts(store) == ["done", "OutcomeUnknown", "done", "done", "done"]
    assert store.store.count() == 5


def test_a_fault_for_good_lasts_until_it_is_healed(store: FaultyStore) -> None:
    store.fail(2, executed=True, for_good=True)
    assert _five_puts(store) == ["done", "OutcomeUnknown", *["StoreUnavailable"] * 3]
    store.heal()
    assert store.count() == 2


def test_calls_are_counted_from_the_last_order(store: FaultyStore) -> None:
    store.fail(6)
    assert _five_puts(store) == ["done"] * 5
    assert not store.has_failed
    store.fail(6)
    assert _five_puts(store) == ["done"] * 5
    with pytest.raises(StoreUnavailable, match="call 6, get"):
        store.get(b"key")


CALLS: list[tuple[Callable[[Store], object], bool]] = [
    (lambda store: store.get(b""), False),
    (lambda store: store.get_many([b""]), False),
    (lambda store: store.scan(), False),
    (lambda store: store.count(), False),
    (lambda store: store.size(), False),
    (lambda store: store.ping(), False),
    (lambda store: store.put(b"", b""), True),
    (lambda store: store.put_many({b"": b""}), True),
    (lambda store: store.add(b"", b""), True),
    (lambda store: store.delete(b""), True),
    (lambda store: store.delete_many([b""]), True),
    (lambda store: store.compare_and_swap(b"", None, b""), True),
    (lambda store: store.sync(), True),
]


@pytest.mark.parametrize(("call", "writes"), CALLS)
def test_every_verb_is_one_call(store: FaultyStore, call: Callable[[Store], object], writes: bool) -> None:
    store.fail(1)
    with pytest.raises(StoreUnavailable) as before:
        call(store)
    store.fail(1, executed=True)
    with pytest.raises(StoreUnavailable) as after:
        call(store)
    store.fail(2)
    call(store)
    assert len(store.calls) == 1
    assert not isinstance(before.value, OutcomeUnknown)
    assert isinstance(after.value, OutcomeUnknown) is writes


# -- modify


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("there", [None, b"old"])
@pytest.mark.parametrize("new", [None, b"new"])
def test_whatever_call_fails_modify_is_done_or_raises(
    store: FaultyStore, there: bytes | None, new: bytes | None, executed: bool, for_good: bool
) -> None:
    for n in range(1, 10):
        store.heal()
        store.compare_and_swap(b"key", store.get(b"key"), there)
        store.fail(n, executed=executed, for_good=for_good)
        try:
            assert store.modify(b"key", lambda _old: new) == new
        except StoreUnavailable:
            assert store.store.get(b"key") in (there, new)
            assert store.has_failed
        else:
            assert store.store.get(b"key") == new
        if not store.has_failed:
            return
    raise AssertionError("modify makes more calls than anybody would expect")


def test_a_swap_whose_answer_was_lost_is_recognised_and_not_repeated(store: FaultyStore) -> None:
    store.put(b"list", b"")
    # The first call reads, the second swaps.
    store.fail(2, executed=True)
    assert store.modify(b"list", lambda old: (old or b"") + b"mine ") == b"mine "
    assert store.get(b"list") == b"mine "


def test_a_swap_that_was_not_executed_is_repeated(store: FaultyStore) -> None:
    class Lost(FaultyStore):
        def compare_and_swap(self, *_arguments: object) -> bool:
            del type(self).compare_and_swap
            raise OutcomeUnknown("the request never arrived")

    lost = Lost(store)
    assert lost.modify(b"list", lambda old: (old or b"") + b"mine ") == b"mine "
    assert store.get(b"list") == b"mine "


def test_a_swap_that_is_executed_late_is_recognised() -> None:
    class Stalled(MemoryStore):
        """Executes the first swap only when the second has been sent: a server that hung for a while."""

        late: tuple[bytes, bytes | None, bytes | None] | None = None
        swaps = 0

        def compare_and_swap(
            self, key: bytes, expected: bytes | None, new: bytes | None, expires_at: float | None = None
        ) -> bool:
            self.swaps += 1
            if self.swaps == 1:
                self.late = key, expected, new
                raise OutcomeUnknown("no answer in time")
            if self.late is not None:
                late, self.late = self.late, None
                assert super().compare_and_swap(*late)
            return super().compare_and_swap(key, expected, new)

    store = Stalled()
    store.put(b"list", b"")
    assert store.modify(b"list", lambda old: (old or b"") + b"mine ") == b"mine "
    assert store.get(b"list") == b"mine "


def test_endless_contention_ends_with_an_error_that_names_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "CONTENTION_DEADLINE", 0.05)
    store = MemoryStore()

    def always_too_late(old: bytes | None) -> bytes:
        rival = b"%d" % (int(old or b"0") + 1)
        store.put(b"session:secret", rival)
        return b"mine"

    with pytest.raises(ContentionError) as caught:
        store.modify(b"session:secret", always_too_late)
    assert "secret" not in str(caught.value)
