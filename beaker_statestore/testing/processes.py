"""Real processes for tests: a server, and forks. Everything waits with a deadline, and ends only what it started."""

from __future__ import annotations

import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Final, TypeVar

__all__ = ["ServerProcess", "fork", "free_port"]

T = TypeVar("T")

#: How long a process may take for what it is asked, in seconds: to start, to stop, to answer.
PATIENCE: Final = 30.0
_HOST: Final = "127.0.0.1"


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody listens at, and that the system does not soon give to others."""
    with socket.socket() as listener:
        # As servers do, or the port would be refused to them while old connections to it linger.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_HOST, 0))
        return int(listener.getsockname()[1])


class ServerProcess:
    """``statestore serve`` as a process, on an address that stays the same from start to start.

    ::

        with ServerProcess(f"lmdb://{tmp_path}/state.lmdb") as server:
            store = open_store(server.url)
            ...
            server.kill()       # as a crash would
            server.start()

    Leaving the block stops the server, and asserts that it ended well unless it has been killed.
    """

    def __init__(
        self, db: str = "memory:", *, unix: str | os.PathLike[str] | None = None, arguments: Sequence[str] = ()
    ) -> None:
        """
        :param db: what ``--db`` gets: the URL of a local store, or a path.
        :param unix: the path of a Unix socket to listen at, instead of a free TCP port.
        :param arguments: more of them for ``serve``.
        """
        self._port = None if unix is not None else free_port()
        self._unix = None if unix is None else os.fspath(unix)
        #: Where the server is, as `open_store` wants it.
        self.url = f"{_HOST}:{self._port}" if unix is None else f"unix:{self._unix}"
        self._command = [
            sys.executable,
            "-m",
            "beaker_statestore",
            "serve",
            "--listen",
            self.url,
            "--db",
            db,
            *arguments,
        ]
        self._process: subprocess.Popen[bytes] | None = None
        self._output: IO[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process id of the running server."""
        return self._running().pid

    @property
    def output(self) -> str:
        """What this server, or the one that has ended, has printed since it was started."""
        if self._output is None:
            return ""
        return Path(self._output.name).read_text(errors="replace")

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "the server has not been started, or has been stopped"
        return self._process

    def start(self) -> None:
        """Start the server and return when it accepts connections.

        :raises AssertionError: it does not within `PATIENCE` seconds, or ends instead; with what it printed.
        """
        assert self._process is None, "the server is running"
        self._discard_output()
        # A file and no pipe: nobody has to read it for the server to go on.
        self._output = tempfile.NamedTemporaryFile(prefix="statestore-server-")  # noqa: SIM115 - lives as long as we
        self._process = subprocess.Popen(  # noqa: S603 - runs this Python with this package
            self._command, stdin=subprocess.DEVNULL, stdout=self._output, stderr=subprocess.STDOUT
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            accepted = self._accepts()
            # Asked after the above: it may have been somebody else who answered at our port.
            code = self._process.poll()
            if code is not None:
                self._process = None
                raise AssertionError(f"the server ended with exit code {code}:\n{self.output}")
            if accepted:
                return
            if time.monotonic() >= deadline:
                self.kill()
                raise AssertionError(f"the server did not accept connections in {PATIENCE:.0f} s:\n{self.output}")
            time.sleep(0.01)

    def _accepts(self) -> bool:
        family = socket.AF_INET if self._unix is None else socket.AF_UNIX
        with socket.socket(family) as probe:
            probe.settimeout(1.0)
            return probe.connect_ex((_HOST, self._port) if self._unix is None else self._unix) == 0

    def stop(self) -> None:
        """End the server in order (SIGTERM).

        :raises AssertionError: it does not end within `PATIENCE` seconds, or not with exit code 0.
        """
        process = self._running()
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGCONT)  # a paused one would not notice
        try:
            code = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"the server did not stop in {PATIENCE:.0f} s:\n{self.output}") from None
        self._process = None
        assert code == 0, f"the server stopped with exit code {code}:\n{self.output}"

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL)."""
        process = self._running()
        process.kill()
        process.wait(PATIENCE)
        self._process = None

    def pause(self) -> None:
        """Let the server hang (SIGSTOP): it keeps its connections and answers none, until `resume`."""
        self._running().send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let the server go on after `pause`."""
        self._running().send_signal(signal.SIGCONT)

    def _discard_output(self) -> None:
        if self._output is not None:
            self._output.close()
            self._output = None

    def __enter__(self) -> ServerProcess:
        try:
            self.start()
        except BaseException:
            self._discard_output()  # as there will be no __exit__
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._process is not None:
                if error is None:
                    self.stop()
                else:  # whose failure must not be hidden behind another
                    self.kill()
        finally:
            self._discard_output()


def fork(function: Callable[[], T]) -> T:
    """What ``function`` answers in a forked child, which then ends at once.

    :raises AssertionError: it raised an exception, or gave no answer within `PATIENCE` seconds.
    """
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        # From Python 3.12 on, a fork beside other threads is warned of; that it works is what is tested here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            try:
                answer = pickle.dumps((True, function()))
            except BaseException:  # noqa: BLE001 - whatever it is, the parent tells
                answer = pickle.dumps((False, traceback.format_exc()))
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(answer)
        finally:
            os._exit(0)
    os.close(writing)
    try:
        answer = _read_to_end(reading)
    finally:
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert answer, "the child ended without an answer"
    good, value = pickle.loads(answer)  # noqa: S301 - our own child wrote it
    assert good, f"in the child:\n{value}"
    result: T = value
    return result


def _read_to_end(pipe: int) -> bytes:
    parts: list[bytes] = []
    deadline = time.monotonic() + PATIENCE
    while True:
        ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"the child gave no answer in {PATIENCE:.0f} s"
        part = os.read(pipe, 65536)
        if not part:
            return b"".join(parts)
        parts.append(part)
