"""How to use an original ttserver: with ``statestore.lua``, and page by page.

The script, beside this module, is for ``ttserver -ext``. Its functions for single records take the key and the value,
and answer ``1`` for done or ``0`` for not done because of what was there. All are to be called under the record lock,
and while a server has them, no other command may change our records: binary commands do not heed that lock.

An original server lists keys by prefix only (``fwmkeys``), or from one place to another with a cursor that skips
records when others are deleted at the same time (``misc range`` on ``.tcb``: the lock is let go after each record;
on the in-memory tree it uses the one iterator that all clients share). `page` therefore goes on behind a key by
prefixes alone, each of which the server answers in one piece.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

__all__ = ["ADD", "DELETE", "LOCK_RECORD", "ORDERED", "PUT", "SCRIPT", "page", "start_line"]

#: The script to start ttserver with.
SCRIPT: Final = Path(__file__).with_name("statestore.lua")
#: Its functions besides the probe and ``cas``.
PUT: Final = b"statestore_put"
ADD: Final = b"statestore_add"
DELETE: Final = b"statestore_delete"

#: The ``ext`` option RDBXOLCKREC: one call at a time for each key.
LOCK_RECORD: Final = 1

#: The types of database, as ``stat`` names them, that know their keys in byte order.
ORDERED: Final = frozenset({"B+ tree", "on-memory tree"})

#: So many keys at least are asked for where a page is sought, since two or three large answers come sooner than
#: hundreds of small ones.
WINDOW: Final = 1000

#: For each of some prefixes, the first so many keys that begin with it, in byte order.
FirstKeys = Callable[[Sequence[bytes], int], list[list[bytes]]]


def start_line(database: str = "casket.tcb") -> str:
    """What to type to start an original server that can do what we need."""
    return f"ttserver -ext {shlex.quote(str(SCRIPT))} {database}"


def page(
    first_keys: FirstKeys, prefix: bytes, cursor: bytes | None, limit: int, *, window: int = WINDOW
) -> tuple[list[bytes], bytes | None]:
    """A page of a scan with the promises of `Verbs.scan`; its cursor is the page's last key.

    :param first_keys: asks the server, whose answer for a single prefix must be true of a single moment.
    """
    if cursor is None:
        (found,) = first_keys([prefix], limit + 1)
    else:
        # A cursor of another prefix leads to its keys; they are none of this one's.
        found = [key for key in _behind(first_keys, prefix, cursor, limit + 1, window) if key.startswith(prefix)]
    keys = found[:limit]
    return keys, (keys[-1] if len(found) > limit else None)


def _behind(first_keys: FirstKeys, prefix: bytes, cursor: bytes, wanted: int, window: int) -> list[bytes]:
    """The first ``wanted`` keys that begin with ``prefix`` and come behind ``cursor``."""
    most = max(wanted, window)
    # Sought is the shortest beginning of the cursor that so few keys have that all of them come at once.
    depth, shortest = len(cursor), len(prefix)
    (known,) = first_keys([cursor], most + 1)
    if len(known) <= most:
        while shortest < depth:
            middle = (shortest + depth) // 2
            (keys,) = first_keys([cursor[:middle]], most + 1)
            if len(keys) <= most:
                depth, known = middle, keys
            else:
                shortest = middle + 1
    found = [key for key in known if key > cursor]
    # Behind these come, for ever shorter beginnings, the keys that go on with a higher byte than the cursor does.
    for length in range(depth - 1, len(prefix) - 1, -1):
        if len(found) >= wanted:
            break
        higher = [cursor[:length] + bytes((byte,)) for byte in range(cursor[length] + 1, 256)]
        for beginning, any_key in zip(higher, first_keys(higher, 1), strict=True):
            if any_key and len(found) < wanted:
                found += first_keys([beginning], wanted - len(found))[0]
    return found[:wanted]
