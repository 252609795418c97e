"""What an original ttserver answered, byte for byte, is what our server answers, over real sockets.

Each transcript is replayed on its own type of database, and on the stores that the original has not. Where ours
answers differently on purpose, `DIFFERENCES` and `taken_for_the_same` say how, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest

from beaker_statestore import __version__
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.stores.cabinet import CabinetStore
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant.commands import RNUM, SUCCESS
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import OPEN
from beaker_statestore.tyrant.server import ServerOptions
from tests.serving import LOOPS, RawClient, ServerThread

#: Each with the database that it was taken on.
TRANSCRIPTS = {
    "ttserver-1.1.41-mem-hash": "*",
    "ttserver-1.1.41-mem-tree": "+",
    "ttserver-1.1.41-tcb": "casket.tcb",
    "ttserver-1.1.41-tch": "casket.tch",
}

#: Our servers' answers to exchanges that the original answers differently, by kind of store and name of the exchange.
#: In these stores a key has one value, the last; the original's B+ tree keeps all that ``putlist`` brings.
ONE_VALUE = {
    "misc get gives all duplicates": "00 00000001  00000001 32",
    "get gives the first duplicate": "00 00000001 32",
}
DIFFERENCES = {"memory": ONE_VALUE, "lmdb": ONE_VALUE, "its own": {}}

#: Headers that our answers have besides the original's: browsers shall not guess what a value is, nor keep it, nor
#: hand it to pages of other origins; and programs shall know what becomes of the connection.
MORE_HEADERS = {
    "x-content-type-options": {"nosniff"},
    "cache-control": {"no-store"},
    "cross-origin-resource-policy": {"same-origin"},
    "connection": {"close"},
}


class Exchange(NamedTuple):
    """What was sent on which connection, and what came of it."""

    name: str
    connection: int
    request: bytes
    reply: bytes
    closed: bool


def exchanges(transcript: str) -> Iterator[Exchange]:
    path = Path(__file__).parent / "data" / f"{transcript}.jsonl"
    for line in path.read_text().splitlines():
        fields = json.loads(line)
        yield Exchange(
            fields["name"],
            fields["connection"],
            bytes.fromhex(fields["request"]),
            bytes.fromhex(fields["reply"]),
            fields["closed"],
        )


def store_of(kind: str, database: str, directory: Path) -> LocalStore:
    if kind == "memory":
        return MemoryStore()
    if kind == "lmdb":
        return LMDBStore(directory / "state.lmdb")
    return CabinetStore(database if database in ("*", "+") else directory / database)


def receive_http(client: RawClient, *, head_only: bool) -> bytes:
    """One answer of HTTP, whatever headers it has."""
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += client.receive(1)
    return answer if head_only else answer + client.receive(int(headers_of(answer).get("content-length", 0)))


def headers_of(answer: bytes) -> dict[str, str]:
    _, *lines = answer.partition(b"\r\n\r\n")[0].decode("ascii").split("\r\n")
    return {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}


def taken_for_the_same(ours: bytes, originals: bytes) -> bool:
    """Whether two answers of HTTP are equal but for headers: first line and body, and the original's own headers.

    The original names no character set; and it sends no headers at all with the 404 to a ``HEAD``, where ours sends
    those of the 404 to a ``GET``.
    """
    their_headers, our_headers = headers_of(originals), headers_of(ours)
    without_headers = originals.startswith(b"HTTP/1.1 404 Not Found\r\n\r\n")
    ours_alone = our_headers.keys() - their_headers.keys()
    kind = our_headers["content-type"].removesuffix("; charset=utf-8")
    return (
        ours.partition(b"\r\n")[0] == originals.partition(b"\r\n")[0]
        and ours.partition(b"\r\n\r\n")[2] == originals.partition(b"\r\n\r\n")[2]
        and our_headers | {"content-type": kind} | their_headers == our_headers | {"content-type": kind}
        and ours_alone - MORE_HEADERS.keys() == ({"content-type", "content-length"} if without_headers else set())
        and all(our_headers[name] in MORE_HEADERS[name] for name in ours_alone & MORE_HEADERS.keys())
    )


def replay(exchange: Exchange, client: RawClient, differences: dict[str, str]) -> None:
    client.send(exchange.request)
    if exchange.reply.startswith(b"HTTP/"):
        ours = receive_http(client, head_only=exchange.request.startswith(b"HEAD "))
        assert taken_for_the_same(ours, exchange.reply), exchange.name
        return
    # The one answer in which the server tells who it is.
    expected = exchange.reply.replace(b"VERSION 1.1.41\r\n", f"VERSION {__version__}\r\n".encode())
    if exchange.name in differences:
        expected = bytes.fromhex(differences[exchange.name])
    assert client.receive(len(expected)) == expected, exchange.name


def test_there_is_a_database_for_each_transcript() -> None:
    assert {path.stem for path in (Path(__file__).parent / "data").glob("ttserver-*.jsonl")} == TRANSCRIPTS.keys()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", DIFFERENCES)
@pytest.mark.parametrize(("transcript", "database"), TRANSCRIPTS.items(), ids=list(TRANSCRIPTS))
def test_our_server_answers_as_the_original_did(
    transcript: str, database: str, kind: str, loop: str, tmp_path: Path
) -> None:
    options = ServerOptions(tcp_mask=OPEN, http=HTTPPolicy())
    replayed = list(exchanges(transcript))
    assert len(replayed) >= 137
    store = store_of(kind, database, tmp_path)
    with ServerThread(store, loop=loop, options=options) as server, ExitStack() as opened:
        clients: dict[int, RawClient] = {}
        for exchange in replayed:
            if exchange.connection not in clients:
                clients[exchange.connection] = opened.enter_context(server.connect())
            client = clients[exchange.connection]
            replay(exchange, client, DIFFERENCES[kind])
            if exchange.closed:
                assert client.is_closed(), exchange.name
                del clients[exchange.connection]
        # Those that were not closed are open, and nothing came on them that was not in the transcript.
        for client in clients.values():
            ((status, count),) = client.ask(RNUM())
            assert (status, count) == (SUCCESS, 0)


def test_no_difference_is_allowed_that_is_not_there() -> None:
    names = {exchange.name: exchange.reply for name in TRANSCRIPTS for exchange in exchanges(name)}
    for name, reply in ONE_VALUE.items():
        assert names[name] != bytes.fromhex(reply)
