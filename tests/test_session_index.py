"""Whose sessions there are: every live session is listed before it lives, and ending one cannot be undone."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from beaker.session import Session

from beaker_statestore import documents, sessionindex
from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentRefusedError,
    StoreUnavailable,
    ValueTooLargeError,
)
from beaker_statestore.keys import Namespace
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore


@pytest.fixture(params=["plain", "hashed"])
def indexed(request: pytest.FixtureRequest, options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "index": "user", "hash_ids": request.param == "hashed"}


@pytest.fixture
def sessions(indexed: dict[str, Any]) -> Sessions:
    return Sessions(Settings.from_options(indexed))


def request(options: dict[str, Any], session_id: str, **changed: Any) -> Session:
    return Session({}, id=session_id, use_cookies=False, type="ext:tcjson", **{**options, **changed})


def login(options: dict[str, Any], user: Any, session_id: str | None = None, **changed: Any) -> str:
    session = request(options, session_id or uuid.uuid4().hex, **changed)
    session["user"] = user
    session.save()
    return str(session.id)


def record_key(options: dict[str, Any], session_id: str) -> bytes:
    return Namespace(options["prefix"], "session", session_id, options["hash_ids"]).record("session")


def member(options: dict[str, Any], session_id: str) -> str:
    """How the index names a session."""
    return record_key(options, session_id).decode().rpartition(":")[2]


def index_document(options: dict[str, Any], store: Store, user: str) -> dict[str, Any]:
    data = store.get(f"{options['prefix']}index:user:{user}".encode())
    assert data is not None
    return dict(json.loads(data))


def test_a_persons_sessions_are_found(indexed: dict[str, Any], sessions: Sessions) -> None:
    first, second = login(indexed, "zed"), login(indexed, "zed")
    login(indexed, "ann")
    later = request(indexed, first, touch_interval=0)
    later["cart"] = ["book"]
    later.save()
    found = sessions.of("zed")
    assert [s.data for s in found] == [{"user": "zed", "cart": ["book"]}, {"user": "zed"}]
    assert found[0].created is not None
    assert found[0].created <= time.time()
    if not indexed["hash_ids"]:
        assert [s.shown_id[:8] for s in found] == [first[:8], second[:8]]
    assert not any(session_id in s.shown_id for s in found for session_id in (first, second))


def test_numbers_are_found_as_well(indexed: dict[str, Any], sessions: Sessions) -> None:
    login(indexed, 42)
    assert [s.data for s in sessions.of(42)] == [{"user": 42}]


def test_several_fields(indexed: dict[str, Any]) -> None:
    indexed["index"] = "user, company"
    session = request(indexed, uuid.uuid4().hex)
    session.update(user="zed", company="acme")
    session.save()
    sessions = Sessions(Settings.from_options(indexed))
    assert len(sessions.of("zed")) == len(sessions.of("acme", by="company")) == 1
    assert sessions.revoke("acme", by="company") == 1
    assert sessions.of("zed") == []
    with pytest.raises(ConfigurationError, match="'role'"):
        sessions.of("admin", by="role")


def test_who_has_left_is_not_found(indexed: dict[str, Any], sessions: Sessions) -> None:
    gone, other, expired = login(indexed, "zed"), login(indexed, "zed"), login(indexed, "zed", max_lifetime=0.001)
    session = request(indexed, gone)
    session.delete()
    session.save()
    login(indexed, "ann", other)
    deadline = time.monotonic() + 5
    while not request(indexed, expired).is_new:
        assert time.monotonic() < deadline
    assert sessions.of("zed") == []
    assert [s.data["user"] for s in sessions.of("ann")] == ["ann"]


def test_revoke_ends_all_but_the_one_that_is_kept(indexed: dict[str, Any], sessions: Sessions) -> None:
    kept, ended, others = login(indexed, "zed"), login(indexed, "zed"), login(indexed, "ann")
    assert sessions.revoke("zed", keep=kept) == 1
    assert request(indexed, kept)["user"] == "zed"
    assert request(indexed, others)["user"] == "ann"
    assert request(indexed, ended).is_new
    assert "user" not in request(indexed, ended)
    assert sessions.revoke("zed", keep=kept) == 0


def test_a_request_under_way_does_not_bring_a_revoked_session_back(indexed: dict[str, Any], sessions: Sessions) -> None:
    session_id = login(indexed, "zed")
    slow = request(indexed, session_id)
    sessions.revoke("zed")
    slow["cart"] = ["book"]
    slow.save()
    assert request(indexed, session_id).is_new
    assert sessions.of("zed") == []


def test_after_a_revocation_the_visitor_can_come_back_under_his_id(indexed: dict[str, Any], sessions: Sessions) -> None:
    """Stock Beaker keeps the id that the cookie has."""
    session_id = login(indexed, "zed")
    sessions.revoke("zed")
    login(indexed, "zed", session_id)
    assert request(indexed, session_id)["user"] == "zed"
    assert len(sessions.of("zed")) == 1


def test_values_nobody_can_ask_for_are_refused(indexed: dict[str, Any]) -> None:
    with pytest.raises(DocumentRefusedError, match=r"session\['user'\] is a dict"):
        login(indexed, {"name": "zed"})


def test_without_the_option_nobody_can_ask(indexed: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="index = user"):
        Sessions(Settings.from_options({**indexed, "index": ""}))


@pytest.mark.parametrize("option", ["index", "max_lifetime"])
def test_what_encrypt_key_hides_cannot_be_looked_into(option: str) -> None:
    options = {"url": "memory:", "encrypted": True, option: "1000"}
    with pytest.raises(ConfigurationError, match=rf"beaker\.session\.{option} needs .*session\.store_key"):
        Settings.from_options(options)


@pytest.mark.parametrize("index", ["yes", "_id", "user, false"])
def test_an_index_that_names_no_key_is_refused(index: str) -> None:
    with pytest.raises(ConfigurationError, match=r"beaker\.session\.index is .* such as user"):
        Settings.from_options({"url": "memory:", "index": index})


@pytest.mark.parametrize("nobody", [None, "", False])
def test_nobodys_sessions_are_not_listed(
    indexed: dict[str, Any], store: Store, sessions: Sessions, nobody: Any
) -> None:
    login(indexed, nobody)
    assert not list(store.keys(f"{indexed['prefix']}index:".encode()))
    with pytest.raises(ValueError, match="nobody"):
        sessions.of(nobody)


def test_what_is_shown_is_what_the_application_keeps(indexed: dict[str, Any]) -> None:
    tagged = {**indexed, "types": "tagged"}
    session = request(tagged, uuid.uuid4().hex)
    session.update(user="zed", roles={"admin"}, csrf_token="secret")
    session.save()
    (found,) = Sessions(Settings.from_options(tagged)).of("zed")
    assert found.data == {"user": "zed", "roles": {"admin"}, "csrf_token": "secret"}
    assert "secret" not in repr(found)


def test_what_max_lifetime_has_ended_is_not_found(indexed: dict[str, Any]) -> None:
    """Also where the option is newer than the session."""
    login(indexed, "zed")
    assert Sessions(Settings.from_options({**indexed, "max_lifetime": 1e-6})).of("zed") == []


def test_one_session_that_cannot_be_opened_does_not_keep_the_others(indexed: dict[str, Any], store: Store) -> None:
    keys = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]
    both = {**indexed, "store_key": " ".join(keys)}
    ids = [login(both, "zed") for _ in range(3)]
    session = request({**indexed, "store_key": " ".join(keys[::-1])}, ids[1])
    session["n"] = 1
    session.save()
    with pytest.raises(StoreUnavailable, match="not among those of store_key"):
        Sessions(Settings.from_options({**indexed, "store_key": keys[0]})).revoke("zed")
    assert [request(both, session_id).is_new for session_id in ids] == [True, False, True]


def test_in_an_outage_a_revocation_does_not_try_every_session(indexed: dict[str, Any], store: Store) -> None:
    for _ in range(20):
        login(indexed, "zed")
    faulty = FaultyStore(store)
    sessions = Sessions(Settings.from_options({**indexed, "url": faulty}))
    faulty.fail(2, for_good=True)
    with pytest.raises(StoreUnavailable):
        sessions.revoke("zed")
    assert len(faulty.calls) == 2


def test_a_session_that_is_listed_while_others_are_ended_is_ended_too(indexed: dict[str, Any], store: Store) -> None:
    login(indexed, "zed")
    later: list[str] = []
    stopping = Stopping(store, ("compare_and_swap", 1), lambda: later.append(login(indexed, "zed")))
    assert Sessions(Settings.from_options({**indexed, "url": stopping})).revoke("zed") == 2
    assert request(indexed, later[0]).is_new


def test_more_sessions_than_can_be_listed(
    indexed: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dead make room; of the living the message names none."""
    small = {**indexed, "max_value": 2000}
    full: list[str] = []
    with pytest.raises(ValueTooLargeError, match="sessions have 'zed' in 'user'") as raised:
        full.extend(login(small, "zed") for _ in range(100))
    assert full
    assert not any(member(indexed, session_id)[:8] in str(raised.value) for session_id in full)
    monkeypatch.setattr(sessionindex, "LOOKED_UP", 1)
    dead = full[: len(full) // 2]
    for session_id in dead:
        session = request(small, session_id)
        session.delete()
        session.save()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + sessionindex.GRACE + 1)
    login(small, "zed")
    assert len(Sessions(Settings.from_options(small)).of("zed")) == len(full) - len(dead) + 1


