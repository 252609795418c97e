"""The mail router's states: Lamson's semantics, exactly, on the store that the web application uses."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import pytest
from salmon import mail, queue, routing
from salmon.server import QueueReceiver, SMTPError, SMTPReceiver

from beaker_statestore.exceptions import ConfigurationError, StoreUnavailable
from beaker_statestore.router import ClearRefusedError, RouterStateStorage, install
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import FaultyStore


@pytest.fixture
def storage(options: dict[str, Any]) -> RouterStateStorage:
    return RouterStateStorage(allow_clear=True, **options)


ODD = [
    "zed@example.com",
    "José <josé@exämple.com>",
    "MAILER-DAEMON@mx.Example",
    "",
    "%",
    "%25",
    "None",
    "a:b%3Ac",
    "nul\x00 and newline\n",
    "lone \udcff surrogate",
    "_expires",
    "x" * 2000,
    None,
]


# What Salmon's own MemoryStorage does


def test_nobody_is_known_at_first(storage: RouterStateStorage) -> None:
    assert storage.get("module", "zed@example.com") == "START"


def test_a_state_is_remembered_for_its_key_and_sender_only(storage: RouterStateStorage) -> None:
    storage.set("module", "zed@example.com", "MEMBER")
    assert storage.get("module", "zed@example.com") == "MEMBER"
    assert storage.get("other", "zed@example.com") == "START"
    assert storage.get("module", "ada@example.com") == "START"


def test_setting_start_forgets(storage: RouterStateStorage, store: Store, options: dict[str, Any]) -> None:
    storage.set("module", "zed@example.com", "MEMBER")
    storage.set("module", "zed@example.com", "START")
    assert storage.get("module", "zed@example.com") == "START"
    assert list(store.keys(options["prefix"].encode())) == []
    storage.set("module", "zed@example.com", "START")
    assert storage.get("module", "zed@example.com") == "START"


def test_clear_forgets_everybody(storage: RouterStateStorage) -> None:
    for sender in ODD:
        storage.set("module", sender, "MEMBER")
    storage.clear()
    assert [storage.get("module", sender) for sender in ODD] == ["START"] * len(ODD)


def test_it_does_the_same_as_salmons_memory_storage(storage: RouterStateStorage) -> None:
    theirs = routing.MemoryStorage()
    keys = ["a", "b:list", "_opaque", "%", "ü\udc80"]
    steps = itertools.product(keys, ODD, ["ONE", "START", "ERROR", "TWO"])
    for number, (key, sender, state) in enumerate(steps):
        if number % 3:
            storage.set(key, sender, state)
            theirs.set(key, sender, state)
    for key, sender in itertools.product(keys, ODD):
        assert storage.get(key, sender) == theirs.get(key, sender), (key, sender)


# What is ours


def test_the_states_of_a_sender_are_one_readable_record(
    storage: RouterStateStorage, store: Store, options: dict[str, Any]
) -> None:
    storage.set("news.handlers", "zed@example.com", "MEMBER")
    storage.set("news.handlers:jazz", "zed@example.com", "CONFIRMING")
    (key,) = store.keys(options["prefix"].encode())
    assert key == f"{options['prefix']}state:zed@example.com".encode()
    value = store.get(key)
    assert value is not None
    assert json.loads(value) == {"news.handlers": "MEMBER", "news.handlers:jazz": "CONFIRMING"}


@pytest.mark.parametrize("sender", ODD)
def test_all_states_of_anybody_can_be_read_and_set_at_once(storage: RouterStateStorage, sender: str | None) -> None:
    states = {"a": "ONE", "b:%": "TWO", "_expires": "THREE"}
    for key, state in states.items():
        storage.set(key, sender, state)
    assert storage.states_of(sender) == states
    storage.set_all(sender, "BOUNCING")
    assert storage.states_of(sender) == dict.fromkeys(states, "BOUNCING")
    storage.set_all(sender, "START")
    assert storage.states_of(sender) == {}


def test_one_of_many_moves_a_sender_on(storage: RouterStateStorage) -> None:
    storage.set("other", "zed", "ONE")
    storage.set("a", "zed", "CONFIRMING")
    start = threading.Barrier(8)
    moved: list[bool] = []

    def move() -> None:
        start.wait(10)
        moved.append(storage.move("a", "zed", "CONFIRMING", "MEMBER"))

    threads = [threading.Thread(target=move) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(moved) == [False] * 7 + [True]
    assert storage.states_of("zed") == {"a": "MEMBER", "other": "ONE"}


def test_any_of_several_states_will_do(storage: RouterStateStorage) -> None:
    storage.set("a", "zed", "MEMBER")
    assert storage.move("a", "zed", ("CONFIRMING", "MEMBER"), "START")
    assert not storage.move("a", "zed", ("CONFIRMING", "MEMBER"), "START")


def test_from_start_and_back_again(storage: RouterStateStorage) -> None:
    assert storage.move("a", "zed", "START", "MEMBER")
    assert not storage.move("a", "zed", "START", "MEMBER")
    assert storage.move("a", "zed", "MEMBER", "START")
    assert storage.states_of("zed") == {}


def test_everybody_can_be_listed(storage: RouterStateStorage) -> None:
    for sender in ODD:
        storage.set("a", sender, "ONE")
    listed = {sender: states for page in storage.pages() for sender, states in page}
    assert listed == {sender: {"a": "ONE"} for sender in ODD}


def test_one_damaged_record_does_not_hide_the_others(
    storage: RouterStateStorage, store: Store, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    storage.set("a", "ada", "ONE")
    storage.set("a", "zed", "ONE")
    store.put(f"{options['prefix']}state:bob".encode(), b"garbage")
    store.put(f"{options['prefix']}state:eve".encode(), b'{"_expires": 4000000000, "a": "ONE", "n": 3}')
    listed = {sender: states for page in storage.pages() for sender, states in page}
    assert listed == {"ada": {"a": "ONE"}, "zed": {"a": "ONE"}, "eve": {"a": "ONE"}}
    assert "state:bob" in caplog.text


def test_clear_touches_only_its_own(options: dict[str, Any], storage: RouterStateStorage, store: Store) -> None:
    neighbour = RouterStateStorage(allow_clear=True, **{**options, "prefix": options["prefix"] + "x."})
    neighbour.set("a", "zed", "ONE")
    session = f"{options['prefix']}session:{'0' * 32}".encode()
    store.put(session, b"{}")
    storage.set("a", "zed", "ONE")
    storage.clear()
    assert storage.get("a", "zed") == "START"
    assert neighbour.get("a", "zed") == "ONE"
    assert store.get(session) == b"{}"


def test_clear_is_refused_unless_allowed(options: dict[str, Any]) -> None:
    storage = RouterStateStorage(**options)
    storage.set("a", "zed", "ONE")
    with pytest.raises(ClearRefusedError, match="allow_clear=True"):
        storage.clear()
    assert storage.get("a", "zed") == "ONE"


@pytest.mark.parametrize(("key", "state"), [(None, "ONE"), ("a", None), (b"a", "ONE")])
def test_keys_and_states_are_text(storage: RouterStateStorage, key: Any, state: Any) -> None:
    with pytest.raises(TypeError, match="has to be a str"):
        storage.set(key, "zed", state)


def test_threads_that_change_one_senders_states_lose_none(storage: RouterStateStorage) -> None:
    names = [f"key{n}" for n in range(8)]
    threads = [threading.Thread(target=storage.set, args=(name, "zed", "ONE")) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert storage.states_of("zed") == dict.fromkeys(names, "ONE")


# Under Salmon's router


class Handlers(types.ModuleType):
    """A module of handlers as an application has it, with a state machine START -> MEMBER."""

    def __init__(self, router: Any) -> None:
        super().__init__("tests_news_handlers")
        self.calls: list[str] = []
        self.raising: BaseException | None = None
        calls = self.calls

        def START(message: Any) -> Any:  # noqa: N802 - states are functions in capitals, as Lamson has it
            calls.append("START")
            if self.raising is not None:
                raise self.raising
            return self.MEMBER

        def MEMBER(message: Any) -> Any:  # noqa: N802
            calls.append("MEMBER")

        for function in (START, MEMBER):
            function.__module__ = self.__name__
            setattr(self, function.__name__, routing.route("news@localhost")(function))
        router.HANDLERS[self.__name__] = routing.DEFAULT_STATE_KEY


@pytest.fixture
def router(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Salmon's one Router as a fresh process has it."""
    fresh = routing.RoutingBase()
    fresh.UNDELIVERABLE_QUEUE = queue.Queue(str(tmp_path / "undeliverable"))
    monkeypatch.setattr(routing, "Router", fresh)
    return fresh


