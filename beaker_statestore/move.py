"""``statestore copy``: takes all records of one store to another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Final

import click

from beaker_statestore.console import Output, output_option, store_url
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import LocalStore, Store
from beaker_statestore.stores.urls import redacted

__all__ = ["copy"]

#: So many bytes are written at once.
BYTES: Final = 4 * 1024 * 1024


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--prefix", default="", help="Only records whose keys begin with this.")
@click.option(
    "--overwrite", is_flag=True, help="Write to a store that has records, too, and over those of the same key."
)
@output_option
def copy(source: str, target: str, prefix: str, overwrite: bool, output: Output) -> None:
    """Copy all records of SOURCE to TARGET, byte for byte.

    Each is a URL, or the path of a .lmdb, .tch or .tcb file; of a key with several values, which only a .tcb can have,
    the first is copied. What is changed in SOURCE meanwhile may be copied as it was or as it is, so stop what writes
    to it. Run again with --overwrite, a copy that was interrupted is completed.
    """
    from_url, to_url = store_url(source), store_url(target)
    if from_url == to_url:
        raise ConfigurationError(f"SOURCE and TARGET are both {redacted(to_url)}")
    with open_store(from_url) as old, open_store(to_url) as new:
        if isinstance(old, LocalStore) and old.path is not None and not os.path.exists(old.path):
            raise ConfigurationError(f"there is no file {old.path}")  # which opening it would make
        total, copied = old.count(), 0
        there = new.count()  # which would make a file, and so comes second
        if there and not overwrite:
            raise ConfigurationError(f"{redacted(to_url)} has {there:,} records already; give --overwrite, or another")
        with output.progress(lambda: total, "copied:") as show:
            for group in _groups(old, prefix.encode()):
                new.put_many(group)
                copied += len(group)
                show(copied, "copied:")
        new.sync()
    if output.as_json:
        output.value({"copied": copied, "source": total})
    else:
        output.line(f"copied {copied:,} of {total:,} records")
        if copied < total and not prefix:
            output.line("the others are further values of their keys, or went meanwhile")


def _groups(store: Store, prefix: bytes) -> Iterator[dict[bytes, bytes]]:
    """The records of ``store``, some at a time."""
    group: dict[bytes, bytes] = {}
    size = 0
    for key in store.keys(prefix):
        value = store.get(key)
        if value is None:
            continue
        group[key] = value
        size += len(key) + len(value)
        if size > BYTES:
            yield group
            group, size = {}, 0
    if group:
        yield group
