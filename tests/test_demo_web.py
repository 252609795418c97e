"""The demo's pages: who may see and do what, and what a visitor gets when the store or the mail is away."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, TypeVar

import pytest
from webtest import TestApp

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.mailqueue import MailQueue
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.settings import read_ini
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore
from beaker_statestore.websession import make_filter
from wsgi_demo import app_factory, make_app
from wsgi_demo.letters import Letters
from wsgi_demo.newsletter import CONFIRMING, ERROR, MEMBER, NEWS, START, Confirmation, Newsletter
from wsgi_demo.outbox import Outbox, serve
from wsgi_demo.processes import free_ports
from wsgi_demo.relay import Relay
from wsgi_demo.settings import Endpoint, Settings

#: Beaker warns of the outages that these tests make, before the filter answers them.
pytestmark = pytest.mark.filterwarnings("ignore:Invalidating corrupt session")

T = TypeVar("T")

INI = Path(__file__).parent.parent / "ini"

ANN = "ann@example.com"
BOB = "bob@example.com"
#: Browsers of these tests run on the same machine; WebTest says nothing by itself.
HERE = {"REMOTE_ADDR": "127.0.0.1"}
NOBODYS_SECRET = "0" * 32


class World:
    """The web application, the outbox that it sends to, and the list as the mail application works with it."""

    def __init__(self, settings: dict[str, Any], outbox: Outbox) -> None:
        self.settings = settings
        self.outbox = outbox
        parsed = Settings.from_mapping(settings)
        states = RouterStateStorage.from_settings(settings)
        self.newsletter = Newsletter(parsed, states, Relay(parsed.relay, Letters(parsed).bounces_address))
        self.undeliverable = MailQueue.from_settings(settings, parsed.undeliverable)

    def browser(self, **changed: str) -> TestApp:
        return TestApp(make_app({**self.settings, **changed}), extra_environ=HERE)

    def signed_in(self, address: str = ANN) -> TestApp:
        browser = self.browser()
        ask_for_link(browser, address)
        form(browser.get(self.path_in_mail(address)), "Sign in").submit()
        return browser

    def asked(self, address: str = ANN) -> str:
        """Somebody wrote to the list: the path of the link in the confirmation that he got."""
        self.newsletter.move(address, START, CONFIRMING)
        self.newsletter.ask(address)
        return self.path_in_mail(address)

    def path_in_mail(self, address: str = ANN) -> str:
        link = re.search(r"http://127\.0\.0\.1:8080(\S+)", self.outbox.mails(address)[0].text)
        assert link
        return link[1]

    def subjects(self, address: str = ANN) -> list[str]:
        return [mail.subject for mail in self.outbox.mails(address)]


def form(response: Any, button: str) -> Any:
    """The form that has this button, found as a person finds it."""
    for candidate in response.forms.values():
        if re.search(rf"<button[^>]*>{button}<", candidate.text):
            return candidate
    raise AssertionError(f"no button {button!r} in {response.text}")


def ask_for_link(browser: TestApp, address: str) -> Any:
    page = form(browser.get("/"), "Mail me a link")
    page["address"] = address
    return page.submit()


@pytest.fixture(scope="module")
def relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Outbox]]:
    """A real mail server, and what it has got."""
    endpoint = Endpoint("127.0.0.1", free_ports()["outbox"])
    outbox = Outbox(str(tmp_path_factory.mktemp("mail") / "outbox"))
    controller = serve(outbox, endpoint)
    yield str(endpoint), outbox
    controller.stop()


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


@pytest.fixture
def world(store: FaultyStore, relay: tuple[str, Outbox]) -> World:
    endpoint, outbox = relay
    outbox.clear()
    settings = {
        "beaker.session.type": "ext:tcjson",
        "beaker.session.url": store,
        "beaker.session.data_serializer": "json",
        "beaker.session.key": "demo_session",
        "beaker.session.timeout": "600",
        "beaker.session.events": "events",
        "demo.relay": endpoint,
        "demo.outbox": outbox.path,
    }
    return World(settings, outbox)


# Signing in


def test_a_mailed_link_signs_in(world: World) -> None:
    assert f"signed in as <strong>{ANN}</strong>" in world.signed_in().get("/").text


def test_typing_an_address_proves_nothing(world: World) -> None:
    browser = world.browser()
    ask_for_link(browser, ANN)
    assert "signed in" not in browser.get("/").text


def test_the_answer_is_the_same_for_every_address(world: World) -> None:
    world.newsletter.move(ANN, START, MEMBER)
    browser = world.browser()
    member, stranger = (ask_for_link(browser, address) for address in (ANN, BOB))
    assert member.status == stranger.status
    assert member.location == stranger.location
    assert member.follow().text == stranger.follow().text


def test_the_answer_is_the_same_when_the_address_has_got_enough_mail(world: World) -> None:
    browser = world.browser()
    answers = {ask_for_link(browser, ANN).location for _ in range(9)}
    assert len(answers) == 1
    assert len(world.subjects()) == 6


def test_opening_the_link_does_not_use_it_up(world: World) -> None:
    """Mail scanners open links, with GET and with HEAD."""
    ask_for_link(world.browser(), ANN)
    path = world.path_in_mail()
    scanner = world.browser()
    scanner.get(path)
    scanner.head(path)
    assert "signed in" not in scanner.get("/").text
    browser = world.browser()
    assert form(browser.get(path), "Sign in").submit().status_int == 303


def test_a_link_signs_in_once(world: World) -> None:
    ask_for_link(world.browser(), ANN)
    path = world.path_in_mail()
    first, second = world.browser(), world.browser()
    pages = [browser.get(path) for browser in (first, second)]
    assert form(pages[0], "Sign in").submit().status_int == 303
    assert form(pages[1], "Sign in").submit(status=410)
    assert "signed in" not in second.get("/").text
    assert first.get(path, status=410)


def test_of_two_who_use_a_link_at_once_one_gets_in(world: World) -> None:
    ask_for_link(world.browser(), ANN)
    secret = world.path_in_mail().rpartition("/")[2]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda token: world.newsletter.sign_in(secret, token), "abcdefgh"))
        again = list(pool.map(lambda token: world.newsletter.sign_in(secret, token), "abcdefgh"))
    assert sorted(got, key=str) == [*[None] * 7, ANN]
    assert again == got, "whoever got in may repeat it, and nobody else may"


def test_signing_in_changes_the_session_id(world: World) -> None:
    """A session id that somebody planted in the browser must not become the id of a signed-in session."""
    browser = world.browser()
    ask_for_link(browser, ANN)
    page = browser.get(world.path_in_mail())
    planted = browser.cookies["demo_session"]
    form(page, "Sign in").submit()
    assert browser.cookies["demo_session"] != planted
    thief = world.browser()
    thief.set_cookie("demo_session", planted)
    thief.set_cookie("demo_slate", browser.cookies["demo_slate"])
    assert "signed in" not in thief.get("/").text


def test_who_signs_in_as_another_is_no_longer_the_first(world: World, store: FaultyStore) -> None:
    browser = world.signed_in(ANN)
    old = browser.cookies["demo_session"]
    ask_for_link(world.browser(), BOB)
    form(browser.get(world.path_in_mail(BOB)), "Sign in").submit()
    assert BOB in browser.get("/").text
    assert store.get(f"session:{old}".encode()) is None


def test_signing_out_ends_the_session_for_every_copy_of_the_cookie(world: World) -> None:
    browser = world.signed_in()
    copy = world.browser()
    for name, value in browser.cookies.items():
        copy.set_cookie(name, value)
    assert ANN in copy.get("/").text
    assert "signed out" in form(browser.get("/"), "Sign out").submit().follow().text
    assert "signed in" not in browser.get("/").text
    assert "signed in" not in copy.get("/").text


@pytest.mark.parametrize("typed", ["", "ann", "ann@", "@example.com", "a b@example.com", "a@b@c", "x\r\nBcc: b@c.d"])
def test_what_is_no_address_is_named_at_the_field(world: World, typed: str) -> None:
    page = form(world.browser().get("/"), "Mail me a link")
    page["address"] = typed
    answer = page.submit(status=400)
    assert 'aria-invalid="true" aria-describedby="problem"' in answer.text
    assert world.outbox.mails() == []


def test_addresses_are_compared_as_the_mail_router_does_it(world: World) -> None:
    """Salmon takes addresses in lower case."""
    browser = world.browser()
    ask_for_link(browser, "Ann@Example.COM")
    assert world.subjects(ANN) == ["Your link to sign in"]


# Confirming


def test_a_click_confirms_and_mail_sees_it_at_once(world: World) -> None:
    browser = world.browser()
    page = browser.get(world.asked())
    assert world.newsletter.state(ANN) == CONFIRMING
    answer = form(page, "Yes, join").submit().follow()
    assert f"{ANN} is now a member of news@localhost." in answer.text
    assert world.newsletter.state(ANN) == MEMBER


def test_a_notice_is_given_once(world: World) -> None:
    browser = world.browser()
    form(browser.get(world.asked()), "Yes, join").submit().follow()
    assert "is now a member" not in browser.get("/").text


def test_a_link_that_was_used_says_so(world: World) -> None:
    browser = world.browser()
    path = world.asked()
    form(browser.get(path), "Yes, join").submit()
    assert "no longer good" in browser.get(path, status=410).text


def test_who_presses_again_after_joining_is_told_that_he_is_in(world: World) -> None:
    browser = world.browser()
    page = browser.get(world.asked())
    form(page, "Yes, join").submit()
    assert "already was a member" in form(page, "Yes, join").submit().follow().text


def test_an_old_confirmation_brings_nobody_back_who_has_left(world: World) -> None:
    browser = world.browser()
    page = browser.get(world.asked())
    form(page, "Yes, join").submit()
    world.newsletter.leave(ANN)
    form(page, "Yes, join").submit(status=410)
    assert world.newsletter.state(ANN) == START


def test_an_unused_confirmation_does_nothing_after_the_request_was_forgotten(world: World) -> None:
    browser = world.browser()
    page = browser.get(world.asked())
    world.newsletter.leave(ANN)
    form(page, "Yes, join").submit(status=410)
    assert world.newsletter.state(ANN) == START


@pytest.mark.parametrize("kind", ["confirm", "sign-in"])
def test_unknown_secrets_get_a_helpful_page(world: World, kind: str) -> None:
    answer = world.browser().get(f"/{kind}/{NOBODYS_SECRET}", status=410)
    assert "ask for another link" in answer.text


def test_a_secret_is_good_for_one_purpose_only(world: World) -> None:
    browser = world.browser()
    assert browser.get(world.asked().replace("confirm", "sign-in"), status=410)


def test_of_many_confirmations_at_once_exactly_one_makes_a_member(options: dict[str, Any], relay: Any) -> None:
    """In one process and over a server, where mail and web are two processes."""
    given = {f"beaker.session.{name}": value for name, value in options.items()}
    world = World({**given, "demo.relay": relay[0], "demo.outbox": relay[1].path}, relay[1])
    relay[1].clear()
    for round_ in range(5):
        address = f"ann{round_}@example.com"
        secret = world.asked(address).rpartition("/")[2]
        with ThreadPoolExecutor(8) as pool:
            outcomes = [outcome for outcome, _ in pool.map(world.newsletter.confirm, [secret] * 8)]
        assert outcomes.count(Confirmation.DONE) == 1
        assert outcomes.count(Confirmation.ALREADY) == 7


# States


@pytest.mark.parametrize("state", [START, CONFIRMING, MEMBER, ERROR])
def test_the_page_shows_the_state_that_the_mail_router_keeps(world: World, state: str) -> None:
    browser = world.signed_in()
    world.newsletter.states.set(NEWS, ANN, state)
    shown = re.findall(r'(?:aria-current="step"|class="state")>(\w+)<', browser.get("/").text)
    assert shown == [state]


def test_the_page_shows_the_states_of_every_handler(world: World) -> None:
    browser = world.signed_in()
    world.newsletter.states.set("_<other>", ANN, ERROR)
    page = browser.get("/")
    assert "_&lt;other&gt;" in page.text
    form(page, "Start again").submit()
    assert world.newsletter.states.get("_<other>", ANN) == START


def test_a_member_leaves(world: World) -> None:
    browser = world.signed_in()
    world.newsletter.move(ANN, START, MEMBER)
    assert "You have left the list" in form(browser.get("/"), "Leave the list").submit().follow().text
    assert world.newsletter.state(ANN) == START


class InterruptedStore(FaultyStore):
    """Has something else happen just before its ``n``-th call, as if another process did it."""

    def interrupt(self, n: int, act: Callable[[], object]) -> None:
        self.calls, self._act, self._at = [], act, n

    def _call(self, name: str, function: Callable[..., T], *arguments: Any, writes: bool = True) -> T:
        if len(self.calls) + 1 == getattr(self, "_at", None):
            self._at = 0
            self._act()
        return super()._call(name, function, *arguments, writes=writes)


def test_who_leaves_has_left_whenever_a_click_confirms() -> None:
    store = InterruptedStore(MemoryStore())
    settings = {"beaker.session.url": store}
    newsletter = Newsletter(
        Settings.from_mapping(settings), RouterStateStorage.from_settings(settings), Relay(Endpoint("127.0.0.1", 9), "")
    )
    clicked: list[bool] = []
    for n in itertools.count(1):
        clicked.clear()
        newsletter.states.set(NEWS, ANN, CONFIRMING)
        store.interrupt(n, lambda: clicked.append(newsletter.move(ANN, CONFIRMING, MEMBER)))
        assert newsletter.leave(ANN)
        assert newsletter.state(ANN) == START
        if clicked != [True]:
            break
    assert n > 2


def test_a_request_to_join_can_be_forgotten(world: World) -> None:
    browser = world.signed_in()
    world.newsletter.move(ANN, START, CONFIRMING)
    form(browser.get("/"), "Never mind, forget it").submit()
    assert world.newsletter.state(ANN) == START


def test_an_error_is_reset(world: World) -> None:
    browser = world.signed_in()
    world.newsletter.states.set(NEWS, ANN, ERROR)
    assert "you can start again" in form(browser.get("/"), "Start again").submit().follow().text
    assert world.newsletter.state(ANN) == START


def test_a_reset_that_comes_late_leaves_a_member_a_member(world: World) -> None:
    browser = world.signed_in()
    world.newsletter.states.set(NEWS, ANN, ERROR)
    page = browser.get("/")
    world.newsletter.states.set(NEWS, ANN, MEMBER)
    assert "no error any more" in form(page, "Start again").submit().follow().text
    assert world.newsletter.state(ANN) == MEMBER


def test_each_sees_and_changes_only_his_own(world: World) -> None:
    world.newsletter.move(BOB, START, MEMBER)
    browser = world.signed_in(ANN)
    token = form(browser.get("/"), "Sign out")["csrf_token"].value
    browser.post("/leave", {"csrf_token": token, "address": BOB})
    assert world.newsletter.state(BOB) == MEMBER
    assert BOB not in browser.get("/").text


@pytest.mark.parametrize("path", ["/leave", "/reset"])
def test_who_has_not_signed_in_changes_nothing(world: World, path: str) -> None:
    browser = world.browser()
    token = form(browser.get("/"), "Mail me a link")["csrf_token"].value
    assert browser.post(path, {"csrf_token": token, "key": NEWS}, status=403)


# Forgery, headers, cookies

POSTS = ["/sign-in", f"/sign-in/{NOBODYS_SECRET}", f"/confirm/{NOBODYS_SECRET}", "/leave", "/reset", "/sign-out"]
POSTS += [f"/undeliverable/0-0/{act}" for act in ("deliver", "delete")]


@pytest.mark.parametrize("path", [*POSTS, "/outbox"])
@pytest.mark.parametrize("token", [None, "", "wrong", "fälsch", "another's"])
def test_every_form_needs_the_token_of_its_session(world: World, path: str, token: str | None) -> None:
    if token == "another's":
        token = form(world.browser().get("/"), "Mail me a link")["csrf_token"].value
    browser = world.signed_in()
    world.newsletter.move(ANN, START, MEMBER)
    assert "csrf_token" in browser.get("/").text
    fields = {} if token is None else {"csrf_token": token}
    browser.post(path, {**fields, "address": BOB, "key": NEWS}, status=403)
    assert world.newsletter.state(ANN) == MEMBER
    assert ANN in browser.get("/").text
    assert world.outbox.mails(BOB) == []


def test_the_token_changes_with_the_session(world: World) -> None:
    browser = world.browser()
    before = form(browser.get("/"), "Mail me a link")["csrf_token"].value
    ask_for_link(browser, ANN)
    form(browser.get(world.path_in_mail()), "Sign in").submit()
    assert form(browser.get("/"), "Sign out")["csrf_token"].value != before


def test_every_answer_has_the_headers_that_keep_browsers_careful(world: World, store: FaultyStore) -> None:
    browser = world.browser()
    answers = [
        browser.get("/"),
        browser.get("/static/style.css"),
        browser.get("/static/live.js"),
        browser.get("/nowhere", status=404),
        browser.get("/leave", status=405),
        browser.post("/leave", status=403),
        ask_for_link(browser, ANN),
        browser.get(world.path_in_mail()),
    ]
    store.fail(1, for_good=True)
    answers.append(browser.get("/", status=503))
    for answer in answers:
        policy = answer.headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "; script-src 'self'; connect-src 'self'; " in policy
        assert "unsafe" not in policy
        assert answer.headers["Referrer-Policy"] == "no-referrer"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cache-Control"] in ("no-store", "no-cache")


def test_pages_are_kept_by_nobody(world: World) -> None:
    browser = world.signed_in()
    for path in ("/", "/check-your-mail", world.asked(), "/nowhere"):
        assert browser.get(path, status="*").headers["Cache-Control"] == "no-store"


def test_the_stylesheet_is_not_sent_twice(world: World) -> None:
    browser = world.browser()
    first = browser.get("/static/style.css")
    assert first.content_type == "text/css"
    again = browser.get("/static/style.css", headers={"If-None-Match": first.headers["ETag"]}, status=304)
    assert again.body == b""


@pytest.mark.parametrize(
    ("base_url", "path", "secure"),
    [("http://127.0.0.1:8080", "/", False), ("https://lists.example.com/news", "/news", True)],
)
def test_the_cookie_goes_nowhere_else(world: World, base_url: str, path: str, secure: bool) -> None:
    cookie = world.browser(**{"demo.base_url": base_url}).get("/").headers["Set-Cookie"]
    attributes = {part.strip().lower() for part in cookie.split(";")[1:]}
    assert {"httponly", "samesite=lax", f"path={path}"} <= attributes
    assert ("secure" in attributes) is secure


def test_redirects_stay_where_the_browser_is(world: World) -> None:
    """Behind a proxy, the application sees neither the scheme nor the host that the browser sees."""
    assert ask_for_link(world.browser(), ANN).headers["Location"] == "/check-your-mail"


def test_a_page_without_a_form_makes_no_session(world: World, store: FaultyStore) -> None:
    answer = world.browser().get("/check-your-mail")
    assert "Set-Cookie" not in answer.headers
    assert list(store.keys()) == []


def test_nothing_of_a_secret_is_in_the_store_or_the_log(
    world: World, store: FaultyStore, caplog: pytest.LogCaptureFixture
) -> None:
    browser = world.browser()
    ask_for_link(browser, ANN)
    path = world.path_in_mail()
    secret = path.rpartition("/")[2].encode()
    page = browser.get(path)
    stored = b"".join(key + (store.get(key) or b"") for key in store.keys())  # noqa: SIM118 - a Store is no dict
    assert secret not in stored
    form(page, "Sign in").submit()
    assert secret.decode() not in caplog.text


# Mounted below a path


def mounted(app: Any, at: str) -> Any:
    """What a server or PasteDeploy's composite does."""

    def outer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        assert environ["PATH_INFO"].startswith(at), f"a link leads out of {at}: {environ['PATH_INFO']}"
        environ["SCRIPT_NAME"] = at
        environ["PATH_INFO"] = environ["PATH_INFO"][len(at) :]
        return app(environ, start_response)

    return outer


