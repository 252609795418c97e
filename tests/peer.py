"""A Tyrant server that fails on request, at exactly the byte it is told: what clients are tested against."""

from __future__ import annotations

import contextlib
import socket
import struct
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import (
    COMMANDS,
    FAILURE,
    GET,
    MGET,
    PUT,
    PUTNR,
    RNUM,
    SUCCESS,
    Body,
    Reply,
    Request,
)
from beaker_statestore.tyrant.wire import RequestDecoder, encode_reply


class Answer(NamedTuple):
    """Bytes to send, and what to do with the connection then."""

    data: bytes
    then: Literal["go on", "close", "reset", "stall"] = "go on"


#: Given a request, the number of its connection and its own number in the whole, each from 1.
Script = Callable[[Request, int, int], "Answer | bytes"]


class Records:
    """The script of a server that works: enough of one for clients to be tested."""

    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}

    def __call__(self, request: Request, connection: int, number: int) -> bytes:
        command, arguments = request
        reply = Reply(SUCCESS, _EMPTY[command.body])
        if command is GET:
            value = self.values.get(arguments[0])
            reply = Reply(FAILURE) if value is None else Reply(SUCCESS, value)
        elif command in (PUT, PUTNR):
            self.values[arguments[0]] = arguments[1]
        elif command is MGET:
            reply = Reply(SUCCESS, [(key, self.values[key]) for key in arguments[0] if key in self.values])
        elif command is RNUM:
            reply = Reply(SUCCESS, len(self.values))
        return encode_reply(command, reply)


_EMPTY: dict[Body, object] = {
    Body.NO_REPLY: None,
    Body.NOTHING: None,
    Body.BLOB: b"",
    Body.BLOBS: [],
    Body.PAIRS: [],
    Body.INT32: 0,
    Body.INT64: 0,
    Body.DECIMAL: 0.0,
}
assert all(command.body in _EMPTY for command in COMMANDS.values() if command.name != "repl")


class Peer:
    """Accepts connections and answers what the script says, each connection in a thread of its own.

    Use it as a context manager. It can be stopped and started again, at the same address.
    """

    def __init__(self, script: Script | None = None, *, unix: bool = False, port: int = 0) -> None:
        self.script: Script = script or Records()
        #: Every request that arrived whole, in order of arrival.
        self.requests: list[Request] = []
        #: How many connections there have been, and the most that were open at once.
        self.connections = 0
        self.most_at_once = 0
        self._directory = tempfile.TemporaryDirectory() if unix else None
        self.address = Address(path=f"{self._directory.name}/socket") if self._directory else Address(port=port)
        self._lock = threading.Lock()
        self._open: dict[int, socket.socket] = {}
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition(self._lock)

    def start(self) -> None:
        self._listener: socket.socket
        if self.address.path is not None:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(self.address.path)
        else:
            self._listener = socket.socket()
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((self.address.host, self.address.port))
            self.address = Address(*self._listener.getsockname())
        self._listener.listen(128)
        self._spawn(self._accept, self._listener)

    def stop(self) -> None:
        """Stop listening and break all connections, as the death of a process does."""
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that waits in accept
        _join(self._threads[0])
        self._listener.close()
        if self.address.path is not None:
            Path(self.address.path).unlink()
        self.break_connections()
        for thread in self._threads[1:]:
            _join(thread)
        self._threads.clear()

    def __enter__(self) -> Peer:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.stop()
        if self._directory:
            self._directory.cleanup()

    def break_connections(self) -> None:
        """Close all connections."""
        with self._lock:
            for connection in self._open.values():
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def push(self, data: bytes) -> None:
        """Send bytes on all connections, asked or not."""
        with self._lock:
            for connection in self._open.values():
                connection.sendall(data)

    def wait_until_open(self, count: int) -> None:
        """Wait until exactly so many connections are open."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self._open) == count, 10), f"{len(self._open)} are open"

    def wait_for_requests(self, count: int) -> None:
        """Wait until so many requests have arrived."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.requests) >= count, 10), f"{len(self.requests)} arrived"

    def names(self) -> list[str]:
        """The names of the commands that arrived."""
        return [request.command.name for request in self.requests]

    def _spawn(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            if self.address.path is None:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.connections += 1
                number = self.connections
                self._open[number] = connection
                self.most_at_once = max(self.most_at_once, len(self._open))
                self._changed.notify_all()
            self._spawn(self._serve, connection, number)

    def _serve(self, connection: socket.socket, number: int) -> None:
        try:
            with contextlib.suppress(OSError):
                self._converse(connection, number)
        finally:
            with self._changed:
                del self._open[number]
                connection.close()
                self._changed.notify_all()

    def _converse(self, connection: socket.socket, number: int) -> None:
        decoder = RequestDecoder()
        while data := connection.recv(65536):
            decoder.feed(data)
            while (request := decoder.next()) is not None:
                with self._changed:
                    self.requests.append(request)
                    self._changed.notify_all()
                    count = len(self.requests)
                answer = self.script(request, number, count)
                answer = answer if isinstance(answer, Answer) else Answer(answer)
                connection.sendall(answer.data)
                if answer.then == "reset":
                    # With nothing to linger for, closing sends RST in place of FIN.
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if answer.then in ("close", "reset"):
                    return
                if answer.then == "stall":
                    while connection.recv(65536):
                        pass
                    return


def _join(thread: threading.Thread) -> None:
    thread.join(10)
    assert not thread.is_alive()
