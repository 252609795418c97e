"""Who has signed in, over HTTP: the cookie, its token's life, and honest answers when the store fails."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from http.cookies import SimpleCookie
from pathlib import Path
from typing import Any

import pytest
from paste.deploy import loadfilter
from webtest import TestApp

from beaker_statestore.exceptions import ConfigurationError, Conflict, StateStoreError
from beaker_statestore.slates import Slates
from beaker_statestore.slatesession import SlateMiddleware, filter_app_factory
from beaker_statestore.stores import open_store
from beaker_statestore.testing import FaultyStore
from tests.serving import served

#: Seconds until a test gives up waiting.
PATIENCE = 20.0

_numbers = itertools.count(1)


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Signs a user in or out, or counts his visits, as the path asks."""
    login = environ["slates.login"]
    path = environ["PATH_INFO"]
    if path == "/in":
        slate = login.sign_in(environ["QUERY_STRING"])
        assert slate.name == environ["slates.user"].name == login.user
    elif path == "/out":
        login.sign_out()
        assert environ["slates.user"] is None
    elif path == "/everywhere":
        environ["test.slates"].auth.revoke_all(login.user, keep=login.token)
    elif path == "/count":
        environ["slates.user"].increment("user", "visits")
    elif path == "/conflict":
        if environ["QUERY_STRING"]:
            login.sign_in(environ["QUERY_STRING"])
        raise Conflict(["x"])
    slate = environ["slates.user"]
    text = "nobody" if slate is None else f"{slate.name} {slate.user.get('visits', 0)}"
    start_response("200 OK", [("Content-Type", "text/plain; charset=utf-8")])
    return [text.encode()]


