"""Spyne's calls over the queue: real applications, JSON and SOAP, through a real server."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

if sys.version_info >= (3, 12):
    pytest.skip("Spyne 2.14 does not run on Python 3.12 and later", allow_module_level=True)

from spyne import Application, ComplexModel, Fault, Integer, Iterable, MethodContext, Service, Unicode, rpc
from spyne.auxproc.sync import SyncAuxProc
from spyne.error import ResourceNotFoundError, ValidationError
from spyne.protocol.json import JsonDocument
from spyne.protocol.soap import Soap11

from beaker_statestore import deadletters, spynetransport
from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.fanout import DeadLetter, Queue
from beaker_statestore.spynetransport import Consumer, Producer
from beaker_statestore.testing import ServerProcess, free_port

#: For what takes no time, unless something is broken, in seconds.
PATIENCE = 30.0


class Person(ComplexModel):
    name = Unicode
    age = Integer(ge=0)


class Work(Service):
    """What it does is told to whoever put a function into the context of the application's calls."""

    @rpc(Unicode(min_len=1, nullable=False, min_occurs=1), Integer(ge=1), _returns=Unicode)
    def note(ctx: MethodContext, text: str, times: int | None) -> str:  # noqa: N805 - Spyne's way
        ctx.udc(ctx, text)
        return text * (times or 1)

    @rpc(Person, _returns=Integer)
    def birthday(ctx: MethodContext, person: Person) -> int:  # noqa: N805 - Spyne's way
        ctx.udc(ctx, person.name)
        return int(person.age) + 1

    @rpc(Unicode, _returns=Iterable(Unicode))
    def one_by_one(ctx: MethodContext, text: str) -> Iterator[str]:  # noqa: N805 - Spyne's way
        for letter in text:
            ctx.udc(ctx, letter)
            yield letter

    @rpc(Integer, _returns=Integer, _body_style="bare")
    def bare(ctx: MethodContext, number: int) -> int:  # noqa: N805 - Spyne's way
        return number


Does = Callable[[MethodContext, str], object]


def json_protocols() -> tuple[Any, Any]:
    return JsonDocument(validator="soft"), JsonDocument()


def soap_protocols() -> tuple[Any, Any]:
    return Soap11(validator="lxml"), Soap11()


def mixed_protocols() -> tuple[Any, Any]:
    return JsonDocument(validator="soft"), Soap11()


def application(does: Does = lambda ctx, text: None, protocols: Callable[[], tuple[Any, Any]] = json_protocols) -> Any:
    reads, writes = protocols()
    app = Application([Work], "urn:test:work", in_protocol=reads, out_protocol=writes)

    def tell(ctx: MethodContext) -> None:
        ctx.udc = does

    app.event_manager.add_listener("method_call", tell)
    return app


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spynetransport, "PAUSE", 0.05)


@pytest.fixture
def queue(tyrant_server: ServerProcess) -> Queue:
    return Queue(tyrant_server.url, "tasks", prefix=f"{secrets.token_hex(4)}.")


def consumer(queue: Queue, app: Any, name: str = "worker", **options: Any) -> Consumer:
    return Consumer(queue, app, name, **{"start": "beginning", "backoff": 0.01, **options})


@contextmanager
def serving(*consumers: Consumer) -> Iterator[None]:
    threads = [threading.Thread(target=one.serve_forever) for one in consumers]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for one in consumers:
            one.stop()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def done(queue: Queue, name: str = "worker") -> bool:
    """Whether the consumer has nothing before it."""
    return any(one.behind == 0 for one in queue.report().consumers if one.name == name)


def dead(queue: Queue, name: str = "worker") -> list[DeadLetter]:
    return list(queue.dead_letters(name))


# -- what succeeds


