"""Sessions under stock Beaker: nobody's change is lost, what was deleted stays deleted, and it is JSON at rest.

Each test plays two requests of one visitor that overlap, as browsers make them: both load, then both save.
"""

from __future__ import annotations

import base64
import datetime
import json
import pickle
import time
import types
import uuid
import zlib
from collections import Counter
from typing import Any

import pytest
from beaker import crypto
from beaker.crypto import noencryption

from beaker_statestore.exceptions import (
    ConfigurationError,
    Conflict,
    DocumentDamagedError,
    DocumentRefusedError,
)
from beaker_statestore.namespace import TCJSONNamespaceManager
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore
from tests.visitor import Visitor


@pytest.fixture(params=["pickle", "json"])
def serializer(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def visitor(options: dict[str, Any], serializer: str) -> Visitor:
    return Visitor(options, data_serializer=serializer)


@pytest.fixture
def stored(store: Store) -> Any:
    """Reads a visitor's record as it is at rest."""

    def read(visitor: Visitor) -> Any:
        data = store.get(visitor.record)
        return None if data is None else json.loads(data)

    return read


def test_a_session_comes_back_as_it_was_saved(visitor: Visitor) -> None:
    data = {"user": "zed", "cart": [{"sku": "a-1", "n": 2}], "rate": 0.5, "big": 2**53, "no": None, "ünï": "☃"}
    assert visitor.starts_with(**data).sees() == data


def test_the_record_is_the_session_as_plain_json(visitor: Visitor, stored: Any, serializer: str) -> None:
    visitor.starts_with(user="zed")
    record = stored(visitor)
    assert record.pop("_accessed_time") == pytest.approx(time.time(), abs=5)
    assert record.pop("_creation_time") == pytest.approx(time.time(), abs=5)
    assert record == {"user": "zed", "_domain": None, "_path": "/", "_serializer": serializer}


def test_two_tabs_that_add_different_keys_keep_both(visitor: Visitor) -> None:
    visitor.starts_with(user="zed")
    tab, other = visitor.request(), visitor.request()
    tab["cart"] = ["book"]
    other["color"] = "red"
    tab.save()
    other.save()
    assert visitor.sees() == {"user": "zed", "cart": ["book"], "color": "red"}


def test_a_slow_reader_does_not_undo_a_quick_writer(visitor: Visitor, counted: Counter[str]) -> None:
    visitor.starts_with(n=1)
    reader, writer = visitor.request(touch_interval=0), visitor.request()
    writer["n"] = 2
    writer.save()
    reader.save(accessed_only=True)
    assert visitor.sees() == {"n": 2}
    assert counted["session.touch_dropped"] == 1


def test_a_slow_request_does_not_undo_a_logout(visitor: Visitor, stored: Any) -> None:
    visitor.starts_with(user="zed")
    slow, logout = visitor.request(), visitor.request()
    logout.delete()
    logout.save()
    slow["cart"] = ["book"]
    slow.save()
    slow["cart"] = ["another"]
    slow.save()
    slow.save(accessed_only=True)
    assert stored(visitor) is None
    assert visitor.request().is_new


def test_a_logout_removes_also_what_another_request_has_just_added(visitor: Visitor, stored: Any) -> None:
    visitor.starts_with(user="zed")
    logout, other = visitor.request(), visitor.request()
    other["cart"] = ["book"]
    other.save()
    logout.delete()
    logout.save()
    assert stored(visitor) is None


def test_saving_again_and_again_in_one_request_keeps_everybodys_changes(visitor: Visitor) -> None:
    visitor.starts_with(n=0)
    session, other = visitor.request(), visitor.request()
    session["a"] = 1
    session.save()
    other["theirs"] = 1
    other.save()
    session["b"] = 2
    session.save()
    del session["a"]
    session.save()
    assert visitor.sees() == {"n": 0, "theirs": 1, "b": 2}


def test_the_closing_touch_of_a_request_does_not_undo_its_own_save(visitor: Visitor) -> None:
    visitor.starts_with(n=1)
    session = visitor.request()
    session["n"] = 2
    session.save()
    session.save(accessed_only=True)
    assert visitor.sees() == {"n": 2}


def test_reverting_is_a_change_like_any_other(visitor: Visitor) -> None:
    visitor.starts_with(n=1)
    session = visitor.request()
    session["n"] = 2
    session.save()
    session.revert()
    session.save()
    assert visitor.sees() == {"n": 1}


def test_a_key_that_is_added_and_removed_in_one_request_is_removed(visitor: Visitor) -> None:
    visitor.starts_with(n=1)
    session = visitor.request()
    session["lock"] = True
    session.save()
    del session["lock"]
    session.save()
    assert visitor.sees() == {"n": 1}


def test_what_is_changed_and_changed_back_in_one_request_is_changed_back(visitor: Visitor) -> None:
    visitor.starts_with(busy=False)
    session = visitor.request()
    session["busy"] = True
    session.save()
    session["busy"] = False
    session.save()
    assert visitor.sees() == {"busy": False}


def test_a_removed_key_is_removed_and_stays_so(visitor: Visitor) -> None:
    visitor.starts_with(flash="hello", user="zed")
    popping, other = visitor.request(), visitor.request()
    del popping["flash"]
    other["seen"] = True
    popping.save()
    other.save()
    assert visitor.sees() == {"user": "zed", "seen": True}


def test_where_both_change_one_key_the_later_commit_wins_and_is_counted(
    visitor: Visitor, counted: Counter[str]
) -> None:
    visitor.starts_with(n=0)
    first, second = visitor.request(), visitor.request()
    first["n"], second["n"] = 1, 2
    first.save()
    second.save()
    assert visitor.sees() == {"n": 2}
    assert counted["session.conflict"] == 1


def test_a_change_deep_inside_a_value_is_a_change(visitor: Visitor) -> None:
    visitor.starts_with(cart={"items": [1]})
    session, other = visitor.request(), visitor.request()
    session["cart"]["items"].append(2)
    other["color"] = "red"
    other.save()
    session.save()
    assert visitor.sees() == {"cart": {"items": [1, 2]}, "color": "red"}


def test_true_and_one_are_different_values(visitor: Visitor) -> None:
    visitor.starts_with(flag=1)
    session = visitor.request()
    session["flag"] = True
    session.save()
    assert visitor.sees()["flag"] is True


def test_reading_notes_the_time_of_access(visitor: Visitor, stored: Any) -> None:
    visitor.starts_with(user="zed")
    before = stored(visitor)["_accessed_time"]
    reader = visitor.request(touch_interval=0)
    reader.save(accessed_only=True)
    assert stored(visitor)["_accessed_time"] > before


def test_two_first_requests_under_one_id_keep_both_changes(visitor: Visitor) -> None:
    first, second = visitor.request(), visitor.request()
    assert first.is_new
    assert second.is_new
    first["a"] = 1
    second["b"] = 2
    first.save()
    second.save()
    assert visitor.sees() == {"a": 1, "b": 2}


def test_an_emptied_session_still_knows_when_it_was_created(visitor: Visitor) -> None:
    visitor.starts_with(user="zed")
    created = visitor.request().created
    session = visitor.request()
    session.clear()
    session["user"] = "ada"
    session.save()
    assert visitor.request().created == created
    assert visitor.sees() == {"user": "ada"}


def test_a_record_expires_after_the_timeout_and_beakers_grace(
    options: dict[str, Any], stored: Any, serializer: str
) -> None:
    visitor = Visitor(options, data_serializer=serializer, timeout=60).starts_with(user="zed")
    record = stored(visitor)
    assert record["_expires"] == pytest.approx(record["_accessed_time"] + 60 + 120)


def test_without_a_timeout_any_more_a_session_that_is_read_never_expires(
    options: dict[str, Any], stored: Any, serializer: str
) -> None:
    visitor = Visitor(options, data_serializer=serializer, timeout=60).starts_with(user="zed")
    visitor.request(timeout=None, touch_interval=0).save(accessed_only=True)
    assert "_expires" not in stored(visitor)


def test_an_expired_record_is_no_session_and_is_replaced(
    options: dict[str, Any], store: Store, stored: Any, serializer: str
) -> None:
    visitor = Visitor(options, data_serializer=serializer, timeout=60)
    key = visitor.record
    store.put(key, json.dumps({"user": "zed", "_accessed_time": 1.0, "_expires": 181.0}).encode())
    session = visitor.request()
    assert session.is_new
    session["user"] = "ada"
    session.save()
    assert stored(visitor)["user"] == "ada"


def test_changing_the_serializer_logs_nobody_out(options: dict[str, Any]) -> None:
    visitor = Visitor(options).starts_with(user="zed")
    switched = visitor.request(data_serializer="json", serializer="json")
    assert switched["user"] == "zed"
    switched["n"] = 1
    switched.save()
    back = visitor.request(data_serializer="pickle", serializer="pickle")
    assert (back["user"], back["n"]) == ("zed", 1)


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (datetime.datetime(2026, 1, 2), "is a datetime.datetime"),
        (datetime.date(2026, 1, 2), "is a datetime.date"),
        ({1, 2}, "is a set"),
        (b"bytes", "is bytes"),
        (2**64, "is an integer beyond 64 bits"),
        (float("nan"), "is nan, which JSON does not have"),
        ({1: "one"}, "1"),
    ],
)
def test_what_json_cannot_hold_is_refused_by_its_path(
    options: dict[str, Any], stored: Any, value: Any, found: str
) -> None:
    visitor = Visitor(options).starts_with(user="zed")
    before = stored(visitor)
    session = visitor.request()
    session["cart"] = [0, {"when": value}]
    with pytest.raises(DocumentRefusedError, match=found) as refused:
        session.save()
    assert "session['cart'][1]['when']" in str(refused.value)
    assert stored(visitor) == before


