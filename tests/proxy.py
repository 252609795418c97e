"""A TCP proxy between a client and a server: counts what goes over the wire, and cuts it where it is told to."""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Exchange", "Proxy"]

#: How long anything here may take, in seconds.
PATIENCE = 10.0
_HOST = "127.0.0.1"
_RECEIVE_SIZE = 65536
#: How many bytes may be noted down since a mark.
_MOST_BYTES = 64 * 1024 * 1024
#: SO_LINGER with no time to linger: closing the socket sends RST (socket(7)).
_RESET = struct.pack("ii", 1, 0)


@dataclass(eq=False)
class Exchange:
    """What a client sent on one connection, and what it got back before it sent more: one round trip."""

    #: Which connection, counted from 1.
    connection: int
    request: bytearray = field(default_factory=bytearray)
    reply: bytearray = field(default_factory=bytearray)


@dataclass
class _Cut:
    exchange: int
    way: Literal["request", "reply"]
    after: int
    late: bool
    reset: bool
    for_good: bool


class _Link:
    """One connection: a socket to the client and one to the server."""

    def __init__(self, number: int, client: socket.socket, server: socket.socket) -> None:
        self.number = number
        self.client = client
        self.server = server
        self.exchange: Exchange | None = None
        #: What the server is still to get when the client is gone.
        self.late = b""


