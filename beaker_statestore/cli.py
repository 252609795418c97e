"""The ``statestore`` command: gathers the subcommands (`serve`, `records`, `sweep`), and reports errors."""

from __future__ import annotations

from typing import Any

import click

from beaker_statestore import __version__, mails, records, who
from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.fanoutcommands import fanout
from beaker_statestore.move import copy
from beaker_statestore.reseal import reseal
from beaker_statestore.serve import serve
from beaker_statestore.stats import stats
from beaker_statestore.sweep import sweep

__all__ = ["main"]


class _Commands(click.Group):
    """Answers errors of ours with one line and exit status 1; a traceback is for defects."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StateStoreError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands)
@click.version_option(__version__, prog_name="statestore")
def main() -> None:
    """Shared state for web and mail applications, in a Tokyo Tyrant server."""


for command in (
    serve,
    stats,
    records.ping,
    records.keys,
    records.get,
    records.put,
    records.delete,
    records.states,
    who.who,
    who.revoke,
    mails.queue,
    sweep,
    reseal,
    copy,
    fanout,
):
    main.add_command(command)