@pytest.fixture
def handlers(router: Any, monkeypatch: pytest.MonkeyPatch) -> Handlers:
    module = Handlers(router)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def faulty() -> FaultyStore:
    return FaultyStore(open_store("memory:router-faults"))


def message(sender: str = "zed@example.com") -> Any:
    return mail.MailRequest("localhost", sender, "news@localhost", "Subject: hello\n\nbody\n")


def receive(sender: str = "zed@example.com") -> str | None:
    """What the SMTP receiver answers to a message; None stands for 250."""
    answer: str | None = SMTPReceiver.process_message(
        object.__new__(SMTPReceiver), "localhost", sender, "news@localhost", b"Subject: hello\n\nbody\n"
    )
    return answer


def test_the_router_moves_a_sender_through_its_states(router: Any, handlers: Handlers, options: dict[str, Any]) -> None:
    storage = install(router, {f"beaker.session.{name}": value for name, value in options.items()})
    assert router.STATE_STORE is storage
    router.deliver(message())
    assert storage.states_of("zed@example.com") == {handlers.__name__: "MEMBER"}
    router.deliver(message())
    assert handlers.calls == ["START", "MEMBER"]


def test_installing_by_ini_file(router: Any, handlers: Handlers, tmp_path: Path, options: dict[str, Any]) -> None:
    ini = tmp_path / "development.ini"
    ini.write_text(
        "[app:main]\nbeaker.session.type = ext:tcjson\n"
        f"beaker.session.url = {options['url']}\nbeaker.session.prefix = {options['prefix']}\n"
    )
    storage = install(router, str(ini))
    router.deliver(message())
    assert storage.get(handlers.__name__, "zed@example.com") == "MEMBER"