@pytest.mark.parametrize("protocols", [json_protocols, soap_protocols, mixed_protocols])
def test_each_consumer_does_every_call_in_order(queue: Queue, protocols: Callable[[], tuple[Any, Any]]) -> None:
    did: dict[str, list[str]] = {"first": [], "second": []}

    def does(ctx: MethodContext, text: str) -> None:
        did[ctx.transport.consumer_id].append(text)

    both = [consumer(queue, application(does, protocols), name) for name in did]
    service = Producer(queue, application(protocols=protocols)).service
    texts = [f'<&"é{number}' for number in range(10)]
    with serving(*both):
        assert [service.note(text) for text in texts] == list(range(1, 11))
        assert service.birthday(Person(name="Ann", age=30)) == 11
        wait_for(lambda: done(queue, "first") and done(queue, "second"))
    assert did == {"first": [*texts, "Ann"], "second": [*texts, "Ann"]}


def test_requests_are_stored_as_the_text_they_are(queue: Queue) -> None:
    call = Producer(queue, application()).service.note
    call("Ann", times=2)
    call("Bob")  # the same object may be called again
    Producer(queue, application(protocols=soap_protocols)).service.note("Ann")
    reader = queue.follow("beginning")
    bodies = [message.body for _ in range(3) if (message := reader.receive(1))]
    assert bodies[:2] == [
        {"request": '{"note": {"text": "Ann", "times": 2}}'},
        {"request": '{"note": {"text": "Bob"}}'},
    ]
    assert bodies[2]["request"].startswith("<?xml version='1.0' encoding='UTF-8'?>")
    assert "<tns:text>Ann</tns:text>" in bodies[2]["request"]


class Utf16Json(JsonDocument):
    """Writes what is no UTF-8."""

    def create_out_string(self, ctx: MethodContext, out_string_encoding: str = "") -> None:
        super().create_out_string(ctx, "UTF-16")


def test_requests_that_are_no_text_come_through(queue: Queue) -> None:
    did: list[str] = []
    app = application(
        lambda ctx, text: did.append(text), lambda: (Utf16Json(default_string_encoding="UTF-16"), JsonDocument())
    )
    Producer(queue, app).service.note("Ann")
    message = queue.follow("beginning").receive(1)
    assert message is not None
    assert list(message.body) == ["base64"]
    with serving(consumer(queue, app)):
        wait_for(lambda: done(queue))
    assert did == ["Ann"]


def test_listeners_are_told_who_does_what(queue: Queue) -> None:
    told: list[tuple[str, str, int, int]] = []
    app = application()

    def listen(event: str) -> None:
        def listener(ctx: MethodContext) -> None:
            delivery = ctx.transport
            told.append((event, delivery.consumer_id, delivery.task_id, delivery.attempt))

        app.event_manager.add_listener(event, listener)

    events = "method_context_created", "method_call", "method_return_object", "method_return_string"
    for event in (*events, "method_context_closed"):
        listen(event)
    Producer(queue, application()).service.note("Ann")
    with serving(consumer(queue, app)):
        wait_for(lambda: done(queue))
    assert told == [(event, "worker", 1, 1) for event in (*events, "method_context_closed")]


def test_a_consumer_begins_with_what_comes_after_it(queue: Queue) -> None:
    did: list[str] = []
    service = Producer(queue, application()).service
    service.note("before")
    one = Consumer(queue, application(lambda ctx, text: did.append(text)), "worker")
    service.note("after")
    with serving(one):
        wait_for(lambda: done(queue))
    assert did == ["after"]


def test_listeners_are_told_of_what_is_only_called_too(queue: Queue) -> None:
    told: list[tuple[str, object]] = []
    app = application()

    def listen(event: str) -> None:
        def listener(ctx: MethodContext) -> None:
            delivery = ctx.transport
            who = {delivery.consumer_id, delivery.task_id, delivery.attempt, delivery.pushed_at}
            told.append((event, who))

        app.event_manager.add_listener(event, listener)

    events = "method_context_created", "method_return_string", "method_context_closed"
    for event in events:
        listen(event)
    assert Producer(queue, app).service.note("Ann") == 1
    assert {event for event, _ in told} == set(events)
    assert all(who == {None} for _, who in told)