@pytest.mark.parametrize("name", ["_expires", "_serializer", "_opaque"])
def test_an_applications_key_with_one_of_our_names_is_refused(visitor: Visitor, name: str) -> None:
    session = visitor.request()
    session[name] = 1
    with pytest.raises(DocumentRefusedError, match=name):
        session.save()


class Exploit:
    """Runs code when it is unpickled."""

    ran = False

    def __reduce__(self) -> Any:
        return (setattr, (Exploit, "ran", True))


POISON = {
    "base64 pickle": base64.b64encode(pickle.dumps({"x": Exploit()}, 2)),
    "raw pickle": pickle.dumps({"x": Exploit()}, 2),
    "JSON text of a pickle": json.dumps(base64.b64encode(pickle.dumps({"x": Exploit()}, 2)).decode()).encode(),
    "JSON scalar": b"42",
    "JSON array": b'[{"user": "admin"}]',
    "custom serializer's text": b"user=zed&n=1",
    "zlib": zlib.compress(b'{"user": "admin"}'),
    "nothing": b"",
    "cut JSON": b'{"user": "ze',
    "NaN": b'{"n": NaN}',
}


@pytest.mark.parametrize("poison", POISON)
def test_a_poisoned_record_runs_nothing_and_is_named(
    visitor: Visitor, options: dict[str, Any], store: Store, poison: str
) -> None:
    key = visitor.record
    store.put(key, POISON[poison])
    with pytest.raises(DocumentDamagedError) as damaged:
        visitor.request()
    assert not Exploit.ran
    assert any(word in str(damaged.value) for word in ("pickle", "JSON", "nothing", "empty", "text", "NaN")), (
        damaged.value
    )
    with pytest.warns(Warning, match="Invalidating corrupt session"):
        fresh = visitor.request(invalidate_corrupt=True)
    assert fresh.is_new
    assert fresh.id != visitor.id
    assert not Exploit.ran
    assert store.get(key) == POISON[poison], "a damaged record is evidence and stays"


