from __future__ import annotations

import base64
import collections
import datetime
import decimal
import enum
import gc
import json
import math
import pickle
import subprocess
import sys
import uuid
import weakref
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson
import pytest
import simplejson
from hypothesis import example, given
from hypothesis import strategies as st

from beaker_statestore import documents
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import MAX_DEPTH, Document
from beaker_statestore.exceptions import DocumentDamagedError, DocumentRefusedError, ValueTooLargeError
from beaker_statestore.settings import Settings
from beaker_statestore.stores.memory import MemoryStore

CODECS = {"simplejson": documents._SIMPLEJSON, "orjson": documents._ORJSON}


@pytest.fixture(params=CODECS)
def codec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each codec in turn does the work."""
    assert CODECS[request.param] is not None
    monkeypatch.setattr(documents, "_codec", CODECS[request.param])
    return str(request.param)


def with_codec(name: str, function: Any, *arguments: Any) -> Any:
    """The result of ``function``, or the class of the documents' error that it raised."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "_codec", CODECS[name])
        try:
            return function(*arguments)
        except (DocumentDamagedError, DocumentRefusedError) as error:
            return type(error)


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4)
)
objects = st.dictionaries(st.text(), values, max_size=5)


def nested(levels: int) -> Document:
    """A document with so many lists and dicts inside each other, the outermost included."""
    value: Any = []
    for level in range(levels - 2):
        value = [value] if level % 2 else {"k": value}
    return {"k": value}


# -- both codecs


def test_the_fast_codec_is_used_where_it_is_installed() -> None:
    assert documents._codec is documents._ORJSON
    assert documents._ORJSON is not None


