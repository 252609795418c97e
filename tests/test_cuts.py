"""The connection is cut after each byte of each request and each reply: the right result, or a 503 and no harm.

What is done comes to its end as asked, or raises `StoreUnavailable` (on the web: 503). In either case the record is
as it was before or as it was meant to be, whole; and the next one who comes is served.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
from beaker.session import Session
from webtest import TestApp

from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.locks import Lease
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant import client
from beaker_statestore.websession import make_filter
from tests.proxy import Proxy

COOKIE = "beaker.session.id"
_numbers = itertools.count(1)
#: More of each than anything here has.
MOST_EXCHANGES = 20
MOST_BYTES = 2000


@dataclass(frozen=True)
class Fault:
    """How a connection breaks."""

    #: By RST; otherwise by FIN.
    reset: bool
    #: Nobody can connect until the proxy is healed, so no second try helps.
    for_good: bool
    #: The connection is a new one, so the server is first asked what it can do.
    cold: bool


FAULTS = {
    "closed once": Fault(reset=False, for_good=False, cold=False),
    "reset and down, at the first use": Fault(reset=True, for_good=True, cold=True),
}


class Line:
    """A store over a line that breaks."""

    def __init__(self, proxy: Proxy, server: ServerProcess, fault: Fault) -> None:
        self.proxy = proxy
        self.fault = fault
        # Short, as all that names things here: each byte costs a cut.
        self.prefix = f"c{next(_numbers)}."
        #: Of ext:tcjson, over the line.
        self.options: dict[str, Any] = {"url": f"127.0.0.1:{proxy.port}", "prefix": self.prefix, "deadline": 3.0}
        #: The store that is found by these options.
        self.store = open_store(self.options["url"], **Settings.from_options(self.options).timing)
        #: The same records, past the line.
        self.direct = open_store(server.url)

    def records(self) -> dict[str, Any]:
        """All documents that there are, by their record keys without the prefix."""
        prefix = self.prefix.encode()
        found = self.direct.get_many(self.direct.keys(prefix))
        return {key[len(prefix) :].decode(): json.loads(value) for key, value in found.items()}

    def cut_everywhere(
        self, act: Callable[[], bool], check: Callable[[bool], object], prepare: Callable[[], object] | None = None
    ) -> None:
        """Have ``act`` done again and again, the line being cut at one place after the other.

        :param act: answers whether it was done; whatever else it raises is a defect.
        :param check: gets this answer, and looks at what has come of it; the line has healed.
        :param prepare: done before each ``act``, and not cut.
        """
        for exchange in range(1, MOST_EXCHANGES):
            # The server gets the whole request, when nobody expects that any more.
            if not self._cut_once(act, check, prepare, exchange, "request", 0, late=True):
                assert exchange > 1, "nothing came over the line"
                return
            for way in "request", "reply":
                for after in range(MOST_BYTES):
                    if not self._cut_once(act, check, prepare, exchange, way, after):
                        assert after > 0
                        break
                else:
                    raise AssertionError(f"the {way} seems to have no end")
        raise AssertionError("there seems to be no end of exchanges")

    def _cut_once(
        self,
        act: Callable[[], bool],
        check: Callable[[bool], object],
        prepare: Callable[[], object] | None,
        exchange: int,
        way: Any,
        after: int,
        late: bool = False,
    ) -> bool:
        """Whether there was such a place."""
        if prepare is not None:
            prepare()
        # Has the connection asked what the server can do.
        self.store.compare_and_swap(self.prefix.encode(), None, None)
        if self.fault.cold:
            self.proxy.hang_up()
        self.proxy.cut(exchange, way, after, late=late, reset=self.fault.reset, for_good=self.fault.for_good)
        try:
            done = act()
            met = self.proxy.has_cut
        finally:
            self.proxy.heal()
        place = f"byte {after} of {way} {exchange}{', which arrives late' if late else ''}"
        assert done or met, f"not done, although the line was not cut at {place}"
        try:
            check(done)
        except Exception as error:
            raise AssertionError(f"{'done' if done else 'not done'}, cut at {place}: {error}") from error
        return met


@pytest.fixture(scope="module")
def proxy(tyrant_server: ServerProcess) -> Iterator[Proxy]:
    with Proxy(int(tyrant_server.url.rpartition(":")[2])) as proxy:
        yield proxy


#: For what takes many exchanges.
one_fault_unless_long = pytest.mark.parametrize(
    "line", ["closed once", pytest.param("reset and down, at the first use", marks=pytest.mark.long)], indirect=True
)


@pytest.fixture(params=FAULTS)
def line(
    request: pytest.FixtureRequest, proxy: Proxy, tyrant_server: ServerProcess, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Line]:
    # Only to be through sooner.
    monkeypatch.setattr(client, "RETRY_PAUSE", (0.0, 0.001))
    line = Line(proxy, tyrant_server, FAULTS[request.param])
    with contextlib.closing(line.store):
        yield line


def attempt(action: Callable[[], object]) -> bool:
    """Whether it was done, and did not meet an outage."""
    try:
        action()
    except StoreUnavailable:
        return False
    return True


# -- sessions of stock Beaker


def test_a_session_is_saved(line: Line) -> None:
    visitor, n = uuid.uuid4().hex, 0

    def session() -> Session:
        return Session({}, id=visitor, use_cookies=False, type="ext:tcjson", **line.options)

    def act() -> bool:
        def add_one() -> None:
            mine = session()
            mine["n"] = mine.get("n", 0) + 1
            mine.save()

        return attempt(add_one)

    def check(done: bool) -> None:
        nonlocal n
        (record,) = line.records().values()
        now = record.get("n")
        assert now == n + 1 if done else now in (n, n + 1)
        assert session()["n"] == now
        n = now

    first = session()
    first["n"] = 0
    first.save()
    line.cut_everywhere(act, check)


def test_a_session_is_begun(line: Line) -> None:
    """Saved for the first time, which nobody has done before."""

    session: Any = None

    def act() -> bool:
        nonlocal session
        session = Session({}, use_cookies=False, type="ext:tcjson", **line.options)
        session["user"] = "zed"
        return attempt(session.save)

    def check(done: bool) -> None:
        record = line.records().pop(f"session:{session.id}", None)
        if done:
            assert record is not None
        if record is not None:
            assert record["user"] == "zed"
        session.save()
        assert line.records()[f"session:{session.id}"]["user"] == "zed"

    line.cut_everywhere(act, check)


def test_a_session_is_deleted(line: Line) -> None:
    visitor = ""

    def session() -> Session:
        return Session({}, id=visitor, use_cookies=False, type="ext:tcjson", **line.options)

    def prepare() -> None:
        nonlocal visitor
        visitor = uuid.uuid4().hex
        mine = session()
        mine["n"] = 0
        mine.save()

    def act() -> bool:
        def delete() -> None:
            mine = session()
            mine.delete()
            mine.save()

        return attempt(delete)

    def check(done: bool) -> None:
        now = session()
        assert now.is_new or not done
        assert now.is_new or now["n"] == 0
        assert (f"session:{visitor}" in line.records()) != now.is_new

    line.cut_everywhere(act, check, prepare)


# -- on the web


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Counts a visitor's visits, signs him in under a new session id, or says good-bye, as the path asks."""
    session = environ["beaker.session"]
    path = environ["PATH_INFO"]
    if path == "/visit":
        session["visits"] = session.get("visits", 0) + 1
        session.save()
    elif path == "/login":
        session["user"] = "zed"
        session.regenerate_id()
        session.save()
    elif path == "/leave":
        session.delete()
    text = f"{session.get('user', 'nobody')} {session.get('visits', 0)}"
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [text.encode()]


