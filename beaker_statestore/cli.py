"""The ``statestore`` command: gathers the subcommands, which are in `serve` and `records`, and reports errors."""

from __future__ import annotations

from typing import Any

import click

from beaker_statestore import __version__, records
from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.serve import serve

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


for command in (serve, records.ping, records.keys, records.get, records.put, records.delete, records.states):
    main.add_command(command)
