"""Tokyo Cabinet's databases that are open in this process, and what keeps them from harm. Knows nothing of verbs.

The library's own rules (tcadb.h): a file is open once per process and in one process at a time, and not across a fork.
Three more come from what it does to its files:

- Its lock (fcntl) is lost when any descriptor of the file is closed in the process, as its own ``tcadbcopy`` does. So
  one descriptor of ours stays open as long as the database, takes the same lock first, and again after each copy.
- It writes through a shared map into a file with holes. Where the disk has no room for one, the process dies (SIGBUS),
  and a tree goes on in memory as if nothing were wrong. So nothing is written while the disk is nearly full.
- It makes its files readable for everybody. There are sessions in them.
- ``optimize`` removes the file before it gives the new one its name. So the old one keeps another name until then.
- It applies a log (``.wal``) to whatever file it finds beside it, if that was not closed. So one that cannot belong to
  the file is moved out of the way first.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import itertools
import logging
import os
import re
import shutil
import threading
import time
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from beaker_statestore import observe
from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.stores.tokyocabinet import Database, KeyList, OpenError

__all__ = ["LEAST_RESERVE", "RESERVE", "CabinetFile", "CabinetName", "Snapshot", "is_cabinet_name"]

logger = logging.getLogger(__name__)

#: So many bytes of the disk are left free. They cover what the library allocates beyond what it is given: the pages of
#: its cache of leaves (1024 of 16 KiB, unless ``lcnum`` says more), and what others write meanwhile.
RESERVE: Final = 64 * 2**20
#: With less, the process could die of a full disk.
LEAST_RESERVE: Final = 2**20
#: What one write may allocate besides its own bytes: a page of the bucket array and one of records, or a leaf.
PER_WRITE: Final = 16 * 2**10
#: What ``optimize`` allocates for each bucket: 8 bytes at most, and there are more than were asked for, a prime number.
PER_BUCKET: Final = 16
#: The same where a tree keeps the leaves it has changed in its cache, whose room `RESERVE` covers.
PER_CACHED_WRITE: Final = 2**10
#: A list of sorted keys that nobody has asked for so many seconds is forgotten.
SNAPSHOT_AGE: Final = 60.0
#: So many of them are kept; the one that was used last goes last.
MOST_SNAPSHOTS: Final = 4
#: Only the owner may read.
MODE: Final = 0o600
#: What the old file is called while ``optimize`` writes a new one.
BEFORE_OPTIMIZE: Final = ".before-optimize"
#: What a log is called that belongs to another file than the one beside it.
STALE: Final = ".stale"

#: What the file of each suffix is: the type in its header, and what ttserver's ``stat`` calls it.
_KINDS: Final = {
    "tch": (0, "hash"),
    "hdb": (0, "hash"),
    "tcb": (1, "B+ tree"),
    "bdb": (1, "B+ tree"),
    "tcf": (2, "fixed-length"),
    "fdb": (2, "fixed-length"),
    "tct": (3, "table"),
    "tdb": (3, "table"),
}
_IN_MEMORY: Final = {"*": "on-memory hash", "+": "on-memory tree"}
_TUNING: Final = (
    *("mode", "bnum", "apow", "fpow", "opts", "rcnum", "xmsiz", "dfunit", "lmemb", "nmemb", "lcnum", "ncnum"),
    *("width", "limsiz", "capnum", "capsiz", "idx"),
)
_SCHEME: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

# The header of every file: a magic string, the type, and at another place the file's length.
_MAGIC: Final = b"ToKyO CaBiNeT\n"
_TYPE_AT: Final = 32
_FLAGS_AT: Final = 33
_LENGTH_AT: Final = slice(56, 64)
#: Which of the library's functions puts the keys of a B+ tree in order; 0 is for byte order (tcbdb.c).
_ORDER_AT: Final = 128
#: The flag of a file that was not closed (tchdb.h, HDBFOPEN; the same in tcfdb.h).
_IS_OPEN: Final = 1 << 0
_HEADER_SIZE: Final = 256

#: Codes (tcutil.h) that say that the file could not be read or written: TCEOPEN to TCERMDIR.
_FILE_FAILED: Final = range(7, 21)
#: The file holds what it should not: TCEMETA, TCERHEAD.
_DAMAGED: Final = (5, 6)


class CabinetName(NamedTuple):
    """The name of a database, as ``tcadbopen`` and ttserver take it, understood."""

    #: ``*``, ``+`` or an absolute path.
    place: str
    #: As ttserver's ``stat`` calls it.
    kind: str
    #: Each as ``name=value``, without ``mode``.
    tuning: tuple[str, ...]
    #: Whether a file is made where there is none.
    create: bool

    @classmethod
    def parse(cls, text: str) -> CabinetName:
        """
        :param text: such as ``casket.tch#bnum=1000000``, ``*`` or ``+#capnum=1000``.
        :raises ConfigurationError: it is no such name, or asks for what is not served.
        """
        if "\0" in text:
            raise ConfigurationError(f"{text!r} has a NUL, at which the library would cut it")
        place, *tuning = text.split("#")
        kind = _kind(place)
        if kind is None:
            raise ConfigurationError(
                f"{text!r} is no Tokyo Cabinet database: write * or + or a path that ends in .tch, .tcb, .tcf or .tct"
            )
        create = True
        others = []
        for parameter in tuning:
            name, equals, value = parameter.partition("=")
            if not equals or name.lower() not in _TUNING:
                raise ConfigurationError(
                    f"{parameter!r} in {text} is no tuning parameter; they are {', '.join(_TUNING)}, "
                    "each as #name=value"
                )
            if name.lower() != "mode":
                others.append(parameter)
            elif not set("w") <= set(value.lower()) <= set("wcf"):
                raise ConfigurationError(
                    f"{parameter!r} in {text}: the file is written, locked and never emptied here, so mode is wc or w"
                )
            else:
                create = "c" in value.lower()
        if place not in _IN_MEMORY:
            place = os.path.abspath(place)
            if "#" in place:
                raise ConfigurationError(f"{place}: for the library, # ends a path, so no directory may have it")
        return cls(place, kind, tuple(others), create)

    @property
    def is_file(self) -> bool:
        return self.place not in _IN_MEMORY

    def __str__(self) -> str:
        return "#".join((self.place, *self.tuning))

    def full(self) -> bytes:
        """As the library wants it. Its lock does not wait, since it knows no deadline."""
        return os.fsencode("#".join((self.place, *self.tuning, "mode=wcf")))


def is_cabinet_name(text: str) -> bool:
    """Whether ``text`` names a database of Tokyo Cabinet's as ttserver takes them; no URL does."""
    return _SCHEME.match(text) is None and _kind(text.partition("#")[0]) is not None


