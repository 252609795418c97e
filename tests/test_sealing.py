"""``store_key``: what is in the store tells nobody anything, and nobody can make it say something else."""

from __future__ import annotations

import base64
import json
import sys
import time
import traceback
import uuid
import warnings
from pathlib import Path
from typing import Any

import pytest
from beaker.cache import Cache
from beaker.exceptions import BeakerWarning
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from webtest import TestApp

from beaker_statestore import documents
from beaker_statestore.cli import main
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentDamagedError,
    DocumentRefusedError,
    MissingDriverError,
    SessionUnavailable,
    StoreUnavailable,
    ValueTooLargeError,
)
from beaker_statestore.namespace import DocumentManager
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.sealing import Sealer, StoreKeyError
from beaker_statestore.settings import Settings, read_ini
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import ServerProcess
from beaker_statestore.websession import make_filter
from tests.visitor import Visitor

OLD = "0123456789abcdef0123456789abcdef"
NEW = "00112233445566778899aabbccddeeff"
OTHER = "another-secret-0123456789abcdef!"
RECORD = b"session:00112233445566778899aabbccddeeff"

#: Made by another program from RFC 5869's own formula (with Python's hmac) and AES-GCM: the secret is OLD, the record
#: key RECORD, the nonce 0 to 11.
KNOWN_TEXT = "Ad8KQZJe4qmvAAECAwQFBgcICQoL1fdmcPFjXTT/G5brsYp/NxRvTTcV35+fbzw3E6/w"
KNOWN_DATA = b'{"user":"zed"}'


