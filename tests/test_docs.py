"""What the manual shows is run: the Python blocks of a page, in their order and in one namespace, on a real server."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent
from typing import Any, NamedTuple, TypeVar

import pytest
from aiosmtpd.controller import Controller
from prometheus_client.parser import text_string_to_metric_families

from beaker_statestore import observe, statistics
from beaker_statestore.report import prometheus
from beaker_statestore.statistics import EVENTS
from beaker_statestore.stores import open_store
from beaker_statestore.testing import ServerProcess, free_port

ROOT = Path(__file__).parent.parent
#: How long a block may take that is ended by a signal, in seconds.
PATIENCE = 10.0
#: Spyne's latest release cannot be imported by later Pythons.
WITHOUT_SPYNE = pytest.mark.skipif(sys.version_info >= (3, 12), reason="Spyne 2.14 does not run on Python 3.12")

pytestmark = pytest.mark.filterwarnings("ignore:Access to .* on SMTPChannel:DeprecationWarning")


T = TypeVar("T")


class Block(NamedTuple):
    """One block of a page."""

    line: int
    language: str
    source: str


class Endless(NamedTuple):
    """How to end a block that goes on for ever."""

    #: When it is time, as an expression.
    until: str
    #: Run then, in another thread. Empty: this process gets a SIGTERM, which the block has to handle.
    stop: str = ""


@dataclass(frozen=True)
class Page:
    """A page of the manual, or a section of the README, and what its blocks need that is an application's own.

    Blocks are named by a text that is in them.
    """

    path: str
    section: str = ""
    #: Run first, in the page's namespace.
    prelude: str = ""
    #: Run behind a block; says by ``assert`` what has come of it.
    after: Mapping[str, str] = field(default_factory=dict)
    #: Blocks that do not end by themselves.
    endless: Mapping[str, Endless] = field(default_factory=dict)
    #: Blocks that cannot be run, and why.
    skipped: Mapping[str, str] = field(default_factory=dict)
    #: What the namespace is called.
    module: str = "page"

    def __str__(self) -> str:
        return " ".join(filter(None, [self.path, self.section]))

    def blocks(self) -> list[Block]:
        text = (ROOT / self.path).read_text()
        if self.path.endswith(".rst"):
            found = re.finditer(r"^\.\. code-block:: (\w+)\n\n((?:   .*\n|\n)+)", text, re.M)
            return [Block(1 + text.count("\n", 0, match.start(2)), match[1], match[2]) for match in found]
        section = re.search(rf"^## {re.escape(self.section)}\n(.*?)(?=^## )", text, re.M | re.S)
        assert section is not None, f"{self.path} has no section {self.section!r}"
        return [
            Block(
                1 + text.count("\n", 0, section.start(1) + match.start(1)),
                "shell" if match[1].lstrip().startswith("pip ") else "python",
                match[1],
            )
            for match in re.finditer(r"(?:\A|(?<=\n))\n(    .*\n(?:    .*\n|\n)*)", section[1])
        ]


PAGES = [
    Page(
        "README.md",
        "Use it for mail",
        prelude="settings = {'beaker.session.url': '127.0.0.1:1978'}",
        after={
            "states_of": "assert states == {}",
            "CONFIRM = ": "assert CONFIRM.pending.name == 'pending'",
        },
    ),
    Page(
        "README.md",
        "Slates: in place of one big session",
        after={
            "slates.auth": """
assert zed.user["name"] == "Zed" and zed.names() == ["user", "visits"]
assert slates.auth.check(token) == "zed"
"""
        },
    ),
    Page(
        "README.md",
        "A queue that every consumer reads",
        endless={
            "mailer.run": Endless("'mailer' in globals() and orders.report().consumers[0].next == 2", "mailer.stop()")
        },
        after={"mailer.run": "assert printed == [\"{'order': 17}\"]"},
    ),
    Page("README.md", "Statistics", after={"make_app": "assert callable(page)"}),
    Page(
        "docs/slates.rst",
        prelude="""
addresses, number, choice, stored = ["a@example.com", "b@example.com"], 1, "keep", []
find_conflicts, store_addresses = (lambda addresses: {"1": addresses[0]}), stored.append
""",
        after={
            "Slates.from_settings": "assert slate.user['name'] == 'Zed'",
            "slate.pop": """
