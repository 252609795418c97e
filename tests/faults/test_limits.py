"""Connections at their limit: a server that may open no more files, and peers that have vanished."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT, SUCCESS, Reply
from tests.faults.servers import Misled, cpu_seconds, descriptors, eventually
from tests.serving import LOOPS, RawClient

FILES = 64


@pytest.fixture(scope="module", params=LOOPS)
def server(request: pytest.FixtureRequest) -> Iterator[Misled]:
    by = ["prlimit", f"--nofile={FILES}:{FILES}"]
    with Misled("memory:", by=by, loop=request.param, arguments=["--max-connections", "1000"]) as server:
        yield server


@contextlib.contextmanager
def _crowd(address: Address, size: int = 100) -> Iterator[None]:
    """More clients than there are files. The kernel accepts them all, whatever the server does."""
    with contextlib.ExitStack() as crowd:
        for _ in range(size):
            with contextlib.suppress(ConnectionError):
                crowd.enter_context(socket.create_connection((address.host, address.port), 5))
        yield


def _is_served(address: Address) -> bool:
    try:
        with RawClient(address) as client:
            client.socket.settimeout(2)
            return client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
    except (AssertionError, OSError):
        return False


def test_without_files_to_open_it_serves_those_who_are_connected_and_later_all(server: Misled) -> None:
    address = Address.parse(server.url)
    with RawClient(address) as client:
        assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
        with _crowd(address):
            eventually(lambda: descriptors(server.pid) > FILES / 2, "the server has as many connections as it can")
            for _ in range(100):
                assert client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
        eventually(lambda: _is_served(address), "new clients are served again")
        assert client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]


def test_without_files_to_open_it_says_so_and_waits_without_haste(server: Misled) -> None:
    address = Address.parse(server.url)
    with _crowd(address):
        eventually(lambda: descriptors(server.pid) > FILES / 2, "the server has as many connections as it can")
        began, used = time.monotonic(), cpu_seconds(server.pid)
        time.sleep(1.1)  # asyncio tries again each second
        used = cpu_seconds(server.pid) - used
        assert used < 0.2 * (time.monotonic() - began)
    assert "open files" in server.output
    # As often as somebody knocks would fill the disk.
    assert len(server.output) < 10_000


def test_a_peer_that_has_vanished_will_be_asked_within_two_minutes(tyrant_server: ServerProcess) -> None:
    """Then again each half minute, and it is given up after four: see `listening.KEEPALIVE`."""
    address = Address.parse(tyrant_server.url)
    with RawClient(address) as client:
        client.ask(GET(b"k"))
        # Both ends, as others may have connections from the same port to elsewhere.
        ends = [_in_proc(client.socket.getpeername()), _in_proc(client.socket.getsockname())]
        # proc_net_tcp(5): the two addresses, and which timer runs (02: the keepalive) for how long, in 1/100 s.

        def timers() -> list[list[str]]:
            lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
            return [line[5].split(":") for line in lines if line[1:3] == ends]

        # While the reply has not been acknowledged, another timer runs.
        eventually(lambda: [timer for timer, _ in timers()] == ["02"], "the timer of the keepalive runs")
        ((_, ticks),) = timers()
    assert 100 < int(ticks, 16) / os.sysconf("SC_CLK_TCK") <= 120


def _in_proc(name: tuple[str, int]) -> str:
    return f"{int.from_bytes(socket.inet_aton(name[0]), sys.byteorder):08X}:{name[1]:04X}"