def test_stop_lets_the_present_call_end(queue: Queue) -> None:
    did: list[str] = []

    def does(ctx: MethodContext, text: str) -> None:
        one.stop()
        did.append(text)

    service = Producer(queue, application()).service
    service.note("first")
    service.note("second")
    one = consumer(queue, application(does))
    one.serve_forever()
    assert did == ["first"]
    (report,) = queue.report().consumers
    assert (report.next, report.held) == (2, False)


# -- what fails


def test_a_call_that_fails_is_tried_again_and_then_dead_and_the_next_ones_are_served(queue: Queue) -> None:
    did: list[tuple[str, int]] = []

    def does(ctx: MethodContext, text: str) -> None:
        did.append((text, ctx.transport.attempt))
        if text == "bad":
            raise LookupError("no such customer")

    service = Producer(queue, application()).service
    for text in ("good", "bad", "better"):
        service.note(text)
    with serving(consumer(queue, application(does), retries=2)):
        wait_for(lambda: done(queue))
    assert did == [("good", 1), ("bad", 1), ("bad", 2), ("bad", 3), ("better", 1)]
    (letter,) = dead(queue)
    assert (letter.number, letter.tries, letter.error) == (2, 3, "LookupError: no such customer")
    assert letter.body == {"request": '{"note": {"text": "bad"}}'}


def test_a_call_that_ends_its_workers_is_dead_in_the_end(queue: Queue) -> None:
    did: list[tuple[str, int]] = []

    def does(ctx: MethodContext, text: str) -> None:
        did.append((text, ctx.transport.attempt))
        if text == "bad":
            sys.exit("no such customer")

    service = Producer(queue, application()).service
    service.note("bad")
    service.note("good")
    for _ in range(3):
        with pytest.raises(SystemExit):
            consumer(queue, application(does), retries=2).serve_forever()
    with serving(consumer(queue, application(does), retries=2)):
        wait_for(lambda: done(queue))
    assert did == [("bad", 1), ("bad", 2), ("bad", 3), ("good", 1)]
    assert [(letter.tries, letter.error) for letter in dead(queue)] == [(3, "SystemExit: no such customer")]


def test_a_worker_that_a_call_ends_while_the_store_is_away_ends(queue: Queue, monkeypatch: pytest.MonkeyPatch) -> None:
    def does(ctx: MethodContext, text: str) -> None:
        raise SystemExit(3)

    def away(*_: object) -> None:
        raise StoreUnavailable("out of reach")

    Producer(queue, application()).service.note("bad")
    one = consumer(queue, application(does))
    monkeypatch.setattr(one._consumer, "retry", away)
    with pytest.raises(SystemExit):
        one.serve_forever()


@pytest.mark.parametrize("fails", [False, True])
def test_every_context_is_closed_once(queue: Queue, fails: bool) -> None:
    closed: list[str] = []

    class Beside(Service):
        __aux__ = SyncAuxProc()

        @rpc(Unicode, Integer, _returns=Unicode)
        def note(ctx: MethodContext, text: str, times: int | None) -> str:  # noqa: N805 - Spyne's way
            if fails:
                raise LookupError(text)
            return text

    reads, writes = json_protocols()
    app = Application([Work, Beside], "urn:test:work", in_protocol=reads, out_protocol=writes)

    def tell(ctx: MethodContext) -> None:
        ctx.udc = lambda ctx, text: None

    app.event_manager.add_listener("method_call", tell)
    Producer(queue, app).service.note("Ann")
    app.event_manager.add_listener(
        "method_context_closed", lambda ctx: closed.append("main" if ctx.descriptor.aux is None else "beside")
    )
    with serving(consumer(queue, app)):
        wait_for(lambda: done(queue))
    assert sorted(closed) == ["beside", "main"]


