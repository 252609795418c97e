"""What happens to states and sessions is told to a queue, once it has happened, and to nobody where nobody asked."""

from __future__ import annotations

import sys
import time
import types
from collections import Counter
from typing import Any

import pytest
from beaker.session import Session
from salmon import routing
from salmon.mail import MailRequest
from salmon.server import SMTPError

from beaker_statestore.events import SILENCE, Events
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.fanout import Queue
from beaker_statestore.router import RouterStateStorage, install
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import FaultyStore


@pytest.fixture
def published(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "events": "events"}


def told(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """All that has been published, without the times, which are checked."""
    follower = Queue(Settings.from_options(settings), "events").follow("beginning")
    events = []
    while (message := follower.receive(0)) is not None:
        assert abs(message.body.pop("at") - time.time()) < 3600
        events.append(message.body)
    return events


def state(sender: str | None, key: str, state: str) -> dict[str, Any]:
    return {"event": "state", "sender": sender, "key": key, "state": state}


def test_changes_of_states_are_told(published: dict[str, Any]) -> None:
    storage = RouterStateStorage(**published)
    storage.set("a", "zed", "ONE")
    storage.set("b", "zed", "ONE")
    assert storage.move("a", "zed", "ONE", "TWO")
    storage.set_all("zed", "START")
    storage.set("a", None, "ONE")
    assert told(published) == [
        state("zed", "a", "ONE"),
        state("zed", "b", "ONE"),
        state("zed", "a", "TWO"),
        state("zed", "a", "START"),
        state("zed", "b", "START"),
        state(None, "a", "ONE"),
    ]


def test_what_changes_nothing_is_not_told(published: dict[str, Any]) -> None:
    storage = RouterStateStorage(**published)
    storage.set("a", "zed", "ONE")
    storage.set("a", "zed", "ONE")
    storage.set("b", "zed", "START")
    storage.set_all("zed", "ONE")
    assert not storage.move("a", "zed", "TWO", "THREE")
    assert told(published) == [state("zed", "a", "ONE")]


def test_a_sender_that_utf8_cannot_express_is_told_escaped(published: dict[str, Any]) -> None:
    RouterStateStorage(**published).set("a", "z\udce9d", "ONE")
    assert told(published) == [state("z\\udce9d", "a", "ONE")]


def test_a_revocation_is_told(published: dict[str, Any]) -> None:
    settings = {**published, "index": "user"}
    session = Session({}, type="ext:tcjson", use_cookies=False, **settings)
    session["user"] = "zed"
    session.save()
    sessions = Sessions(Settings.from_options(settings))
    assert sessions.revoke("zed") == 1
    assert sessions.revoke("zed") == 0
    assert told(published) == [{"event": "revoked", "by": "user", "value": "zed", "ended": 1}]


def test_without_the_option_nothing_is_done() -> None:
    store = FaultyStore(MemoryStore())
    storage = RouterStateStorage(url=store)
    storage.set("a", "zed", "ONE")
    assert store.calls == ["get", "compare_and_swap"]
    assert Events.of(Settings.from_options({"url": store})) is None


def test_a_wrong_name_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match="cannot name a queue"):
        RouterStateStorage(url="memory:", events="my events")


def test_an_outage_while_telling_does_not_undo_the_change(
    counted: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FaultyStore(MemoryStore())
    storage = RouterStateStorage(url=store, events="events")
    storage.set("a", "zed", "ONE")
    store.fail(3, for_good=True)
    storage.set("a", "zed", "TWO")
    assert store.has_failed
    store.heal()
    assert storage.get("a", "zed") == "TWO"
    assert counted["events.lost"] == 1
    # Whoever has a change to make is not to wait for that each time.
    storage.set("a", "zed", "THREE")
    assert counted["events.lost"] == 2
    later = time.monotonic() + SILENCE
    monkeypatch.setattr("beaker_statestore.events.time.monotonic", lambda: later)
    storage.set("a", "zed", "FOUR")
    assert [event["state"] for event in told({"url": store})] == ["ONE", "FOUR"]


def test_a_full_queue_of_events_forgets() -> None:
    store = MemoryStore()
    events = Events(Queue(store, "events", limit=10, when_full="forget"))
    Queue(store, "events").consumer("asleep")
    for n in range(30):
        events.publish("counted", n=n)
    assert told({"url": store})[-1] == {"event": "counted", "n": 29}


def test_an_outage_in_a_handler_that_pushes_defers_the_mail(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no ERROR state, and the sending server tries again."""
    store = FaultyStore(MemoryStore())
    queue = Queue(store, "orders", limit=1)
    router = routing.RoutingBase()
    monkeypatch.setattr(routing, "Router", router)
    storage = install(router, {"beaker.session.url": MemoryStore()})
    module = types.ModuleType("tests_order_handlers")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def START(message: Any) -> None:  # noqa: N802 - states are functions in capitals, as Lamson has it
        queue.push({"from": message.From})

    START.__module__ = module.__name__
    module.START = routing.route("orders@localhost")(START)  # type: ignore[attr-defined]
    router.HANDLERS[module.__name__] = routing.DEFAULT_STATE_KEY
    mail = MailRequest("localhost", "zed@example.com", "orders@localhost", "Subject: hello\n\nbody\n")
    store.fail(1, for_good=True)
    with pytest.raises(SMTPError, match="451"):
        router.deliver(mail)
    store.heal()
    router.deliver(mail)
    with pytest.raises(SMTPError, match="451"):  # the queue is full
        router.deliver(mail)
    assert queue.report().end == 2
    assert storage.states_of("zed@example.com") == {}
