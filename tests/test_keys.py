from __future__ import annotations

import itertools
import uuid
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore import keys
from beaker_statestore.exceptions import ConfigurationError, ValueTooLargeError
from beaker_statestore.keys import KINDS, Namespace

#: Any str, lone surrogates too, with our own signs more often than chance has them.
texts = st.text(st.one_of(st.characters(), st.sampled_from("%:_\x00\x1f\x7f\x9f\ud800\udfff 3A")), max_size=12)
#: What makes prefixes, namespaces and keys that come close to each other.
TOKENS = ["a", ":", "ses", "sion", "st", "ate", "lock", "s"]


def valid(prefix: str) -> bool:
    try:
        keys.validate_prefix(prefix)
    except ConfigurationError:
        return False
    return True


def namespace(prefix: str, kind: str, name: str) -> Namespace:
    return Namespace(prefix, kind, None if kind in keys.UNDIVIDED else name)


# -- escaping


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("", ""),
        ("plain text, Grüße, 日本語 🎉", "plain text, Grüße, 日本語 🎉"),
        ("a:b%c", "a%3Ab%25c"),
        ("\x00\n\x7f\x85", "%00%0A%7F%C2%85"),
        ("\ud800", "%ED%A0%80"),
        ("\ud83d\ude00", "%ED%A0%BD%ED%B8%80"),
        ("\U0001f600", "\U0001f600"),
    ],
)
def test_escaping_touches_only_what_is_unsafe(text: str, escaped: str) -> None:
    assert keys.escape(text) == escaped
    assert keys.unescape(escaped) == text


@given(texts)
def test_escaping_is_reversible_for_any_text_and_makes_it_safe(text: str) -> None:
    escaped = keys.escape(text)
    assert keys.unescape(escaped) == text
    assert ":" not in escaped
    assert escaped.encode("utf-8").decode("utf-8") == escaped
    assert all(ord(character) >= 0x20 and not 0x7F <= ord(character) <= 0x9F for character in escaped)


@given(texts)
def test_a_field_name_is_reversible_for_any_text_and_never_one_of_ours(text: str) -> None:
    name = keys.escape_field(text)
    assert keys.unescape(name) == text
    assert not name.startswith("_")
    assert name.encode("utf-8").decode("utf-8") == name


def test_a_field_name_keeps_its_colons_readable() -> None:
    assert keys.escape_field("app.handlers.news:announce_list") == "app.handlers.news:announce_list"
    assert keys.escape_field("_expires") == "%5Fexpires"


@pytest.mark.parametrize("text", ["100%", "%", "%3a", "%GG", "%FF", "%C2", "50%-off"])
def test_unescaping_leaves_alone_what_escaping_never_makes(text: str) -> None:
    assert keys.unescape(text) == text


# -- record keys


@pytest.mark.parametrize(
    ("namespace", "key", "record"),
    [
        (Namespace("", "session", "0123456789abcdef" * 2), "session", "session:0123456789abcdef0123456789abcdef"),
        (Namespace("shop:", "session", "0" * 32), "other", f"shop:session:{'0' * 32}:other"),
        (Namespace("", "cache", "/app/pages.py|index"), "de", "cache:/app/pages.py|index:de"),
        (Namespace("a.", "cache", "x:y"), "k:é", "a.cache:x%3Ay:k%3Aé"),
        (Namespace("", "state", None), "zoe@example.org", "state:zoe@example.org"),
        (Namespace("", "state", None), None, "state:%"),
        (Namespace("", "state", None), "", "state:"),
        (Namespace("", "confirm", "app.news"), "zoe@example.org", "confirm:app.news:zoe@example.org"),
    ],
)
def test_the_format_of_record_keys(namespace: Namespace, key: str | None, record: str) -> None:
    assert namespace.record(key) == record.encode("utf-8")
    assert namespace.key(record.encode("utf-8")) == key


@given(st.sampled_from(sorted(KINDS)), texts, st.none() | texts)
def test_every_key_comes_back_from_its_record_key(kind: str, name: str, key: str | None) -> None:
    subject = namespace("p:", kind, name)
    record = subject.record(key)
    assert record.startswith(subject.scan_prefix)
    assert subject.scan_prefix.startswith(keys.kind_prefix("p:", kind))
    assert subject.key(record) == key


