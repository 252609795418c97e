"""What a server tells about itself: ``ext statistics`` on the wire, and ``statestore stats``."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from beaker_statestore import extensions, stats
from beaker_statestore.cli import main
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore, Store
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.stores.tyrant import TyrantStore
from beaker_statestore.testing import ServerProcess, free_port
from beaker_statestore.tyrant.client import MissingFunctionError
from beaker_statestore.tyrant.commands import (
    EXT,
    FAILURE,
    FORBIDDEN,
    GET,
    PROBE,
    PUT,
    STATISTICS,
    STORE_FAILED,
    SUCCESS,
    TOO_MUCH,
    WAIT,
    Reply,
)
from beaker_statestore.tyrant.mask import CLOSED, OPEN, Mask
from beaker_statestore.tyrant.server import ServerLimits, ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import PATIENCE, ServerThread

ASK = EXT(STATISTICS, b"", b"", 0)
SERVER = "statestore server"


def as_json(figures: Mapping[str, Any]) -> bytes:
    return json.dumps(figures).encode()


TELLING = ServerOptions(tcp_mask=OPEN, report=as_json)


def eventually(condition: Any) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


# -- on the wire


@pytest.mark.parametrize("engine", ["memory", "always"])
def test_what_the_server_counts_is_exact(engine: str, tmp_path: Path) -> None:
    store: LocalStore = MemoryStore() if engine == "memory" else LMDBStore(tmp_path / "state.lmdb", sync="always")
    with ServerThread(store, options=TELLING) as server, ExitStack() as opened:
        clients = [opened.enter_context(server.connect()) for _ in range(5)]
        sent = 0
        for client in clients:
            requests = [PUT(b"k%d" % number, b"v" * number) for number in range(20)] + [GET(b"none")] * 3
            client.ask(*requests)
            sent += sum(len(encode_request(request)) for request in requests)
        waiter = clients[0]
        waiter.send(encode_request(EXT(WAIT, b"later", b"50000", 0)))
        sent += len(encode_request(EXT(WAIT, b"later", b"50000", 0)))
        eventually(lambda: len(server._server._waiting_room) == 1)
        with server.connect():  # one more, for a while
            clients[1].ask(EXT(WAIT, b"none", b"0", 0))
        sent += len(encode_request(EXT(WAIT, b"none", b"0", 0)))
        eventually(lambda: len(server._server._connections) == 5)
        ((status, text),) = clients[1].ask(ASK)
        found = json.loads(text)
        assert status == SUCCESS
        assert found["Connections"] == 5
        assert found["Connections at Most"] == found["Connections Accepted"] == 6
        assert found["Commands"] == {
            "put": {"Requests": 100, "Misses": 0},
            "get": {"Requests": 15, "Misses": 15},
            "ext": {"Requests": 2, "Misses": 0},
        }
        assert found["Requests"] == 117
        assert found["Records"] == 20
        assert found["Size of Store (Bytes)"] > 0
        assert found["Bytes Received"] == sent + len(encode_request(ASK))
        assert found["Bytes Sent"] == 115 + 6
        assert found["Memory Held (Bytes)"] == 0
        assert 1 <= found["Batches"] <= 115
        assert found["Requests/Batch"] == round(115 / found["Batches"], 2)
        assert (found["Waiting"], found["Waits Ended by a Record"], found["Waits Refused"]) == (1, 0, 0)
        assert found["Uptime (Seconds)"] > 0
        clients[1].ask(PUT(b"later", b""))
        assert waiter.receive(6)
        found = json.loads(clients[1].ask(ASK)[0].value)
        assert (found["Waiting"], found["Waits Ended by a Record"]) == (0, 1)


def test_without_a_report_there_is_no_such_function() -> None:
    with ServerThread(MemoryStore()) as server, server.connect() as client:
        (probe, reply) = client.ask(EXT(PROBE, b"", b"", 0), ASK)
        assert STATISTICS not in probe.value.split()
        assert reply == Reply(FAILURE)
        with open_store(str(server.address)) as store:
            assert isinstance(store, TyrantStore)
            with pytest.raises(MissingFunctionError):
                store.statistics()
    with ServerThread(MemoryStore(), options=TELLING) as server, server.connect() as client:
        assert STATISTICS in client.ask(EXT(PROBE, b"", b"", 0))[0].value.split()


@pytest.mark.parametrize("masked", ["stat", "rnum", "size", "ext"])
def test_a_mask_of_what_it_tells_closes_it(masked: str) -> None:
    options = ServerOptions(tcp_mask=Mask.of([masked], [], CLOSED), report=as_json)
    with ServerThread(MemoryStore(), options=options) as server, server.connect() as client:
        assert client.ask(ASK) == [Reply(FORBIDDEN)]


def test_a_report_that_is_too_long_or_fails_is_told_so() -> None:
    def long(_figures: Mapping[str, Any]) -> bytes:
        return bytes(100_001)

    def failing(_figures: Mapping[str, Any]) -> bytes:
        raise ValueError("a defect")

    for report, status in ((long, TOO_MUCH), (failing, STORE_FAILED)):
        options = ServerOptions(tcp_mask=OPEN, report=report)
        server = ServerThread(MemoryStore(), options=options, limits=ServerLimits(reply=100_000))
        with server, server.connect() as client:
            assert client.ask(ASK, PUT(b"k", b"")) == [Reply(status), Reply(SUCCESS)]


@pytest.mark.parametrize("name", ["wait", "statistics"])
def test_no_function_of_the_operators_has_a_name_of_ours(name: str, tmp_path: Path) -> None:
    module = tmp_path / "mine.py"
    module.write_text(f"EXTENSIONS = {{{name!r}: lambda records, key, value: value}}\n")
    with pytest.raises(ConfigurationError, match=name):
        extensions.load(str(module))


# -- of a process


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One whose statistics are this module's alone."""
    with ServerProcess("memory:", arguments=["--max-waiters", "0"]) as process:
        yield process