def lazily(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
    """The same as a generator: nothing happens before the first chunk is asked for."""
    yield from application(environ, start_response)


@pytest.fixture
def slates(options: dict[str, Any]) -> Slates:
    return Slates(options["url"], prefix=options["prefix"])


@pytest.fixture
def faulty() -> FaultyStore:
    return FaultyStore(open_store("memory:slate-session-faults"))


def browser(slates: Slates, app: Any = application, **options: Any) -> TestApp:
    return TestApp(SlateMiddleware(app, slates, **{"secure": False, **options}), {"test.slates": slates})


def the_cookie(response: Any) -> Any:
    """The one cookie that an answer sets."""
    (header,) = response.headers.getall("Set-Cookie")
    ((name, morsel),) = SimpleCookie(header).items()
    assert name == morsel.key
    return morsel


# Signing in and out


@pytest.mark.parametrize("app", [application, lazily])
@pytest.mark.parametrize("user", ["zed", "_auth", "josé: %", ""])
def test_who_has_signed_in_is_known_until_he_signs_out(slates: Slates, user: str, app: Any) -> None:
    def follow(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["QUERY_STRING"] = user
        return app(environ, start_response)  # type: ignore[no-any-return]

    somebody = browser(slates, follow)
    assert somebody.get("/").text == "nobody"
    assert somebody.get("/in").text == f"{user} 0"
    assert somebody.get("/count").text == f"{user} 1"
    assert somebody.get("/").text == f"{user} 1"
    token = somebody.cookies["slate"]
    assert slates.auth.check(token) == user
    assert somebody.get("/out").text == "nobody"
    assert "slate" not in somebody.cookies
    assert slates.auth.check(token) is None
    assert somebody.get("/").text == "nobody"


def test_the_cookie_is_for_this_site_and_no_script(slates: Slates) -> None:
    response = TestApp(SlateMiddleware(application, slates, lifetime=1000)).get("/in?zed")
    cookie = the_cookie(response)
    assert cookie.key == "__Host-slate"
    assert slates.auth.check(cookie.value) == "zed"
    assert cookie["httponly"]
    assert cookie["secure"]
    assert cookie["samesite"] == "Lax"
    assert cookie["path"] == "/"
    assert cookie["domain"] == ""
    assert cookie["max-age"] == "2000"
    assert "private" in response.headers["Cache-Control"]


def test_the_cookie_is_as_asked_for(slates: Slates) -> None:
    options = {"cookie": "who", "samesite": "Strict", "path": "/shop", "domain": "example.com", "secure": False}
    cookie = the_cookie(TestApp(SlateMiddleware(application, slates, **options)).get("/in?zed"))  # type: ignore[arg-type]
    assert (cookie.key, cookie["samesite"], cookie["path"], cookie["domain"]) == (
        "who",
        "Strict",
        "/shop",
        "example.com",
    )
    assert not cookie["secure"]
    gone = the_cookie(TestApp(SlateMiddleware(application, slates, **options)).get("/out"))  # type: ignore[arg-type]
    assert (gone.value, gone["max-age"], gone["path"], gone["domain"]) == ("", "0", "/shop", "example.com")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cookie": "__Host-slate", "secure": False}, "secure"),
        ({"cookie": "__Secure-slate", "secure": False}, "secure"),
        ({"cookie": "__Host-slate", "path": "/shop"}, "path /"),
        ({"cookie": "__Host-slate", "domain": "example.com"}, "no domain"),
        ({"samesite": "None", "secure": False}, "samesite"),
        ({"samesite": "Sometimes"}, "(?i)samesite"),
        ({"cookie": "a b"}, "cookie"),
        ({"cookie": ""}, "cookie"),
        ({"lifetime": 0}, "lifetime"),
        ({"lifetime": float("inf")}, "lifetime"),
        ({"lifetime": 1e300}, "not possible"),
        ({"longest": -1}, "not possible"),
        ({"cookie": "__host-slate", "secure": False}, "secure"),
        ({"path": "/x; Domain=evil"}, "path"),
        ({"path": "/x\r\nSet-Cookie: a=b"}, "path"),
        ({"path": ""}, "path"),
        ({"domain": "a\r\nb"}, "domain"),
        ({"domain": "a; Path=/"}, "domain"),
    ],
)
def test_what_browsers_would_refuse_is_said_at_the_start(options: dict[str, Any], message: str) -> None:
    SlateMiddleware(application, Slates("memory:"), cookie="__Host-slate")
    with pytest.raises(ConfigurationError, match=message):
        SlateMiddleware(application, Slates("memory:"), **options)


def test_signing_in_ends_the_token_that_was_there(slates: Slates) -> None:
    """Whoever has planted his own token in somebody's browser does not share what comes next."""
    somebody = browser(slates)
    somebody.get("/in?eve")
    planted = somebody.cookies["slate"]
    assert somebody.get("/in?zed").text == "zed 0"
    assert somebody.cookies["slate"] != planted
    assert slates.auth.check(planted) is None


def test_log_out_everywhere_else(slates: Slates) -> None:
    here, there = browser(slates), browser(slates)
    for one in (here, there):
        one.get("/in?zed")
    here.get("/everywhere")
    assert here.get("/").text == "zed 0"
    response = there.get("/")
    assert response.text == "nobody"
    # Not even forgotten: this answer may come after that of a request which has signed in anew.
    assert "Set-Cookie" not in response.headers