assert conflicts == {"1": "a@example.com"} and stored == [task]
assert task.keys() == {"addresses", "conflicts", "choice 1"}
""",
            "SlateMiddleware": """
def ask(path, cookie=""):
    headers = []
    environ = {"PATH_INFO": path, "REQUEST_METHOD": "GET", "HTTP_COOKIE": cookie}
    answer = b"".join(application(environ, lambda status, its, error=None: headers.extend(its)))
    return answer.decode(), dict(headers).get("Set-Cookie", "")

assert ask("/") == ("You are nobody.", "")
assert ask("/sign-out-others")[0] == "You are nobody."
answer, cookie = ask("/sign-in")
assert answer == "You are Zed." and f"Max-Age={2 * 14 * 86400};" in cookie
cookie = cookie.partition(";")[0]
assert ask("/sign-out-others", cookie)[0] == ask("/", cookie)[0] == "You are Zed."
assert ask("/sign-out", cookie)[0] == ask("/", cookie)[0] == "You are nobody."
""",
        },
    ),
    Page(
        "docs/confirmations.rst",
        module="app.handlers.news",
        prelude="""
import re, sys, types
from pathlib import Path
from salmon import mail, routing

sent = []
settings = sys.modules["config.settings"]
settings.relay = types.SimpleNamespace(deliver=sent.append)
routing.Router.defaults(host=".+")
routing.Router.HANDLERS["app.handlers.news"] = routing.DEFAULT_STATE_KEY

def arrives(who, to):
    data = f"From: {who}\\nMessage-ID: <{len(sent)}@example.com>\\n\\nHello".encode()
    routing.Router.deliver(mail.MailRequest("127.0.0.1", who, to, data))

def asks(who):
    arrives(who, "news@example.com")
    question = sent[-1]
    found = re.search("address=(.*)&secret=([0-9a-f]{32})$", question.Body, re.M)
    assert (question["From"], question["To"]) == (f"subscribe-confirm-{found[2]}@example.com", who)
    return found[2]

def page(template, **values):
    return template, values

def mail_to(address, secret):
    sent.append((address, secret))
""",
        after={
            "settings.confirmations": "assert storage.lifetime == pending.lifetime",
            "@route": """
secret = asks("zed@example.com")
assert Router.STATE_STORE.states_of("zed@example.com") == {"app.handlers.news": "CONFIRMING"}
arrives("zed@example.com", f"subscribe-confirm-{secret}@example.com")
assert Router.STATE_STORE.states_of("zed@example.com") == {"app.handlers.news": "MEMBER"}
secret = asks("ann@example.com")
arrives("ann@example.com", "nobody@example.com")
""",
            "def confirm(request)": """
params = {"address": "Ann@Example.com", "secret": secret}
template, values = confirm(types.SimpleNamespace(method="GET", params=params))
assert values["good"]
for _ in range(2):      # the second as if the first had not been answered
    request = types.SimpleNamespace(method="POST", params={**params, "by": values["by"]})
    assert confirm(request) == ("welcome.html", {})
assert states.states_of("ann@example.com") == {"app.handlers.news": "MEMBER"}
request.params["by"] = "another"
assert confirm(request) == ("confirm.html", {"good": False})
states.set("app.handlers.news", "ann@example.com", "ERROR")
request.params["by"] = values["by"]
assert confirm(request) == ("start-again.html", {})
""",
            "def subscribe(request)": """
subscribe(types.SimpleNamespace(params={"address": "Eve <eve@example.com>"}))
address, secret = sent[-1]
assert address == "eve@example.com" and confirmations.cancel("subscribe", address, secret) is not None
assert confirmations.look("subscribe", address, secret) is None
confirmations.storage.delete("subscribe", address)
""",
            "undeliverable.redeliver": """
assert undeliverable.keys() == [] and [mail.rcpt_tos for mail in mailbox] == [["nobody@example.com"]]
""",
        },
    ),
    Page(
        "docs/statistics.rst",
        prelude="""
from urllib.request import urlopen
from beaker_statestore.stores import open_store
""",
        after={
            "print(figures": """
open_store("127.0.0.1:1978").get(b"key")
assert statistics.snapshot()["Operations"]["get"]["Count"] == 1
""",
            "make_server": """
