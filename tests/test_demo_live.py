"""The demo's event stream: who is told what, how it goes on after a break, and that it leaves no thread behind."""

from __future__ import annotations

import configparser
import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from http.cookiejar import CookieJar
from typing import Any
from urllib.parse import urlencode

import pytest
import waitress
from webtest import TestApp

from beaker_statestore.fanout import Queue
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.sessions import Sessions
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore
from wsgi_demo import live, make_app
from wsgi_demo.live import Live, Stream, TooManyStreamsError
from wsgi_demo.newsletter import CONFIRMING, MEMBER, NEWS
from wsgi_demo.processes import INI

#: How long anything here may take, in seconds.
PATIENCE = 20.0
ANN = "ann@example.com"
BOB = "bob@example.com"
Event = Mapping[str, Any]


def until(condition: Callable[[], Any]) -> Any:
    """What ``condition`` answers as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.01)
    raise AssertionError("it did not happen in time")


def parsed(chunks: Iterator[bytes]) -> Iterator[tuple[int, Event]]:
    """The events in a stream, as a browser sees them: number and data."""
    for text in itertools.chain.from_iterable(chunk.decode().split("\n\n") for chunk in chunks):
        fields = dict(line.split(": ", 1) for line in text.splitlines() if not line.startswith(":"))
        if "data" in fields:
            yield int(fields["id"]), json.loads(fields["data"])


@pytest.fixture
def store() -> FaultyStore:
    return FaultyStore(MemoryStore())


@pytest.fixture
def queue(store: FaultyStore) -> Queue:
    return Queue(store, "events")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here waits for a time to pass, but for the end of a stream, or of the thread."""
    monkeypatch.setattr(live, "HEARTBEAT", 0.05)
    monkeypatch.setattr(live, "PATIENCE", 0.2)


def everything(event: Event) -> Event:
    return event


def followers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "events"}


# Streams


def test_what_is_published_comes_in_order_to_all_streams(queue: Queue) -> None:
    before = followers()
    told = Live(queue)
    streams = [told.stream(None, everything) for _ in range(3)]
    for number in range(5):
        queue.push({"n": number})
    for stream in streams:
        assert [event["n"] for _, event in itertools.islice(parsed(iter(stream)), 5)] == list(range(5))
    assert len(followers() - before) == 1
    for stream in streams:
        stream.close()
    until(lambda: not followers() - before)


def test_who_comes_again_gets_what_he_has_missed_and_nothing_twice(queue: Queue) -> None:
    told = Live(queue)
    first = told.stream(told.latest(), everything)
    queue.push({"n": 0})
    number, event = next(parsed(iter(first)))
    first.close()
    queue.push({"n": 1})
    keeps_the_thread = told.stream(None, everything)
    queue.push({"n": 2})
    second = told.stream(number, everything)
    queue.push({"n": 3})
    seen = list(itertools.islice(parsed(iter(second)), 3))
    assert [event["n"] for _, event in [(number, event), *seen]] == [0, 1, 2, 3]
    assert [number for number, _ in seen] == [number + 1, number + 2, number + 3]
    for stream in (second, keeps_the_thread):
        stream.close()


def test_the_page_says_what_it_knows(queue: Queue) -> None:
    """Between the page and its stream something may happen."""
    told = Live(queue)
    queue.push({"n": "long ago"})
    latest = told.latest()
    queue.push({"n": "just now"})
    stream = told.stream(latest, everything)
    assert next(parsed(iter(stream)))[1] == {"n": "just now"}
    stream.close()


def test_a_page_may_know_more_than_is_handed_out(queue: Queue) -> None:
    """It has read the number of the latest event by itself, and the thread that follows may be a little behind."""
    for number in range(3):
        queue.push({"n": number})
    stream = Stream(Live(queue), 2, 0, everything)
    follower = queue.follow("beginning")
    while message := follower.receive(0):
        stream.hand(message)
    assert next(parsed(iter(stream))) == (3, {"n": 2})


