"""Many processes at work on the same sessions while the server is killed: what was acknowledged is there at the end."""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import pytest
from beaker.session import Session

from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.testing import ServerProcess

PROCESSES = 8
SESSIONS = [f"{number:032x}" for number in range(1, 13)]

#: What a process knows of its own key in a session: the values that it may have. More than one after an outage.
Known = dict[str, list[Any]]


def _session(url: str, session_id: str) -> Session:
    return Session({}, id=session_id, use_cookies=False, type="ext:tcjson", url=url, touch_interval=0, deadline=3)


class Worker:
    """One process: it changes only its own key, in whatever session, and reads it back each time."""

    def __init__(self, url: str, number: int) -> None:
        self.url = url
        self.own = f"process{number}"
        self.known: Known = {session_id: [None] for session_id in SESSIONS}
        self.random = random.Random(number)
        self.acknowledged = self.refused = 0

    def run(self, operations: int) -> None:
        for number in range(operations):
            session_id = self.random.choice(SESSIONS)
            try:
                self.operate(session_id, number)
                self.acknowledged += 1
            except StoreUnavailable:
                self.refused += 1
                time.sleep(0.02)

    def operate(self, session_id: str, number: int) -> None:
        session = _session(self.url, session_id)
        seen = copy.deepcopy(session.get(self.own))
        assert seen in self.known[session_id], f"{self.own} of {session_id} is {seen}, not {self.known[session_id]}"
        self.known[session_id] = [seen]
        kind = self.random.choice(["set", "set", "append", "remove", "read"])
        if kind == "read":
            session.save(accessed_only=True)
            return
        if kind == "append" and isinstance(seen, list):
            session[self.own].append(number)
        elif kind == "remove":
            session.pop(self.own, None)
        else:
            session[self.own] = [number]
        after = copy.deepcopy(session.get(self.own))
        self.known[session_id] = [seen, after]
        session.save()
        self.known[session_id] = [after]


def _work(url: str, number: int, operations: int, path: str) -> None:
    worker = Worker(url, number)
    worker.run(operations)
    Path(path).write_text(json.dumps([worker.known, worker.acknowledged, worker.refused]))


@pytest.mark.parametrize("operations", [400, pytest.param(10_000, marks=pytest.mark.long)])
def test_every_acknowledged_change_to_ones_own_key_is_there_at_the_end(tmp_path: Path, operations: int) -> None:
    kills = 0
    with ServerProcess(f"lmdb://{tmp_path}/state.lmdb") as server:
        for session_id in SESSIONS:
            session = _session(server.url, session_id)
            session["begun"] = True
            session.save()
        paths = [tmp_path / f"{number}.json" for number in range(PROCESSES)]
        context = multiprocessing.get_context("spawn")
        workers = [
            context.Process(target=_work, args=(server.url, number, operations, str(path)))
            for number, path in enumerate(paths)
        ]
        try:
            for worker in workers:
                worker.start()
            deadline = time.monotonic() + 300
            pause = random.Random(1)
            while any(worker.is_alive() for worker in workers):
                assert time.monotonic() < deadline, "the processes did not end in time"
                workers[kills % PROCESSES].join(pause.uniform(0.1, 0.8))
                server.kill()
                server.start()
                kills += 1
        finally:
            for worker in workers:
                worker.kill()
                worker.join(10)
        ends = [json.loads(path.read_text()) for path in paths]
        for session_id in SESSIONS:
            session = _session(server.url, session_id)
            assert session["begun"] is True
            for number, (known, _, _) in enumerate(ends):
                assert session.get(f"process{number}") in known[session_id]
    acknowledged, refused = (sum(end[field] for end in ends) for field in (1, 2))
    print(f"{acknowledged} acknowledged, {refused} refused, {kills} kills")
    assert acknowledged + refused == PROCESSES * operations
    assert acknowledged > operations
    assert refused > 0
    assert kills >= 2