address = f"http://127.0.0.1:{server.server_port}"
try:
    assert b"beaker_statestore" in urlopen(f"{address}/", timeout=10).read()
    assert b"beaker_statestore_operation_seconds" in urlopen(f"{address}/metrics", timeout=10).read()
finally:
    server.shutdown()
    server.server_close()
""",
        },
        skipped={"pyramid": "Pyramid is not among what the tests need"},
    ),
    Page(
        "docs/queues.rst",
        prelude="""
import itertools
from beaker_statestore.router import RouterStateStorage

mails, states = [], itertools.count()
send_mail = mails.append

def tell():
    storage = RouterStateStorage.from_settings("development.ini")
    storage.set("app.news", "zed@example.com", f"STATE{next(states)}")
""",
        endless={
            "run(handle)": Endless("mails"),
            "for message in consumer": Endless("len(mails) == 2", "consumer.stop()"),
            "while True": Endless(
                "'follower' in globals() and (tell() or printed[-1].startswith('zed@example.com is '))",
                "follower.receive = end; tell()",
            ),
        },
        after={
            "mailer.receive": "queue.push({'who': 'ann@example.com'})",
            "run(handle)": "queue.push({'who': 'eve@example.com'})",
            "for message in consumer": "assert mails == ['ann@example.com', 'eve@example.com']",
        },
    ),
    Page(
        "docs/spyne.rst",
        prelude="import threading",
        endless={"serve_forever": Endless("'worker' in globals()")},
        after={
            "Producer(": "assert printed == ['it is message 1 of the queue']",
            "add_listener": """
worker = Consumer(queue, application, "mailer")
application.event_manager.add_listener("method_return_string", lambda ctx: worker.stop())
at_the_latest = threading.Timer(10, worker.stop)
at_the_latest.start()
worker.serve_forever()
at_the_latest.cancel()
assert printed[-1] == "mailer does 1 greet" and queue.report().consumers[0].behind == 0
""",
        },
    ),
]


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("memory:") as process:
        yield process


@pytest.fixture
def mailbox() -> Iterator[tuple[int, list[Any]]]:
    """The port of a mail server, and what it has taken."""
    taken: list[Any] = []

    class Handler:
        async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's
            taken.append(envelope)
            return "250 OK"

    controller = Controller(Handler(), hostname="127.0.0.1", port=free_port())
    controller.start()
    try:
        yield controller.port, taken
    finally:
        controller.stop()


class Ended(BaseException):
    """Raised in a block to end it."""


def end(*_: object, **__: object) -> None:
    """Of a signal that the block does not handle, and in place of what it calls."""
    raise Ended


@pytest.fixture
def _place(server: ServerProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty store, its INI file in the working directory, and a process in which nothing has been set up."""
    store = open_store(server.url)
    for key in store.keys(b""):
        store.delete(key)
    monkeypatch.chdir(tmp_path)
    Path("development.ini").write_text(
        f"[app:main]\nbeaker.session.url = {server.url}\nbeaker.session.events = events\n"
    )
    routing = pytest.importorskip("salmon.routing")
    monkeypatch.setattr(routing, "Router", routing.RoutingBase())
    monkeypatch.setattr(routing.Router, "LOG_EXCEPTIONS", False)
    monkeypatch.setattr("salmon.view.LOADER", None)
    config = types.ModuleType("config")
    config.settings = types.ModuleType("config.settings")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "config", config)
    monkeypatch.setitem(sys.modules, "config.settings", config.settings)
    monkeypatch.setattr(observe, "listener", observe.Listener())
    monkeypatch.setattr(logging, "statistics", {}, raising=False)
    # How soon consumers hear of a stop, in seconds.
    monkeypatch.setattr("beaker_statestore.consumers.SLICE", 0.1)
    former = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield
    for number, handler in former.items():
        signal.signal(number, handler)


def chosen(texts: Mapping[str, T], block: Block) -> T | None:
    """The one of ``texts`` that is for this block."""
    found = [value for text, value in texts.items() if text in block.source]
    assert len(found) <= 1
    return found[0] if found else None


