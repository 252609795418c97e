"""`scan` as it travels on the Tyrant wire: ``ext("scan", prefix, packed)``.

Tyrant's own commands for this either send all keys at once (``fwmkeys``) or every value along with its key (``misc
range``). The request packs one byte of flags (bit 0: a cursor follows), the most keys to answer (4 bytes,
big-endian), the cursor. The reply packs one byte of flags (bit 0: there is a next page), the length of its cursor (4
bytes; 0 without one), the cursor, then each key with its length (4 bytes) before it. It has no effect.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from beaker_statestore.exceptions import ProtocolError

__all__ = ["pack_page", "pack_request", "unpack_page", "unpack_request"]

_HEAD: Final = struct.Struct(">BI")
_LENGTH: Final = struct.Struct(">I")
_HAS_CURSOR: Final = 1


def pack_request(cursor: bytes | None, limit: int) -> bytes:
    """The value argument of ``ext("scan")``, from `Verbs.scan`'s arguments."""
    return _HEAD.pack(0 if cursor is None else _HAS_CURSOR, limit) + (cursor or b"")


def unpack_request(packed: bytes) -> tuple[bytes | None, int]:
    """The cursor and the limit out of ``packed``.

    :raises ProtocolError: it is not what `pack_request` makes.
    """
    flags, limit = _unpack_head(packed)
    cursor = packed[_HEAD.size :]
    if limit < 1:
        raise ProtocolError(f"a scan by pages of {limit} keys")
    if cursor and not flags:
        raise ProtocolError(f"a scan with a cursor of {len(cursor)} bytes, and flags that deny it")
    return (cursor if flags else None), limit


def pack_page(keys: Sequence[bytes], cursor: bytes | None) -> bytes:
    """The reply, from what `Verbs.scan` returned."""
    parts = [_HEAD.pack(0 if cursor is None else _HAS_CURSOR, len(cursor or b"")), cursor or b""]
    for key in keys:
        parts += (_LENGTH.pack(len(key)), key)
    return b"".join(parts)


def unpack_page(packed: bytes) -> tuple[list[bytes], bytes | None]:
    """The keys and the cursor out of ``packed``.

    :raises ProtocolError: it is not what `pack_page` makes.
    """
    flags, length = _unpack_head(packed)
    cursor, place = _cut(packed, _HEAD.size, length)
    if cursor and not flags:
        raise ProtocolError(f"a page with a cursor of {length} bytes, and flags that deny it")
    keys = []
    while place < len(packed):
        size, place = _cut(packed, place, _LENGTH.size)
        key, place = _cut(packed, place, *_LENGTH.unpack(size))
        keys.append(key)
    return keys, (cursor if flags else None)


def _unpack_head(packed: bytes) -> tuple[int, int]:
    head, _ = _cut(packed, 0, _HEAD.size)
    flags, number = _HEAD.unpack(head)
    if flags & ~_HAS_CURSOR:
        raise ProtocolError(f"a scan with unknown flags {flags}")
    return flags, number


def _cut(packed: bytes, place: int, length: int) -> tuple[bytes, int]:
    piece = packed[place : place + length]
    if len(piece) != length:
        raise ProtocolError(f"a scan of {len(packed)} bytes is too short for what it announces")
    return piece, place + length