class Proxy:
    """Forwards what comes to `port` of 127.0.0.1 to another port there, and back, until its ``with`` ends.

    ::

        with Proxy(server_port) as proxy:
            ...                             # connect to proxy.port
            proxy.mark()
            ...
            assert proxy.round_trips == 2

    Bytes are noted down before they are passed on, so whoever has got a reply finds it counted.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server((_HOST, 0))
        #: Where clients shall connect.
        self.port: int = self._listener.getsockname()[1]
        #: What has gone to and fro since `mark`, in the order in which it began.
        self.exchanges: list[Exchange] = []
        #: Whether the cut that was ordered last has been made.
        self.has_cut = False
        self._noted = 0
        self._links: set[_Link] = set()
        #: Connections to the server only, and what is still to be sent there.
        self._held: list[tuple[socket.socket, bytes]] = []
        self._connections = 0
        self._cut: _Cut | None = None
        self._down = False
        self._closing = False
        self._defect: BaseException | None = None
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._alarm, self._bell = socket.socketpair()
        self._selector.register(self._alarm, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="proxy")
        self._thread.start()

    @property
    def round_trips(self) -> int:
        """How many times since `mark` a request was followed by a reply, on all connections together."""
        with self._lock:
            return sum(bool(exchange.reply) for exchange in self.exchanges)

    @property
    def connections(self) -> int:
        """How many connections have been made, ever."""
        return self._connections

    def mark(self) -> None:
        """Count from here."""
        with self._lock:
            self._forget()

    def cut(
        self,
        exchange: int,
        way: Literal["request", "reply"],
        after: int,
        *,
        late: bool = False,
        reset: bool = False,
        for_good: bool = False,
    ) -> None:
        """Close both sides of a connection after ``after`` bytes of a request or of a reply have been passed on.

        A reply that is cut after 0 bytes: the server has done all, and the client hears nothing of it.

        :param exchange: which one from now, counted from 1. Begins to count, as `mark` does.
        :param late: of a request, the server gets the rest all the same, but not before `heal`. (What came of the
            request in one piece.)
        :param reset: by RST; otherwise by FIN.
        :param for_good: close all other connections, too, and every new one at once, until `heal`.
        """
        with self._lock:
            self._forget()
            self.has_cut = False
            self._cut = _Cut(exchange, way, after, late, reset, for_good)

    def heal(self) -> None:
        """Cut no more, and accept connections again; the server has answered what it was to get late."""
        with self._lock:
            self._cut = None
            self._down = False
            for server, rest in self._held:
                with server:
                    server.sendall(rest)
                    server.recv(_RECEIVE_SIZE)
            self._held = []

    def hang_up(self) -> None:
        """Close all connections; new ones are welcome."""
        with self._lock:
            for link in list(self._links):
                self._drop(link, reset=False)

    def close(self) -> None:
        """Close all connections, and end.

        :raises AssertionError: it does not in `PATIENCE` seconds, or something had gone wrong.
        """
        self._closing = True
        with contextlib.suppress(BrokenPipeError):  # it has seen already that it is to end
            self._bell.send(b"!")
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive(), f"the proxy did not end in {PATIENCE} s"
        self._bell.close()
        assert self._defect is None, f"the proxy failed: {self._defect!r}"

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # in the proxy's own thread

    def _run(self) -> None:
        try:
            while not self._closing:
                for key, _ in self._selector.select(PATIENCE):
                    with self._lock:
                        if key.fileobj is self._listener:
                            self._accept()
                        elif key.data in self._links:  # not closed by an event of the same turn
                            self._forward(key.data, key.fileobj is key.data.client)
        except BaseException as error:  # noqa: BLE001 - whatever it is, `close` tells
            self._defect = error
        finally:
            self.hang_up()
            for server, _ in self._held:
                server.close()
            self._selector.close()
            self._listener.close()
            self._alarm.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            if self._down:
                raise ConnectionError("an outage")
            server = socket.create_connection((_HOST, self._server_port), PATIENCE)
        except OSError:
            client.close()
            return
        self._connections += 1
        link = _Link(self._connections, client, server)
        self._links.add(link)
        for sock in (client, server):
            sock.settimeout(PATIENCE)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, link)

    def _forward(self, link: _Link, from_client: bool) -> None:
        source = link.client if from_client else link.server
        try:
            data = source.recv(_RECEIVE_SIZE)
        except ConnectionError:
            data = b""
        self._noted += len(data)
        assert self._noted <= _MOST_BYTES, "more than is sensible has gone through since the last mark"
        if not data:
            self._drop(link, reset=False)
        elif from_client:
            self._request(link, data)
        else:
            self._reply(link, data)

    def _request(self, link: _Link, data: bytes) -> None:
        exchange = link.exchange
        if exchange is None or exchange.reply:
            exchange = link.exchange = Exchange(link.number)
            self.exchanges.append(exchange)
        cut = self._due("request", exchange, len(exchange.request) + len(data))
        had = len(exchange.request)
        exchange.request += data
        if cut is None:
            self._send(link, link.server, data)
        else:
            self._send(link, link.server, data[: cut.after - had])
            if cut.late:
                link.late = data[cut.after - had :]
            self._end(link, cut)

    def _reply(self, link: _Link, data: bytes) -> None:
        exchange = link.exchange
        if exchange is None:  # an answer to what was asked before the mark
            self._send(link, link.client, data)
            return
        cut = self._due("reply", exchange, len(exchange.reply) + len(data))
        had = len(exchange.reply)
        exchange.reply += data
        if cut is None:
            self._send(link, link.client, data)
        else:
            self._send(link, link.client, data[: cut.after - had])
            self._end(link, cut)

    def _due(self, way: str, exchange: Exchange, length: int) -> _Cut | None:
        """The cut to be made now that ``exchange`` has come to ``length`` bytes in this way."""
        cut = self._cut
        if cut is None or way != cut.way or length < cut.after or self.exchanges.index(exchange) + 1 != cut.exchange:
            return None
        # Before anything is passed on that the client could act on.
        self._cut = None
        self.has_cut = True
        self._down = cut.for_good
        return cut

    def _end(self, link: _Link, cut: _Cut) -> None:
        self._drop(link, cut.reset)
        if cut.for_good:
            for other in list(self._links):
                self._drop(other, cut.reset)

    def _send(self, link: _Link, target: socket.socket, data: bytes) -> None:
        try:
            target.sendall(data)
        except ConnectionError:
            self._drop(link, reset=False)

    def _drop(self, link: _Link, reset: bool) -> None:
        if link not in self._links:
            return
        self._links.discard(link)
        for sock in (link.client, link.server):
            self._selector.unregister(sock)
            if sock is link.server and link.late:
                self._held.append((sock, link.late))
                continue
            if reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            sock.close()

    def _forget(self) -> None:
        self.exchanges = []
        self._noted = 0
        for link in self._links:
            link.exchange = None
