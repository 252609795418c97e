"""Any interleaving of requests, logouts and revocations, against a model of a few lines."""

from __future__ import annotations

import copy
import uuid
from typing import Any

from beaker.session import Session
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from beaker_statestore.codec import DocumentCodec
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.websession import StateSession

FIELDS = st.sampled_from(["user", "cart", "n", "ünï"])
VALUES = st.one_of(st.none(), st.booleans(), st.integers(-2, 2), st.just(0.0), st.text("aé", max_size=1))
CONTENTS = {"user": st.sampled_from(["zed", "ann"]), "cart": st.lists(VALUES, max_size=2)}


class Request:
    """A request under way, as the model sees it: what it knew of which session, and what it has made of it."""

    def __init__(self, session: Session, life: Life | None, revocations: int, now: int) -> None:
        self.session = session
        self.life = life
        self.revocations = revocations
        self.began = self.known_since = now
        self.data = copy.deepcopy(life.data) if life else {}
        #: What Beaker saves for a request that only reads. It shares its lists with `data`, as in Beaker.
        self.loaded = dict(self.data)
        self.base = copy.deepcopy(self.data)
        self.saved = self.ended = False


class Life:
    """One session from its first save to its end; several can follow each other under one id."""

    def __init__(self, began: int) -> None:
        self.data: dict[str, Any] = {}
        #: When the earliest of the requests had begun that made it: Beaker's ``_creation_time``.
        self.began = began


class Interleavings(RuleBasedStateMachine):
    """One browser, stock Beaker, requests that overlap."""

    requests = Bundle("requests")

    @initialize(json=st.booleans(), sealed=st.booleans(), hashed=st.booleans(), interval=st.sampled_from([0, 60]))
    def begin(self, json: bool, sealed: bool, hashed: bool, interval: int) -> None:
        self.options: dict[str, Any] = {
            "url": f"memory:{uuid.uuid4().hex}",
            "index": "user",
            "hash_ids": hashed,
            "store_key": "0123456789abcdef" * 4 if sealed else "",
            "touch_interval": interval,
        }
        self.form = "json" if json else "pickle"
        self.id = uuid.uuid4().hex
        self.sessions = Sessions(Settings.from_options(self.options))
        self.alive: Life | None = None
        self.revocations = self.now = 0
        #: Who has been listed for this id, for the hour that the test does not take.
        self.listed: set[str] = set()

    def open(self) -> Session:
        return Session({}, id=self.id, use_cookies=False, type="ext:tcjson", data_serializer=self.form, **self.options)

    @rule(target=requests)
    def load(self) -> Request:
        return Request(self.open(), self.alive, self.revocations, self.tick())

    def tick(self) -> int:
        self.now += 1
        return self.now

    @rule(request=requests, field=FIELDS, data=st.data())
    def change(self, request: Request, field: str, data: st.DataObject) -> None:
        value = data.draw(CONTENTS.get(field, VALUES))
        request.session[field] = value
        request.data[field] = copy.deepcopy(value)

    @rule(request=requests, value=VALUES)
    def change_inside(self, request: Request, value: Any) -> None:
        if "cart" in request.data:
            request.session["cart"].append(value)
            request.data["cart"].append(value)

    @rule(request=requests, field=FIELDS)
    def remove(self, request: Request, field: str) -> None:
        request.session.pop(field, None)
        request.data.pop(field, None)

    @rule(request=requests)
    def save(self, request: Request) -> None:
        request.session.save()
        self.commit(request, request.base, request.data)
        request.base = copy.deepcopy(request.data)
        request.saved = True

    @rule(request=consumes(requests))
    def end_after_reading(self, request: Request) -> None:
        if not request.saved:
            request.session.save(accessed_only=True)
            if not request.session.is_new:
                self.commit(request, request.base, request.loaded)

    @rule(request=consumes(requests))
    def log_out(self, request: Request) -> None:
        request.session.delete()
        request.session.save()
        self.alive = None

    @rule(user=st.sampled_from(["zed", "ann"]))
    def revoke(self, user: str) -> None:
        ended = self.sessions.revoke(user)
        said = self.alive.data.get("user") if self.alive else None
        assert ended == (said == user)
        if said == user or (said is None and user in self.listed):
            self.alive = None
            self.revocations += 1

    def commit(self, request: Request, base: dict[str, Any], data: dict[str, Any]) -> None:
        """What the promises say of a save that turns ``base`` into ``data``."""
        if "user" in data and (request.life is None or data["user"] != base.get("user")):
            self.listed.add(data["user"])
        if request.life is None and not request.ended:
            if self.alive is None and request.revocations == self.revocations:
                self.alive = Life(request.began)
            request.life = self.alive
            if self.alive is not None:
                self.alive.began = min(self.alive.began, request.began)
        # A session that was begun by somebody who was under way already cannot be told from the one that is known.
        same = request.life is self.alive or (self.alive is not None and self.alive.began < request.known_since)
        if self.alive is None or not same or request.ended:
            # From then on it knows of no session, whatever others begin.
            request.ended = True
            return
        self.alive.data = _applied(base, data, self.alive.data)
        request.known_since = self.tick()

    @invariant()
    def a_new_request_sees_what_it_should(self) -> None:
        if not hasattr(self, "id"):
            return
        session = self.open()
        seen = {name: value for name, value in session.items() if not name.startswith("_")}
        assert session.is_new is (self.alive is None)
        expected = self.alive.data if self.alive else {}
        assert seen.keys() == expected.keys()
        assert all(_same(seen[field], expected[field]) for field in seen)

    @invariant()
    def a_live_session_is_listed(self) -> None:
        if not hasattr(self, "id"):
            return
        for user in ("zed", "ann"):
            assert bool(self.sessions.of(user)) is (self.alive is not None and self.alive.data.get("user") == user)


