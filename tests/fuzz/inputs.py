"""What the fuzzer's bytes stand for: which side hears them, how they are cut, and what had been asked for.

The first byte's high bit says whose bytes these are, its low bits how many cuts there are, of a byte each. A client
that hears a server has sent so many requests before as the next byte says, each named by a byte of its own.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from beaker_statestore.tyrant.commands import Kind, Request
from tests.fuzz.frames import ANSWERED, damaged, frame, reply_to
from tests.fuzz.oracle import check_client, check_server

__all__ = ["Input", "check", "mutated"]

#: The high bit: a server's bytes for a client.
FROM_SERVER = 0x80
MOST_CUTS = 7
MOST_ASKED = 3


class Input(NamedTuple):
    """What is heard, and how."""

    data: bytes
    cuts: Sequence[int] = ()
    #: What the client who hears it had asked for, as places in `ANSWERED`; ``None``: it is a server who hears it.
    asked: Sequence[int] | None = None

    @classmethod
    def read(cls, raw: bytes) -> Input:
        """The input that any bytes stand for."""
        first = raw[0] if raw else 0
        cuts, rest = raw[1 : 1 + first % (MOST_CUTS + 1)], raw[1 + first % (MOST_CUTS + 1) :]
        if not first & FROM_SERVER:
            return cls(rest, [*cuts])
        count = rest[0] % (MOST_ASKED + 1) if rest else 0
        return cls(rest[1 + count :], [*cuts], [place % len(ANSWERED) for place in rest[1 : 1 + count]])

    def written(self) -> bytes:
        """The bytes that stand for it."""
        head = len(self.cuts) | (0 if self.asked is None else FROM_SERVER)
        asked = b"" if self.asked is None else bytes((len(self.asked), *self.asked))
        return bytes((head, *self.cuts)) + asked + self.data


def asked_for(place: int) -> Request:
    """The request whose place in `ANSWERED` this is, with arguments that do not matter to its reply."""
    command = ANSWERED[place]
    blanks: list[Any] = []
    for name in command.parameters:
        kind = next(field.kind for field in command.header if field.name == name)
        blanks.append({Kind.LENGTH: b"", Kind.COUNT: [], Kind.NUMBER: 3}[kind])
    return Request(command, tuple(blanks))


def check(raw: bytes) -> int:
    """Hold the input that ``raw`` stands for against the oracle; answer how many messages it had."""
    given = Input.read(raw)
    if given.asked is None:
        return check_server(given.data, given.cuts)
    return check_client([asked_for(place) for place in given.asked], given.data, given.cuts)


def mutated(raw: bytes, draw: random.Random) -> bytes:
    """Another input, made of ``raw`` by somebody who knows what frames are."""
    given = Input.read(raw)
    kind = draw.random()
    if kind < 0.1:
        cuts = [draw.choice((0, 1, 2, 5, 6, draw.randrange(256))) for _ in range(draw.randrange(MOST_CUTS + 1))]
        return given._replace(cuts=cuts).written()
    if given.asked is not None:
        asked = [draw.randrange(len(ANSWERED)) for _ in range(draw.randrange(1, MOST_ASKED + 1))]
        if kind < 0.5:
            data = b"".join(reply_to(draw, asked_for(place)) for place in asked)
            return given._replace(asked=asked, data=damaged(draw, data) if kind < 0.3 else data).written()
        return given._replace(data=damaged(draw, given.data)).written()
    if kind < 0.3:
        return given._replace(data=given.data + frame(draw)).written()
    if kind < 0.5:
        return given._replace(data=frame(draw) + given.data).written()
    if kind < 0.65:
        return given._replace(data=given.data + damaged(draw, frame(draw))).written()
    return given._replace(data=damaged(draw, given.data)).written()
