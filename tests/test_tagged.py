"""``types = tagged``: what JSON does not have comes back equal and of its type; what did not change is no change."""

from __future__ import annotations

import base64
import collections
import datetime
import decimal
import enum
import itertools
import json
import logging
import math
import pickle
import re
import subprocess
import sys
import time
import uuid
import zoneinfo
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
from beaker import util
from beaker.cache import Cache
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from beaker_statestore import documents, payloads, tagged
from beaker_statestore.documents import MAX_DEPTH, Document
from beaker_statestore.exceptions import DocumentRefusedError, ValueTooLargeError
from beaker_statestore.namespace import TCJSONNamespaceManager
from beaker_statestore.stores.base import Store
from tests.visitor import Visitor

#: Under ``python -bb`` a set that holds b"" and 0, whose hashes are alike, raises a warning when it is made: here, in
#: hypothesis (which also looks for text among the bytes of other tests), and in any application. It is no fault.
pytestmark = pytest.mark.filterwarnings("ignore:Comparison between bytes and:BytesWarning")

UTC = datetime.timezone.utc
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")
NOON = datetime.datetime(2026, 11, 21, 12, 0, tzinfo=UTC)


def alike(one: Any, two: Any) -> bool:
    """Whether two values are equal and of the same types throughout, and times in the same zone with the same fold."""
    if type(one) is not type(two):
        return False
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(alike(one[key], two[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(two) and all(map(alike, one, two))
    if isinstance(one, (set, frozenset)):
        return one == two and sorted(map(str, map(type, one))) == sorted(map(str, map(type, two)))
    if isinstance(one, (datetime.datetime, datetime.time)):
        return (one.replace(tzinfo=None), one.fold, one.tzinfo) == (two.replace(tzinfo=None), two.fold, two.tzinfo)
    return bool(one == two) and repr(one) == repr(two)


def pickled(session: dict[str, Any]) -> str:
    return base64.b64encode(pickle.dumps(session, 2)).decode()


# -- any value

zones = st.one_of(
    st.none(),
    st.just(UTC),
    st.sampled_from(["Europe/Berlin", "America/St_Johns", "Etc/GMT+3", "UTC"]).map(zoneinfo.ZoneInfo),
    st.integers(-23 * 3600, 23 * 3600).map(lambda seconds: datetime.timezone(datetime.timedelta(seconds=seconds))),
)
folds = st.sampled_from([0, 1])
hashable_scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=5),
    st.lists(st.integers(0, 255), max_size=5).map(bytes),
    st.builds(lambda t, z, fold: t.replace(tzinfo=z, fold=fold), st.datetimes(), zones, folds),
    st.builds(lambda t, z, fold: t.replace(tzinfo=z, fold=fold), st.times(), zones, folds),
    st.dates(),
    st.timedeltas(),
    st.decimals(allow_nan=False, allow_infinity=False),
    st.uuids(),
)
hashables = st.recursive(
    hashable_scalars,
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.frozensets(inner, max_size=3),
    max_leaves=5,
)
names = st.text(max_size=3) | st.sampled_from(["$set", "$tuple", "$datetime", "$$set", "$$tuple", "$bytes", "$x", "$"])
values = st.recursive(
    hashables | st.sets(hashables, max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(names, inner, max_size=3)
    ),
    max_leaves=8,
)
sessions = st.dictionaries(st.text(max_size=3), values, max_size=3)


@given(sessions)
@example({"a": {"$set": [1, 2]}, "b": {"$$set": [1, 2]}, "c": {"$set": {1, 2}}, "d": {"$tuple": ({"$tuple": []},)}})
@example({"$set": [1]})
@example({"a": b"x", "b": ["x", b"x"]})
@example({"a": {"$datetime": "2026-11-21T12:00:00+00:00"}, "b": {"$datetime": "soon"}, "c": {"$date": NOON.date()}})
def test_every_value_comes_back_equal_and_of_its_type(session: dict[str, Any]) -> None:
    document = tagged.tag(session, "tagged")
    assert documents.same(documents.decode(documents.encode(document)), document)
    assert alike(tagged.untag(document), session)


@given(sessions, st.sampled_from([4, 5]))
def test_every_session_comes_back_through_a_pickle(session: dict[str, Any], protocol: int) -> None:
    payload = base64.b64encode(pickle.dumps(session, protocol)).decode()
    document = payloads.read(payload, types="tagged").document
    assert document is not None
    assert documents.same(document, tagged.tag(session, "tagged"))
    assert alike(pickle.loads(base64.b64decode(payloads.write(document, "pickle", types="tagged"))), session)


@given(sessions)
def test_every_session_comes_back_through_beakers_own_pickle(session: dict[str, Any]) -> None:
    """Its protocol 2 does not keep the fold, whatever the store does: here it is what Python makes of it."""
    data = util.PickleSerializer().dumps(session)
    document = payloads.read(base64.b64encode(data).decode(), types="tagged").document
    assert document is not None
    written = payloads.write(document, "pickle", types="tagged")
    assert alike(util.PickleSerializer().loads(base64.b64decode(written)), pickle.loads(data))


tags = st.sampled_from(
    ["$set", "$frozenset", "$tuple", "$datetime", "$date", "$time", "$timedelta", "$decimal", "$uuid", "$bytes", "$x"]
)
arguments = st.sampled_from(
    ["2026-11-21", "2026-11-21T12:00:00", "2026-11-21T12:00:00+00:00", "2026-11-21T12:00:00Z", "2026-11-21 12:00",
     "2026-11-21T12:00:00[Europe/Berlin]", "2026-11-21T12:00:00[Mars/Base]", "2026-11-21T12:00:00[Europe]",
     "2026-11-21T12:00:00[_fold=1]", "2026-11-21T12:00:00+01:00[Europe/Berlin]", "12:00:00", "12:00", "1.10", "1,1",
     "NaN", "sNaN", "Infinity", "1e5", "1E+5", " 1", "YQ==", "YR==", "YQ", "", "00000000-0000-0000-0000-000000000005",
     "00000000000000000000000000000005"]
)  # fmt: skip
at_rest = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([0.0, -0.0, 1.0]) | arguments,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(tags | tags.map("${}".format) | st.text(max_size=2), inner, min_size=1, max_size=2)
        | st.tuples(tags | tags.map("${}".format), inner).map(lambda pair: dict([pair]))
    ),
    max_leaves=10,
)