@pytest.fixture(scope="module")
def used(server: ServerProcess) -> str:
    """Its URL, once it has been used."""
    with open_store(server.url) as store:
        for number in range(50):
            store.put(b"k%d" % number, b"v")
            store.get(b"none")
        assert not store.wait(b"none", 0)
    return server.url


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["stats", *arguments], catch_exceptions=False)


def test_in_a_pipe_it_is_one_line_of_json(used: str) -> None:
    result = run(used)
    assert result.exit_code == 0
    (line,) = result.output.splitlines()
    found = json.loads(line)
    assert list(found) == [SERVER, "beaker_statestore"]
    server, ours = found[SERVER], found["beaker_statestore"]
    assert server["Commands"]["put"] == {"Requests": 50, "Misses": 0}
    assert server["Commands"]["get"]["Misses"] >= 50
    assert server["Records"] == 50
    assert server["Waits Refused"] == 1  # --max-waiters 0
    assert server["Sweeps"] >= 1
    assert server["Last Sweep"] == pytest.approx(time.time(), abs=600)
    assert server["Connections Refused"] == server["Requests Malformed"] == 0
    # What is counted here as everywhere: the batches with their latency, and no sessions, of which a server knows none.
    batch = ours["Operations"]["batch"]
    assert batch["Count"] == server["Batches"]
    assert 0 < batch["p50 (ms)"] <= batch["p99 (ms)"] <= batch["Max (ms)"]
    assert not [name for name in ours if "Session" in name]


def test_what_goes_wrong_is_counted(server: ServerProcess) -> None:
    before = json.loads(run(server.url).output)[SERVER]
    with open_store(server.url) as store, pytest.raises(ConfigurationError):
        store.command("vanish")
    host, _, port = server.url.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE) as client:
        client.sendall(b"nonsense\r\n")
        assert client.recv(1) == b""
    after = json.loads(run(server.url).output)[SERVER]
    assert after["Requests Forbidden"] == before["Requests Forbidden"] + 1
    assert after["Requests Malformed"] == before["Requests Malformed"] + 1


def test_for_people_there_is_a_heading_for_each_namespace_and_a_table_for_each_collection(used: str) -> None:
    output = run(used, "--no-json").output
    lines = output.splitlines()
    assert SERVER in lines
    assert "beaker_statestore" in lines
    assert lines.index(SERVER) < lines.index("beaker_statestore")
    assert [line for line in lines if line.split()[:3] == ["put", "50", "0"]]
    assert "  Commands" in [line.rstrip() for line in lines]
    assert any(line.split()[:2] == ["Records", "50"] for line in lines)
    assert "(Seconds)" not in output


@pytest.mark.parametrize("url", ["memory:", "lmdb:///nowhere/state.lmdb"])
def test_what_is_no_server_is_refused_with_the_remedy(url: str) -> None:
    result = run(url)
    assert result.exit_code == 1
    assert "is no server" in result.output
    assert "statestore serve" in result.output


def test_a_server_that_keeps_none_is_refused_with_the_remedy() -> None:
    with ServerThread(MemoryStore()) as server:
        result = run(str(server.address))
    assert result.exit_code == 1
    assert "start one of this version" in result.output


