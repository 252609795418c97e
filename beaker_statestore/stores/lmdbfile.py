"""LMDB files that are open in this process, and what LMDB demands of a process. Knows nothing of keys and verbs.

The rules are those of lmdb.h, section "Caveats". A file is open once per process at most, since closing it once ends
its locks (fcntl) for all openings. What is open is not used across a fork. The map changes only while no transaction
is under way.

Several processes may share a file. LMDB's own lock for those who write knows no deadline, and a process that is
stopped within a transaction keeps it. So whoever writes first takes an advisory lock of ours (flock on the data file,
where LMDB has no locks), and waits for that with a deadline. Both are freed when their owner dies. Programs that use
LMDB without this module know nothing of ours: one that is stopped while it writes still stops all who write here, and
so does one that is stopped in the moment in which it begins to read.
"""

from __future__ import annotations

import fcntl
import math
import os
import struct
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, TypeVar

from beaker_statestore.exceptions import (
    ConfigurationError,
    MissingDriverError,
    OutcomeUnknown,
    StateStoreError,
    StoreUnavailable,
)
from beaker_statestore.stores.lmdbpages import length_in_use

if TYPE_CHECKING:
    import lmdb

__all__ = ["LMDBFile", "open_file"]

T = TypeVar("T")

#: Slots for read transactions at the same time, of all processes together, at 64 bytes each. LMDB's own 126 are few.
MAX_READERS: Final = 1024
#: How often a writer looks for readers that were killed, in seconds.
READER_CHECK_INTERVAL: Final = 60.0
#: How long a thread waits for the others of its process, and for its turn among processes that do write, in seconds.
PATIENCE: Final = 30.0
#: After how many seconds without a commit another process that writes counts as stalled. A server's loop stands still
#: meanwhile.
STALLED: Final = 2.0
#: How often to look whether another process has finished writing, in seconds. Often, as who looks competes with who
#: comes back at once.
POLL_INTERVAL: Final = 0.0005
#: Only the owner may read: there are sessions in it.
MODE: Final = 0o600

#: The record that tells our files from those of other programs, and its value: the version of the format.
MARK: Final = b"!statestore"
FORMAT: Final = b"1"