def test_a_call_that_fails_once_succeeds_later(queue: Queue) -> None:
    did: list[int] = []

    def does(ctx: MethodContext, text: str) -> None:
        did.append(ctx.transport.attempt)
        if ctx.transport.attempt == 1:
            raise Fault("Server.Busy", "come back later")

    Producer(queue, application()).service.note("Ann")
    with serving(consumer(queue, application(does))):
        wait_for(lambda: done(queue))
    assert did == [1, 2]
    assert dead(queue) == []


@pytest.mark.parametrize("protocols", [json_protocols, soap_protocols])
def test_a_generator_that_fails_has_failed(queue: Queue, protocols: Callable[[], tuple[Any, Any]]) -> None:
    did: list[str] = []

    def does(ctx: MethodContext, letter: str) -> None:
        did.append(letter)
        if letter == "b":
            raise LookupError(letter)

    Producer(queue, application(protocols=protocols)).service.one_by_one("abc")
    with serving(consumer(queue, application(does, protocols), retries=1)):
        wait_for(lambda: done(queue))
    assert did == ["a", "b", "a", "b"]
    assert [letter.error for letter in dead(queue)] == ["LookupError: b"]


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"request": "no JSON"}, "Client.JsonDecodeError"),
        ({"request": ""}, "Client.JsonDecodeError"),
        ({"request": "[1]"}, "Client.ValidationError"),
        ({"request": '{"no_such_method": {}}'}, "Client.ResourceNotFound"),
        ({"request": '{"note": {"text": "Ann", "times": "often"}}'}, "Client.ValidationError"),
        ({"request": '{"note": {"text": null}}'}, "Client.ValidationError"),
        ({"request": DEEP}, "Client.Unreadable: RecursionError"),
        ({"base64": "gIA="}, "Client.Unreadable: UnicodeDecodeError"),
        ({"base64": "???"}, "Client.Unreadable"),
        ({"base64": "é"}, "Client.Unreadable"),
        ({"request": 5}, "Client.Unreadable"),
        (["note"], "Client.Unreadable"),
    ],
)
def test_what_is_no_good_call_is_dead_at_once(queue: Queue, body: Any, error: str) -> None:
    did: list[str] = []
    queue.push(body)
    Producer(queue, application()).service.note("next")
    with serving(consumer(queue, application(lambda ctx, text: did.append(text)), backoff=600)):
        wait_for(lambda: done(queue))
    assert did == ["next"]
    (letter,) = dead(queue)
    assert (letter.number, letter.body, letter.tries) == (1, body, 1)
    assert letter.error.startswith(error)


ENVELOPE = """<?xml version="1.0"?>%s
<e:Envelope xmlns:e="http://schemas.xmlsoap.org/soap/envelope/"><e:Body>%s</e:Body></e:Envelope>"""
NOTE = '<note xmlns="urn:test:work"><text>%s</text></note>'
LAUGHS = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
BOMB = f'<!DOCTYPE e:Envelope [<!ENTITY l0 "ha">{LAUGHS}]>'
FILE = '<!DOCTYPE e:Envelope [<!ENTITY l9 SYSTEM "file:///etc/passwd">]>'


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("no XML", "Client.XMLSyntaxError"),
        (ENVELOPE % ("", ""), "Client.Unreadable"),
        (ENVELOPE % ("", '<no_such_method xmlns="urn:test:work"/>'), "Client."),
        (ENVELOPE % ("", NOTE % ""), "Client.SchemaValidationError: <string>"),
        (ENVELOPE % (BOMB, NOTE % "&l9;"), "Client."),
        (ENVELOPE % (FILE, NOTE % "&l9;"), "Client."),
        (ENVELOPE % ("", NOTE % ("<a>" * 1000 + "</a>" * 1000)), "Client.XMLSyntaxError"),
    ],
    ids=["no XML", "empty", "no such method", "invalid", "billion laughs", "a file", "deep"],
)
def test_what_is_no_good_envelope_is_dead_at_once(queue: Queue, request_: str, error: str) -> None:
    did: list[str] = []
    app = application(lambda ctx, text: did.append(text), soap_protocols)
    queue.push({"request": request_})
    Producer(queue, app).service.note("next")
    with serving(consumer(queue, app, backoff=600)):
        wait_for(lambda: done(queue))
    assert did == ["next"]
    (letter,) = dead(queue)
    assert letter.error.startswith(error)


