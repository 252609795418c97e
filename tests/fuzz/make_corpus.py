"""Write the corpus anew: ``python -m tests.fuzz.make_corpus``.

A small file for each kind of request in the transcripts of an original server, and for each kind of its replies; then
some for the commands that the transcripts have not.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from beaker_statestore.exceptions import ProtocolError
from beaker_statestore.tyrant.commands import COMMANDS, Request
from beaker_statestore.tyrant.wire import RequestDecoder, encode_request
from tests.fuzz.frames import ANSWERED, frame, reply_to
from tests.fuzz.inputs import Input, asked_for
from tests.test_transcripts import TRANSCRIPTS, exchanges

CORPUS = Path(__file__).parent / "corpus"
#: So long may a file be, and so many there may be.
LONGEST = 400
MOST = 199


def seeds() -> Iterator[tuple[str, Input]]:
    """The inputs and their names."""
    for transcript in TRANSCRIPTS:
        for exchange in exchanges(transcript):
            if len(exchange.request) > LONGEST:
                continue
            requests = binary(exchange.request)
            if not requests:
                yield f"text-{slug(exchange.name)}", Input(exchange.request)
            elif len(requests) == 1:
                (request,) = requests
                kind = request.command.name + (
                    "-" + request.arguments[0].decode() if request.command.name == "misc" else ""
                )
                yield f"binary-{kind}", Input(exchange.request, [1, 3])
                if request.command in ANSWERED:
                    place = ANSWERED.index(request.command)
                    state = "good" if exchange.reply[:1] == b"\0" else "bad"
                    yield f"reply-{request.command.name}-{state}", Input(exchange.reply, [2], [place])
    draw = random.Random(4)
    for command in COMMANDS.values():
        name = f"binary-{command.name}"
        yield name, Input(encode_request(blank(command.id)), [2])
    for number in range(10):
        yield f"mixed-{number}", Input(b"".join(frame(draw) for _ in range(4)), [draw.randrange(60)])
        places = [draw.randrange(len(ANSWERED)) for _ in range(3)]
        replies = b"".join(reply_to(draw, asked_for(place)) for place in places)
        yield f"replies-{number}", Input(replies, [draw.randrange(20)], places)


def binary(data: bytes) -> list[Request]:
    """The requests that ``data`` is in the binary protocol; none if it is in another."""
    decoder = RequestDecoder()
    decoder.feed(data)
    requests = []
    try:
        while (request := decoder.next()) is not None:
            requests.append(request)
    except ProtocolError:
        return []
    return requests


def blank(command_id: int) -> Request:
    """A request whose arguments are as short as they may be."""
    command = COMMANDS[command_id]
    kinds = {field.name: field.kind.name for field in command.header}
    return Request(
        command, tuple({"LENGTH": b"k", "COUNT": [b"k"], "NUMBER": 1}[kinds[name]] for name in command.parameters)
    )


def slug(name: str) -> str:
    return "-".join("".join(letter if letter.isalnum() else " " for letter in name).split())


def main() -> None:
    """Replace all files of the corpus."""
    CORPUS.mkdir(exist_ok=True)
    for path in CORPUS.iterdir():
        path.unlink()
    found: dict[str, Input] = {}
    for name, seed in seeds():
        found.setdefault(name, seed)
    assert len(found) <= MOST, f"{len(found)} files are too many"
    for name, seed in found.items():
        (CORPUS / name).write_bytes(seed.written())
    print(f"{len(found)} files, {sum(path.stat().st_size for path in CORPUS.iterdir())} bytes")


if __name__ == "__main__":
    main()