def test_a_poisoned_pickle_from_the_application_runs_nothing_either(options: dict[str, Any]) -> None:
    manager = TCJSONNamespaceManager(uuid.uuid4().hex, data_dir=None, digest_filenames=False, **options)
    with pytest.raises(DocumentRefusedError):
        manager["session"] = POISON["base64 pickle"].decode()
    assert not Exploit.ran


def test_a_custom_serializers_text_is_refused_on_save(options: dict[str, Any]) -> None:
    class Query:
        def dumps(self, data: Any) -> bytes:
            return b"user=zed"

        def loads(self, data: bytes) -> Any:
            raise AssertionError("never reached")

    session = Visitor(options, data_serializer=Query()).request()
    session["user"] = "zed"
    with pytest.raises(DocumentRefusedError, match="serializer"):
        session.save()


KEYS = {"encrypt_key": "0123456789abcdef", "validate_key": "fedcba9876543210"}


def test_an_encrypted_session_is_refused_unless_the_option_says_so(options: dict[str, Any]) -> None:
    session = Visitor(options, **KEYS).request()
    session["user"] = "zed"
    with pytest.raises(DocumentRefusedError, match="encrypted = true"):
        session.save()


def test_an_encrypted_session_is_stored_as_ciphertext(options: dict[str, Any], stored: Any) -> None:
    visitor = Visitor(options, **KEYS, encrypted="true", timeout=60).starts_with(user="zed")
    assert visitor.sees() == {"user": "zed"}
    record = stored(visitor)
    assert record.keys() == {"_opaque", "_expires"}
    assert "zed" not in base64.b64decode(record["_opaque"][24:]).decode("latin-1")