class Renewals(RuleBasedStateMachine):
    """Sessions that get new ids while others work in them: nobody's session is out of reach for whoever revokes."""

    cookies = Bundle("cookies")
    requests = Bundle("requests")

    @initialize(sealed=st.booleans(), hashed=st.booleans())
    def begin(self, sealed: bool, hashed: bool) -> None:
        self.options: dict[str, Any] = {
            "url": f"memory:{uuid.uuid4().hex}",
            "index": "user",
            "hash_ids": hashed,
            "store_key": "0123456789abcdef" * 4 if sealed else "",
        }
        self.settings_of_all = Settings.from_options(self.options)
        self.sessions = Sessions(self.settings_of_all)
        self.store = open_store(self.options["url"])

    @rule(target=cookies)
    def visit(self) -> str:
        session = self.open("")
        session["seen"] = True
        session.save()
        return str(session.id)

    @rule(target=requests, cookie=cookies)
    def load(self, cookie: str) -> StateSession:
        return self.open(f"beaker.session.id={cookie}")

    def open(self, cookie: str) -> StateSession:
        return StateSession({"cookie": cookie}, type="ext:tcjson", timeout=600, **self.options)

    @rule(request=requests, user=st.sampled_from(["zed", "ann", None]))
    def sign_in(self, request: StateSession, user: str | None) -> None:
        request["user"] = user

    @rule(request=requests)
    def renew(self, request: StateSession) -> None:
        request.regenerate_id()

    @rule(target=cookies, request=requests)
    def save(self, request: StateSession) -> str:
        before = request.ids
        request.save()
        if len(before) > 1:
            for old in before - {request.id}:
                assert "seen" not in self.open(f"beaker.session.id={old}"), "the old id is still good"
        return str(request.id)

    @rule(request=consumes(requests))
    def end_after_reading(self, request: StateSession) -> None:
        request.save(accessed_only=True)

    @rule(request=consumes(requests))
    def log_out(self, request: StateSession) -> None:
        request.delete()
        request.save()

    @rule(user=st.sampled_from(["zed", "ann"]))
    def revoke(self, user: str) -> None:
        listed = len(self.sessions.of(user))
        assert self.sessions.revoke(user) == listed
        assert user not in self.users()

    def users(self) -> list[str]:
        """What all live records say, however they are listed."""
        codec = DocumentCodec.of(self.settings_of_all)
        records = {key: self.store.get(key) for key in self.store.keys(b"session:")}
        live = (codec.current(data, key) or {} for key, data in records.items())
        return sorted(document["user"] for document in live if document.get("user"))

    @invariant()
    def every_session_is_listed(self) -> None:
        if hasattr(self, "store"):
            found = [session.data["user"] for user in ("ann", "zed") for session in self.sessions.of(user)]
            assert sorted(found) == self.users()


_ABSENT = object()


def _applied(base: dict[str, Any], data: dict[str, Any], to: dict[str, Any]) -> dict[str, Any]:
    """``to`` with the fields that differ between ``base`` and ``data`` as they are in ``data``."""
    changed = {f for f in base.keys() | data.keys() if not _same(base.get(f, _ABSENT), data.get(f, _ABSENT))}
    kept = {field: value for field, value in to.items() if field not in changed}
    return copy.deepcopy({**kept, **{field: data[field] for field in changed if field in data}})


def _same(a: Any, b: Any) -> bool:
    """1, 1.0 and True are three values."""
    return a is b or (repr(a) == repr(b) and _ABSENT not in (a, b))


TestInterleavings = Interleavings.TestCase
TestRenewals = Renewals.TestCase
TestInterleavings.settings = TestRenewals.settings = settings(max_examples=200, stateful_step_count=40, deadline=None)
