"""The same races as in test_races.py, for real: a browser, HTTP, and a web server that works in several threads.

A slow request stops inside the application, after it has loaded the session, until a quick one has come and gone.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import threading
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl, urlencode

import pytest
import redis
from beaker.middleware import SessionMiddleware

from beaker_statestore.testing import ServerProcess
from beaker_statestore.websession import make_filter
from tests.redis_server import running_redis
from tests.serving import served

#: How long anything here may take, in seconds.
PATIENCE = 20.0
COOKIE = "beaker.session.id"

WSGIApplication = Callable[..., Iterable[bytes]]


class Application:
    """Shows and changes the session, as its URL says::

    /show
    /known                      shows whether there is a session
    /set?color=red
    /set?color=red&hold=NAME    after loading the session, waits until NAME is let go
    /login?user=zed             the same as /set, under a new session id
    /logout
    """

    def __init__(self) -> None:
        self._held: defaultdict[str, threading.Event] = defaultdict(threading.Event)
        self._let_go: defaultdict[str, threading.Event] = defaultdict(threading.Event)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        session = environ["beaker.session"]
        values = dict(parse_qsl(environ["QUERY_STRING"]))
        session.get("user")  # Beaker loads a session when it is first looked into
        hold = values.pop("hold", None)
        if hold is not None:
            self._held[hold].set()
            assert self._let_go[hold].wait(PATIENCE), f"nobody has let {hold} go"
        path = environ["PATH_INFO"]
        if path == "/logout":
            session.delete()
        elif path in ("/set", "/login"):
            if path == "/login":
                session.regenerate_id()
            session.update(values)
            session.save()
        seen = {name: value for name, value in session.items() if not name.startswith("_")}
        start_response("200 OK", [("Content-Type", "application/json")])
        return [json.dumps({"known": not session.is_new} if path == "/known" else seen).encode()]

    def wait_until_held(self, name: str) -> None:
        assert self._held[name].wait(PATIENCE), f"{name} has not come to where it is held"

    def let_go(self, name: str) -> None:
        self._let_go[name].set()


@dataclass(frozen=True)
class Site:
    """The application, served somewhere over some back end."""

    application: Application
    port: int

    def get(self, path: str, cookie: str | None = None, **values: str) -> tuple[Any, str | None]:
        """What the application shows, and the cookie with which it answers, if any."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        with contextlib.closing(connection):
            headers = {} if cookie is None else {"Cookie": f"{COOKIE}={cookie}"}
            connection.request("GET", f"{path}?{urlencode(values)}", headers=headers)
            response = connection.getresponse()
            body = response.read()
        assert response.status == 200, (response.status, body)
        name, _, value = (response.getheader("Set-Cookie") or "").partition(";")[0].partition("=")
        return json.loads(body), value if name == COOKIE else None

    def visitor(self, **values: str) -> str:
        """The cookie of a new visitor, in whose session ``values`` are."""
        _, cookie = self.get("/set", **values)
        assert cookie is not None
        return cookie

    @contextlib.contextmanager
    def slow(self, path: str, cookie: str, **values: str) -> Iterator[Future[Any]]:
        """A request that has loaded the session, and is answered at the end of the ``with``."""
        name = uuid.uuid4().hex
        with ThreadPoolExecutor(1) as thread:
            request = thread.submit(self.get, path, cookie, hold=name, **values)
            try:
                self.application.wait_until_held(name)
                yield request
            finally:
                self.application.let_go(name)
            request.result(PATIENCE)


def two_tabs(site: Site) -> object:
    visitor = site.visitor(user="zed")
    with site.slow("/set", visitor, color="red"):
        site.get("/set", visitor, cart="book")
    return site.get("/show", visitor)[0]


def a_reader_and_a_writer(site: Site) -> object:
    visitor = site.visitor(user="zed")
    with site.slow("/show", visitor):
        site.get("/set", visitor, cart="book")
    return site.get("/show", visitor)[0]


def a_logout_and_a_slow_request(site: Site) -> object:
    visitor = site.visitor(user="zed")
    with site.slow("/set", visitor, cart="book"):
        site.get("/logout", visitor)
    return site.get("/show", visitor)[0]


def a_deletion(site: Site) -> object:
    visitor = site.visitor(user="zed")
    site.get("/logout", visitor)
    return site.get("/known", visitor)[0]


def a_new_id_at_login(site: Site) -> object:
    visitor = site.visitor(cart="book")
    _, cookie = site.get("/login", visitor, user="zed")
    assert cookie not in (None, visitor)
    return {"old id": site.get("/show", visitor)[0], "new id": site.get("/show", cookie)[0]}


def an_id_chosen_by_an_attacker(site: Site) -> object:
    chosen = uuid.uuid4().hex
    _, cookie = site.get("/set", chosen, user="zed")
    return {"attacker": site.get("/show", chosen)[0], "visitor": site.get("/show", cookie or chosen)[0]}


#: What is seen at the end: with Beaker's own ext:redis, and with ours.
TABLE: list[tuple[Callable[[Site], object], object, object]] = [
    (
        two_tabs,
        {"user": "zed", "color": "red"},
        {"user": "zed", "cart": "book", "color": "red"},
    ),
    (
        a_reader_and_a_writer,
        {"user": "zed"},
        {"user": "zed", "cart": "book"},
    ),
    (
        a_logout_and_a_slow_request,
        {"user": "zed", "cart": "book"},
        {},
    ),
    (
        a_deletion,
        {"known": True},
        {"known": False},
    ),
    (
        a_new_id_at_login,
        {"old id": {"cart": "book"}, "new id": {"cart": "book", "user": "zed"}},
        {"old id": {}, "new id": {"cart": "book", "user": "zed"}},
    ),
    (
        an_id_chosen_by_an_attacker,
        {"attacker": {"user": "zed"}, "visitor": {"user": "zed"}},
        {"attacker": {}, "visitor": {"user": "zed"}},
    ),
]
names = [scenario.__name__ for scenario, _, _ in TABLE]


@pytest.fixture(scope="module")
def peer() -> Iterator[Site]:
    application = Application()
    with running_redis() as port, redis.Redis(port=port) as client:
        options = {"session.type": "ext:redis", "session.url": client}
        with served(SessionMiddleware(application, options)) as web:
            yield Site(application, web)


@pytest.fixture(scope="module")
def ours(tyrant_server: ServerProcess) -> Iterator[Site]:
    application = Application()
    options = {"beaker.session.url": tyrant_server.url, "beaker.session.prefix": "races."}
    with served(make_filter(application, options)) as web:
        yield Site(application, web)


@pytest.mark.parametrize(("scenario", "lost"), [row[:2] for row in TABLE], ids=names)
def test_beakers_own_back_end_loses(peer: Site, scenario: Callable[[Site], object], lost: object) -> None:
    assert scenario(peer) == lost


@pytest.mark.parametrize(("scenario", "right"), [row[::2] for row in TABLE], ids=names)
def test_ours_does_not(ours: Site, scenario: Callable[[Site], object], right: object) -> None:
    assert scenario(ours) == right
