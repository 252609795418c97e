"""``script/soak``: the long forms of these tests, and a table of what they have come to."""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import click
from rich.console import Console
from rich.table import Table

from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import PUT, SUCCESS, Reply
from tests.faults.fanned import fan_out
from tests.faults.killing import Tally, found, kill_under_load
from tests.faults.mixed import soak
from tests.faults.servers import Misled
from tests.serving import RawClient

__all__ = ["main"]

#: How often Tokyo Cabinet's files are synchronised here, in seconds, and how much later a sync may be done.
INTERVAL: Final = 1.0
LATE: Final = 1.0
#: By how much the server's memory may grow in a soak.
DRIFT: Final = 10 * 1024 * 1024


class Result(NamedTuple):
    good: bool
    #: What the columns of the table say, by their headings.
    cells: dict[str, str]


Case = Callable[[Path, int, float], Result]
CASES: Final[dict[str, Case]] = {}


def _case(name: str) -> Callable[[Case], Case]:
    def enter(case: Case) -> Case:
        CASES[name] = case
        return case

    return enter


def _tallied(good: bool, tally: Tally) -> Result:
    cells = {
        "kills": f"{tally.kills:,}",
        "acknowledged": f"{tally.acknowledged:,}",
        "lost": f"{tally.lost:,}",
        "wrong": f"{tally.wrong:,}",
        "reopened": f"{tally.kills:,}",
        "slowest start": f"{tally.slowest_start:.2f} s",
        "": f"the oldest lost write was {tally.oldest_lost:.2f} s old" if tally.lost else "",
    }
    return Result(good, cells)


def _killed(db: Path, sync: Sequence[str], kills: int, after: tuple[float, float]) -> Tally:
    with ServerProcess(str(db), arguments=["--sync", *sync]) as server:
        return kill_under_load(server, kills, after=after)