class _Gate:
    """Lets in many transactions at a time, or one thread that changes what they stand on."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._held = False
        self.inside = 0

    def enter(self) -> None:
        with self._lock:
            if self._held and not self._changed.wait_for(lambda: not self._held, PATIENCE):
                raise StoreUnavailable(f"another thread has kept all LMDB transactions waiting for {PATIENCE:.0f} s")
            self.inside += 1

    def leave(self) -> None:
        with self._lock:
            self.inside -= 1
            if not self.inside:
                self._changed.notify_all()

    def hold(self) -> bool:
        """Let nobody in, and return when all are out; ``False`` when that takes too long, and then it is not held."""
        deadline = time.monotonic() + PATIENCE
        with self._lock:
            if not self._changed.wait_for(lambda: not self._held, PATIENCE):
                return False
            self._held = True
            if self._changed.wait_for(lambda: not self.inside, deadline - time.monotonic()):
                return True
        self.release()
        return False

    def release(self) -> None:
        with self._lock:
            self._held = False
            self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        if not self.hold():
            raise StoreUnavailable(f"LMDB transactions of this process did not end within {PATIENCE:.0f} s")
        try:
            yield
        finally:
            self.release()


class LMDBFile:
    """One file, open in this process, for all stores on it. Made by `open_file`."""

    def __init__(self, path: str, sync: str, map_size: int) -> None:
        self.path = path
        self.sync_mode = sync
        #: The stores that use it.
        self.users: weakref.WeakSet[object] = weakref.WeakSet()
        #: ``False`` once it is closed, or belongs to the parent process: open the path again.
        self.alive = True
        self._lmdb = _driver()
        # Keeping the threads of a process apart is cheaper here, and flock would not.
        self._writing = threading.Lock()
        #: The last commit before the one that another process did not finish in time.
        self._stalled_after: int | None = None
        self._environment, self.database = self._open(map_size)
        try:
            # Locks of LMDB's are on the other file, so opening and closing this one again does no harm.
            self._turn = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            self._environment.close()
            raise StoreUnavailable(f"{path} could not be opened: {error}") from error
        try:
            # The file may have needed a larger map than was asked for.
            self._map_size: int = self._environment.info()["map_size"]
            self._free_dead_readers()
            if self._lacks_pages():
                # In a write transaction, so that nobody changes what is being looked at.
                self.run(self._check_length, write=True)
            if not self.run(self._is_ours, write=False):
                self.run(self._make_ours, write=True)
                _sync_directory(path)
        except self._lmdb.Error as error:
            self.close()
            raise self._explained(error) from error
        except BaseException:
            self.close()
            raise

    # -- opening and closing

    def _open(self, map_size: int) -> tuple[lmdb.Environment, Any]:
        driver = self._lmdb
        while True:
            try:
                environment = driver.open(
                    self.path,
                    subdir=False,
                    map_size=map_size,
                    mode=MODE,
                    sync=self.sync_mode == "always",
                    # Not writemap: a full disk would be SIGBUS, and a stray write could damage the file.
                    max_readers=MAX_READERS,
                    # Those kept for later hold slots across a fork, and the child would clear the parent's.
                    max_spare_txns=0,
                )
                try:
                    return environment, environment.open_db()
                except BaseException:
                    environment.close()
                    raise
            except driver.MapResizedError:
                # Another process makes the file grow in this very moment.
                map_size = 2 * max(map_size, os.path.getsize(self.path))
            except (driver.InvalidError, driver.VersionMismatchError) as error:
                raise ConfigurationError(
                    f"{self.path} is no LMDB database, or damaged at its beginning ({error})"
                ) from error
            except driver.MemoryError as error:
                raise ConfigurationError(
                    f"the system refuses {map_size} bytes of address space for {self.path}; "
                    "set a smaller map_size, as in lmdb:///path?map_size=1GiB"
                ) from error
            except driver.Error as error:
                if "data format" in str(error):  # the driver's own look at the file, from 3.0 on, has no class for it
                    raise ConfigurationError(
                        f"{self.path} is of an LMDB that is not known here, or damaged at its beginning ({error})"
                    ) from error
                _check_place(self.path)
                raise StoreUnavailable(f"{self.path} could not be opened: {error}") from error

    def close(self) -> None:
        """Release the file. Only while no transaction is under way."""
        self.abandon()
        self._environment.close()

    def abandon(self) -> None:
        """Use it no more, and leave LMDB's part open."""
        if self.alive:
            self.alive = False
            os.close(self._turn)

    def _lacks_pages(self) -> bool:
        last_page: int = self._environment.info()["last_pgno"]
        return os.path.getsize(self.path) < (last_page + 1) * self._environment.stat()["psize"]

    def _check_length(self, _txn: lmdb.Transaction[bytes]) -> None:
        with open(self.path, "rb", buffering=0) as file:
            try:
                needed = length_in_use(file)
            except (ValueError, struct.error) as error:
                raise StateStoreError(f"{self.path} is damaged ({error}); restore it from a backup") from error
            length = os.fstat(file.fileno()).st_size
        if needed is not None and length < needed:
            raise StateStoreError(
                f"{self.path} is damaged: it was cut short, to {length} of {needed} bytes; restore it from a backup"
            )

    def _is_ours(self, txn: lmdb.Transaction[bytes]) -> bool:
        mark = txn.get(MARK)
        if mark == FORMAT:
            return True
        if mark is not None:
            raise ConfigurationError(
                f"{self.path} was written by another version, in format {mark!r}; this reads {FORMAT!r}"
            )
        if self.entries(txn):
            raise ConfigurationError(f"{self.path} is another program's LMDB database; name a file of its own")
        return False

    def _make_ours(self, txn: lmdb.Transaction[bytes]) -> None:
        if not self._is_ours(txn):
            txn.put(MARK, FORMAT)

    # -- use

    def entries(self, txn: lmdb.Transaction[bytes]) -> int:
        """How many records there are, `MARK` included."""
        return int(txn.stat(self.database)["entries"])

    def size(self, txn: lmdb.Transaction[bytes]) -> int:
        """How many bytes the pages of all records have."""
        stat = txn.stat(self.database)
        return int(stat["psize"] * (stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]))

    def clear(self, txn: lmdb.Transaction[bytes]) -> None:
        """Remove all records but `MARK`."""
        txn.drop(self.database, delete=False)
        txn.put(MARK, FORMAT)

    def run(self, work: Callable[[lmdb.Transaction[bytes]], T], *, write: bool) -> T:
        """What ``work`` answers, done in one transaction; it is done again when the map had to be changed first.

        :raises StoreUnavailable: the disk is full, the map cannot grow, or others write for too long.
        :raises OutcomeUnknown: the commit failed after it had begun to count.
        :raises StateStoreError: the file is damaged.
        """
        lmdb = self._lmdb
        while True:
            map_size = self._map_size
            try:
                return self._write(work) if write else self._read(work)
            except lmdb.MapFullError:
                self._change_map(map_size, 2 * map_size)
            except lmdb.MapResizedError:
                self._change_map(map_size, 0)
            except lmdb.PanicError as error:
                # An earlier write of LMDB's failed half way. It wants the file opened anew, which recovers.
                _forget(self)
                raise self._explained(error) from error
            except lmdb.Error as error:
                raise self._explained(error) from error

    def _free_dead_readers(self) -> None:
        # Readers that were killed leave their slots, and those keep old pages from being used again.
        self._readers_checked = time.monotonic()
        self._environment.reader_check()

    def _read(self, work: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        gate = _gate
        gate.enter()
        try:
            with self._environment.begin() as txn:
                return work(txn)
        finally:
            gate.leave()

    def _write(self, work: Callable[[lmdb.Transaction[bytes]], T]) -> T:
        gate = _gate
        if not self._writing.acquire(timeout=PATIENCE):
            raise StoreUnavailable(f"another thread has been writing to {self.path} for {PATIENCE:.0f} s")
        try:
            gate.enter()
            try:
                if time.monotonic() - self._readers_checked >= READER_CHECK_INTERVAL:
                    self._free_dead_readers()
                # Within the gate, so that no fork copies it while it is held.
                self._take_turn()
                try:
                    txn = self._environment.begin(write=True)
                    try:
                        result = work(txn)
                    except BaseException:
                        txn.abort()
                        raise
                    self._commit(txn)
                    return result
                finally:
                    fcntl.flock(self._turn, fcntl.LOCK_UN)
            finally:
                gate.leave()
        finally:
            self._writing.release()

    def _take_turn(self) -> None:
        """Keep other processes from writing."""
        if not self.alive:
            raise StoreUnavailable(f"{self.path} has been closed by another thread")
        if self._try_turn():
            return
        end = time.monotonic() + PATIENCE
        commit: int | None = None
        while True:
            last: int = self._environment.info()["last_txnid"]
            now = time.monotonic()
            if last != commit:
                # Once one has waited in vain, who comes next is told at once until there is another commit.
                commit, stalled = last, now + (0 if last == self._stalled_after else STALLED)
            if now >= min(stalled, end):
                self._stalled_after = commit
                raise StoreUnavailable(
                    f"another process has been writing to {self.path} for too long; see whether one of those that "
                    f"`fuser -v {self.path}` names is stopped"
                )
            time.sleep(POLL_INTERVAL)
            if self._try_turn():
                return

    def _try_turn(self) -> bool:
        try:
            fcntl.flock(self._turn, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StoreUnavailable(f"{self.path} cannot be locked: {error}") from error
        return True

    def _commit(self, txn: lmdb.Transaction[bytes]) -> None:
        number = txn.id()
        try:
            txn.commit()
        except self._lmdb.MapFullError:
            raise  # for `run`, and long before anything was written
        except self._lmdb.Error as error:
            if self._last_commit() >= number:
                raise OutcomeUnknown(f"a commit to {self.path} failed half way: {error}") from error
            raise

    def _last_commit(self) -> float:
        try:
            with self._environment.begin() as txn:
                return txn.id()
        except self._lmdb.Error:
            return math.inf  # any may have been done

    def sync(self) -> None:
        """Return when all commits so far are on the disk."""
        gate = _gate
        gate.enter()
        try:
            self._environment.sync(True)
        except self._lmdb.Error as error:
            raise self._explained(error) from error
        finally:
            gate.leave()

    def copy(self, path: str) -> None:
        """Write what is committed now to a new file at ``path``, without gaps, and return when it is on the disk.

        The map cannot be made larger meanwhile.
        """
        try:
            copy = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise ConfigurationError(f"cannot write a copy to {path}: {error.strerror}") from error
        gate = _gate
        try:
            gate.enter()
            try:
                self._environment.copyfd(copy, compact=True)
            finally:
                gate.leave()
            os.fsync(copy)
        except (self._lmdb.Error, OSError) as error:
            raise StoreUnavailable(f"copying {self.path} to {path} failed: {error} ({_room(path)})") from error
        finally:
            os.close(copy)

    def _change_map(self, seen: int, size: int) -> None:
        """Give the map ``size`` bytes, or as many as the file asks for (0), if it still has as many as were seen."""
        with _gate.alone():
            if self._map_size != seen or not self.alive:
                return
            try:
                self._environment.set_mapsize(size)
                self._map_size = self._environment.info()["map_size"]
            except self._lmdb.Error as error:
                # The old map is gone as well.
                _open.pop(self.path, None)
                self.close()
                raise StoreUnavailable(
                    f"{self.path} is full: its map of {seen} bytes cannot be made larger ({error})"
                ) from error

    def _explained(self, error: Exception) -> StateStoreError:
        lmdb = self._lmdb
        if isinstance(error, (lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.InvalidError)):
            return StateStoreError(f"{self.path} is damaged ({error}); restore it from a backup")
        if isinstance(error, lmdb.ReadersFullError):
            return StoreUnavailable(f"more than {MAX_READERS} read {self.path} at the same time")
        # LMDB takes a write that the disk had only partly room for to be an I/O error.
        return StoreUnavailable(f"{self.path} failed: {error} ({_room(self.path)})")


def _driver() -> Any:
    try:
        import lmdb
    except ImportError:
        raise MissingDriverError(
            'LMDB files need a package that is not installed: pip install "beaker-statestore[server]"'
        ) from None
    return lmdb


def _room(path: str) -> str:
    try:
        disk = os.statvfs(os.path.dirname(path))
    except OSError as error:
        return f"its directory is out of reach: {error.strerror}"
    return f"{disk.f_bavail * disk.f_frsize} bytes are free on its disk"


def _sync_directory(path: str) -> None:
    """Let a power cut not take away the name of a new file, which is an entry of its directory."""
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _check_place(path: str) -> None:
    """Raise `ConfigurationError` if ``path`` cannot be a file that this process reads and writes."""
    directory = os.path.dirname(path)
    if not os.path.isdir(directory):
        raise ConfigurationError(f"there is no directory {directory} for the database {path}; make it first")
    if os.path.isdir(path):
        raise ConfigurationError(f"{path} is a directory; name a file for the database, as {path}/state.lmdb")
    for file in (path, f"{path}-lock"):
        if os.path.exists(file) and not os.access(file, os.R_OK | os.W_OK):
            raise ConfigurationError(f"this process (user id {os.geteuid()}) may not read and write {file}")
    if not os.path.exists(path) and not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigurationError(f"this process (user id {os.geteuid()}) may not make files in {directory}")


# -- What is open in this process

#: By real path.
_open: dict[str, LMDBFile] = {}
#: Inherited, and not safe to close; kept for ever, since being collected would close them.
_abandoned: list[LMDBFile] = []
#: Held while something is opened or closed; before `_gate`, where both are held.
_registry = threading.RLock()
#: One gate for all files, so that a fork has just this one to hold.
_gate = _Gate()
_held_for_fork = (False, False)
_pid = os.getpid()


def open_file(path: str, user: object, *, sync: str, map_size: int) -> LMDBFile:
    """The file at ``path``, opened or shared, for ``user``, who gives it to `close_file` when done.

    :param sync: ``always`` or ``os``, for when commits reach the disk.
    :param map_size: in bytes; counts only for the first who opens it.
    :raises ConfigurationError: it cannot be a database, or it is open here with another ``sync``.
    :raises MissingDriverError: the package ``lmdb`` is not installed.
    """
    if _pid != os.getpid():  # a fork that Python was not told of
        _after_fork_in_child()
    path = os.path.realpath(path)
    with _registry:
        file = _open.get(path)
        if file is None:
            file = _open[path] = LMDBFile(path, sync, map_size)
        elif file.sync_mode != sync:
            raise ConfigurationError(f"{path} is already open in this process, with sync={file.sync_mode}, not {sync}")
        file.users.add(user)
        return file


def close_file(file: LMDBFile, user: object) -> None:
    """The opposite of `open_file`: the last user closes the file."""
    with _registry:
        file.users.discard(user)
        if file.alive and not file.users:
            _forget(file)


def _forget(file: LMDBFile) -> None:
    with _registry, _gate.alone():
        if file.alive:
            _open.pop(file.path, None)
            file.close()


def _before_fork() -> None:
    # The child has to close what it inherits before it opens the same files, and can do so only if no thread is
    # within a transaction.
    global _held_for_fork
    _held_for_fork = _registry.acquire(timeout=PATIENCE), bool(_open) and _gate.hold()


def _after_fork_in_parent() -> None:
    registry, gate = _held_for_fork
    if gate:
        _gate.release()
    if registry:
        _registry.release()


def _after_fork_in_child() -> None:
    global _registry, _gate, _pid
    quiet = not _gate.inside
    _registry, _gate, _pid = threading.RLock(), _Gate(), os.getpid()
    for file in _open.values():
        if quiet:
            file.close()
        else:
            file.abandon()
            _abandoned.append(file)
    _open.clear()


os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