def test_below_a_path_every_link_stays_below_it(world: World) -> None:
    settings = {**world.settings, "demo.base_url": "http://127.0.0.1:8080/lists/%C3%BCber", "demo.development": "true"}
    browser = TestApp(mounted(make_app(settings), "/lists/über".encode().decode("latin-1")), extra_environ=HERE)
    page = form(browser.get("/lists/%C3%BCber/"), "Mail me a link")
    page["address"] = ANN
    seen = [page.submit().follow()]
    path = re.search(r"http://127\.0\.0\.1:8080(\S+)", world.outbox.mails(ANN)[0].text)
    assert path
    assert path[1].startswith("/lists/")
    seen.append(browser.get("/lists/%C3%BCber/sign-in/" + path[1].rpartition("/")[2]))
    seen.append(form(seen[-1], "Sign in").submit().follow())
    assert ANN in seen[-1].text
    seen += [browser.get("/lists/%C3%BCber/outbox"), browser.get("/lists/%C3%BCber/nowhere", status=404)]
    for answer in seen:
        targets = re.findall(r'(?:href|action)="(/[^"]*)"', answer.text)
        assert targets
        assert [target for target in targets if not target.startswith("/lists/%C3%BCber/")] == []
    seen.append(form(browser.get("/lists/%C3%BCber/"), "Sign out").submit().follow())
    assert "signed out" in seen[-1].text


