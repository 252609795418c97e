"""What a server tells about itself: ``ext statistics`` on the wire, and ``statestore stats``."""

from __future__ import annotations

import asyncio
import io
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
from rich.console import Console

from beaker_statestore import extensions, observe, stats
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
from beaker_statestore.tyrant.server import SCANS, ServerLimits, ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import PATIENCE, ServerThread

ASK = EXT(STATISTICS, b"", b"", 0)
SERVER = "statestore server"
ALTERNATE_SCREEN = "\x1b[?1049h"


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


def test_who_asks_for_statistics_waits_for_no_scan() -> None:
    with ServerThread(MemoryStore(), options=TELLING) as server, server.connect() as client:
        scanning = server._server._scanning
        for _ in range(SCANS):
            asyncio.run_coroutine_threadsafe(scanning.acquire(), server._server._loop).result(PATIENCE)
        assert client.ask(ASK)[0].status == SUCCESS


class FullStore(MemoryStore):
    full = False

    def apply(self, operations: Sequence[Any]) -> list[Any]:
        if self.full:
            raise OSError("the disk is full")
        return super().apply(operations)


def test_a_batch_with_a_request_that_failed_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[bool] = []

    class Listener(observe.Listener):
        def clock(self) -> int:
            return 1

        def operation(self, server: str, kind: str, began: int, *rest: int, failed: bool = False) -> None:
            if kind == "batch":
                told.append(failed)

    monkeypatch.setattr(observe, "listener", Listener())
    store = FullStore()
    with ServerThread(store) as server, server.connect() as client:
        assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
        store.full = True
        assert client.ask(PUT(b"k", b"v")) == [Reply(STORE_FAILED)]
        store.full = False
        assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
    assert told == [False, True, False]


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
    # Nor what its sweeps and looks found, which would be taken for what clients find; and one name for one thing.
    told = {"Total Operations", "Hits", "Hit Ratio", "Errors", "Servers", "Connections Refused"}
    assert not told & (ours.keys() | batch.keys() - {"Errors"})


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
    first, second = (n for n, line in enumerate(lines) if line and not line.startswith(" "))
    assert lines[first].startswith(f"{SERVER}  Version: ")
    assert lines[second].startswith("beaker_statestore")
    assert [line for line in lines if line.split()[:3] == ["put", "50", "0"]]
    assert "  Commands" in [line.rstrip() for line in lines]
    assert any("50  Records" in line for line in lines)
    assert "Store Failures" not in output, "what is 0 is left out"
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


@pytest.mark.parametrize("text", [b"no json", b"[1]", b'{"a": 1}', b"\xff", b"[" * 100_000, b"1" * 5000])
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
    now = iter([100.0, 102.0, 104.0])
    monkeypatch.setattr("beaker_statestore.stats.time.monotonic", lambda: next(now))
    first = stats._Look({"n": {"Requests": 10, "Connections": 1, "C": {"get": {"Hits": 5}}, "x": "y"}}, None)
    assert first.rate("n", "Requests") == ""
    second = stats._Look(
        {"n": {"Requests": 1010, "Connections": 3, "Bytes Sent": 1, "C": {"get": {"Hits": 6}, "new": {"Hits": 1}}}},
        first,
    )
    assert second.rate("n", "Requests") == " +500/s"
    huge = stats._Look({"n": {"Requests": 2**1024 - 1}}, None)
    huge._before, huge._seconds = {"n": {"Requests": 0}}, 2.0
    assert huge.rate("n", "Requests") == ""
    assert second.rate("n", "C", "get", "Hits") == " +0.5/s"
    assert second.rate("n", "C", "new", "Hits") == second.rate("n", "Connections") == second.rate("n", "x") == ""


