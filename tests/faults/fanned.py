"""A fan-out queue whose consumers and whose server are killed at random: who has seen what, and in which order."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, NamedTuple

from beaker_statestore.exceptions import OutcomeUnknown, StoreUnavailable
from beaker_statestore.fanout import LeaseLost, Queue
from beaker_statestore.testing import ServerProcess
from tests.faults.servers import PATIENCE

__all__ = ["Fanned", "fan_out"]

NAME: Final = "soak"
#: How long a consumer may be silent, in seconds; a killed one is relieved after that.
LEASE: Final = 0.5
#: A consumer acknowledges so many messages at a time, or as many as there are.
BATCH: Final = 10
#: How long a producer waits when the store is out of reach or full, in seconds.
PAUSE: Final = 0.05

_spawning = multiprocessing.get_context("spawn")


class Seen(NamedTuple):
    """A line in a process's file: the message of this number was this producer's, its so-manieth."""

    number: int
    producer: int
    serial: int


@dataclass
class Fanned:
    """What it has come to."""

    pushed: int = 0
    #: Pushes of which the producer could not know whether they were done, so that it did them again.
    doubtful: int = 0
    #: Of all consumers together.
    seen: int = 0
    repeated: int = 0
    lost: int = 0
    invented: int = 0
    disordered: int = 0
    dead: int = 0
    consumers_killed: int = 0
    servers_killed: int = 0
    seconds: float = 0.0

    @property
    def kept(self) -> bool:
        """Whether everybody has seen everything, in order, and nothing else."""
        return self.pushed > 0 and not (self.lost or self.invented or self.disordered or self.dead)


def produce(url: str, which: int, count: int, limit: int, path: str) -> None:
    """Push so many messages, each until that has succeeded; write down each."""
    queue = Queue(url, NAME, limit=limit)
    with open(path, "wb", buffering=0) as file:
        for serial in range(count):
            while True:
                try:
                    number = queue.push([which, serial])
                    break
                except OutcomeUnknown:
                    file.write(b"0 0 0\n")
                except StoreUnavailable:
                    pass
                time.sleep(PAUSE)
            file.write(b"%d %d %d\n" % (number, which, serial))


def consume(url: str, name: str, path: str) -> None:
    """Write down each message, then acknowledge it, for ever."""
    consumer = None
    with open(path, "ab", buffering=0) as file:
        while True:
            try:
                consumer = consumer or Queue(url, NAME).consumer(
                    name, start="beginning", lease=LEASE, backoff=PAUSE, longest_backoff=PAUSE
                )
                message = consumer.receive(1.0)
                for taken in range(1, BATCH + 1):
                    if message is None:
                        break
                    file.write(b"%d %d %d\n" % (message.number, *message.body))
                    following = consumer.receive(0) if taken < BATCH else None
                    if following is None:
                        consumer.acknowledge(message)
                    message = following
            except (StoreUnavailable, LeaseLost):
                time.sleep(PAUSE)


def _lines(path: Path) -> Iterator[Seen]:
    with path.open() as file:
        for line in file:
            if line.endswith("\n"):  # a process may have been killed while it wrote the last one
                yield Seen(*map(int, line.split()))


def fan_out(
    server: ServerProcess,
    directory: Path,
    *,
    messages: int,
    producers: int = 8,
    consumers: int = 5,
    limit: int = 20_000,
    kill_consumer_every: float = 1.0,
    kill_server_every: float = 5.0,
    patience: float = 900.0,
    seed: int = 1,
) -> Fanned:
    """Push and consume so many messages through the running ``server``, while it and the consumers are killed.

    :param directory: where processes write down what they have done.
    :param kill_consumer_every: in seconds, on average; the killed one is started again at once. And so on.
    :raises AssertionError: it has not come to its end within ``patience`` seconds.
    """
    fanned, chance = Fanned(), random.Random(seed)
    names = [f"consumer{number}" for number in range(consumers)]
    queue = Queue(server.url, NAME, limit=limit)
    for name in names:
        queue.consumer(name, start="beginning")
    shares = [messages // producers + (which < messages % producers) for which in range(producers)]
    began = time.monotonic()

    def consuming(name: str) -> BaseProcess:
        process = _spawning.Process(target=consume, args=(server.url, name, str(directory / name)), daemon=True)
        process.start()
        return process

    at_work = {name: consuming(name) for name in names}
    pushing: list[BaseProcess] = [
        _spawning.Process(
            target=produce, args=(server.url, which, share, limit, str(directory / f"producer{which}")), daemon=True
        )
        for which, share in enumerate(shares)
    ]
    for process in pushing:
        process.start()
    next_consumer = began + chance.uniform(0.5, 1.5) * kill_consumer_every
    next_server = began + chance.uniform(0.5, 1.5) * kill_server_every
    try:
        while True:
            now = time.monotonic()
            assert now - began < patience, f"not done within {patience:g} s: {queue.report()}"
            if now >= next_consumer:
                name = chance.choice(names)
                at_work[name].kill()
                at_work[name].join(PATIENCE)
                fanned.consumers_killed += 1
                at_work[name] = consuming(name)
                next_consumer = time.monotonic() + chance.uniform(0.5, 1.5) * kill_consumer_every
            if now >= next_server:
                server.kill()
                fanned.servers_killed += 1
                server.start()
                next_server = time.monotonic() + chance.uniform(0.5, 1.5) * kill_server_every
            if not any(process.is_alive() for process in pushing):
                report = queue.report()
                if not any(consumer.behind for consumer in report.consumers):
                    break
            time.sleep(0.05)
    finally:
        for process in [*at_work.values(), *pushing]:
            process.kill()
            process.join(PATIENCE)
    fanned.seconds = time.monotonic() - began
    assert all(process.exitcode == 0 for process in pushing), "a producer has failed"
    fanned.dead = sum(consumer.dead for consumer in report.consumers)
    _compare(fanned, shares, [directory / f"producer{which}" for which in range(producers)], directory, names)
    return fanned


def _compare(fanned: Fanned, shares: list[int], pushed_files: list[Path], directory: Path, names: list[str]) -> None:
    """Count what is wrong with what each consumer has seen."""
    written = [line for path in pushed_files for line in _lines(path)]
    pushed = {line.number: line for line in written if line.number}
    fanned.pushed, fanned.doubtful = sum(shares), sum(not line.number for line in written)
    assert len(pushed) == fanned.pushed, "two pushes had the same number"
    #: What all of them have to have seen alike under each number; a doubtful push may have been done, too.
    agreed: dict[int, Seen] = dict(pushed)
    for name in names:
        seen = list(_lines(directory / name))
        firsts = list(dict.fromkeys(seen))
        fanned.seen += len(seen)
        fanned.repeated += len(seen) - len(firsts)
        fanned.lost += len(pushed.keys() - {line.number for line in firsts})
        for line in firsts:
            known = line.producer < len(shares) and line.serial < shares[line.producer]
            fanned.invented += not known or agreed.setdefault(line.number, line) != line
        numbers = [line.number for line in firsts]
        fanned.disordered += sum(second <= first for first, second in pairwise(numbers))
        for which in range(len(shares)):
            serials = list(dict.fromkeys(line.serial for line in firsts if line.producer == which))
            fanned.disordered += sum(second < first for first, second in pairwise(serials))
