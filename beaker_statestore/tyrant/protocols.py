"""The server's ear: bytes of a client -> calls, in three protocols, chosen anew for each request as ttserver does.

The byte C8 begins a binary request, and every other one a line of text: memcached's if its first word is a verb of
memcached's, otherwise HTTP's if it ends in a version of HTTP.
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
    """Bytes of a client -> `Call`."""

    def __init__(self, limits: Limits = LIMITS, policy: HTTPPolicy | None = None) -> None:
        """:param policy: whose HTTP requests are answered; ``None``: nobody's."""
        super().__init__(limits)
        self._policy = policy

    def _read(self) -> Reading[Call]:
        return self._read_binary() if self._buffer[self._position] == MAGIC else self._read_text()

    def _read_binary(self) -> Reading[Call]:
        return binary_call((yield from read_request(self._limits)))

    def _read_text(self) -> Reading[Call]:
        line = yield Line(self._limits.line)
        if memcached.speaks(line):
            return (yield from memcached.read(line, self._limits))
        if self._policy is not None and http.speaks(line):
            return (yield from http.read(line, self._limits, self._policy))
        raise ProtocolError("its line is no command of a protocol that is spoken here")