@settings(max_examples=200)
@given(st.dictionaries(st.text(max_size=2), at_rest, max_size=3))
@example({"a": {"$set": [2, 1]}, "b": {"$set": [1, 1]}, "c": {"$set": [1, 1.0]}, "d": {"$set": [[]]}})
@example({"a": {"$timedelta": [0, 0, -1]}, "b": {"$timedelta": [1, 2.0, 3]}, "c": {"$timedelta": [10**18, 0, 0]}})
@example({"a": {"$timedelta": "123"}, "b": {"$uuid": 5}, "c": {"$decimal": [0, [1], 0]}, "d": {"$bytes": None}})
def test_whatever_is_stored_is_read_and_if_unchanged_stored_as_it_was(document: Document) -> None:
    """Whoever wrote it. Otherwise a request that only reads would undo what another one writes."""
    assert documents.same(tagged.tag(tagged.untag(document), "tagged"), document)


def test_the_forms_at_rest_are_these() -> None:
    session = {
        "when": NOON,
        "local": datetime.datetime(2026, 10, 25, 2, 30, tzinfo=BERLIN, fold=1),
        "naive": datetime.datetime(2026, 11, 21, 12, 0, 0, 5),
        "day": datetime.date(2026, 11, 21),
        "at": datetime.time(6, 30),
        "span": datetime.timedelta(hours=36),
        "price": decimal.Decimal("1.10"),
        "id": uuid.UUID(int=5),
        "raw": b"a\xff",
        "roles": {"b", "a"},
        "frozen": frozenset({(1, "x")}),
        "pair": (1, 2),
        "own": {"$date": "2026-11-21"},
        "not a date": {"$date": "today"},
        "unknown": {"$price": 1},
    }
    assert json.loads(documents.encode(tagged.tag(session, "tagged"))) == {
        "when": {"$datetime": "2026-11-21T12:00:00+00:00"},
        "local": {"$datetime": "2026-10-25T02:30:00[Europe/Berlin][_fold=1]"},
        "naive": {"$datetime": "2026-11-21T12:00:00.000005"},
        "day": {"$date": "2026-11-21"},
        "at": {"$time": "06:30:00"},
        "span": {"$timedelta": [1, 43200, 0]},
        "price": {"$decimal": "1.10"},
        "id": {"$uuid": "00000000-0000-0000-0000-000000000005"},
        "raw": {"$bytes": "Yf8="},
        "roles": {"$set": ["a", "b"]},
        "frozen": {"$frozenset": [{"$tuple": [1, "x"]}]},
        "pair": {"$tuple": [1, 2]},
        "own": {"$$date": "2026-11-21"},
        "not a date": {"$date": "today"},
        "unknown": {"$price": 1},
    }