def _kind(place: str) -> str | None:
    if place in _IN_MEMORY:
        return _IN_MEMORY[place]
    _, dot, suffix = place.rpartition(".")
    return _KINDS[suffix.lower()][1] if dot and suffix.lower() in _KINDS else None


class Snapshot:
    """Keys, sorted, as they were at one moment.

    It takes 50 bytes or so for each key, and the key's own length.
    """

    def __init__(self, keys: KeyList) -> None:
        keys.sort()
        self._keys = keys
        self.used = time.monotonic()

    def page(self, start: bytes, after: bool, limit: int) -> list[bytes]:
        """So many keys from ``start`` on, or from behind it."""
        self.used = time.monotonic()
        begin = (bisect_right if after else bisect_left)(self._keys, start)
        return self._keys.take(begin, begin + limit)


class CabinetFile:
    """One open database. Not for several threads at once."""

    def __init__(self, name: CabinetName, *, always: bool, reserve: int) -> None:
        """
        :param always: writes are on the disk before `end` returns, and those until then count together or not at all.
        :param reserve: so many bytes of the disk are left free.
        :raises ConfigurationError: it cannot be such a database; nothing was changed.
        :raises StoreUnavailable: another process uses it, or the disk is full.
        """
        self.name = name
        self.pid = os.getpid()
        #: For scans, where the database has no order: by prefix, the one that was used last behind.
        self._snapshots: OrderedDict[bytes, Snapshot] = OrderedDict()
        #: The key that the iterator of a tree was at, and how many of its values are still to come.
        self.iterator: tuple[bytes, int] | None = None
        self._always = always and name.is_file
        self._reserve = reserve
        self._broken: str | None = None
        self._writing = self._in_transaction = self._has_log = False
        #: Estimates of what is to be allocated: by writes since the last sync (or batch), and until the next look at
        #: the disk.
        self._pending = self._credit = 0
        with _registry:
            if not name.is_file:
                self._open()
                return
            self._real_path = os.path.realpath(name.place)
            if self._real_path in _open_files or _identity(name.place) in _open_files.values():
                raise ConfigurationError(f"{name.place} is already open in this process, as another store")
            self._finish_optimize()
            self._descriptor = _descriptor(name)
            try:
                self._check()
                self._open()
            except BaseException:
                os.close(self._descriptor)
                raise
            _open_files[self._real_path] = _identity(name.place)

    # -- opening and closing

    def _open(self) -> None:
        try:
            with _owner_only():
                self.database = Database(self.name.full())
        except OpenError:
            if self.name.is_file and self._real_path in _inherited:
                raise ConfigurationError(
                    f"{self.name.place} was open in the process that this one was forked from, and Tokyo Cabinet does "
                    "not forget that; open it in a process that was forked before, or started anew"
                ) from None
            raise ConfigurationError(
                f"Tokyo Cabinet refuses {self.name}: its tuning may not fit, or the file is damaged"
                + (f"; look at it with tcamgr inform {self.name.place}" if self.name.is_file else "")
            ) from None
        self._cached = self.name.kind in ("B+ tree", "table")
        self._was_fatal = self.database.is_fatal()
        if self._was_fatal:
            logger.warning(
                "reading or writing %s has failed before, says its header; check it, and `tcamgr optimize` it",
                self.name.place,
            )

    def _check(self) -> None:
        """Take the file's lock, and raise if it is not what its name says."""
        path = self.name.place
        self._lock(
            self._descriptor, f"{path} is open in another process, which Tokyo Cabinet forbids; see `fuser -v {path}`"
        )
        length = os.fstat(self._descriptor).st_size
        if not length:
            self._move_stale_logs()
            self._look_at_disk(0)
            return
        header = self._header()
        suffix = path.rpartition(".")[2].lower()
        if not header.startswith(_MAGIC) or len(header) < _HEADER_SIZE:
            raise ConfigurationError(f"{path} is no Tokyo Cabinet database, or damaged at its beginning")
        if header[_TYPE_AT] != _KINDS[suffix][0]:
            kinds = {number: f".{ending} ({kind})" for ending, (number, kind) in reversed(_KINDS.items())}
            raise ConfigurationError(
                f"{path} is a Tokyo Cabinet database of another type, {kinds.get(header[_TYPE_AT], 'an unknown one')}; "
                "give it the right suffix"
            )
        if self.name.kind == "B+ tree" and header[_ORDER_AT]:
            raise ConfigurationError(
                f"{path} is a tree whose keys are in another order than that of their bytes, in which different keys "
                "can be the same; make one without -cd, -ci, -cj or a function of your own, and put the records there"
            )
        self._move_stale_logs()
        expected = int.from_bytes(header[_LENGTH_AT], "big")
        if expected > length and not self._has_transaction():
            raise ConfigurationError(
                f"{path} is damaged: it was cut short, to {length} of {expected} bytes; restore it from a backup"
            )

    def _files(self) -> list[str]:
        """The file, and a table's indexes, each of which is a B+ tree in a file of its own."""
        indexes = glob.glob(f"{glob.escape(self.name.place)}.idx.*") if self.name.kind == "table" else []
        return [self.name.place, *(path for path in indexes if path.endswith((".lex", ".dec", ".tok", ".qgr")))]

    def _header(self) -> bytes:
        return os.pread(self._descriptor, _HEADER_SIZE, 0)

    def _move_stale_logs(self) -> None:
        """Put logs out of the way that belong to other files, as when a backup took the place of a killed server's.

        Whoever begins a transaction marks the file as open; whoever closes it, or copies it by the library, has left
        nothing to undo.
        """
        for path in self._files():
            log = f"{path}.wal"
            with contextlib.suppress(FileNotFoundError):
                if not os.path.getsize(log):
                    continue
                with open(path, "rb") as file:
                    header = file.read(_HEADER_SIZE) if path != self.name.place else self._header()
                if len(header) == _HEADER_SIZE and header[_FLAGS_AT] & _IS_OPEN:
                    continue
                logger.warning(
                    "%s is the log of another file than the one beside it, which was closed in order; "
                    "it is not applied, and is now %s",
                    log,
                    _out_of_the_way(log),
                )

    def _finish_optimize(self) -> None:
        """Put back the old file if a process was killed while it wrote a new one."""
        old = self.name.place + BEFORE_OPTIMIZE
        try:
            descriptor = os.open(old, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        try:
            # Another process may be at it just now. It has a lock on the old file.
            self._lock(descriptor, f"{self.name.place} is being optimized by another process")
            # The file itself is the last, so that what is interrupted here is done again.
            before = (*glob.glob(f"{glob.escape(self.name.place)}.idx.*{BEFORE_OPTIMIZE}"), old)
            if _was_closed_in_order(self.name.place) and not os.path.samefile(self.name.place, old):
                # By somebody who has used it since, or who has put it here.
                for path in before:
                    logger.warning(
                        "%s is newer than what an optimize has left, now %s", self.name.place, _out_of_the_way(path)
                    )
                return
            for path in before:
                _put_back(path, path.removesuffix(BEFORE_OPTIMIZE))
        except OSError as error:
            raise StoreUnavailable(
                f"{self.name.place} was left by an optimize that was killed; {old} cannot take its place: "
                f"{error.strerror}"
            ) from error
        finally:
            os.close(descriptor)

    def _has_transaction(self) -> bool:
        """Whether there is the log of one that was not finished, which the library will undo."""
        try:
            return os.path.getsize(f"{self.name.place}.wal") > 0
        except OSError:
            return False

    def _lock(self, descriptor: int, refusal: str) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise StoreUnavailable(refusal) from None
        except OSError as error:
            raise StoreUnavailable(f"{self.name.place} cannot be locked: {error.strerror}") from error

    def close(self) -> None:
        """Write what is still in memory and release the file.

        Nothing is done in a child of the process that opened it; nor after a failure, so that whoever opens the file
        next finds it as after a crash, and the log of the transaction that failed.

        :raises StoreUnavailable: not everything could be written.
        """
        self._snapshots.clear()
        if self.pid != os.getpid() or self.is_broken:
            return
        with _registry:
            closed = self.database.close()
            if self.name.is_file:
                os.close(self._descriptor)
                _open_files.pop(self._real_path, None)
        if not closed:
            raise StoreUnavailable(
                f"{self.name.place} was closed, and not everything could be written ({self._room()})"
            )

    # -- writing

    @property
    def is_broken(self) -> bool:
        """Whether a failure has made an end of all writing."""
        return self._broken is not None

    def begin(self, *, removes: bool = False) -> None:
        """To be called before something is written, in each batch.

        :param removes: it is only a removal, for which there is more room.
        :raises StoreUnavailable: nothing can be written.
        """
        if self._broken:
            raise StoreUnavailable(self._broken)
        if self._writing:
            return
        self._credit = 0
        if self._always:
            self.take_room(0, removes=removes)
            self._begin_transaction()
        self._writing = True

    def _begin_transaction(self) -> None:
        # Only the first makes the log; later ones are quick to begin.
        with contextlib.nullcontext() if self._has_log else _owner_only():
            begun = self.database.begin()
        if not begun:
            self.fail("could not begin a transaction")
        self._has_log = self._in_transaction = True

    def take_room(self, size: int, *, removes: bool = False) -> None:
        """Make sure that ``size`` bytes more can be written.

        :raises StoreUnavailable: the disk is nearly full.
        """
        if not self.name.is_file:
            return
        size += PER_CACHED_WRITE if self._cached and not self._always else PER_WRITE
        if size > self._credit:
            self._look_at_disk(self._pending + size, removes)
        self._pending += size
        self._credit -= size

    def _look_at_disk(self, pending: int, removes: bool = False) -> None:
        # A record may be removed where none can be put, or nothing would ever get better.
        least = self._reserve // 2 if removes else self._reserve
        # Twice: where there is a transaction, what is overwritten goes into its log first.
        needed = least + 2 * pending
        free = self._free()
        if free < needed:
            observe.count("store.disk_full")
            raise StoreUnavailable(
                f"the disk of {self.name.place} is nearly full: {free} bytes are free, and {needed} have to be, "
                "so nothing is written; free some, or set a smaller reserve"
            )
        self._credit = max(pending - self._pending, 0 if removes else self._reserve // 4)

    def _free(self) -> int:
        disk = os.fstatvfs(self._descriptor)
        return disk.f_bavail * disk.f_frsize

    def _room(self) -> str:
        try:
            disk = os.statvfs(os.path.dirname(self.name.place))
        except OSError as error:
            return f"its directory is out of reach: {error.strerror}"
        return f"{disk.f_bavail * disk.f_frsize} bytes are free on its disk"

    def pause(self) -> None:
        """End the transaction that is under way, if there is one, since what follows is possible in none."""
        if self._in_transaction and not self._broken:
            self._in_transaction = False
            if not self.database.commit():
                self.fail("could not commit")

    def resume(self) -> None:
        """Undo `pause`."""
        if self._always and self._writing:
            self._begin_transaction()

    def end(self, *, acknowledge: bool) -> None:
        """To be called at the end of each batch.

        :param acknowledge: it counts, so it has to be as safe as was promised.
        :raises OutcomeUnknown: what was written may be lost.
        """
        if not self._writing:
            return
        self._writing = False
        if self._broken:
            # Without a commit, whoever opens the file next undoes what has been done of this transaction.
            if acknowledge:
                raise OutcomeUnknown(f"what was written last may be lost: {self._broken}")
            return
        try:
            self._check_written()
            self.pause()
            self._check_written()
            if self._always:
                if acknowledge:
                    self.sync()
            elif not self._cached:
                self._pending = 0
            elif self._pending > self._reserve // 4:
                # Room for it was left, so it must not become more.
                self.sync()
        except StateStoreError as error:
            raise OutcomeUnknown(f"what was written last may be lost: {error}") from error

    def _check_written(self) -> None:
        """Raise if something did not reach the file. The library does not always say so."""
        if self.database.is_fatal() and not self._was_fatal:
            self.fail("could not be written")
        if self.name.kind in ("hash", "B+ tree") and os.fstat(self._descriptor).st_size < self.database.size():
            # Beyond what is mapped (xmsiz), it takes a record for written although it was not. And it refuses a file
            # that is too short; a hole takes no room.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, self.database.size())
            self._break(f"{self.name.place} is shorter than what was written to it ({self._room()})")

    def sync(self) -> None:
        """Return when everything is on the disk."""
        if self._broken:
            raise StoreUnavailable(self._broken)
        if not self.database.sync():
            self.fail("could not be synchronised")
        self._check_written()
        self._pending = 0

    def fail(self, what: str) -> None:
        """Raise what the library's last failure amounts to, and let nothing be written if the file may be harmed."""
        failure = self.database.failure()
        text = f"{self.name.place} {what}: {failure.text}"
        if failure.code in _FILE_FAILED or (self.database.is_fatal() and not self._was_fatal):
            self._break(f"{text} ({self._room()})")
        if failure.code in _DAMAGED:
            raise StateStoreError(f"{text}; it is damaged, restore it from a backup")
        raise StateStoreError(text)

    def _break(self, text: str) -> None:
        if self._broken is None:
            self._broken = f"{text}; nothing is written any more until this process is restarted"
            observe.count("store.broken")
            logger.error("%s", self._broken)
        raise StoreUnavailable(self._broken)

    def found_nothing(self, what: str = "could not be read") -> None:
        """Raise unless the last failure only says that there is no such record, or that none can be like that."""
        code = self.database.failure().code
        if code in _FILE_FAILED or code in _DAMAGED:
            self.fail(what)

    # -- the file as a whole

    def optimize(self, parameters: bytes) -> bool:
        """Write the file anew, with other tuning; whether that was done.

        What the batch has done until then counts, whatever becomes of the batch.
        """
        self.begin()
        if not self.name.is_file:
            return self.database.optimize(parameters)
        bnum = max((int(number) for number in re.findall(rb"bnum=(\d{1,18})", parameters)), default=0)
        self.take_room(self.database.size() + sum(map(os.path.getsize, self._files()[1:])) + PER_BUCKET * bnum)
        self.pause()
        self.sync()
        mode = os.fstat(self._descriptor).st_mode
        with _owner_only():
            try:
                self._keep_old_files()
            except OSError as error:
                raise StoreUnavailable(f"{self.name.place} cannot be optimized: {error.strerror}") from error
            done = self.database.optimize(parameters)
        self._has_log = False
        try:
            there = os.fstat(self._descriptor)
            if _identity(self.name.place) != (there.st_dev, there.st_ino):
                # There is another file of this name now, which the library has locked. Were it still the same, closing
                # a descriptor would end the lock.
                old, self._descriptor = self._descriptor, os.open(self.name.place, os.O_RDWR | os.O_CLOEXEC)
                os.close(old)
                os.fchmod(self._descriptor, mode & 0o777)
                _open_files[self._real_path] = _identity(self.name.place)
            self.sync()
            self._remove_old_files()
        except (OSError, StateStoreError) as error:
            # Whoever opens it next puts back the old file, and would lose what was written meanwhile.
            self._break(f"{self.name.place} could not be optimized: {error}")
        self.resume()
        return done

    def _keep_old_files(self) -> None:
        # From the last run; and the file itself comes last here, so that where it is, everything is.
        self._remove_old_files()
        file, *indexes = self._files()
        for path in indexes:  # these are emptied first
            shutil.copyfile(path, path + BEFORE_OPTIMIZE)
        os.link(file, file + BEFORE_OPTIMIZE)

    def _remove_old_files(self) -> None:
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + BEFORE_OPTIMIZE)

    def vanish(self) -> bool:
        """Remove all records at once; whether that was done. What the batch has done until then counts."""
        self.begin()
        self.pause()
        done = self.database.vanish()
        self.resume()
        return done

    def outside(self, name: bytes, arguments: Sequence[bytes]) -> list[bytes] | None:
        """Carry out a function of ``misc`` that is not possible in a transaction; this ends the batch's, too."""
        self.begin()
        self.pause()
        with _owner_only():
            results = self.database.misc(name, arguments)
        self._has_log = False  # there may be one more index
        self.resume()
        return results

    def copy(self, path: str) -> None:
        """Write a copy to a new file at ``path``, and return when it is on the disk."""
        path = os.path.abspath(path)
        try:
            copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise ConfigurationError(f"cannot write a copy to {path}: {error.strerror}") from error
        try:
            # A table's indexes are copied too. Where there are none, the process goes on as it is for others.
            with _owner_only() if self.name.kind == "table" else contextlib.nullcontext():
                copied = self.database.copy(os.fsencode(path))
            self._lock_again()
            if not copied:
                disk = os.fstatvfs(copy)
                raise StoreUnavailable(
                    f"copying {self.name.place} to {path} failed: {self.database.failure().text} "
                    f"({disk.f_bavail * disk.f_frsize} bytes are free there)"
                )
            os.fsync(copy)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(error, OSError):
                raise StoreUnavailable(f"copying {self.name.place} to {path} failed: {error.strerror}") from error
            raise
        finally:
            os.close(copy)

    def _lock_again(self) -> None:
        try:
            self._lock(self._descriptor, "another process has opened it while it was copied")
        except StoreUnavailable as error:
            self._break(f"{self.name.place} is no longer ours: {error}")

    # -- keys

    def all_keys(self, prefix: bytes = b"") -> Snapshot:
        """The keys that begin with ``prefix``, or more than those, as they are now."""
        return Snapshot(self.collect(prefix))

    def collect(self, prefix: bytes = b"") -> KeyList:
        """The same, in no order."""
        # Where keys are numbers, fwmkeys takes an interval of them instead.
        return self.database.fwmkeys(b"[min,max]" if self.name.kind == "fixed-length" else prefix)

    def snapshot(self, prefix: bytes) -> Snapshot | None:
        """The keys of the scan of ``prefix`` that is under way."""
        return self._snapshots.get(prefix)

    def keep_snapshot(self, prefix: bytes, snapshot: Snapshot | None) -> None:
        """Keep it for the next page of that scan, or ``None`` if there is none."""
        self._snapshots.pop(prefix, None)
        if snapshot is not None:
            self._snapshots[prefix] = snapshot
            while len(self._snapshots) > MOST_SNAPSHOTS:
                self._snapshots.popitem(last=False)

    def ordered_keys(self, start: bytes, after: bool) -> Iterator[bytes]:
        """The keys from ``start`` on, or from behind it, in byte order."""
        if not self.database.is_tree:
            keys = self.all_keys()
            page = 1000
        else:
            keys = None
            page = 8  # the next one is often all that is wanted
        while found := (self.database.range(start, not after, page) if keys is None else keys.page(start, after, page)):
            yield from found
            if self.database.is_closed:
                raise StateStoreError(f"the store on {self.name.place} has been closed while its keys were listed")
            start, after, page = found[-1], True, min(8 * page, 1000)

    def forget_old_snapshots(self) -> None:
        now = time.monotonic()
        for prefix in [prefix for prefix, kept in self._snapshots.items() if now - kept.used > SNAPSHOT_AGE]:
            del self._snapshots[prefix]


def _descriptor(name: CabinetName) -> int:
    """A descriptor of the file, which is made if need be."""
    path = name.place
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if name.create else 0), MODE)
    except FileNotFoundError:
        directory = os.path.dirname(path)
        if not os.path.isdir(directory):
            raise ConfigurationError(
                f"there is no directory {directory} for the database {path}; make it first"
            ) from None
        raise ConfigurationError(f"there is no file {path}, and mode=w makes none") from None
    except OSError as error:
        raise ConfigurationError(
            f"this process (user id {os.geteuid()}) cannot read and write {path}: {error.strerror}"
        ) from error


