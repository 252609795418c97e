"""A Tyrant server: one asyncio loop between clients' sockets and any local store.

What one turn of the loop has collected, from all connections, is carried out as one batch. A store that waits for its
disk does so in a thread, while the next batch collects; then one wait serves many clients (group commit).

Whatever clients do costs bounded time and memory. A connection is not read while its own requests wait, nor carried
on while its replies are not read; it is closed when it leaves a request unfinished, or a reply unread, for too long,
or when it holds the most memory and all together hold too much. Behind a malformed request nothing is executed. When
the store cannot tell whether it has carried out a batch, those who are waiting for it are closed without an answer.

What commands mean is known to `verbs`, what bytes mean to `wire`; nothing here knows the client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar, cast

from beaker_statestore import observe
from beaker_statestore.exceptions import OutcomeUnknown, ProtocolError
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import Body, Request
from beaker_statestore.tyrant.listening import BACKLOG, listen
from beaker_statestore.tyrant.verbs import Executor, waits_for_disk
from beaker_statestore.tyrant.wire import Limits, RequestDecoder

__all__ = ["Server", "ServerLimits"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Requests in one batch, and of one connection in one batch, so that nobody waits long behind others.
BATCH: Final = 2000
SHARE: Final = 200
#: A connection is not read on while so many bytes of it wait to be carried out.
READ_AHEAD: Final = 256 * 1024
#: Connections that hold less than this do not count for the limit of memory.
LIGHT: Final = 64 * 1024
#: How long `Server.stop` lets clients read their last replies, in seconds.
DRAIN: Final = 3.0


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What clients may ask of a server."""

    #: Bytes of one request, one value, and all values of one reply.
    message: int = 64 * 1024 * 1024
    #: Bytes that all connections together may hold, of half requests and unread replies. One batch comes on top.
    memory: int = 512 * 1024 * 1024
    connections: int = 1000
    #: How long the rest of a request may take to come, and how long nothing of a reply may be read, in seconds.
    patience: float = 30.0