def test_all_of_the_dead_are_dropped_in_time_however_many_live(
    indexed: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessionindex, "LOOKED_UP", 5)
    living = [login(indexed, "zed") for _ in range(5)]
    for _ in range(5):
        session = request(indexed, login(indexed, "zed"))
        session.delete()
        session.save()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + sessionindex.GRACE + 1)
    for _ in range(50):
        living.append(login(indexed, "zed"))
    assert len(index_document(indexed, store, "zed")) == len(living)


def test_what_a_request_under_way_brings_back_is_still_listed(
    indexed: dict[str, Any], store: Store, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session expires while it runs, and another login drops what is dead."""
    timed = {**indexed, "timeout": 600}
    session_id = login(timed, "zed")
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + sessionindex.GRACE - 100)
    record = json.loads(store.get(record_key(indexed, session_id)) or b"{}")
    now = time.time()
    record.update(_accessed_time=now - 590, _expires=now + 130)
    store.put(record_key(indexed, session_id), json.dumps(record).encode())
    slow = request(timed, session_id)
    monkeypatch.setattr(time, "time", lambda: real() + sessionindex.GRACE + 100)
    login(timed, "zed")
    slow["n"] = 1
    slow.save()
    assert request(timed, session_id)["n"] == 1
    assert len(sessions.of("zed")) == 2
    late = request(timed, session_id)
    monkeypatch.setattr(time, "time", lambda: real() + 3 * sessionindex.GRACE)
    late["n"] = 2
    late.save()
    assert json.loads(store.get(record_key(indexed, session_id)) or b"{}")["n"] == 1


class Stopping(FaultyStore):
    """Runs something of the test's before the n-th call of a name."""

    def __init__(self, store: Store, before: tuple[str, int], action: Callable[[], None]) -> None:
        super().__init__(store)
        self.before, self.action = before, action

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any, writes: bool = True) -> Any:
        if (name, self.calls.count(name) + 1) == self.before:
            self.action()
        return super()._call(name, function, *arguments, writes=writes)


