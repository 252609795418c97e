"""What an original ttserver answered, byte for byte, is what our server answers, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

from beaker_statestore.stores.base import LocalStore
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant.commands import RNUM, SUCCESS
from tests.serving import LOOPS, RawClient, ServerThread

TRANSCRIPTS = sorted((Path(__file__).parent / "data").glob("ttserver-*.jsonl"))

#: Which exchanges are not replayed, by name, and why.
LEFT_OUT = {
    "memcached *": "the memcached protocol is not spoken yet",
    "http *": "HTTP is not spoken yet, and the binary get among these reads what HTTP has stored",
    "one packet, three protocols: memcached version, then binary rnum": "as above",
    "misc get gives all duplicates": "a key has one value here",
    "get gives the first duplicate": "a key has one value here, and it is the last",
}


class Exchange(NamedTuple):
    """What was sent on which connection, and what came of it."""

    name: str
    connection: int
    request: bytes
    reply: bytes
    closed: bool


def exchanges(transcript: Path) -> Iterator[Exchange]:
    for line in transcript.read_text().splitlines():
        fields = json.loads(line)
        yield Exchange(
            fields["name"],
            fields["connection"],
            bytes.fromhex(fields["request"]),
            bytes.fromhex(fields["reply"]),
            fields["closed"],
        )


def is_left_out(exchange: Exchange) -> bool:
    return any(fnmatchcase(exchange.name, pattern) for pattern in LEFT_OUT)


@pytest.fixture(params=["memory", "lmdb"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LocalStore:
    return MemoryStore() if request.param == "memory" else LMDBStore(tmp_path / "state.lmdb")


@pytest.mark.parametrize("pattern", LEFT_OUT)
def test_nothing_is_left_out_that_is_not_there(pattern: str) -> None:
    names = {exchange.name for transcript in TRANSCRIPTS for exchange in exchanges(transcript)}
    assert any(fnmatchcase(name, pattern) for name in names)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda path: path.stem)
def test_our_server_answers_as_the_original_did(transcript: Path, store: LocalStore, loop: str) -> None:
    replayed = [exchange for exchange in exchanges(transcript) if not is_left_out(exchange)]
    assert len(replayed) > 80
    with ServerThread(store, loop=loop) as server, ExitStack() as opened:
        clients: dict[int, RawClient] = {}
        for exchange in replayed:
            if exchange.connection not in clients:
                clients[exchange.connection] = opened.enter_context(server.connect())
            client = clients[exchange.connection]
            client.send(exchange.request)
            assert client.receive(len(exchange.reply)) == exchange.reply, exchange.name
            if exchange.closed:
                assert client.is_closed(), exchange.name
                del clients[exchange.connection]
        # Those that were not closed are open, and nothing came on them that was not in the transcript.
        for client in clients.values():
            ((status, count),) = client.ask(RNUM())
            assert (status, count) == (SUCCESS, 0)
