"""The library Tokyo Cabinet: its abstract databases (tcadb), called through cffi. Knows no stores and no rules of ours.

Signatures and meanings are those of tcadb.h, tcbdb.h and tcutil.h, version 1.4.48. A database may be used by one thread
at a time. The calls let other threads of Python run.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import Any, Final, NamedTuple

from beaker_statestore.exceptions import MissingDriverError

__all__ = ["KEEP", "NO_RECORD", "Database", "Failure", "KeyList", "OpenError"]

#: Debian's name of the package is in the message of `_library`.
LIBRARY: Final = "libtokyocabinet.so.9"

#: Error codes (tcutil.h) that say no more than what was found: there is such a record, there is none.
KEEP: Final = 21
NO_RECORD: Final = 22

#: The flag that a database keeps, in its file too, once reading or writing the file has failed (tchdb.h, HDBFFATAL).
_FATAL: Final = 1 << 1
#: Kinds of database (tcadb.h, ADBOHDB and those behind it) and the prefixes of their own functions.
_HASH, _TREE, _FIXED, _TABLE = 3, 4, 5, 6
_PREFIXES: Final = {_HASH: "tchdb", _TREE: "tcbdb", _FIXED: "tcfdb", _TABLE: "tctdb"}
_INT_MIN: Final = -(2**31)

_DECLARATIONS: Final = """
typedef struct { char *ptr; int size; } TCLISTDATUM;
typedef struct { TCLISTDATUM *array; int anum; int start; int num; } TCLIST;
TCLIST *tclistnew(void);
void tclistdel(TCLIST *list);
void tclistpush(TCLIST *list, const char *ptr, int size);
void tclistsort(TCLIST *list);
void tcfree(void *ptr);

typedef struct {
    int omode; void *mdb; void *ndb; void *hdb; void *bdb; void *fdb; void *tdb;
    int64_t capnum; int64_t capsiz; uint32_t capcnt; void *cur; void *skel;
} TCADB;
TCADB *tcadbnew(void);
void tcadbdel(TCADB *adb);
bool tcadbopen(TCADB *adb, const char *name);
bool tcadbclose(TCADB *adb);
bool tcadbput(TCADB *adb, const char *kbuf, int ksiz, const char *vbuf, int vsiz);
bool tcadbputkeep(TCADB *adb, const char *kbuf, int ksiz, const char *vbuf, int vsiz);
bool tcadbputcat(TCADB *adb, const char *kbuf, int ksiz, const char *vbuf, int vsiz);
bool tcadbout(TCADB *adb, const char *kbuf, int ksiz);
char *tcadbget(TCADB *adb, const char *kbuf, int ksiz, int *sp);
int tcadbvsiz(TCADB *adb, const char *kbuf, int ksiz);
bool tcadbiterinit(TCADB *adb);
char *tcadbiternext(TCADB *adb, int *sp);
TCLIST *tcadbfwmkeys(TCADB *adb, const char *pbuf, int psiz, int max);
int tcadbaddint(TCADB *adb, const char *kbuf, int ksiz, int num);
double tcadbadddouble(TCADB *adb, const char *kbuf, int ksiz, double num);
bool tcadbsync(TCADB *adb);
bool tcadboptimize(TCADB *adb, const char *params);
bool tcadbvanish(TCADB *adb);
bool tcadbcopy(TCADB *adb, const char *path);
bool tcadbtranbegin(TCADB *adb);
bool tcadbtrancommit(TCADB *adb);
uint64_t tcadbrnum(TCADB *adb);
uint64_t tcadbsize(TCADB *adb);
TCLIST *tcadbmisc(TCADB *adb, const char *name, const TCLIST *args);

const char *tchdberrmsg(int ecode);
int tchdbecode(void *hdb);
int tcbdbecode(void *bdb);
int tcfdbecode(void *fdb);
int tctdbecode(void *tdb);
uint8_t tchdbflags(void *hdb);
uint8_t tcbdbflags(void *bdb);
uint8_t tcfdbflags(void *fdb);
uint8_t tctdbflags(void *tdb);

