from __future__ import annotations

import base64
import collections
import contextlib
import copyreg
import datetime
import decimal
import enum
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
import uuid
import zlib
import zoneinfo
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest
from beaker import crypto, util
from beaker.container import NamespaceManager
from beaker.crypto import noencryption
from beaker.session import Session
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore import documents, payloads
from beaker_statestore.documents import Document
from beaker_statestore.exceptions import DocumentError, DocumentRefusedError, ValueTooLargeError
from beaker_statestore.payloads import Form, Payload

FORMS: list[Form] = ["pickle", "json"]
SERIALIZERS: dict[str, Any] = {"pickle": util.PickleSerializer(), "json": util.JsonSerializer()}
HERE = __name__
BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def payload_of(data: bytes) -> str:
    """What Beaker makes of a serializer's bytes without an encrypt_key."""
    return base64.b64encode(data).decode("ascii")


def beakers(form: Form, value: Any) -> str:
    return payload_of(SERIALIZERS[form].dumps(value))


def refusal(payload: object, **options: Any) -> str:
    with pytest.raises(DocumentRefusedError) as caught:
        payloads.read(payload, **options)
    return str(caught.value)


# -- round trips

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)
objects = st.dictionaries(st.text(), values, max_size=5)


@given(objects, st.sampled_from(FORMS))
def test_every_document_goes_through_both_ways_as_beakers_own_serializers_have_it(
    document: Document, form: Form
) -> None:
    written = payloads.write(document, form)
    assert documents.same(SERIALIZERS[form].loads(base64.b64decode(written)), document)
    for payload in (written, beakers(form, document)):
        read = payloads.read(payload)
        assert (read.form, read.opaque) == (form, None)
        assert documents.same(read.document, document)


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_custom_serializer_may_use_a_newer_pickle_protocol(protocol: int) -> None:
    document: Document = {"a": ["é" * 300, {"n": 2**40}], "e": {}}
    assert payloads.read(payload_of(pickle.dumps(document, protocol))) == Payload(document, "pickle")
    assert payloads.read(payload_of(pickle._dumps(document, protocol))).document == document  # type: ignore[attr-defined]  # pickle.py's own, without C


class Kept(NamespaceManager):
    """Keeps documents as the real one does, in a dict."""

    stored: ClassVar[dict[str, Payload]] = {}

    def __init__(self, namespace: str, *, encrypted: bool = False, **options: Any) -> None:
        super().__init__(namespace)
        self.encrypted = encrypted

    def __contains__(self, key: object) -> bool:
        return self.namespace in self.stored

    def __getitem__(self, key: str) -> str:
        payload = self.stored[self.namespace]
        if payload.document is None:
            assert payload.opaque is not None
            return payload.opaque
        assert payload.form is not None
        return payloads.write(documents.decode(documents.encode(payload.document)), payload.form)

    def __setitem__(self, key: str, value: str) -> None:
        self.stored[self.namespace] = payloads.read(value, encrypted=self.encrypted)


def session(session_id: str | None = None, **options: Any) -> Session:
    return Session({}, id=session_id, use_cookies=False, namespace_class=Kept, **options)


def saved(**options: Any) -> tuple[Payload, dict[str, Any]]:
    """A session through real Beaker: what is kept of it, and what the next request sees."""
    first = session(**options)
    first.update(user={"name": "Zoë"}, cart=[1, 2.5, None, True], pair=(1, 2))
    first.save()
    return Kept.stored[first.id], dict(session(first.id, **options))


@pytest.mark.parametrize("form", FORMS)
def test_a_session_goes_through_real_beaker(form: Form) -> None:
    kept, seen = saved(data_serializer=form)
    assert kept.form == form
    assert kept.document is not None
    assert kept.document["user"] == {"name": "Zoë"}
    assert {"_accessed_time", "_creation_time", "_domain", "_path"} <= kept.document.keys()
    assert (seen["cart"], seen["pair"]) == ([1, 2.5, None, True], [1, 2])


def test_switching_serializers_keeps_the_session() -> None:
    first = session(data_serializer="pickle")
    first["user"] = "zoe"
    first.save()
    document = Kept.stored[first.id].document
    Kept.stored[first.id] = Payload(document, "json")
    assert session(first.id, data_serializer="json")["user"] == "zoe"


KEYS = {"encrypt_key": "0123456789abcdef", "validate_key": "secret"}


@pytest.mark.parametrize("bits", [48, 128])
@pytest.mark.parametrize("form", FORMS)
def test_an_encrypted_session_goes_through_real_beaker_untouched(form: Form, bits: int) -> None:
    options = {**KEYS, "data_serializer": form, "encrypt_nonce_bits": bits, "encrypted": True}
    kept, seen = saved(**options)
    assert kept.document is None
    assert kept.form is None
    assert kept.opaque is not None
    assert seen["user"] == {"name": "Zoë"}