# Errors


def test_errors_have_pages_of_their_own(world: World) -> None:
    browser = world.browser()
    assert "no such page" in browser.get("/nowhere", status=404).text
    assert browser.get("/leave", status=405).headers["Allow"] == "POST"
    assert browser.post("/", status=405).headers["Allow"] == "HEAD, GET"
    assert "larger" in browser.post("/leave", {"text": "x" * 200_000}, status=413).text
    assert "cannot read" in browser.get("/caf%E9", status=400).text
    assert "keeps no cookies" in browser.post("/leave", status=403).text


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"--x"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=csrf_token\r\n\r\n\xff"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=a; filename=b\r\n\r\n"),
        ("application/json", b"{"),
        ("application/x-www-form-urlencoded; charset=nonsense", b"csrf_token=%E9"),
        ("application/x-www-form-urlencoded", b"csrf_token=%E9&&&=;\xff\x00"),
        ("application/x-www-form-urlencoded", b"a=1&" * 1000),
    ],
)
def test_what_no_browser_sends_is_refused_politely(world: World, content_type: str, body: bytes) -> None:
    browser = world.browser()
    browser.get("/")
    answer = browser.post("/sign-in", body, headers={"Content-Type": content_type}, status="*")
    assert answer.status_int in (400, 403)
    assert "<h1>" in answer.text


