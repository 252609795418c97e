"""How long an LMDB file must be for all that is in it to be there. Reads the file's pages; knows nothing else.

Needed since LMDB reads through a memory map: in a file that was cut short, the first look behind its end kills the
process (SIGBUS) instead of raising an error. The number of the last page does not tell, as the last pages of a sound
file may be missing: a commit does not write pages that were used and freed within it.

The layout is that of LMDB 0.9 (mdb.c: MDB_page, MDB_node, MDB_db, MDB_meta), in the machine's own sizes and order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import BinaryIO, Final

__all__ = ["length_in_use"]

_MAGIC: Final = 0xBEEFC0DE
_VERSION: Final = 1

#: Number, padding, flags, and where the room between pointers and nodes begins and ends.
_PAGE: Final = struct.Struct("@NHHHH")
#: Behind a page's head: magic, version, address, map size; page size, then the roots of the free list and the records
#: (each the last of a database's eight numbers); the last page, the transaction.
_META: Final = struct.Struct("@IIPN IHHNNNNN IHHNNNNN NN")
_NODE: Final = struct.Struct("@HHHH")
_NUMBER: Final = struct.Struct("@N")

_BRANCH: Final = 0x01
_LEAF: Final = 0x02
_BIG: Final = 0x01
_NO_ROOT: Final = 2 ** (8 * _NUMBER.size) - 1


def length_in_use(file: BinaryIO) -> int | None:
    """Up to which byte there are pages in use, or ``None`` if the file is of another version of LMDB.

    :param file: in which nobody writes meanwhile; open for reading, without a buffer.
    :raises ValueError: the pages make no sense.
    """
    first = _read_meta(file, 0)
    if first is None:
        return None
    size = first[4]
    if not 512 <= size <= 65536:
        raise ValueError(f"pages of {size} bytes")
    second = _read_meta(file, size)
    if second is None:
        raise ValueError("only one beginning")
    newer = max(first, second, key=lambda meta: meta[-1])
    roots = [root for root in (newer[11], newer[19]) if root != _NO_ROOT]
    return max([2, *_ends(file, size, roots)]) * size


def _read_meta(file: BinaryIO, offset: int) -> tuple[int, ...] | None:
    file.seek(offset + _PAGE.size)
    data = file.read(_META.size)
    if len(data) < _META.size:
        raise ValueError("no complete beginning")
    meta = _META.unpack(data)
    return meta if meta[:2] == (_MAGIC, _VERSION) else None


def _ends(file: BinaryIO, size: int, roots: list[int]) -> Iterator[int]:
    """The number behind each page, or run of pages, that can be reached from ``roots``."""
    waiting, seen = list(roots), set(roots)
    while waiting:
        number = waiting.pop()
        yield number + 1
        file.seek(number * size)
        page = file.read(size)
        if len(page) < size:
            continue  # not there, so its end is beyond the file's, which is the answer
        _, _, flags, lower, _ = _PAGE.unpack_from(page)
        if not flags & (_BRANCH | _LEAF) or not _PAGE.size <= lower <= size:
            raise ValueError(f"page {number} is neither branch nor leaf")
        for (at,) in struct.iter_unpack("@H", page[_PAGE.size : lower]):
            low, high, node_flags, key_length = _NODE.unpack_from(page, at)
            if flags & _BRANCH:
                child = low | high << 16 | node_flags << 32
                if child in seen:
                    raise ValueError(f"page {child} is referred to twice")
                seen.add(child)
                waiting.append(child)
            elif node_flags & _BIG:
                (start,) = _NUMBER.unpack_from(page, at + _NODE.size + key_length)
                yield start + (_PAGE.size - 1 + (low | high << 16)) // size + 1