def test_entities_are_not_expanded_without_a_validator_either(queue: Queue) -> None:
    did: list[str] = []
    app = application(lambda ctx, text: did.append(text), lambda: (Soap11(), Soap11()))
    queue.push({"request": ENVELOPE % (BOMB, NOTE % "&l9;")})
    queue.push({"request": ENVELOPE % (FILE, NOTE % "&l9;")})
    with serving(consumer(queue, app, backoff=600)):
        wait_for(lambda: done(queue))
    assert not any(did)


def test_a_fault_of_the_client_is_not_tried_again(queue: Queue) -> None:
    did: list[str] = []

    def does(ctx: MethodContext, text: str) -> None:
        did.append(text)
        if text == "bad":
            raise Fault("Client.NoSuchCustomer", "Ann is no customer")

    service = Producer(queue, application()).service
    service.note("bad")
    service.note("good")
    with serving(consumer(queue, application(does), backoff=600)):
        wait_for(lambda: done(queue))
    assert did == ["bad", "good"]
    assert [letter.error for letter in dead(queue)] == ["Client.NoSuchCustomer: Ann is no customer"]


def test_an_outage_is_not_the_calls_fault(queue: Queue) -> None:
    did: list[int] = []

    def does(ctx: MethodContext, text: str) -> None:
        did.append(ctx.transport.attempt)
        if len(did) < 4:
            raise StoreUnavailable("out of reach")

    Producer(queue, application()).service.note("Ann")
    with serving(consumer(queue, application(does), retries=0)):
        wait_for(lambda: done(queue))
    assert did == [1, 1, 1, 1]
    assert dead(queue) == []


