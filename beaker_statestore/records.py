"""``statestore get put delete keys states ping``: looking into a store, and mending what is in it.

On a terminal the answers are for reading. In a pipe, or with ``--json``, they are JSON, one value a line. What is in a
store came from anybody, so in neither form does it reach the terminal as anything but text. Whoever knows a session's
id owns the session, so ids are shortened (`keys.shortened`), but for ``--raw``, which prints bytes as they are.
"""

from __future__ import annotations

import base64
import os
import re
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
from beaker_statestore import keys as record_keys
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.exceptions import DocumentError
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.sealing import StoreKeyError
from beaker_statestore.settings import Settings, read_ini, session_options
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store

__all__ = [
    "Output",
    "configured_store",
    "delete",
    "get",
    "keys",
    "output_option",
    "ping",
    "put",
    "states",
    "store_options",
]

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


def store_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the options that say which store, and what they come to: ``settings``.

    It may have an argument ``where``, a URL or the path of an INI file, that says it too.
    """

    @click.option("--url", metavar="URL", help=f"The store.  [default: the variable {URL_VARIABLE}, or {DEFAULT_URL}]")
    @click.option("--ini", type=click.Path(dir_okay=False), help="Take the store from this INI file.")
    @click.option("--section", help="The section of the INI file, if it cannot be told by itself.")
    @wraps(command)
    def with_settings(
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
            options = session_options(read_ini(ini, section))
        else:
            options = {"url": url or os.environ.get(URL_VARIABLE) or DEFAULT_URL}
        command(settings=Settings.from_options(options), **arguments)

    return with_settings


def output_option(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the option that says for whom it prints, and what comes of it: ``output``."""

    @click.option("--json/--no-json", "as_json", default=None, help="JSON, one value a line.  [default: in a pipe]")
    @wraps(command)
    def with_output(as_json: bool | None, **arguments: Any) -> None:
        command(output=Output(as_json), **arguments)

    return with_output


def _is_ini(where: str) -> bool:
    return where.endswith(".ini") or (os.path.isfile(where) and not where.endswith(".lmdb"))


def configured_store(settings: Settings) -> Store:
    """The store that the options name."""
    return open_store(settings.url, **settings.timing)


def _key(argument: str) -> bytes:
    # Python hands over as surrogates what was not UTF-8 on the command line (PEP 383).
    return argument.encode("utf-8", "surrogateescape")


def _json_key(key: bytes) -> str | dict[str, str]:
    shown = _key(record_keys.shortened(key))
    try:
        return shown.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(shown).decode()}


#: The kinds of records in whose documents are ids of sessions.
_HOLD_IDS: Final = frozenset({"index", "lock"})


def _find(store: Store, argument: str) -> bytes:
    """The record key that ``argument`` is, or the one that it stands for, as `keys.shortened` or a bit longer.

    Where it stands for none, it is answered as it is.
    """
    exact = _key(argument)
    found = record_keys.prefix_and_kind(exact)
    head, cut, tail = argument.partition("…")
    if found is None or not (cut or found[1] == "session") or store.get(exact) is not None:
        return exact
    if found[1] == "session":
        session_id = head.partition("session:")[2]
        if ":" in session_id or len(session_id.removeprefix("sha256-")) < record_keys.SHOWN:
            return exact
        pattern = re.compile(re.escape(head) + "[^:]*" + re.escape(tail))
        matching = [key for key in store.keys(_key(head)) if pattern.fullmatch(key.decode("utf-8", "surrogateescape"))]
    else:
        matching = [key for key in store.keys(_key(head)) if record_keys.shortened(key) == argument]
    if len(matching) > 1:
        shown = record_keys.shortened(argument)
        raise click.ClickException(f"{shown} stands for {len(matching)} records; give more of the id")
    return matching[0] if matching else exact


def _without_ids(value: Any) -> Any:
    """A JSON value with the sessions' ids in it shortened, as it is shown."""
    if isinstance(value, str):
        return record_keys.shortened_ids(value)
    if isinstance(value, list):
        return [_without_ids(member) for member in value]
    if not isinstance(value, dict):
        return value
    shown: dict[str, Any] = {}
    for name, member in value.items():
        short, number = record_keys.shortened_ids(name), 1
        while (unique := short if number == 1 else f"{short} ({number})") in shown:
            number += 1
        shown[unique] = _without_ids(member)
    return shown


