"""An outage of the store at any moment of a web request: the right answer or a 503, and never a new, empty session."""

from __future__ import annotations

import json
import types
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
from beaker import crypto
from beaker.crypto import noencryption
from beaker.middleware import SessionMiddleware
from beaker.session import Session
from webtest import TestApp

from beaker_statestore.exceptions import ConfigurationError, Conflict, StoreUnavailable
from beaker_statestore.stores import open_store
from beaker_statestore.testing import FaultyStore
from beaker_statestore.websession import OutageFilter, StateSession, filter_app_factory, make_filter


def counting(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """An application that counts a visitor's visits, reads only, or says goodbye, as the path asks."""
    session = environ["beaker.session"]
    path = environ["PATH_INFO"]
    if path == "/visit":
        session["visits"] = session.get("visits", 0) + 1
        session.save()
    elif path == "/leave":
        session.delete()
    text = f"{session.get('user', 'nobody')} {session.get('visits', 0)}"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [text.encode()]


def lazily(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    """The same as a generator: nothing happens before the first chunk is asked for."""
    yield from counting(environ, start_response)


@pytest.fixture
def faulty() -> FaultyStore:
    return FaultyStore(open_store("memory:web-faults"))


@pytest.fixture(params=["pickle", "json"])
def settings(request: pytest.FixtureRequest, faulty: FaultyStore) -> dict[str, Any]:
    return {
        "beaker.session.url": faulty,
        "beaker.session.timeout": 600,
        "beaker.session.touch_interval": 0,
        "beaker.session.secret": "not much of one",
        "beaker.session.data_serializer": request.param,
    }


@pytest.mark.parametrize("application", [counting, lazily])
@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("path", ["/read", "/visit", "/leave"])
def test_an_outage_at_any_call_gives_the_right_answer_or_503_and_keeps_the_session(
    faulty: FaultyStore, settings: dict[str, Any], path: str, forever: bool, executed: bool, application: Any
) -> None:
    """For every n: the n-th store call of a request fails, once or from then on, before or after it was executed."""
    calls = 0
    for nth in range(1, 20):
        browser = TestApp(make_filter(application, settings))
        assert browser.get("/visit").text == "nobody 1"
        cookie = browser.cookies["beaker.session.id"]
        faulty.fail(nth, for_good=forever, executed=executed)
        try:
            response = browser.get(path, status="*")
        finally:
            met = faulty.has_failed
            faulty.heal()
        left = path == "/leave"
        if response.status_int == 200:
            assert response.text == {"/read": "nobody 1", "/visit": "nobody 2", "/leave": "nobody 0"}[path]
        else:
            assert response.status_int == 503
            assert int(response.headers["Retry-After"]) > 0
            assert "Set-Cookie" not in response.headers
            assert browser.cookies["beaker.session.id"] == cookie
            allowed = {"/read": ["nobody 1"], "/visit": ["nobody 1", "nobody 2"], "/leave": ["nobody 1", "nobody 0"]}
            assert browser.get("/read").text in allowed[path]
        if not left:
            assert browser.cookies["beaker.session.id"] == cookie
        if not met:
            break
        calls += 1
    else:
        raise AssertionError("the number of store calls of one request seems to have no end")
    assert calls >= 2


def test_requests_that_overlap_in_stock_beakers_middleware_lose_nothing(options: dict[str, Any]) -> None:
    """While one request is under way another one begins and ends: the worst order, without luck."""

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        session = environ["beaker.session"]
        action, *during = environ["QUERY_STRING"].split("&")
        session.get("user")
        if during:
            browser.get("/", "&".join(during))
        if action == "leave":
            session.delete()
        elif action != "read":
            session[action] = session.get(action, 0) + 1
            session.save()
        seen = {name: value for name, value in session.items() if not name.startswith("_")}
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(seen).encode()]

    config = {"session.type": "ext:tcjson", **{f"session.{name}": value for name, value in options.items()}}
    browser = TestApp(SessionMiddleware(application, config), lint=False)
    browser.get("/?a")
    browser.get("/?b&c")
    assert browser.get("/?read").json == {"a": 1, "b": 1, "c": 1}
    browser.get("/?read&a")
    assert browser.get("/?read").json == {"a": 2, "b": 1, "c": 1}
    session_id = browser.cookies["beaker.session.id"]
    browser.get("/?d&leave")
    browser.set_cookie("beaker.session.id", session_id)
    assert browser.get("/?read").json == {}


def test_no_warning_tells_a_session_id(
    faulty: FaultyStore, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    browser = TestApp(make_filter(counting, settings))
    browser.get("/visit")
    with warnings.catch_warnings(record=True) as warned:
        make_filter(counting, settings)  # whose own filter was forgotten by the line above
        faulty.fail(1, for_good=True)
        browser.get("/read", status=503)
        faulty.heal()
    assert [str(warning.message) for warning in warned] == []
    assert browser.cookies["beaker.session.id"][40:] not in caplog.text


def test_an_outage_gives_a_new_visitor_no_cookie(faulty: FaultyStore, settings: dict[str, Any]) -> None:
    browser = TestApp(make_filter(counting, settings))
    faulty.fail(1, for_good=True)
    try:
        response = browser.get("/visit", status=503)
    finally:
        faulty.heal()
    assert "Set-Cookie" not in response.headers
    assert browser.get("/visit").text == "nobody 1"


def test_an_application_that_catches_the_outage_gets_the_same_session_when_it_is_over(
    faulty: FaultyStore, settings: dict[str, Any]
) -> None:
    def patient(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            environ["beaker.session"]["visits"]
        except StoreUnavailable:
            faulty.heal()
        return counting(environ, start_response)

    browser = TestApp(make_filter(counting, settings))
    browser.get("/visit")
    patient_browser = TestApp(make_filter(patient, settings), cookiejar=browser.cookiejar)
    faulty.fail(1, for_good=True)
    assert patient_browser.get("/read").text == "nobody 1"


ENCIPHERED = {
    "beaker.session.encrypt_key": "key",
    "beaker.session.validate_key": "another",
    "beaker.session.encrypted": "true",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beaker.session.crypto_type": "pycryptodome"}, "pycryptodome"),
        ({"beaker.session.encrypted": "false"}, "store_key"),
        ({"beaker.session.validate_key": ""}, "validate_key"),
    ],
)
def test_an_encryption_that_would_not_protect_is_refused(
    settings: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    make_filter(counting, {**settings, **ENCIPHERED})
    with pytest.raises(ConfigurationError, match=message):
        make_filter(counting, {**settings, **ENCIPHERED, **changed})


@pytest.mark.parametrize("module", ["noencryption", "pycrypto"])
def test_encryption_without_its_library_is_refused(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    # pycrypto itself cannot be imported without the library that it is for.
    stand_in = types.SimpleNamespace(**{**vars(noencryption), "__name__": f"beaker.crypto.{module}"})
    monkeypatch.setitem(crypto.CRYPTO_MODULES, "default", stand_in)
    with pytest.raises(ConfigurationError, match="pip install cryptography"):
        make_filter(counting, {**settings, **ENCIPHERED})


class OwnSession(Session):
    """An application's own."""


class OwnStateSession(StateSession):
    """Another application's own."""


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, StateSession),
        ("", StateSession),
        (OwnSession, OwnSession),
        (f"{__name__}:OwnSession", OwnSession),
        (f"{__name__}:OwnStateSession", OwnStateSession),
    ],
)
def test_the_session_is_ours_unless_the_application_has_its_own_class(
    settings: dict[str, Any], given: Any, expected: type
) -> None:
    classes: list[type] = []

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        classes.append(type(environ["beaker.session"]._session()))
        return counting(environ, start_response)

    browser = TestApp(make_filter(application, {**settings, "beaker.session.session_class": given}))
    assert browser.get("/visit").text == "nobody 1"
    assert classes == [expected]


@pytest.mark.parametrize("given", ["dict", "no.such:Module", f"{__name__}:Nothing", "not a name", dict, 42])
def test_a_session_class_that_is_none_is_named(settings: dict[str, Any], given: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"session_class is .*(package\.module:Class|StateSession)"):
        make_filter(counting, {**settings, "beaker.session.session_class": given})


@pytest.mark.parametrize("timeout", [None, "600"])
def test_sessions_without_an_end_are_warned_about_once(
    faulty: FaultyStore, caplog: pytest.LogCaptureFixture, timeout: str | None
) -> None:
    given = {} if timeout is None else {"session.timeout": timeout}
    browser = TestApp(make_filter(counting, {"session.url": faulty, **given}))
    browser.get("/visit")
    browser.get("/visit")
    warned = [record.getMessage() for record in caplog.records if record.name == "beaker_statestore.namespace"]
    assert len(warned) == (timeout is None)
    assert all("beaker.session.timeout is not set" in message for message in warned)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beaker.session.url": ""}, "url is not set"),
        ({"beaker.session.url": "foo:bar"}, "foo:bar"),
        ({"beaker.session.deadline": "soon"}, "deadline"),
        ({"beaker.session.data_serializer": "json", "beaker.session.serializer": "pickle"}, "leave the first one out"),
    ],
)
def test_what_is_wrong_is_said_when_the_application_starts(
    settings: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_filter(counting, {**settings, **changed})


def test_another_back_end_is_left_to_beaker() -> None:
    browser = TestApp(make_filter(counting, {"session.type": "memory"}))
    assert [browser.get("/visit").text for _ in range(2)] == ["nobody 1", "nobody 2"]


def test_the_filter_is_a_paste_filter(faulty: FaultyStore) -> None:
    application = filter_app_factory(counting, {}, **{"beaker.session.url": faulty})
    assert TestApp(application).get("/visit").text == "nobody 1"


def saving_early(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    start_response("200 OK", [("Content-Type", "text/plain"), ("Set-Cookie", "a=b")])
    raise Conflict(["cart"])


def saving_late(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    yield from saving_early(environ, start_response)


@pytest.mark.parametrize("application", [saving_early, saving_late])
def test_a_conflict_is_a_409_without_a_cookie(application: Any) -> None:
    response = TestApp(OutageFilter(application)).get("/", status=409)
    assert "Set-Cookie" not in response.headers
    assert "load the page again" in response.text


def test_other_errors_are_none_of_the_filters_business() -> None:
    def broken(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        TestApp(OutageFilter(broken)).get("/")


@pytest.mark.parametrize("fails", ["before its first chunk", "as it starts"])
def test_an_answer_that_breaks_off_is_closed(fails: str) -> None:
    closed = []

    class Body:
        def __iter__(self) -> Iterator[bytes]:
            raise ValueError("before its first chunk")

        def close(self) -> None:
            closed.append(True)

    def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Body:
        if fails == "as it starts":
            start_response("200 OK", [])
        return Body()

    def start(*arguments: Any) -> Any:
        raise ValueError("as it starts")

    with pytest.raises(ValueError, match=fails):
        OutageFilter(application)({}, start)
    assert closed == [True]


def test_a_streaming_answer_streams_and_is_closed() -> None:
    events: list[str] = []

    def streaming(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        try:
            for n in range(3):
                events.append(f"made {n}")
                yield str(n).encode()
        finally:
            events.append("closed")

    started: list[str] = []
    body: Any = OutageFilter(streaming)(
        {"PATH_INFO": "/"}, lambda status, headers, exc_info=None: started.append(status)
    )
    assert started == ["200 OK"]
    chunks = iter(body)
    assert next(chunks) == b"0"
    assert events == ["made 0"]
    body.close()
    assert events[-1] == "closed"


def test_the_old_write_callable_works() -> None:
    def writing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        write = start_response("200 OK", [("Content-Type", "text/plain")])
        write(b"first ")
        return [b"second"]

    assert TestApp(OutageFilter(writing), lint=False).get("/").text == "first second"
