"""``statestore reseal``: writes anew what was stored under an older ``store_key``, before that is given up."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import click

from beaker_statestore import documents
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.console import Output, configured_store, output_option, store_options
from beaker_statestore.exceptions import DocumentError
from beaker_statestore.keys import KINDS, kind_prefix, shortened
from beaker_statestore.sealing import StoreKeyError
from beaker_statestore.settings import Settings

__all__ = ["reseal"]

#: Kinds that are left out: caches have a key of their own and are made anew, and locks are always in the clear.
OTHERS: Final = frozenset({"cache", "lock"})


@click.command()
@click.argument("where", metavar="INI")
@store_options
@click.option("--dry-run", is_flag=True, help="Count what would be written, and write nothing.")
@output_option
def reseal(settings: Settings, output: Output, dry_run: bool) -> None:
    """Write anew what is stored under an older key.

    Afterwards everything is stored as the first word of beaker.session.store_key says, and the other words can be
    taken out of the line. Applications may go on meanwhile: nothing that they change is lost. Caches are left out;
    they have a key of their own, and can be emptied.

    What is sealed with a key that is not in the line is named, and the exit status is 1.
    """
    store, codec = configured_store(settings), DocumentCodec.of(settings)
    seen = written = 0
    locked: list[str] = []
    for kind in sorted(KINDS - OTHERS):
        for record in store.keys(kind_prefix(settings.prefix, kind)):
            seen += 1
            data = store.get(record)
            try:
                if data is None or codec.rewritten(data, record) is None:
                    continue
                written += 1
                if not dry_run:
                    store.modify(record, _rewriting(codec, record), known=data, expires_at=documents.expires_at)
            except StoreKeyError:
                locked.append(shortened(record))
            except DocumentError as error:
                click.echo(f"{shortened(record)} is left as it is: {error}", err=True)
    if output.as_json:
        output.value({"seen": seen, "written": written, "locked": locked})
    else:
        done = "would be written anew" if dry_run else "were written anew"
        output.line(f"{written:,} of {seen:,} records {done}")
        for name in locked:
            output.line(f"there is no key here for {name}")
    if locked:
        sys.exit(1)


def _rewriting(codec: DocumentCodec, record: bytes) -> Callable[[bytes | None], bytes | None]:
    def rewritten(current: bytes | None) -> bytes | None:
        return None if current is None else codec.rewritten(current, record) or current

    return rewritten
