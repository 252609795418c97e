"""Signals to a server at work. (SIGTERM under load: see test_server; SIGSTOP: see test_tyrant_store.)"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT, SUCCESS, Reply
from tests.faults.servers import eventually
from tests.serving import RawClient

MALFORMED = bytes.fromhex("C899")


@pytest.mark.parametrize("verbose", [False, True])
def test_sighup_opens_the_log_anew_and_disturbs_nobody(tmp_path: Path, verbose: bool) -> None:
    log, old = tmp_path / "server.log", tmp_path / "server.log.1"
    arguments = ["--log", str(log), *(["--verbose"] if verbose else [])]
    with ServerProcess("memory:", arguments=arguments) as server:
        address = Address.parse(server.url)

        def break_the_protocol() -> None:
            with RawClient(address) as client:
                client.send(MALFORMED)
                client.is_closed()

        with RawClient(address) as client:
            assert client.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
            break_the_protocol()
            if verbose:
                eventually(lambda: "closing" in log.read_text(), "the log tells of it")
            for _ in range(3):
                log.rename(old)
                said = old.read_text()
                os.kill(server.pid, signal.SIGHUP)
                eventually(log.exists, "there is a log again")
                assert client.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]
                break_the_protocol()
                if verbose:
                    eventually(lambda: "closing" in log.read_text(), "the new log tells of it")
                assert old.read_text() == said
        assert "Traceback" not in log.read_text() + server.output


def test_a_crash_within_a_library_does_not_go_unexplained() -> None:
    """As when LMDB meets a damaged page: see test_damage."""
    with ServerProcess("memory:") as server:
        os.kill(server.pid, signal.SIGSEGV)
        eventually(lambda: "Current thread" in server.output, "it says where it was")
        assert "Fatal Python error: Segmentation fault" in server.output
        server.kill()
