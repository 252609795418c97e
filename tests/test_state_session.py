"""`StateSession`: an id is good for as long as it should be and no longer, whatever fails, under Beaker's middleware.

A visitor's id is given away in these tests to somebody else, whose browser then shows what the id still opens.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import uuid
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import parse_qsl

import pytest
from beaker.session import Session
from webtest import TestApp

from beaker_statestore.documents import REVOKED
from beaker_statestore.exceptions import Conflict, DocumentDamagedError, StoreUnavailable
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore
from beaker_statestore.websession import StateSession, make_filter

KEY = "beaker.session.id"
ENCRYPTED = {"encrypt_key": "0123456789abcdef", "validate_key": "fedcba9876543210", "encrypted": "true"}
FORMS: dict[str, dict[str, Any]] = {
    "pickle": {},
    "json": {"data_serializer": "json"},
    "signed": {"secret": "not much of one"},
    "encrypted": ENCRYPTED,
    "sealed": {"store_key": "0123456789abcdef0123456789abcdef"},
}


def _set(session: Any, name: str) -> None:
    session[name] = True
    session.save()


#: What a request can do to its session; a query such as ``?set=a&renew`` asks for it.
ACTS: dict[str, Callable[[Any, str], object]] = {
    "read": lambda session, _: session.get("user"),
    "set": _set,
    "only-set": lambda session, name: session.update({name: True}),
    "save": lambda session, _: session.save(),
    # Beaker's SessionObject only notes that the session is to be saved in the end.
    "save-now": lambda session, _: session._session().save(),
    "renew": lambda session, _: session.regenerate_id(),
    "invalidate": lambda session, _: session.invalidate(),
    "delete": lambda session, _: session.delete(),
    "clear": lambda session, _: session.clear(),
}


class Site:
    """An application behind our filter, and what lies in its store."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = {"timeout": 600, **options}
        self.during: Callable[[], object] = lambda: None
        settings = {f"beaker.session.{name}": value for name, value in self.options.items()}
        self.app = make_filter(self._answer, settings)
        self.store = open_store(self.options["url"])
        self.prefix = f"{self.options.get('prefix', '')}session:"

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        session = environ["beaker.session"]
        for act, argument in parse_qsl(environ["QUERY_STRING"], keep_blank_values=True):
            ACTS[act](session, argument)
        during, self.during = self.during, lambda: None
        during()
        seen = sorted(name for name in session if not name.startswith("_"))
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(seen).encode()]

    def browser(self, cookie: str | None = None) -> TestApp:
        browser = TestApp(self.app, lint=False)
        if cookie is not None:
            browser.set_cookie(KEY, cookie)
        return browser

    def visitor(self) -> TestApp:
        """Somebody who has a session with ``user`` in it."""
        browser = self.browser()
        browser.get("/?set=user")
        return browser

    def opens(self, cookie: str) -> list[str]:
        """What is in the session that a cookie with this value opens; nothing if none."""
        found: list[str] = self.browser(cookie).get("/?read").json
        return found

    def records(self) -> list[str]:
        """The session ids of all records."""
        return [key.decode().removeprefix(self.prefix) for key in self.store.keys(self.prefix.encode())]


def cookie_of(browser: TestApp) -> str:
    return str(browser.cookies[KEY])


def anonymous(site: Site) -> str:
    """The cookie of somebody who has a session without ``user``."""
    browser = site.browser()
    browser.get("/?set=seen")
    return cookie_of(browser)


def id_in(cookie: str) -> str:
    """The session id of a cookie, which may have a signature in front."""
    return cookie[-32:]


@pytest.fixture(params=FORMS)
def site(request: pytest.FixtureRequest, options: dict[str, Any]) -> Site:
    return Site({**options, **FORMS[request.param]})


@pytest.fixture
def plain(options: dict[str, Any]) -> Site:
    return Site(options)


@pytest.fixture
def faulty() -> FaultyStore:
    return FaultyStore(open_store(f"memory:{uuid.uuid4().hex}"))


