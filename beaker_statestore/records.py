"""``statestore get put delete keys states ping``: looking into a store, and mending what is in it.

On a terminal the answers are for reading. In a pipe, or with ``--json``, they are JSON, one value a line. What is in a
store came from anybody, so in neither form does it reach the terminal as anything but text.
"""

from __future__ import annotations

import base64
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import Any, Final

import click
import simplejson
from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.table import Table
from rich.text import Text

from beaker_statestore import documents
from beaker_statestore.exceptions import DocumentError
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.settings import Settings, read_ini, session_options
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store

__all__ = ["delete", "get", "keys", "ping", "put", "states"]

DEFAULT_URL: Final = "127.0.0.1:1978"
URL_VARIABLE: Final = "STATESTORE_URL"


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


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options that say which store, and what they come to: ``settings``."""

    @click.option("--url", metavar="URL", help=f"The store.  [default: the variable {URL_VARIABLE}, or {DEFAULT_URL}]")
    @click.option("--ini", type=click.Path(dir_okay=False), help="Take the store from this INI file.")
    @click.option("--section", help="The section of the INI file, if it cannot be told by itself.")
    @wraps(command)
    def with_settings(url: str | None, ini: str | None, section: str | None, **arguments: Any) -> None:
        if url is not None and ini is not None:
            raise click.UsageError("--url and --ini both say which store; give one of them")
        if section is not None and ini is None:
            raise click.UsageError("--section is a section of an INI file: give --ini, too")
        if ini is not None:
            options = session_options(read_ini(ini, section))
        else:
            options = {"url": url or os.environ.get(URL_VARIABLE) or DEFAULT_URL}
        command(settings=Settings.from_options(options), **arguments)

    return with_settings


def _with_output(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the option that says for whom it prints, and what comes of it: ``output``."""

    @click.option("--json/--no-json", "as_json", default=None, help="JSON, one value a line.  [default: in a pipe]")
    @wraps(command)
    def with_output(as_json: bool | None, **arguments: Any) -> None:
        command(output=Output(as_json), **arguments)

    return with_output


def _store(settings: Settings) -> Store:
    return open_store(settings.url, **settings.timing)


def _key(argument: str) -> bytes:
    # Python hands over as surrogates what was not UTF-8 on the command line (PEP 383).
    return argument.encode("utf-8", "surrogateescape")


def _json_key(key: bytes) -> str | dict[str, str]:
    try:
        return key.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(key).decode()}


@click.command()
@click.argument("key")
@click.option("--raw", is_flag=True, help="The bytes as they are, whatever they are.")
@_with_settings
@_with_output
def get(settings: Settings, output: Output, key: str, raw: bool) -> None:
    """Print the document under a record key.

    KEY is the whole of it, such as session:0123456789abcdef0123456789abcdef.
    """
    value = _store(settings).get(_key(key))
    if value is None:
        raise click.ClickException(f"there is no record {key}")
    if raw:
        sys.stdout.buffer.write(value)
        return
    try:
        output.value(documents.decode(value))
    except DocumentError as error:
        raise click.ClickException(f"{error}; --raw prints it as it is") from error


@click.command()
@click.argument("key")
@click.argument("document", required=False)
@click.option("--raw", is_flag=True, help="Store the bytes as they are, whatever they are.")
@_with_settings
def put(settings: Settings, key: str, document: str | None, raw: bool) -> None:
    """Store a document under a record key.

    DOCUMENT is a JSON object; without it, standard input is read. What was there is replaced.
    """
    value = sys.stdin.buffer.read() if document is None else document.encode()
    if not raw:
        try:
            value = documents.encode(documents.decode(value), root=key, max_bytes=settings.max_value)
        except DocumentError as error:
            raise click.ClickException(f"not stored: {error}; --raw stores it all the same") from error
    _store(settings).put(_key(key), value)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@_with_settings
def delete(settings: Settings, keys: tuple[str, ...]) -> None:
    """Remove records by their keys.

    The exit status is 1 if one of them was not there.
    """
    store = _store(settings)
    missing = [key for key in keys if not store.delete(_key(key))]
    if missing:
        raise click.ClickException(f"there was no record {', '.join(missing)}")


@click.command()
@click.argument("prefix", default="")
@click.option("--limit", type=click.IntRange(1), help="Print so many keys at most.")
@_with_settings
@_with_output
def keys(settings: Settings, output: Output, prefix: str, limit: int | None) -> None:
    """Print the record keys that begin with PREFIX.

    In JSON a key is a string, or, if it is not UTF-8, {"base64": "..."}.
    """
    for number, key in enumerate(_store(settings).keys(_key(prefix))):
        if number == limit:
            break
        if output.as_json:
            output.value(_json_key(key))
        else:
            output.line(key.decode("utf-8", "backslashreplace"))


@click.command()
@click.argument("sender", required=False)
@click.option("--state", help="Only those in this state, for example ERROR.")
@_with_settings
@_with_output
def states(settings: Settings, output: Output, sender: str | None, state: str | None) -> None:
    """Print the mail router's states of SENDER, or of everybody."""
    storage = RouterStateStorage(url=_store(settings), prefix=settings.prefix)
    pages = storage.pages() if sender is None else [[(sender, storage.states_of(sender))]]
    rows = [
        (who, key, current)
        for page in pages
        for who, known in page
        for key, current in sorted(known.items())
        if state in (None, current)
    ]
    if output.as_json:
        for who, key, current in rows:
            output.value({"sender": who, "key": key, "state": current})
    elif rows:
        output.table(["sender", "key", "state"], [list(map(str, row)) for row in rows])
    else:
        output.line("nobody is in any state but START" if state is None else f"nobody is in state {state}")


@click.command()
@_with_settings
@_with_output
def ping(settings: Settings, output: Output) -> None:
    """Ask whether the store answers, and how soon."""
    store = _store(settings)
    store.ping()
    began = time.perf_counter()
    store.ping()
    milliseconds = (time.perf_counter() - began) * 1000
    count = store.count()
    if output.as_json:
        output.value({"url": str(settings.url), "milliseconds": round(milliseconds, 3), "records": count})
    else:
        output.line(f"{settings.url} answers in {milliseconds:.2f} ms; it has {count:,} records")
