"""What statistics cost: a session's load and save with them, against the same without.

    .venv/bin/python -m benchmarks.counting

One visitor's session of about 2 kB, as Beaker loads and saves it: over a server's socket, and in an LMDB file. With and
without take turns, in short rounds whose order changes, so that whatever else the machine does strikes both alike; what
is compared is the medians. The cost is the median of what the two of one round differ by, in processor time of the
thread that counts, which other processes disturb least; its share is that of the time that passes without. Beside them
is what one call costs by itself, again and again.
"""

from __future__ import annotations

import random
import tempfile
import time
import timeit
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, Final, NamedTuple

from beaker.session import Session
from rich.console import Console
from rich.table import Table

from beaker_statestore import observe, statistics
from beaker_statestore.namespace import register
from beaker_statestore.testing import ServerProcess
from benchmarks.sessions import CONTENT

ROUNDS: Final = 400
#: Load and save so often in each round.
VISITS: Final = 25
CALLS: Final = 100_000


class Taken(NamedTuple):
    """Seconds per load and save: that have passed, and of the processor."""

    passed: float
    worked: float


def visits(options: dict[str, Any]) -> Callable[[], Taken]:
    """A function that loads, changes and saves one session, and answers how long that took on average."""
    first = Session({}, type="ext:tcjson", use_cookies=False, timeout=86400, **options)
    first.update(CONTENT)
    first.save()

    def visit() -> Taken:
        passed, worked = time.perf_counter(), time.thread_time()
        for n in range(VISITS):
            session = Session({}, id=first.id, type="ext:tcjson", use_cookies=False, timeout=86400, **options)
            session["n"] = n + random.random()  # noqa: S311 - so that there is something to save
            session.save()
        return Taken((time.perf_counter() - passed) / VISITS, (time.thread_time() - worked) / VISITS)

    return visit


def compare(visit: Callable[[], Taken], listeners: dict[str, observe.Listener]) -> dict[str, list[Taken]]:
    """What each round took with each listener."""
    rounds: dict[str, list[Taken]] = {name: [] for name in listeners}
    order = list(listeners)
    for _ in range(ROUNDS):
        random.shuffle(order)
        for name in order:
            observe.listener = listeners[name]
            rounds[name].append(visit())
    return rounds


def per_call(listener: observe.Listener) -> tuple[float, float]:
    """How many seconds it takes to tell of an operation, and of an event."""

    def operation() -> None:
        began = listener.clock()
        if began:
            listener.operation("127.0.0.1:1978", "get", began, 1, 0, 50, 2000)

    def event() -> None:
        listener.count("session.saved")

    return tuple(min(timeit.repeat(f, number=CALLS, repeat=5)) / CALLS for f in (operation, event))  # type: ignore[return-value]


def main() -> None:
    """Measure and print."""
    register()
    listeners = {"without": observe.Listener(), "with": statistics.install()}
    table = Table("load and save", *listeners, "cost", "share", box=None)
    with tempfile.TemporaryDirectory() as directory, ServerProcess(str(Path(directory) / "state.lmdb")) as server:
        stores = {"a server over LMDB": server.url, "LMDB in the process": f"lmdb://{directory}/own.lmdb"}
        for name, url in stores.items():
            rounds = compare(visits({"url": url}), listeners)
            passed = {listener: median(taken.passed for taken in each) for listener, each in rounds.items()}
            cost = median(b.worked - a.worked for a, b in zip(rounds["without"], rounds["with"], strict=True))
            times = (f"{seconds * 1e6:.1f} µs" for seconds in (*passed.values(), cost))
            table.add_row(name, *times, f"{cost / passed['without']:.2%}")
    console = Console()
    console.print(table)
    for name, listener in listeners.items():
        operation, event = per_call(listener)
        console.print(f"{name}: {operation * 1e6:.2f} µs to tell of an operation, {event * 1e6:.2f} µs of an event")


if __name__ == "__main__":
    main()