class Server:
    """Serves a store, which stays its owner's to close."""

    def __init__(self, store: LocalStore, *, limits: ServerLimits = ServerLimits(), allow_remote: bool = False) -> None:
        self.limits = limits
        self.wire_limits = Limits(blob=limits.message, message=limits.message)
        #: Where it listens, once it has been started.
        self.addresses: list[Address] = []
        self._allow_remote = allow_remote
        self._blocking = store.blocking
        self._executor = Executor(store, limits.message)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="statestore")
        self._listeners: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()
        self._heavy: set[_Connection] = set()
        # Connections whose turn it is, in the order in which they came.
        self._ready: dict[_Connection, None] = {}
        self._turning = False

    async def start(self, addresses: Iterable[Address | str]) -> None:
        """Listen at ``addresses``; in texts, the port 0 stands for any free one.

        :raises ConfigurationError: one cannot be listened at; then none is.
        """
        self._loop = asyncio.get_running_loop()
        try:
            for address in addresses:
                await self._listen(Address.parse(address, lowest_port=0) if isinstance(address, str) else address)
        except BaseException:
            await self.stop()
            raise

    async def _listen(self, address: Address) -> None:
        for sock in listen(address, allow_remote=self._allow_remote):
            self.addresses.append(Address.of(sock.getsockname()))
            create = self._loop.create_server if address.path is None else self._loop.create_unix_server
            self._listeners.append(await create(lambda: _Connection(self), sock=sock, backlog=BACKLOG))

    async def stop(self) -> None:
        """Listen no more, carry out and answer what has come, and close all connections, within `DRAIN` seconds."""
        for listener in self._listeners:
            listener.close()
        for address in self.addresses:
            if address.path is not None:
                Path(address.path).unlink(missing_ok=True)
        for connection in list(self._connections):
            connection.finish()
        deadline = self._loop.time() + DRAIN
        while (self._connections or self._turning) and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        self._ready.clear()
        for connection in list(self._connections):
            connection.abort("it did not read its last replies")
        await asyncio.sleep(0)  # for the loop to tell them
        self._thread.shutdown()

    async def between(self, job: Callable[[], T]) -> T:
        """The result of ``job``, which uses the store for a short while, where and as batches do."""
        if self._blocking:
            return await self._loop.run_in_executor(self._thread, job)
        return job()

    # -- what connections tell

    def admit(self, connection: _Connection) -> bool:
        """Whether there is room for ``connection``."""
        if len(self._connections) >= self.limits.connections:
            observe.count("server.connections_refused")
            return False
        self._connections.add(connection)
        return True

    def forget(self, connection: _Connection) -> None:
        """``connection`` has been lost."""
        self._connections.discard(connection)
        self._heavy.discard(connection)

    def ready(self, connection: _Connection) -> None:
        """``connection`` has something to be carried out."""
        self._ready[connection] = None
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def weigh(self, connection: _Connection) -> None:
        """``connection`` holds much memory; close those that hold most until the limit is kept."""
        self._heavy.add(connection)
        held = {heavy: heavy.held for heavy in self._heavy}
        self._heavy = {heavy for heavy, size in held.items() if size > LIGHT}
        total = sum(held.values())
        for heaviest in sorted(held, key=held.__getitem__, reverse=True):
            if total <= self.limits.memory:
                break
            total -= held[heaviest]
            self._heavy.discard(heaviest)
            heaviest.abort(f"it held {held[heaviest]} bytes of memory, the most of all")

    # -- a turn

    def _turn(self) -> None:
        """Carry out what has been collected."""
        taken: list[tuple[_Connection, int]] = []
        requests: list[Request] = []
        while self._ready and len(requests) < BATCH:
            connection = next(iter(self._ready))
            del self._ready[connection]
            share = connection.take(min(SHARE, BATCH - len(requests)))
            taken.append((connection, len(share)))
            requests += share
        if not requests:
            self._settle(taken, requests, [])
        elif self._blocking or any(map(waits_for_disk, requests)):
            batch = self._loop.run_in_executor(self._thread, self._executor.execute, requests)
            batch.add_done_callback(lambda done: self._conclude(taken, requests, done.result))
        else:
            self._conclude(taken, requests, lambda: self._executor.execute(requests))

    def _conclude(
        self, taken: list[tuple[_Connection, int]], requests: list[Request], replies: Callable[[], list[bytes]]
    ) -> None:
        """Hand out what ``replies`` answers; where it cannot, leave nobody who asked with an answer."""
        try:
            known = replies()
        except OutcomeUnknown as error:
            for connection, count in taken:
                if count:
                    connection.abort(f"whether its requests were carried out is unknown: {error}")
            taken, requests, known = [(connection, 0) for connection, count in taken if not count], [], []
        self._settle(taken, requests, known)

    def _settle(self, taken: list[tuple[_Connection, int]], requests: list[Request], replies: list[bytes]) -> None:
        """Hand out ``replies``, and give back the ``requests`` behind the last one that has been carried out."""
        start = 0
        for connection, count in taken:
            end = start + count
            try:
                connection.settle(replies[start:end], requests[max(start, len(replies)) : end])
            except Exception as error:  # noqa: BLE001 - MemoryError, say: the others are to be served all the same
                connection.abort(f"its replies could not be sent: {error!r}")
            start = end
        self._turning = bool(self._ready)
        if self._turning:
            self._loop.call_soon(self._turn)