def test_a_bad_call_is_not_passed_over_when_it_cannot_be_put_away(
    queue: Queue, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = deadletters.DeadLetters.put
    refused: list[int] = []

    def fail_once(letters: deadletters.DeadLetters, letter: DeadLetter) -> None:
        if not refused:
            refused.append(letter.number)
            raise StoreUnavailable("out of reach")
        put(letters, letter)

    monkeypatch.setattr(deadletters.DeadLetters, "put", fail_once)
    did: list[str] = []
    queue.push({"request": "no JSON"})
    Producer(queue, application()).service.note("next")
    with serving(consumer(queue, application(lambda ctx, text: did.append(text)))):
        wait_for(lambda: done(queue))
    assert refused == [1]
    assert [letter.number for letter in dead(queue)] == [1]
    assert did == ["next"]


class SpeechlessError:
    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_a_fault_without_words_is_a_dead_letter_too(queue: Queue) -> None:
    def does(ctx: MethodContext, text: str) -> None:
        if text == "bad":
            raise Fault("Client.Odd", SpeechlessError())
        did.append(text)

    did: list[str] = []
    for text in ("bad", "good"):
        Producer(queue, application()).service.note(text)
    with serving(consumer(queue, application(does), retries=0)):
        wait_for(lambda: did == ["good"])
    assert [letter.number for letter in dead(queue)] == [1]


def test_a_dead_letter_can_be_delivered_once_more(queue: Queue) -> None:
    known: list[str] = []
    did: list[str] = []

    def does(ctx: MethodContext, text: str) -> None:
        did.append(text)
        if text not in known:
            raise Fault("Client.NoSuchCustomer", text)

    Producer(queue, application()).service.note("Ann")
    # It looks for what is to be delivered once more when it renews its lease.
    with serving(consumer(queue, application(does), lease=0.6)):
        wait_for(lambda: dead(queue))
        queue.redeliver("worker", 1)
        wait_for(lambda: [letter.tries for letter in dead(queue)] == [2])
        known.append("Ann")
        queue.redeliver("worker", 1)
        wait_for(lambda: not dead(queue))
    assert did == ["Ann"] * 3


def test_a_worker_that_is_killed_leaves_its_call_to_its_successor(tyrant_server: ServerProcess) -> None:
    queue = Queue(tyrant_server.url, "tasks", prefix="killed.")
    producer = Producer(queue, application())
    producer.service.note("Ann")
    producer.service.note("Bob")
    reading, writing = os.pipe()

    def begins(ctx: MethodContext, text: str) -> None:
        os.write(writing, text.encode())
        time.sleep(PATIENCE)

    child = os.fork()
    if child == 0:
        try:
            consumer(queue, application(begins), lease=1.0).serve_forever()
        finally:
            os._exit(1)
    try:
        assert os.read(reading, 10) == b"Ann"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    did: list[tuple[str, int]] = []
    successor = consumer(queue, application(lambda ctx, text: did.append((text, ctx.transport.attempt))), lease=1.0)
    with serving(successor):
        wait_for(lambda: done(queue))
    assert did == [("Ann", 2), ("Bob", 1)]
    assert dead(queue) == []


# -- what is not even pushed


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda service: service.no_such_method(), ResourceNotFoundError, "no_such_method"),
        (lambda service: service.note("Ann", 2, 3), TypeError, "takes 2 arguments, and got 3"),
        (lambda service: service.note("Ann", time=2), TypeError, "no argument 'time'; it has text, times"),
        (lambda service: service.note("Ann", text="Bob"), TypeError, "two values for 'text'"),
        (lambda service: service.note("Ann", "often"), ValidationError, "often"),
        (lambda service: service.note("Ann", 0), ValidationError, "0"),
        (lambda service: service.note(), ValidationError, "text"),
        (lambda service: service.note(object()), TypeError, "not JSON serializable"),
        (lambda service: service.bare(1), TypeError, "bare"),
    ],
)
def test_a_call_that_no_consumer_could_do_is_refused_at_once(
    queue: Queue, call: Callable[[Any], object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        call(Producer(queue, application()).service)
    assert queue.report().end == 1


def test_a_call_raises_when_the_store_is_out_of_reach() -> None:
    service = Producer(Queue(f"127.0.0.1:{free_port()}", "tasks"), application()).service
    with pytest.raises(StoreUnavailable):
        service.note("Ann")


# -- installation, and the example


def test_without_spyne_the_error_has_the_line_to_type() -> None:
    imports = "import beaker_statestore.fanout; import beaker_statestore.spynetransport"
    code = f"import sys; sys.modules['spyne'] = None; {imports}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "MissingDriverError" in run.stderr.splitlines()[-1]
    assert 'pip install "beaker-statestore[spyne]"' in run.stderr


@pytest.mark.parametrize("protocol", ["soap", pytest.param("json", marks=pytest.mark.long)])
def test_the_example_runs_as_two_processes(tyrant_server: ServerProcess, protocol: str) -> None:
    command = [sys.executable, "-m", "wsgi_demo.tasks", "--url", tyrant_server.url, "--protocol", protocol]
    worker = subprocess.Popen(
        [*command, "worker", "mailer", "--start", "beginning"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        call = subprocess.run([*command, "call", "greet", "Ann", "2"], capture_output=True, text=True, timeout=PATIENCE)
        assert call.stdout == f"task 1 is in the queue tasks.{protocol}\n", call.stderr
        wait_for(lambda: done(Queue(tyrant_server.url, f"tasks.{protocol}"), "mailer"))
        worker.send_signal(signal.SIGTERM)
        output, errors = worker.communicate(timeout=PATIENCE)
    finally:
        worker.kill()
        worker.wait()
    lines = output.splitlines()
    assert lines[1:] == [
        "mailer does task 1, greet (1)",
        "mailer: Hello, Ann!",
        "mailer: Hello, Ann!",
        "mailer has stopped",
    ], errors
    assert worker.returncode == 0