def test_no_two_things_share_a_record_key_or_a_scan_prefix() -> None:
    """Tried on every combination of tokens that are made to come close."""
    prefixes = [
        prefix
        for length in range(3)
        for prefix in map("".join, itertools.product(TOKENS, repeat=length))
        if valid(prefix)
    ]
    names = ["", ":", "a", "a:", "%", "ses", "session:"]
    all_keys = [None, "", ":", "%", "a", "a:a", "session"]
    spaces = {namespace(*parts) for parts in itertools.product(prefixes, sorted(KINDS), names)}
    owners: dict[bytes, tuple[Namespace, str | None]] = {}
    for space, key in itertools.product(spaces, all_keys):
        assert owners.setdefault(space.record(key), (space, key)) == (space, key)
    ordered = sorted(owners)
    for space in spaces:
        for record in ordered[bisect_left(ordered, space.scan_prefix) :]:
            if not record.startswith(space.scan_prefix):
                break
            assert owners[record][0] == space


near = st.lists(st.sampled_from([*TOKENS, "%", "é", "cache:", "ca", "che", "_", "-", "/"]), max_size=5).map("".join)
things = st.tuples(
    near.filter(lambda text: text.isascii() and "%" not in text and valid(text)),
    st.sampled_from(sorted(KINDS)),
    near,
    st.none() | near,
)


@given(things, things)
def test_different_things_have_different_record_keys(
    one: tuple[str, str, str, str], two: tuple[str, str, str, str]
) -> None:
    spaces = [namespace(prefix, kind, name) for prefix, kind, name, _ in (one, two)]
    records = [space.record(thing[3]) for space, thing in zip(spaces, (one, two), strict=True)]
    assert (records[0] == records[1]) == (spaces[0] == spaces[1] and one[3] == two[3])
    assert records[1].startswith(spaces[0].scan_prefix) == (spaces[0] == spaces[1])


def test_no_kind_is_the_end_of_another() -> None:
    """What the proof in `validate_prefix` stands on; for a new kind, too."""
    assert not [(one, two) for one, two in itertools.permutations(KINDS, 2) if two.endswith(one)]
    assert not [kind for kind in KINDS if ":" in kind]


def test_what_somebody_else_has_put_there_reads_as_a_key_of_another_record() -> None:
    space = Namespace("", "cache", "n")
    for rest in (b"\xff\xfe", b"a:b", b"%3a", b"%FF", b"a\x00b", b"%%"):
        record = space.scan_prefix + rest
        assert space.record(space.key(record)) != record


# -- session ids


def test_a_session_id_of_beakers_own_making_is_kept_readable() -> None:
    session_id = uuid.uuid4().hex
    assert Namespace("", "session", session_id).record("session") == f"session:{session_id}".encode()


FORGED_IDS = [
    "", "a" * 31, "\uff10" * 32, "a" * 33, "A" * 32, "g" * 32, "a" * 32 + "\n", "\ud800",
    "../../etc/passwd", "x" * 1_000_000,
]  # fmt: skip


@pytest.mark.parametrize("session_id", FORGED_IDS, ids=range(len(FORGED_IDS)))
def test_any_other_session_id_is_kept_as_its_hash(session_id: str) -> None:
    record = Namespace("", "session", session_id).record("session").decode("ascii")
    assert record.startswith("session:sha256-")
    assert len(record) == len("session:sha256-") + 64


def test_hashed_session_ids_stay_different_and_cannot_be_asked_for_by_their_hash() -> None:
    records = {Namespace("", "session", session_id).record("session") for session_id in FORGED_IDS}
    assert len(records) == len(FORGED_IDS)
    for record in records:
        shown = record.decode("ascii").removeprefix("session:")
        assert Namespace("", "session", shown).record("session") not in records


# -- what is refused