def test_a_fault_of_ours_is_a_page_too(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Newsletter, "states_of", lambda *_: 1 / 0)
    assert "not your fault" in world.signed_in().get("/", status=500).text


def test_head_is_get_without_the_page(world: World) -> None:
    answer = world.browser().head("/")
    assert answer.status_int == 200
    assert answer.body == b""


def test_mail_that_cannot_be_sent_is_a_503_and_costs_nothing(world: World) -> None:
    nobody = f"127.0.0.1:{free_ports()['outbox']}"
    browser = world.browser(**{"demo.relay": nobody})
    for _ in range(9):
        page = form(browser.get("/"), "Mail me a link")
        page["address"] = ANN
        assert page.submit(status=503).headers["Retry-After"] == "5"
    ask_for_link(world.browser(), ANN)
    assert world.subjects() == ["Your link to sign in"]


Act = Callable[[World, TestApp], Any]

ACTS: dict[str, tuple[str, str, str]] = {
    # button: (state before, state after, what the page says in the end, if tried again after a 503)
    "Yes, join": (CONFIRMING, MEMBER, "a member of"),
    "Leave the list": (MEMBER, START, "the list"),
    "Start again": (ERROR, START, "error"),
}


@pytest.mark.parametrize("button", ACTS)
@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
def test_whatever_store_call_fails_the_answer_is_right_or_a_503(
    world: World, store: FaultyStore, button: str, executed: bool, for_good: bool
) -> None:
    before, after, says = ACTS[button]
    browser = world.signed_in()
    cookie = browser.cookies["demo_session"]
    for n in itertools.count(1):
        store.heal()
        address = f"ann{n}@example.com" if button == "Yes, join" else ANN
        path = world.asked(address) if button == "Yes, join" else "/"
        world.newsletter.states.set(NEWS, address, before)
        page = form(browser.get(path), button)
        store.fail(n, executed=executed, for_good=for_good)
        answer = page.submit(status="*")
        failed = store.has_failed
        store.heal()
        assert browser.cookies["demo_session"] == cookie
        assert answer.status_int in (303, 503)
        if answer.status_int == 503:
            assert "Nothing is lost" in answer.text
            assert answer.headers["Retry-After"] == "5"
            assert "Set-Cookie" not in answer.headers
            answer = page.submit()
        assert says in answer.follow().text
        assert f"signed in as <strong>{ANN}</strong>" in browser.get("/").text
        assert world.newsletter.state(address) == after
        if not failed:
            break
    assert n > 3