def test_without_the_fast_codec_the_reference_does_the_work() -> None:
    script = (
        "import sys; sys.modules['orjson'] = None\n"
        "from beaker_statestore import documents\n"
        "assert documents._codec is documents._SIMPLEJSON\n"
        "print(documents.decode(documents.encode({'a': [1, 'é']})))"
    )
    done = subprocess.run([sys.executable, "-X", "utf8", "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{'a': [1, 'é']}\n", "")


@given(objects)
@example({"a": [-0.0, 5e-324, 1.7976931348623157e308, 1e16, 1e22, 0.1, -(2**63), 2**64 - 1]})
@example({"\u2028\u2029\x00\x1f\x7f\ufeff": '\U0010ffff \\ / " \ud7ff\ue000'})
def test_what_one_codec_writes_both_read_as_the_same_value(document: Document) -> None:
    for writer in CODECS:
        data = with_codec(writer, documents.encode, document)
        assert b"\n" not in data
        for reader in CODECS:
            assert documents.same(with_codec(reader, documents.decode, data), document), (writer, reader)


TEXTS = [
    "18446744073709551615", "18446744073709551616", "-9223372036854775808", "-9223372036854775809", "1" * 400,
    "-" + "1" * 300, "1" * 5000, "1e400", "-1e400", "1e-400", "-0", "-0.0", "-0e0", "1E5", "0.1e1", "01", "1.", ".5",
    "+1", "-", "--1", "1e", "1e+", "NaN", "Infinity", "-Infinity", "nan", "nul", "True", r'"\ud800"', r'"\udc00\ud800"',
    r'"\ud83d\ude00"', r'"\uD83D\u0041"', '"\x00"', '"\x7f"', '"\u2028"', '"a\tb"', r'"\x41"', r'"\u12"', r'"\u1_23"',
    r'"\u+123"', '"\\u\uff11\uff12\uff13\uff14"', "\uff11", "1\u0663", r'"\/"', '"', "'a'", "[1,]", "[,1]", "[1 2]",
    '{"a":1,}', '{"a":1,"a":2}', '{"a":{"b":1},"a":[]}', "{1:2}", "{'a':1}", '{"a"}', "1 2", "1\x0c", "\x0b1", "\xa01",
    " \t\r\n1 ", "/*x*/1", "1 // x", r'{"\ud800":1}', "\ufeff1", "9007199254740993.0",
    "123456789012345678901234567890.5", "", "2.2250738585072011e-308", "0." + "1" * 5000,
    "1" + "0" * 308, "1" + "0" * 309,
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_both_codecs_read_or_refuse_the_same_texts(text: str) -> None:
    for data in (f'{{"k":{text}}}'.encode(), text.encode()):
        read = {name: with_codec(name, documents.decode, data) for name in CODECS}
        assert documents.same(read["simplejson"], read["orjson"]), (data[:80], read)


pieces = st.sampled_from(
    [
        *'{}[]:,"\\ -+.eE019',
        "true",
        "null",
        "NaN",
        '"a"',
        r"\u",
        r"\ud8",
        "00",
        "\x00",
        "é",
        "\ud7ff",
        "\ufeff",
        '{"a":',
    ]
)


@given(st.lists(pieces, max_size=12).map("".join))
def test_both_codecs_agree_on_anything_that_resembles_json(text: str) -> None:
    for data in (text.encode(), f'{{"k":{text}}}'.encode(), f'{{"k":"{text}"}}'.encode()):
        read = {name: with_codec(name, documents.decode, data) for name in CODECS}
        assert documents.same(read["simplejson"], read["orjson"]), (data, read)


@given(objects, st.data())
def test_both_codecs_agree_on_damaged_bytes(document: Document, data: st.DataObject) -> None:
    damaged = bytearray(documents.encode(document))
    damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    read = {name: with_codec(name, documents.decode, bytes(damaged)) for name in CODECS}
    assert documents.same(read["simplejson"], read["orjson"]), (bytes(damaged), read)


# -- encoding


def test_a_document_is_stored_as_compact_readable_json(codec: str) -> None:
    document: Document = {"user": {"name": "Zoë", "roles": ("admin", "editor")}, "n": [1, 1.5, None, True, {}]}
    assert documents.encode(document) == (
        '{"user":{"name":"Zoë","roles":["admin","editor"]},"n":[1,1.5,null,true,{}]}'.encode()
    )


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int


class Markup(str):
    __slots__ = ()


class Outer:
    class Inner:
        pass


HERE = __name__
cyclic: dict[str, Any] = {"list": []}
cyclic["list"].append({"back": cyclic})
ring: list[Any] = [1, 2]
ring.append((ring,))


REFUSED: list[tuple[Any, str]] = [
    (datetime.datetime(2010, 1, 1), "is a datetime.datetime; store it as text, for example .isoformat()"),
    (datetime.date(2010, 1, 1), "is a datetime.date; store it as text"),
    (datetime.timedelta(1), "is a datetime.timedelta; store it as a number, .total_seconds()"),
    (decimal.Decimal(1), "is a decimal.Decimal; store it as text, str(...)"),
    (uuid.UUID(int=1), "is an uuid.UUID; store it as text, str(...)"),
    ({1, 2}, "is a set; store it as a list"),
    (frozenset(), "is a frozenset; store it as a list"),
    (b"abc", "is bytes; store text"),
    (bytearray(b"abc"), "is a bytearray; store text"),
    (1j, "is a complex; store None, bool, int, float, str, list or dict"),
    (object(), "is an object; store"),
    (Outer.Inner(), f"is a {HERE}.Outer.Inner; store"),
    (Outer, f"is the class or function {HERE}.Outer; store"),
    (len, "is a builtin_function_or_method; store"),
    (Color.RED, f"is a {HERE}.Color; store"),
    (Level.LOW, f"is a {HERE}.Level; it would come back as a plain int: store int(...)"),
    (Markup("<b>"), f"is a {HERE}.Markup; it would come back as a plain str: store str(...)"),
    (Point(1), f"is a {HERE}.Point; it would come back as a plain tuple: store tuple(...)"),
    (
        collections.OrderedDict(),
        "is a collections.OrderedDict; it would come back as a plain dict: store dict(...)",
    ),
    (collections.defaultdict(int), "is a collections.defaultdict; it would come back as a plain dict"),
    (math.nan, "is nan, which JSON does not have; store None or text instead"),
    (-math.inf, "is -inf, which JSON does not have"),
    (2**64, "is an integer beyond 64 bits; store it as text, str(...)"),
    (-(2**63) - 1, "is an integer beyond 64 bits"),
    (10**5000, "is an integer beyond 64 bits"),
    ("a\ud800", "has a lone surrogate in its text"),
    ({1: 2}, "has a key that is an int; JSON has only str there"),
    ({None: 2}, "has a key that is a NoneType"),
    ({(1, 2): 2}, "has a key that is a tuple"),
    ({Markup("k"): 2}, f"has a key that is a {HERE}.Markup"),
    (cyclic, "contains itself"),
    (ring, "contains itself"),
]


@pytest.mark.parametrize(("value", "complaint"), REFUSED, ids=[complaint[:30] for _, complaint in REFUSED])
def test_what_json_cannot_hold_is_refused_by_place_and_type(codec: str, value: Any, complaint: str) -> None:
    for document, place in (
        ({"when": value}, "session['when'] "),
        ({"cart": [0, (1, {"it's": value})]}, "session['cart'][1][1][\"it's\"] "),
    ):
        with pytest.raises(DocumentRefusedError) as caught:
            documents.encode(document, root="session")
        assert str(caught.value).startswith(place + complaint)


def test_a_surrogate_in_a_key_is_refused_at_its_place() -> None:
    with pytest.raises(DocumentRefusedError, match=r"^session\['a'\]\['\\udc80'\] has a lone surrogate"):
        documents.encode({"a": {"\udc80": 1}}, root="session")


def test_a_value_with_a_hostile_type_name_cannot_spoil_the_message() -> None:
    hostile = type("X", (), {"__module__": "a\nb\ud800", "__qualname__": "y" * 10_000})
    with pytest.raises(DocumentRefusedError) as caught:
        documents.encode({"k" * 10_000: hostile()})
    message = str(caught.value)
    assert len(message) < 400
    assert message.isprintable()


def test_something_other_than_a_dict_is_refused() -> None:
    other: list[Any] = [[], "text", None, collections.OrderedDict()]
    for value in other:
        with pytest.raises(DocumentRefusedError, match=r"^session is an? .*it has to be a dict"):
            documents.encode(value, root="session")


def test_nesting_is_allowed_up_to_the_limit_and_refused_beyond_it(codec: str) -> None:
    deepest = nested(MAX_DEPTH)
    assert documents.decode(documents.encode(deepest)) == deepest
    for levels in (MAX_DEPTH + 1, MAX_DEPTH + 2, 5000):
        with pytest.raises(
            DocumentRefusedError, match="is inside more than 100 lists and dicts; store it flatter"
        ) as caught:
            documents.encode(nested(levels))
        assert len(str(caught.value)) < 200


def test_values_shared_many_times_cannot_explode() -> None:
    shared: list[Any] = ["x"]
    for _ in range(80):
        shared = [shared, shared]
    with pytest.raises(ValueTooLargeError, match="'bomb' with more than"):
        documents.encode({"small": 1, "bomb": shared, "tail": 2}, max_bytes=100_000)
    empty: list[Any] = []
    for _ in range(80):
        empty = [empty, empty]
    with pytest.raises(ValueTooLargeError):
        documents.encode({str(n): empty for n in range(50)}, max_bytes=100_000)


def test_a_value_shared_a_few_times_is_just_written_again(codec: str) -> None:
    shared = {"a": 1}
    assert documents.encode({"x": shared, "y": [shared, shared]}) == b'{"x":{"a":1},"y":[{"a":1},{"a":1}]}'


@given(objects)
@example({})
@example({"a": [[], {}, [[]], ""]})
def test_the_limit_is_exact(document: Document) -> None:
    for name in CODECS:
        size = len(with_codec(name, documents.encode, document))
        assert len(with_codec(name, documents.encode, document, "document", size)) == size
        assert with_codec(name, documents.encode, document, "document", size - 1) is ValueTooLargeError


def test_a_document_that_is_too_large_is_refused_by_its_largest_fields() -> None:
    document = {"id": 7, "cart": ["x" * 50] * 40, "history": "é" * 5000, "notes": "n" * 300, "lang": "de"}
    with pytest.raises(ValueTooLargeError) as caught:
        documents.encode(document, root="session", max_bytes=5000)
    assert str(caught.value) == (
        "session takes more than the limit of 5,000 bytes; its largest fields are "
        "'history' with about 10,003, 'cart' with about 2,122, 'notes' with about 303"
    )


def test_a_size_that_only_encoding_tells_is_named_exactly() -> None:
    with pytest.raises(ValueTooLargeError, match=r"session takes 60,008 bytes, above the limit of 20,000 bytes"):
        documents.encode({"k": "\x00" * 10_000}, root="session", max_bytes=20_000)


@given(objects)
def test_a_normalized_copy_is_equal_and_shares_no_container(document: Document) -> None:
    def containers(value: Any) -> Iterator[int]:
        if isinstance(value, (dict, list)):
            yield id(value)
            for member in value.values() if isinstance(value, dict) else value:
                yield from containers(member)

    copy = documents.normalize(document)
    assert documents.same(copy, document)
    assert not set(containers(copy)) & set(containers(document))


def test_a_tuple_becomes_a_list_before_it_is_compared() -> None:
    assert documents.same(documents.normalize({"a": ((1, 2), ())}), {"a": [[1, 2], []]})


def test_our_own_field_names_are_refused_to_applications() -> None:
    for name in ("_expires", "_serializer", "_opaque"):
        with pytest.raises(DocumentRefusedError, match=rf"session\['{name}'\] is a name that the store uses itself"):
            documents.refuse_reserved({"a": 1, name: 2})
    documents.refuse_reserved(
        {"_domain": None, "_path": "/", "_accessed_time": 1.0, "_creation_time": 1.0, "expires": 1}
    )


# -- decoding


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "nothing"),
        (b" \n", "nothing"),
        (b"[1,2]", "a JSON array"),
        (b"42", "a JSON number"),
        (b"-1.5e3", "a JSON number"),
        (b'"text"', "a JSON string"),
        (b"true", "a JSON true or false"),
        (b"null", "a JSON null"),
        (base64.b64encode(pickle.dumps({"a": 1}, 2)), "base64 text of what looks like a pickle"),
        (base64.b64encode(pickle.dumps({"a": 1}, 5)) + b"\n", "base64 text of what looks like a pickle"),
        (base64.b64encode(zlib.compress(b"{}")), "base64 text of what looks like zlib data"),
        (json.dumps(base64.b64encode(pickle.dumps({"a": 1}, 2)).decode()).encode(), "a JSON string"),
        (pickle.dumps({"a": 1}), "a pickle"),
        (zlib.compress(b"{}"), "zlib data"),
        (b"{'a': 1}", "8 characters of text that is not JSON"),
        (b"a:1:{s:1:\"a\";i:1;}", "18 characters of text that is not JSON"),
        (b'{"a":1}{"b":2}', "14 characters of text that is not JSON"),
        (b'{"a":NaN}', "9 characters of text that is not JSON"),
        (b'{"a":1', "6 characters of text that is not JSON"),
        (b"\xef\xbb\xbf{}", "text with a byte order mark"),
        (b"\xff\xfe{\x00}\x00", "6 bytes that are not UTF-8 text"),
        (b'{"a":"\xff"}', "9 bytes that are not UTF-8 text"),
        (b"\x00\x00\x00\x07", "4 characters of text that is not JSON"),
        (b"[" * 100_000, "100,000 characters of text that is not JSON"),
    ],
)  # fmt: skip
def test_what_is_not_a_json_object_is_damage_that_names_what_was_found(codec: str, data: bytes, found: str) -> None:
    with pytest.raises(DocumentDamagedError) as caught:
        documents.decode(data)
    assert str(caught.value) == f"the record holds {found}, not a JSON object"