def test_a_handler_that_raises_moves_the_sender_to_error(
    router: Any, handlers: Handlers, options: dict[str, Any]
) -> None:
    storage = install(router, {f"beaker.session.{name}": value for name, value in options.items()})
    handlers.raising = ValueError("a bug")
    router.deliver(message())
    assert storage.get(handlers.__name__, "zed@example.com") == "ERROR"
    assert len(router.UNDELIVERABLE_QUEUE) == 1


def test_one_read_serves_all_candidate_handlers(router: Any, handlers: Handlers, faulty: FaultyStore) -> None:
    install(router, {"beaker.session.url": faulty})
    router.deliver(message("one-read@example.com"))
    faulty.calls.clear()
    router.deliver(message("one-read@example.com"))
    assert handlers.calls == ["START", "MEMBER"]
    assert faulty.calls == ["get"]


@pytest.mark.parametrize("executed", [False, True])
@pytest.mark.parametrize("forever", [False, True])
def test_an_outage_at_any_call_defers_or_is_invisible(
    router: Any, handlers: Handlers, faulty: FaultyStore, forever: bool, executed: bool
) -> None:
    """Whichever call of a delivery fails, the answer is 250 and done, or 451 and tried again with success."""
    storage = install(router, {"beaker.session.url": faulty})
    seen = []
    for nth in range(1, 20):
        sender = f"outage-{nth}-{forever:d}-{executed:d}@example.com"
        faulty.fail(nth, for_good=forever, executed=executed)
        answer = receive(sender)
        met = faulty.has_failed
        faulty.heal()
        assert storage.states_of(sender) in ({}, {handlers.__name__: "MEMBER"})
        seen.append(answer)
        if answer is not None:
            assert answer.startswith("451 ")
            assert receive(sender) is None
        assert storage.states_of(sender) == {handlers.__name__: "MEMBER"}
        if not met:
            break
    else:
        raise AssertionError("the number of store calls of one delivery seems to have no end")
    assert len(seen) >= 3
    assert len(router.UNDELIVERABLE_QUEUE) == 0


@pytest.mark.parametrize("raised", [StoreUnavailable("down"), "chained"])
def test_an_outage_that_a_handler_meets_by_itself_moves_nobody_to_error(
    router: Any, handlers: Handlers, options: dict[str, Any], raised: Any
) -> None:
    storage = install(router, {f"beaker.session.{name}": value for name, value in options.items()})
    if raised == "chained":
        raised = RuntimeError("could not read the slate")
        raised.__cause__ = StoreUnavailable("down")
    handlers.raising = raised
    answer = receive()
    assert answer is not None
    assert answer.startswith("451 ")
    assert storage.states_of("zed@example.com") == {}
    assert len(router.UNDELIVERABLE_QUEUE) == 0


