"""A mixed load by processes that know what each of their records must be, and that may be killed at any moment."""

from __future__ import annotations

import ctypes
import multiprocessing
import random
import statistics
import time
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from multiprocessing.sharedctypes import RawArray
from pathlib import Path
from typing import Final

from beaker_statestore.stores import open_store
from beaker_statestore.testing import ServerProcess
from tests.faults.servers import PATIENCE, descriptors, eventually, resident

__all__ = ["Soaked", "soak"]

#: Each process has so many records.
KEYS: Final = 200
#: Until the server's memory is what it stays, as a part of the time.
WARM_UP: Final = 0.3

_spawning = multiprocessing.get_context("spawn")


@dataclass
class Soaked:
    """What a soak has come to."""

    operations: int = 0
    #: Clients that were killed, and started again.
    kills: int = 0
    #: What clients found to be otherwise than they knew it must be.
    wrong: list[str] = field(default_factory=list)
    #: The server's memory after the warm-up, and at the end, in bytes.
    resident: tuple[int, int] = (0, 0)
    #: Its open files before the first client, and after the last.
    descriptors: tuple[int, int] = (0, 0)


def work(url: str, number: int, seed: int, done: ctypes.Array[ctypes.c_ulonglong], told: str) -> None:
    """One process: changes its own records in all ways and compares each time.

    :param done: where it counts what it has done.
    :param told: a file for what failed.
    """
    chance = random.Random(seed)
    known: dict[bytes, bytes] = {}
    keys = [b"soak:%d:%d" % (number, key) for key in range(KEYS)]
    with open_store(url) as store:
        try:
            store.delete_many(keys)
            while True:
                key = chance.choice(keys)
                new = b"%s %d " % (key, done[number]) * chance.choice((1, 10, 200))
                before, way = known.get(key), chance.randrange(8)
                if way == 0:
                    assert store.delete(key) is (before is not None), "delete"
                    known.pop(key, None)
                elif way == 1:
                    assert store.add(key, new) is (before is None), "add"
                    known.setdefault(key, new)
                elif way == 2:
                    assert store.compare_and_swap(key, before, new), "compare_and_swap"
                    known[key] = new
                elif way == 3:
                    assert not store.compare_and_swap(key, b"never this", new), "compare_and_swap"
                elif way == 4:
                    some = chance.sample(keys, 20)
                    assert store.get_many(some) == {key: known[key] for key in some if key in known}, "get_many"
                elif way == 5:
                    some = chance.sample(keys, 20)
                    store.put_many(dict.fromkeys(some, new))
                    known |= dict.fromkeys(some, new)
                elif way == 6:
                    store.put(key, new)
                    known[key] = new
                else:
                    assert store.get(key) == before, "get"
                done[number] += 1
        except Exception as error:
            Path(told).write_text(f"after {done[number]} operations: {error!r}")
            raise


def soak(server: ServerProcess, seconds: float, told: Path, *, clients: int = 4, seed: int = 1) -> Soaked:
    """Load the running ``server`` so long, and kill and restart a client every now and then.

    :param told: a directory, where clients say what they found wrong.
    """
    soaked, chance = Soaked(), random.Random(seed)
    done = RawArray(ctypes.c_ulonglong, clients)

    def begin(number: int) -> BaseProcess:
        arguments = (server.url, number, chance.getrandbits(32), done, str(told / f"{number}-{soaked.kills}"))
        process = _spawning.Process(target=work, args=arguments)
        process.start()
        return process

    before = descriptors(server.pid)
    at_work = [begin(number) for number in range(clients)]
    sizes: list[tuple[float, int]] = []
    try:
        eventually(lambda: all(done) or any(told.iterdir()), "all clients are at work")
        began = time.monotonic()
        while (passed := time.monotonic() - began) < seconds and not any(told.iterdir()):
            time.sleep(chance.uniform(0.2, 1.5))
            sizes.append((passed, resident(server.pid)))
            number = chance.randrange(clients)
            at_work[number].kill()
            at_work[number].join(PATIENCE)
            soaked.kills += 1
            at_work[number] = begin(number)
    finally:
        for process in at_work:
            process.kill()
            process.join(PATIENCE)
    soaked.operations = sum(done)
    soaked.wrong = [file.read_text() for file in sorted(told.iterdir())]
    warm = [size for passed, size in sizes if passed >= WARM_UP * seconds] or [0]
    third = max(1, len(warm) // 3)
    soaked.resident = int(statistics.median(warm[:third])), int(statistics.median(warm[-third:]))
    eventually(lambda: descriptors(server.pid) <= before, "the server has closed what the clients have left")
    soaked.descriptors = before, descriptors(server.pid)
    return soaked
