"""A server as a process that runs for years: signals, log, syncs, systemd, and what its limits do to real clients."""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from beaker_statestore.exceptions import ConfigurationError, StoreUnavailable
from beaker_statestore.service import INHERITED, Service
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import listening as listening_module
from beaker_statestore.tyrant import server as server_module
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import COPY, GET, MGET, OUT, PUT, PUTKEEP, RNUM, SUCCESS, TOO_MUCH, Reply
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import OPEN
from beaker_statestore.tyrant.server import Server, ServerLimits, ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import LOOPS, PATIENCE, RawClient, ServerThread

OK = Reply(SUCCESS)
SERVE = [sys.executable, "-m", "beaker_statestore", "serve"]


def eventually(condition: Callable[[], bool]) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


@pytest.fixture(params=LOOPS)
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


class Process:
    """``statestore serve``, which has said what it says at its start."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        self.process = process
        self.said = [process.stdout.readline() for _ in range(3)]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def rest(self) -> str:
        """What it says from now on until its end."""
        assert self.process.stdout is not None
        return self.process.stdout.read()


@contextmanager
def serving(*arguments: str, cwd: Path, sockets: Sequence[socket.socket] = ()) -> Iterator[Process]:
    """:param sockets: what systemd would have opened."""
    process = launched(*arguments, cwd=cwd, files=[sock.fileno() for sock in sockets])
    try:
        yield Process(process)
    finally:
        process.kill()
        process.wait(PATIENCE)
        assert process.stdout is not None
        process.stdout.close()


#: Becomes another program, with descriptors where systemd would have put them.
LAUNCHER = """
import fcntl, os, sys
files = [fcntl.fcntl(int(file), fcntl.F_DUPFD, 100) for file in sys.argv[1].split(",") if file]
for number, file in enumerate(files, 3):
    os.dup2(file, number)
    os.close(file)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=os.environ.get("LISTEN_FDS", str(len(files))))