@pytest.mark.parametrize("text", [b"no json", b"[1]", b'{"a": 1}', b"\xff"])
def test_an_answer_that_is_none_is_an_error(text: bytes) -> None:
    options = ServerOptions(tcp_mask=OPEN, report=lambda _figures: text)
    with ServerThread(MemoryStore(), options=options) as server:
        result = run(str(server.address))
    assert result.exit_code == 1
    assert "answered statistics that are none" in result.output


def test_an_outage_is_an_error() -> None:
    result = run(f"127.0.0.1:{free_port()}")
    assert result.exit_code == 1
    assert "no Tyrant server answers" in result.output


def test_nothing_of_it_is_obeyed_by_a_terminal() -> None:
    hostile = {"\x1b[2Jns": {"\x1b]0;title\x07": "a\x1b[31m", "list": [{"\x9b1m": "[bold]x[/bold]"}]}}
    options = ServerOptions(tcp_mask=OPEN, report=lambda _figures: json.dumps(hostile).encode())
    with ServerThread(MemoryStore(), options=options) as server:
        output = run(str(server.address), "--no-json").output
    assert "\x1b" not in output
    assert "\x9b" not in output
    assert "[bold]x[/bold]" in output


# -- over and over


def test_rates_are_of_what_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([100.0, 102.0])
    monkeypatch.setattr("beaker_statestore.stats.time.monotonic", lambda: next(now))
    first = stats._Look({"n": {"Requests": 10, "Connections": 1, "C": {"get": {"Hits": 5}}, "x": "y"}}, None)
    assert first.rate("n", "Requests") == ""
    second = stats._Look(
        {"n": {"Requests": 1010, "Connections": 3, "Bytes Sent": 1, "C": {"get": {"Hits": 6}, "new": {"Hits": 1}}}},
        first,
    )
    assert second.rate("n", "Requests") == " +500/s"
    assert second.rate("n", "C", "get", "Hits") == " +0.5/s"
    assert second.rate("n", "C", "new", "Hits") == second.rate("n", "Connections") == second.rate("n", "x") == ""


@pytest.mark.parametrize(
    ("title", "value", "shown"),
    [
        ("Requests", 1234567, "1,234,567"),
        ("p50 (ms)", 0.03894, "0.0389"),
        ("Bytes Sent", 1536, "1.5 KiB"),
        ("Size of Store (Bytes)", 3 * 1024**5, "3,072.0 TiB"),
        ("Uptime (Seconds)", 12.345, "12.3 s"),
        ("Uptime (Seconds)", 61.0, "1 min 1 s"),
        ("Uptime (Seconds)", 3 * 3600 + 62, "3 h 1 min"),
        ("Uptime (Seconds)", 86400 * 9 + 7200, "9 d 2 h"),
        ("Process ID", 12345, "12345"),
        ("Enabled", True, "yes"),
        ("Enabled", False, "no"),
        ("x", None, ""),
        ("x", "text", "text"),
    ],
)
def test_values_are_shown_as_people_read_them(title: str, value: Any, shown: str) -> None:
    assert stats._value(title, value) == shown


def watched(arguments: Sequence[str], marks: Sequence[str], store: Store) -> str:
    """What ``statestore stats`` shows in a terminal until it has shown all ``marks``, in order; then comes Ctrl-C."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "beaker_statestore", "stats", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "60"},
    )
    os.close(slave)
    shown, left = "", list(marks)
    deadline = time.monotonic() + PATIENCE
    try:
        while left:
            assert time.monotonic() < deadline, f"{left} was not shown: {shown}"
            store.put(b"k1", b"v")
            if select.select([master], [], [], 0.02)[0]:
                shown += os.read(master, 65536).decode(errors="replace")
            if left[0] in shown:
                shown = shown.partition(left.pop(0))[2]
        process.send_signal(signal.SIGINT)
        reader = threading.Thread(target=_drain, args=(master,), daemon=True)
        reader.start()
        assert process.wait(PATIENCE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(master)
    return shown


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        pass


def test_in_a_terminal_it_goes_on_until_ctrl_c_with_rates(used: str) -> None:
    with open_store(used) as store:
        watched([used, "--watch", "0.1"], ["every 0.1 s", SERVER, "Commands", "/s", SERVER], store)


def test_in_a_pipe_each_look_is_a_line(used: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "beaker_statestore", "stats", used, "--watch", "0.05"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        looks = [json.loads(process.stdout.readline()) for _ in range(3)]
        process.send_signal(signal.SIGINT)
        process.stdout.read()
    assert process.wait(PATIENCE) == 0
    uptimes = [look[SERVER]["Uptime (Seconds)"] for look in looks]
    assert uptimes == sorted(set(uptimes))