# A new id


@pytest.mark.parametrize(
    "acts", ["renew&save", "renew&set=n", "set=n&renew", "renew", "renew&renew&save", "read&renew"]
)
def test_after_regenerate_id_the_new_id_is_good_and_the_old_one_is_not(site: Site, acts: str) -> None:
    browser = site.visitor()
    old = cookie_of(browser)
    browser.get(f"/?{acts}")
    new = cookie_of(browser)
    assert new != old
    assert site.opens(new) == (["n", "user"] if "set=n" in acts else ["user"])
    assert site.opens(old) == []
    assert site.records() == [id_in(new)]


@pytest.mark.parametrize(
    "acts",
    [
        "renew&set=user",
        "set=user&renew",
        "set=user&renew&renew",
        "set=user&save-now&renew&save",
        "only-set=user&save-now&renew",
    ],
)
def test_a_new_session_can_get_another_id_before_and_after_it_is_saved(site: Site, acts: str) -> None:
    browser = site.browser()
    browser.get(f"/?{acts}")
    assert site.opens(cookie_of(browser)) == ["user"]
    assert site.records() == [id_in(cookie_of(browser))]


def test_without_a_save_the_visitor_keeps_his_id(options: dict[str, Any]) -> None:
    """With save_accessed_time = false, Beaker saves only what it is asked to."""
    site = Site({**options, "save_accessed_time": "false", "timeout": None})
    browser = site.visitor()
    old = cookie_of(browser)
    assert "Set-Cookie" not in browser.get("/?renew").headers
    assert site.opens(old) == ["user"]


def test_what_an_unsaved_session_has_is_not_saved_by_its_new_id(site: Site) -> None:
    browser = site.visitor()
    browser.get("/?only-set=n&renew")
    assert site.opens(cookie_of(browser)) == ["user"]


def test_a_new_session_that_is_not_saved_gets_no_cookie_by_a_new_id(site: Site) -> None:
    assert "Set-Cookie" not in site.browser().get("/?renew").headers
    assert site.records() == []


@pytest.mark.parametrize("form", ["pickle", "sealed"])
def test_what_others_do_under_the_old_id_meanwhile_is_kept(options: dict[str, Any], form: str) -> None:
    site = Site({**options, **FORMS[form]})
    browser = site.visitor()
    other = site.browser(cookie_of(browser))
    site.during = lambda: other.get("/?set=theirs")
    browser.get("/?renew&set=ours")
    assert site.opens(cookie_of(browser)) == ["ours", "theirs", "user"]
    assert site.records() == [id_in(cookie_of(browser))]


@pytest.mark.parametrize("end", ["delete", "invalidate", "clear&save"])
def test_a_session_that_others_end_meanwhile_is_ended_under_its_new_id_too(site: Site, end: str) -> None:
    browser = site.visitor()
    other = site.browser(cookie_of(browser))
    site.during = lambda: other.get(f"/?{end}")
    assert "Set-Cookie" not in browser.get("/?renew&set=ours").headers
    assert site.records() == []


def test_of_two_requests_that_renew_an_id_at_once_one_gives_the_visitor_the_new_one(site: Site) -> None:
    """As after a double click on "Sign in": the browser must not be left with an id that is no good."""
    browser = site.visitor()
    other = site.browser(cookie_of(browser))
    site.during = lambda: other.get("/?renew&set=first")
    assert "Set-Cookie" not in browser.get("/?renew&set=second").headers
    assert site.opens(cookie_of(other)) == ["first", "user"]
    assert site.records() == [id_in(cookie_of(other))]


class MeddlingStore(FaultyStore):
    """Lets somebody else act right before the n-th call."""

    def __init__(self, store: Store) -> None:
        super().__init__(store)
        self.meddle: dict[int, Callable[[], object]] = {}
        self.number = 0

    def _call(self, name: str, function: Callable[..., Any], *arguments: Any, writes: bool = True) -> Any:
        self.number += 1
        self.meddle.pop(self.number, lambda: None)()
        return super()._call(name, function, *arguments, writes=writes)