def _identity(path: str) -> tuple[int, int] | None:
    """What a file is whatever it is called: device and number."""
    try:
        there = os.stat(path)
    except OSError:
        return None
    return there.st_dev, there.st_ino


def _out_of_the_way(path: str) -> str:
    """Rename the file, and answer its new name, which none had."""
    name = next(
        name for name in (f"{path}{STALE}{number or ''}" for number in itertools.count()) if not os.path.lexists(name)
    )
    os.rename(path, name)
    return name


def _was_closed_in_order(path: str) -> bool:
    """Whether there is a file which its last user has not left open, and which is complete."""
    try:
        with open(path, "rb") as file:
            header = file.read(_HEADER_SIZE)
            length = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return False
    return (
        len(header) == _HEADER_SIZE
        and header.startswith(_MAGIC)
        and not header[_FLAGS_AT] & _IS_OPEN
        and int.from_bytes(header[_LENGTH_AT], "big") <= length
    )


def _put_back(old: str, path: str) -> None:
    if os.path.lexists(path) and os.path.samefile(old, path):
        os.unlink(old)
    else:
        with contextlib.suppress(FileNotFoundError):
            logger.warning("%s is what an optimize that was killed has left unfinished", _out_of_the_way(path))
        os.rename(old, path)
        logger.warning("%s is what it was before an optimize that was killed", path)
    for unfinished in glob.glob(f"{glob.escape(path)}.tmp.*"):
        os.unlink(unfinished)


@contextlib.contextmanager
def _owner_only() -> Iterator[None]:
    """Files that this process makes meanwhile are for their owner only; the library itself lets everybody read."""
    global _masks, _mask
    with _registry:
        if not _masks:
            _mask = os.umask(0o077)
        _masks += 1
    try:
        yield
    finally:
        with _registry:
            _masks -= 1
            if not _masks:
                os.umask(_mask)


# -- What is open in this process

#: By real path, and what it is. Closing a second descriptor would end the lock of the first.
_open_files: dict[str, tuple[int, int] | None] = {}
#: What was open when this process was forked; the library has it in its list for good.
_inherited: set[str] = set()
#: How many are within `_owner_only`, and what the mask for new files is otherwise.
_masks = 0
_mask = 0
#: Held while something is opened or closed, and over a fork, as the library has such a list and lock of its own.
_registry = threading.RLock()


def _after_fork_in_child() -> None:
    global _masks
    _inherited.update(_open_files)
    _open_files.clear()
    if _masks:  # another thread's, which the child does not have
        os.umask(_mask)
        _masks = 0
    _registry.release()


os.register_at_fork(before=_registry.acquire, after_in_parent=_registry.release, after_in_child=_after_fork_in_child)
