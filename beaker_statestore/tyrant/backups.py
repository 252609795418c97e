"""``copy``: backups of a store in one directory, and nowhere else.

The original writes a copy wherever a client says, over the database itself too, and runs the name as a program if it
begins with ``@``. Here a client gives the name of a new file in a directory that the operator has chosen.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from pathlib import Path
from typing import Final

from beaker_statestore.exceptions import ConfigurationError, StoreUnavailable
from beaker_statestore.stores.base import LocalStore

__all__ = ["Backups"]

logger = logging.getLogger(__name__)

#: No separators, nothing hidden, nothing that a shell would see more in than a name; and none that an engine gives to
#: a file beside a database, as it would believe what it finds there (Tokyo Cabinet's log, LMDB's locks).
_NAME: Final = re.compile(rb"(?!.*(\.wal|-lock)\Z)[A-Za-z0-9_][A-Za-z0-9_.+=-]*")
#: Bytes of a name; a file's may have 255, and until it is complete it has more.
_LONGEST: Final = 200


class Backups:
    """A directory for the copies of one server. A copy gets its name when it is complete and on the disk."""

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """
        :raises ConfigurationError: there is no such directory, or files cannot be made in it.
        """
        self.directory = Path(directory).resolve()
        if not self.directory.is_dir():
            raise ConfigurationError(f"there is no directory {self.directory} for backups; make it first")
        if not os.access(self.directory, os.W_OK | os.X_OK):
            raise ConfigurationError(f"this process (user id {os.geteuid()}) may not make files in {self.directory}")
        # What a server has left that was killed while it wrote one.
        self._remove_unfinished("*")

    def write(self, name: bytes, store: LocalStore) -> Path:
        """Copy ``store`` to a new file called ``name``, and answer its path.

        Of a table only the records are copied; its indexes are files of their own.

        :raises ConfigurationError: it is no plain name, not one for the store's kind of file, or taken; or the store
            keeps no files.
        :raises StoreUnavailable: the copy failed; nothing is left of it.
        """
        if len(name) > _LONGEST:
            raise ConfigurationError(f"the name of a backup has {_LONGEST} letters at most, not {len(name)}")
        if not _NAME.fullmatch(name):
            shown = name.decode(errors="backslashreplace")
            raise ConfigurationError(
                f"{shown!r} is not the name of a backup: letters, digits and _.+=- , no directory, as in monday.lmdb, "
                "and no .wal or -lock at the end"
            )
        path = self.directory / name.decode()
        suffix = os.path.splitext(store.path or "")[1]
        if path.suffix != suffix and suffix:  # by which it is known what a file is
            raise ConfigurationError(
                f"{path.name!r} does not end as the store's own file does: call the backup {path.stem}{suffix}"
            )
        if os.path.lexists(path):  # which a copy, that takes long, would only find at its end
            raise _taken(path)
        unfinished = self.directory / f".{path.name}.unfinished"
        try:
            store.backup(str(unfinished))
            # Not renamed: that would replace what has come to be there meanwhile.
            os.link(unfinished, path, follow_symlinks=False)
            self._sync_directory()
        except FileExistsError:
            raise _taken(path) from None
        except OSError as error:
            raise StoreUnavailable(f"the backup {path} failed: {error.strerror}") from error
        finally:
            self._remove_unfinished(path.name)
        logger.info("copied the store to %s", path)
        return path

    def _remove_unfinished(self, name: str) -> None:
        # Tokyo Cabinet copies a table's indexes to files with more behind the name.
        for unfinished in self.directory.glob(f".{name}.unfinished*"):
            with contextlib.suppress(OSError):
                unfinished.unlink()

    def _sync_directory(self) -> None:
        directory = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _taken(path: Path) -> ConfigurationError:
    return ConfigurationError(f"there is a {path} already; give the backup another name")
