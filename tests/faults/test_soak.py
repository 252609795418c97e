"""The soak in small, so that it works when it is needed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

from click.testing import CliRunner

from beaker_statestore.stores import open_store
from beaker_statestore.testing import ServerProcess
from tests.faults import mixed
from tests.faults.mixed import soak
from tests.faults.servers import eventually
from tests.faults.soak import main


def test_clients_that_know_what_must_be_there_find_it_and_leave_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "told").mkdir()
    with ServerProcess(str(tmp_path / "state.lmdb")) as server:
        soaked = soak(server, 0.5, tmp_path / "told", clients=2)
    assert soaked.wrong == []
    assert soaked.operations > 100
    assert soaked.kills > 0
    assert soaked.descriptors[0] == soaked.descriptors[1]


def test_they_do_find_what_is_wrong(tmp_path: Path) -> None:
    told = tmp_path / "told"
    with ServerProcess() as server, open_store(server.url) as store:
        child = multiprocessing.get_context("spawn").Process(target=mixed.work, args=(server.url, 0, 1, [0], str(told)))
        child.start()

        def has_ended() -> bool:
            store.put_many({b"soak:0:%d" % key: b"another's" for key in range(mixed.KEYS)})
            return not child.is_alive()

        try:
            eventually(has_ended, "it finds what it has not put there")
        finally:
            child.kill()
            child.join()
    assert "AssertionError" in told.read_text()


def test_it_says_what_it_has_found() -> None:
    done = CliRunner().invoke(main, ["--kills", "4", "growth"], catch_exceptions=False)
    assert done.exit_code == 0
    assert "good" in done.output