@click.command()
@click.argument("key")
@click.option("--raw", is_flag=True, help="The bytes as they are, whatever they are, with whole session ids.")
@store_options
@output_option
def get(settings: Settings, output: Output, key: str, raw: bool) -> None:
    """Print the document under a record key.

    KEY is the whole of it, such as session:0123456789abcdef0123456789abcdef, or what `statestore keys` prints, such
    as session:01234567…; 8 characters of a session's id or more will do if there is only one such session. In index
    and lock records, session ids are shortened.
    """
    store = configured_store(settings)
    record = _find(store, key)
    value = store.get(record)
    if value is None:
        raise click.ClickException(f"there is no record {record_keys.shortened(key)}")
    if raw:
        sys.stdout.buffer.write(value)
        return
    try:
        document = DocumentCodec.of(settings).decode(value, record)
        found = record_keys.prefix_and_kind(record)
        output.value(_without_ids(document) if found is not None and found[1] in _HOLD_IDS else document)
    except DocumentError as error:
        raise click.ClickException(f"{error}; --raw prints it as it is") from error
    except StoreKeyError as error:
        raise click.ClickException(
            f"{error}; --ini takes it from the application's file, --raw prints it as it is"
        ) from error


@click.command()
@click.argument("key")
@click.argument("document", required=False)
@click.option("--raw", is_flag=True, help="Store the bytes as they are, whatever they are.")
@store_options
def put(settings: Settings, key: str, document: str | None, raw: bool) -> None:
    """Store a document under a record key.

    DOCUMENT is a JSON object; without it, standard input is read. What was there is replaced.
    """
    value = sys.stdin.buffer.read() if document is None else document.encode()
    if not raw:
        try:
            value = DocumentCodec.of(settings).encode(
                documents.decode(value), _key(key), root=record_keys.shortened(key)
            )
        except DocumentError as error:
            raise click.ClickException(f"not stored: {error}; --raw stores it all the same") from error
    configured_store(settings).put(_key(key), value)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@store_options
def delete(settings: Settings, keys: tuple[str, ...]) -> None:
    """Remove records by their keys, which may be abbreviated as for `statestore get`.

    An abbreviation that stands for several removes none of all. The exit status is 1 if one of them was not there.
    """
    store = configured_store(settings)
    records = [_find(store, key) for key in keys]
    missing = [key for key, record in zip(keys, records, strict=True) if not store.delete(record)]
    if missing:
        raise click.ClickException(f"there was no record {', '.join(map(record_keys.shortened, missing))}")


@click.command()
@click.argument("prefix", default="")
@click.option("--limit", type=click.IntRange(1), help="Print so many keys at most.")
@store_options
@output_option
def keys(settings: Settings, output: Output, prefix: str, limit: int | None) -> None:
    """Print the record keys that begin with PREFIX.

    Session ids are shortened to 8 characters and a …, which `statestore get` and `statestore delete` understand. In
    JSON a key is a string, or, if it is not UTF-8, {"base64": "..."}.
    """
    for number, key in enumerate(configured_store(settings).keys(_key(prefix))):
        if number == limit:
            break
        if output.as_json:
            output.value(_json_key(key))
        else:
            output.line(_key(record_keys.shortened(key)).decode("utf-8", "backslashreplace"))


@click.command()
@click.argument("sender", required=False)
@click.option("--state", help="Only those in this state, for example ERROR.")
@store_options
@output_option
def states(settings: Settings, output: Output, sender: str | None, state: str | None) -> None:
    """Print the mail router's states of SENDER, or of everybody."""
    storage = RouterStateStorage(url=configured_store(settings), prefix=settings.prefix, store_key=settings.store_key)
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
@store_options
@output_option
def ping(settings: Settings, output: Output) -> None:
    """Ask whether the store answers, and how soon."""
    store = configured_store(settings)
    store.ping()
    began = time.perf_counter()
    store.ping()
    milliseconds = (time.perf_counter() - began) * 1000
    count = store.count()
    if output.as_json:
        output.value({"url": str(settings.url), "milliseconds": round(milliseconds, 3), "records": count})
    else:
        output.line(f"{settings.url} answers in {milliseconds:.2f} ms; it has {count:,} records")
