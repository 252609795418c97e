"""A fan-out queue under kills: in small here, and as large as it is meant to be with ``--all``."""

from __future__ import annotations

from pathlib import Path

import pytest

from beaker_statestore.testing import ServerProcess
from tests.faults.fanned import fan_out


def test_every_consumer_sees_every_message_in_order_whoever_is_killed(tmp_path: Path) -> None:
    with ServerProcess(str(tmp_path / "state.lmdb")) as server:
        fanned = fan_out(
            server,
            tmp_path,
            messages=250,
            producers=2,
            consumers=2,
            limit=100,
            kill_consumer_every=0.7,
            kill_server_every=1.5,
            patience=60.0,
        )
    assert fanned.kept, fanned
    assert fanned.consumers_killed > 0


@pytest.mark.long
def test_100_000_messages(tmp_path: Path) -> None:
    with ServerProcess(str(tmp_path / "state.lmdb")) as server:
        fanned = fan_out(server, tmp_path, messages=100_000)
    assert fanned.kept, fanned
    assert fanned.consumers_killed > 10
    assert fanned.servers_killed > 3
