"""TLS between a server's sockets and its connections, the same on every event loop.

A connection sees a transport like any other, from the moment its client has been accepted: so whoever has not shaken
hands yet counts, too. What the loops' own TLS does otherwise: handshakes without a limit, connections that cannot be
half closed, and a `close` that waits until the client says goodbye, which clients with idle connections do not.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Iterable
from typing import Any, Final, cast

from beaker_statestore import observe
from beaker_statestore.tyrant.tls import Channel

__all__ = ["Encrypted"]

logger = logging.getLogger(__name__)

#: What a handshake's first byte is, and the answer to any other: an alert, unexpected_message (RFC 8446, 5.1 and 6).
_HANDSHAKE: Final = 0x16
_UNEXPECTED: Final = b"\x15\x03\x03\x00\x02\x02\x0a"
#: Encrypted and handed on at a time, so that a long reply is not kept twice.
_PIECE: Final = 256 * 1024


class Encrypted(asyncio.Transport, asyncio.Protocol):
    """The protocol of a TCP connection, and the transport of a protocol within TLS."""

    def __init__(self, protocol: asyncio.Protocol, context: ssl.SSLContext, patience: float) -> None:
        """
        :param protocol: gets plain text. Its connection is made before the handshake.
        :param patience: how long the handshake may take, in seconds.
        """
        super().__init__()
        self._protocol = protocol
        self._channel = Channel(context, server_side=True)
        self._patience = patience
        self._transport: asyncio.Transport
        self._timer: asyncio.TimerHandle
        self._begun = False

    # -- what the loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._peer = transport.get_extra_info("peername")
        self._loop = asyncio.get_running_loop()
        self._timer = self._loop.call_later(self._patience, self._give_up)
        self._protocol.connection_made(self)

    def data_received(self, data: bytes) -> None:
        channel = self._channel
        if self._transport.is_closing() or channel.ended:
            return
        if not self._begun and data[0] != _HANDSHAKE:
            # OpenSSL would wait for more, since the shortest requests are shorter than what it looks at first.
            self._transport.write(_UNEXPECTED)
            self._fail("it does not speak TLS")
            return
        self._begun = True
        shaken = channel.established
        plain = channel.receive(data)
        self._transport.write(channel.outgoing())
        if channel.established and not shaken:
            self._timer.cancel()
        if plain:
            self._protocol.data_received(plain)
        if channel.error is not None:
            self._fail(f"TLS failed: {channel.error}")
        elif channel.ended and not self._protocol.eof_received():
            self.close()

    def eof_received(self) -> bool:
        if self._channel.ended:
            return True  # the protocol knows
        self._channel.ended = True
        return bool(self._channel.established and self._protocol.eof_received())

    def pause_writing(self) -> None:
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._protocol.resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.cancel()
        self._protocol.connection_lost(error)

    def _give_up(self) -> None:
        self._report("it did not finish the TLS handshake")
        self._transport.abort()

    def _fail(self, why: str) -> None:
        self._report(why)
        # The alert that says why may still have to go out.
        self._timer.cancel()
        self._timer = self._loop.call_later(self._patience, self._transport.abort)
        self._transport.close()

    def _report(self, why: str) -> None:
        observe.count("server.tls_failed")
        logger.info("closing %s: %s", self._peer, why)

    # -- what the protocol asks

    def write(self, data: bytes | bytearray | memoryview) -> None:
        view = memoryview(data)
        for start in range(0, len(view), _PIECE):
            if self._transport.is_closing():
                return
            self._channel.send(view[start : start + _PIECE])
            self._transport.write(self._channel.outgoing())

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        for data in list_of_data:
            self.write(data)

    def write_eof(self) -> None:
        if self._channel.established and not self._transport.is_closing():
            self._channel.end()
            self._transport.write(self._channel.outgoing())
        self._transport.write_eof()

    def close(self) -> None:
        if self._channel.established and not self._transport.is_closing():
            self._channel.end()
            self._transport.write(self._channel.outgoing())
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def can_write_eof(self) -> bool:
        return True

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return self._transport.get_write_buffer_size()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._transport.get_extra_info(name, default)