@pytest.mark.parametrize("begins", ["new", "anonymous", "known"])
def test_revoke_against_login_a_thousand_times(
    indexed: dict[str, Any], sessions: Sessions, store: Store, begins: str
) -> None:
    """The login is stopped between its two writes, each time; nothing lives on that the revocation has not ended."""
    rounds = 1000 // 6 + 1  # times three ways to begin and two ways to keep ids
    # The index has one swap of its own; the second is the session's.
    last_write = ("compare_and_swap", 1 if begins == "known" else 2)
    ended: list[int] = []
    for number in range(rounds):
        user, session_id = f"zed{number}", uuid.uuid4().hex
        if begins != "new":
            login(indexed, user if begins == "known" else None, session_id)
        stopping = Stopping(store, last_write, partial(_revoke, indexed, store, user, session_id, ended))
        session = request({**indexed, "url": stopping}, session_id)
        session.update(user=user, cart=["book"])
        session.save()
        assert len(ended) == number + 1, "the login has not been stopped"
        assert sessions.of(user) == []
        assert request(indexed, session_id).is_new
    assert sum(ended) == (rounds if begins == "known" else 0)


def _revoke(options: dict[str, Any], store: Store, user: str, session_id: str, ended: list[int]) -> None:
    ended.append(Sessions(Settings.from_options(options)).revoke(user))
    assert member(options, session_id) in index_document(options, store, user)


