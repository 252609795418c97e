"""The server's ear: bytes of a client -> calls, in three protocols, chosen anew for each request as ttserver does.

The byte C8 begins a binary request, and every other one a line of text: HTTP's if it ends in a version of HTTP,
otherwise memcached's if its first word is a verb of memcached's. (The original asks the other way round. But a page
in a browser may choose its method, ``flush_all`` say; how its line ends it cannot.)
"""

from __future__ import annotations

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant import http, memcached
from beaker_statestore.tyrant.calls import Call, binary_call
from beaker_statestore.tyrant.commands import MAGIC
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.wire import LIMITS, Decoder, Limits, Line, Reading, read_request

__all__ = ["CallDecoder"]


class CallDecoder(Decoder[Call]):
    """Bytes of a client -> `Call`. Behind one that is the last of its connection nothing is read."""

    def __init__(self, limits: Limits = LIMITS, policy: HTTPPolicy | None = None) -> None:
        """:param policy: whose HTTP requests are answered; ``None``: nobody's."""
        super().__init__(limits)
        self._policy = policy
        self._ended = False

    def feed(self, data: bytes) -> None:
        if not self._ended:
            super().feed(data)

    def next(self) -> Call | None:
        call = super().next()
        if call is not None and call.last:
            self._ended = True
            self.clear()
        return call

    def _read(self) -> Reading[Call]:
        return self._read_binary() if self._buffer[self._position] == MAGIC else self._read_text()

    def _read_binary(self) -> Reading[Call]:
        return binary_call((yield from read_request(self._limits)))

    def _read_text(self) -> Reading[Call]:
        line = yield Line(self._limits.line)
        if http.speaks(line):
            if self._policy is None:
                raise ProtocolError("HTTP is not spoken here")
            return (yield from http.read(line, self._limits, self._policy))
        if memcached.speaks(line):
            return (yield from memcached.read(line, self._limits))
        raise ProtocolError("its line is no command of a protocol that is spoken here")
