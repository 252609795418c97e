"""compare_and_swap as it travels on the Tyrant wire: ``ext("cas", key, packed)``.

The packing is part of the protocol, so that a script for an original ttserver can speak it too: one byte of flags
(bit 0: an expected value follows, bit 1: a new value follows), the length of the expected value (4 bytes, big-endian;
0 without one), the expected value, the new value. The reply is ``1`` when the record was as expected and has been
replaced, ``0`` when it was otherwise; anything else is a failure.

The probe, ``ext("statestore", "", "")``, has no effect and answers the names of the functions that the server has,
separated by blanks.
"""

from __future__ import annotations

import struct
from typing import Final

from beaker_statestore.exceptions import ProtocolError

SWAPPED: Final = b"1"
NOT_SWAPPED: Final = b"0"

_HEAD: Final = struct.Struct(">BI")
_HAS_EXPECTED: Final = 1
_HAS_NEW: Final = 2


def pack(expected: bytes | None, new: bytes | None) -> bytes:
    """The value argument of ``ext("cas")``; ``None`` stands for absent."""
    flags = (_HAS_EXPECTED if expected is not None else 0) | (_HAS_NEW if new is not None else 0)
    return _HEAD.pack(flags, len(expected or b"")) + (expected or b"") + (new or b"")


def unpack(packed: bytes) -> tuple[bytes | None, bytes | None]:
    """The expected and the new value out of ``packed``.

    :raises ProtocolError: it is not what `pack` makes.
    """
    if len(packed) < _HEAD.size:
        raise ProtocolError(f"a cas of {len(packed)} bytes is too short for its head of {_HEAD.size}")
    flags, length = _HEAD.unpack_from(packed)
    expected, new = packed[_HEAD.size : _HEAD.size + length], packed[_HEAD.size + length :]
    if (
        flags & ~(_HAS_EXPECTED | _HAS_NEW)
        or len(expected) != length
        or (expected and not flags & _HAS_EXPECTED)
        or (new and not flags & _HAS_NEW)
    ):
        raise ProtocolError(f"a cas whose flags {flags} and length {length} do not fit its {len(packed)} bytes")
    return (expected if flags & _HAS_EXPECTED else None), (new if flags & _HAS_NEW else None)
