"""A Tyrant server: one asyncio loop between clients' sockets and any local store.

What one turn of the loop has collected, from all connections, is carried out as one batch. A store that waits for its
disk does so in a thread, while the next batch collects; then one wait serves many clients (group commit).

Whatever clients do costs bounded time and memory. A connection is not read while its own requests wait, nor carried
on while its replies are not read; it is closed when it leaves a request unfinished, or a reply unread, for too long,
or when it holds the most memory and all together hold too much. Behind a malformed request nothing is executed. When
the store cannot tell whether it has carried out a batch, those who are waiting for it are closed without an answer.
What may take long (see `apart`) has no place in a batch: its connection waits for it alone. Whoever waits for a record
is told of it by whatever wrote it (see `waiting`).

What commands mean is known to `verbs`, what bytes mean to `protocols`; nothing here knows the client.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import ssl
import sys
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, islice
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from beaker_statestore import __version__, observe
from beaker_statestore.complaints import Complaints
from beaker_statestore.exceptions import OutcomeUnknown, ProtocolError
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.apart import Job, Statistics, Wait
from beaker_statestore.tyrant.backups import Backups
from beaker_statestore.tyrant.calls import Call
from beaker_statestore.tyrant.commands import STORE_FAILED, Body, Reply, Request
from beaker_statestore.tyrant.encrypted import Encrypted
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.listening import BACKLOG, SOCKET_MODE, listen
from beaker_statestore.tyrant.mask import CLOSED, OPEN, Mask
from beaker_statestore.tyrant.protocols import CallDecoder
from beaker_statestore.tyrant.verbs import Executor, Function, Reach, report, waits_for_disk
from beaker_statestore.tyrant.waiting import WaitingRoom
from beaker_statestore.tyrant.wire import Encoded, Limits, encoded_length

__all__ = ["Server", "ServerLimits", "ServerOptions"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: Requests in one batch, and of one connection in one batch, so that nobody waits long behind others.
BATCH: Final = 2000
SHARE: Final = 200
#: A connection is not read on while so many bytes of it wait to be carried out.
READ_AHEAD: Final = 256 * 1024
#: Whoever has been sent more than this at once comes after all others for as long as sending it at the rate below, in
#: bytes a second, would take.
COSTLY: Final = 1024 * 1024
COSTLY_RATE: Final = 16 * 1024 * 1024
#: If there are always others, the turns of these have such a part of the time at most, one of them in each, and wait so
#: many seconds at most for the next.
COSTLY_PART: Final = 0.2
COSTLY_PAUSE: Final = 0.2
_NOT_IN_TIME: Final = "the rest of its request did not come"
#: Connections that hold less than this do not count for the limit of memory.
LIGHT: Final = 64 * 1024
#: How long `Server.stop` lets clients read their last replies, in seconds.
DRAIN: Final = 3.0
#: So many scans are under way at a time, each for a step in a turn; others wait.
SCANS: Final = 4
#: How long a client that is sent away may go on sending, in seconds: closing at once would take the answer from it
#: that says why (RFC 9112, section 9.6).
LINGER: Final = 2.0
#: A line of the text protocols has so many bytes at most, such as a memcached ``get`` of many keys.
LONGEST_LINE: Final = 1024 * 1024


@dataclass(frozen=True, slots=True)
class ServerLimits:
    """What clients may ask of a server."""

    #: Bytes of one request and of one value.
    message: int = 64 * 1024 * 1024
    #: Bytes of all values of one reply; so much, and a batch's share of smaller ones, a connection may leave unread.
    reply: int = 64 * 1024 * 1024
    #: Bytes that all connections together may hold, of half requests and unread replies. One batch comes on top.
    memory: int = 512 * 1024 * 1024
    connections: int = 1000
    #: How long the rest of a request may take to come, and how long nothing of a reply may be read, in seconds.
    patience: float = 30.0
    #: How long a connection may ask for nothing, in seconds; 0: for ever.
    idle: float = 0.0
    #: Keys that one ``fwmkeys``, ``misc regex`` or ``misc range`` may find.
    keys: int = 100_000
    #: Elements that a request may list, as ``mget`` and ``misc`` do: all others wait for as long as it takes.
    items: int = 20_000
    #: Connections that may wait for a record at a time; never more than half of all.
    waiters: int = 500


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """Whom a server lets in, and what it lets them do."""

    #: Permit addresses that other machines can reach.
    allow_remote: bool = False
    #: The mode of Unix sockets.
    socket_mode: int = SOCKET_MODE
    #: For TCP connections; ``None``: in the clear.
    tls: ssl.SSLContext | None = None
    #: What clients may not do that come by TCP, where any program of this machine can come from.
    tcp_mask: Mask = CLOSED
    #: The same for those who come by a Unix socket.
    unix_mask: Mask = OPEN
    #: Whose HTTP requests are answered; ``None``: nobody's.
    http: HTTPPolicy | None = None
    #: The operator's ``ext`` functions, by name.
    functions: Mapping[bytes, Function] = field(default_factory=dict)
    #: Where ``copy`` writes to; ``None``: nowhere.
    backups: Backups | None = None
    #: Makes the reply to ``ext statistics`` of what the server knows; ``None``: there are no statistics.
    report: Callable[[Mapping[str, Any]], bytes] | None = None


class Server:
    """Serves a store, which stays its owner's to close."""

    def __init__(
        self, store: LocalStore, *, limits: ServerLimits = ServerLimits(), options: ServerOptions = ServerOptions()
    ) -> None:
        self.limits = limits
        self.options = options
        self.wire_limits = Limits(
            blob=limits.message,
            count=limits.items,
            message=limits.message,
            line=min(LONGEST_LINE, limits.message),
        )
        #: Where it listens, once it has been started.
        self.addresses: list[Address] = []
        self._blocking = store.blocking
        reach = Reach(
            limits.message,
            limits.reply,
            limits.keys,
            options.functions,
            options.backups,
            self._figures,
            options.report,
        )
        self._executor = Executor(store, reach)
        #: What may not run beside each other on the store does so here, if it waits for the disk.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="statestore")
        self._aside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="statestore-aside")
        self._scanning = asyncio.Semaphore(SCANS)
        self._complain = Complaints(logger)
        self._waiting_room = WaitingRoom(
            store, min(limits.waiters, limits.connections // 2), self.between, self._begin, self._complain
        )
        self._jobs: set[asyncio.Task[None]] = set()
        self._listeners: list[asyncio.Server] = []
        #: Unix sockets that were made here, and go when nobody listens any more.
        self._paths: list[Path] = []
        self._connections: set[_Connection] = set()
        # How many bytes each of those held that hold many, when it last told, and all of them together.
        self._heavy: dict[_Connection, int] = {}
        self._held = 0
        # Connections whose turn it is, in the order in which they came.
        self._ready: dict[_Connection, None] = {}
        # The same of those that have to stand back, since making their replies may take long.
        self._costly: dict[_Connection, None] = {}
        #: When it is their turn although there are others, and when this turn began, and whether it is one of theirs;
        #: by the clock, as the loop's time stands still within a turn.
        self._costly_due = self._began = 0.0
        self._for_costly = False
        self._turning = False
        self._idle_timer: asyncio.TimerHandle | None = None
        #: What statistics call the store.
        self._name = store.path or type(store).__name__
        self._started = time.monotonic()
        self._clock = self._failures = 0
        self._most = self._accepted = self._batches = self._batched = 0
        #: Bytes that have come from clients and gone to them, without what TLS adds.
        self.received = self.sent = 0

    async def start(self, addresses: Iterable[Address | str]) -> None:
        """Listen at ``addresses``; in texts, the port 0 stands for any free one.

        :raises ConfigurationError: one cannot be listened at; then none is.
        """
        self._loop = asyncio.get_running_loop()
        try:
            for address in addresses:
                parsed = Address.parse(address, lowest_port=0) if isinstance(address, str) else address
                options = self.options
                for sock in listen(parsed, allow_remote=options.allow_remote, socket_mode=options.socket_mode):
                    if parsed.path is not None:
                        self._paths.append(Path(parsed.path))
                    await self.serve_on(sock)
        except BaseException:
            await self.stop()
            raise
        self._look_for_idle()

    async def serve_on(self, sock: socket.socket) -> None:
        """Accept connections on ``sock``, which listens, and belongs to the server from now on."""
        self.addresses.append(Address.of(sock.getsockname()))
        if sock.family == socket.AF_UNIX:
            # From Python 3.13 on it would remove the socket's file, which may be systemd's.
            stays: dict[str, Any] = {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
            listener = await self._loop.create_unix_server(self._admit_unix, sock=sock, backlog=BACKLOG, **stays)
        else:
            # Linux hands it on to whoever is accepted. asyncio only sees to it where the socket says its protocol, and
            # without it a reply that follows another waits for that to be acknowledged, some 40 ms.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            listener = await self._loop.create_server(self._admit_tcp, sock=sock, backlog=BACKLOG)
        self._listeners.append(listener)

    def _admit_unix(self) -> asyncio.Protocol:
        return _Connection(self, self.options.unix_mask)

    def _admit_tcp(self) -> asyncio.Protocol:
        connection = _Connection(self, self.options.tcp_mask)
        tls = self.options.tls
        return connection if tls is None else Encrypted(connection, tls, self.limits.patience)

    async def stop(self) -> None:
        """Listen no more, carry out and answer what has come, and close all connections, within `DRAIN` seconds."""
        for listener in self._listeners:
            listener.close()
        for path in self._paths:
            path.unlink(missing_ok=True)
        _cancel(self._idle_timer)
        self._waiting_room.close()
        for connection in list(self._connections):
            connection.finish()
        deadline = self._loop.time() + DRAIN
        while (self._connections or self._turning) and self._loop.time() < deadline:
            await asyncio.sleep(0.005)
        self._ready.clear()
        self._costly.clear()
        for job in self._jobs:
            job.cancel()
        for connection in list(self._connections):
            connection.abort("it did not read its last replies")
        await asyncio.sleep(0)  # for the loop to tell them
        self._thread.shutdown()
        # A copy that is being written has to be complete before the store can be closed.
        self._aside.shutdown()

    async def between(self, job: Callable[[], T]) -> T:
        """The result of ``job``, which uses the store for a short while, where and as batches do."""
        if self._blocking:
            return await self._loop.run_in_executor(self._thread, job)
        return job()

    async def waiting(self, job: Callable[[], T]) -> T:
        """The result of ``job``, which waits for the disk; batches that do so too wait meanwhile, others do not."""
        return await self._loop.run_in_executor(self._thread, job)

    # -- what connections tell

    def admit(self, connection: _Connection) -> bool:
        """Whether there is room for ``connection``."""
        if len(self._connections) >= self.limits.connections:
            observe.count("server.connections_refused")
            self._complain("refusing a client: %d are connected, as many as may be", len(self._connections))
            return False
        self._connections.add(connection)
        self._accepted += 1
        self._most = max(self._most, len(self._connections))
        return True

    def forget(self, connection: _Connection) -> None:
        """``connection`` has been lost."""
        self._connections.discard(connection)
        self._held -= self._heavy.pop(connection, 0)

    def hurry(self, connection: _Connection) -> None:
        """If ``connection`` waits for a record, it is to wait no more."""
        self._waiting_room.dismiss(connection)

    def ready(self, connection: _Connection) -> None:
        """``connection`` has something to be carried out."""
        (self._costly if connection.costly else self._ready)[connection] = None
        if not self._turning:
            self._turning = True
            self._loop.call_soon(self._turn)

    def weigh(self, connection: _Connection) -> None:
        """``connection`` may hold more memory than before; close those that hold most until the limit is kept."""
        self._held += self._note(connection)
        if self._held <= self.limits.memory:
            return
        # They tell only when they hold more, not when their replies have gone out.
        for heavy in list(self._heavy):
            self._held += self._note(heavy)
        for heaviest in sorted(self._heavy, key=self._heavy.__getitem__, reverse=True):
            if self._held <= self.limits.memory:
                break
            size = self._heavy.pop(heaviest)
            self._held -= size
            heaviest.abort(f"it held {size} bytes of memory, the most of all")

    def _note(self, connection: _Connection) -> int:
        """Find out how much ``connection`` holds, and answer by how much that is more than was known."""
        before = self._heavy.pop(connection, 0)
        size = connection.held
        if size <= LIGHT:
            return -before
        self._heavy[connection] = size
        return size - before

    # -- a turn

    def _turn(self) -> None:
        """Carry out what has been collected."""
        taken: list[tuple[_Connection, int]] = []
        calls: list[Call] = []
        self._began = time.monotonic()
        self._clock = observe.listener.clock()
        self._failures = self._executor.failures
        self._for_costly = self._is_turn_of_costly()
        while len(calls) < BATCH:
            first = self._for_costly and not taken
            queue = self._costly if first or (self._blocking and not self._ready) else self._ready
            connection = next(iter(queue), None)
            if connection is None:
                break
            del queue[connection]
            try:
                share = connection.take(min(SHARE, BATCH - len(calls)))
            except Exception as error:  # noqa: BLE001 - a defect; without the next turn, all would wait for ever
                report(error)
                connection.abort(f"its requests could not be read: {error!r}")
                continue
            if not connection.apart:
                taken.append((connection, len(share)))
                calls += share
            if self._for_costly and not self._blocking:
                break
        if not calls:
            self._settle(taken, calls, [])
        elif self._blocking or any(call.request is not None and waits_for_disk(call.request) for call in calls):
            batch = self._loop.run_in_executor(self._thread, self._executor.execute, calls)
            batch.add_done_callback(lambda done: self._conclude(taken, calls, done.result))
        else:
            self._conclude(taken, calls, lambda: self._executor.execute(calls))

    def _is_turn_of_costly(self) -> bool:
        """Whether one of those that may take long comes first in this turn.

        It is alone in it, but for where each batch waits for the disk: there the others follow, and behind them, if
        there is room, more of those.
        """
        if not self._costly:
            return False
        return not self._ready or self._began >= self._costly_due

    def _conclude(
        self, taken: list[tuple[_Connection, int]], calls: list[Call], replies: Callable[[], list[Encoded]]
    ) -> None:
        """Hand out what ``replies`` answers; where it cannot, leave nobody who asked with an answer."""
        try:
            known = replies()
        except OutcomeUnknown as error:
            self._tell_of_batch(failed=True)
            self._waiting_room.carried_out(_requests(calls))
            for connection, count in taken:
                if count:
                    connection.abort(f"whether its requests were carried out is unknown: {error}")
            taken, calls, known = [(connection, 0) for connection, count in taken if not count], [], []
        else:
            self._tell_of_batch(failed=self._executor.failures > self._failures)
        self._waiting_room.carried_out(_requests(islice(calls, len(known))))
        self._batches += 1
        self._batched += len(known)
        self._settle(taken, calls, known)

    def _tell_of_batch(self, *, failed: bool) -> None:
        if self._clock:
            observe.listener.operation(self._name, "batch", self._clock, failed=failed)

    def _settle(self, taken: list[tuple[_Connection, int]], calls: list[Call], replies: list[Encoded]) -> None:
        """Hand out ``replies``, and give back the ``calls`` behind the last one that has been carried out."""
        ends = list(accumulate(count for _, count in taken))
        shares = [(connection, end - count, end) for (connection, count), end in zip(taken, ends, strict=True)]
        # Those first of whom nothing has been carried out: so they are the first of the next turn.
        for connection, start, end in sorted(shares, key=lambda share: share[1] < len(replies)):
            try:
                connection.settle(replies[start:end], calls[max(start, len(replies)) : end])
            except Exception as error:  # noqa: BLE001 - MemoryError, say: the others are to be served all the same
                connection.abort(f"its replies could not be sent: {error!r}")
        if self._for_costly:
            now = time.monotonic()
            self._costly_due = now + min((now - self._began) * (1 / COSTLY_PART - 1), COSTLY_PAUSE)
        self._turning = bool(self._ready or self._costly)
        if self._turning:
            self._loop.call_soon(self._turn)

    # -- apart from the turns

    def job_of(self, call: Call) -> Job | None:
        """What ``call`` is, if it must not be part of a batch."""
        return None if call.request is None else self._executor.apart(call.request)

    def carry_out_apart(self, connection: _Connection, call: Call, job: Job) -> None:
        """Carry out ``job`` and settle ``call`` with ``connection``."""
        self._begin(self._carry_out_apart(connection, call, job))

    def _begin(self, job: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)

    async def _carry_out_apart(self, connection: _Connection, call: Call, job: Job) -> None:
        try:
            if isinstance(job, Wait):
                reply = await self._waiting_room.wait(connection, job, patient=connection.stays)
            else:
                if job.waits:
                    await self._loop.run_in_executor(self._aside, job.step)
                else:
                    # An operator looks most of all when all scans are under way.
                    async with nullcontext() if isinstance(job, Statistics) else self._scanning:
                        while not await self.between(job.step) and not connection.lost:
                            await asyncio.sleep(0)
                reply = Reply(STORE_FAILED) if connection.lost else job.reply
        except Exception as error:  # noqa: BLE001 - whatever it was, the client gets an answer
            report(error)
            reply = Reply(STORE_FAILED)
        try:
            connection.settle([call.encode(reply)], [])
        except Exception as error:  # noqa: BLE001 - as in `_settle`
            connection.abort(f"its reply could not be sent: {error!r}")

    def _figures(self) -> dict[str, Any]:
        """What there is to tell about the server itself, by names for people."""
        room = self._waiting_room
        return {
            "Version": __version__,
            "Uptime (Seconds)": round(time.monotonic() - self._started, 3),
            "Store": self._name,
            "Connections": len(self._connections),
            "Connections at Most": self._most,
            "Connections Accepted": self._accepted,
            "Bytes Received": self.received,
            "Bytes Sent": self.sent,
            "Memory Held (Bytes)": sum(connection.held for connection in self._connections),
            "Batches": self._batches,
            "Requests/Batch": round(self._batched / max(1, self._batches), 2),
            "Waiting": len(room),
            "Waits Ended by a Record": room.woken,
            "Waits in Vain": room.in_vain,
            "Waits Refused": room.refused,
        }

    def _look_for_idle(self) -> None:
        idle = self.limits.idle
        if not idle:
            return
        latest = self._loop.time() - idle
        for connection in list(self._connections):
            if connection.idle_since < latest:
                connection.abort(f"it has asked for nothing for {idle:g} s")
        self._idle_timer = self._loop.call_later(idle / 4, self._look_for_idle)


class _Connection(asyncio.Protocol):
    """One client: busy from when it has sent something until all that is complete of it has been carried out."""

    def __init__(self, server: Server, mask: Mask) -> None:
        self._server = server
        self._mask = mask
        self._loop = asyncio.get_running_loop()
        self._decoder = self._new_decoder()
        self._transport: asyncio.Transport
        self._peer = ""
        self._busy = False
        #: Nothing in the decoder is complete.
        self._drained = True
        #: Calls that came back from a batch.
        self._returned: list[Call] = []
        #: What comes behind these, and must not be part of a batch.
        self._next: tuple[Call, Job] | None = None
        #: It waits for such a job, and has no part in batches.
        self.apart = False
        #: Nothing more is taken in, and once what has come is answered, it is closed.
        self._ending = False
        #: It is being sent away with an answer that it may not have read yet.
        self._lingers = False
        #: It has sent all that it will send.
        self._ended = False
        self.lost = False
        self._idle_since = self._loop.time()
        self._may_write = True
        #: How much was unread when the timer for it was set.
        self._unread = 0
        self._reply_timer: asyncio.TimerHandle | None = None
        self._frame_timer: asyncio.TimerHandle | None = None
        #: The timer went off while something was to be carried out, which may be the rest of the request.
        self._overdue = False
        #: Until when it is held to be `costly`: at first, as nothing is known of it.
        self._costly_until = math.inf

    @property
    def costly(self) -> bool:
        """Whether its next reply may be as long as one that it had a short while ago, or nothing is known of it."""
        return self._loop.time() < self._costly_until

    @property
    def stays(self) -> bool:
        """Whether it is still there, as far as can be seen, and its leaving would be noticed."""
        return not self._ended and self._decoder.buffered <= READ_AHEAD

    @property
    def held(self) -> int:
        """How many bytes are kept for it."""
        return self._decoder.held + (0 if self.lost else self._transport.get_write_buffer_size())

    @property
    def idle_since(self) -> float:
        """Since when it has asked for nothing, in the loop's time."""
        if self._busy or self._decoder.midway or self._transport.get_write_buffer_size():
            return math.inf
        return self._idle_since

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
        self._server.received += len(data)
        self._drained = False
        if not self._busy:
            self._busy = True
            if self._may_write:  # otherwise its replies would pile up, one for each time that it asks
                self._server.ready(self)
        elif self._decoder.buffered > READ_AHEAD:
            self._transport.pause_reading()
            self._server.hurry(self)
        self._weigh()

    def eof_received(self) -> bool:
        self._ended = True
        self._server.hurry(self)
        self.finish()
        return True  # what has been asked before is still answered

    def pause_writing(self) -> None:
        self._may_write = False
        self._watch_replies()

    def resume_writing(self) -> None:
        self._may_write = True
        if self._busy or not self._ending:
            _cancel(self._reply_timer)
        if self._busy and not self.apart:
            self._server.ready(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = self._ended = self._ending = True
        self._server.hurry(self)
        if not self._busy or not self._may_write:  # otherwise its turn is still to come
            self._decoder.clear()
        _cancel(self._frame_timer)
        _cancel(self._reply_timer)
        self._server.forget(self)

    # -- what the server asks

    def take(self, most: int) -> list[Call]:
        """The next calls for a batch, about so many at most; `settle` follows.

        If what comes next is to be carried out apart, that begins here, and there are no calls until it is done.
        """
        calls, self._returned = self._returned, []
        try:
            while self._next is None and len(calls) < most:
                call = self._decoder.next()
                if call is None:
                    self._drained = True
                    break
                if self.lost and call.request is not None and call.request.command.repeatable:
                    continue  # a question, and nobody is left to be answered
                call = self._permitted(call)
                if call.last:
                    self._take_no_more()
                job = self._server.job_of(call)
                if job is None:
                    calls.append(call)
                else:
                    self._next = call, job
        except ProtocolError as error:
            self._reject(error)
        if self._next is not None and not calls:
            self.apart = True
            self._server.carry_out_apart(self, *self._next)
            self._next = None
        if calls or self.apart:
            _cancel(self._frame_timer)
            self._frame_timer = None
            self._overdue = False
        return calls

    def _permitted(self, call: Call) -> Call:
        """``call``, or its refusal."""
        if call.request is not None and call.request.command.body is Body.STREAM:
            raise ProtocolError(f"{call.request.command.name} is not served here")
        if not self._mask.forbids(call):
            return call
        observe.count("server.requests_forbidden")
        logger.info("refusing %s what is masked: %s", self._peer, call.request and call.request.command.name)
        return call.refused()

    def settle(self, replies: list[Encoded], returned: list[Call]) -> None:
        """Send ``replies``, and keep the calls that have not been carried out for the next turn."""
        self.apart = False
        if self.lost:
            self._decoder.clear()
            return
        size = sum(map(encoded_length, replies))
        self._server.sent += size
        if size > COSTLY:
            self._costly_until = self._loop.time() + size / COSTLY_RATE
        elif replies and self._costly_until == math.inf:
            self._costly_until = 0.0
        # With uvloop, and from Python 3.12 on with asyncio, without a copy of what is long.
        self._transport.writelines(_joined(replies))
        self._weigh()
        self._returned = returned
        if returned or self._next is not None or not self._drained:
            if self._may_write:
                self._server.ready(self)
            return
        self._busy = False
        self._idle_since = self._loop.time()
        if self._ending:
            self._hang_up()
            return
        self._transport.resume_reading()
        if self._overdue and self._decoder.midway:
            self.abort(_NOT_IN_TIME)
        elif self._decoder.midway and self._frame_timer is None:
            self._frame_timer = self._loop.call_later(self._server.limits.patience, self._check_frame)

    def finish(self) -> None:
        """Take in nothing more, and close once what has come is answered."""
        if self._ending:
            if self._lingers and not self._busy:
                self._transport.close()
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
        self._take_no_more()

    def _take_no_more(self) -> None:
        """Not even look at what follows."""
        self._decoder = self._new_decoder()
        self._drained = True
        self._ending = self._lingers = True

    def _new_decoder(self) -> CallDecoder:
        return CallDecoder(self._server.wire_limits, self._server.options.http)

    def _weigh(self) -> None:
        if self.held > LIGHT:
            self._server.weigh(self)

    def _hang_up(self) -> None:
        if self._lingers and self._transport.can_write_eof():
            self._transport.write_eof()
            self._transport.resume_reading()
            self._loop.call_later(LINGER, self._transport.close)
        else:
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
        if self._busy:
            self._overdue = True
        else:
            self.abort(_NOT_IN_TIME)


def _requests(calls: Iterable[Call]) -> Iterator[Request]:
    return (call.request for call in calls if call.request is not None)


def _joined(replies: list[Encoded]) -> Iterator[bytes]:
    """The bytes of ``replies`` in order, those that are short joined."""
    for long, some in groupby(replies, lambda reply: isinstance(reply, tuple)):
        if long:
            yield from chain.from_iterable(cast("Iterator[tuple[bytes, ...]]", some))
        else:
            yield b"".join(cast("Iterator[bytes]", some))


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