os.execv(sys.argv[2], sys.argv[2:])
"""


def launched(*arguments: str, cwd: Path, files: Sequence[int] = ()) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-c", LAUNCHER, ",".join(map(str, files))] if files else []
    return subprocess.Popen(
        [*launcher, *SERVE, *arguments],
        cwd=cwd,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        pass_fds=list(files),
    )


def client_at(place: Path) -> RawClient:
    return RawClient(Address(path=str(place)))


MALFORMED = b"\xc8\xff"


# -- the log


def test_a_log_that_is_moved_away_begins_anew_and_nobody_notices(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    logs.mkdir()
    log = logs / "serve.log"
    arguments = ["--listen", "unix:s", "--db", "state.lmdb", "--sync", "interval", "--log", str(log), "--verbose"]
    with serving(*arguments, cwd=tmp_path) as process, client_at(tmp_path / "s") as client:
        assert "a power cut loses what was written in the last 1 s" in process.said[1]
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o600

        def is_logged() -> bool:
            with client_at(tmp_path / "s") as other:
                other.send(MALFORMED)
                assert other.is_closed()
            return log.exists() and "closing a client" in log.read_text()

        assert client.ask(PUT(b"k", b"v")) == [OK]
        eventually(is_logged)
        log.rename(logs / "serve.log.1")
        process.signal(signal.SIGHUP)
        eventually(log.exists)
        eventually(is_logged)
        assert client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
        # Who cannot log serves all the same.
        for file in logs.iterdir():
            file.unlink()
        logs.rmdir()
        process.signal(signal.SIGHUP)
        for _ in range(3):
            assert not is_logged()  # and no connection hangs
        assert client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
        logs.mkdir()
        eventually(is_logged)
        process.signal(signal.SIGTERM)
        assert process.process.wait(5) == 0
        assert "No such file or directory" in process.rest()


def test_a_log_tells_of_starts_ends_renewals_and_copies(tmp_path: Path) -> None:
    arguments = ["--listen", "unix:s", "--db", "state.lmdb", "--log", "log", "--backups", "."]
    log = tmp_path / "log"
    with serving(*arguments, cwd=tmp_path) as process, client_at(tmp_path / "s") as client:
        assert client.ask(COPY(b"monday.lmdb")) == [OK]
        process.signal(signal.SIGHUP)
        eventually(lambda: "SIGHUP" in log.read_text())
        process.signal(signal.SIGTERM)
        assert process.process.wait(5) == 0
        assert process.rest() == ""
    # After the date, the time and the level.
    assert [line.split(" ", 3)[3] for line in log.read_text().splitlines()] == [
        process.said[0].rstrip(),
        f"copied the store to {tmp_path / 'monday.lmdb'}",
        "SIGHUP: opened anew: the log",
        "SIGTERM: it takes in nothing more, and ends once all that has come is answered",
        "ended in order",
    ]


def test_systemds_sockets_find_out_who_has_vanished(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening(socket.AF_INET, ("127.0.0.1", 0)) as given:
        monkeypatch.setattr(listening_module, "_FIRST_INHERITED", given.fileno())
        monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
        monkeypatch.setenv("LISTEN_FDS", "1")
        (sock,) = listening_module.inherited()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 120
        sock.detach()  # it is closed as the one that was given


def test_without_a_log_a_hangup_ends_nothing(tmp_path: Path) -> None:
    arguments = ["--listen", "unix:s", "--db", "memory:", "--socket-mode", "660", "--max-reply", "1"]
    with serving(*arguments, cwd=tmp_path) as process, client_at(tmp_path / "s") as client:
        assert stat.S_IMODE((tmp_path / "s").stat().st_mode) == 0o660
        value = bytes(600 * 1024)
        assert client.ask(PUT(b"a", value), PUT(b"b", value)) == [OK, OK]
        for _ in range(3):
            process.signal(signal.SIGHUP)
        assert client.ask(MGET([b"a", b"b"]), MGET([b"a"])) == [
            Reply(TOO_MUCH),
            Reply(SUCCESS, [(b"a", value)]),
        ]
        process.signal(signal.SIGTERM)
        assert process.process.wait(5) == 0


# -- syncs


def run_in_process(store: MemoryStore, place: Path, *, sync_interval: float) -> None:
    """Until SIGTERM."""
    with store:
        server = Server(store)
        Service(server, store, sweep_interval=0, sync_interval=sync_interval).run([f"unix:{place}"], lambda: None)


def test_syncs_go_on_though_one_fails(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Store(MemoryStore):
        syncs = 0
        thread: int | None = None

        def sync(self) -> None:
            self.syncs += 1
            self.thread = threading.get_ident()
            with client_at(tmp_path / "s") as client:  # others are served meanwhile
                assert client.ask(RNUM()) == [Reply(SUCCESS, 0)]
            if self.syncs == 2:
                raise StoreUnavailable("the disk is full")
            if self.syncs == 3:
                raise ValueError("a defect")
            if self.syncs == 6:
                os.kill(os.getpid(), signal.SIGTERM)

    store = Store()
    began = time.monotonic()
    run_in_process(store, tmp_path / "s", sync_interval=0.02)
    assert time.monotonic() - began >= 6 * 0.02
    assert 6 <= store.syncs <= 8
    assert store.thread != threading.get_ident()
    messages = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert messages == [
        "a sync failed, so a crash can lose more than the last 0.02 s: the disk is full",
        "a sync failed, so a crash can lose more than the last 0.02 s: a defect",
    ]


# -- the end


def test_terminated_under_load_it_ends_in_time_and_has_what_it_acknowledged(tmp_path: Path) -> None:
    acknowledged: list[bytes] = []

    def write(number: int) -> None:
        with client_at(tmp_path / "s") as client:
            for count in range(1_000_000):
                key = b"%d-%d" % (number, count)
                try:
                    replies = client.ask(PUTKEEP(key, bytes(1000)))
                except (AssertionError, OSError):  # it has closed
                    return
                assert replies == [OK]
                acknowledged.append(key)

    with serving("--listen", "unix:s", "--db", "state.lmdb", cwd=tmp_path) as process:
        writers = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for writer in writers:
            writer.start()
        eventually(lambda: len(acknowledged) > 200)
        with client_at(tmp_path / "s") as idle, client_at(tmp_path / "s") as halfway:
            halfway.send(encode_request(PUT(b"never", b"v"))[:-1])
            assert idle.ask(GET(b"never"))
            process.signal(signal.SIGTERM)
            assert process.process.wait(5) == 0
        for writer in writers:
            writer.join(PATIENCE)
        assert process.rest() == ""
    with LMDBStore(tmp_path / "state.lmdb") as store:
        keys = set(store.keys())
    assert keys.issuperset(acknowledged)
    assert b"never" not in keys
    assert not (tmp_path / "s").exists()


# -- systemd


@contextmanager
def listening(family: int, name: str | tuple[str, int]) -> Iterator[socket.socket]:
    with socket.socket(family) as sock:
        sock.bind(name)
        sock.listen()
        yield sock


def test_systemd_gives_the_sockets_keeps_them_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = tmp_path / "given"
    with (
        listening(socket.AF_INET, ("127.0.0.1", 0)) as tcp,
        listening(socket.AF_UNIX, str(given)) as unix,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told,
    ):
        told.bind(str(tmp_path / "notify"))
        told.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        given.chmod(0o666)
        arguments = ["--listen", "systemd", "--listen", "unix:own", "--db", "memory:"]
        with serving(*arguments, cwd=tmp_path, sockets=[tcp, unix]) as process:
            assert told.recv(100) == b"READY=1"
            port = tcp.getsockname()[1]
            assert f"127.0.0.1:{port}" in process.said[0]
            assert f"unix:{given}" in process.said[0]
            with (
                RawClient(Address("127.0.0.1", port)) as one,
                client_at(given) as two,
                client_at(tmp_path / "own") as three,
            ):
                assert one.ask(PUT(b"k", b"v")) == [OK]
                assert two.ask(GET(b"k")) == three.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
                process.signal(signal.SIGTERM)
                assert told.recv(100) == b"STOPPING=1"
            assert process.process.wait(5) == 0
        assert given.is_socket()
        assert stat.S_IMODE(given.stat().st_mode) == 0o666
        assert not (tmp_path / "own").exists()


def test_without_systemd_nobody_is_told_and_an_abstract_name_is_understood(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store(MemoryStore):
        def sync(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    run_in_process(Store(), tmp_path / "s", sync_interval=0.01)
    name = f"statestore-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.bind(f"\0{name}")
        told.settimeout(PATIENCE)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        run_in_process(Store(), tmp_path / "s", sync_interval=0.01)
        assert [told.recv(100), told.recv(100)] == [b"READY=1", b"STOPPING=1"]


def refused(*arguments: str, cwd: Path, files: Sequence[int]) -> str:
    """What is said when it does not start: one line, and exit status 1."""
    process = launched(*arguments, cwd=cwd, files=files)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 1
    assert said.startswith("Error: ")
    assert said.count("\n") == 1
    return said


def test_sockets_that_are_none_to_listen_at_are_named(tmp_path: Path) -> None:
    # One that is good comes first, and one of our own, which goes again.
    arguments = ["--listen", "unix:own", "--listen", "systemd", "--db", "memory:"]
    with (
        listening(socket.AF_INET, ("127.0.0.1", 0)) as good,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams,
        socket.socket() as idle,
        open(os.devnull) as file,
        listening(socket.AF_INET, ("0.0.0.0", 0)) as remote,
    ):
        for bad, culprit in (
            (file, "file descriptor 4 of LISTEN_FDS is no socket"),
            (datagrams, "file descriptor 4 of LISTEN_FDS is no stream socket that listens"),
            (idle, "file descriptor 4 of LISTEN_FDS is no stream socket that listens"),
            (remote, "can be reached from other machines"),
        ):
            said = refused(*arguments, cwd=tmp_path, files=[good.fileno(), bad.fileno()])
            assert culprit in said
            assert not (tmp_path / "own").exists()
        with serving(*arguments, "--allow-remote", cwd=tmp_path, sockets=[remote]) as process:
            assert "--allow-remote without --tls-ca" in process.said[0]
            assert f"0.0.0.0:{remote.getsockname()[1]}" in process.said[1]


def test_where_systemd_has_given_no_sockets_that_is_said(tmp_path: Path) -> None:
    store = MemoryStore()
    service = Service(Server(store), store, sweep_interval=0, sync_interval=None)
    with store, pytest.raises(ConfigurationError, match=r"systemd has given this process no sockets"):
        service.run([INHERITED, f"unix:{tmp_path}/own"], lambda: None)
    assert not (tmp_path / "own").exists()


# -- who is idle


def test_who_asks_for_nothing_is_closed_and_nobody_else(loop: str) -> None:
    store = MemoryStore()
    store.put(b"large", bytes(20_000_000))
    with (
        ServerThread(store, loop=loop, limits=ServerLimits(idle=0.4)) as server,
        server.connect() as idle,
        server.connect() as asking,
        server.connect() as sending,
        server.connect() as reading,
    ):
        reading.send(encode_request(GET(b"large")))
        assert idle.ask(RNUM()) == [Reply(SUCCESS, 1)]
        slowly = encode_request(PUT(b"k", bytes(100)))
        began = time.monotonic()
        for byte in slowly[:-1]:
            assert asking.ask(RNUM()) == [Reply(SUCCESS, 1)]
            sending.send(bytes((byte,)))
            reading.receive(1000)
            time.sleep(0.012)
        assert time.monotonic() - began > 1
        assert idle.is_closed()
        sending.send(slowly[-1:])
        assert sending.receive(1) == b"\0"
        assert asking.ask(RNUM()) == [Reply(SUCCESS, 2)]
        rest = 5 + 20_000_000 - 1000 * len(slowly[:-1])
        assert len(reading.receive(rest)) == rest


def test_unless_it_is_asked_for_nobody_is_closed_for_that() -> None:
    assert ServerLimits().idle == 0


# -- who is sent away


TALKING_ON = [
    (b"set k 0 0 9999999999\r\n", b"SERVER_ERROR object too large for cache\r\n"),
    (b"PUT /k HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n", b"HTTP/1.1 413 "),
    (b"POST /k HTTP/1.1\r\nHost: evil.example\r\nContent-Length: 99999999\r\n\r\n", b"HTTP/1.1 403 "),
]


@pytest.mark.parametrize(("said", "answer"), TALKING_ON, ids=["memcached", "http", "http host"])
def test_an_error_can_be_read_by_who_goes_on_sending(loop: str, said: bytes, answer: bytes) -> None:
    options = ServerOptions(tcp_mask=OPEN, http=HTTPPolicy())
    with ServerThread(MemoryStore(), loop=loop, options=options) as server, server.connect() as client:
        client.send(said)
        client.send(encode_request(PUT(b"k", b"v")) * 300_000)  # some five megabytes
        assert client.receive_to_end().startswith(answer)
        with server.connect() as other:
            assert other.ask(RNUM()) == [Reply(SUCCESS, 0)]


def test_who_was_sent_away_takes_a_place_only_for_a_while(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "LINGER", 0.3)
    with (
        ServerThread(MemoryStore(), loop=loop, limits=ServerLimits(connections=1)) as server,
        server.connect() as client,
    ):
        client.send(MALFORMED)
        assert client.receive_to_end() == b""
        with server.connect() as early:
            assert early.is_closed()

        def is_let_in() -> bool:
            with server.connect() as other:
                try:
                    return other.ask(RNUM()) == [Reply(SUCCESS, 0)]
                except (AssertionError, OSError):
                    return False

        eventually(is_let_in)
        # However much it still sends.
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            client.send(bytes(100_000_000))


def test_who_was_sent_away_does_not_keep_the_server_from_stopping(loop: str) -> None:
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        client.send(encode_request(OUT(b"k")) + MALFORMED)
        assert client.receive_to_end() == b"\1"
        began = time.monotonic()
        server.stop()
        assert time.monotonic() - began < server_module.LINGER / 2


def test_a_short_patience_leaves_time_to_read_an_error(loop: str) -> None:
    with (
        ServerThread(MemoryStore(), loop=loop, limits=ServerLimits(patience=0.2)) as server,
        server.connect() as client,
    ):
        client.send(b"set k 0 0 9999999999\r\n")
        time.sleep(0.6)  # it is busy with other things
        assert client.receive_to_end() == b"SERVER_ERROR object too large for cache\r\n"