@_case("always")
def _always(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 under the load of 4 writers; LMDB, --sync always."""
    tally = _killed(directory / "state.lmdb", ["always"], kills, (0.02, 0.8))
    return _tallied(tally.kept, tally)


@_case("os")
def _os(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 under the load of 4 writers; LMDB, --sync os."""
    tally = _killed(directory / "state.lmdb", ["os"], kills, (0.02, 0.8))
    return _tallied(tally.kept, tally)


@_case("growth")
def _growth(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 while the map grows from 64 KiB, each time in a new file; LMDB, --sync os."""
    whole = Tally()
    for number in range(max(1, kills // 4)):
        db = f"lmdb://{directory}/{number}.lmdb?map_size=64KiB"
        with ServerProcess(db) as server:
            tally = kill_under_load(server, 1, after=(0.0, 0.2), size=20_000, seed=number)
        whole.kills += 1
        whole.acknowledged += tally.acknowledged
        whole.lost += tally.lost
        whole.wrong += tally.wrong
        whole.slowest_start = max(whole.slowest_start, tally.slowest_start)
    return _tallied(whole.kept, whole)


@_case("start")
def _start(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 at any moment of a start; LMDB, --sync always."""
    records = {b"%d" % number: b"%d " % number * 100 for number in range(100)}
    tally, chance = Tally(), random.Random(1)
    server = Misled(str(directory / "state.lmdb"), arguments=["--sync", "always"])
    began = time.monotonic()
    with server:
        took = time.monotonic() - began
        address = Address.parse(server.url)
        with RawClient(address) as client:
            assert client.ask(*(PUT(key, value) for key, value in records.items())) == [Reply(SUCCESS)] * 100
        for _ in range(max(1, kills // 4)):
            server.kill()
            server.start_and_kill(chance.uniform(0.3, 1.1) * took)
            began = time.monotonic()
            server.start()
            tally.slowest_start = max(tally.slowest_start, time.monotonic() - began)
            tally.kills += 1
            there = dict(found(address, list(records)))
            tally.lost += sum(there[key] is None for key in records)
            tally.wrong += sum(there[key] not in (None, value) for key, value in records.items())
    tally.acknowledged = len(records)
    return _tallied(tally.kept, tally)


@_case("tch")
def _tch(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 under the load of 4 writers; Tokyo Cabinet's hash, which keeps its pages in the system's hands."""
    tally = _killed(directory / "casket.tch", ["interval", "--sync-interval", f"{INTERVAL}"], kills // 4, (0.05, 1.0))
    return _tallied(tally.kept, tally)


@_case("tcb")
def _tcb(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 under the load of 4 writers; Tokyo Cabinet's tree, which loses what came after the last sync."""
    sync = ["interval", "--sync-interval", f"{INTERVAL}"]
    tally = _killed(directory / "casket.tcb", sync, kills // 4, (0.5, 3 * INTERVAL))
    kept = tally.acknowledged > tally.lost and not tally.wrong and tally.oldest_lost <= INTERVAL + LATE
    return _tallied(kept, tally)


@_case("tch-always")
def _tch_always(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 under the load of 4 writers; Tokyo Cabinet's hash, --sync always."""
    tally = _killed(directory / "casket.tch", ["always"], kills // 4, (0.05, 1.0))
    return _tallied(tally.kept, tally)


@_case("tcb-always")
def _tcb_always(directory: Path, kills: int, _seconds: float) -> Result:
    """kill -9 under the load of 4 writers; Tokyo Cabinet's tree, --sync always."""
    tally = _killed(directory / "casket.tcb", ["always"], kills // 4, (0.05, 1.0))
    return _tallied(tally.kept, tally)


@_case("mixed")
def _mixed(directory: Path, _kills: int, seconds: float) -> Result:
    """All verbs, by clients that are killed and started again and know what must be there; LMDB, --sync os."""
    told = directory / "told"
    told.mkdir()
    with ServerProcess(str(directory / "state.lmdb")) as server:
        soaked = soak(server, seconds, told)
    grown = soaked.resident[1] - soaked.resident[0]
    cells = {
        "kills": f"{soaked.kills:,}",
        "acknowledged": f"{soaked.operations:,}",
        "wrong": f"{len(soaked.wrong):,}",
        "": f"memory {grown / 1024 / 1024:+.1f} MiB, open files {soaked.descriptors[1] - soaked.descriptors[0]:+d}"
        + "".join(f"; {wrong}" for wrong in soaked.wrong),
    }
    return Result(not soaked.wrong and soaked.operations > 0 and grown < DRIFT, cells)


@_case("fanout")
def _fanout(directory: Path, kills: int, _seconds: float) -> Result:
    """8 producers, 5 consumers of 500 messages for each kill of always; they and the server are killed; LMDB."""
    with ServerProcess(str(directory / "state.lmdb")) as server:
        fanned = fan_out(server, directory, messages=500 * kills)
    cells = {
        "kills": f"{fanned.consumers_killed + fanned.servers_killed:,}",
        "acknowledged": f"{fanned.pushed:,}",
        "lost": f"{fanned.lost:,}",
        "wrong": f"{fanned.invented + fanned.disordered + fanned.dead:,}",
        "reopened": f"{fanned.servers_killed:,}",
        "": f"{fanned.seen:,} seen, {fanned.repeated:,} of them again, in {fanned.seconds:.0f} s",
    }
    return Result(fanned.kept, cells)


_HEADINGS: Final = ("kills", "acknowledged", "lost", "wrong", "reopened", "slowest start", "")


@click.command()
@click.option("--minutes", type=click.FloatRange(min=0), default=10.0, show_default=True, help="How long mixed lasts.")
@click.option(
    "--kills",
    type=click.IntRange(min=4),
    default=200,
    show_default=True,
    help="How often always and os are killed; the others a quarter of that.",
)
@click.argument("names", nargs=-1, type=click.Choice([*CASES]))
def main(minutes: float, kills: int, names: Sequence[str]) -> None:
    """Run the long tests of faults, or those named, and exit with 1 if one has failed.

    A server is killed without warning under load and started again, so often; and clients load it for so long. What
    was acknowledged has to be there. Python's own start is part of the slowest start.
    """
    table = Table("", "", *_HEADINGS, box=None, pad_edge=False)
    all_good = True
    console = Console()
    for name in names or CASES:
        with tempfile.TemporaryDirectory(prefix="statestore-soak-") as directory:
            console.print(f"{name}: {(CASES[name].__doc__ or '').strip()}")
            try:
                good, cells = CASES[name](Path(directory), kills, 60 * minutes)
            except AssertionError as error:
                good, cells = False, {"": str(error)}
        all_good &= good
        table.add_row(
            name, "good" if good else "[bold red]FAILED[/]", *(cells.get(heading, "") for heading in _HEADINGS)
        )
    console.print(table)
    sys.exit(not all_good)


if __name__ == "__main__":
    main()