@pytest.mark.parametrize("again", ["press", "open"])
@pytest.mark.parametrize("executed", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("for_good", [False, True], ids=["once", "for-good"])
def test_whatever_store_call_fails_signing_in_can_be_repeated(
    world: World, store: FaultyStore, again: str, executed: bool, for_good: bool
) -> None:
    for n in itertools.count(1):
        address = f"ann{n}@example.com"
        browser = world.browser()
        ask_for_link(browser, address)
        path = world.path_in_mail(address)
        page = browser.get(path)
        old = browser.cookies["demo_session"]
        store.fail(n, executed=executed, for_good=for_good)
        answer = form(page, "Sign in").submit(status="*")
        failed = store.has_failed
        store.heal()
        assert answer.status_int in (303, 503)
        if answer.status_int == 503 and browser.cookies["demo_session"] == old:
            page = page if again == "press" else browser.get(path)
            answer = form(page, "Sign in").submit(status=303)
        # Otherwise the session is stored under its new id, and only the end of the old one was in doubt.
        assert store.get(f"session:{old}".encode()) is None
        assert f"signed in as <strong>{address}</strong>" in browser.get("/").text
        for one in (browser, world.browser()):
            assert one.get(path, status=410)
        if not failed:
            break
    assert n > 4


def test_a_link_that_one_browser_is_about_to_use_is_no_longer_good_for_another(
    world: World, store: FaultyStore
) -> None:
    ask_for_link(world.browser(), ANN)
    path = world.path_in_mail()
    first, second = world.browser(), world.browser()
    pages = [browser.get(path) for browser in (first, second)]
    store.fail(4)  # the session, the link, its new owner; what fails is the new login
    form(pages[0], "Sign in").submit(status=503)
    assert store.calls[2:3] == ["compare_and_swap"]
    store.heal()
    assert form(pages[1], "Sign in").submit(status=410)
    assert second.get(path, status=410)
    assert ANN in form(pages[0], "Sign in").submit(status=303).follow().text


# The outbox, in development only


@pytest.fixture
def developer(world: World) -> TestApp:
    world.settings["demo.development"] = "true"
    return world.browser()


def test_the_outbox_shows_mails_with_links_to_click(world: World, developer: TestApp) -> None:
    path = world.asked()
    page = developer.get("/outbox")
    assert f'<a href="http://127.0.0.1:8080{path}">' in page.text
    mail = page.click("Reply", index=0)
    assert form(mail, "Send")["sender"].value == ANN
    assert re.fullmatch(r"news-confirm-[0-9a-f]{32}@localhost", form(mail, "Send")["recipient"].value)


def test_what_is_in_mails_is_shown_and_not_obeyed(world: World, developer: TestApp) -> None:
    nasty = '<script>alert(1)</script>"\'><img src=x> http://127.0.0.1:8080/"onmouseover=alert(1)'
    letters = world.newsletter.letters
    world.newsletter._relay.deliver(letters.post(ANN, nasty, nasty), [ANN])
    for page in (developer.get("/outbox"), developer.get("/outbox").click("Reply", index=0)):
        assert "<script>" not in page.text
        assert "<img" not in page.text
        assert not re.search(r"<[^>]*\sonmouseover=", page.text)
        assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page.text


def test_only_our_own_links_can_be_clicked(world: World, developer: TestApp) -> None:
    letters = world.newsletter.letters
    world.newsletter._relay.deliver(letters.post(ANN, "Links", "http://evil.example/ javascript:alert(1)"), [ANN])
    assert 'href="http://evil' not in developer.get("/outbox").text
    assert 'href="javascript' not in developer.get("/outbox").text


@pytest.mark.parametrize(
    ("development", "environ"),
    [
        ("false", HERE),
        ("true", {"REMOTE_ADDR": "192.0.2.1"}),
        ("true", {**HERE, "HTTP_X_FORWARDED_FOR": "192.0.2.1"}),
        ("true", {**HERE, "HTTP_FORWARDED": "for=192.0.2.1"}),
        ("true", {**HERE, "HTTP_HOST": "rebound.example:8080"}),
    ],
    ids=["production", "elsewhere", "proxied", "forwarded", "rebound name"],
)
def test_nobody_else_sees_the_outbox(world: World, development: str, environ: dict[str, str]) -> None:
    world.asked()
    browser = TestApp(make_app({**world.settings, "demo.development": development}), extra_environ=environ)
    key = world.outbox.mails()[0].key
    front = browser.get("/")
    assert "utbox" not in front.text
    token = form(front, "Mail me a link")["csrf_token"].value
    assert browser.get("/outbox", status=404)
    assert browser.get(f"/outbox/{key}", status=404)
    assert browser.post("/outbox", {"csrf_token": token}, status=404)
    mail = f"/undeliverable/{world.undeliverable.push(NASTY)}"
    assert "ndeliverable" not in front.text
    assert browser.get("/undeliverable", status=404)
    assert browser.get(mail, status=404)
    for act in ("deliver", "delete"):
        assert browser.post(f"{mail}/{act}", {"csrf_token": token}, status=404)
    assert len(world.undeliverable) == 1


# Undeliverable mails, in development only

NASTY = b"From: ann@example.com\r\nTo: news@localhost\r\nSubject: crash <script>\r\n\r\n</pre><img src=x> Hello\r\n"


def test_undeliverable_mails_are_shown_and_not_obeyed(world: World, developer: TestApp) -> None:
    world.undeliverable.push(b"Subject: the older\r\n\r\n")
    world.undeliverable.push(NASTY)
    page = developer.get("/undeliverable")
    assert page.text.index("crash &lt;script&gt;") < page.text.index("the older")
    mail = page.click("crash")
    assert "&lt;/pre&gt;&lt;img src=x&gt; Hello" in mail.text
    for answer in (page, mail):
        assert "<img" not in answer.text
        assert "crash <script" not in answer.text


def test_what_is_delivered_again_is_gone_when_it_was_taken(world: World, developer: TestApp) -> None:
    world.undeliverable.push(NASTY)
    answer = form(developer.get("/undeliverable"), "Deliver again").submit(status=502)
    assert "stays here" in answer.text
    assert len(world.undeliverable) == 1
    world.settings["demo.smtp"] = world.settings["demo.relay"]
    answer = form(world.browser().get("/undeliverable"), "Deliver again").submit()
    assert "once more" in answer.follow().text
    [mail] = world.outbox.mails("news@localhost")
    assert mail.message["Subject"] == "crash <script>"
    assert len(world.undeliverable) == 0


def test_what_is_deleted_is_gone(world: World, developer: TestApp) -> None:
    key = world.undeliverable.push(NASTY)
    page = developer.get("/undeliverable")
    assert "is deleted" in form(page, "Delete").submit().follow().text
    assert world.outbox.mails() == []
    assert len(world.undeliverable) == 0
    for answer in (form(page, "Deliver again").submit(status=404), developer.get(f"/undeliverable/{key}", status=404)):
        assert "no such page" in answer.text


@pytest.mark.parametrize("key", ["nothing", "..%2F..%2Fetc%2Fpasswd", "..", "%00"])
def test_the_outbox_has_no_other_files(developer: TestApp, key: str) -> None:
    assert developer.get(f"/outbox/{key}", status=404)


def test_a_mail_that_nobody_takes_is_kept_in_the_form(developer: TestApp) -> None:
    page = form(developer.get("/outbox"), "Send")
    page["text"] = "Something long that I would hate to lose"
    answer = page.submit(status=502)
    assert "no mail server at 127.0.0.1:8823" in answer.text
    assert form(answer, "Send")["text"].value == "Something long that I would hate to lose"


@pytest.mark.parametrize("field", ["sender", "recipient"])
def test_a_mail_needs_addresses(developer: TestApp, field: str) -> None:
    page = form(developer.get("/outbox"), "Send")
    page[field] = "x\r\nBcc: y@z.example"
    assert "needs one address" in page.submit(status=400).text


def test_the_outbox_throws_the_oldest_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wsgi_demo.outbox.MOST_MAILS", 3)
    outbox = Outbox(str(tmp_path / "outbox"))
    for number in range(5):
        outbox.keep(ANN, f"Subject: {number}\r\n\r\n".encode())
    assert [mail.subject for mail in outbox.mails()] == ["4", "3", "2"]


# Settings


@pytest.mark.parametrize(
    ("option", "value", "hint"),
    [
        ("demo.base_url", "localhost:8080", "http://127.0.0.1:8080"),
        ("demo.base_url", "http://h/?q", "http://127.0.0.1:8080"),
        ("demo.base_url", "http://127.0.0.1/über", "%C3%BC"),
        ("demo.smtp", "8823", "HOST:PORT"),
        ("demo.smtp", "127.0.0.1:99999", "HOST:PORT"),
        ("demo.development", "yes", "true or false"),
        ("demo.developement", "true", "did you mean demo.development"),
        ("demo.base_url", "http://lists.example.com", "demo.development = true shows everybody's mail"),
    ],
)
def test_a_wrong_setting_is_named_with_its_remedy(world: World, option: str, value: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(hint)) as error:
        make_app({**world.settings, "demo.development": "true", option: value})
    assert option in str(error.value)


def test_paste_makes_the_application_from_the_ini_file() -> None:
    from paste.deploy import loadapp

    ini = INI / "development.ini"
    app = loadapp(f"config:{ini}")
    assert TestApp(app).get("/static/style.css").status_int == 200
    assert TestApp(app_factory({}, **read_ini(ini))).get("/static/style.css").status_int == 200


@pytest.mark.parametrize("name", ["development.ini", "production.ini"])
def test_the_ini_files_say_everything_and_nothing_that_depends_on_where_they_are_read(name: str) -> None:
    given = read_ini(INI / name)
    settings = Settings.from_mapping(given)
    said = {option for option in given if option.startswith("demo.")}
    assert {f"demo.{option}" for option in ("base_url", "host", "smtp", "relay", "outbox", "undeliverable")} <= said
    assert Path(settings.outbox).is_absolute()
    make_filter(lambda *_: [], given)


def test_in_production_mails_lead_to_the_public_address_and_go_to_a_mail_server() -> None:
    settings = Settings.from_mapping(read_ini(INI / "production.ini"))
    assert settings.base_url == "https://lists.example.com"
    assert settings.host == "lists.example.com"
    assert settings.relay.port == 25
    assert settings.secure
    assert not settings.development


# Every page, for everybody


class _Outline(HTMLParser):
    """What a screen reader needs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in tags]


def assert_readable(page: Any) -> None:
    """Fail unless the page has what a screen reader needs, and nothing that the Content-Security-Policy forbids."""
    outline = _Outline(page.text)
    assert outline.all("html")[0]["lang"] == "en"
    assert len(outline.all("h1")) == len(outline.all("main")) == len(outline.all("title")) == 1
    assert outline.all("a")[0]["href"] == "#main"
    assert outline.all("iframe", "style") == []
    assert all(a["src"] == "/static/live.js" for a in outline.all("script"))
    assert page.text.count("></script>") == len(outline.all("script"))
    assert not [a for _, a in outline.found if "style" in a or any(name.startswith("on") for name in a)]
    levels = [int(tag[1]) for tag, _ in outline.found if re.fullmatch("h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
    ids = [a["id"] for _, a in outline.found if "id" in a]
    assert len(ids) == len(set(ids))
    labelled = {label["for"] for label in outline.all("label")}
    inputs = [a for a in outline.all("input", "textarea") if a.get("type") != "hidden"]
    assert {field["id"] for field in inputs} <= labelled
    for attribute in ("aria-labelledby", "aria-describedby"):
        assert {id_ for _, a in outline.found for id_ in (a.get(attribute) or "").split()} <= set(ids)


def test_every_page_can_be_read_without_eyes_and_without_scripts(world: World, developer: TestApp) -> None:
    confirm = world.asked()
    ask_for_link(developer, ANN)
    sign_in = world.path_in_mail()
    pages: list[Any] = [
        developer.get(path) for path in ("/", "/check-your-mail", "/outbox", confirm, sign_in, "/signed-out")
    ]
    pages += [developer.get("/outbox").click("Reply", index=0), developer.get("/nowhere", status=404)]
    pages.append(form(pages[4], "Sign in").submit().follow())
    pages.append(form(developer.get("/outbox"), "Send").submit(status=502))
    world.undeliverable.push(NASTY)
    pages += [developer.get("/undeliverable"), developer.get("/undeliverable").click("crash", index=0)]
    for page in pages:
        assert_readable(page)