@pytest.mark.parametrize("act", ["set=theirs", "delete"])
@pytest.mark.parametrize("form", ["pickle", "sealed"])
def test_between_any_two_store_calls_others_may_change_or_end_the_session(act: str, form: str) -> None:
    store = MeddlingStore(open_store(f"memory:{uuid.uuid4().hex}"))
    site = Site({"url": store, "touch_interval": 0, **FORMS[form]})
    met = 0
    for n in range(1, 10):
        browser = site.visitor()
        old = cookie_of(browser)
        other = site.browser(old)
        store.number = 0
        store.meddle = {n: lambda other=other: other.get(f"/?{act}")}  # type: ignore[misc]
        browser.get("/?renew&set=ours")
        if store.meddle:
            break
        met += 1
        assert site.opens(old) == []
        opened = site.opens(cookie_of(browser))
        if act == "delete":
            # At the first call, ours has not yet seen the session, and begins a new one.
            assert opened == (["ours"] if n == 1 else [])
        else:
            assert opened == ["ours", "theirs", "user"]
        for key in list(store.keys()):
            store.delete(key)
    assert met >= 3


def test_a_revocation_of_the_new_id_counts(faulty: FaultyStore) -> None:
    """Who revokes a user's sessions finds the new id in the index before anything is stored under it.

    If the old record is that user's too, he ends it as well; if not, it is left as it is.
    """
    site = Site({"url": faulty})
    browser = site.visitor()
    old = cookie_of(browser)
    made: list[StateSession] = []

    def renew(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        session = environ["beaker.session"]
        session.regenerate_id()
        session.save()
        made.append(session.id)
        faulty.put(f"session:{session.id}".encode(), json.dumps({REVOKED: "token"}).encode())
        start_response("200 OK", [])
        return [b""]

    app = make_filter(renew, {f"beaker.session.{name}": value for name, value in site.options.items()})
    TestApp(app, cookiejar=browser.cookiejar, lint=False).get("/")
    assert site.opens(str(made[0])) == []
    assert cookie_of(browser) == old
    assert site.opens(old) == ["user"]


def test_a_session_is_found_by_its_user_under_its_new_id(options: dict[str, Any]) -> None:
    site = Site({**options, "index": "user"})
    sessions = Sessions(Settings.from_options(site.options))
    session = loaded(site, "")
    session["user"] = "zed"
    session.save()
    browser = site.browser(session.id)
    browser.get("/?renew")
    assert len(sessions.of("zed")) == 1
    assert sessions.revoke("zed") == 1
    assert site.opens(cookie_of(browser)) == []


# The end of a session


@pytest.mark.parametrize(
    "end", ["delete", "invalidate", "clear&save", "renew&delete", "renew&invalidate", "set=n&delete"]
)
def test_an_ended_session_is_no_good_any_more(site: Site, end: str) -> None:
    browser = site.visitor()
    old = cookie_of(browser)
    browser.get(f"/?{end}")
    assert site.records() == []
    assert site.opens(old) == []
    assert browser.get("/?read").json == []


def test_invalidate_begins_a_new_session(site: Site) -> None:
    browser = site.visitor()
    old = cookie_of(browser)
    assert browser.get("/?invalidate&set=fresh").json == ["fresh"]
    assert cookie_of(browser) != old
    assert site.opens(cookie_of(browser)) == ["fresh"]
    assert site.opens(old) == []


def test_what_is_said_after_a_good_bye_is_said_to_somebody_new(site: Site) -> None:
    browser = site.visitor()
    old = cookie_of(browser)
    browser.get("/?delete&set=notice")
    assert cookie_of(browser) != old
    assert site.opens(cookie_of(browser)) == ["notice"]
    assert site.opens(old) == []


def test_delete_has_the_browser_forget_the_id(site: Site) -> None:
    browser = site.visitor()
    browser.get("/?delete")
    assert KEY not in browser.cookies


@pytest.mark.parametrize("end", ["delete", "invalidate"])
def test_a_session_is_ended_even_if_the_request_breaks_off_after_that(site: Site, end: str) -> None:
    browser = site.visitor()
    site.during = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        browser.get(f"/?{end}")
    assert site.records() == []


@pytest.mark.parametrize("end", ["delete", "invalidate", "clear&save"])
def test_a_slow_request_does_not_undo_the_end(site: Site, end: str) -> None:
    browser = site.visitor()
    other = site.browser(cookie_of(browser))
    site.during = lambda: other.get(f"/?{end}")
    browser.get("/?set=late")
    assert site.records() == []


# Ids that nobody gave


@pytest.mark.parametrize("acts", ["read", "only-set=n", "renew", "invalidate", "delete"])
def test_a_request_with_an_unknown_id_that_saves_nothing_writes_nothing_and_sets_no_cookie(
    faulty: FaultyStore, acts: str
) -> None:
    site = Site({"url": faulty, "touch_interval": 0})
    faulty.fail(99)
    response = site.browser(uuid.uuid4().hex).get(f"/?{acts}")
    assert faulty.calls == ["get"]
    assert ("Set-Cookie" in response.headers) == (acts == "delete")


@pytest.mark.parametrize("planted", ["0123456789abcdef" * 2, "chosen", "../etc", "0" * 33, "A" * 32, '""'])
def test_an_id_that_a_client_has_chosen_is_replaced(plain: Site, planted: str) -> None:
    browser = plain.browser(planted)
    browser.get("/?set=user")
    assert cookie_of(browser) != planted
    assert plain.records() == [cookie_of(browser)]
    assert plain.opens(planted) == []


@pytest.mark.parametrize("impossible", ["chosen", "../../etc/passwd", "0" * 33, "A" * 32, "\u00e4"])
def test_an_id_that_beaker_cannot_have_made_does_not_reach_the_store(faulty: FaultyStore, impossible: str) -> None:
    site = Site({"url": faulty})
    faulty.fail(1, for_good=True)
    header = {"Cookie": f"{KEY}={impossible}".encode().decode("latin-1")}
    assert TestApp(site.app, lint=False).get("/?read", headers=header).json == []
    assert faulty.calls == []


def test_the_id_of_an_ended_session_is_as_good_as_a_planted_one(site: Site) -> None:
    browser = site.visitor()
    old = cookie_of(browser)
    browser.get("/?delete")
    again = site.browser(old)
    again.get("/?set=user")
    assert cookie_of(again) != old


def test_an_outage_at_the_look_up_gives_nobody_a_new_id(faulty: FaultyStore) -> None:
    site = Site({"url": faulty})
    for executed, for_good in itertools.product((False, True), repeat=2):
        faulty.fail(1, executed=executed, for_good=for_good)
        response = site.browser(uuid.uuid4().hex).get("/?set=user", status=503)
        faulty.heal()
        assert "Set-Cookie" not in response.headers
    assert site.records() == []


def test_an_application_that_chooses_ids_keeps_them(options: dict[str, Any]) -> None:
    """As for an API whose clients have tokens: Beaker's use_cookies = False and id."""
    chosen = {"type": "ext:tcjson", "use_cookies": False, "id": "the application's own", **options}
    session = StateSession({}, **chosen)
    assert session.is_new
    assert session.id == "the application's own"
    session["n"] = 1
    session.save()
    again = StateSession({}, **chosen)
    assert again["n"] == 1
    again.regenerate_id()
    again.save()
    assert StateSession({}, **{**chosen, "id": again.id})["n"] == 1
    assert StateSession({}, **chosen).is_new


def test_get_by_id_finds_what_the_filter_stored(plain: Site) -> None:
    browser = plain.visitor()
    found: list[Any] = []

    def look(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        found.append(environ["beaker.session"].get_by_id(cookie_of(browser)))
        found.append(environ["beaker.session"].get_by_id(uuid.uuid4().hex))
        start_response("200 OK", [])
        return [b""]

    settings = {f"beaker.session.{name}": value for name, value in plain.options.items()}
    TestApp(make_filter(look, settings), lint=False).get("/")
    assert found[0]["user"] is True
    assert found[1] is None


# What Beaker invalidates by itself


def loaded(site: Site, cookie: str, **changed: Any) -> StateSession:
    return StateSession({"cookie": f"{KEY}={cookie}"}, **{"type": "ext:tcjson", **site.options, **changed})


def age(site: Site, session_id: str, seconds: float) -> bytes:
    key = f"{site.prefix}{session_id}".encode()
    document = json.loads(site.store.get(key) or b"")
    document["_accessed_time"] -= seconds
    old = json.dumps(document).encode()
    site.store.put(key, old)
    return old


def test_a_session_that_has_timed_out_is_removed_and_a_new_one_begins(plain: Site) -> None:
    browser = plain.visitor()
    age(plain, cookie_of(browser), 601)
    response = browser.get("/?read")
    assert response.json == []
    assert "Set-Cookie" not in response.headers
    assert plain.records() == []
    old = cookie_of(browser)
    browser.get("/?set=again")
    assert cookie_of(browser) != old


def test_a_session_that_was_used_right_after_it_timed_out_is_not_removed() -> None:
    """Another process may have a clock, or a timeout, of its own."""
    store = MeddlingStore(open_store(f"memory:{uuid.uuid4().hex}"))
    site = Site({"url": store})
    browser = site.visitor()
    age(site, cookie_of(browser), 601)
    store.number = 0
    store.meddle = {2: lambda: age(site, cookie_of(browser), -601)}
    assert site.opens(cookie_of(browser)) == []
    assert site.opens(cookie_of(browser)) == ["user"]


def test_an_outage_while_a_timed_out_session_is_removed_does_not_matter(faulty: FaultyStore) -> None:
    site = Site({"url": faulty})
    browser = site.visitor()
    age(site, cookie_of(browser), 601)
    faulty.fail(2, for_good=True)
    assert browser.get("/?read").json == []
    faulty.heal()
    assert site.opens(cookie_of(browser)) == []


@pytest.mark.filterwarnings("ignore:Invalidating corrupt session")
def test_a_damaged_record_is_left_and_a_new_session_begins(plain: Site) -> None:
    browser = plain.visitor()
    old = cookie_of(browser)
    key = f"{plain.prefix}{old}".encode()
    plain.store.put(key, b"not a document")
    assert browser.get("/?read").json == []
    browser.get("/?set=again")
    assert cookie_of(browser) != old
    assert plain.store.get(key) == b"not a document"
    with pytest.raises(DocumentDamagedError):
        loaded(plain, old)


@pytest.mark.filterwarnings("ignore:Invalidating corrupt session")
def test_a_session_under_another_key_is_left_and_a_new_one_begins(options: dict[str, Any]) -> None:
    site = Site({**options, **ENCRYPTED})
    browser = site.visitor()
    other = Site({**options, **ENCRYPTED, "encrypt_key": "another"})
    assert other.opens(cookie_of(browser)) == []
    assert site.opens(cookie_of(browser)) == ["user"]


# Outages

CHANGES = [
    "renew&set=n",
    "set=n&renew",
    "renew",
    "invalidate",
    "invalidate&set=n",
    "delete",
    "clear&save",
    "delete&set=n",
]


@pytest.mark.parametrize("acts", CHANGES)
@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
@pytest.mark.parametrize("form", ["pickle", "encrypted", "sealed"])
def test_whatever_call_fails_no_session_is_lost_and_no_old_id_stays(
    faulty: FaultyStore, acts: str, executed: bool, for_good: bool, form: str
) -> None:
    site = Site({"url": faulty, "touch_interval": 0, **FORMS[form]})
    result = (["n"] if "set=n" in acts else []) + (["user"] if "renew" in acts else [])
    for nth in itertools.count(1):
        browser = site.visitor()
        old = cookie_of(browser)
        faulty.fail(nth, executed=executed, for_good=for_good)
        response = browser.get(f"/?{acts}", status="*")
        met = faulty.has_failed
        faulty.heal()
        now = browser.cookies.get(KEY, "")
        if response.status_int == 200:
            assert site.opens(old) == []
            assert site.opens(now) == result
        else:
            assert response.status_int == 503
            if "renew" in acts:
                # Under the old id as it was, or under the new one, which the visitor has then.
                assert site.opens(now) == (["user"] if now == old else result)
                assert now == old or site.opens(old) == []
            else:
                # He asked for the end of it, so it may have come.
                assert now == old
                assert site.opens(now) in (["user"], [])
        # And the same once more does what it should.
        assert browser.get("/?renew&set=again").status_int == 200
        assert "again" in site.opens(cookie_of(browser))
        if not met:
            break
        for key in list(faulty.keys()):
            faulty.delete(key)
    assert nth > 2


def test_a_session_whose_old_id_may_be_gone_reaches_the_visitor_with_the_503(faulty: FaultyStore) -> None:
    site = Site({"url": faulty})
    browser = site.visitor()
    old = cookie_of(browser)
    faulty.fail(4, executed=True, for_good=True)
    response = browser.get("/?renew", status=503)
    assert faulty.calls[:4] == ["get", "get", "compare_and_swap", "compare_and_swap"]
    faulty.heal()
    assert cookie_of(browser) != old
    assert f"{KEY}={cookie_of(browser)}" in response.headers["Set-Cookie"]
    assert browser.get("/?read").json == ["user"]


def test_an_application_may_save_again_after_an_outage(faulty: FaultyStore) -> None:
    site = Site({"url": faulty})
    for nth, executed in itertools.product((1, 2), (False, True)):
        browser = site.visitor()
        session = loaded(site, cookie_of(browser))
        session.regenerate_id()
        faulty.fail(nth, executed=executed, for_good=True)
        with pytest.raises(StoreUnavailable):
            session.save()
        faulty.heal()
        session["n"] = 1
        session.save()
        assert session.request["set_cookie"]
        assert site.opens(session.id) == ["n", "user"]
        assert site.opens(cookie_of(browser)) == []


def test_after_a_new_id_that_was_stored_in_vain_the_session_can_still_be_ended(faulty: FaultyStore) -> None:
    site = Site({"url": faulty})
    session = loaded(site, cookie_of(site.visitor()))
    session.regenerate_id()
    faulty.fail(3)
    with pytest.raises(StoreUnavailable):
        session.save()
    assert len(site.records()) == 2
    session.delete()
    assert site.records() == []


def test_after_a_new_id_that_was_stored_in_vain_the_session_can_get_another(faulty: FaultyStore) -> None:
    site = Site({"url": faulty})
    browser = site.visitor()
    session = loaded(site, cookie_of(browser))
    session.regenerate_id()
    faulty.fail(3)
    with pytest.raises(StoreUnavailable):
        session.save()
    session.regenerate_id()
    session.save()
    assert site.opens(session.id) == ["user"]
    assert site.opens(cookie_of(browser)) == []


def test_while_the_old_id_is_good_for_certain_the_503_has_no_cookie() -> None:
    store = MeddlingStore(open_store(f"memory:{uuid.uuid4().hex}"))
    site = Site({"url": store, "touch_interval": 0})
    browser = site.visitor()
    old = cookie_of(browser)

    def change_and_fail() -> None:
        site.browser(old).get("/?set=theirs")
        store.fail(2)  # the removal of the old record gives way to that change, and then

    store.number = 0
    store.meddle = {3: change_and_fail}
    response = browser.get("/?renew", status=503)
    store.heal()
    assert "Set-Cookie" not in response.headers
    assert browser.get("/?read").json == ["theirs", "user"]


# Conflicts


def test_a_conflict_leaves_nothing_under_the_new_id() -> None:
    store = MeddlingStore(open_store(f"memory:{uuid.uuid4().hex}"))
    site = Site({"url": store, "conflict": "raise"})
    browser = site.visitor()
    old = cookie_of(browser)

    def change() -> None:
        theirs = loaded(site, old)
        theirs["n"] = "theirs"
        theirs.save()

    store.number = 0
    store.meddle = {3: change}
    browser.get("/?renew&set=n", status=409)
    assert site.records() == [old]
    assert loaded(site, old)["n"] == "theirs"


def test_with_conflict_raise_the_second_of_two_gets_a_409_and_changes_nothing(options: dict[str, Any]) -> None:
    site = Site({**options, "conflict": "raise"})
    browser = site.visitor()
    other = site.browser(cookie_of(browser))
    site.during = lambda: other.get("/?set=n")
    settings = {f"beaker.session.{name}": value for name, value in site.options.items()}

    def competing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        session = environ["beaker.session"]
        session["n"] = "ours"
        session.save()
        during, site.during = site.during, lambda: None
        during()
        start_response("200 OK", [("Content-Type", "text/plain"), ("Set-Cookie", "a=b")])
        return [b"saved"]

    second = TestApp(make_filter(competing, settings), cookiejar=browser.cookiejar, lint=False)
    response = second.get("/", status=409)
    assert "Set-Cookie" not in response.headers
    assert loaded(site, cookie_of(browser))["n"] is True
    assert second.get("/").text == "saved"


# Other back ends


def test_over_another_back_end_everything_is_beakers() -> None:
    options: dict[str, Any] = {"type": "memory", "timeout": 600}
    stock, ours = Session({}, **options), StateSession({}, **options)
    for session in (stock, ours):
        session["user"] = True
        session.save()
    for session in (stock, ours):
        cookie = {"cookie": f"{KEY}={session.id}"}
        renewed = type(session)(cookie, **options)
        renewed.regenerate_id()
        renewed.save()
        assert "user" in type(session)(cookie, **options), "Beaker leaves the old record"
        renewed.invalidate()
        renewed.delete()
        chosen = type(session)({"cookie": f"{KEY}=chosen"}, **options)
        assert chosen.id == "chosen"


def test_what_others_store_under_the_old_id_is_listed_under_the_new_one(faulty: FaultyStore) -> None:
    """A sign-in by one request while another renews the id: whoever revokes has to find the result."""
    site = Site({"url": faulty, "index": "user"})
    cookie = anonymous(site)
    renewing, signing_in = loaded(site, cookie), loaded(site, cookie)
    renewing.regenerate_id()
    signing_in["user"] = "zed"
    signing_in.save()
    renewing["lang"] = "de"
    renewing.save()
    sessions = Sessions(Settings.from_options({"url": faulty, "index": "user"}))
    assert [session.data for session in sessions.of("zed")] == [{"user": "zed", "lang": "de", "seen": True}]
    assert sessions.revoke("zed") == 1


def test_whoever_revokes_all_else_keeps_his_own_session_also_while_its_id_is_renewed(faulty: FaultyStore) -> None:
    site = Site({"url": faulty, "index": "user"})
    sessions = Sessions(Settings.from_options({"url": faulty, "index": "user"}))
    session = loaded(site, anonymous(site))
    session["user"] = "zed"
    session.save()
    assert session.ids == {session.id}
    session.regenerate_id()
    assert len(session.ids) == 2
    sessions.revoke("zed", keep=session.ids)
    session["n"] = 1
    session.save()
    assert session.ids == {session.id}
    assert site.opens(session.id) == ["n", "seen", "user"]


@pytest.mark.parametrize("end", ["revoke", "delete"])
def test_a_session_that_was_ended_before_its_id_was_renewed_is_not_revived_by_an_outage(
    faulty: FaultyStore, end: str
) -> None:
    site = Site({"url": faulty, "index": "user"})
    for nth, executed in itertools.product(range(1, 8), (False, True)):
        session = loaded(site, anonymous(site))
        session["user"] = "zed"
        session.save()
        slow = loaded(site, session.id)
        slow.regenerate_id()
        if end == "revoke":
            Sessions(Settings.from_options({"url": faulty, "index": "user"})).revoke("zed")
        else:
            session.delete()
        slow["n"] = 1
        faulty.fail(nth, executed=executed, for_good=True)
        with contextlib.suppress(StoreUnavailable):
            slow.save()
            assert not slow.namespace.is_stored
        faulty.heal()
        assert site.opens(slow.id) == []


@pytest.mark.parametrize("conflict", ["last", "raise"])
def test_the_closing_touch_of_a_request_repeats_nothing_that_it_has_saved(faulty: FaultyStore, conflict: str) -> None:
    """Beaker's picture of the session as it was loaded shares its lists with the session."""
    site = Site({"url": faulty, "conflict": conflict})
    session = loaded(site, cookie_of(site.visitor()))
    session["cart"] = []
    session.save()
    first, second = loaded(site, session.id), loaded(site, session.id)
    first["cart"].append("a")
    first["x"] = 1
    first.save()
    second = loaded(site, session.id)
    second["cart"].append("b")
    second.save()
    first.save(accessed_only=True)
    assert loaded(site, session.id)["cart"] == ["a", "b"]
    del first["x"]
    first.save()
    assert "x" not in loaded(site, session.id)


class Between(FaultyStore):
    """Runs something of the test's before the n-th compare_and_swap."""

    action: Callable[[], object] = staticmethod(lambda: None)
    nth = 0

    def compare_and_swap(self, *arguments: Any) -> bool:
        self.nth -= 1
        if self.nth == 0:
            self.action()
        return super().compare_and_swap(*arguments)


@pytest.mark.parametrize("nth", [1, 2, 3, 4])
@pytest.mark.parametrize("conflict", ["last", "raise"])
def test_a_revocation_amid_a_sign_in_under_a_new_id_reaches_it_or_finds_nobody(nth: int, conflict: str) -> None:
    """Before the listing it finds nobody; then it ends the sign-in, and after the new record is there, the session."""
    store = Between(open_store(f"memory:{uuid.uuid4().hex}"))
    options = {"url": store, "index": "user", "conflict": conflict}
    site = Site(options)
    old = anonymous(site)
    session = loaded(site, old)
    session["user"] = "zed"
    session.regenerate_id()
    store.action = lambda: Sessions(Settings.from_options(options)).revoke("zed")
    store.nth = nth
    session.save()
    store.nth = 0
    survivors = {name: site.opens(cookie) for name, cookie in {"old": old, "new": session.id}.items()}
    expected = {
        1: {"old": [], "new": ["seen", "user"]},
        2: {"old": ["seen"], "new": []},
        3: {"old": [], "new": []},
        4: {"old": [], "new": ["seen", "user"]},  # all is done, no swap was left to come between
    }
    assert survivors == expected[nth]
    if nth == 2:
        assert not session.namespace.is_stored
        assert not session.request["set_cookie"]


def test_a_mark_is_not_removed_with_what_a_conflict_leaves_behind(faulty: FaultyStore) -> None:
    store = Between(faulty)
    options = {"url": store, "index": "user", "conflict": "raise"}
    site = Site(options)
    session = loaded(site, anonymous(site))
    session["user"] = "zed"
    session["n"] = 1
    session.regenerate_id()
    other = loaded(site, next(iter(session.ids - {session.id})))
    other["n"] = 2

    def revoke_and_change() -> None:
        Sessions(Settings.from_options(options)).revoke("zed")
        other.save()

    store.action, store.nth = revoke_and_change, 3
    with pytest.raises(Conflict):
        session.save()
    assert REVOKED in json.loads(store.get(f"session:{session.id}".encode()) or b"{}")