@pytest.mark.parametrize(
    ("title", "value", "shown"),
    [
        ("Requests", 99999, "99,999"),
        ("Requests", 1234567, "1.23M"),
        ("Requests", 10**300, "1e+288T"),
        ("Last Sweep", 2**1024 - 1, str(2**1024 - 1)),
        ("Last Sweep", 1e300, "1e+300"),
        ("Last Sweep", float("nan"), "nan"),
        ("Uptime (Seconds)", float("nan"), "nan"),
        ("Uptime (Seconds)", 1e300, "1e+300 s"),
        ("Bytes Sent", float("inf"), "inf TiB"),
        ("Bytes Sent", 1000, "0.977 KiB"),
        ("p50 (ms)", 0.03894, "0.0389"),
        ("Bytes Sent", 1536, "1.5 KiB"),
        ("Size of Store (Bytes)", 3 * 1024**5, "3.07e+03 TiB"),
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


def test_whatever_a_server_answers_is_shown_at_any_width() -> None:
    deep: Any = 1
    for _ in range(500):
        deep = {"deeper": deep}
    odd = {
        "Last Sweep": 1e300,
        "Uptime (Seconds)": float("nan"),
        "Requests": 10**400,
        "Table": {"row": {"When": -1e300, "Seconds": float("inf"), "Count": 123456789, "Deep": deep}},
        "Deep": deep,
    }
    text = json.dumps({"odd": odd}).replace("NaN", "1e999").encode()
    options = ServerOptions(tcp_mask=OPEN, report=lambda _figures: text)
    with ServerThread(MemoryStore(), options=options) as server:
        for width in ("5", "20", "80"):
            result = CliRunner(env={"COLUMNS": width}).invoke(main, ["stats", str(server.address), "--no-json"])
            assert result.exit_code == 0, result.exception
        assert "1e+300" in result.output
        assert "123M" in result.output
        found = json.loads(run(str(server.address)).output, parse_constant=lambda name: pytest.fail(name))
    assert found["odd"]["Requests"] == "1" + 400 * "0"


@pytest.mark.parametrize("width", [24, 40, 80, 100])
def test_numbers_are_whole_and_first_and_columns_of_nothing_are_left_out(width: int) -> None:
    records = {
        f"kind {n}": {"Count": 12345678 + n, "Misses": 0, "Bytes Sent": 3000, "p50 (ms)": 0.123456, "p99 (ms)": 7.5}
        for n in range(3)
    }
    namespaces = {"server": {"Requests": 12345678, "Errors": 0, "Connections Accepted": 4321, "Commands": records}}
    console = Console(width=width, height=24, force_terminal=False, file=io.StringIO())
    with console.capture() as capture:
        console.print(stats._report(stats._Look(namespaces, None), width))
    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= width
    assert "Errors" not in capture.get()
    assert "Misses" not in capture.get()
    assert any("12.3M  Requests" in line for line in lines)
    assert any("4,321  Connections" in line for line in lines)
    values = ["12.3M", "2.93 KiB", "0.123", "7.5"]
    for n in range(3):
        (row,) = (line for line in lines if line.startswith(f"  kind {n}"))
        shown = row.removeprefix(f"  kind {n}").replace(" KiB", "_KiB").split()
        assert shown
        assert shown == [value.replace(" ", "_") for value in values[: len(shown)]]
    assert width < 80 or len(shown) == len(values)


def watched(arguments: Sequence[str], marks: Sequence[str], store: Store, lines: int = 60, term: str = "xterm") -> str:
    """What ``statestore stats`` shows in a terminal until it has shown all ``marks``, in order; then comes Ctrl-C."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "beaker_statestore", "stats", *arguments],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        env={**os.environ, "TERM": term, "COLUMNS": "120", "LINES": str(lines)},
    )
    os.close(slave)
    shown, everything, left = "", "", list(marks)
    deadline = time.monotonic() + PATIENCE
    try:
        while left:
            assert time.monotonic() < deadline, f"{left} was not shown: {shown}"
            store.put(b"k1", b"v")
            if select.select([master], [], [], 0.02)[0]:
                read = os.read(master, 65536).decode(errors="replace")
                shown, everything = shown + read, everything + read
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
    return everything


def _drain(master: int) -> None:
    try:
        while os.read(master, 65536):
            pass
    except OSError:
        pass


def test_in_a_terminal_it_goes_on_until_ctrl_c_with_rates(used: str) -> None:
    with open_store(used) as store:
        marks = ["every 0.1 s", SERVER, "Commands", "/s", SERVER]
        assert ALTERNATE_SCREEN in watched([used, "--every", "0.1"], marks, store)


@pytest.mark.parametrize(("lines", "term"), [(8, "xterm"), (60, "dumb")])
def test_where_a_screen_has_no_room_or_is_none_each_look_is_below_the_last(used: str, lines: int, term: str) -> None:
    with open_store(used) as store:
        marks = [SERVER, "Operations", SERVER, "/s", "Operations"]
        assert ALTERNATE_SCREEN not in watched([used, "--every", "0.1"], marks, store, lines, term)


def test_a_server_that_restarts_is_waited_for(tmp_path: Path) -> None:
    with ServerProcess(str(tmp_path / "state.lmdb")) as server:
        process = subprocess.Popen(
            [sys.executable, "-m", "beaker_statestore", "stats", server.url, "--every", "0.05"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stderr is not None
        with process.stdout, process.stderr:
            assert SERVER in process.stdout.readline()
            server.stop()
            assert server.url in process.stderr.readline()
            server.start()
            deadline = time.monotonic() + PATIENCE
            while json.loads(process.stdout.readline())["beaker_statestore"]["Process ID"] != server.pid:
                assert time.monotonic() < deadline
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        assert process.wait(PATIENCE) == 0


def test_in_a_pipe_each_look_is_a_line(used: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "beaker_statestore", "stats", "--every", "0.05", "--watch", used],
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
