"""``statestore sweep``: removes what is expired, now and with a word on how it went."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Final

import click

from beaker_statestore.console import Output, Seconds, configured_store, output_option, store_options
from beaker_statestore.exceptions import StoreUnavailable
from beaker_statestore.settings import Settings
from beaker_statestore.sweeper import BATCH, LARGEST_BATCH, MARGIN, Sweep, Sweeper

__all__ = ["sweep"]

#: The time was over before all had been looked at.
NOT_DONE: Final = 3
#: What shells answer for a program that Ctrl-C has ended.
INTERRUPTED: Final = 130


@click.command()
@click.argument("where", required=False, metavar="[URL|INI]")
@store_options
@click.option("--prefix", help="The application's prefix, where no INI file says it.  [default: none]")
@click.option("--all-prefixes", is_flag=True, help="Our kinds under all prefixes that do not end in a letter or digit.")
@click.option("--dry-run", is_flag=True, help="Count what is expired, and remove nothing.")
@click.option(
    "--batch",
    type=click.IntRange(1, LARGEST_BATCH),
    default=BATCH,
    show_default=True,
    metavar="N",
    help="How many keys are looked at in one step.",
)
@click.option(
    "--max-seconds",
    type=Seconds(min_open=True),
    metavar="S",
    help="Begin no step after so long, and end with status 3 if there is more to do.",
)
@click.option(
    "--margin",
    type=Seconds(),
    default=MARGIN,
    show_default=True,
    metavar="S",
    help="Leave what has expired by less than this: hosts' clocks differ.",
)
@click.option(
    "--from", "start", metavar="PLACE", help='Go on where an earlier sweep has ended: what it printed as "place".'
)
@output_option
def sweep(
    settings: Settings,
    output: Output,
    prefix: str | None,
    all_prefixes: bool,
    dry_run: bool,
    batch: int,
    max_seconds: float | None,
    margin: float,
    start: str | None,
) -> None:
    """Remove the records of an application that are expired.

    Only records of our kinds (session:, cache:, state: and so on) under the application's prefix are looked at. They
    go if they are documents whose time has come and nobody changes them meanwhile; everything else stays as it is.
    `statestore serve` does the same by itself, as with --all-prefixes.

    URL is the store's, and INI the application's file, whose prefix counts; its caches may have another one. A sweep
    that has been interrupted prints a place for --from, but one from the beginning is just as right.

    The exit status is 0 when all has been looked at, 3 when --max-seconds were over before, 130 after Ctrl-C, and 1
    after an error.
    """
    if prefix is not None and all_prefixes:
        raise click.UsageError("--prefix and --all-prefixes contradict each other; give one of them")
    if prefix is not None and settings.prefix:
        raise click.UsageError("--prefix and the INI file both say the prefix; leave the option out")
    chosen = None if all_prefixes else prefix or settings.prefix
    store = configured_store(settings)
    sweeper = Sweeper(store, chosen, start=start, margin=margin, dry_run=dry_run)
    try:
        # Records of others are counted too, so this is only the most that there can be.
        with output.progress(store.count, "expired: 0") as show:
            for found in sweeper.run(max_seconds, batch):
                show(found.seen, f"expired: {found.expired:,}")
    except StoreUnavailable:
        if sweeper.sweep.seen:
            _report(output, sweeper.sweep, dry_run)
        raise
    except KeyboardInterrupt:
        _report(output, sweeper.sweep, dry_run)
        sys.exit(INTERRUPTED)
    _report(output, sweeper.sweep, dry_run)
    if all_prefixes and dry_run and not output.as_json:
        output.line("prefixes that end in a letter or digit were left out; --prefix takes one of them")
    if not sweeper.done:
        sys.exit(NOT_DONE)


def _report(output: Output, found: Sweep, dry_run: bool) -> None:
    if output.as_json:
        values = asdict(found)
        output.value({**values, "expired": found.expired, "kinds": dict(sorted(found.kinds.items()))})
        return
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in sorted(found.kinds.items()))
    done = "nothing was removed" if dry_run else f"removed {found.removed:,}"
    output.line(f"{found.expired:,} of {found.seen:,} records are expired{kinds and f' ({kinds})'}; {done}")
    if found.changed:
        output.line(f"changed or removed by others meanwhile, and left as they are now: {found.changed:,}")
    if found.unreadable:
        output.line(f"no documents of ours, in spite of an _expires, and left as they are: {found.unreadable:,}")
    if found.place is not None:
        output.line(f"there is more to do; to go on here, add: --from '{found.place}'")