def run_endless(code: types.CodeType, namespace: dict[str, Any], endless: Endless) -> None:
    """Run a block, and end it when it is time; a SIGUSR1 ends it at the latest."""
    over = threading.Event()
    problems: list[object] = []

    def is_due() -> bool:
        handled = bool(endless.stop) or signal.getsignal(signal.SIGTERM) is not end
        return handled and bool(eval(f"({endless.until.strip()})", namespace))

    def watch() -> None:
        deadline = time.monotonic() + PATIENCE
        try:
            while not is_due():
                assert not over.wait(0.02), "it has ended by itself"
                assert time.monotonic() < deadline, "what it was to do has not happened"
            exec(endless.stop or "os.kill(os.getpid(), signal.SIGTERM)", {**globals(), **namespace})
            assert over.wait(PATIENCE), "it does not end"
        except Exception as error:  # noqa: BLE001 - it is to fail the test, not a thread
            problems.append(error)
        if not over.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)

    watcher = threading.Thread(target=watch)
    try:
        watcher.start()
        exec(code, namespace)
    except Ended:
        assert endless.stop or problems
    finally:
        over.set()
        watcher.join()
        signal.signal(signal.SIGTERM, end)
    assert problems == []


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=str(page), marks=[WITHOUT_SPYNE] if "spyne" in page.path else []) for page in PAGES]
)
@pytest.mark.usefixtures("_place")
def test_the_blocks_of_the_manual_run(
    page: Page, server: ServerProcess, mailbox: tuple[int, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port, taken = mailbox
    addresses = {"127.0.0.1:1978": server.url, '"127.0.0.1", 8823': f'"127.0.0.1", {port}'}
    addresses['"127.0.0.1", 8081'] = f'"127.0.0.1", {free_port()}'
    printed: list[str] = []
    namespace: dict[str, Any] = {
        "__name__": page.module,
        "mailbox": taken,
        "printed": printed,
        "print": lambda *values: printed.append(" ".join(map(str, values))),
    }

    def compiled(source: str, path: str = "<an application's own>") -> types.CodeType:
        for shown, ours in addresses.items():
            source = source.replace(shown, ours)
        return compile(source, path, "exec", dont_inherit=True)

    for block in page.blocks():
        if block.language == "jinja":
            template = Path("app/templates/mail/confirm.msg")
            template.parent.mkdir(parents=True)
            template.write_text(dedent(block.source))
    exec(compiled(page.prelude), namespace)
    run, named = 0, set()
    for block in page.blocks():
        named |= {text for text in (*page.after, *page.endless, *page.skipped) if text in block.source}
        source = dedent(block.source)
        if block.language != "python" or chosen(page.skipped, block) is not None:
            continue
        code = compiled("\n" * (block.line - 1) + source, str(ROOT / page.path))
        endless = chosen(page.endless, block)
        if source.startswith("# tasks.py"):
            tasks = types.ModuleType("tasks")
            monkeypatch.setitem(sys.modules, "tasks", tasks)
            exec(code, vars(tasks))
        elif endless is not None:
            run_endless(code, namespace, endless)
        else:
            exec(code, namespace)
        run += 1
        exec(compiled(chosen(page.after, block) or ""), namespace)
    assert run, "no block of it was run"
    assert named == {*page.after, *page.endless, *page.skipped}, "one of these is for no block"


def test_no_python_of_these_pages_is_in_blocks_of_another_kind() -> None:
    for page in PAGES:
        for block in page.blocks():
            assert block.language == "python" or "import " not in block.source, f"{page.path}:{block.line}"
        if page.path.endswith(".rst"):
            others = re.sub(
                r"^\.\. code-block:: \w+\n\n(?:   .*\n|\n)+", "", (ROOT / page.path).read_text(), flags=re.M
            )
            assert re.search(r"^   (from \S+ )?import ", others, re.M) is None, page.path


def test_the_manual_says_by_which_metric_prometheus_has_each_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observe, "listener", observe.Listener())
    monkeypatch.setattr(logging, "statistics", {}, raising=False)
    statistics.install()
    for number, name in enumerate(EVENTS, start=1):
        observe.count(name, number)
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(prometheus()[0].decode())
        for sample in family.samples
        if not sample.labels
    }
    manual = (ROOT / "docs" / "statistics.rst").read_text()
    said = dict(re.findall(r"^``([^`]+)`` +``(\w+_total)``  ", manual, re.M))
    for number, event in enumerate(EVENTS.values(), start=1):
        assert samples[f"beaker_statestore_{said[event.name]}"] == number, event.name
