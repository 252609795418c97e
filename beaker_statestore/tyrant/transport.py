"""How a client's bytes travel: over a socket as they are, or inside TLS. Nothing here waits but `Transport.wait`.

What both have in common is what `Connection` builds on: ``send`` answers how many bytes the peer may have understood,
so that a request of which none are sent has certainly not been carried out.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import ssl
import time
from typing import Final

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.tyrant.tls import RECORD, Channel, is_refusal

__all__ = ["TLSTransport", "Transport", "remaining"]

_RECEIVE_SIZE: Final = 65536
#: How often something that means nothing may be read from an idle connection before it counts as dead.
_MOST_READS: Final = 8


def remaining(deadline: float) -> float:
    """The seconds until ``deadline``, always more than 0.

    :raises TimeoutError: it has passed.
    """
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError("the deadline has passed")
    return seconds


class Transport:
    """Bytes as they are."""

    def __init__(self, sock: socket.socket) -> None:
        """:param sock: connected; it belongs to the transport from now on."""
        if isinstance(sock, ssl.SSLSocket):
            raise ConfigurationError(
                "a socket that is wrapped in TLS cannot be used here: open a store at tyrants://host:port instead"
            )
        sock.setblocking(False)
        self._socket = sock
        self._readable = select.poll()
        self._readable.register(sock, select.POLLIN)
        self._readable_or_writable = select.poll()
        self._readable_or_writable.register(sock, select.POLLIN | select.POLLOUT)

    def send(self, data: memoryview) -> int:
        """Send some of ``data``, and answer how many bytes need not be given again.

        :raises OSError: the connection is broken.
        """
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    def receive(self) -> bytes | None:
        """What has come: None if nothing has, and nothing (``b""``) at the end.

        :raises OSError: the connection is broken.
        """
        try:
            return self._socket.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            return None

    def wait(self, deadline: float, *, to_send: bool) -> None:
        """Return when there may be something to receive or, if there is something ``to_send``, room for it.

        :raises TimeoutError: nothing happened until ``deadline``, on the monotonic clock.
        """
        poll = self._readable_or_writable if to_send else self._readable
        # Rounded up: poll counts milliseconds, and a shorter wait would end just before the deadline, again and again.
        if not poll.poll(math.ceil(remaining(deadline) * 1000)):
            raise TimeoutError("the deadline has passed")

    def is_silent(self) -> bool:
        """Whether nothing has come, neither bytes nor an end nor an error."""
        return not self._readable.poll(0)

    def has_refused(self, error: Exception) -> bool:
        """Whether ``error`` says that the peer carries out nothing of this client's, and never has."""
        return False

    def close(self) -> None:
        """Close it, in this process, without waiting. What has been sent is still delivered."""
        self._socket.close()


class TLSTransport(Transport):
    """Bytes inside TLS.

    The bytes of one record are understood together or, as long as the last one has not left, not at all. So one
    record is sent at a time, and counts when it has left whole.
    """

    def __init__(self, sock: socket.socket, channel: Channel) -> None:
        """:param channel: the client's end of a new connection. `shake_hands` comes first."""
        super().__init__(sock)
        self._channel = channel
        #: What is still to leave of the record under way, and how many plain bytes are in it.
        self._rest = memoryview(b"")
        self._in_record = 0
        self._heard = False
        self._owner = os.getpid()

    def shake_hands(self, deadline: float) -> None:
        """Make the connection one of TLS.

        :raises OSError: it was not possible; `TimeoutError` is one, and so is `ssl.SSLError`.
        """
        self._channel.receive()
        while True:
            self._rest = memoryview(bytes(self._rest) + self._channel.outgoing())
            self._flush()
            if self._channel.error is not None:
                raise self._channel.error
            if self._channel.established and not self._rest:
                return
            self.wait(deadline, to_send=bool(self._rest))
            with contextlib.suppress(BlockingIOError):
                data = self._socket.recv(_RECEIVE_SIZE)
                if self._channel.receive(data):
                    raise ConnectionError("the server spoke before it was asked")
                if not data or (self._channel.ended and not self._channel.established):
                    raise ConnectionError("the connection was closed during the TLS handshake")

    def send(self, data: memoryview) -> int:
        if not self._rest and not self._in_record:
            piece = data[:RECORD]
            self._channel.send(piece)
            self._rest, self._in_record = memoryview(self._channel.outgoing()), len(piece)
        try:
            self._flush()
        except OSError:
            # The peer may have said why before it closed.
            with contextlib.suppress(OSError):
                self.receive()
            if self._channel.error is not None:
                raise self._channel.error from None
            raise
        if self._rest:
            return 0
        sent, self._in_record = self._in_record, 0
        return sent

    def _flush(self) -> None:
        """Send what there is room for."""
        if self._rest:
            self._rest = self._rest[super().send(self._rest) :]

    def receive(self) -> bytes | None:
        channel = self._channel
        if not channel.ended and channel.error is None:
            data = super().receive()
            if data is None:
                return None
            if not data:
                channel.ended = True
            elif plain := channel.receive(data):
                self._heard = True
                return plain
        if channel.error is not None:
            raise channel.error
        return b"" if channel.ended else None

    def wait(self, deadline: float, *, to_send: bool) -> None:
        # What ended the channel may have come with the last bytes that were received.
        if not self._channel.ended and self._channel.error is None:
            super().wait(deadline, to_send=to_send)

    def is_silent(self) -> bool:
        """Whether nothing has come that means anything. A session ticket, say, means nothing."""
        try:
            for _ in range(_MOST_READS):
                if self._channel.ended or self._channel.error is not None:
                    return False
                if super().is_silent():
                    return True
                if self.receive() is not None:
                    return False
        except OSError:
            pass
        return False

    def has_refused(self, error: Exception) -> bool:
        return not self._heard and is_refusal(error)

    def close(self) -> None:
        # The peer may be told by one process only, and not amid a record: after a fork, the connection is the parent's.
        if self._socket.fileno() >= 0 and os.getpid() == self._owner and not self._rest:
            if self._channel.established and self._channel.error is None:
                self._channel.end()
            with contextlib.suppress(OSError):
                self._socket.send(self._channel.outgoing())
        super().close()
