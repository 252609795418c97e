"""Real servers in a thread of this process, of Tyrant's protocols or of HTTP, and clients that send raw bytes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any, TypeVar

import uvloop
from waitress import wasyncore
from waitress.server import create_server

from beaker_statestore.stores.base import LocalStore
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.calls import binary_call
from beaker_statestore.tyrant.commands import PUTNR, Reply, Request
from beaker_statestore.tyrant.mask import OPEN
from beaker_statestore.tyrant.server import Server, ServerOptions
from beaker_statestore.tyrant.verbs import Executor
from beaker_statestore.tyrant.wire import Encoded, ReplyDecoder, encode_request

T = TypeVar("T")

#: How long anything here may take before a test fails, in seconds.
PATIENCE = 20.0

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}


#: All commands may be used.
UNMASKED = ServerOptions(tcp_mask=OPEN)


@contextlib.contextmanager
def served(application: Callable[..., Iterable[bytes]]) -> Iterator[int]:
    """The port of 127.0.0.1 at which waitress serves ``application``, in four threads."""
    sockets: dict[int, Any] = {}
    server = create_server(application, map=sockets, host="127.0.0.1", port=0, threads=4)
    stopping = threading.Event()

    def loop() -> None:
        # `server.run()` ends only with its sockets, and who wakes it to close them may find its wire closed already.
        while not stopping.is_set():
            wasyncore.loop(timeout=1.0, map=sockets, count=1)

    thread = threading.Thread(target=loop, name="waitress")
    thread.start()
    try:
        yield int(server.effective_port)
    finally:
        stopping.set()
        server.trigger.pull_trigger()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        server.task_dispatcher.shutdown(timeout=PATIENCE)
        wasyncore.close_all(sockets)


def carry_out(executor: Executor, *requests: Request) -> list[bytes]:
    """The binary replies to ``requests``, carried out together; fewer, if not all were carried out.

    One that has no place in a batch is to come alone.
    """
    calls = [binary_call(request) for request in requests]
    if len(requests) == 1:
        job = executor.apart(requests[0])
        if job is not None:
            while not job.step():
                pass
            return [joined(calls[0].encode(job.reply))]
    return [joined(reply) for reply in executor.execute(calls)]


def joined(encoded: Encoded) -> bytes:
    """The bytes of a reply."""
    return encoded if isinstance(encoded, bytes) else b"".join(encoded)


class ServerThread:
    """A server on a loop of its own, to be used in a ``with``, which closes the store too."""

    def __init__(
        self,
        store: LocalStore,
        *,
        address: str = "127.0.0.1:0",
        loop: str = "asyncio",
        options: ServerOptions = UNMASKED,
        **more: Any,
    ) -> None:
        """:param more: for `Server`."""
        self._store = store
        self._loop = LOOPS[loop]()
        self._defects: list[dict[str, Any]] = []
        self._loop.set_exception_handler(lambda _, context: self._defects.append(context))
        self._thread = threading.Thread(target=self._loop.run_forever, name="server")
        self._thread.start()
        self._server = Server(store, options=options, **more)
        self._stopped = False
        try:
            self.run(self._server.start([address]))
        except BaseException:
            self._end()
            raise
        (self.address,) = self._server.addresses

    def run(self, task: Coroutine[Any, Any, T]) -> T:
        """The result of ``task`` on the server's loop."""
        return asyncio.run_coroutine_threadsafe(task, self._loop).result(PATIENCE)

    def stop(self) -> None:
        """Stop the server in order; the store stays open."""
        if not self._stopped:
            self._stopped = True
            self.run(self._server.stop())

    def connect(self) -> RawClient:
        """A new client; the caller closes it."""
        return RawClient(self.address)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Let the server's loop stand still for the length of a ``with``."""
        standing, go_on = threading.Event(), threading.Event()

        def stand() -> None:
            standing.set()
            go_on.wait(PATIENCE)

        self._loop.call_soon_threadsafe(stand)
        assert standing.wait(PATIENCE)
        try:
            yield
        finally:
            go_on.set()

    def catch_up(self) -> None:
        """Return when the server has read what had been sent before, even if it cannot carry it out yet."""
        with self.connect() as client:
            client.socket.shutdown(socket.SHUT_WR)
            assert client.is_closed()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        self._store.close()
        assert not self._defects, f"exceptions that nothing in the server expected: {self._defects}"

    def __enter__(self) -> ServerThread:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.stop()
        finally:
            self._end()


class RawClient:
    """A connection that sends what it is told and no more. Everything waits `PATIENCE` seconds at most."""

    def __init__(self, address: Address) -> None:
        if address.path is None:
            self.socket = socket.create_connection((address.host, address.port), PATIENCE)
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(PATIENCE)
            self.socket.connect(address.path)
        self._decoder = ReplyDecoder()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def receive(self, length: int) -> bytes:
        """Exactly ``length`` bytes."""
        parts = []
        while length:
            part = self.socket.recv(min(length, 1 << 20))
            assert part, f"the server closed, and {length} more bytes were to come"
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def receive_to_end(self) -> bytes:
        """Everything until the server closes."""
        parts = []
        while part := self.socket.recv(1 << 20):
            parts.append(part)
        return b"".join(parts)

    def is_closed(self) -> bool:
        """Wait until the server has closed, in order or not, without sending anything more."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True

    def ask(self, *requests: Request) -> list[Reply]:
        """The replies to ``requests``, sent together."""
        for request in requests:
            self._decoder.expect(request)
        self.send(b"".join(map(encode_request, requests)))
        replies: list[Reply] = []
        while len(replies) < sum(request.command is not PUTNR for request in requests):
            data = self.socket.recv(1 << 16)
            assert data, f"the server closed after {len(replies)} replies"
            self._decoder.feed(data)
            while (message := self._decoder.next()) is not None:
                replies.append(message[1])
        return replies

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
