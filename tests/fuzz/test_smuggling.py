"""Behind what is rejected, and behind a connection's last request, nothing is executed: not in the same packet, not
in the next, and in none of the protocols. Over real sockets, with a server that has all of them open."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant.commands import FWMKEYS, GET, MGET, MISC, PUT, RNUM, SUCCESS, Reply
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import OPEN, Mask
from beaker_statestore.tyrant.server import ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.fuzz.rejections import LAST, MASKED, REJECTED, WITHOUT_HTTP, writes_of
from tests.serving import RawClient, ServerThread

BEFORE = encode_request(PUT(b"before", b"1"))
STOLEN = writes_of(b"stolen", b"1")
KINDS = [
    *(pytest.param("with HTTP", data, id=name) for name, data in {**REJECTED, **LAST}.items()),
    *(pytest.param("without HTTP", data, id=f"no HTTP: {name}") for name, data in WITHOUT_HTTP.items()),
    *(pytest.param("masked", data, id=f"masked: {name}") for name, data in MASKED.items()),
]


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, ServerThread]]:
    """Those that the kinds of rejection need."""
    everything = ServerOptions(tcp_mask=OPEN, http=HTTPPolicy())
    options = {
        "with HTTP": everything,
        "without HTTP": ServerOptions(tcp_mask=OPEN),
        "masked": ServerOptions(tcp_mask=Mask.of(["putnr", "allmc"], [], OPEN), http=HTTPPolicy()),
    }
    with contextlib.ExitStack() as stack:
        yield {
            name: stack.enter_context(ServerThread(MemoryStore(), loop=loop, options=options[name]))
            for name, loop in zip(options, ("asyncio", "uvloop", "uvloop"), strict=True)
        }


def records(server: ServerThread) -> dict[bytes, bytes]:
    """What is in the store, which is emptied."""
    with server.connect() as client:
        ((_, keys),) = client.ask(FWMKEYS(b"", -1))
        (_, pairs), _ = client.ask(MGET(keys), MISC(b"outlist", keys, 0))
    return dict(pairs)


def send_all(client: RawClient, data: bytes) -> None:
    with contextlib.suppress(ConnectionError):  # the server may have noticed
        client.send(data)


def receive_to_end(client: RawClient) -> bytes:
    """All answers; a server that has closed with something unread resets the connection behind them."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := client.socket.recv(65536):
            parts.append(part)
    return b"".join(parts)


def assert_nothing_stolen(server: ServerThread, answers: bytes) -> None:
    # The one that came before was carried out and answered, and what came of the rejected one is no "done".
    assert answers[:1] == b"\0"
    assert b"STORED" not in answers
    kept = records(server)
    assert kept.pop(b"before") == b"1"
    assert kept in ({}, {b"last": b"1"})


@pytest.mark.parametrize("write", STOLEN.values(), ids=list(STOLEN))
@pytest.mark.parametrize(("name", "rejected"), KINDS)
def test_a_write_in_the_same_packet_is_never_executed(
    servers: dict[str, ServerThread], name: str, rejected: bytes, write: bytes
) -> None:
    server = servers[name]
    with server.connect() as client:
        send_all(client, BEFORE + rejected + write * 2)
        answers = receive_to_end(client)
        # It is closed: what comes later is heard by nobody.
        send_all(client, write)
    server.catch_up()
    assert_nothing_stolen(server, answers)


@pytest.mark.parametrize("write", STOLEN.values(), ids=list(STOLEN))
@pytest.mark.parametrize(("name", "rejected"), KINDS)
def test_nor_is_one_in_the_next_packet(
    servers: dict[str, ServerThread], name: str, rejected: bytes, write: bytes
) -> None:
    server = servers[name]
    with server.connect() as client:
        send_all(client, BEFORE)
        first = client.receive(1)
        send_all(client, rejected)
        server.catch_up()
        # Now the server has rejected it, and may be waiting for us to read the answer and close.
        for _ in range(2):
            send_all(client, write)
        with contextlib.suppress(OSError):
            client.socket.shutdown(socket.SHUT_WR)
        answers = first + receive_to_end(client)
    server.catch_up()
    assert_nothing_stolen(server, answers)


@pytest.mark.parametrize("name", ["with HTTP", "without HTTP", "masked"])
def test_the_writes_are_good_ones(servers: dict[str, ServerThread], name: str) -> None:
    """Where nothing that is rejected comes before them, that is: otherwise the tests above would prove nothing."""
    server = servers[name]
    wanted = {"with HTTP": STOLEN.keys(), "without HTTP": {"binary", "memcached"}, "masked": {"binary", "HTTP"}}[name]
    for protocol, write in STOLEN.items():
        with server.connect() as client:
            send_all(client, write)
            client.socket.shutdown(socket.SHUT_WR)
            receive_to_end(client)
        assert records(server) == ({b"stolen": b"1"} if protocol in wanted else {})


@pytest.mark.parametrize("kind", LAST)
def test_the_last_request_itself_is_answered(servers: dict[str, ServerThread], kind: str) -> None:
    server = servers["with HTTP"]
    with server.connect() as client:
        send_all(client, BEFORE + LAST[kind] + STOLEN["binary"])
        answers = receive_to_end(client)
    assert answers[1:].startswith(b"HTTP/1.1 20" if kind.startswith("HTTP") else b"")
    assert records(server).keys() == ({b"before", b"last"} if b"/last" in LAST[kind] else {b"before"})


def test_the_others_are_served_meanwhile(servers: dict[str, ServerThread]) -> None:
    server = servers["with HTTP"]
    with server.connect() as good, server.connect() as bad:
        send_all(bad, REJECTED["a negative length"] + STOLEN["binary"])
        assert good.ask(PUT(b"k", b"v"), GET(b"k"), RNUM()) == [Reply(SUCCESS), Reply(SUCCESS, b"v"), Reply(SUCCESS, 1)]
    records(server)