def test_revoke_against_login_whenever_it_comes(indexed: dict[str, Any], store: Store) -> None:
    """Two threads without a common clock: each live session is listed, and the next revocation ends it."""
    sessions = Sessions(Settings.from_options(indexed))
    stop = threading.Event()
    failures: list[BaseException] = []

    def revoke() -> None:
        try:
            while not stop.is_set():
                sessions.revoke("zed")
        except BaseException as error:  # noqa: BLE001 - for the test to see
            failures.append(error)

    revoking = threading.Thread(target=revoke)
    revoking.start()
    ids = [login(indexed, "zed") for _ in range(100)]
    stop.set()
    revoking.join(30)
    assert not failures
    live = [i for i in ids if not request(indexed, i).is_new]
    assert len(sessions.of("zed")) == len(live)
    sessions.revoke("zed")
    assert all(request(indexed, i).is_new for i in ids)


def test_a_session_is_not_stored_when_it_cannot_be_listed(indexed: dict[str, Any], store: Store) -> None:
    """For every n: the n-th store call of a login fails, once or for good, before or after it was executed."""
    for for_good in (False, True):
        for executed in (False, True):
            for nth in range(1, 20):
                user, session_id = uuid.uuid4().hex, uuid.uuid4().hex
                faulty = FaultyStore(store)
                session = request({**indexed, "url": faulty}, session_id)
                session["user"] = user
                faulty.fail(nth, executed=executed, for_good=for_good)
                try:
                    session.save()
                    saved = True
                except StoreUnavailable:
                    saved = False
                faulty.heal()
                found = Sessions(Settings.from_options(indexed)).of(user)
                live = not request(indexed, session_id).is_new
                assert len(found) == live
                assert live or not saved
                if not faulty.has_failed:
                    break
            else:
                pytest.fail("never without a fault")


def test_a_process_that_stands_still_between_the_two_writes_saves_nothing(
    indexed: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    session_id = uuid.uuid4().hex
    real = time.monotonic
    still = Stopping(
        store,
        ("get", 2),
        lambda: monkeypatch.setattr(time, "monotonic", lambda: real() + sessionindex.GRACE),
    )
    session = request({**indexed, "url": still}, session_id)
    session["user"] = "zed"
    with pytest.raises(StoreUnavailable, match="stood still"):
        session.save()
    monkeypatch.undo()
    assert request(indexed, session_id).is_new


def test_the_dead_are_dropped_once_they_are_old(
    indexed: dict[str, Any], store: Store, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    living, dead = login(indexed, "zed"), login(indexed, "zed")
    session = request(indexed, dead)
    session.delete()
    session.save()
    login(indexed, "zed")
    assert len(index_document(indexed, store, "zed")) == 3
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + sessionindex.GRACE + 1)
    login(indexed, "zed")
    listed = index_document(indexed, store, "zed")
    assert len(listed) == 3
    assert member(indexed, living) in listed
    assert member(indexed, dead) not in listed


def test_the_index_outlives_its_sessions_and_no_longer(
    indexed: dict[str, Any], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading alone keeps a session alive; the index is renewed once a day for that, not at each touch."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    session_id = login(indexed, "zed", timeout=7200)
    written = set()
    for hours in range(1, 24 * 4):
        now += 3600
        request(indexed, session_id, timeout=7200).save(accessed_only=True)
        session = json.loads(store.get(record_key(indexed, session_id)) or b"{}")
        until = index_document(indexed, store, "zed")["_expires"]
        written.add(until)
        assert session["_expires"] == now + 7320, hours
        assert session["_expires"] < until < session["_expires"] + 2 * sessionindex.PERIOD + 1
    assert 4 <= len(written) <= 5


def test_the_index_of_a_session_without_expiry_never_expires(indexed: dict[str, Any], store: Store) -> None:
    login(indexed, "zed", timeout=600)
    assert "_expires" in index_document(indexed, store, "zed")
    login(indexed, "zed")
    assert "_expires" not in index_document(indexed, store, "zed")
    login(indexed, "zed", timeout=600)
    assert "_expires" not in index_document(indexed, store, "zed")


def test_what_others_write_into_the_index_leads_nowhere_else(
    indexed: dict[str, Any], store: Store, sessions: Sessions
) -> None:
    session_id = login(indexed, "zed")
    state = f"{indexed['prefix']}state:zed".encode()
    store.put(state, b'{"user":"zed"}')
    listed = {**index_document(indexed, store, "zed"), "../state:zed": time.time(), "x": None}
    store.put(f"{indexed['prefix']}index:user:zed".encode(), documents.encode(listed))
    assert sessions.revoke("zed") == 1
    assert store.get(state) == b'{"user":"zed"}'
    assert request(indexed, session_id).is_new