@pytest.mark.parametrize("levels", [MAX_DEPTH + 1, 500, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"k":', "}")])
def test_deep_nesting_is_damage_and_never_exhausts_the_stack(
    codec: str, levels: int, opening: str, closing: str
) -> None:
    text = '{"k":' + opening * (levels - 2) + "[]" + closing * (levels - 2) + "}"
    with pytest.raises(DocumentDamagedError):
        documents.decode(text.encode())


def test_many_brackets_side_by_side_are_no_nesting(codec: str) -> None:
    document: Document = {str(n): [{}, []] for n in range(1000)}
    assert documents.decode(documents.encode(document)) == document


def test_whatever_other_programs_may_write_is_read(codec: str) -> None:
    text = ' {\r\n "\\u00fc": "\\ud83d\\ude00\\/", "a": 1, "a": 2E0,\t"n": 123456789012345678901234567890 } '
    assert documents.decode(text.encode()) == {"ü": "😀/", "a": 2.0, "n": 1.2345678901234568e29}


def test_a_record_above_the_limit_is_not_even_read(codec: str) -> None:
    assert documents.decode(b'{"a":1}', max_bytes=7) == {"a": 1}
    with pytest.raises(DocumentDamagedError, match="has 7 bytes, above the limit of 6"):
        documents.decode(b'{"a":1}', max_bytes=6)


@given(st.binary(max_size=60))
def test_any_bytes_are_a_document_or_damage(data: bytes) -> None:
    for name in CODECS:
        assert (
            isinstance(with_codec(name, documents.decode, data), dict)
            or with_codec(name, documents.decode, data) is DocumentDamagedError
        )


# -- expiry


def test_the_expiry_is_read_from_the_bytes_of_a_record(codec: str) -> None:
    assert documents.expires_at(b'{"a":1}') is None
    assert documents.expires_at(b'{"a":"_expires"}') is None
    assert documents.expires_at(b'{"a":{"_expires":5}}') is None
    assert documents.expires_at(b'{"_expires":5}') == 5.0
    assert documents.expires_at(b'{"a":[],"_expires":1290000000.25}') == 1290000000.25
    assert documents.expires_at(b'{"\\u005fexpires":5}') == 5.0


def test_a_document_is_expired_from_its_expiry_on() -> None:
    assert not documents.is_expired({}, 1e12)
    assert not documents.is_expired({"_expires": 100}, 99.9)
    assert documents.is_expired({"_expires": 100}, 100)
    assert documents.is_expired({"_expires": 100.5}, 101)


@pytest.mark.parametrize("expiry", ["5", None, True, [], {}])
def test_an_expiry_that_is_no_number_is_damage(expiry: Any) -> None:
    with pytest.raises(DocumentDamagedError, match=r"the record's '_expires' is a JSON \w+.*, not a number"):
        documents.is_expired({"_expires": expiry}, 0)
    with pytest.raises(DocumentDamagedError):
        documents.expires_at(documents.encode({"_expires": expiry}))


# -- comparing


@pytest.mark.parametrize(
    ("one", "two"),
    [(True, 1), (False, 0), (1, 1.0), (0.0, -0.0), ("1", 1), (None, False), ([], {}), ([], None), ([1], [1.0]),
     ({"a": 1}, {"a": True}), ({"a": None}, {}), ([1, 2], [2, 1]), ({"a": {"b": [0]}}, {"a": {"b": [0.0]}}),
     ("é", "e\u0301")],
)  # fmt: skip
def test_values_that_are_written_differently_are_not_the_same(one: Any, two: Any) -> None:
    assert not documents.same(one, two)
    assert not documents.same(two, one)
    assert documents.same(one, one)


few = st.recursive(
    st.sampled_from([None, True, False, 0, 1, 0.0, -0.0, 1.0, "", "a"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@given(few, few)
def test_values_are_the_same_exactly_when_they_are_written_alike(one: Any, two: Any) -> None:
    written = [simplejson.dumps(value, sort_keys=True) for value in (one, two)]
    assert documents.same(one, two) == (written[0] == written[1])
    assert documents.same(one, orjson.loads(orjson.dumps(one)))


# -- merging

few_objects = st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), few, max_size=4)


@given(few_objects, few_objects, few_objects)
def test_a_merge_applies_our_changes_to_theirs_field_by_field(base: Document, ours: Document, theirs: Document) -> None:
    merged = documents.merge(base, ours, theirs)
    absent = object()
    conflicts = []
    for name in "abcd":
        before, mine, other, result = (side.get(name, absent) for side in (base, ours, theirs, merged.document))
        we_changed, they_changed = not documents.same(before, mine), not documents.same(before, other)
        assert documents.same(result, mine if we_changed else other)
        if we_changed and they_changed and not documents.same(mine, other):
            conflicts.append(name)
    assert merged.conflicts == tuple(conflicts)
    assert merged.changed == (not documents.same(merged.document, theirs))


times = st.fixed_dictionaries(
    {},
    optional={name: st.sampled_from([1, 2.0, 3]) for name in ("_accessed_time", "_creation_time", "_expires")},
)


@given(few_objects, few_objects, times, times)
def test_a_merge_without_a_second_party_is_what_we_wrote(
    base: Document, ours: Document, t1: Document, t2: Document
) -> None:
    base, ours = base | t1, ours | t2
    for theirs in (ours, base):
        merged = documents.merge(base, ours, theirs)
        assert not merged.conflicts
        for name in merged.document.keys() | ours.keys():
            if name not in t1 | t2:
                assert documents.same(merged.document[name], ours[name])
    unchanged = documents.merge(base, base, ours)
    assert unchanged == documents.Merge(ours, (), False)
    assert list(unchanged.document) == list(ours)


@given(few_objects, few_objects, few_objects)
def test_a_merge_alters_none_of_its_arguments(base: Document, ours: Document, theirs: Document) -> None:
    before = [simplejson.dumps(side) for side in (base, ours, theirs)]
    documents.merge(base, ours, theirs)
    assert [simplejson.dumps(side) for side in (base, ours, theirs)] == before


def test_two_tabs_that_add_different_fields_lose_nothing() -> None:
    base = {"user": "zoe"}
    merged = documents.merge(base, {"user": "zoe", "a": 1}, {"user": "zoe", "b": 2})
    assert merged == documents.Merge({"user": "zoe", "b": 2, "a": 1}, (), True)


def test_two_different_changes_of_one_field_are_a_conflict_that_ours_wins() -> None:
    base = {"n": 1, "m": 1, "gone": 1, "same": 1}
    merged = documents.merge(base, {"n": 2, "m": 1, "same": 5}, {"n": 3, "m": 9, "gone": 2, "same": 5})
    assert merged == documents.Merge({"n": 2, "m": 9, "same": 5}, ("gone", "n"), True)


ABSENT = None


@pytest.mark.parametrize(
    ("name", "before", "ours", "theirs", "result"),
    [
        # A later access is never taken back, whoever comes last and whatever the hosts' clocks say.
        ("_accessed_time", 10, 20, 30, 30),
        ("_accessed_time", 10, 30, 20, 30),
        ("_accessed_time", 10, 5, 10, 10),
        ("_accessed_time", ABSENT, 5, 9.5, 9.5),
        ("_accessed_time", ABSENT, 5, ABSENT, 5),
        ("_accessed_time", 10, ABSENT, 20, 20),
        ("_accessed_time", 10, ABSENT, 10, 10),
        ("_accessed_time", 10, 20, ABSENT, 20),
        # Nor is an expiry, and none at all is the latest.
        ("_expires", 10, 20, 30, 30),
        ("_expires", 10, 30, 20, 30),
        ("_expires", 10, 5, 10, 10),
        ("_expires", 10, 20, ABSENT, ABSENT),
        ("_expires", 10, ABSENT, 20, ABSENT),
        ("_expires", ABSENT, 20, 10, 20),
        # But a timeout that has been configured since takes hold.
        ("_expires", ABSENT, 20, ABSENT, 20),
        # session.clear() removes the creation, too.
        ("_creation_time", 10, ABSENT, 10, 10),
        ("_creation_time", 10, ABSENT, ABSENT, ABSENT),
        # Two requests at once create the same session.
        ("_creation_time", ABSENT, 20, 10, 10),
        ("_creation_time", ABSENT, 10, 20, 10),
        # The application's own will.
        ("_creation_time", 10, 20, 10, 20),
    ],
)
def test_times_are_merged_by_their_meaning_and_are_no_conflicts(
    name: str, before: float | None, ours: float | None, theirs: float | None, result: float | None
) -> None:
    sides = [{"k": 1} if time is ABSENT else {"k": 1, name: time} for time in (before, ours, theirs)]
    merged = documents.merge(*sides)
    assert merged.document.get(name) == result
    assert (name in merged.document) == (result is not ABSENT)
    assert merged.conflicts == ()
    assert merged.changed == (result != theirs)


def test_a_time_that_is_no_number_is_merged_as_any_field() -> None:
    merged = documents.merge({"_expires": "x"}, {"_expires": 5}, {"_expires": "y"})
    assert merged == documents.Merge({"_expires": 5}, ("_expires",), True)
    merged = documents.merge({"_accessed_time": True}, {}, {"_accessed_time": True})
    assert merged == documents.Merge({}, (), True)


def test_the_difference_tells_a_touch_from_a_change() -> None:
    base = {"_accessed_time": 1.0, "cart": [1], "gone": 1}
    assert documents.difference(base, {"_accessed_time": 2.0, "cart": [1], "gone": 1}) == {"_accessed_time"}
    assert documents.difference(base, {"_accessed_time": 1.0, "cart": [True], "new": 0}) == {"cart", "gone", "new"}
    assert documents.difference(base, json.loads(json.dumps(base))) == frozenset()


# -- the codec of an application


def test_a_codec_keeps_no_store_for_ever() -> None:
    """Settings may have one for their url, and tests and reloading applications make new ones all the time."""
    kept = []
    for _ in range(200):
        store = MemoryStore()
        settings = Settings(url=store)
        assert DocumentCodec.of(settings) is DocumentCodec.of(settings)
        kept.append(weakref.ref(store))
        del store, settings
    gc.collect()
    assert sum(reference() is not None for reference in kept) <= 64