class _Connection(asyncio.Protocol):
    """One client: busy from when it has sent something until all that is complete of it has been carried out."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = asyncio.get_running_loop()
        self._decoder = RequestDecoder(server.wire_limits)
        self._transport: asyncio.Transport
        self._peer = ""
        self._busy = False
        #: Nothing in the decoder is complete.
        self._drained = True
        #: Requests that came back from a batch.
        self._returned: list[Request] = []
        #: Nothing more is taken in, and once what has come is answered, it is closed.
        self._ending = False
        self._lost = False
        self._may_write = True
        #: How much was unread when the timer for it was set.
        self._unread = 0
        self._reply_timer: asyncio.TimerHandle | None = None
        self._frame_timer: asyncio.TimerHandle | None = None

    @property
    def held(self) -> int:
        """How many bytes are kept for it."""
        return self._decoder.buffered + (0 if self._lost else self._transport.get_write_buffer_size())

    # -- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # Asked now, since a transport may not tell once it is closed. Unix sockets have no peer names.
        self._peer = str(transport.get_extra_info("peername") or "a client")
        if not self._server.admit(self):
            self._ending = True
            self._transport.close()

    def data_received(self, data: bytes) -> None:
        if self._ending:
            return
        self._decoder.feed(data)
        self._drained = False
        if not self._busy:
            self._busy = True
            self._server.ready(self)
        elif self._decoder.buffered > READ_AHEAD:
            self._transport.pause_reading()
        self._weigh()

    def eof_received(self) -> bool:
        self.finish()
        return True  # what has been asked before is still answered

    def pause_writing(self) -> None:
        self._may_write = False
        self._watch_replies()

    def resume_writing(self) -> None:
        self._may_write = True
        if not self._transport.is_closing():
            _cancel(self._reply_timer)
        if self._busy:
            self._server.ready(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = self._ending = True
        _cancel(self._frame_timer)
        _cancel(self._reply_timer)
        self._server.forget(self)

    # -- what the server asks

    def take(self, most: int) -> list[Request]:
        """The next requests, about so many at most; `settle` follows."""
        requests, self._returned = self._returned, []
        try:
            while len(requests) < most:
                request = self._decoder.next()
                if request is None:
                    self._drained = True
                    break
                if request.command.body is Body.STREAM:
                    raise ProtocolError(f"{request.command.name} is not served here")
                requests.append(request)
        except ProtocolError as error:
            self._reject(error)
        if requests:
            _cancel(self._frame_timer)
            self._frame_timer = None
        return requests

    def settle(self, replies: list[bytes], returned: list[Request]) -> None:
        """Send ``replies``, and keep the requests that have not been carried out for the next turn."""
        if self._lost:
            return
        self._transport.write(b"".join(replies))
        self._weigh()
        self._returned = returned
        if returned or not self._drained:
            if self._may_write:
                self._server.ready(self)
            return
        self._busy = False
        if self._ending:
            self._hang_up()
            return
        self._transport.resume_reading()
        if self._decoder.midway and self._frame_timer is None:
            self._frame_timer = self._loop.call_later(self._server.limits.patience, self._check_frame)

    def finish(self) -> None:
        """Take in nothing more, and close once what has come is answered."""
        if self._ending:
            return
        self._ending = True
        if self._busy:
            self._transport.pause_reading()
        else:
            self._hang_up()

    def abort(self, why: str) -> None:
        """Close at once, whatever is under way."""
        observe.count("server.connections_aborted")
        logger.info("closing %s: %s", self._peer, why)
        self._ending = True
        self._transport.abort()

    # -- its own affairs

    def _reject(self, error: ProtocolError) -> None:
        observe.count("server.requests_malformed")
        logger.info("closing %s: %s", self._peer, error)
        # What follows is not even looked at.
        self._decoder = RequestDecoder(self._server.wire_limits)
        self._drained = True
        self._ending = True

    def _weigh(self) -> None:
        if self.held > LIGHT:
            self._server.weigh(self)

    def _hang_up(self) -> None:
        self._transport.close()  # once the replies have gone out, that is
        _cancel(self._frame_timer)
        self._watch_replies()

    def _watch_replies(self) -> None:
        _cancel(self._reply_timer)
        self._unread = self._transport.get_write_buffer_size()
        self._reply_timer = self._loop.call_later(self._server.limits.patience, self._check_replies)

    def _check_replies(self) -> None:
        if self._transport.get_write_buffer_size() < self._unread:
            self._watch_replies()  # it reads slowly, but it reads
        else:
            self.abort("it does not read its replies")

    def _check_frame(self) -> None:
        self._frame_timer = None
        if not self._busy:
            self.abort("the rest of its request did not come")


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