@pytest.mark.parametrize("after", [1, 10**17], ids=["long ago", "never"])
def test_who_has_missed_too_much_is_told_to_look(queue: Queue, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    monkeypatch.setattr(live, "MOST_MISSED", 3)
    for number in range(9):
        queue.push({"n": number})
    stream = Live(queue).stream(after, everything)
    events = parsed(iter(stream))
    assert next(events) == (9, {"event": "missed"})
    queue.push({"n": "new"})
    assert next(events)[1] == {"n": "new"}
    stream.close()


def test_what_was_trimmed_meanwhile_was_missed(queue: Queue) -> None:
    for number in range(9):
        queue.push({"n": number})
    queue.trim(before=8)
    stream = Live(queue).stream(2, everything)
    assert [event for _, event in itertools.islice(parsed(iter(stream)), 3)] == [
        {"n": 7},
        {"n": 8},
        {"event": "missed"},
    ]
    stream.close()


def test_a_stream_ends_and_says_where_to_go_on(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LIFE", 0.3)
    queue.push({"n": 1})
    stream = Live(queue).stream(0, lambda _: None)
    chunks = list(stream)
    assert chunks[0] == b"retry: 1000\n\n"
    assert b":\n\n" in chunks, "a comment, by which a server notices that the browser has gone"
    assert chunks[-1] == b"id: 1\n\n"
    assert list(parsed(iter(chunks))) == []
    stream.close()


def test_there_are_not_too_many_streams(queue: Queue) -> None:
    told = Live(queue, most=2)
    streams = [told.stream(None, everything) for _ in range(2)]
    with pytest.raises(TooManyStreamsError):
        told.stream(None, everything)
    streams[0].close()
    told.stream(None, everything).close()
    streams[1].close()


def test_an_outage_ends_all_streams_and_the_next_begin_anew(queue: Queue, store: FaultyStore) -> None:
    told = Live(queue)
    streams = [told.stream(None, everything) for _ in range(2)]
    bodies = [iter(stream) for stream in streams]
    for body in bodies:
        assert list(itertools.islice(body, 2)) == [b"retry: 1000\n\n", b":\n\n"]
    store.fail(1, for_good=True)
    deadline = time.monotonic() + PATIENCE
    for body in bodies:
        assert all(time.monotonic() < deadline for _ in body)
    assert told._follower is None
    for stream in streams:
        stream.close()
    store.heal()
    stream = told.stream(None, everything)
    queue.push({"n": 1})
    assert next(parsed(iter(stream)))[1] == {"n": 1}
    stream.close()


def test_an_outage_while_catching_up_is_the_end_too(queue: Queue, store: FaultyStore) -> None:
    for number in range(3):
        queue.push({"n": number})
    stream = Live(queue).stream(0, everything)
    store.fail(1, for_good=True)
    assert list(parsed(iter(stream))) == []
    stream.close()
    store.heal()


def test_a_browser_that_does_not_read_is_let_go(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "MOST_MISSED", 2)
    told = Live(queue)
    stream = told.stream(None, everything)
    for number in range(9):
        queue.push({"n": number})
    until(lambda: stream._over)
    assert len(list(parsed(iter(stream)))) <= 2
    stream.close()


# The application


class Site:
    """The web application and its states, in this process."""

    def __init__(self, store: FaultyStore) -> None:
        self.settings = {
            "beaker.session.type": "ext:tcjson",
            "beaker.session.url": store,
            "beaker.session.data_serializer": "json",
            "beaker.session.timeout": "600",
            "beaker.session.index": "address",
            "beaker.session.events": "events",
            "demo.development": "true",
        }
        self.app = make_app(self.settings)
        self.states = RouterStateStorage.from_settings(self.settings)
        self.answers: list[Any] = []

    def browser(self, address: str | None = None, **environ: str) -> TestApp:
        """Of somebody who has signed in."""
        browser = TestApp(self.app, extra_environ={"REMOTE_ADDR": "192.0.2.1", **environ}, cookiejar=CookieJar())
        if address is not None:
            newsletter = self.app._newsletter
            secret = newsletter._sign_ins.make(address)
            [page] = [form for form in browser.get(f"/sign-in/{secret}").forms.values() if "Sign in<" in form.text]
            page.submit(status=303)
        return browser

    def stream(self, browser: TestApp, path: str = "/events", **headers: str) -> Iterator[tuple[int, Event]]:
        return parsed(iter(self.get(browser, path, **headers).app_iter))

    def get(self, browser: TestApp, path: str, **headers: str) -> Any:
        """The answer, of which the body has not been read."""
        request = browser.RequestClass.blank(path, environ=dict(browser.extra_environ), headers=headers)
        request.headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
        answer = request.get_response(self.app)
        self.answers.append(answer)
        return answer


@pytest.fixture
def site(store: FaultyStore) -> Iterator[Site]:
    site = Site(store)
    yield site
    for answer in site.answers:
        answer.app_iter.close()


def test_a_visitor_is_told_of_himself_and_of_nobody_else(site: Site) -> None:
    ann, bob = site.browser(ANN), site.browser(BOB)
    streams = {ANN: site.stream(ann), BOB: site.stream(bob)}
    for address in (ANN, BOB):
        site.states.set(NEWS, address, CONFIRMING)
    site.app._newsletter.states.events.publish("sent")
    site.app._newsletter.states.events.publish("undeliverable", queue="undeliverable", mail="1")
    for address in (BOB, ANN):
        site.states.set(NEWS, address, MEMBER)
    for events in streams.values():
        assert [event for _, event in itertools.islice(events, 2)] == [
            {"event": "state", "key": NEWS, "state": state} for state in (CONFIRMING, MEMBER)
        ]


def test_developers_here_are_told_of_mails_without_a_word_of_them(site: Site) -> None:
    events = site.stream(site.browser(REMOTE_ADDR="127.0.0.1"))
    site.states.set(NEWS, ANN, CONFIRMING)
    site.app._newsletter.states.events.publish("undeliverable", queue="undeliverable", mail="1")
    assert next(events)[1] == {"event": "undeliverable"}


def test_who_is_signed_out_from_elsewhere_is_told(site: Site) -> None:
    events = site.stream(site.browser(ANN))
    sessions = Sessions.from_settings(site.settings)
    sessions.revoke(BOB)
    assert sessions.revoke(ANN) == 1
    site.states.set(NEWS, ANN, CONFIRMING)
    assert [event for _, event in events] == [{"event": "revoked"}], "and that is the end"


def test_nobody_else_gets_a_stream(site: Site) -> None:
    assert site.browser().get("/events", status=403)
    quiet = Site(FaultyStore(MemoryStore()))
    del quiet.settings["beaker.session.events"]
    quiet.app = make_app(quiet.settings)
    ann = quiet.browser(ANN)
    assert ann.get("/events", status=403)
    assert "<script" not in ann.get("/").text


def test_the_headers_keep_proxies_and_caches_out_of_it(site: Site) -> None:
    answer = site.get(site.browser(ANN), "/events")
    assert answer.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert "Content-Length" not in answer.headers
    answer.app_iter.close()


def test_the_page_leads_to_a_stream_that_begins_with_what_it_shows(site: Site) -> None:
    ann = site.browser(ANN)
    [script] = ann.get("/").html.find_all("script")
    assert script["src"] == "/static/live.js"
    site.states.set(NEWS, ANN, CONFIRMING)
    number, event = next(site.stream(ann, script["data-events"]))
    assert event["state"] == CONFIRMING
    site.states.set(NEWS, ANN, MEMBER)
    # A browser that comes again asks at the same address, and says what it has got.
    assert next(site.stream(ann, script["data-events"], **{"Last-Event-ID": str(number)}))[1]["state"] == MEMBER


@pytest.mark.parametrize("after", ["", "x", "-1", "9" * 30, "١"])
def test_a_number_that_is_none_is_no_harm(site: Site, after: str) -> None:
    events = site.stream(site.browser(ANN), "/events?" + urlencode({"after": after}))
    site.states.set(NEWS, ANN, CONFIRMING)
    assert next(events)[1]["state"] == CONFIRMING


def test_a_page_that_looks_again_takes_no_notice_from_the_next(site: Site) -> None:
    ann = site.browser(ANN)
    site.states.set(NEWS, ANN, MEMBER)
    [form] = [form for form in ann.get("/").forms.values() if "Leave the list" in form.text]
    answer = form.submit()
    assert "You have left" not in ann.get("/", headers={"X-Live": "look"}).text
    assert "You have left" in answer.follow().text


def test_when_there_are_too_many_streams_the_answer_says_when_to_come_again(site: Site) -> None:
    ann = site.browser(ANN)
    answers = [site.get(ann, "/events") for _ in range(live.MOST_STREAMS)]
    assert {answer.status_int for answer in answers} == {200}
    assert ann.get("/events", status=503).headers["Retry-After"] == "5"
    for answer in answers:
        answer.app_iter.close()
    head = ann.head("/events")
    assert head.status_int == 200
    assert not site.app._live._streams, "HEAD has closed what it has not read"


def test_without_the_store_there_is_no_stream(site: Site, store: FaultyStore) -> None:
    ann = site.browser(ANN)
    store.fail(1, for_good=True)
    assert ann.get("/events", status=503).headers["Retry-After"] == "5"
    store.heal()


def test_the_server_of_the_ini_file_has_more_threads_than_there_are_streams() -> None:
    ini = configparser.RawConfigParser()
    ini.read(INI.with_name("production.ini"))
    server = ini["server:main"]
    assert int(server["threads"]) >= live.MOST_STREAMS + 8
    assert server["channel_request_lookahead"] == "1"


@pytest.fixture
def port(site: Site) -> Iterator[int]:
    """The application behind the server that it really has."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = waitress.create_server(
        site.app,
        sockets=[listener],
        threads=live.MOST_STREAMS + 2,
        channel_request_lookahead=1,
        clear_untrusted_proxy_headers=True,
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield listener.getsockname()[1]
    server.close()
    thread.join(PATIENCE)


def test_a_browser_that_goes_leaves_its_thread_to_others(site: Site, port: int) -> None:
    cookie = "; ".join(f"{name}={value}" for name, value in site.browser(ANN).cookies.items())
    with ExitStack() as browsers:

        def asks(path: str) -> bytes:
            connection = browsers.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
            connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nCookie: {cookie}\r\n\r\n".encode())
            return connection.recv(12)

        assert {asks("/events") for _ in range(live.MOST_STREAMS)} == {b"HTTP/1.1 200"}
        assert asks("/events") == b"HTTP/1.1 503"
        assert asks("/") == b"HTTP/1.1 200", "all else is answered as before"
    until(lambda: not site.app._live._streams)
    until(lambda: site.app._live._follower is None)