class Browser:
    """A visitor of that application."""

    def __init__(self, line: Line) -> None:
        options = {f"beaker.session.{name}": value for name, value in line.options.items()}
        self._app = TestApp(make_filter(application, options), lint=False)
        self.got_cookie = False

    @property
    def cookie(self) -> str:
        return str(self._app.cookies[COOKIE])

    def begin(self) -> None:
        """Be somebody new, who has been there once."""
        self._app.reset()
        assert self.get("/visit") == "nobody 1"

    def get(self, path: str) -> str | None:
        """The application's answer; None: it was 503."""
        response = self._app.get(path, status="*")
        self.got_cookie = "Set-Cookie" in response.headers
        if response.status_int == 503:
            assert int(response.headers["Retry-After"]) > 0
            return None
        assert response.status_int == 200
        return str(response.text)

    def get_with(self, cookie: str) -> str | None:
        """The answer to somebody who only looks, with another cookie."""
        other = TestApp(self._app.app, lint=False)
        other.set_cookie(COOKIE, cookie)
        return str(other.get("/look").text)


@pytest.fixture
def browser(line: Line) -> Browser:
    browser = Browser(line)
    browser.begin()
    return browser


def test_a_page_changes_the_session(line: Line, browser: Browser) -> None:
    visits = 1
    answer: str | None = None

    def act() -> bool:
        nonlocal answer
        answer = browser.get("/visit")
        assert not browser.got_cookie
        return answer is not None

    def check(done: bool) -> None:
        nonlocal visits
        now = browser.get("/look")
        if done:
            assert answer == now == f"nobody {visits + 1}"
        else:
            assert now in (f"nobody {visits}", f"nobody {visits + 1}")
        visits = int(str(now).split()[1])
        (record,) = line.records().values()
        assert record["visits"] == visits

    line.cut_everywhere(act, check)