class SealedVisitor(Visitor):
    """A visitor of an application with a ``store_key``."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__({"store_key": OLD, **options})

    def adds(self, store_key: str, **data: Any) -> None:
        session = self.request(store_key=store_key)
        session.update(data)
        session.save()


@pytest.fixture
def visitor(options: dict[str, Any]) -> SealedVisitor:
    return SealedVisitor(options)


@pytest.fixture
def sealer() -> Sealer:
    return Sealer([OLD])


def codec(*store_key: str, **options: Any) -> DocumentCodec:
    return DocumentCodec.of(Settings.from_options({"url": "memory:", "store_key": store_key, **options}))


# -- the text


def test_the_format_is_the_one_of_the_first_release(sealer: Sealer) -> None:
    assert sealer.open(KNOWN_TEXT, RECORD) == KNOWN_DATA
    assert base64.b64decode(sealer.seal(KNOWN_DATA, RECORD))[:9] == base64.b64decode(KNOWN_TEXT)[:9]


@given(st.binary(), st.binary())
def test_what_was_sealed_is_opened_and_never_sealed_alike(data: bytes, record: bytes) -> None:
    sealer = Sealer([OLD])
    text = sealer.seal(data, record)
    assert sealer.open(text, record) == data
    assert sealer.seal(data, record) != text
    with pytest.raises(DocumentDamagedError, match="moved"):
        sealer.open(text, record + b"x")


# Of these lengths one ends in each number of base64's padding characters, with its unused bits.
@pytest.mark.parametrize("length", [20, 21, 22])
def test_no_bit_of_the_text_can_be_flipped(sealer: Sealer, length: int) -> None:
    text = sealer.seal(b"x" * length, RECORD).encode()
    for position in range(len(text)):
        for bit in range(8):
            changed = bytearray(text)
            changed[position] ^= 1 << bit
            with pytest.raises((DocumentDamagedError, StoreKeyError)):
                sealer.open(changed.decode("latin-1"), RECORD)


def test_no_shorter_or_longer_text_opens(sealer: Sealer) -> None:
    text = sealer.seal(b"some text of some length", RECORD)
    for length in range(len(text)):
        with pytest.raises(DocumentDamagedError):
            sealer.open(text[:length], RECORD)
    for other in (f"{text}=", f"{text}AAAA", f" {text}", f"{text}\n", f"☃{text}"):
        with pytest.raises(DocumentDamagedError):
            sealer.open(other, RECORD)


def test_a_later_format_is_no_damage(sealer: Sealer) -> None:
    later = base64.b64encode(b"\x02" + base64.b64decode(KNOWN_TEXT)[1:]).decode()
    with pytest.raises(StoreKeyError, match=r"format 2.*upgrade"):
        sealer.open(later, RECORD)


def test_the_package_that_is_missing_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers.aead", None)
    with pytest.raises(MissingDriverError, match=r'pip install "beaker-statestore\[encryption\]"'):
        DocumentManager("signin", kind="confirm", url="memory:", store_key="missing-package-0123456789abcdef")
    DocumentManager("signin", kind="confirm", url="memory:")


# -- the record


@pytest.mark.parametrize("document", [{"a": 1}, {"a": 1, "_expires": 1795223762.5}, {"_expires": 3}, {}])
def test_at_rest_it_is_a_json_object_with_its_expiry_in_the_clear(document: dict[str, Any]) -> None:
    data = codec(OLD).encode(document, RECORD, "session")
    stored = json.loads(data)
    assert stored.keys() == {"_sealed"} | (document.keys() & {"_expires"})
    assert documents.expires_at(data) == document.get("_expires") == stored.get("_expires")
    assert codec(OLD).decode(data, RECORD) == document


def test_the_expiry_inside_is_what_counts() -> None:
    soon = time.time() + 60
    stored = json.loads(codec(OLD).encode({"user": "zed", "_expires": soon}, RECORD, "session"))
    longer = json.dumps({**stored, "_expires": soon + 1e6}).encode()
    assert codec(OLD).decode(longer, RECORD)["_expires"] == soon
    past = json.loads(codec(OLD).encode({"user": "zed", "_expires": time.time() - 60}, RECORD, "session"))
    for revived in ({**past, "_expires": soon}, {"_sealed": past["_sealed"]}):
        assert codec(OLD).current(json.dumps(revived).encode(), RECORD) is None


def test_what_has_expired_needs_no_key() -> None:
    data = codec(OLD).encode({"user": "zed", "_expires": time.time() - 60}, RECORD, "session")
    assert codec(NEW).current(data, RECORD) is None
    with pytest.raises(StoreKeyError):
        codec(NEW).decode(data, RECORD)


def test_the_limit_is_the_documents() -> None:
    small = codec(OLD, max_value=1000)
    data = small.encode({"a": "x" * 990}, RECORD, "session")
    assert len(data) > 1300
    assert small.decode(data, RECORD) == {"a": "x" * 990}
    with pytest.raises(ValueTooLargeError, match="session takes"):
        small.encode({"a": "x" * 1000}, RECORD, "session")


@pytest.mark.parametrize("store_key", [(), (OLD,)])
def test_no_application_can_have_a_key_of_that_name(visitor: SealedVisitor, store_key: tuple[str, ...]) -> None:
    with pytest.raises(DocumentRefusedError, match="session\\['_sealed'\\] is a name that the store uses"):
        codec(*store_key).encode({"_sealed": "x"}, RECORD, "session")
    session = visitor.request(store_key=" ".join(store_key))
    session["_sealed"] = "x"
    with pytest.raises(DocumentRefusedError, match="_sealed"):
        session.save()


@pytest.mark.parametrize("stored", [{"_sealed": 1}, {"_sealed": None}, {"_sealed": KNOWN_TEXT, "user": "mallory"}])
def test_what_looks_sealed_but_is_not_is_damage(stored: dict[str, Any]) -> None:
    with pytest.raises(DocumentDamagedError, match="_sealed"):
        codec(OLD, "plaintext").decode(json.dumps(stored).encode(), RECORD)


# -- keys


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((), "is sealed: set store_key"),
        ((NEW,), "not among those of store_key"),
        ((NEW, "plaintext"), "not among those of store_key"),
    ],
)
def test_without_the_key_the_message_says_what_to_do(keys: tuple[str, ...], message: str) -> None:
    with pytest.raises(StoreKeyError, match=message):
        codec(*keys).decode(codec(OLD).encode({"a": 1}, RECORD, "session"), RECORD)


def test_secrets_are_shown_nowhere() -> None:
    short = "a-short-secret"
    for wrong in (short, f"{OLD} {short}", f"plaintext {OLD} plaintext"):
        with pytest.raises(ConfigurationError, match="store_key is not usable") as refused:
            Settings.from_options({"url": "memory:", "store_key": wrong})
        assert short not in str(refused.value) + repr(refused.value.__cause__)
        assert OLD not in str(refused.value) + repr(refused.value.__cause__)
    settings = Settings.from_options({"url": "memory:", "store_key": f"{OLD},{NEW}"})
    assert settings.store_key == (OLD, NEW)
    sealed = DocumentCodec.of(settings).encode({"a": 1}, RECORD, "session")
    shown = f"{settings!r} {settings} {DocumentCodec.of(settings)!r} {Sealer([OLD])!r} {sealed!r}"
    for wrong_codec, record in ((codec(), RECORD), (codec(OTHER), RECORD), (codec(OLD), b"other")):
        with pytest.raises((StoreKeyError, DocumentDamagedError)) as unopened:
            wrong_codec.decode(sealed, record)
        shown += f" {unopened.value!r}"
    for secret in (OLD, NEW, OTHER):
        assert secret not in shown


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"store_key = {OLD}%", "[app:main] beaker.session.store_key has a %"),
        (f"store_key = {OLD}%(x)s", "[app:main] beaker.session.store_key uses %(x)s, which nothing sets"),
        (f"store_key = {NEW}\n{OLD}", "line 4 is neither"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained_without_its_secrets(tmp_path: Path, line: str, message: str) -> None:
    ini = tmp_path / "app.ini"
    ini.write_text(f"[app:main]\nbeaker.session.url = memory:\nbeaker.session.{line}\n")
    with pytest.raises(ConfigurationError) as refused:
        read_ini(ini)
    assert message in str(refused.value)
    assert OLD not in "".join(traceback.format_exception(refused.value))
    ini.write_text(line.partition(" = ")[2])
    with pytest.raises(ConfigurationError, match="line 1 stands before") as refused:
        read_ini(ini)
    assert OLD not in "".join(traceback.format_exception(refused.value))


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("", ()),
        ("plaintext", ()),
        (f"{OLD} plaintext", (OLD, "plaintext")),
        (f"plaintext, {OLD}\n{NEW}", ("plaintext", OLD, NEW)),
        ([NEW, OLD, NEW], (NEW, OLD)),
    ],
)
def test_the_option_is_a_list_of_keys_and_one_word(text: Any, keys: tuple[str, ...]) -> None:
    assert Settings.from_options({"url": "memory:", "store_key": text}).store_key == keys


def test_a_mistyped_word_is_no_key() -> None:
    with pytest.raises(ConfigurationError, match=r"word 2 has 8 characters.*the one other word is plaintext"):
        Settings.from_options({"url": "memory:", "store_key": f"{OLD} plantext"})


# -- sessions


@pytest.mark.parametrize("serializer", ["pickle", "json"])
def test_a_session_comes_back_and_its_record_tells_nothing(
    options: dict[str, Any], store: Store, serializer: str
) -> None:
    visitor = SealedVisitor({**options, "data_serializer": serializer, "timeout": 600}).starts_with(
        user="zed", cart=["book"]
    )
    assert visitor.sees() == {"user": "zed", "cart": ["book"]}
    data = store.get(visitor.record)
    assert data is not None
    assert json.loads(data).keys() == {"_sealed", "_expires"}
    inside = base64.b64decode(json.loads(data)["_sealed"])
    for word in (b"user", b"zed", b"cart", b"book", b"_accessed_time", serializer.encode()):
        assert word not in data
        assert word not in inside


def test_two_tabs_that_add_different_keys_keep_both(visitor: SealedVisitor) -> None:
    visitor.starts_with(user="zed")
    tab, other = visitor.request(), visitor.request()
    tab["cart"] = ["book"]
    other["color"] = "red"
    tab.save()
    other.save()
    assert visitor.sees() == {"user": "zed", "cart": ["book"], "color": "red"}


def test_a_slow_request_does_not_undo_a_logout(visitor: SealedVisitor, store: Store) -> None:
    visitor.starts_with(user="zed")
    slow, logout = visitor.request(), visitor.request()
    logout.delete()
    logout.save()
    slow["cart"] = ["book"]
    slow.save()
    assert store.get(visitor.record) is None
    assert visitor.request().is_new


def test_keys_are_replaced_one_after_the_other(visitor: SealedVisitor) -> None:
    visitor.starts_with(n=1)
    assert visitor.sees(store_key=f"{NEW} {OLD}") == {"n": 1}
    visitor.adds(f"{NEW} {OLD}", m=2)
    assert visitor.sees(store_key=NEW) == {"n": 1, "m": 2}
    with pytest.raises(SessionUnavailable, match="not among"):
        visitor.sees(store_key=OLD)


def test_moving_in_and_out_loses_nobody(visitor: SealedVisitor, store: Store) -> None:
    visitor.adds("", n=1)
    with pytest.raises(SessionUnavailable, match=r"in the clear.*write the word plaintext"):
        visitor.sees(store_key=OLD)
    assert visitor.sees(store_key=f"{OLD} plaintext") == {"n": 1}
    visitor.adds(f"{OLD} plaintext", m=2)
    assert b"_sealed" in (store.get(visitor.record) or b"")
    assert visitor.sees(store_key=OLD) == {"n": 1, "m": 2}
    assert visitor.sees(store_key=f"plaintext {OLD}") == {"n": 1, "m": 2}
    visitor.adds(f"plaintext {OLD}", k=3)
    assert b"_sealed" not in (store.get(visitor.record) or b"")
    assert visitor.sees(store_key="") == {"n": 1, "m": 2, "k": 3}


@pytest.mark.parametrize("invalidate_corrupt", [True, False])
def test_a_missing_key_gives_nobody_a_new_session(
    visitor: SealedVisitor, store: Store, invalidate_corrupt: bool
) -> None:
    visitor.starts_with(user="zed")
    before = store.get(visitor.record)
    for keys in ("", NEW):
        with warnings.catch_warnings():
            # Beaker's own, before its second load; make_filter silences it.
            warnings.simplefilter("ignore", BeakerWarning)
            with pytest.raises(SessionUnavailable, match="store_key"):
                visitor.request(store_key=keys, invalidate_corrupt=invalidate_corrupt)
    assert store.get(visitor.record) == before


def test_a_visitor_without_the_processs_key_gets_503_and_keeps_his_session(options: dict[str, Any]) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        session = environ["beaker.session"]
        session["n"] = session.get("n", 0) + 1
        session.save()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(session["n"]).encode()]

    def site(store_key: str) -> Any:
        named = {f"beaker.session.{name}": value for name, value in options.items()}
        return make_filter(app, {**named, "beaker.session.store_key": store_key})

    browser = TestApp(site(OLD))
    assert [browser.get("/").text for _ in range(2)] == ["1", "2"]
    for wrong in ("", NEW):
        browser.app = site(wrong)
        refused = browser.get("/", status=503)
        assert "Set-Cookie" not in refused.headers
        assert "Retry-After" in refused.headers
    browser.app = site(f"{NEW} {OLD}")
    assert browser.get("/").text == "3"


def test_a_session_moved_to_another_id_is_damage(options: dict[str, Any], store: Store) -> None:
    zed, mallory = SealedVisitor(options).starts_with(user="zed"), SealedVisitor(options).starts_with(user="mallory")
    store.put(mallory.record, store.get(zed.record) or b"")
    with pytest.raises(DocumentDamagedError, match="moved"):
        mallory.request()
    # A forgery must not keep the visitor out for ever, as a missing key may.
    with pytest.warns(BeakerWarning, match="Invalidating corrupt session"):
        assert mallory.request(invalidate_corrupt=True).is_new


def test_nobody_makes_a_session_by_writing_it_in_the_clear(visitor: SealedVisitor, store: Store) -> None:
    store.put(visitor.record, b'{"user":"admin"}')
    with pytest.raises(StoreUnavailable, match="in the clear"):
        visitor.request()


def test_beakers_own_encryption_works_beneath(options: dict[str, Any], store: Store) -> None:
    own = {"encrypt_key": "0123456789abcdef", "validate_key": "fedcba9876543210", "encrypted": "true"}
    visitor = SealedVisitor({**options, **own}).starts_with(user="zed")
    assert visitor.sees() == {"user": "zed"}
    assert json.loads(store.get(visitor.record) or b"").keys() == {"_sealed"}


# -- the other documents


def test_an_unchanged_document_is_not_written(options: dict[str, Any], store: Store) -> None:
    confirm = DocumentManager("signin", kind="confirm", store_key=OLD, **options)
    confirm.modify("k", lambda document: {"n": 1})
    record = confirm.records.record("k")
    before = store.get(record)
    assert b"_sealed" in (before or b"")
    assert confirm.modify("k", lambda document: {"n": 1}) == {"n": 1}
    assert store.get(record) == before
    assert confirm.modify("k", lambda document: {**(document or {}), "m": 2}) == {"n": 1, "m": 2}
    assert store.get(record) != before


def test_caches_are_sealed(options: dict[str, Any], store: Store) -> None:
    cache = Cache("front page", type="ext:tcjson", store_key=OLD, expire=60, **options)
    assert cache.get("k", createfunc=lambda: {"secret": "word"}) == {"secret": "word"}
    assert cache.get("k") == {"secret": "word"}
    [data] = store.get_many(store.keys(options["prefix"].encode())).values()
    assert json.loads(data).keys() == {"_sealed", "_expires"}
    with pytest.raises(StoreUnavailable, match=r"beaker\.cache\.store_key"):
        Cache("front page", type="ext:tcjson", **options).get("k")


def test_a_routers_states_are_sealed(options: dict[str, Any], store: Store) -> None:
    storage = RouterStateStorage(store_key=OLD, **options)
    storage.set("news", "zed@example.com", "MEMBER")
    storage.set("jazz", "zed@example.com", "CONFIRMING")
    assert storage.states_of("zed@example.com") == {"news": "MEMBER", "jazz": "CONFIRMING"}
    [data] = store.get_many(store.keys(options["prefix"].encode())).values()
    assert json.loads(data).keys() == {"_sealed"}
    # As for any outage the mail is deferred, and nobody is back in START.
    with pytest.raises(StoreUnavailable):
        RouterStateStorage(**options).get("news", "zed@example.com")
    with pytest.raises(StoreUnavailable):
        RouterStateStorage(**options).set("news", "zed@example.com", "ERROR")
    assert list(storage.pages()) == [[("zed@example.com", {"news": "MEMBER", "jazz": "CONFIRMING"})]]


# -- the command line


def test_the_command_line_opens_and_seals_by_the_ini(tyrant_server: ServerProcess, tmp_path: Path) -> None:
    ini, prefix = tmp_path / "app.ini", f"sealing{uuid.uuid4().hex}."
    lines = [f"url = {tyrant_server.url}", f"prefix = {prefix}", f"store_key = {OLD}"]
    ini.write_text("[app:main]\n" + "".join(f"beaker.session.{line}\n" for line in lines))
    by_ini, by_url = ["--ini", str(ini)], ["--url", tyrant_server.url]
    run = CliRunner().invoke

    key = f"{prefix}confirm:x:y"
    assert run(main, ["put", key, '{"user": "zed"}', *by_ini]).exit_code == 0
    assert json.loads(run(main, ["get", key, *by_ini]).output) == {"user": "zed"}
    raw = run(main, ["get", "--raw", key, *by_url])
    assert json.loads(raw.output).keys() == {"_sealed"}
    assert run(main, ["get", "--raw", key, *by_ini]).output == raw.output

    unread = run(main, ["get", key, *by_url])
    assert unread.exit_code == 1
    assert "is sealed: set store_key" in unread.output
    assert "--ini" in unread.output
    assert unread.output.count("\n") == 1
    assert run(main, ["put", key, raw.output, *by_ini]).exit_code == 1

    RouterStateStorage(url=tyrant_server.url, prefix=prefix, store_key=OLD).set("news", "zed@example.com", "MEMBER")
    listed = run(main, ["states", *by_ini])
    assert json.loads(listed.output) == {"sender": "zed@example.com", "key": "news", "state": "MEMBER"}
