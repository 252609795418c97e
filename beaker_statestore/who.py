"""``statestore who`` and ``statestore revoke``: a person's sessions and mail states, and ending the sessions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from datetime import datetime, timezone

import click

from beaker_statestore.console import Output, configured_states, output_option, store_options
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.slates import Slates

__all__ = ["revoke", "who"]


def _field_option(command: Callable[..., None]) -> Callable[..., None]:
    return click.option(
        "--by",
        "field",
        metavar="KEY",
        help="The key of the sessions that holds the value.  [default: the first of beaker.session.index]",
    )(command)


@click.command()
@click.argument("address")
@_field_option
@store_options
@output_option
def who(settings: Settings, output: Output, address: str, field: str | None) -> None:
    """Print the sessions and the mail states of ADDRESS.

    ADDRESS is what the application keeps in its sessions for the user, and what the mail router calls the sender.
    Sessions are found if beaker.session.index is set.
    """
    sessions = []
    if settings.index or field:
        sessions = Sessions(_indexed(settings, field)).of(address, by=field)
    else:
        click.echo(f"sessions are not found: {_remedy()}", err=True)
    states = sorted(configured_states(settings).states_of(address).items())
    if output.as_json:
        for session in sessions:
            output.value(
                {"session": session.shown_id, "begun": _time(session.created), "used": _time(session.accessed)}
            )
        for key, state in states:
            output.value({"key": key, "state": state})
        return
    if sessions:
        rows = [[s.shown_id, _time(s.created) or "", _time(s.accessed) or ""] for s in sessions]
        output.table(["session", "begun", "last used"], rows)
    if sessions and states:
        output.line("")
    if states:
        output.table(["mail handlers", "state"], [[key, state] for key, state in states])
    if not sessions and not states:
        output.line(f"nothing is known of {address}")


@click.command()
@click.argument("address")
@_field_option
@store_options
@output_option
def revoke(settings: Settings, output: Output, address: str, field: str | None) -> None:
    """End all sessions of ADDRESS, and all logins to slates.

    Also those that requests are busy with. Mail states and the documents of slates stay as they are.
    """
    logins = Slates(settings).auth.revoke_all(address)
    # Who only has slates needs no index.
    ended = (
        0 if logins and not (settings.index or field) else Sessions(_indexed(settings, field)).revoke(address, by=field)
    )
    if output.as_json:
        output.value({"ended": ended, "logins": logins})
    else:
        output.line(f"ended {_counted(ended, 'session')} and {_counted(logins, 'login')} of {address}")


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _indexed(settings: Settings, field: str | None) -> Settings:
    """The settings, where they do not say by which key sessions are found (a URL alone does not), with ``field``."""
    return settings if settings.index or field is None else dataclasses.replace(settings, index=(field,))


def _remedy() -> str:
    """What to do where nothing says by which key sessions are found."""
    ini = click.get_current_context().params["ini"]
    return f"set beaker.session.index in {ini}, or give --by" if ini else "give --ini, or --by"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return None  # no time that a calendar has: anybody may have written it