def test_a_page_ends_the_session(line: Line, browser: Browser) -> None:
    cookie = ""

    def prepare() -> None:
        nonlocal cookie
        browser.begin()
        cookie = browser.cookie

    def act() -> bool:
        done = browser.get("/leave") is not None
        assert done or not browser.got_cookie
        return done

    def check(done: bool) -> None:
        seen = browser.get_with(cookie)
        record = line.records().get(f"session:{cookie}")
        if done:
            assert (seen, record) == ("nobody 0", None)
        else:
            assert (seen, record and record["visits"]) in [("nobody 0", None), ("nobody 1", 1)]

    line.cut_everywhere(act, check, prepare)


@one_fault_unless_long
def test_a_page_signs_the_visitor_in_under_a_new_id(line: Line, browser: Browser) -> None:
    """A 503 may have a cookie here: what the visitor has after it, the old or the new one, leads to the session.

    After a 503 there may be two records, the session itself and one under an id that nobody has been told.
    """

    before = ""

    def prepare() -> None:
        nonlocal before
        line.direct.delete_many(line.direct.keys(line.prefix.encode()))
        browser.begin()
        before = browser.cookie

    def act() -> bool:
        return browser.get("/login") is not None

    def check(done: bool) -> None:
        seen = browser.get("/look")
        moved = browser.cookie != before
        assert moved or not done
        assert seen == "zed 1" if moved else seen in ("nobody 1", "zed 1")
        records = line.records()
        assert f"session:{browser.cookie}" in records
        if done:
            assert len(records) == 1, "the old id is still good"
            assert browser.get_with(before) == "nobody 0"
        else:
            assert len(records) <= 2

    line.cut_everywhere(act, check, prepare)


# -- the index


@one_fault_unless_long
def test_a_visitor_is_listed_in_the_index(line: Line) -> None:
    visitor = user = ""

    def session() -> Session:
        return Session({}, id=visitor, use_cookies=False, type="ext:tcjson", index="user", **line.options)

    def prepare() -> None:
        nonlocal visitor, user
        visitor, user = uuid.uuid4().hex, str(next(_numbers))
        mine = session()
        mine["n"] = 1
        mine.save()

    def act() -> bool:
        def log_in() -> None:
            mine = session()
            mine["user"] = user
            mine.save()

        return attempt(log_in)

    def check(done: bool) -> None:
        now = dict(session())
        assert now["n"] == 1
        assert now.get("user") in ([user] if done else [None, user])
        assert len(sessions.of(user)) == ("user" in now)

    sessions = _sessions(line)
    line.cut_everywhere(act, check, prepare)


@one_fault_unless_long
def test_a_visitors_sessions_are_revoked(line: Line) -> None:
    visitor = user = ""

    def session() -> Session:
        return Session({}, id=visitor, use_cookies=False, type="ext:tcjson", index="user", **line.options)

    def prepare() -> None:
        nonlocal visitor, user
        visitor, user = uuid.uuid4().hex, str(next(_numbers))
        mine = session()
        mine["user"] = user
        mine.save()

    def act() -> bool:
        return attempt(lambda: sessions.revoke(user))

    def check(done: bool) -> None:
        now = session()
        assert now.is_new or not done
        assert ("user" in now) == (not now.is_new)
        assert len(sessions.of(user)) == (not now.is_new)

    sessions = _sessions(line)
    line.cut_everywhere(act, check, prepare)


def _sessions(line: Line) -> Sessions:
    options = {**line.options, "index": "user"}
    return Sessions.from_settings({f"beaker.session.{name}": value for name, value in options.items()})


# -- leases


