"""What a client asks for, in any of the server's protocols: a command of the table, and how its answer is written.

The executor carries out the command and does not know the protocol; the server sends the bytes and knows neither.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Final, NamedTuple

from beaker_statestore.tyrant.commands import COMMANDS, FORBIDDEN, Reply, Request
from beaker_statestore.tyrant.wire import Encoded, encode_reply_in_parts

__all__ = ["Call", "Door", "binary_call"]


class Door(Enum):
    """A protocol. The value is what the original's masks call it."""

    BINARY = "allorg"
    MEMCACHED = "allmc"
    HTTP = "allhttp"


class Call(NamedTuple):
    """One request of a client."""

    #: What is to be carried out; ``None``: nothing, the answer is known.
    request: Request | None
    #: The answer. With `FORBIDDEN` as with every other status it makes an answer that says "failed".
    encode: Callable[[Reply], Encoded]
    door: Door = Door.BINARY
    #: The connection is closed behind the answer, and what the client has sent behind this is not looked at.
    last: bool = False

    def refused(self) -> Call:
        """This call, not to be carried out: its answer says that it is forbidden.

        Where no answer is asked for (``putnr``, memcached's ``noreply``), the end of the connection says so; nothing
        at all would look like success.
        """
        answer = self.encode(Reply(FORBIDDEN))
        return Call(None, lambda _reply: answer, self.door, self.last or not answer)


_ENCODERS: Final = {command: partial(encode_reply_in_parts, command) for command in COMMANDS.values()}


def binary_call(request: Request) -> Call:
    """``request`` as the binary protocol asks and answers it."""
    return Call(request, _ENCODERS[request.command])
