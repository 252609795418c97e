"""What users of Beaker's back ends complain about, played out: what the visitor sees in the end, with theirs and ours.

Two requests of one visitor overlap in the worst order, without luck: both load the session, then both save it. That
the others lose is asserted as well. It is why this package exists, and should they mend it, we want to know.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
from beaker.session import Session

from beaker_statestore.websession import StateSession
from tests.redis_server import running_redis


@dataclass(frozen=True)
class Backend:
    """A way to keep sessions."""

    #: For beaker.session.Session.
    options: dict[str, Any]
    session_class: type[Session] = Session

    def request(self, session_id: str = "") -> Session:
        """The session as a new request with this id in its cookie loads it; without one, as a new visitor's does."""
        cookie = f"beaker.session.id={session_id}" if session_id else ""
        return self.session_class({"cookie": cookie}, **self.options)

    def visitor(self, **data: Any) -> str:
        """The id of a new session that holds ``data``."""
        session = self.request()
        session.update(data)
        session.save()
        return str(session.id)

    def seen(self, session_id: str) -> dict[str, Any]:
        """What the application finds in the session of whoever comes with this id."""
        return {name: value for name, value in self.request(session_id).items() if not name.startswith("_")}

    def has_record(self, session_id: str) -> bool:
        """Whether the store has a record of this session, whatever is in it."""
        manager = Session({}, id=session_id, use_cookies=False, **self.options).namespace
        manager.acquire_read_lock()
        try:
            return bool("session" in manager)
        finally:
            manager.release_read_lock()


def two_tabs(backend: Backend) -> object:
    """Two tabs change different keys of the session at the same time (beaker issue 9, open since 2012)."""
    visitor = backend.visitor(user="zed")
    tab, other = backend.request(visitor), backend.request(visitor)
    tab["cart"] = ["book"]
    other["color"] = "red"
    tab.save()
    other.save()
    return backend.seen(visitor)


def a_reader_and_a_writer(backend: Backend) -> object:
    """A slow request only reads, while a quick one writes (pyramid_beaker issue 26)."""
    visitor = backend.visitor(user="zed", cart=[])
    reader, writer = backend.request(visitor), backend.request(visitor)
    writer["cart"] = ["book"]
    writer.save()
    reader.save(accessed_only=True)
    return backend.seen(visitor)


def a_logout_and_a_slow_request(backend: Backend) -> object:
    """A visitor logs out while another request of his is under way (connect-redis issue 328)."""
    visitor = backend.visitor(user="zed")
    slow, logout = backend.request(visitor), backend.request(visitor)
    logout.delete()
    logout.save()
    slow["cart"] = ["book"]
    slow.save()
    return backend.seen(visitor)


def a_deletion(backend: Backend) -> object:
    """A session is deleted, and nobody else is there (beaker issues 68 and 189)."""
    visitor = backend.visitor(user="zed")
    session = backend.request(visitor)
    session.delete()
    session.save()
    return {"is new": backend.request(visitor).is_new, "record": backend.has_record(visitor)}


def a_new_id_at_login(backend: Backend) -> object:
    """The id changes at login, so that whoever knows the old one gets nothing by it (beaker issue 68)."""
    visitor = backend.visitor(cart=["book"])
    session = backend.request(visitor)
    session.regenerate_id()
    session["user"] = "zed"
    session.save()
    assert session.id != visitor
    return {"old id": backend.seen(visitor), "new id": backend.seen(session.id)}


def an_id_chosen_by_an_attacker(backend: Backend) -> object:
    """Somebody has a visitor log in with an id that he has made up (beaker issue 41)."""
    chosen = uuid.uuid4().hex
    session = backend.request(chosen)
    session["user"] = "zed"
    session.save()
    return {"attacker": backend.seen(chosen), "visitor": backend.seen(session.id)}


@dataclass(frozen=True)
class Row:
    scenario: Callable[[Backend], object]
    #: What Beaker's own back ends make of it.
    peers: object
    #: What must come of it.
    right: object
    #: Whether that takes `StateSession`: stock Beaker does not tell its back end enough.
    needs_our_session: bool = False


TABLE = [
    Row(
        two_tabs,
        {"user": "zed", "color": "red"},
        {"user": "zed", "cart": ["book"], "color": "red"},
    ),
    Row(
        a_reader_and_a_writer,
        {"user": "zed", "cart": []},
        {"user": "zed", "cart": ["book"]},
    ),
    Row(
        a_logout_and_a_slow_request,
        {"user": "zed", "cart": ["book"]},
        {},
    ),
    Row(
        a_deletion,
        {"is new": False, "record": True},
        {"is new": True, "record": False},
    ),
    Row(
        a_new_id_at_login,
        {"old id": {"cart": ["book"]}, "new id": {"cart": ["book"], "user": "zed"}},
        {"old id": {}, "new id": {"cart": ["book"], "user": "zed"}},
        needs_our_session=True,
    ),
    Row(
        an_id_chosen_by_an_attacker,
        {"attacker": {"user": "zed"}, "visitor": {"user": "zed"}},
        {"attacker": {}, "visitor": {"user": "zed"}},
        needs_our_session=True,
    ),
]
every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.scenario.__name__)


@pytest.fixture(scope="module")
def redis_client() -> Iterator[redis.Redis]:
    with running_redis() as port, redis.Redis(port=port) as client:
        yield client


@pytest.fixture(params=["redis", "file"])
def peer(request: pytest.FixtureRequest, tmp_path: Path) -> Backend:
    if request.param == "redis":
        return Backend({"type": "ext:redis", "url": request.getfixturevalue("redis_client")})
    return Backend({"type": "file", "data_dir": str(tmp_path)})


@every_row
def test_beakers_own_back_ends_lose(peer: Backend, row: Row) -> None:
    assert row.scenario(peer) == row.peers


@every_row
def test_ours_does_not(options: dict[str, Any], row: Row) -> None:
    assert row.scenario(Backend({"type": "ext:tcjson", **options}, StateSession)) == row.right


@every_row
def test_how_far_our_back_end_gets_under_beakers_own_session(options: dict[str, Any], row: Row) -> None:
    expected = row.peers if row.needs_our_session else row.right
    assert row.scenario(Backend({"type": "ext:tcjson", **options})) == expected