def _lease(line: Line) -> Lease:
    return Lease(line.store, f"{line.prefix}lock:{next(_numbers)}".encode(), seconds=20)


def test_a_lease_is_taken(line: Line) -> None:
    lease = _lease(line)

    def prepare() -> None:
        nonlocal lease
        lease = _lease(line)

    def act() -> bool:
        return attempt(lease.acquire)

    def check(done: bool) -> None:
        assert len(line.records()) <= 1
        if not done:
            begun = time.monotonic()
            assert lease.acquire()
            assert time.monotonic() - begun < 5, "it had to wait for its own lease to end"
        (record,) = line.records().values()
        assert "token" in record
        lease.release()
        assert line.records() == {}

    line.cut_everywhere(act, check, prepare)


def test_a_lease_is_given_back(line: Line) -> None:
    lease = _lease(line)

    def prepare() -> None:
        nonlocal lease
        lease = _lease(line)
        assert lease.acquire()

    def act() -> bool:
        lease.release()
        return True

    def check(done: bool) -> None:
        assert len(line.records()) <= 1
        begun = time.monotonic()
        assert lease.acquire()
        assert time.monotonic() - begun < 5, "it had to wait for its own lease to end"
        lease.release()
        assert line.records() == {}

    line.cut_everywhere(act, check, prepare)


# -- the proxy itself


class Ends:
    """A connection through the proxy, and both its ends."""

    def __init__(self, listener: socket.socket, proxy: Proxy) -> None:
        self.client = socket.create_connection(("127.0.0.1", proxy.port), 10)
        self.server, _ = listener.accept()
        for end in self.client, self.server:
            end.settimeout(10)

    def say(self, request: bytes) -> None:
        """Send a request that reaches the server whole."""
        self.client.sendall(request)
        assert self.server.recv(100) == request


def received(sock: socket.socket) -> bytes:
    """All that comes before the other side closes, in order."""
    return b"".join(iter(lambda: sock.recv(100), b""))


@pytest.fixture
def ends() -> Iterator[tuple[Proxy, Ends]]:
    with socket.create_server(("127.0.0.1", 0)) as listener, Proxy(listener.getsockname()[1]) as proxy:
        ends = Ends(listener, proxy)
        with ends.client, ends.server:
            yield proxy, ends


def test_a_cut_request_reaches_the_server_so_far(ends: tuple[Proxy, Ends]) -> None:
    proxy, connection = ends
    proxy.cut(1, "request", 3)
    connection.client.sendall(b"abcdef")
    assert received(connection.server) == b"abc"
    assert received(connection.client) == b""
    assert proxy.has_cut


def test_a_cut_reply_reaches_the_client_so_far(ends: tuple[Proxy, Ends]) -> None:
    proxy, connection = ends
    proxy.cut(2, "reply", 3)
    connection.say(b"first")
    connection.server.sendall(b"uninjured")
    assert connection.client.recv(100) == b"uninjured"
    connection.say(b"second")
    connection.server.sendall(b"abcdef")
    assert received(connection.client) == b"abc"
    assert received(connection.server) == b""
    assert proxy.round_trips == 2


def test_a_connection_can_be_reset(ends: tuple[Proxy, Ends]) -> None:
    proxy, connection = ends
    proxy.cut(1, "request", 0, reset=True)
    connection.client.sendall(b"abcdef")
    for end in connection.client, connection.server:
        with pytest.raises(ConnectionResetError):
            end.recv(100)


def test_a_late_request_reaches_the_server_when_the_line_heals(ends: tuple[Proxy, Ends]) -> None:
    proxy, connection = ends
    proxy.cut(1, "request", 2, late=True)
    connection.client.sendall(b"abcdef")
    assert received(connection.client) == b""
    assert connection.server.recv(100) == b"ab"
    with ThreadPoolExecutor(1) as thread:
        healing = thread.submit(proxy.heal)
        assert connection.server.recv(100) == b"cdef"
        connection.server.sendall(b"done")
        healing.result(10)


def test_while_the_line_is_down_nobody_gets_through(ends: tuple[Proxy, Ends]) -> None:
    proxy, connection = ends
    proxy.cut(1, "request", 0, for_good=True)
    connection.client.sendall(b"abcdef")
    assert received(connection.client) == b""
    with socket.create_connection(("127.0.0.1", proxy.port), 10) as other:
        assert received(other) == b""
    assert proxy.connections == 1