@pytest.mark.parametrize("module", ["noencryption", "pycrypto"])
def test_ciphertext_that_anybody_could_have_forged_is_not_believed(
    options: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    """Beaker would decipher it with a module that authenticates nothing, and unpickle what comes out."""
    visitor = Visitor(options, **KEYS, encrypted="true").starts_with(user="zed")
    forged = "A" * 24 + POISON["base64 pickle"].decode()
    store.put(visitor.record, json.dumps({"_opaque": forged}).encode())
    # pycrypto itself cannot be imported without the library that it is for.
    stand_in = types.SimpleNamespace(**{**vars(noencryption), "__name__": f"beaker.crypto.{module}"})
    monkeypatch.setitem(crypto.CRYPTO_MODULES, "default", stand_in)
    with pytest.raises(ConfigurationError, match="pip install cryptography"):
        visitor.request()
    assert not Exploit.ran


def test_an_encrypted_session_whose_record_is_gone_is_not_brought_back(options: dict[str, Any], stored: Any) -> None:
    visitor = Visitor(options, **KEYS, encrypted="true").starts_with(user="zed")
    slow, other = visitor.request(), visitor.request()
    del other.namespace["session"]
    slow["cart"] = 1
    slow.save()
    assert stored(visitor) is None


def test_a_chosen_session_id_is_stored_under_its_hash(options: dict[str, Any], store: Store) -> None:
    visitor = Visitor(options)
    visitor.id = "../../chosen:by%the\x00client"
    visitor.starts_with(user="zed")
    assert visitor.sees() == {"user": "zed"}
    (key,) = store.keys(options["prefix"].encode())
    assert key.startswith(options["prefix"].encode() + b"session:")
    assert b"chosen" not in key


def test_conflict_raise_refuses_what_another_request_has_changed(
    options: dict[str, Any], serializer: str, counted: Counter[str]
) -> None:
    visitor = Visitor(options, data_serializer=serializer, conflict="raise").starts_with(n=1, color="red")
    first, second = visitor.request(), visitor.request()
    first["n"] = 2
    second["n"] = 3
    second["color"] = "blue"
    first.save()
    with pytest.raises(Conflict, match="'n'") as raised:
        second.save()
    assert raised.value.fields == ("n",)
    assert visitor.sees() == {"n": 2, "color": "red"}
    assert counted["session.conflict"] == 1


def test_conflict_raise_accepts_equal_and_different_keys(options: dict[str, Any], serializer: str) -> None:
    visitor = Visitor(options, data_serializer=serializer, conflict="raise").starts_with(n=1)
    first, second = visitor.request(), visitor.request()
    first.update(n=2, a=1)
    second.update(n=2, b=1)
    first.save()
    second.save()
    assert visitor.sees() == {"n": 2, "a": 1, "b": 1}


def test_a_commit_that_was_done_without_an_answer_is_no_conflict(
    options: dict[str, Any], serializer: str, counted: Counter[str]
) -> None:
    faulty = FaultyStore(open_store(options["url"]))
    visitor = Visitor({**options, "url": faulty}, data_serializer=serializer, conflict="raise").starts_with(n=1)
    request = visitor.request()
    request["n"] = 2
    faulty.fail(1, executed=True)
    request.save()
    assert faulty.calls == ["compare_and_swap", "get"]
    assert "session.conflict" not in counted
    assert visitor.sees() == {"n": 2}


def test_a_save_of_what_is_there_already_writes_nothing(options: dict[str, Any], serializer: str) -> None:
    faulty = FaultyStore(open_store(options["url"]))
    visitor = Visitor({**options, "url": faulty}, data_serializer=serializer, timeout=6000).starts_with(n=1)
    request = visitor.request()
    faulty.fail(99)
    request.save()
    request["n"] = 1
    request.save()
    assert faulty.calls == []


@pytest.mark.parametrize(
    ("timeout", "idle", "touched"), [(None, 59, False), (None, 61, True), (300, 29, False), (300, 31, True)]
)
def test_a_touch_is_written_when_the_last_is_old_enough(
    options: dict[str, Any], stored: Any, store: Store, serializer: str, timeout: int | None, idle: int, touched: bool
) -> None:
    """Every 60 seconds, and never less often than ten times in a timeout."""
    visitor = Visitor(options, data_serializer=serializer, timeout=timeout).starts_with(n=1)
    record = stored(visitor)
    record["_accessed_time"] -= idle
    store.put(visitor.record, json.dumps(record).encode())
    visitor.request().save(accessed_only=True)
    assert (stored(visitor)["_accessed_time"] > record["_accessed_time"]) is touched


def test_a_session_in_use_ends_at_max_lifetime(
    options: dict[str, Any], stored: Any, store: Store, serializer: str
) -> None:
    visitor = Visitor(options, data_serializer=serializer, timeout=600, max_lifetime=3600).starts_with(n=1)
    record = stored(visitor)
    assert record["_expires"] == pytest.approx(time.time() + 720, abs=5)
    record["_creation_time"] -= 3590
    record["_expires"] = record["_creation_time"] + 3600
    store.put(visitor.record, json.dumps(record).encode())
    request = visitor.request()
    request["n"] = 2
    request.save()
    assert stored(visitor)["_expires"] == pytest.approx(record["_creation_time"] + 3600, abs=0.01)
    assert visitor.sees() == {"n": 2}
    # Records from before the option was set know nothing of it.
    record["_creation_time"] -= 20
    store.put(visitor.record, json.dumps(record).encode())
    late = visitor.request()
    assert late.is_new
    assert "n" not in late
    late["m"] = 1
    late.save()
    assert visitor.sees() == {"m": 1}


def test_max_lifetime_alone_gives_an_expiry(options: dict[str, Any], stored: Any, serializer: str) -> None:
    visitor = Visitor(options, data_serializer=serializer, max_lifetime=3600).starts_with(n=1)
    record = stored(visitor)
    assert record["_expires"] == record["_creation_time"] + 3600


def test_a_slow_request_puts_nothing_into_the_session_that_was_begun_after_a_logout(visitor: Visitor) -> None:
    """Stock Beaker goes on with the id of the cookie, so the next session of this browser has the same."""
    visitor.starts_with(user="zed")
    slow, logout = visitor.request(), visitor.request()
    logout.delete()
    logout.save()
    visitor.starts_with(user="ann")
    slow["cart"] = ["zed's book"]
    slow.save()
    assert visitor.sees() == {"user": "ann"}


def test_a_commit_of_what_another_request_has_committed_writes_nothing(
    options: dict[str, Any], serializer: str
) -> None:
    """Also where the same document is never the same bytes twice."""
    faulty = FaultyStore(open_store(options["url"]))
    visitor = Visitor({**options, "url": faulty, "store_key": "0123456789abcdef" * 4}, data_serializer=serializer)
    visitor.starts_with(n=1)
    slow, quick = visitor.request(), visitor.request()
    quick["n"] = 2
    quick.save()
    slow["n"] = 2
    faulty.fail(99)
    slow.save()
    assert faulty.calls == ["compare_and_swap", "get"]


@pytest.mark.parametrize(("given", "times"), [({}, 1), ({"timeout": 600}, 0), ({"max_lifetime": 600}, 0)])
def test_sessions_that_never_end_are_warned_about_once(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture, given: dict[str, int], times: int
) -> None:
    visitor = Visitor({**options, **given})
    visitor.request()
    visitor.request()
    assert [r.levelname for r in caplog.records if "timeout is not set" in r.getMessage()] == ["WARNING"] * times