@pytest.mark.parametrize("bits", [48, 128])
@pytest.mark.parametrize("form", FORMS)
def test_an_encrypted_session_is_refused_unless_expected(form: Form, bits: int) -> None:
    with pytest.raises(DocumentRefusedError, match=r"neither Beaker's pickle nor its JSON.*encrypted = true"):
        saved(**KEYS, data_serializer=form, encrypt_nonce_bits=bits)


@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("bits", [48, 64, 96, 128, 256])
@pytest.mark.parametrize("form", FORMS)
def test_plain_text_that_only_seems_encrypted_is_refused_with_the_remedy(
    form: Form, bits: int, encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Beaker does without any AES library, and without a word."""
    monkeypatch.setitem(crypto.CRYPTO_MODULES, "none", noencryption)
    options = {**KEYS, "data_serializer": form, "encrypt_nonce_bits": bits, "crypto_type": "none"}
    with pytest.raises(DocumentRefusedError, match=r'no AES library.*pip install "cryptography"'):
        saved(**options, encrypted=encrypted)


@pytest.mark.parametrize("form", FORMS)
def test_a_plain_session_is_refused_where_encryption_is_promised(form: Form) -> None:
    with pytest.raises(
        DocumentRefusedError, match=r"encrypted = true is set, but the session is not encrypted: set encrypt_key"
    ):
        saved(data_serializer=form, encrypted=True)


def test_ciphertext_is_never_mistaken_for_plain_text() -> None:
    """Least of all where chance has made its first bytes right."""
    chance = random.Random(7)
    for number in range(3000):
        body = bytearray(chance.randbytes(chance.randrange(3, 200)))
        body[:3] = [b"\x80\x02}", b"\x78\x9c\xab", body[:3]][number % 3]
        for nonce in ("", payload_of(chance.randbytes(6)), payload_of(chance.randbytes(16))):
            payload = nonce + payload_of(bytes(body))
            assert payloads.read(payload, encrypted=True) == Payload(opaque=payload)


# -- what is refused


class Tagged:
    """A custom serializer."""

    def loads(self, data: bytes) -> Any:
        return json.loads(data)

    def dumps(self, value: Any) -> bytes:
        return json.dumps(value).encode()


def test_a_custom_serializers_session_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        DocumentRefusedError, match=r"Remove a custom data_serializer: 'pickle' and 'json' are understood"
    ):
        saved(data_serializer=Tagged())


@pytest.mark.parametrize(
    "payload",
    ["", "x", "text", "é" * 40, "\ud800abc", "gAJ", "gAJ9", "eJw=", "a:0:{}", payload_of(b""), payload_of(b"{}"),
     payload_of(pickle.dumps({"a": 1}, 0)), payload_of(pickle.dumps({"a": 1}, 1)), payload_of(pickle.dumps([1], 2)),
     payload_of(pickle.dumps(collections.OrderedDict(), 2)), payload_of(json.dumps({"a": 1}).encode())],
)  # fmt: skip
def test_any_other_text_is_refused(payload: str) -> None:
    refusal(payload)


def test_a_payload_that_is_no_text_is_refused_by_its_type() -> None:
    for payload, name in ((b"gAJ9", "bytes"), ({"a": 1}, "dict"), (None, "NoneType")):
        assert refusal(payload) == f"a session's payload is a str, but this is a {name}"


@pytest.mark.parametrize("form", FORMS)
def test_a_session_that_is_no_dict_is_refused(form: Form) -> None:
    for value in ([1], 5, "text", None):
        refusal(beakers(form, value))
    assert refusal(beakers("json", [1])) == "session is a list; it has to be a dict"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_payload_cut_off_anywhere_is_refused(form: Form, protocol: int) -> None:
    document: Document = {"user": "zoe", "when": 1290000000.5, "cart": [1, 2, {"n": "é"}]}
    whole = pickle.dumps(document, protocol) if form == "pickle" else SERIALIZERS[form].dumps(document)
    for length in range(len(whole)):
        refusal(payload_of(whole[:length]))


@pytest.mark.parametrize("form", FORMS)
def test_anything_behind_the_end_is_refused(form: Form) -> None:
    whole = SERIALIZERS[form].dumps({"a": 1})
    assert "has something behind its end" in refusal(payload_of(whole + b"."))
    assert "has something behind its end" in refusal(payload_of(whole + whole + b"."))


def test_what_is_wrong_with_a_json_payload_is_said() -> None:
    assert "cannot be unpacked" in refusal(payload_of(b"x\x9c" + b"\xff" * 20))
    assert "is not JSON" in refusal(payload_of(zlib.compress(b"{'a': 1}")))
    assert "is not JSON" in refusal(payload_of(zlib.compress(b'{"a": "\xff"}')))
    assert "is not JSON" in refusal(payload_of(zlib.compress(b"[" * 100_000)))
    assert "is not base64 throughout" in refusal(beakers("json", {"a": 1}) + "!")


def test_a_session_beyond_the_limit_is_refused_by_its_largest_field() -> None:
    for form in FORMS:
        payload = beakers(form, {"small": 1, "large": ["text"] * 1000})
        with pytest.raises(
            ValueTooLargeError, match=r"session takes more than the limit of 2,000 bytes; .*'large' with"
        ):
            payloads.read(payload, max_bytes=2000)
        assert payloads.read(payload, max_bytes=8000).form == form


@pytest.mark.parametrize("text", ["é", "中", "😀", "\x01", "x", '"'])
def test_a_session_within_the_limit_is_never_refused_for_beakers_verbosity(text: str) -> None:
    for document in (
        {"k": text * 5000},
        {str(n): text for n in range(2000)},
        {"k": [text] * 2000},
        {"k": [[], 0, {}] * 2000},
    ):
        size = len(documents.encode(document))
        for form in FORMS:
            assert payloads.read(beakers(form, document), max_bytes=size).document == document


def test_a_compression_bomb_is_refused_without_unpacking_it() -> None:
    bomb = payload_of(zlib.compress(b'{"a": "' + b"x" * 60_000_000 + b'"}', 1))
    tracemalloc.start()
    try:
        with pytest.raises(ValueTooLargeError, match="the session unpacks to more than 8,000,000 bytes"):
            payloads.read(bomb, max_bytes=250_000)
        assert tracemalloc.get_traced_memory()[1] < 30_000_000
    finally:
        tracemalloc.stop()


def test_a_huge_payload_is_refused_at_once() -> None:
    with pytest.raises(ValueTooLargeError, match=r"the session takes 3,300,000 characters in Beaker's form"):
        payloads.read("x" * 3_300_000, max_bytes=100_000)


@pytest.mark.parametrize("types", ["strict", "tagged", "warn"])
@pytest.mark.parametrize("times", [2, 9, 20])
def test_a_session_far_beyond_the_limit_is_refused_by_its_largest_field(times: int, types: str) -> None:
    for form in FORMS:
        for upload in ("x" * times * 100_000, ["some text"] * times * 9000):
            with pytest.raises(ValueTooLargeError, match=r"its largest fields are 'upload' with (about|more than) \d"):
                payloads.read(beakers(form, {"user": "zoe", "upload": upload}), max_bytes=100_000, types=types)


# -- what is found in a pickle


class Color(enum.Enum):
    RED = 1


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int


class Markup(str):
    __slots__ = ()


class Plain:
    def __init__(self) -> None:
        self.a = 1


class Slotted:
    __slots__ = ("a",)

    def __init__(self) -> None:
        self.a = 1


class Outer:
    class Inner:
        pass


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (datetime.datetime(2010, 1, 1), "a datetime.datetime; store it as text, for example .isoformat()"),
        (datetime.timedelta(1), "a datetime.timedelta; store it as a number"),
        (decimal.Decimal("1.5"), "a decimal.Decimal; store it as text"),
        (uuid.UUID(int=1), "an uuid.UUID; store it as text"),
        (b"abc\xff", "bytes; store text"),
        (b"", "bytes; store text"),
        (bytearray(b"abc"), "a bytearray; store text"),
        ({1, 2}, "a set; store it as a list"),
        (frozenset({1}), "a frozenset; store it as a list"),
        (1j, "a complex;"),
        (range(3), "a range;"),
        (ValueError("x"), "a ValueError;"),
        (collections.OrderedDict(a=1), "a collections.OrderedDict;"),
        (collections.defaultdict(int, a=1), "a collections.defaultdict;"),
        (collections.deque([1]), "a collections.deque;"),
        (collections.Counter("aab"), "a collections.Counter;"),
        (Point(1), f"a {HERE}.Point;"),
        (Markup("<b>"), f"a {HERE}.Markup;"),
        (Plain(), f"a {HERE}.Plain;"),
        (Slotted(), f"a {HERE}.Slotted;"),
        (Outer.Inner(), f"a {HERE}.Outer.Inner;"),
        (Plain, f"the class or function {HERE}.Plain;"),
        (Outer.Inner, f"the class or function {HERE}.Outer.Inner;"),
        (os.getpid, "the class or function posix.getpid;"),
        (float("nan"), "nan, which JSON does not have"),
        (2**64, "an integer beyond 64 bits"),
        (10**5000, "an integer beyond 64 bits"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_json_cannot_hold_is_named_with_its_place(value: Any, name: str, protocol: int) -> None:
    message = refusal(payload_of(pickle.dumps({"cart": [0, {"when": value}]}, protocol)))
    assert message.startswith(f"session['cart'][1]['when'] is {name}")


@pytest.mark.parametrize("value", [Color.RED, Level.LOW])
def test_a_member_of_an_enum_is_named_with_its_place(value: enum.Enum) -> None:
    """Python 3.11.2 pickles it as an attribute of its class, 3.11.7 as a call of it."""
    kind = re.escape(f"{HERE}.{type(value).__name__}")
    message = refusal(payload_of(pickle.dumps({"mode": value}, 2)))
    assert re.match(rf"session\['mode'\] is (a {kind};|the class or function {kind}\.{value.name};)", message), message


def test_a_key_that_is_no_text_is_named_with_its_place() -> None:
    key = datetime.date(2010, 1, 1)
    assert refusal(beakers("pickle", {"a": {key: 1}})).startswith("session['a'] has a key that is a datetime.date; ")


def test_a_nan_and_a_surrogate_are_named_in_json_too() -> None:
    assert refusal(beakers("json", {"a": [float("inf")]})).startswith(
        "session['a'][0] is inf, which JSON does not have"
    )
    assert refusal(beakers("json", {"a": "\ud800"})).startswith("session['a'] has a lone surrogate")


def test_objects_that_contain_themselves_are_refused() -> None:
    ring: dict[str, Any] = {}
    ring["a"] = [ring]
    assert refusal(beakers("pickle", ring)).startswith("session contains itself")


# -- nothing in a pickle runs

MARKER = "it_ran"
TOUCH = f"open({MARKER!r}, 'w').close()"


class Reduced:
    """Pickles as a call."""

    def __init__(self, *reduced: Any) -> None:
        self.reduced = reduced

    def __reduce__(self) -> Any:
        return tuple(iter(part) if isinstance(part, list) else part for part in self.reduced)


RUN = Reduced(exec, (TOUCH,))


SESSIONS: dict[str, Any] = {
    "os.system": {"a": Reduced(os.system, (f"touch {MARKER}",))},
    "eval": {"a": [1, Reduced(eval, (TOUCH,))]},
    "as a key": {Reduced(eval, (TOUCH,)): 1},
    "as state": {"a": Reduced(collections.OrderedDict, (), {"x": RUN})},
    "as a member": {"a": Reduced(list, (), None, [RUN])},
    "as an item": {"a": Reduced(dict, (), None, None, [("k", RUN)])},
    "in a set": {"a": {1, Reduced(eval, (TOUCH,))}},
    "as an argument": {"a": Reduced(str, (RUN,))},
}
RUNNING = {
    f"{name}, protocol {protocol}": pickle.dumps(value, protocol)
    for name, value in SESSIONS.items()
    for protocol in (2, 4)
}
#: What no pickler writes, made by hand. Each begins as Beaker's own does, and the code's result is thrown away.
SCRIPT = f"V{TOUCH}\n".encode()
RUNNING |= {
    "GLOBAL and REDUCE": b"\x80\x02}cbuiltins\nexec\n(" + SCRIPT + b"tR0.",
    "INST": b"\x80\x02}(" + SCRIPT + b"ibuiltins\nexec\n0.",
    "OBJ": b"\x80\x02}(cbuiltins\nexec\n" + SCRIPT + b"o0.",
    "STACK_GLOBAL": b"\x80\x04}\x8c\x08builtins\x8c\x04exec\x93(" + SCRIPT + b"tR0.",
    "a call of a call": b"\x80\x02}c__builtin__\ngetattr\n(cbuiltins\nexec\nV__call__\ntR(" + SCRIPT + b"tR0.",
    "behind the end": b"\x80\x02}cbuiltins\nexec\n(" + SCRIPT + b"tR0.\x80\x02}.",
}
HARMFUL = RUNNING | {
    "NEWOBJ": b"\x80\x02}cos\nsystem\n(Vtouch x\nt\x810.",
    "NEWOBJ_EX": b"\x80\x04}cos\nsystem\n(Vtouch x\nt}\x920.",
    "BUILD on a class": b"\x80\x02}cbuiltins\nobject\n}V__setstate__\ncos\nsystem\nsb0.",
    "BUILD with slots": b"\x80\x02}cbuiltins\nobject\n)\x81N}V__class__\ncos\nsystem\ns\x86b0.",
    "BUILD on a dict": b"\x80\x02}}V__class__\ncos\nsystem\nsb.",
    "APPENDS": b"\x80\x02}cbuiltins\nlist\n)R(cos\nsystem\ne0.",
    "SETITEMS": b"\x80\x02}cbuiltins\ndict\n)R(cos\nsystem\nI1\nu0.",
    "ADDITEMS": b"\x80\x04}cbuiltins\nset\n)R(cos\nsystem\n\x900.",
    "getattr of data": b"\x80\x02}cbuiltins\ngetattr\n(]V__class__\ntR0.",
    "_reconstructor": b"\x80\x02}ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR0.",
    "_reconstructor of data": b"\x80\x02}ccopy_reg\n_reconstructor\n(]NNtR0.",
    "a call of data": b"\x80\x02}(V1\ntR.",
    "a persistent id": b"\x80\x02}Pevil\n0.",
    "a persistent object": b"\x80\x02}Vevil\nQ0.",
    "a buffer": b"\x80\x05}\x970.",
    "a read-only buffer": b"\x80\x05}\x97\x980.",
    "an extension code": b"\x80\x02}\x82\xf00.",
    "a dotted name": b"\x80\x04}\x8c\x08builtins\x8c\x11str.__class__.mro\x93)R0.",
    "a hostile name": b"\x80\x02}c\x00m\n\xc3\xa9\x1b\n)R0.",
    "a name that is not UTF-8": b"\x80\x02}c\xff\xfe\n\xff\n)R0.",
    "no value": b"\x80\x02}0.",
    "no such memo": b"\x80\x02}h\x07.",
    "a huge announced length": b"\x80\x04}\x8e" + b"\xff" * 7 + b"\x7f.",
    "a huge frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}.",
    "an unhashable key": b"\x80\x02}]Ns.",
}


class Observed:
    """What the interpreter reports of names being resolved and code being run. An audit hook cannot be removed."""

    FAMILIES = frozenset({"pickle", "os", "exec", "compile", "import", "open", "subprocess", "object"})

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.on and event.split(".")[0] in self.FAMILIES:
            self.events.append(event)


_observed = Observed()
# pickle.py imports this codec when it first meets text of protocol 0.
"".encode("raw-unicode-escape")


@contextlib.contextmanager
def watching() -> Iterator[list[str]]:
    """What is reported meanwhile."""
    _observed.events.clear()
    _observed.on = True
    try:
        yield _observed.events
    finally:
        _observed.on = False


class PythonUnpickler(pickle._Unpickler):
    """The unpickler of interpreters that have no C."""

    special = payloads._Unpickler.special

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._stand_ins: dict[Any, Any] = {}

    find_class = payloads._Unpickler.find_class


class PythonTaggedUnpickler(PythonUnpickler):
    special = payloads._TaggedUnpickler.special


@pytest.fixture(params=["C", "Python"])
def unpickler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the two implementations in turn does the work."""
    assert payloads._Unpickler.__mro__[1].__module__ == "_pickle"
    if request.param == "Python":
        monkeypatch.setattr(payloads, "_Unpickler", PythonUnpickler)
        monkeypatch.setattr(payloads, "_TaggedUnpickler", PythonTaggedUnpickler)
    return str(request.param)


@pytest.mark.parametrize("name", RUNNING)
def test_the_poison_is_real(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the tests below would show nothing."""
    monkeypatch.chdir(tmp_path)
    with watching() as events:
        pickle.loads(RUNNING[name])
    assert (tmp_path / MARKER).exists()
    assert "pickle.find_class" in events


@pytest.mark.parametrize("name", HARMFUL)
@pytest.mark.parametrize("types", ["strict", "tagged", "warn"])
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize("nonce", ["", "QUJDREVGR0hJSktMTU5PUA=="])
def test_nothing_in_a_pickle_runs(
    name: str, nonce: str, encrypted: bool, types: str, unpickler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    payload = nonce + payload_of(HARMFUL[name])
    with watching() as events, contextlib.suppress(DocumentRefusedError):
        read = payloads.read(payload, encrypted=encrypted, types=types)
        # All harm had been thrown away within the pickle, or, as nobody can read it, it may be ciphertext.
        assert read == (Payload(opaque=payload) if encrypted else Payload({}, "pickle"))
    assert events == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("os.system", "session['a'] is a posix.system; "),
        ("eval", "session['a'][1] is an eval; "),
        ("as a key", "session has a key that is an eval; "),
        ("as state", "session['a'] is a collections.OrderedDict; "),
        ("as a member", "session['a'] is a list; "),
        ("as an item", "session['a'] is a dict; "),
        ("in a set", "session['a'] is a set; "),
        ("as an argument", "session['a'] is a str; "),
    ],
)
def test_a_poisoned_session_is_refused_by_place_and_name(name: str, complaint: str, unpickler: str) -> None:
    assert refusal(payload_of(RUNNING[f"{name}, protocol 2"])).startswith(complaint)


@pytest.mark.parametrize("name", sorted(HARMFUL.keys() - RUNNING.keys() | {"behind the end"}))
def test_harmful_pickles_are_refused_unless_all_harm_was_thrown_away(name: str, unpickler: str) -> None:
    thrown_away = {
        "NEWOBJ", "NEWOBJ_EX", "BUILD on a class", "BUILD with slots", "APPENDS", "SETITEMS", "ADDITEMS",
        "getattr of data", "_reconstructor", "_reconstructor of data", "a dotted name", "a hostile name",
    }  # fmt: skip
    if name in thrown_away:
        assert payloads.read(payload_of(HARMFUL[name])).document == {}
    else:
        refusal(payload_of(HARMFUL[name]))


# -- the tagged types' spellings


def tagged_of(data: bytes) -> Any:
    document = payloads.read(payload_of(data), types="tagged").document
    assert document is not None
    return document["a"]


LATIN = "c_codecs\nencode\n(V{}\nVlatin1\ntR"
NOON = LATIN.format("\x07\\u00ea\x0b\x15\x0c\x00\x00\x00\x00\x05")
TWELVE = LATIN.format("\x0c\x00\x00\x00\x00\x05")
#: Protocol 2 as Pythons 3.10 to 3.13 write it, put down so that no later one can change what is tested.
SPELLINGS = {
    "datetime": (f"cdatetime\ndatetime\n({NOON}tR", {"$datetime": "2026-11-21T12:00:00.000005"}),
    "aware": (
        f"cdatetime\ndatetime\n({NOON}cdatetime\ntimezone\n(cdatetime\ntimedelta\n(I-1\nI68400\nI0\ntRtRtR",
        {"$datetime": "2026-11-21T12:00:00.000005-05:00"},
    ),
    "aware, named": (
        f"cdatetime\ntime\n({TWELVE}cdatetime\ntimezone\n(cdatetime\ntimedelta\n(I0\nI0\nI0\ntRVGMT\ntRtR",
        {"$time": "12:00:00.000005+00:00"},
    ),
    "zoned": (
        (
            f"cdatetime\ntime\n({TWELVE}c__builtin__\ngetattr\n(czoneinfo\nZoneInfo\nV_unpickle\ntR"
            "(VEurope/Berlin\nI1\ntRtR"
        ),
        {"$time": "12:00:00.000005[Europe/Berlin]"},
    ),
    "fold": (
        "cdatetime\ntime\n(" + LATIN.format("\\u008c\x00\x00\x00\x00\x05") + "tR",
        {"$time": "12:00:00.000005[_fold=1]"},
    ),
    "date": ("cdatetime\ndate\n(" + LATIN.format("\x07\\u00ea\x0b\x15") + "tR", {"$date": "2026-11-21"}),
    "timedelta": ("cdatetime\ntimedelta\n(I-1\nI2\nI3\ntR", {"$timedelta": [-1, 2, 3]}),
    "Decimal": ("cdecimal\nDecimal\n(V1.10\ntR", {"$decimal": "1.10"}),
    "UUID": ("cuuid\nUUID\n)\x81}Vint\nI5\nsb", {"$uuid": "00000000-0000-0000-0000-000000000005"}),
    "UUID of libuuid": (
        "cuuid\nUUID\n)\x81}(Vint\nI5\nVis_safe\nI0\nub",
        {"$uuid": "00000000-0000-0000-0000-000000000005"},
    ),
    "set": ("c__builtin__\nset\n(](Vb\nVa\netR", {"$set": ["a", "b"]}),
    "frozenset": (
        "c__builtin__\nfrozenset\n(](c__builtin__\nfrozenset\n(]tRetR",
        {"$frozenset": [{"$frozenset": []}]},
    ),
    "bytes": (LATIN.format("a\\u00ff"), {"$bytes": "Yf8="}),
    "no bytes": ("c__builtin__\nbytes\n)R", {"$bytes": ""}),
    "tuple": ("(I1\nI2\nt", {"$tuple": [1, 2]}),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_the_spellings_of_protocol_2_are_read(name: str, unpickler: str) -> None:
    text, expected = SPELLINGS[name]
    data = b"\x80\x02}Va\n" + text.encode("latin-1") + b"s."
    assert tagged_of(data) == expected
    if name != "tuple":
        refusal(payload_of(data))


EACH: list[Any] = [
    datetime.datetime(2026, 11, 21, 12, 0, 0, 5), datetime.datetime(1, 1, 1, tzinfo=datetime.timezone.utc),
    datetime.datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=datetime.timezone(datetime.timedelta(0, 1), "X")),
    datetime.datetime(2026, 7, 1, tzinfo=BERLIN), datetime.time(1, 2, tzinfo=BERLIN), datetime.date(1, 1, 1),
    datetime.timedelta.min, datetime.timedelta.max, decimal.Decimal("-0"), decimal.Decimal("1E+400"), uuid.uuid1(),
    uuid.uuid4(), {1, "a", b"", None}, frozenset({(1, frozenset())}), b"", bytes(range(256)), (), (1, ({2},)),
]  # fmt: skip


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", EACH, ids=lambda value: type(value).__name__)
def test_what_this_python_writes_is_read(value: Any, protocol: int, unpickler: str) -> None:
    for dumps in (pickle.dumps, pickle._dumps):  # type: ignore[attr-defined]  # C's and pickle.py's own
        read = payloads.read(payload_of(dumps({"a": value, "b": [value]}, protocol)), types="tagged")
        assert read.document is not None
        seen = pickle.loads(base64.b64decode(payloads.write(read.document, "pickle", types="tagged")))
        assert seen == {"a": value, "b": [value]}
        assert type(seen["a"]) is type(value)


MALFORMED = {
    "no arguments": "cdatetime\ndatetime\n)R",
    "numbers": "cdatetime\ndatetime\n(I2026\nI1\nI1\ntR",
    "text": "cdatetime\ndatetime\n(V0123456789\ntR",
    "short": "cdatetime\ndatetime\n(" + LATIN.format("\x07") + "tR",
    "month 13": "cdatetime\ndate\n(" + LATIN.format("\x07\x07\x0d\x01") + "tR",
    "hour 99": "cdatetime\ntime\n(" + LATIN.format("\x63\x00\x00\x00\x00\x00") + "tR",
    "too many": "cdatetime\ndate\n(" + LATIN.format("\x07\x07\x01\x01") + "I1\ntR",
    "a zone that is none": "cdatetime\ntime\n(" + LATIN.format("\x01\x00\x00\x00\x00\x00") + "I1\ntR",
    "a zone that is a set": "cdatetime\ntime\n(" + LATIN.format("\x01\x00\x00\x00\x00\x00") + "cbuiltins\nset\n(]tRtR",
    "an offset of days": "cdatetime\ntime\n(" + LATIN.format("\x01\x00\x00\x00\x00\x00") +
    "cdatetime\ntimezone\n(cdatetime\ntimedelta\n(I9\nI0\nI0\ntRtRtR",
    "a file for a zone": "cdatetime\ntime\n(" + LATIN.format("\x01\x00\x00\x00\x00\x00") +
    "c__builtin__\ngetattr\n(czoneinfo\nZoneInfo\nV_unpickle\ntR(V../../etc/passwd\nI1\ntRtR",
    "a class as a zone": "cdatetime\ntime\n(" + LATIN.format("\x01\x00\x00\x00\x00\x00") + "cos\nsystem\ntR",
    "a huge span": "cdatetime\ntimedelta\n(I" + "9" * 4000 + "\nI0\nI0\ntR",
    "a span of floats": "cdatetime\ntimedelta\n(F1.5\nF2.5\nF3\ntR",
    "a span of truth": "cdatetime\ntimedelta\n(I01\nI01\nI01\ntR",
    "no number": "cdecimal\nDecimal\n(Vone\ntR",
    "a number as Python does not write it": "cdecimal\nDecimal\n(V 1_0\ntR",
    "a number beyond all": "cdecimal\nDecimal\n(V1E+" + "9" * 30 + "\ntR",
    "a number of a float": "cdecimal\nDecimal\n(F1.5\ntR",
    "NaN": "cdecimal\nDecimal\n(VsNaN\ntR",
    "no id": "cuuid\nUUID\n)\x81",
    "an id without its number": "cuuid\nUUID\n)\x81}b",
    "an id too large": "cuuid\nUUID\n)\x81}Vint\nI" + "9" * 50 + "\nsb",
    "an id called": "cuuid\nUUID\n(V00000000-0000-0000-0000-000000000005\ntR",
    "an id with more": "cuuid\nUUID\n)\x81}(Vint\nI5\nVx\nI0\nub",
    "gigabytes": "c__builtin__\nbytes\n(I99999999999\ntR",
    "another encoding": "c_codecs\nencode\n(Vabc\nVzlib\ntR",
    "too wide": LATIN.format("\\u4e2d"),
    "a set of a number": "c__builtin__\nset\n(I5\ntR",
    "a set of lists": "c__builtin__\nset\n(](]etR",
    "a set with a member twice": "c__builtin__\nset\n(](I1\nI1\netR",
    "a set with more members": "c__builtin__\nset\n(]tR(I1\ne",
    "a set with a state": "c__builtin__\nset\n(]tR}b",
    "keywords": "c__builtin__\nset\n(]t}Vx\nI1\ns\x92",
    "a class": "cdatetime\ndatetime\n",
    "a zone itself": "cdatetime\ntimezone\n(cdatetime\ntimedelta\n(I0\nI0\nI0\ntRtR",
    "rebuilt": "ccopy_reg\n_reconstructor\n(cdatetime\ndatetime\nc__builtin__\nobject\nNtR",
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_calls_that_no_pickler_writes_are_refused_by_place(name: str, unpickler: str) -> None:
    data = b"\x80\x04}Va\n](" + MALFORMED[name].encode("latin-1") + b"es."
    tracemalloc.start()
    try:
        with watching() as events:
            message = refusal(payload_of(data), types="tagged")
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
    assert message.startswith("session['a'][0]")
    assert events == []


def test_a_set_that_contains_itself_is_refused() -> None:
    data = b"\x80\x02}Va\n]q\x010c__builtin__\nset\n(h\x01tRq\x020h\x01h\x02a0h\x02s."
    assert "contains itself" in refusal(payload_of(data), types="tagged")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("in a set", "session['a'][*] is an eval; "), ("as an argument", "session['a'] is a str; "),
     ("as state", "session['a'] is a collections.OrderedDict; "), ("as a key", "session has a key that is an eval; ")],
)  # fmt: skip
def test_a_poisoned_session_of_tagged_types_is_refused_by_place_and_name(
    name: str, complaint: str, unpickler: str
) -> None:
    for protocol in (2, 4):
        assert refusal(payload_of(RUNNING[f"{name}, protocol {protocol}"]), types="tagged").startswith(complaint)


def test_another_librarys_zone_is_named() -> None:
    class_of_zone = b"cpytz\n_UTC\n)R"
    data = b"\x80\x02}Va\ncdatetime\ntime\n(" + LATIN.format("\x01\x00\x00\x00\x00\x00").encode() + class_of_zone
    assert refusal(payload_of(data + b"tRs."), types="tagged") == (
        "session['a'] is a time with a pytz._UTC for its zone; use datetime.timezone or zoneinfo.ZoneInfo"
    )


@pytest.fixture
def registered() -> Iterator[int]:
    """A number of copyreg's extension registry that stands for os.system."""
    copyreg.add_extension("os", "system", 240)
    try:
        yield 240
    finally:
        copyreg.remove_extension("os", "system", 240)
        copyreg._extension_cache.pop(240, None)  # type: ignore[attr-defined]  # it has no public name


@pytest.mark.parametrize("types", ["strict", "tagged"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("opcode", [b"\x82\xf0", b"\x83\xf0\x00", b"\x84\xf0\x00\x00\x00"])
def test_extension_codes_reach_nothing_and_leave_nothing_behind(
    opcode: bytes,
    cached: bool,
    types: str,
    registered: int,
    unpickler: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if cached:
        assert pickle.loads(b"\x80\x02" + opcode + b".") is os.system
    message = refusal(payload_of(b"\x80\x02}" + opcode + f"(Vtouch {MARKER}\ntR0.".encode()), types=types)
    assert "uses copyreg's extension codes" in message
    assert not list(tmp_path.iterdir())
    assert pickle.loads(b"\x80\x02" + opcode + b".") is os.system


def test_bytes_that_only_look_like_extension_codes_do_no_harm(registered: int) -> None:
    document: Document = {"a": "\x82\x83\x84", "b": -1.7e-132, "c": [0x82, 0x8382, 0x84838280]}
    assert payloads.read(beakers("pickle", document)).document == document


#: Damages a session's pickle at random; leaves with an error when code is run or anything but our own error comes out.
MANGLER = """
import base64, datetime, os, pickle, random, resource, sys
from beaker_statestore import payloads
from beaker_statestore.exceptions import DocumentError

# A damaged number can announce gigabytes; that has to be an error here, too.
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
FAMILIES = {"pickle", "os", "exec", "compile", "import", "open", "subprocess"}
sys.addaudithook(lambda event, arguments: event.split(".")[0] in FAMILIES and os._exit(3))
chance = random.Random(int(sys.argv[1]))
whole = base64.b64decode(sys.argv[2])
refused = 0
for _ in range(int(sys.argv[3])):
    mangled = bytearray(whole)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(3, len(mangled))
        if chance.random() < 0.7:
            mangled[at] = chance.randrange(256)
        else:
            mangled[at:at] = bytes([chance.choice(b"0122NRbicoPQ()]}lt\\x81\\x82\\x85\\x90\\x92\\x93\\x97")])
    try:
        payloads.read(base64.b64encode(mangled).decode(), types=sys.argv[4])
    except DocumentError:
        refused += 1
print(refused > 0)
"""


@pytest.mark.parametrize("protocol", [2, 4])
def test_damaged_pickles_are_read_or_refused_and_nothing_else(protocol: int) -> None:
    shared = {"user": "zoe", "n": [1, 2**40, -1.5, True]}
    plain = {**shared, "in": {"a": None, "b": ["é"]}}
    refused = {**shared, "when": datetime.datetime(2010, 1, 1), "in": {"a": Plain(), "b": {1}}}
    times = (refused["when"], datetime.datetime(2010, 1, 1, tzinfo=BERLIN), datetime.time(tzinfo=datetime.timezone.utc))
    calls = {**shared, "times": times, "set": {b"a", decimal.Decimal(1), frozenset({1})}, "id": uuid.UUID(int=1)}
    for seed, (value, types) in enumerate(((plain, "strict"), (refused, "strict"), (calls, "tagged"))):
        arguments = [str(seed), payload_of(pickle.dumps(value, protocol)), "8000", types]
        done = subprocess.run([sys.executable, "-c", MANGLER, *arguments], capture_output=True, text=True, timeout=60)
        # CPython's unpickler may grumble on stderr about a bytearray that it has cut off itself.
        assert (done.returncode, done.stdout) == (0, "True\n"), done.stderr


@given(st.binary(max_size=80), st.booleans())
def test_any_text_at_all_is_read_or_refused(data: bytes, encrypted: bool) -> None:
    for payload in (payload_of(data), payload_of(zlib.compress(data)), data.decode("latin-1")):
        with contextlib.suppress(DocumentError):
            payloads.read(payload, encrypted=encrypted)