bool tcbdbout3(void *bdb, const char *kbuf, int ksiz);
TCLIST *tcbdbget4(void *bdb, const char *kbuf, int ksiz);
int tcbdbvnum(void *bdb, const char *kbuf, int ksiz);
TCLIST *tcbdbrange(
    void *bdb, const char *bkbuf, int bksiz, bool binc, const char *ekbuf, int eksiz, bool einc, int max);
"""


class OpenError(Exception):
    """The library could not open a database; it does not say why."""


class Failure(NamedTuple):
    """Why the last call of this thread that failed did so."""

    code: int
    text: str


@lru_cache(maxsize=1)
def _library() -> tuple[Any, Any]:
    """cffi's interface and the library, loaded when first wanted."""
    try:
        import cffi
    except ImportError:
        raise MissingDriverError(
            'Tokyo Cabinet files need a package that is not installed: pip install "beaker-statestore[cabinet]"'
        ) from None
    ffi = cffi.FFI()
    ffi.cdef(_DECLARATIONS)
    try:
        return ffi, ffi.dlopen(LIBRARY)
    except OSError:
        raise MissingDriverError(
            f"Tokyo Cabinet files need the library {LIBRARY}, which is not installed: apt install libtokyocabinet9"
        ) from None


class KeyList:
    """Keys in a list of the library's, which is freed with this object."""

    def __init__(self, pointer: Any) -> None:
        ffi, library = _library()
        self._unpack = ffi.unpack
        self._library = library
        self._list = ffi.gc(pointer, library.tclistdel)

    def sort(self) -> None:
        """Put them in byte order."""
        self._library.tclistsort(self._list)

    def __len__(self) -> int:
        number: int = self._list.num
        return number

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < self._list.num:
            raise IndexError(index)
        datum = self._list.array[self._list.start + index]
        element: bytes = self._unpack(datum.ptr, datum.size)
        return element

    def take(self, begin: int, end: int) -> list[bytes]:
        """Those from ``begin`` to before ``end``."""
        first = self._list.start
        array, unpack = self._list.array, self._unpack
        data = (array[index] for index in range(first + begin, first + min(end, self._list.num)))
        return [unpack(datum.ptr, datum.size) for datum in data]


