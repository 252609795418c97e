"""`statestore serve` as people run it."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from beaker_statestore import ports, serve, service
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import server
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT, RNUM, STORE_FAILED, SUCCESS, Reply
from tests.serving import PATIENCE, RawClient

SERVE = [sys.executable, "-m", "beaker_statestore", "serve"]


@contextmanager
def serving(*arguments: str, cwd: Path) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process, and what it prints at its start: three lines."""
    process = subprocess.Popen(
        [*SERVE, *arguments], cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert process.stdout is not None
    try:
        yield process, [process.stdout.readline() for _ in range(3)]
    finally:
        process.kill()
        process.wait(PATIENCE)
        process.stdout.close()


def refused(*arguments: str, cwd: Path) -> str:
    """What is said when it does not start: one line, and exit status 1."""
    done = subprocess.run([*SERVE, *arguments], cwd=cwd, text=True, capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"Error: .*\n", done.stderr), done.stderr
    return done.stderr


def test_it_says_where_it_listens_what_it_serves_and_what_a_crash_can_lose(tmp_path: Path) -> None:
    arguments = ["--listen", "127.0.0.1:0", "--listen", "unix:s", "--db", "var/lib/state.lmdb"]
    with serving(*arguments, cwd=tmp_path) as (process, (first, second, third)):
        match = re.fullmatch(
            r"statestore \S+ serves var/lib/state\.lmdb \(new\) at (127\.0\.0\.1:\d+), unix:s\n", first
        )
        assert match
        assert second.startswith("In a crash: a dying process loses nothing")
        assert third.startswith("Every 600 s it removes expired documents")
        with RawClient(Address.parse(match[1])) as client, RawClient(Address(path=str(tmp_path / "s"))) as other:
            assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
            assert other.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 0
    assert (tmp_path / "var/lib/state.lmdb").exists()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_stops_in_order_when_told_to_and_keeps_what_it_has(tmp_path: Path, number: signal.Signals) -> None:
    for count in range(2):
        with serving("--listen", "unix:s", "--db", "a b%20?.lmdb", cwd=tmp_path) as (process, _):
            with RawClient(Address(path=str(tmp_path / "s"))) as client:
                assert client.ask(RNUM(), PUT(b"k", b"v")) == [Reply(SUCCESS, count), Reply(SUCCESS)]
                process.send_signal(number)
                assert process.wait(5) == 0
            assert process.stdout is not None
            assert process.stdout.read() == ""
    assert (tmp_path / "a b%20?.lmdb").exists()


@pytest.mark.parametrize(
    ("arguments", "promise"),
    [
        (["--db", "memory:"], "everything"),
        (["--db", "state.lmdb", "--sync", "always"], "nothing that was acknowledged"),
        (["--db", "lmdb:state.lmdb?map_size=1GiB", "--sync", "os"], "a power cut loses"),
    ],
)
def test_what_a_crash_can_lose_depends_on_the_store(tmp_path: Path, arguments: list[str], promise: str) -> None:
    with serving("--listen", "unix:s", *arguments, cwd=tmp_path) as (_, (_, second, _)):
        assert promise in second


@pytest.mark.parametrize("db", ["casket.tcb", "cabinet:casket.tcb", "cabinet:casket.tcb?reserve=1MiB#bnum=1000"])
def test_a_database_is_as_durable_by_its_url_as_by_its_path_and_whether_it_is_new_is_told(
    tmp_path: Path, db: str
) -> None:
    for there in ("(new)", "(1 records)"):
        with serving("--listen", "unix:s", "--db", db, cwd=tmp_path) as (process, (first, second, _)):
            assert f" serves {db} {there} at unix:s\n" in first
            assert "in the last 1 s" in second
            with RawClient(Address(path=str(tmp_path / "s"))) as client:
                assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
            process.send_signal(signal.SIGTERM)
            assert process.wait(5) == 0


#: Stands still within a transaction that writes.
HOLDER = """
import sys
from beaker_statestore.stores.lmdb import LMDBStore
def hold(verbs):
    print("writing", flush=True)
    sys.stdin.read()
LMDBStore(sys.argv[1]).apply([lambda verbs: verbs.put(b"k", b"theirs"), hold])
"""


def test_another_process_that_stalls_while_it_writes_stops_neither_reads_nor_the_end(tmp_path: Path) -> None:
    with (
        serving("--listen", "unix:s", "--db", "state.lmdb", cwd=tmp_path) as (process, _),
        RawClient(Address(path=str(tmp_path / "s"))) as client,
    ):
        assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
        with subprocess.Popen(
            [sys.executable, "-c", HOLDER, "state.lmdb"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as holder:
            try:
                assert holder.stdout is not None
                assert holder.stdout.readline() == b"writing\n"
                replies = client.ask(*[PUT(b"k", b"w"), GET(b"k")] * 20)
                assert replies == [Reply(STORE_FAILED), Reply(SUCCESS, b"v")] * 20
                process.send_signal(signal.SIGTERM)
                assert process.wait(5) == 0
            finally:
                holder.kill()


def test_a_client_that_breaks_the_protocol_is_logged_on_request(tmp_path: Path) -> None:
    with serving("--listen", "unix:s", "--db", "memory:", "--verbose", cwd=tmp_path) as (process, _):
        with RawClient(Address(path=str(tmp_path / "s"))) as client:
            client.send(b"GET / HTTP/1.1\r\n\r\n")
            assert client.is_closed()
        assert process.stdout is not None
        assert "HTTP is not spoken here" in process.stdout.readline()


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--listen", "0.0.0.0:0", "--db", "memory:"], "0.0.0.0:0 can be reached from other machines.*--allow-remote"),
        (["--listen", "nonsense:", "--db", "memory:"], "'nonsense:' is not the address"),
        (["--listen", "unix:s", "--db", "127.0.0.1:1"], "127.0.0.1:1 is on a network.*--db"),
        (["--listen", "unix:s", "--db", "tyrant://me:secret@host"], "host"),
        (["--listen", "unix:s", "--db", "nope://x"], "unknown scheme 'nope'"),
        (["--listen", "unix:s", "--db", "/proc/none/x.lmdb"], "/proc/none"),
        (["--listen", "unix:s", "--db", "file/x.lmdb"], "file for --db file/x.lmdb"),
        (["--listen", "unix:s", "--db", "directory.lmdb"], "directory.lmdb"),
        (["--listen", "unix:s", "--db", "memory:", "--sync", "os"], "--sync is for stores with a file"),
        (["--listen", "unix:s", "--db", "lmdb:x?sync=os", "--sync", "os"], "'sync' is twice"),
        (["--listen", "unix:s", "--db", "cabinet:x.tcb?sync=os", "--sync", "os"], "says sync, and --sync does"),
        (
            ["--listen", "unix:s", "--db", "casket"],
            "casket is neither a URL nor the name of a file ending in .lmdb, .tcb",
        ),
        (["--listen", "unix:s", "--db", "casket.tcb.bak"], "casket.tcb.bak is neither a URL nor"),
        (["--listen", "21981", "--db", "memory:"], "did you mean 127.0.0.1:21981?"),
        (["--unmask", "get, copy", "--db", "memory:"], "--unmask copy needs --backups"),
        (["--unmask", "functions", "--db", "memory:"], "--unmask functions needs --ext"),
        (["--unmask", "restore", "--db", "memory:"], "restore is always refused"),
        (["--mask", "get,put", "--unmask", "put", "--db", "memory:"], "put stands in --mask and in --unmask"),
    ],
)
def test_it_refuses_in_one_line_what_it_cannot_do(tmp_path: Path, arguments: list[str], culprit: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory.lmdb").mkdir()
    said = refused(*arguments, cwd=tmp_path)
    assert re.search(culprit, said), said
    assert "secret" not in said


@pytest.mark.parametrize("option", ["--sweep", "--patience"])
@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_what_is_no_number_of_seconds_is_refused(option: str, value: str) -> None:
    refused = CliRunner().invoke(serve.serve, [option, value, "--db", "memory:", "--listen", "unix:/nowhere/s"])
    assert refused.exit_code == 2
    assert f"Invalid value for '{option}'" in refused.output


def test_a_defect_in_sweeping_stops_no_server_from_stopping_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    done = []

    async def broken(*_: object) -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGTERM)
        raise ValueError("a defect")

    class Store(MemoryStore):
        def sync(self) -> None:
            done.append("sync")

    class Server(server.Server):
        async def stop(self) -> None:
            await super().stop()
            done.append("stop")

    monkeypatch.setattr(service.Service, "_sweep_for_ever", broken)
    monkeypatch.setattr(service, "_run", asyncio.run)  # which also ends if the server was not stopped
    monkeypatch.setattr(serve, "Server", Server)
    monkeypatch.setattr(serve, "open_store", lambda _: Store())
    ended = CliRunner().invoke(serve.serve, ["--db", "memory:", "--listen", f"unix:{tmp_path}/s"])
    assert ended.exit_code == 0, ended.output
    assert done == ["stop", "sync"]
    assert "a defect" in caplog.text


def test_a_taken_port_is_named_with_its_holder_and_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused("--listen", f"127.0.0.1:{port}", "--db", "memory:", cwd=tmp_path)
    assert f"port {port} of 127.0.0.1 is taken by" in said
    assert f"(process {os.getpid()})" in said
    assert "--listen" in said


def test_the_command_is_installed_under_its_name() -> None:
    command = Path(sys.executable).with_name("statestore")
    said = subprocess.run([command, "serve", "--help"], text=True, capture_output=True, timeout=PATIENCE, check=True)
    for option in ("--listen", "--db", "--sync", "--sweep", "--allow-remote"):
        assert option in said.stdout
    for limit in ("--max-connections", "--max-message", "--max-memory", "--patience"):
        assert limit in said.stdout


# -- who holds a port


def test_the_holder_of_a_port_is_found() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        holder = ports.holder(taken.getsockname()[1])
    assert holder is not None
    assert f"(process {os.getpid()})" in holder


def test_nobody_holds_a_port_that_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as once_taken:
        port = once_taken.getsockname()[1]
    assert ports.holder(port) is None
