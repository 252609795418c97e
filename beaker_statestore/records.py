"""``statestore get put delete keys states ping``: looking into a store, and mending what is in it.

On a terminal the answers are for reading. In a pipe, or with ``--json``, they are JSON, one value a line. Whoever knows
a session's id owns the session, so ids are shortened (`keys.shortened`), but for ``--raw``, which prints bytes as they
are.
"""

from __future__ import annotations

import base64
import re
import sys
import time
from typing import Any, Final

import click

from beaker_statestore import documents
from beaker_statestore import keys as record_keys
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.console import (
    Output,
    RecordSettings,
    configured_states,
    configured_store,
    output_option,
    record_options,
    store_options,
)
from beaker_statestore.exceptions import DocumentError
from beaker_statestore.sealing import StoreKeyError
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import Store

__all__ = ["delete", "get", "keys", "ping", "put", "states"]


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


#: The beginning of a session's id: what is shown of it, more, and what comes behind a … if there is one.
_ID_BEGUN: Final = re.compile(rf"((?:sha256-)?[0-9a-f]{{{record_keys.SHOWN}}})([0-9a-f]*)(?:…(.*))?", re.DOTALL)


def _abbreviation(argument: str) -> tuple[str, str, str, str] | None:
    """What is before a session's id in ``argument``, and the groups of `_ID_BEGUN`; None: it abbreviates none."""
    found = record_keys.prefix_and_kind(_key(argument))
    if found is None or found[1] != "session":
        return None
    before = f"{found[0]}session:"
    begun = _ID_BEGUN.fullmatch(argument[len(before) :])
    return None if begun is None else (before, begun[1], begun[2], begun[3] or "")


def _find(store: Store, argument: str) -> bytes:
    """The record key that ``argument`` is, or the one that it stands for, as `keys.shortened` or a bit longer.

    Where it stands for none, it is answered as it is.
    """
    exact = _key(argument)
    abbreviation = _abbreviation(argument)
    head, cut, _ = argument.partition("…")
    if not (abbreviation or cut) or store.get(exact) is not None:
        return exact
    if abbreviation:
        before, shown, more, behind = abbreviation
        whole = re.compile(re.escape(before) + record_keys.SESSION_PART + re.escape(behind))
        keys = store.keys(_key(before + shown + more))
        matching = [key for key in keys if whole.fullmatch(key.decode("utf-8", "surrogateescape"))]
    else:
        matching = [key for key in store.keys(_key(head)) if record_keys.shortened(key) == argument]
    if len(matching) > 1:
        raise click.ClickException(f"{_named(argument)} stands for {len(matching)} records; give more of the id")
    return matching[0] if matching else exact


def _named(argument: str) -> str:
    """``argument`` as a message shows it: most of an id is as good as all of it."""
    if (abbreviation := _abbreviation(argument)) is None:
        return record_keys.shortened(argument)
    before, shown, _, behind = abbreviation
    return f"{before}{shown}…{behind}"


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
@record_options
@output_option
def get(chosen: RecordSettings, output: Output, key: str, raw: bool) -> None:
    """Print the document under a record key.

    KEY is the whole of it, such as session:0123456789abcdef0123456789abcdef, or what `statestore keys` prints, such
    as session:01234567…; 8 characters of a session's id or more will do if there is only one such session. In index
    and lock records, session ids are shortened. For records of kind cache, the beaker.cache options of --ini count.
    """
    store = chosen.open(_key(key))
    record = _find(store, key)
    value = store.get(record)
    if value is None:
        raise click.ClickException(f"there is no record {_named(key)}")
    if raw:
        sys.stdout.buffer.write(value)
        return
    try:
        document = DocumentCodec.of(chosen.for_record(record)).decode(value, record)
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
@record_options
def put(chosen: RecordSettings, key: str, document: str | None, raw: bool) -> None:
    """Store a document under a record key.

    KEY is the whole of it. DOCUMENT is a JSON object; without it, standard input is read. What was there is replaced.
    """
    record = _key(key)
    found = record_keys.prefix_and_kind(record)
    kind = None if found is None else found[1]
    if "…" in key and kind not in (None, "cache"):
        raise click.ClickException("not stored: an abbreviation is no key to put under; give the whole session id")
    value = sys.stdin.buffer.read() if document is None else document.encode()
    if not raw:
        if kind == "cache" and chosen.cache is None:
            raise click.ClickException(
                "not stored: beaker.cache.url is not set, so nobody knows this cache's store_key: for a region, "
                "give its options as beaker.cache.url and so on in a file of their own; --raw stores it as it is"
            )
        try:
            codec = DocumentCodec.of(chosen.for_record(record))
            value = codec.encode(documents.decode(value), record, root=record_keys.shortened(key))
        except DocumentError as error:
            raise click.ClickException(f"not stored: {error}; --raw stores it all the same") from error
    chosen.open(record).put(record, value)


@click.command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@record_options
def delete(chosen: RecordSettings, keys: tuple[str, ...]) -> None:
    """Remove records by their keys.

    A key may be abbreviated as for `statestore get`. An abbreviation that stands for several removes none of all. The
    exit status is 1 if one of them was not there.
    """
    records = [_find(chosen.open(_key(key)), key) for key in keys]
    missing = [key for key, record in zip(keys, records, strict=True) if not chosen.open(record).delete(record)]
    if missing:
        raise click.ClickException(f"there was no record {', '.join(map(_named, missing))}")


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
    storage = configured_states(settings)
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
