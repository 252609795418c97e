"""How fast messages go through a fan-out queue, and how long they take from push to receipt.

    .venv/bin/python -m benchmarks.fanout

A real ``statestore serve`` process over LMDB, a producer, and consumers in processes of their own. Latency is measured
at a slow pace, with consumers that wait: by long poll, as `TyrantStore.wait` does it, and by looking again and again,
as `Store.wait` does. The two take turns, round by round, so that whatever else the machine does strikes both alike. All
processes read the same monotonic clock. Throughput is what one producer pushes while nobody reads, and what one
consumer then receives and acknowledges, one by one or ten at a time.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from beaker_statestore.fanout import Queue
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.testing import ServerProcess

#: How long anything may take, in seconds.
DEADLINE: Final = 120.0
#: Between two messages when latency is measured, in seconds: irregular, so that no poll falls into step.
PACE: Final = (0.02, 0.2, 0.6)
BODY: Final = {"event": "state", "sender": "zed@example.com", "key": "shop.handlers", "state": "MEMBER"}

_spawning = multiprocessing.get_context("spawn")


def listen(url: str, name: str, poll: bool, count: int, pipe: Connection) -> None:
    """Receive so many messages and answer how old each was, in seconds."""
    store = open_store(url)
    if poll:
        wait = Store.wait.__get__(store)
        store.wait = wait  # type: ignore[method-assign]
    with Queue(store, name).consumer("listener") as consumer:
        consumer.receive(0)
        pipe.send("ready")
        ages = []
        for _ in range(count):
            message = consumer.receive(DEADLINE)
            assert message is not None
            ages.append(time.monotonic() - message.body["sent"])
            consumer.acknowledge(message)
        pipe.send(ages)


def latencies(url: str, name: str, *, poll: bool, count: int) -> list[float]:
    """How old each of so many messages was when it was received, in seconds."""
    queue = Queue(url, name)
    ours, theirs = _spawning.Pipe()
    process = _spawning.Process(target=listen, args=(url, name, poll, count, theirs), daemon=True)
    process.start()
    try:
        assert ours.poll(DEADLINE)
        ours.recv()
        for number in range(count):
            time.sleep(PACE[number % len(PACE)])
            queue.push({"sent": time.monotonic()})
        assert ours.poll(DEADLINE)
        ages: list[float] = ours.recv()
        return ages
    finally:
        process.kill()
        process.join()


def throughput(url: str, name: str, count: int) -> dict[str, float]:
    """Messages a second, by what is done with them."""
    queue = Queue(url, name)
    consumers = {1: queue.consumer("one"), 10: queue.consumer("ten")}
    began = time.perf_counter()
    for _ in range(count):
        queue.push(BODY)
    rates = {"pushed": count / (time.perf_counter() - began)}
    for batch, consumer in consumers.items():
        began = time.perf_counter()
        for number in range(1, count + 1):
            message = consumer.receive(DEADLINE)
            assert message is not None
            if number % batch == 0 or number == count:
                consumer.acknowledge(message)
        rates[f"received, acknowledged {batch} at a time"] = count / (time.perf_counter() - began)
    return rates


def quantiles(measured: list[float]) -> list[float]:
    """The median, the 99th percentile and the largest."""
    ordered = sorted(measured)
    return [ordered[int(part * (len(ordered) - 1))] for part in (0.5, 0.99, 1.0)]


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--latencies", "timed", type=click.IntRange(min=3), default=60, show_default=True, help="In each round.")
@click.option("--messages", type=click.IntRange(min=10), default=3000, show_default=True, help="For throughput.")
def main(rounds: int, timed: int, messages: int) -> None:
    """Measure and print."""
    ages: dict[str, list[float]] = {"long poll": [], "polling": []}
    rates: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory, ServerProcess(str(Path(directory) / "state.lmdb")) as server:
        for number in range(rounds):
            for way, measured in ages.items():
                name = f"{way.replace(' ', '-')}{number}"
                measured += latencies(server.url, name, poll=way == "polling", count=timed)
            for what, rate in throughput(server.url, f"rate{number}", messages).items():
                rates[what] = max(rate, rates.get(what, 0.0))
    table = Table("push to receipt", "p50", "p99", "worst", box=None)
    for way, measured in ages.items():
        table.add_row(way, *(f"{1000 * seconds:.1f} ms" for seconds in quantiles(measured)))
    told, looked = map(quantiles, ages.values())
    table.add_row("polling : long poll", *(f"{theirs / ours:.1f}" for ours, theirs in zip(told, looked, strict=True)))
    Console().print(table)
    table = Table("throughput, best round", "", box=None)
    for what, rate in rates.items():
        table.add_row(what, f"{rate:,.0f}/s")
    Console().print(table)


if __name__ == "__main__":
    main()