@pytest.mark.parametrize("other", [0, False, 0.0, ""])
def test_no_bytes_and_what_has_the_same_hash_are_members_of_one_set(other: object) -> None:
    session = {"a": {bytes([]), other}, "b": frozenset([(bytes([]), 1), (other, 1)])}
    assert hash(other) == hash(bytes([]))
    assert alike(tagged.untag(tagged.tag(session, "tagged")), session)
    document = payloads.read(pickled(session), types="tagged").document
    assert document is not None
    assert alike(tagged.untag(document), session)


def test_a_zone_that_this_machine_does_not_know_leaves_the_value_as_it_is_stored() -> None:
    document = {"a": {"$datetime": "2026-11-21T12:00:00[Mars/Base]"}, "b": {"$set": [{"$time": "12:00:00[Mars/Base]"}]}}
    assert tagged.untag(document) == document
    assert tagged.tag(tagged.untag(document), "tagged") == document


@pytest.mark.parametrize("zone", ["../etc/passwd", "/etc/passwd", "a" * 99, "a..b", "", "x]y", "é"])
def test_no_file_is_looked_up_under_a_name_that_no_zone_has(zone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def looked_up(*names: object) -> None:
        raise AssertionError(names)

    monkeypatch.setattr(zoneinfo, "ZoneInfo", looked_up)
    document = {"a": {"$datetime": f"2026-11-21T12:00:00[{zone}]"}}
    assert tagged.untag(document) == document


def test_a_set_is_written_alike_in_every_process() -> None:
    """Text is hashed otherwise in each, so its order in a set is another."""
    script = (
        "from beaker_statestore import documents, tagged\n"
        "members = {*map(str, range(50)), 1.5, None, (1, 'x'), b'z'}\n"
        "print(documents.encode(tagged.tag({'a': members}, 'tagged')).decode())"
    )
    written = {
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60,
            env={"PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(written) == 1


# -- what even tags cannot hold


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int


class Local(datetime.tzinfo):
    def utcoffset(self, when: datetime.datetime | None) -> None:
        return None

    def dst(self, when: datetime.datetime | None) -> None:
        return None

    def tzname(self, when: datetime.datetime | None) -> None:
        return None


HERE = __name__
cyclic: dict[str, Any] = {"a": []}
cyclic["a"].append((cyclic,))


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (collections.OrderedDict(), " is a collections.OrderedDict; it would come back as a plain dict"),
        (Level.LOW, f" is a {HERE}.Level; it would come back as a plain int"),
        (Point(1), f" is a {HERE}.Point; it would come back as a plain tuple"),
        (bytearray(b"a"), " is a bytearray; store text"),
        ({1: 2}, " has a key that is an int; "),
        ((1, {Level.LOW}), f"[1][*] is a {HERE}.Level; "),
        (math.nan, " is nan, which JSON does not have"),
        ({math.inf}, "[*] is inf, which JSON does not have"),
        (decimal.Decimal("NaN"), " is Decimal('NaN'), which is no number"),
        (decimal.Decimal("-Infinity"), " is Decimal('-Infinity'), which is no number"),
        (NOON.replace(tzinfo=Local()), f" is a datetime.datetime with a {HERE}.Local for its zone; use datetime.time"),
        (UTC, " is a datetime.timezone; store"),
        (
            NOON.replace(tzinfo=datetime.timezone(datetime.timedelta(microseconds=1))),
            " is a time with fractions of a second in its offset",
        ),
        (2**64, " is an integer beyond 64 bits"),
        (cyclic, " contains itself"),
    ],
)
def test_what_tags_cannot_hold_is_refused_by_place_and_type(value: Any, complaint: str) -> None:
    for types in ("tagged", "warn"):
        with pytest.raises(DocumentRefusedError) as caught:
            tagged.tag({"a": {"b": value}}, types)
        place = "session['a']['b']"
        expected = re.escape(place + complaint) if "itself" not in complaint else r"session\S* contains itself"
        assert re.match(expected, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("wrap", [lambda value: (value,), lambda value: frozenset([value])])
def test_tagged_values_count_as_the_lists_and_objects_that_they_become(wrap: Any) -> None:
    def wrapped(times: int) -> dict[str, Any]:
        value: Any = 1
        for _ in range(times):
            value = wrap(value)
        return {"k": value}

    deepest = wrapped((MAX_DEPTH - 1) // 2)
    stored = documents.encode(tagged.tag(deepest, "tagged"))
    assert tagged.untag(documents.decode(stored)) == deepest
    with pytest.raises(DocumentRefusedError, match="is inside more than 100 lists and dicts"):
        tagged.tag(wrapped((MAX_DEPTH - 1) // 2 + 1), "tagged")


def test_a_scalar_at_the_deepest_level_has_no_room_for_its_tag() -> None:
    value: Any = NOON
    for _ in range(MAX_DEPTH - 2):
        value = [value]
    assert tagged.untag(documents.decode(documents.encode(tagged.tag({"k": value}, "tagged")))) == {"k": value}
    with pytest.raises(DocumentRefusedError, match="is inside more than 100 lists and dicts"):
        tagged.tag({"k": [value]}, "tagged")


@given(sessions)
def test_the_limit_never_refuses_what_fits(session: dict[str, Any]) -> None:
    size = len(documents.encode(tagged.tag(session, "tagged")))
    tagged.tag(session, "tagged", max_bytes=size)


def test_what_is_too_large_is_refused_by_its_largest_fields() -> None:
    shared: Any = ("x",)
    for _ in range(40):
        shared = (shared, shared)
    for value in (b"x" * 10_000, ("text",) * 2000, {str(n) for n in range(2000)}, shared, {"$set": [b"x" * 9000]}):
        with pytest.raises(ValueTooLargeError, match="its largest fields are 'large' with"):
            tagged.tag({"small": NOON, "large": value}, "tagged", max_bytes=5000)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: {"$set": [inner, [0]]},
        lambda inner: {"$tuple": [inner]},
        lambda inner: {"$frozenset": [inner]},
        lambda inner: {"$frozenset": [2, 1, inner]},
        lambda inner: {"$set": [{"$tuple": [inner]}]},
    ],
)
def test_nested_tags_of_whoever_takes_no_time_to_speak_of(wrap: Any) -> None:
    """Looking on every level at everything below it, twice, would take longer than the universe has stood."""
    inner: Any = list(range(1000))
    document: Document = {}
    for _ in range(MAX_DEPTH):
        with_one_more = {"k": inner}
        if documents._deeper(with_one_more, MAX_DEPTH):
            break
        document, inner = with_one_more, wrap(inner)
    began = time.perf_counter()
    assert documents.same(tagged.tag(tagged.untag(document), "tagged"), document)
    assert time.perf_counter() - began < 1


def calls(action: Callable[[], object]) -> int:
    """How many functions ``action`` calls, a measure of its work that no other process disturbs."""
    count = 0

    def profile(frame: object, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return count


LEAF = frozenset(range(500))
#: What a visitor's JSON can be, around anything.
VISITORS: list[Callable[[Any], Any]] = [
    lambda inner: {"$set": [inner]},
    lambda inner: {"$frozenset": [inner]},
    lambda inner: {"$frozenset": [0, inner]},
    lambda inner: {"$$frozenset": [inner]},
    lambda inner: {"$tuple": [inner]},
    lambda inner: {"$frozenset": [{"$tuple": [inner]}]},
    lambda inner: {"$set": {"$tuple": [inner]}},
    lambda inner: {"$date": inner},
    lambda inner: {"$timedelta": [inner]},
]
#: What an application's values can be, around what a set can hold.
APPLICATIONS: list[Callable[[Any], Any]] = [
    lambda inner: frozenset([inner]),
    lambda inner: frozenset([0, inner]),
    lambda inner: (inner,),
    lambda inner: frozenset([(0, inner)]),
    lambda inner: {"$set": [(inner,)]},
]


@pytest.mark.usefixtures("places")
@pytest.mark.parametrize(
    ("wrap", "leaf"),
    [
        *itertools.product(VISITORS, [{"$frozenset": sorted(LEAF, key=str)}, sorted(LEAF), LEAF]),
        *itertools.product(APPLICATIONS, [LEAF]),
    ],
)
def test_the_work_grows_with_the_size_and_not_with_the_depth(wrap: Any, leaf: Any) -> None:
    def session(levels: int) -> dict[str, Any]:
        inner = leaf
        for _ in range(levels):
            inner = wrap(inner)
        return {"k": inner}

    flat, deep = session(1), session(22)
    try:
        by_visitor = json.loads(json.dumps(deep)) == deep
    except TypeError:
        by_visitor = False

    def work(session: dict[str, Any]) -> list[int]:
        payload = pickled(session)
        document = tagged.tag(session, "tagged")
        counts = [
            calls(lambda: tagged.tag(session, "tagged")),
            calls(lambda: tagged.tag(session, "warn")),
            calls(lambda: payloads.read(payload, types="tagged")),
            calls(lambda: payloads.read(payload, types="warn")),
            calls(lambda: tagged.untag(document)),
        ]
        if by_visitor:  # as an application whose serializer is JSON stores it
            value = tagged.untag(session)
            counts += [calls(lambda: tagged.untag(session)), calls(lambda: tagged.tag(value, "warn"))]
        return counts

    for once, often in zip(work(flat), work(deep), strict=True):
        assert often < 3 * once + 3000


def test_a_set_inside_many_others_is_written_once() -> None:
    value: Any = frozenset(range(20_000))
    for _ in range(MAX_DEPTH // 2 - 2):
        value = frozenset([0, value])
    encoded = 0
    encode = tagged._encode

    def counting(member: Any) -> str:
        nonlocal encoded
        text = encode(member)
        encoded += len(text)
        return text

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tagged, "_encode", counting)
        document = tagged.tag({"k": value}, "tagged")
        size = len(json.dumps(document))
        assert encoded < size
        assert tagged.untag(document) == {"k": value}
        assert encoded < 2 * size


def test_what_is_no_set_inside_another_is_refused_with_its_place() -> None:
    for member in ([1], {"a": 1}, {1}, ([1],)):
        # No pickler writes it so.
        data = pickle.dumps({"a": [frozenset([(frozenset([7]),)])]}, 2)
        body = pickle.dumps(member, 2)[2:-1]
        forged = base64.b64encode(data.replace(b"K\x07", body))
        with pytest.raises(DocumentRefusedError, match=r"^session\['a'\]\[0\] is a frozenset as Python writes none"):
            payloads.read(forged.decode(), types="tagged")


COLLIDING = [n * (2**61 - 1) for n in range(3000)]


@pytest.mark.parametrize("make", [decimal.Decimal, lambda n: uuid.UUID(int=n), lambda n: (decimal.Decimal(n), 1)])
def test_members_of_one_hash_are_not_compared_each_with_each(make: Any) -> None:
    members = [make(n) for n in COLLIDING]
    assert len(set(map(hash, members))) == 1
    argument = sorted((tagged.tag({"k": member}, "tagged")["k"] for member in members), key=tagged._encode)
    document = {"k": {"$set": argument}}
    began = time.perf_counter()
    session = tagged.untag(document)
    assert time.perf_counter() - began < 0.5  # it would be ten times as long
    assert type(session["k"]) is dict
    assert tagged.tag(session, "tagged") == document
    few, many = set(members[: tagged.MAX_COLLISIONS]), set(members[: tagged.MAX_COLLISIONS + 1])
    for types in ("tagged", "warn"):
        assert tagged.untag(tagged.tag({"k": few}, types)) == {"k": few}
        for refuse in (
            lambda types=types: tagged.tag({"k": many}, types),
            lambda types=types: payloads.read(pickled({"k": many}), types=types),
        ):
            with pytest.raises(
                DocumentRefusedError, match=r"^session\['k'\] is a set .* than 32 members of one hash; "
            ):
                refuse()


def test_unknown_zones_are_told_from_known_ones_without_reading_files(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Counting(zoneinfo.ZoneInfo):
        def __new__(cls, key: str) -> Any:
            loaded.append(key)
            return BERLIN

    tagged._zone.cache_clear()
    monkeypatch.setattr(zoneinfo, "ZoneInfo", Counting)
    known = [{"$time": f"12:00:00[{zone}]"} for zone in ("Europe/Berlin", "America/St_Johns") * 50]
    unknown = [{"$time": f"12:00:00[Mars/Base{n}]"} for n in range(100)] + [{"$time": "12:00:00[Europe]"}]
    tagged.untag({"a": known, "b": unknown})
    tagged._zone.cache_clear()
    assert loaded == ["Europe/Berlin", "America/St_Johns"]


def test_zones_come_from_the_package_where_the_machine_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    tagged._zone.cache_clear()
    monkeypatch.setattr(zoneinfo, "TZPATH", ())
    monkeypatch.setattr(tagged, "_packaged_zones", lambda: frozenset({"Europe/Berlin"}))
    value = {"$time": "12:00:00[Europe/Berlin]"}
    unknown = {"$time": "12:00:00[America/St_Johns]"}
    assert tagged.untag({"a": value, "b": unknown}) == {"a": datetime.time(12, tzinfo=BERLIN), "b": unknown}
    tagged._zone.cache_clear()


# -- strict and warn


@pytest.mark.parametrize("value", [NOON, {1}, b"x", decimal.Decimal(1), uuid.UUID(int=1)])
def test_strict_refuses_and_names_the_remedy(value: Any) -> None:
    payload = base64.b64encode(pickle.dumps({"a": value}, 2)).decode()
    for refuse in (lambda: payloads.read(payload), lambda: tagged.tag({"a": value}, "strict")):
        with pytest.raises(DocumentRefusedError, match=r"^session\['a'\] is .*, or set types = tagged$"):
            refuse()


def test_strict_does_not_advise_what_would_not_help() -> None:
    with pytest.raises(DocumentRefusedError) as caught:
        tagged.tag({"a": Point(1)}, "strict")
    assert "types = " not in str(caught.value)


def test_strict_hands_a_tagged_value_over_as_the_dict_that_it_is() -> None:
    document = tagged.tag({"a": NOON, "b": {"$tuple": []}}, "tagged")
    written = payloads.write(document, "pickle")
    assert pickle.loads(base64.b64decode(written)) == document
    assert payloads.read(written).document == document


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    places: set[str] = set()
    monkeypatch.setattr(tagged, "_places", places)
    return places


@pytest.mark.usefixtures("places")
def test_warn_names_each_place_and_type_once(caplog: pytest.LogCaptureFixture) -> None:
    cart = [{"when": NOON}, {"when": NOON}, {"when": NOON.date()}]
    for _ in range(3):
        session = {"user": "zoe", "cart": cart, "pair": (1, {b"x"}), "own": {"$date": "today", "$x": 1}, "e": [{}, []]}
        assert alike(tagged.untag(tagged.tag(session, "warn")), session)
    refused, as_list = "with types = strict it would be refused", "with types = strict it would come back as a list"
    assert [(record.levelno, record.name) for record in caplog.records] == [
        (logging.WARNING, "beaker_statestore.tagged")
    ] * 5
    assert caplog.messages == [
        f"session['cart'][*]['when'] is a datetime.datetime; {refused}",
        f"session['cart'][*]['when'] is a datetime.date; {refused}",
        f"session['pair'] is a tuple; {as_list}",
        f"session['pair'][*] is a set; {refused}",
        f"session['pair'][*][*] is bytes; {refused}",
    ]


def test_warn_remembers_so_many_places_and_no_more(places: set[str], caplog: pytest.LogCaptureFixture) -> None:
    for start in range(0, 3000, 500):
        tagged.tag({f"{n}{'k' * 200}": b"" for n in range(start, start + 500)}, "warn")
    assert len(places) == 1001
    assert len(caplog.messages) == 1001
    assert caplog.messages[-1] == "values that JSON does not have are in more than 1000 places; no more are named"
    assert max(map(len, caplog.messages)) < 200


def test_tagged_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    tagged.tag({"a": NOON}, "tagged")
    assert caplog.messages == []


# -- through real Beaker


class TaggedVisitor(Visitor):
    """A visitor of an application with tagged types."""

    def __init__(self, options: dict[str, Any], store: Store) -> None:
        super().__init__({"types": "tagged", **options})
        self.store = store

    def stored(self) -> dict[str, Any]:
        data = self.store.get(self.record)
        assert data is not None
        return {name: value for name, value in json.loads(data).items() if not name.startswith("_")}


@pytest.fixture
def visitor(options: dict[str, Any], store: Store) -> TaggedVisitor:
    return TaggedVisitor(options, store)


EVERYTHING: dict[str, Any] = {
    "when": NOON,
    "local": datetime.datetime(2026, 7, 1, 6, 0, tzinfo=BERLIN),
    "price": decimal.Decimal("1.10"),
    "roles": {"admin", "editor", ("x", 1)},
    "deep": [{"pair": (1, [b"\xff", frozenset({NOON.date()})])}],
    "own": {"$tuple": [{"$set": [1, 2]}]},
}

_numbers = itertools.count()


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values)
def test_every_value_comes_back_through_a_real_cache(options: dict[str, Any], value: Any) -> None:
    cache = Cache("tagged", type="ext:tcjson", types="tagged", **options)
    key = f"k{next(_numbers)}"
    assert alike(cache.get(key, createfunc=lambda: value, expiretime=60), value)
    assert alike(cache.get(key, createfunc=lambda: "made again", expiretime=60), value)
    cache.put(key, value)
    assert alike(cache.get(key), value)


def test_a_cache_without_tags_refuses_by_place_and_one_that_warns_does_not_name_its_keys(
    options: dict[str, Any], places: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    strict = TCJSONNamespaceManager("c", **options)
    with pytest.raises(DocumentRefusedError, match=r"^cache\['k'\]\['value'\]\[0\] is a datetime.datetime; "):
        strict["k"] = (1.0, None, [NOON])
    warning = TCJSONNamespaceManager("c", **options, types="warn")
    for key in ("visitor 1", "visitor 2"):
        warning[key] = (1.0, None, [NOON])
        assert warning[key] == (1.0, None, [NOON])
    assert places == {"cache[*]['value'][*] is a datetime.datetime; with types = strict it would be refused"}
    with pytest.raises(DocumentRefusedError, match=r"^cache\['k'\]\['value'\]\[0\] is a .*\.Point; "):
        warning["k"] = (1.0, None, [Point(1)])


def test_a_session_comes_back_as_it_was_saved(visitor: TaggedVisitor) -> None:
    visitor.saves(**EVERYTHING)
    assert alike(visitor.sees(), EVERYTHING)


def test_two_tabs_that_change_different_keys_keep_both(visitor: TaggedVisitor, counted: Counter[str]) -> None:
    visitor.saves(**EVERYTHING)
    tab, other = visitor.request(), visitor.request()
    tab["when"] = later = NOON + datetime.timedelta(days=1)
    other["roles"] = {"admin"}
    tab.save()
    other.save()
    assert alike(visitor.sees(), {**EVERYTHING, "when": later, "roles": {"admin"}})
    assert "session.conflict" not in counted


@pytest.mark.parametrize("accessed_only", [False, True])
def test_unchanged_values_are_no_change(visitor: TaggedVisitor, counted: Counter[str], accessed_only: bool) -> None:
    visitor.saves(**EVERYTHING)
    reader, writer = visitor.request(), visitor.request()
    writer.update(when=None, roles=set(), deep=0)
    writer.save()
    # The same members, put in otherwise.
    reader["roles"] = {("x", 1), "editor", *map(str, range(100)), "admin"} - set(map(str, range(100)))
    reader.save(accessed_only=accessed_only)
    assert alike(visitor.sees(), {**EVERYTHING, "when": None, "roles": set(), "deep": 0})
    assert "session.conflict" not in counted


def test_what_others_have_stored_is_no_change_either(visitor: TaggedVisitor) -> None:
    """Even if it is not as we would write it, or from a machine that knows more."""
    odd = {"a": {"$set": [2, 1]}, "b": {"$datetime": "2026-11-21T12:00:00Z"}, "c": {"$datetime": "x"}, "d": {"$new": 1}}
    visitor.request(types="strict").save()
    session = visitor.request(types="strict")
    session.update(odd)
    session.save()
    reader, writer = visitor.request(), visitor.request()
    assert {name: reader[name] for name in odd} == odd
    writer.update(dict.fromkeys(odd, 1))
    writer.save()
    reader.save()
    assert visitor.sees() == dict.fromkeys(odd, 1)


def test_a_json_application_and_a_pickle_application_share_a_session(visitor: TaggedVisitor) -> None:
    visitor.saves(**EVERYTHING)
    expected = visitor.stored()
    as_json = {"data_serializer": "json", "serializer": "json"}
    as_pickle = {"data_serializer": "pickle", "serializer": "pickle"}
    for turn in range(2):
        session = visitor.request(**as_json)
        assert {name: session[name] for name in expected} == expected
        session["json"] = expected["json"] = turn
        session.save()
        assert visitor.stored() == expected
        session = visitor.request(**as_pickle)
        assert alike({name: session[name] for name in EVERYTHING}, EVERYTHING)
        session["pickle"] = expected["pickle"] = turn
        session.save()
        assert visitor.stored() == expected


def test_a_json_application_writes_tags_itself(visitor: TaggedVisitor) -> None:
    session = visitor.request(data_serializer="json", serializer="json")
    session["when"] = {"$datetime": NOON.isoformat()}
    session.save()
    assert alike(visitor.sees(data_serializer="pickle", serializer="pickle"), {"when": NOON})


@pytest.fixture(autouse=True)
def _no_zone_forgotten() -> Iterator[None]:
    yield
    assert zoneinfo.ZoneInfo("Europe/Berlin") is BERLIN
