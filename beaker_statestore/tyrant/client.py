"""A client of Tyrant servers: a connection, a pool of connections, and the policy of what may be sent again.

Everything that waits here waits until a deadline on the monotonic clock, for the whole of a call and not for each
piece of it. Everything that can go wrong with a socket leaves as `StoreUnavailable` or, when a request that changes
something may have been carried out, as `OutcomeUnknown`; no OSError passes this door. What commands mean is known to
the table in `commands` alone, and nothing here knows the server.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

from beaker_statestore import observe
from beaker_statestore.exceptions import (
    ConfigurationError,
    OutcomeUnknown,
    ProtocolError,
    StateStoreError,
    StoreUnavailable,
)
from beaker_statestore.tyrant import original
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import (
    APPEND,
    CAS,
    COMMANDS,
    DECR,
    EXT,
    FAILURE,
    FORBIDDEN,
    GET,
    INCR,
    MGET,
    MISC,
    OUT,
    PREPEND,
    PROBE,
    PUTKEEP,
    REPLACE,
    RESTORE,
    RNUM,
    SCAN,
    SETMST,
    STATISTICS,
    STORE_FAILED,
    SUCCESS,
    TOO_MUCH,
    VSIZ,
    WAIT,
    Body,
    Command,
    Reply,
    Request,
    is_repeatable,
)
from beaker_statestore.tyrant.tls import TLS, explain
from beaker_statestore.tyrant.transport import TLSTransport, Transport, remaining
from beaker_statestore.tyrant.wire import ReplyDecoder, encode_request

__all__ = [
    "Choice",
    "Client",
    "Connection",
    "MissingFunctionError",
    "NotSentError",
    "Pool",
    "RefusedError",
    "check_status",
    "connect",
    "describe",
]

DEFAULT_CONNECT_TIMEOUT: Final = 2.0
DEFAULT_TIMEOUT: Final = 5.0
DEFAULT_POOL_SIZE: Final = 16
#: An idle connection is not used again after so many seconds: something on the way may have forgotten it in silence.
MAX_IDLE: Final = 60.0
#: How long to wait before a request is sent again, in seconds; a random time in this range, so that many clients of a
#: server that has just come back do not act in step.
RETRY_PAUSE: Final = (0.02, 0.1)

#: Servers permit requests of so many bytes, and lists of so many elements, unless their operator has said less: what is
#: larger may be why a connection was closed.
_LARGE: Final = 2**20
_LONG: Final = 20_000
#: ``ext`` functions that are the server's own.
_BUILT_IN: Final = frozenset({PROBE, CAS, SCAN, WAIT, STATISTICS, REPLACE, APPEND, PREPEND, INCR, DECR})
#: What statistics call opening a connection.
_CONNECT: Final = "connect"
#: What they call commands, and functions by their names: those that carry out a verb of `Store` as the verb. All other
#: functions keep their names.
_KINDS: Final[Mapping[Command | bytes, str]] = {
    **{command: command.name for command in COMMANDS.values()},
    PUTKEEP: "add",
    OUT: "delete",
    MGET: "get_many",
    RNUM: "count",
    CAS: "compare_and_swap",
    b"putlist": "put_many",
    b"outlist": "delete_many",
    original.PUT: "put",
    original.ADD: "add",
    original.DELETE: "delete",
}
#: What a server may have of `Connection.capabilities`.
_ALL_OURS: Final = frozenset({*_BUILT_IN, original.PUT, original.ADD, original.DELETE})
#: What a mask can name and open, and what it calls the functions of --ext.
_MASKABLE: Final = frozenset({*(command.name for command in COMMANDS.values()), "functions"})

#: Makes the requests to send out of what the server can do (`Connection.capabilities`). It may be called again.
Choice = Callable[[frozenset[bytes]], Sequence[Request]]


class NotSentError(StoreUnavailable):
    """The connection failed before the first byte of the request had left, so nobody has carried it out."""


class MissingFunctionError(ConfigurationError):
    """The server does not have one of our own functions. Nothing has been sent that needs it."""


class RefusedError(ConfigurationError):
    """The server answered that it does not do what was asked, since somebody has told it not to. It has not."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        #: `FORBIDDEN` or `TOO_MUCH`.
        self.status = status


# -- one connection