def test_signing_in_after_the_answer_has_begun_is_an_error(slates: Slates) -> None:
    def late(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterator[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain")])
        yield b"hello"
        environ["slates.login"].sign_in("zed")

    with pytest.raises(StateStoreError, match="before start_response"):
        browser(slates, late).get("/")
    assert slates.auth.revoke_all("zed") == 0


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ([], "private"),
        (["public, max-age=60"], "max-age=60, private"),
        (["no-store"], "no-store, private"),
        (["Public", 'private="Set-Cookie", s-maxage=5, no-cache'], "no-cache, private"),
        (['private="X-A, X-B", no-store'], "no-store, private"),
    ],
)
def test_no_shared_cache_keeps_a_cookie(slates: Slates, given: list[str], sent: str) -> None:
    def cached(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/in":
            environ["slates.login"].sign_in("zed")
        start_response("200 OK", [("Content-Type", "text/plain"), *(("Cache-Control", value) for value in given)])
        return [b""]

    somebody = browser(slates, cached)
    assert somebody.get("/in").headers.getall("Cache-Control") == [sent]
    assert somebody.get("/").headers.getall("Cache-Control") == given


def test_a_login_that_ends_in_a_conflict_leaves_the_one_before(slates: Slates) -> None:
    somebody = browser(slates)
    somebody.get("/in?zed")
    somebody.get("/conflict?ada", status=409)
    assert somebody.get("/").text == "zed 0"


def test_an_answer_that_signs_in_twice_or_out_again_leaves_one_token_or_none(slates: Slates) -> None:
    def twice(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        login = environ["slates.login"]
        if environ["PATH_INFO"] != "/":
            login.sign_in("zed")
            login.sign_in("zed")
        if environ["PATH_INFO"] == "/out":
            login.sign_out()
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [b""]

    somebody = browser(slates, twice)
    for _ in range(2):
        somebody.get("/in")
        assert slates.auth.revoke_all("zed", keep=somebody.cookies["slate"]) == 0
    somebody.get("/out")
    assert slates.auth.revoke_all("zed") == 0


# Round trips and what clients send


def test_a_request_costs_one_round_trip_and_none_without_a_cookie(faulty: FaultyStore) -> None:
    somebody = browser(Slates(faulty))
    faulty.calls.clear()
    somebody.get("/")
    assert faulty.calls == []
    user = f"user{next(_numbers)}"
    somebody.get(f"/in?{user}")
    faulty.calls.clear()
    somebody.get("/")
    assert faulty.calls == ["get", "get"]  # the token, and the application's `slate.user`


@pytest.mark.parametrize(
    "header",
    [
        "slate=",
        "slate=x",
        "slate=" + "x" * 43,
        "slate=" + "x" * 100_000,
        'slate="\\303\\050"',
        "slate=\xff\xfe; other=\xc3(",
        "slate; ;;=;",
        "slate=é",
        "=slate; slate",
    ],
)
def test_whatever_a_client_sends_nobody_is_signed_in(slates: Slates, header: str) -> None:
    environ = {"test.slates": slates, "HTTP_COOKIE": header}
    response = TestApp(SlateMiddleware(application, slates), environ, lint=False).get("/")
    assert response.text == "nobody"
    assert "Set-Cookie" not in response.headers


def test_a_long_cookie_header_is_read_in_no_time(slates: Slates) -> None:
    """In a time that grows with its length, that is: with its square, these would take an hour."""
    somebody = browser(slates)
    somebody.get("/in?zed")
    for junk in ("x" * 1_000_000, "a=" * 500_000, '"' * 1_000_000, "; " * 500_000, "slate" * 200_000):
        # Some clients put values in quotation marks.
        sent = {"HTTP_COOKIE": f'{junk}; slate="{somebody.cookies["slate"]}" ;other=1', "test.slates": slates}
        middleware = SlateMiddleware(application, slates, secure=False)
        assert TestApp(middleware, sent, lint=False).get("/").text == "zed 0"


# Renewal and expiry


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock so many seconds ahead."""
    now = time.time

    def move(seconds: float) -> None:
        monkeypatch.setattr(time, "time", lambda: now() + seconds)

    return move


def test_a_token_is_renewed_when_half_of_its_life_is_over(slates: Slates, ahead: Callable[[float], None]) -> None:
    somebody = browser(slates, lifetime=1000)
    somebody.get("/in?zed")
    token = somebody.cookies["slate"]
    ahead(499)
    assert "Set-Cookie" not in somebody.get("/").headers
    ahead(501)
    response = somebody.get("/")
    assert response.text == "zed 0"
    assert the_cookie(response).value == token
    assert "private" in response.headers["Cache-Control"]
    ahead(1499)
    assert somebody.get("/").text == "zed 0"
    ahead(1499 + 1001)
    assert somebody.get("/").text == "nobody"


def test_who_signs_out_in_the_request_that_renews_is_out(slates: Slates, ahead: Callable[[float], None]) -> None:
    somebody = browser(slates, lifetime=1000)
    somebody.get("/in?zed")
    token = somebody.cookies["slate"]
    ahead(600)
    assert the_cookie(somebody.get("/out")).value == ""
    assert slates.auth.check(token) is None


def test_a_renewal_does_not_undo_a_login_in_another_window(slates: Slates, ahead: Callable[[float], None]) -> None:
    """A slow request began with the old token, which another one ended by signing in; its answer is the last."""
    somebody = browser(slates, lifetime=1000)
    somebody.get("/in?zed")
    ahead(600)

    def slowly(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        assert environ["slates.user"].name == "zed"
        somebody.get("/in?zed")
        return application(environ, start_response)

    cookies = {"HTTP_COOKIE": f"slate={somebody.cookies['slate']}"}
    response = TestApp(SlateMiddleware(slowly, slates, lifetime=1000, secure=False), cookies).get("/")
    assert response.text == "zed 0"
    assert "Set-Cookie" not in response.headers
    assert somebody.get("/").text == "zed 0"


def test_who_comes_by_for_ever_signs_in_again_some_day(faulty: FaultyStore, ahead: Callable[[float], None]) -> None:
    somebody = browser(Slates(faulty), lifetime=1000, longest=1400)
    somebody.get(f"/in?user{next(_numbers)}")
    ahead(600)
    assert "Set-Cookie" in somebody.get("/").headers
    ahead(1399)
    faulty.calls.clear()
    assert somebody.get("/").text != "nobody"
    assert faulty.calls == ["get", "get"], "there is nothing to renew any more"
    ahead(1401)
    assert somebody.get("/").text == "nobody"


# Outages


@pytest.mark.parametrize("app", [application, lazily])
@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("forever", [False, True])
@pytest.mark.parametrize("path", ["/", "/count", "/in?ada", "/out", "/renewing"])
def test_an_outage_is_a_503_and_never_nobody(
    faulty: FaultyStore, path: str, forever: bool, executed: bool, app: Any, ahead: Callable[[float], None]
) -> None:
    """For every n: the n-th store call of a request fails, once or from then on, before or after it was executed."""
    for nth in itertools.count(1):
        user = f"user{next(_numbers)}"
        ahead(0)
        somebody = browser(Slates(faulty), app, lifetime=1000)
        somebody.get(f"/in?{user}")
        cookie = somebody.cookies["slate"]
        if path == "/renewing":
            ahead(600)
        faulty.fail(nth, for_good=forever, executed=executed)
        response = somebody.get(path, status="*")
        met = faulty.has_failed
        faulty.heal()
        if response.status_int == 503:
            assert met
            assert int(response.headers["Retry-After"]) > 0
            assert "Set-Cookie" not in response.headers
            assert somebody.cookies["slate"] == cookie
            if path not in ("/in?ada", "/out"):
                assert somebody.get("/").text.startswith(f"{user} ")
        else:
            expected = {"/count": f"{user} 1", "/in?ada": "ada 0", "/out": "nobody"}.get(path, f"{user} 0")
            assert (response.status_int, response.text) == (200, expected)
        if not met:
            break
    assert nth > 1


def test_a_conflict_that_nobody_catches_is_a_409(slates: Slates) -> None:
    text = browser(slates).get("/conflict", status=409).text
    assert "load the page again" in text
    assert "not all of it" in text


# In an INI file


def test_the_middleware_is_a_paste_filter(options: dict[str, Any]) -> None:
    settings = {f"beaker.session.{name}": value for name, value in options.items()}
    more = {"slates.cookie": "who", "slates.lifetime": "100", "slates.secure": "false", "slates.samesite": "Strict"}
    more |= {"slates.domain": "", "slates.path": "/", "slates.longest": "1000"}
    app = filter_app_factory(application, settings, **more)
    cookie = the_cookie(TestApp(app).get("/in?zed"))
    assert (cookie.key, cookie["max-age"], cookie["secure"], cookie["samesite"]) == ("who", "200", "", "Strict")
    assert Slates.from_settings(settings).auth.check(cookie.value) == "zed"


def test_the_filter_has_its_name(options: dict[str, Any], tmp_path: Path) -> None:
    ini = tmp_path / "development.ini"
    ini.write_text(
        "[filter:slates]\npaste.filter_app_factory = beaker_statestore.slatesession:filter_app_factory\n"
        f"beaker.session.url = {options['url']}\nbeaker.session.prefix = {options['prefix']}\n"
    )
    app = loadfilter(f"config:{ini}", name="slates")(application)
    assert the_cookie(TestApp(app).get("/in?zed"))["secure"]
    entries = Path(__file__).parents[1].joinpath("setup.cfg").read_text()
    assert "slates = beaker_statestore.slatesession:filter_app_factory" in entries


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"slates.cokie": "x"}, "did you mean slates.cookie"),
        ({"slates.xyz": "x"}, "known are cookie, lifetime"),
        ({"slates.lifetime": "a while"}, "slates.lifetime is 'a while'"),
        ({"slates.lifetime": "-1"}, "lifetime"),
        ({"slates.secure": "perhaps"}, "write true or false"),
        ({"beaker.session.url": ""}, "url is not set"),
    ],
)
def test_a_wrong_option_is_said_at_the_start(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        filter_app_factory(application, {"beaker.session.url": "memory:"}, **given)


# Over a real connection


def get(port: int, path: str, cookie: str | None = None) -> tuple[int, str, str | None]:
    """The status, the text, and the token in the cookie that was set, if one was."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={} if cookie is None else {"Cookie": f"slate={cookie}"})
        response = connection.getresponse()
        token = (response.getheader("Set-Cookie") or "").partition(";")[0].partition("=")[2]
        return response.status, response.read().decode(), token or None


def test_a_request_that_takes_longer_than_its_tokens_life_finishes_normally(
    slates: Slates, ahead: Callable[[float], None]
) -> None:
    """The token expires, and so does the document, while the request edits it; the next request is nobody's."""
    slates["zed"].put("task", {"kept": True}, lifetime=60)
    token = slates.auth.issue("zed", lifetime=60)

    def slowly(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        slate = environ["slates.user"]
        if slate is not None:
            with slate.edit("task") as document:
                ahead(61)
                assert slates.auth.check(token) is None
                assert "task" not in slate
                document["done"] = True
            slate.increment("user", "visits")
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps(None if slate is None else [slate.name, dict(slate["task"]), dict(slate.user)]).encode()]

    with served(SlateMiddleware(slowly, slates, lifetime=60, secure=False)) as port:
        status, text, cookie = get(port, "/", token)
        assert (status, json.loads(text), cookie) == (200, ["zed", {"kept": True, "done": True}, {"visits": 1}], None)
        assert get(port, "/", token) == (200, "null", None)
    assert slates["zed"]["task"] == {"kept": True, "done": True}


def test_signing_in_and_out_over_http(slates: Slates) -> None:
    with served(SlateMiddleware(application, slates, secure=False)) as port:
        _, text, token = get(port, "/in?zed")
        assert text == "zed 0"
        assert token is not None
        assert get(port, "/count", token) == (200, "zed 1", None)
        assert get(port, "/out", token) == (200, "nobody", None)
        assert get(port, "/", token) == (200, "nobody", None)