def test_a_key_that_is_too_long_is_refused_by_its_beginning_and_length() -> None:
    space = Namespace("", "cache", "n")
    room = keys.MAX_KEY - len(space.scan_prefix)
    assert len(space.record("k" * room)) == keys.MAX_KEY
    with pytest.raises(ValueTooLargeError, match=r"a cache key that begins with 'kkk.*65537 bytes.*65536"):
        space.record("k" * (room + 1))
    with pytest.raises(ValueTooLargeError):
        space.record("é" * (room // 2 + 1))


@pytest.mark.parametrize(
    "prefix", ["", "shop:", "shop.example.org/", "A-1_b", "sessions", "session", "x" * 64, "session/:"]
)
def test_a_prefix_that_keeps_its_records_apart_is_accepted(prefix: str) -> None:
    keys.validate_prefix(prefix)


@pytest.mark.parametrize(
    ("prefix", "complaint"),
    [
        ("session:", "holds 'session:'.*write 'session/'"),
        ("my-cache:shop:", "holds 'cache:'"),
        ("a b", "use only"),
        ("é", "use only"),
        ("a%", "use only"),
        ("a\n", "use only"),
        ("\u0663", "use only"),
        ("x" * 65, "65 characters; it may have 64"),
    ],
)
def test_any_other_prefix_is_refused_with_the_reason(prefix: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        keys.validate_prefix(prefix)
    with pytest.raises(ConfigurationError):
        Namespace(prefix, "state", None)


@pytest.mark.parametrize(
    ("kind", "name"), [("sessions", "x"), ("", "x"), ("cache", None), ("session", None), ("state", "x")]
)
def test_a_namespace_that_does_not_fit_its_kind_is_refused(kind: str, name: str | None) -> None:
    with pytest.raises(ConfigurationError):
        Namespace("", kind, name)


# -- what record keys tell, and what of them is shown


@given(st.lists(st.sampled_from(TOKENS), max_size=4).map("".join).filter(valid), st.sampled_from(sorted(KINDS)), texts)
def test_a_record_key_tells_its_prefix_and_kind(prefix: str, kind: str, text: str) -> None:
    assert keys.prefix_and_kind(namespace(prefix, kind, text).record(text)) == (prefix, kind)


@pytest.mark.parametrize(
    "record",
    [b"", b"session", b"sessions:x", b"SESSION:x", b"a b session:x", b"\xffsession:x", b"p" * 65 + b"session:x"],
)
def test_what_no_valid_prefix_begins_is_no_record_key_of_ours(record: bytes) -> None:
    assert keys.prefix_and_kind(record) is None


ID = "0123456789abcdef0123456789abcdef"
HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("record", "shown"),
    [
        (f"session:{ID}", "session:01234567…"),
        (f"shop:session:{ID}:x", "shop:session:01234567…:x"),
        (f"session:sha256-{HASH}", "session:sha256-01234567…"),
        ("session:short", "session:short"),
        ("session:tenant-1-0001", "session:tenant-1-0001"),
        (f"lock:cart:{ID}", "lock:cart:01234567…"),
        (f"index:user:sha256-{HASH}", "index:user:sha256-01234567…"),
        (f"index:user:{ID}0", f"index:user:{ID}0"),
        (f"cache:ns:{ID}", f"cache:ns:{ID}"),
        (f"state:{ID}@x", "state:01234567…@x"),
        (f"theirs {ID}", f"theirs {ID}"),
        (b"session:\xff" + ID.encode(), "session:\udcff01234567…"),
    ],
)
def test_no_whole_session_id_is_shown(record: str | bytes, shown: str) -> None:
    assert keys.shortened(record) == shown


@given(st.sampled_from(sorted(KINDS - {"cache"})), st.uuids(version=4), st.booleans())
def test_whatever_kind_holds_an_id_it_is_shortened(kind: str, session_id: uuid.UUID, hashed: bool) -> None:
    name = session_id.hex
    record = Namespace("", kind, None if kind in keys.UNDIVIDED else name, hash_ids=hashed).record(name)
    assert name[:9] not in keys.shortened(record)
    assert record.startswith(keys.shortened(record).partition("…")[0].encode())