def connect(address: Address, deadline: float) -> socket.socket:
    """A socket connected to ``address``, without a timeout of its own set.

    The deadline does not bind the resolver of host names, which has its own (resolv.conf); numeric addresses and
    Unix sockets do not need it.

    :param deadline: when to give up, on the monotonic clock.
    :raises StoreUnavailable: nobody answers there; the message says what to check.
    """
    try:
        if address.path is not None:
            return _connect(socket.AF_UNIX, address.path, deadline)
        *others, last = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        for family, _, _, _, target in others:
            with contextlib.suppress(OSError):
                return _connect(family, target, deadline)
        return _connect(last[0], last[4], deadline)
    except (OSError, UnicodeError) as error:  # UnicodeError: a host name that IDNA cannot encode
        raise StoreUnavailable(_why_not_connected(address, error)) from error


def _connect(family: int, target: Any, deadline: float) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        while True:
            sock.settimeout(remaining(deadline))
            try:
                sock.connect(target)
                break
            except BlockingIOError:
                # The queue of a Unix socket is full. The kernel waits for room only without a timeout (connect(2)).
                time.sleep(min(0.01, remaining(deadline)))
        if family != socket.AF_UNIX:
            if sock.getsockname() == sock.getpeername():
                # TCP's simultaneous open: nobody listens at this port, and the kernel chose it for our own end.
                raise ConnectionRefusedError("connected to itself")
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.settimeout(None)
    except BaseException:
        sock.close()
        raise
    return sock


def _why_not_connected(address: Address, error: Exception) -> str:
    listen = f" --listen {address}" if address != Address() else ""
    start = f"start one with `statestore serve{listen}`"
    if isinstance(error, ConnectionRefusedError):
        return f"no Tyrant server answers at {address} (connection refused): {start}"
    if isinstance(error, FileNotFoundError):
        return f"no Tyrant server answers at {address} (there is no such socket): {start}"
    if isinstance(error, TimeoutError):
        return f"no Tyrant server answers at {address} (no connection in time): check the address and the firewall"
    if isinstance(error, (socket.gaierror, UnicodeError)):
        return f"cannot find the host {address.host!r} ({error}): check the address of the Tyrant server"
    if isinstance(error, PermissionError):
        return f"may not connect to the Tyrant server at {address} ({error.strerror}): check the socket's permissions"
    return f"cannot connect to the Tyrant server at {address}: {error}"