# Salmon's queue leaves the file of a message that it has popped to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_queue_receiver_waits_until_the_store_is_back(
    router: Any, handlers: Handlers, faulty: FaultyStore, tmp_path: Path
) -> None:
    storage = install(router, {"beaker.session.url": faulty}, on_outage="wait", patience=20)
    faulty.fail(1, for_good=True)
    waiting = queue.Queue(str(tmp_path / "queue"))
    waiting.push(message("queued@example.com"))
    receiver = QueueReceiver(str(tmp_path / "queue"), sleep=0, workers=1)
    thread = threading.Thread(target=receiver.start, kwargs={"one_shot": True})
    thread.start()
    deadline = time.monotonic() + 10
    while not faulty.has_failed:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    faulty.heal()
    thread.join(20)
    assert not thread.is_alive()
    assert storage.get(handlers.__name__, "queued@example.com") == "MEMBER"
    assert len(router.UNDELIVERABLE_QUEUE) == 0


def test_waiting_runs_no_handler_twice_for_the_routers_own_calls(
    router: Any, handlers: Handlers, faulty: FaultyStore
) -> None:
    storage = install(router, {"beaker.session.url": faulty}, on_outage="wait", patience=20)
    for nth in range(1, 4):
        handlers.calls.clear()
        faulty.fail(nth, for_good=True)
        timer = threading.Timer(0.15, faulty.heal)
        timer.start()
        sender = f"waiting-{nth}@example.com"
        router.deliver(message(sender))
        timer.join(10)
        assert faulty.has_failed
        assert handlers.calls == ["START"]
        assert storage.get(handlers.__name__, sender) == "MEMBER"


def test_waiting_delivers_again_what_a_handler_could_not_do_for_an_outage(
    router: Any, handlers: Handlers, faulty: FaultyStore
) -> None:
    storage = install(router, {"beaker.session.url": faulty}, on_outage="wait", patience=20)
    handlers.raising = StoreUnavailable("down")
    threading.Timer(0.15, lambda: setattr(handlers, "raising", None)).start()
    router.deliver(message("again@example.com"))
    assert len(handlers.calls) > 1
    assert storage.get(handlers.__name__, "again@example.com") == "MEMBER"


def test_a_queue_receivers_patience_ends(router: Any, handlers: Handlers, faulty: FaultyStore) -> None:
    install(router, {"beaker.session.url": faulty}, on_outage="wait", patience=0.3)
    faulty.fail(1, for_good=True)
    try:
        with pytest.raises(StoreUnavailable):
            router.deliver(message("impatient@example.com"))
    finally:
        faulty.heal()


def test_installing_twice_defers_once(router: Any, handlers: Handlers, faulty: FaultyStore) -> None:
    install(router, {"beaker.session.url": faulty}, on_outage="wait")
    install(router, {"beaker.session.url": faulty}, on_outage="defer")
    faulty.fail(1, for_good=True)
    try:
        with pytest.raises(SMTPError, match="451"):
            router.deliver(message("twice@example.com"))
    finally:
        faulty.heal()


def test_installing_again_keeps_what_others_have_put_around_delivery(
    router: Any, handlers: Handlers, options: dict[str, Any]
) -> None:
    traced = []
    deliver = router.deliver

    @functools.wraps(deliver)
    def tracing(message: Any) -> None:
        traced.append(message)
        deliver(message)

    router.deliver = tracing
    settings = {f"beaker.session.{name}": value for name, value in options.items()}
    install(router, settings)
    install(router, settings)
    router.deliver(message("traced@example.com"))
    assert len(traced) == 1


def test_salmons_conversations_can_clear_if_allowed(router: Any, options: dict[str, Any]) -> None:
    settings = {f"beaker.session.{name}": value for name, value in options.items()}
    storage = install(router, settings, allow_clear=True)
    storage.set("a", "zed", "ONE")
    router.clear_states()
    assert storage.get("a", "zed") == "START"


def test_the_attribute_that_salmons_documentation_misspells_is_warned_about(
    router: Any, options: dict[str, Any]
) -> None:
    router.STATE_STORAGE = routing.MemoryStorage()
    with pytest.warns(UserWarning, match="STATE_STORE"):
        install(router, {f"beaker.session.{name}": value for name, value in options.items()})


def test_an_unknown_policy_is_refused(router: Any) -> None:
    with pytest.raises(ConfigurationError, match="'defer'"):
        install(router, {"beaker.session.url": "memory:"}, on_outage="ignore")  # type: ignore[arg-type]
