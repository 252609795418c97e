"""The demo's four processes: started, watched, and stopped so that none is left behind."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from beaker_statestore import ports
from beaker_statestore.exceptions import StateStoreError

__all__ = ["DEFAULT_PORTS", "Demo", "Process", "ProcessFailed", "free_ports"]

HOST = "127.0.0.1"
INI = Path(__file__).parent.parent / "ini" / "development.ini"
#: By the process that listens there.
DEFAULT_PORTS: Mapping[str, int] = {"store": 1978, "web": 8080, "mail": 8823, "outbox": 8824}

#: How long a process may take to listen, and to end when told to, in seconds.
START_TIME = 20.0
STOP_TIME = 5.0
PAUSE = 0.02

#: prctl(2): the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


class ProcessFailed(StateStoreError):  # noqa: N818 - what happened, not what is wrong
    """A process did not start, or ended by itself; the message says why, and what to do."""


class Process:
    """One child process that listens on a port."""

    def __init__(self, name: str, arguments: list[str], port: int, log: Path) -> None:
        """:param arguments: for the Python interpreter."""
        self.name = name
        self.port = port
        self.log = log
        self.arguments = arguments
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Its process id, once it has been started."""
        return None if self._child is None else self._child.pid

    def start(self) -> None:
        """Start it; `wait_until_up` says when it is ready."""
        with self.log.open("ab") as log, _signals_held_back() as usual:
            # In a session of its own, so that Ctrl-C reaches only us, and we end the children in good order.
            self._child = subprocess.Popen(  # noqa: S603 - our own modules
                [sys.executable, *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=functools.partial(_prepare, os.getpid(), usual),
            )

    def wait_until_up(self) -> None:
        """Return when somebody listens on its port.

        :raises ProcessFailed: it ended instead, or took longer than `START_TIME`.
        """
        deadline = time.monotonic() + START_TIME
        while time.monotonic() < deadline:
            self.check()
            try:
                socket.create_connection((HOST, self.port), timeout=1).close()
            except OSError:
                time.sleep(PAUSE)
            else:
                return
        raise ProcessFailed(f"{self.name} does not listen on port {self.port} after {START_TIME:.0f} s{self._tail()}")

    def check(self) -> None:
        """:raises ProcessFailed: it has ended."""
        status = None if self._child is None else self._child.poll()
        if status is not None:
            raise ProcessFailed(f"{self.name} ended with status {status}{self._tail()}")

    def kill(self) -> None:
        """End it at once, as a crash would (SIGKILL)."""
        if self._child is not None:
            self._child.kill()
            self._child.wait(STOP_TIME)

    def stop(self) -> None:
        """Ask it to end, and make it end if it does not."""
        if self._child is None:
            return
        self._child.terminate()
        try:
            self._child.wait(STOP_TIME)
        except subprocess.TimeoutExpired:
            self.kill()

    def _tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:] if self.log.exists() else []
        return "".join(f"\n    {line}" for line in [f"; the end of {self.log}:", *lines])


class Demo:
    """The store's server, the outbox, the mail application and the web application."""

    def __init__(self, directory: Path, numbers: Mapping[str, int]) -> None:
        """:param directory: for the state, the mails and the logs. :param numbers: the ports, as `DEFAULT_PORTS`."""
        self.directory = directory
        self.ports = numbers
        self.base_url = f"http://{HOST}:{numbers['web']}"
        options = {
            "beaker.session.url": f"{HOST}:{numbers['store']}",
            "demo.base_url": self.base_url,
            "demo.web": f"{HOST}:{numbers['web']}",
            "demo.smtp": f"{HOST}:{numbers['mail']}",
            "demo.relay": f"{HOST}:{numbers['outbox']}",
            "demo.outbox": str(directory / "outbox"),
        }
        settings = [str(INI), *(word for name, value in options.items() for word in ("--set", f"{name}={value}"))]
        serve = ["serve", "--listen", f"{HOST}:{numbers['store']}", "--db", str(directory / "state.lmdb")]
        self.processes = {
            "store": self._process("store", ["-m", "beaker_statestore", *serve]),
            "outbox": self._process("outbox", ["-m", "wsgi_demo.outbox", *settings]),
            "mail": self._process("mail", ["-m", "wsgi_demo.mail", *settings]),
            "web": self._process("web", ["-m", "wsgi_demo.web", *settings]),
        }

    def _process(self, name: str, arguments: list[str]) -> Process:
        return Process(name, arguments, self.ports[name], self.directory / f"{name}.log")

    def __enter__(self) -> Demo:
        """:raises ProcessFailed: a port is taken, or a process did not start."""
        for name, port in self.ports.items():
            _require_free(name, port)
        self._make_directory()
        try:
            for process in self.processes.values():
                process.start()
            for process in self.processes.values():
                process.wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            for process in self.processes.values():
                process.log.unlink(missing_ok=True)  # of an earlier run
        except OSError as error:
            raise ProcessFailed(
                f"cannot use the directory {self.directory} ({error.strerror}): choose another with --var"
            ) from error

    def check(self) -> None:
        """:raises ProcessFailed: one of the processes has ended."""
        for process in self.processes.values():
            process.check()

    def stop(self) -> None:
        """Stop all, the store last: the others may still be writing."""
        for process in reversed(self.processes.values()):
            process.stop()


def free_ports() -> dict[str, int]:
    """Ports that nobody uses at the moment, one for each process."""
    sockets = {name: socket.create_server((HOST, 0)) for name in DEFAULT_PORTS}
    try:
        return {name: listener.getsockname()[1] for name, listener in sockets.items()}
    finally:
        for listener in sockets.values():
            listener.close()


def _require_free(name: str, port: int) -> None:
    try:
        socket.create_server((HOST, port)).close()
    except OSError as error:
        by = ports.holder(port)
        raise ProcessFailed(
            f"port {port}, for the {name} process, cannot be used ({os.strerror(error.errno or 0)}"
            f"{f'; {by} listens there' if by else ''}): free it, or choose another with --{name}-port "
            "(for a second demo, another --var, too)"
        ) from error


@contextmanager
def _signals_held_back() -> Iterator[set[int]]:
    """Signals wait until the block is left: one that raised within it could lose us a child that is just starting."""
    usual = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
    try:
        yield {int(number) for number in usual}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, usual)


def _prepare(parent: int, signals: set[int]) -> None:
    """In the child, before it becomes the program: have it ended when we die, even if by SIGKILL."""
    signal.pthread_sigmask(signal.SIG_SETMASK, signals)
    if _libc is not None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            # It died before we could say so.
            os.kill(os.getpid(), signal.SIGTERM)