def _why_no_tls(address: Address, error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return (
            f"no TLS with the Tyrant server at {address} (no handshake in time): see whether it speaks TLS at this "
            "port, and whether it is overloaded or stopped"
        )
    return f"no TLS with the Tyrant server at {address}: {explain(error)}"


class Connection:
    """A connection to a server, for one thread at a time.

    Any failure during a call closes it for good: a late or halved reply must never be taken for the answer to a
    later request, and replies do not say what they answer.
    """

    def __init__(self, sock: socket.socket | Transport, address: Address) -> None:
        """:param sock: connected; it belongs to the connection from now on."""
        self.address = address
        self.closed = False
        #: When it was last given back to a pool.
        self.idle_since = time.monotonic()
        #: How many bytes the last `call` has sent, and received.
        self.sent = self.received = 0
        self._transport = sock if isinstance(sock, Transport) else Transport(sock)
        self._decoder = ReplyDecoder()
        self._capabilities: frozenset[bytes] | None = None

    @classmethod
    def open(cls, address: Address, deadline: float, tls: TLS | None = None) -> Connection:
        """A connection to the server at ``address``; errors as for `connect`.

        :param tls: what to speak TLS with, which is then done by ``deadline``, too; None: everything is in the clear.
        """
        began = observe.listener.clock()
        failed = True
        try:
            sock = connect(address, deadline)
            connection = cls(sock if tls is None else _encrypt(sock, address, deadline, tls), address)
            failed = False
        finally:
            if began:
                observe.listener.operation(str(address), _CONNECT, began, failed=failed)
        observe.count("tyrant.connections")
        return connection

    def is_alive(self) -> bool:
        """Whether an idle connection can be used.

        Between calls a server has nothing to say, so bytes that wait are as bad as an end or an error.
        """
        return not self.closed and self._transport.is_silent()

    def capabilities(self, deadline: float) -> frozenset[bytes]:
        """The names of our own functions that the server has (see `swap`); asked once per connection.

        An original server has none, unless it was given a script that answers the probe (see `original`).

        :raises NotSentError: the connection failed.
        :raises StoreUnavailable: the store behind the server failed, so that it could not say; ask again later.
        """
        if self._capabilities is None:
            probe = EXT(PROBE, b"", b"", 0)
            try:
                ((status, names),) = self.call([probe], deadline)
            except StoreUnavailable as error:
                raise NotSentError(str(error)) from error
            check_status(self.address, probe, status)
            self._capabilities = frozenset(names.split() if status == SUCCESS else ())
        return self._capabilities

    def call(self, requests: Sequence[Request], deadline: float) -> list[Reply]:
        """Send ``requests`` together and answer their replies, in order.

        A request that is never answered (``putnr``) counts as successful once it has been sent.

        :param deadline: when all must be done, on the monotonic clock.
        :raises ProtocolError: a request cannot be encoded; nothing has happened and the connection is good.
        :raises NotSentError: it failed before the first byte had left.
        :raises OutcomeUnknown: it failed later, and some request is not repeatable.
        :raises StoreUnavailable: it failed later, and sending all of them again does no harm.
        """
        unsent = data = memoryview(b"".join([encode_request(request) for request in requests]))
        self.sent, self.received = len(data), 0
        if time.monotonic() >= deadline:
            raise self._failure(TimeoutError(), requests, len(data), begun=False)
        replies: list[Reply] = []
        answered = [request for request in requests if request.command.body is not Body.NO_REPLY]
        try:
            for request in answered:
                self._decoder.expect(request)
            while unsent or len(replies) < len(answered):
                if unsent:
                    unsent = unsent[self._transport.send(unsent) :]
                if unsent or len(replies) < len(answered):
                    # Replies are taken while requests still leave. Were they left until then, a server that waits
                    # for its replies to be read would stop reading requests, and both would wait for ever.
                    self._transport.wait(deadline, to_send=bool(unsent))
                    replies += self._receive()
        except (OSError, ProtocolError) as error:
            self.close()
            raise self._failure(error, requests, len(data), begun=len(unsent) < len(data)) from error
        except BaseException:
            # An interrupt, or a greenlet's timeout: the reply may still come.
            self.close()
            raise
        if len(answered) == len(requests):
            return replies
        it = iter(replies)
        return [Reply(SUCCESS) if request.command.body is Body.NO_REPLY else next(it) for request in requests]

    def _receive(self) -> list[Reply]:
        data = self._transport.receive()
        if data is None:
            return []
        if not data:
            raise ConnectionError("the connection was closed")
        self.received += len(data)
        self._decoder.feed(data)
        replies = []
        while (message := self._decoder.next()) is not None:
            _, reply = message
            if reply.status > TOO_MUCH:
                raise ProtocolError(f"there is no status {reply.status}")
            replies.append(reply)
        return replies

    def _failure(self, error: Exception, requests: Sequence[Request], size: int, *, begun: bool) -> StoreUnavailable:
        names = ", ".join(dict.fromkeys(map(describe, requests)))
        if self._transport.has_refused(error):
            return NotSentError(_why_no_tls(self.address, error))
        if isinstance(error, TimeoutError):
            what = f"the Tyrant server at {self.address} did not answer {names} in time"
            remedy = "see whether it is overloaded or stopped"
        elif isinstance(error, ProtocolError):
            what = f"what answered {names} at {self.address} does not speak the Tyrant protocol ({error})"
            remedy = "check the address, and whether the server demands TLS (tyrants://)"
        else:
            what = f"the connection to the Tyrant server at {self.address} broke before {names} was answered ({error})"
            remedy = "see whether the server was restarted, and its log"
            lists = (part for request in requests for part in request.arguments if isinstance(part, list))
            if size > _LARGE or any(len(part) > _LONG for part in lists):
                remedy = f"{size:,} bytes may be more than the server takes (--max-message, --max-list); else {remedy}"
        if not begun:
            return NotSentError(f"{what}; nothing had been sent: {remedy}")
        if all(map(is_repeatable, requests)):
            return StoreUnavailable(f"{what}: {remedy}")
        return OutcomeUnknown(f"{what}, so whether it was carried out is unknown: {remedy}")

    def close(self) -> None:
        """Close it, in this process. What has been sent is still delivered."""
        self.closed = True
        self._transport.close()


def _encrypt(sock: socket.socket, address: Address, deadline: float, tls: TLS) -> TLSTransport:
    """``sock``, with TLS spoken on it; it is closed where that fails."""
    try:
        transport = TLSTransport(sock, tls.channel(address.host))
        transport.shake_hands(deadline)
    except OSError as error:
        sock.close()
        raise StoreUnavailable(_why_no_tls(address, error)) from error
    except BaseException:
        sock.close()
        raise
    return transport


def check_status(address: Address, request: Request, status: int) -> None:
    """Return if ``status`` answers ``request``, well or not.

    :raises StoreUnavailable: the store behind the server failed.
    :raises RefusedError: the server does not let its clients do this, or the answer would be above its limits.
    """
    if status == STORE_FAILED:
        raise StoreUnavailable(
            f"the store behind the Tyrant server at {address} failed to carry out {describe(request)}: "
            "see the server's log"
        )
    if status == TOO_MUCH:
        raise RefusedError(
            status,
            f"the Tyrant server at {address} does not answer {describe(request)}, as that would be more than a reply "
            "may hold: ask for less, or start it with larger --max-reply and --max-keys",
        )
    if status == FORBIDDEN:
        raise RefusedError(
            status,
            f"the Tyrant server at {address} does not let its clients do {describe(request)}: {_remedy(request)}",
        )


def _remedy(request: Request) -> str:
    command, arguments = request
    if command in (RESTORE, SETMST):
        return "it has no update log and no replicas"
    name = command.name
    if command is MISC:
        name = arguments[0].decode(errors="replace")
    elif command is EXT:
        name = "" if arguments[0] in _BUILT_IN else "functions"
    if name not in _MASKABLE:
        return "see the options --mask and --unmask of `statestore serve`; a Unix socket may be open to more"
    return (
        f"{name} is forbidden by its --mask, or because this is TCP; start it with --unmask {name}, or connect to a "
        "Unix socket of it"
    )


def describe(request: Request) -> str:
    """What to call ``request`` in a message, which shows no key and no value."""
    command, arguments = request
    if command in (EXT, MISC):
        return f"{command.name} {_name(arguments[0])}"
    return command.name


def _name(function: bytes) -> str:
    return function.decode(errors="backslashreplace")


# -- many connections


class Pool:
    """Up to ``size`` connections to one server, shared by threads, each lent to one at a time.

    The one used last is lent first, so that those beyond the usual need grow old and go. A dead one is found out
    before it is lent. After a fork the child begins without any. Connections are closed with the pool, at the latest
    when it is forgotten.
    """

    def __init__(
        self,
        address: Address,
        *,
        tls: TLS | None = None,
        size: int = DEFAULT_POOL_SIZE,
        connect_timeout: float = DEFAULT_CONNECT_TIMEOUT,
        max_idle: float = MAX_IDLE,
        keep: int | None = None,
        opened: Iterable[Connection] = (),
    ) -> None:
        """
        :param tls: what to speak TLS with; None: everything is in the clear.
        :param connect_timeout: how long opening a connection may take, in seconds.
        :param max_idle: for how many seconds an idle connection can be used again.
        :param keep: so many idle ones at most, and close the others; ``None``: all of them.
        :param opened: connections to ``address`` to begin with, at most ``size``.
        :raises ConfigurationError: a number makes no sense.
        """
        if size < 1:
            raise ConfigurationError(f"pool_size is {size}: a pool needs at least 1 connection")
        _check_seconds("connect_timeout", connect_timeout)
        self.address = address
        #: What statistics call the server.
        self.name = str(address)
        self.tls = tls
        self.size = size
        self.connect_timeout = connect_timeout
        self.max_idle = max_idle
        self._keep = size if keep is None else keep
        self._closed = False
        # Whoever holds a connection, or opens one, holds a place. One is opened only by a holder of a place who saw
        # no idle one, so that there never are more than places. Appending to a list and popping from it are atomic.
        self._places = threading.BoundedSemaphore(size)
        self._idle: list[Connection] = list(opened)
        self._lent: set[Connection] = set()
        self._waiting: set[int] = set()
        weakref.finalize(self, _close_all, self._idle, self._lent)
        _pools.add(self)
        observe.watch(self)

    def acquire(self, deadline: float) -> Connection:
        """Lend a connection that is alive, for `release` to take back.

        :param deadline: how long to wait for one, on the monotonic clock.
        :raises StoreUnavailable: none came free in time, or no new one could be opened.
        :raises StateStoreError: the pool has been closed.
        """
        if not self._places.acquire(blocking=False) and not self._wait(deadline):
            raise StoreUnavailable(
                f"all {self.size} connections to the Tyrant server at {self.address} stayed in use: "
                "see why calls take so long, or raise pool_size"
            )
        try:
            if self._closed:
                raise StateStoreError(f"the client of the Tyrant server at {self.address} has been closed")
            connection = self._pop() or Connection.open(
                self.address, min(deadline, time.monotonic() + self.connect_timeout), self.tls
            )
        except BaseException:
            self._places.release()
            raise
        self._lent.add(connection)
        return connection

    def _wait(self, deadline: float) -> bool:
        """Whether a place came free in time."""
        thread = threading.get_ident()
        self._waiting.add(thread)
        try:
            return self._places.acquire(timeout=max(0.0, deadline - time.monotonic()))
        finally:
            self._waiting.discard(thread)

    def gauges(self) -> dict[str, int]:
        """How many connections there are and may be, and how many threads wait for one."""
        idle = len(self._idle)
        return {
            "open": idle + len(self._lent),
            "idle": idle,
            # One that keeps fewer than it may open is for those who wait, and has no size to speak of.
            "size": 0 if self._closed or self._keep < self.size else self.size,
            "waiting": len(self._waiting),
        }

    def release(self, connection: Connection) -> None:
        """Take back ``connection``."""
        self._lent.discard(connection)
        if not connection.closed:
            connection.idle_since = time.monotonic()
            if len(self._idle) < self._keep:
                self._idle.append(connection)
            else:
                connection.close()
        if self._closed:
            self.drop_idle()
        self._places.release()

    def _pop(self) -> Connection | None:
        while self._idle:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread was quicker
                break
            if connection.is_alive() and time.monotonic() - connection.idle_since <= self.max_idle:
                return connection
            connection.close()
        return None

    def drop_idle(self) -> None:
        """Close the connections that are idle."""
        _close_all(self._idle)

    def close(self) -> None:
        """Close what is idle now, and what is lent when it comes back."""
        self._closed = True
        self.drop_idle()

    def _after_fork(self) -> None:
        # The sockets are shared with the parent, so nothing may be sent on them. Closing this process's descriptors
        # tells the server nothing while the parent has its own. Other threads of the parent may have held places and
        # the semaphore's lock; they do not exist here and will not give them back.
        _close_all(self._idle, self._lent)
        self._waiting.clear()
        self._places = threading.BoundedSemaphore(self.size)


def _close_all(*groups: list[Connection] | set[Connection]) -> None:
    for group in groups:
        while group:
            try:
                connection = group.pop()
            except (IndexError, KeyError):  # another thread was quicker
                break
            connection.close()


_pools: Final[weakref.WeakSet[Pool]] = weakref.WeakSet()


def _forget_inherited_connections() -> None:
    for pool in list(_pools):
        pool._after_fork()


os.register_at_fork(after_in_child=_forget_inherited_connections)


# -- the policy


class Client:
    """Calls to one server, from any thread, each with one deadline for everything: waiting, connecting, retrying.

    A request is sent again, once and on a new connection, if not a byte of it had left, or if `is_repeatable` says
    that this does no harm. A server that accepts no connections is reported at once.
    """

    def __init__(self, pool: Pool, *, timeout: float = DEFAULT_TIMEOUT) -> None:
        """:param timeout: how long a call may take in all, in seconds."""
        _check_seconds("timeout", timeout)
        self.pool = pool
        self.timeout = timeout

    def call(self, request: Request, *, requires: bytes | None = None) -> Reply:
        """The reply to ``request``, of status `SUCCESS` or `FAILURE`.

        :param requires: a function of our own that the server must have; it is asked first, once per connection.
        :raises ProtocolError: the request cannot be encoded.
        :raises ConfigurationError: the server does not have what is required.
        :raises OutcomeUnknown: the request may have been carried out, and no answer came.
        :raises StoreUnavailable: the request was not carried out, or it changes nothing.
        """
        (reply,) = self.pipeline([request], requires=requires)
        check_status(self.pool.address, request, reply.status)
        return reply

    def call_suitable(self, choose: Choice, *, extra: float = 0.0) -> list[tuple[Request, Reply]]:
        """The requests that ``choose`` makes for this server, each with its reply, of status `SUCCESS` or `FAILURE`.

        They are sent together; errors as for `call`, and whatever ``choose`` raises.

        :param extra: so many seconds more than any other call it may take, as the server may wait so long.
        """
        answers = list(zip(*self._exchange(choose, extra), strict=True))
        for request, reply in answers:
            check_status(self.pool.address, request, reply.status)
        return answers

    def pipeline(self, requests: Sequence[Request], *, requires: bytes | None = None) -> list[Reply]:
        """The replies to ``requests``, which are sent together, in order; errors as for `call`.

        A reply may have any status that there is. All requests are sent again if any is, and only if all may be.
        """
        if requires is None:
            return self._exchange(requests)[1]

        def choose(capabilities: frozenset[bytes]) -> Sequence[Request]:
            if requires not in capabilities:
                raise _unsupported(self.pool.address, requires)
            return requests

        return self._exchange(choose)[1]

    def _exchange(
        self, requests: Sequence[Request] | Choice, extra: float = 0.0
    ) -> tuple[Sequence[Request], list[Reply]]:
        """What was sent, in the end, and the replies to it."""
        began = observe.listener.clock()
        deadline = time.monotonic() + self.timeout + extra
        sent: Sequence[Request] = ()
        replies: list[Reply] | None = None
        bytes_sent = bytes_received = 0
        retried = False
        try:
            while True:
                connection = self.pool.acquire(deadline)
                try:
                    sent = requests(connection.capabilities(deadline)) if callable(requests) else requests
                    replies = connection.call(sent, deadline)
                    bytes_sent, bytes_received = connection.sent, connection.received
                    return sent, replies
                except OutcomeUnknown:
                    raise
                except StoreUnavailable as error:
                    pause = 0.0 if isinstance(error, NotSentError) else random.uniform(*RETRY_PAUSE)  # noqa: S311 - no secret
                    if retried or time.monotonic() + pause >= deadline:
                        raise
                except MissingFunctionError:
                    began = 0  # nothing was to be sent to such a server
                    raise
                finally:
                    self.pool.release(connection)
                retried = True
                observe.count("tyrant.retries")
                # What broke one connection has most likely broken all.
                self.pool.drop_idle()
                time.sleep(pause)
        finally:
            if began:
                # If nothing came to be sent: what would have been to a server that has all that can be asked for.
                sent = sent or (requests(_ALL_OURS) if callable(requests) else requests)
                self._report(began, sent, replies, bytes_sent, bytes_received, retried)

    def _report(
        self,
        began: int,
        sent: Sequence[Request],
        replies: Sequence[Reply] | None,
        bytes_sent: int,
        bytes_received: int,
        retried: bool,
    ) -> None:
        """Tell who listens what has just been done, or has failed if there are no replies."""
        kind, hits, misses = "pipeline", 0, 0
        failed = replies is None
        if len(sent) == 1:
            command, arguments = sent[0]
            kind = _KINDS.get(arguments[0] if command is EXT or command is MISC else command) or _name(arguments[0])
            if replies:
                status, value = replies[0]
                failed = status > FAILURE
                if command is MGET and status == SUCCESS:
                    hits = len(dict(value))
                    misses = len(set(arguments[0])) - hits
                elif (command is GET or command is VSIZ) and not failed:
                    hits, misses = (1, 0) if status == SUCCESS else (0, 1)
        observe.listener.operation(
            self.pool.name, kind, began, hits, misses, bytes_sent, bytes_received, int(retried), failed
        )

    def close(self) -> None:
        """Close the pool."""
        self.pool.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _unsupported(address: Address, function: bytes) -> MissingFunctionError:
    return MissingFunctionError(
        f"the server at {address} is an original ttserver without our function {function.decode()!r}: run "
        f"`statestore serve` in its place, or start it with our script: {original.start_line()}"
    )


def _check_seconds(name: str, seconds: float) -> None:
    if not 0 < seconds < math.inf:
        raise ConfigurationError(f"{name} is {seconds!r}: give a number of seconds above 0, for example 5")
