"""What the commands have in common: for whom they print, which store they mean, and what a number of seconds is.

What is in a store came from anybody, so nothing of it reaches a terminal as anything but text.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any, Final
from urllib.parse import quote

import click
import simplejson
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from beaker_statestore.keys import prefix_and_kind
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.settings import Settings, cache_options, read_ini, session_options
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store

__all__ = [
    "Output",
    "RecordSettings",
    "Seconds",
    "configured_states",
    "configured_store",
    "output_option",
    "record_options",
    "store_options",
    "store_url",
]

DEFAULT_URL: Final = "127.0.0.1:1978"
URL_VARIABLE: Final = "STATESTORE_URL"


class Seconds(click.FloatRange):
    """A number of seconds, 0 or more. (click takes NaN to be in every range, and infinity is nothing to wait for.)"""

    def __init__(self, *, min_open: bool = False) -> None:
        super().__init__(min=0, min_open=min_open)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        seconds = float(super().convert(value, param, ctx))
        if not math.isfinite(seconds):
            self.fail(f"{value!r} is no number of seconds.", param, ctx)
        return seconds


class Output:
    """Prints for people or for programs."""

    def __init__(self, as_json: bool | None) -> None:
        self.as_json = not sys.stdout.isatty() if as_json is None else as_json
        self.console = Console(soft_wrap=True, highlight=False)

    def value(self, value: Any) -> None:
        """Print one JSON value."""
        if self.as_json:
            click.echo(_shown(simplejson.dumps(value, ensure_ascii=False)))
        else:
            lines = simplejson.dumps(value, ensure_ascii=False, indent=2).split("\n")
            self.console.print(JSONHighlighter()(Text("\n".join(map(_shown, lines)))))

    def line(self, text: str) -> None:
        """Print one line for reading."""
        click.echo(_shown(text))

    @contextmanager
    def progress(self, total: Callable[[], int], text: str) -> Iterator[Callable[[int, str], None]]:
        """Shows people how far something is, by a function to be called with how many records are done and what to say.

        It disappears in the end.

        :param total: how many records there are, or more; asked only if somebody looks.
        :param text: what to say at first.
        """
        if self.as_json or not self.console.is_terminal:
            yield lambda _done, _text: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("records"))
        with Progress(*columns, console=self.console, transient=True) as progress:
            task = progress.add_task(text, total=total())
            yield lambda done, text: progress.update(task, completed=done, description=text)

    def table(self, headings: list[str], rows: list[list[str]]) -> None:
        """Print rows for reading. What does not fit beside the rest goes on below; nothing is left out."""
        table = Table(box=None, pad_edge=False)
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            # A str would be read as Rich's markup.
            table.add_row(*(Text(_shown(cell)) for cell in row))
        self.console.print(table)


def _shown(text: str) -> str:
    """``text`` with all that a terminal might obey or hide as JSON's escapes; JSON stays the same value."""
    return "".join(c if c.isprintable() else simplejson.dumps(c)[1:-1] for c in text)


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options that say which store, and what they come to: ``settings``, those of sessions.

    It may have an argument ``where``, a URL or the path of an INI file, that says it too.
    """

    def with_settings(application: Mapping[str, Any], **arguments: Any) -> None:
        command(settings=Settings.from_options(session_options(application)), **arguments)

    return _application_options(wraps(command)(with_settings))


def record_options(command: Callable[..., None]) -> Callable[..., None]:
    """As `store_options`, but give ``command`` the `RecordSettings`: ``chosen``."""

    def with_chosen(application: Mapping[str, Any], **arguments: Any) -> None:
        command(chosen=RecordSettings.of(application), **arguments)

    return _application_options(wraps(command)(with_chosen))


@dataclass(frozen=True)
class RecordSettings:
    """By which settings the records of an application are read and written."""

    sessions: Settings
    #: None: there is no ``beaker.cache.url``; the cache's regions may have settings of their own.
    cache: Settings | None

    @classmethod
    def of(cls, application: Mapping[str, Any]) -> RecordSettings:
        """:param application: its options, as an INI file has them."""
        cache = cache_options(application)
        return cls(
            Settings.from_options(session_options(application)),
            Settings.from_options(cache, origin="beaker.cache") if cache.get("url") else None,
        )

    def for_record(self, record: bytes) -> Settings:
        """The settings for this record key. Those of a cache that cannot be told have no ``store_key``."""
        found = prefix_and_kind(record)
        if found is not None and found[1] == "cache":
            return self.cache or replace(self.sessions, store_key=())
        if found is not None and found[1] == "lock":
            return replace(self.sessions, store_key=())  # whose records are always in the clear
        return self.sessions

    def open(self, record: bytes) -> Store:
        """The store that has this record."""
        return configured_store(self.for_record(record))


def _application_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options that say which store, and the application's that they come to: ``application``."""

    @click.option("--url", metavar="URL", help=f"The store.  [default: the variable {URL_VARIABLE}, or {DEFAULT_URL}]")
    @click.option("--ini", type=click.Path(dir_okay=False), help="Take the store from this INI file.")
    @click.option("--section", help="The section of the INI file, if it cannot be told by itself.")
    @wraps(command)
    def with_application(
        url: str | None, ini: str | None, section: str | None, where: str | None = None, **arguments: Any
    ) -> None:
        if where is not None:
            if url is not None or ini is not None:
                raise click.UsageError(f"{where} and an option both say which store; give one of them")
            url, ini = (None, where) if _is_ini(where) else (where, None)
        if url is not None and ini is not None:
            raise click.UsageError("--url and --ini both say which store; give one of them")
        if section is not None and ini is None:
            raise click.UsageError("--section is a section of an INI file: give --ini, too")
        if ini is not None:
            application = read_ini(ini, section)
        else:
            url = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
            application = {"beaker.session.url": url, "beaker.cache.url": url}
        command(application=application, **arguments)

    return with_application


def output_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the option that says for whom it prints, and what comes of it: ``output``."""

    @click.option("--json/--no-json", "as_json", default=None, help="JSON, one value a line.  [default: in a pipe]")
    @wraps(command)
    def with_output(as_json: bool | None, **arguments: Any) -> None:
        command(output=Output(as_json), **arguments)

    return with_output


def _is_ini(where: str) -> bool:
    return where.endswith(".ini") or (os.path.isfile(where) and not where.endswith(".lmdb"))


def configured_states(settings: Settings) -> RouterStateStorage:
    """The mail router's states in the store that the options name."""
    return RouterStateStorage(
        url=configured_store(settings),
        prefix=settings.prefix,
        store_key=settings.store_key,
        events=settings.events,
    )


def store_url(text: str) -> str:
    """The URL of the store that ``text`` names: a URL, an address, or the path of a file."""
    if ":" in text.partition("/")[0]:
        return text
    path, tuned, tuning = text.partition("#")
    if path.endswith(".lmdb"):
        return f"lmdb://{quote(os.path.abspath(text))}"
    if os.path.splitext(path)[1] in (".tch", ".tcb", ".tcf", ".tct"):
        return f"cabinet://{quote(os.path.abspath(path))}{tuned}{tuning}"
    return text


def configured_store(settings: Settings) -> Store:
    """The store that the options name."""
    return open_store(settings.url, **settings.timing)