class Database:
    """An open database. Where a call answers ``False`` or ``None``, `failure` tells why."""

    def __init__(self, name: bytes) -> None:
        """
        :param name: as ``tcadbopen`` takes it: ``*``, ``+`` or a path, with tuning behind ``#``.
        :raises OpenError: it could not be opened.
        """
        self._ffi, self._library = _library()
        self._handle = self._library.tcadbnew()
        if not self._library.tcadbopen(self._handle, name):
            self._library.tcadbdel(self._handle)
            raise OpenError
        #: Where the library writes how long a result is.
        self._size = self._ffi.new("int *")
        prefix = _PREFIXES.get(self._handle.omode)
        if prefix is None:
            self._own = self._code = self._flags = None
        else:
            self._own = getattr(self._handle, f"{prefix[2]}db")
            self._code = getattr(self._library, f"{prefix}ecode")
            self._flags = getattr(self._library, f"{prefix}flags")
        #: Whether it is a B+ tree, whose keys have an order and may have several values.
        self.is_tree: bool = self._handle.omode == _TREE

    def close(self) -> bool:
        """Write everything and release the file; ``False`` if writing failed. Any other call then is an error."""
        handle, self._handle, self._own = self._handle, None, None  # cffi takes no None for a pointer
        closed: bool = self._library.tcadbclose(handle)
        self._library.tcadbdel(handle)
        return closed

    @property
    def is_closed(self) -> bool:
        return self._handle is None

    def failure(self) -> Failure:
        """Why the last call failed, as far as the library tells."""
        if self._code is None:
            return Failure(0, "the in-memory database does not say why")
        code: int = self._code(self._own)
        return Failure(code, self._ffi.string(self._library.tchdberrmsg(code)).decode())

    def is_fatal(self) -> bool:
        """Whether reading or writing the file has failed, now or before it was opened."""
        return self._flags is not None and bool(self._flags(self._own) & _FATAL)

    def _taken(self, pointer: Any) -> bytes:
        """The bytes at ``pointer``, which are freed."""
        try:
            value: bytes = self._ffi.unpack(pointer, self._size[0])
            return value
        finally:
            self._library.tcfree(pointer)

    def _list(self, pointer: Any) -> list[bytes]:
        elements = KeyList(pointer)
        return elements.take(0, len(elements))

    # -- records

    def put(self, key: bytes, value: bytes) -> bool:
        done: bool = self._library.tcadbput(self._handle, key, len(key), value, len(value))
        return done

    def putkeep(self, key: bytes, value: bytes) -> bool:
        done: bool = self._library.tcadbputkeep(self._handle, key, len(key), value, len(value))
        return done

    def putcat(self, key: bytes, value: bytes) -> bool:
        done: bool = self._library.tcadbputcat(self._handle, key, len(key), value, len(value))
        return done

    def out(self, key: bytes) -> bool:
        done: bool = self._library.tcadbout(self._handle, key, len(key))
        return done

    def out_all(self, key: bytes) -> bool:
        """Remove all values of a key of a B+ tree."""
        done: bool = self._library.tcbdbout3(self._own, key, len(key))
        return done

    def get(self, key: bytes) -> bytes | None:
        pointer = self._library.tcadbget(self._handle, key, len(key), self._size)
        return self._taken(pointer) if pointer else None

    def values(self, key: bytes) -> list[bytes] | None:
        """All values of a key of a B+ tree, in order."""
        pointer = self._library.tcbdbget4(self._own, key, len(key))
        return self._list(pointer) if pointer else None

    def value_count(self, key: bytes) -> int:
        """How many values a key of a B+ tree has."""
        number: int = self._library.tcbdbvnum(self._own, key, len(key))
        return number

    def vsiz(self, key: bytes) -> int | None:
        size: int = self._library.tcadbvsiz(self._handle, key, len(key))
        return None if size < 0 else size

    def addint(self, key: bytes, number: int) -> int | None:
        total: int = self._library.tcadbaddint(self._handle, key, len(key), number)
        return None if total == _INT_MIN else total

    def adddouble(self, key: bytes, number: float) -> float | None:
        total: float = self._library.tcadbadddouble(self._handle, key, len(key), number)
        return total if total == total else None  # not a number

    def misc(self, name: bytes, arguments: Iterable[bytes]) -> list[bytes] | None:
        given = self._library.tclistnew()
        try:
            for argument in arguments:
                self._library.tclistpush(given, argument, len(argument))
            pointer = self._library.tcadbmisc(self._handle, name, given)
        finally:
            self._library.tclistdel(given)
        return self._list(pointer) if pointer else None

    # -- keys

    def iterinit(self) -> bool:
        done: bool = self._library.tcadbiterinit(self._handle)
        return done

    def iternext(self) -> bytes | None:
        pointer = self._library.tcadbiternext(self._handle, self._size)
        return self._taken(pointer) if pointer else None

    def fwmkeys(self, prefix: bytes, maximum: int = -1) -> KeyList:
        return KeyList(self._library.tcadbfwmkeys(self._handle, prefix, len(prefix), maximum))

    def range(self, start: bytes, inclusive: bool, maximum: int) -> list[bytes]:
        """So many keys of a B+ tree from ``start`` on, each once, in its order."""
        null = self._ffi.NULL
        return self._list(
            self._library.tcbdbrange(self._own, start, len(start), inclusive, null, 0, False, maximum),
        )

    # -- the database

    def rnum(self) -> int:
        number: int = self._library.tcadbrnum(self._handle)
        return number

    def size(self) -> int:
        size: int = self._library.tcadbsize(self._handle)
        return size

    def sync(self) -> bool:
        done: bool = self._library.tcadbsync(self._handle)
        return done

    def optimize(self, parameters: bytes) -> bool:
        done: bool = self._library.tcadboptimize(self._handle, parameters)
        return done

    def vanish(self) -> bool:
        done: bool = self._library.tcadbvanish(self._handle)
        return done

    def copy(self, path: bytes) -> bool:
        done: bool = self._library.tcadbcopy(self._handle, path)
        return done

    def begin(self) -> bool:
        done: bool = self._library.tcadbtranbegin(self._handle)
        return done

    def commit(self) -> bool:
        done: bool = self._library.tcadbtrancommit(self._handle)
        return done
