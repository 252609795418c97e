"""Beaker's NamespaceManager over a store of JSON documents, and the documents of everything else.

This is the only door between Beaker and the stores. It must never know an engine or a socket. Beaker finds
`TCJSONNamespaceManager` as ``ext:tcjson`` through the entry point group ``beaker.backends``.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, Final

from beaker.cache import clsmap
from beaker.container import Container, NamespaceManager
from beaker.crypto import get_crypto_module

from beaker_statestore import keys, observe, tagged
from beaker_statestore.collection import Collection
from beaker_statestore.documents import EXPIRES, Document
from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentDamagedError,
    SessionUnavailable,
    StoreUnavailable,
)
from beaker_statestore.keys import SESSION_KEY, shortened
from beaker_statestore.locks import Lease
from beaker_statestore.sessionrecord import SessionRecord
from beaker_statestore.settings import Settings

__all__ = ["DocumentManager", "TCJSONContainer", "TCJSONNamespaceManager", "register", "warn_without_timeout"]

log = logging.getLogger(__name__)

#: The name under which an INI file asks for this back end.
TYPE: Final = "ext:tcjson"
#: How messages about damaged sessions begin.
DAMAGE: Final = "the stored session"
#: How many characters of a cache's record key the log shows.
LONGEST_SHOWN: Final = 100
#: The longest record key, in bytes, that can be read in that of its lock, where it is escaped once more.
LONGEST_IN_LOCK: Final = 250
#: Of Beaker's crypto modules the one that enciphers by AES-GCM; the others' ciphertext can be forged.
AUTHENTICATING: Final = "beaker.crypto.pyca_cryptography"


class DocumentManager(Collection, NamespaceManager):
    """A collection in the form of Beaker's NamespaceManager; what the web and the mail door are built on.

    :param namespace: keeps documents of one kind apart, such as the name of a cache; None where a kind has no
        such division.
    :param kind: one of `keys.KINDS`, what the records are for.
    :param options: as for `Settings.from_options`, ``url`` above all.
    :raises ConfigurationError: an option is wrong or missing.
    """

    def __init__(self, namespace: str | None, *, kind: str, **options: Any) -> None:
        NamespaceManager.__init__(self, namespace)
        origin = "beaker.cache" if kind == "cache" else "beaker.session"
        Collection.__init__(self, Settings.from_options(options, origin=origin), kind, namespace)
        self._reading = _Reading()

    def modify(self, key: str | None, function: Callable[[Document | None], Document | None], **options: Any) -> Any:
        """As promised in `Collection`; this thread reads what it has written."""
        self._reading.forget()
        return super().modify(key, function, **options)

    # Beaker's interface

    def keys(self) -> list[str | None]:
        """The keys of all documents that have not expired."""
        return list(dict.fromkeys(key for page in self.pages() for key in self.read_many(page)))

    def acquire_read_lock(self) -> None:
        """Let what ``in`` reads be what ``[]`` answers, for this thread, until the outermost lock is released.

        beaker.container.Value asks both, one after the other, for every value that it reads.
        """
        self._reading.depth += 1

    def release_read_lock(self) -> None:
        """Forget what `acquire_read_lock` let this thread remember, if it is the outermost."""
        self._reading.depth -= 1
        if self._reading.depth <= 0:
            self._reading.depth = 0
            self._reading.forget()

    def __contains__(self, key: Any) -> bool:
        text = self._key(key)
        document = self.read(text)
        self._reading.remember(text, document)
        return document is not None

    def __getitem__(self, key: Any) -> Any:
        text = self._key(key)
        document = self._reading.take(text)
        if document is None:
            document = self.read(text)
        if document is None:
            raise KeyError(key)
        return document

    def __setitem__(self, key: Any, value: Any) -> None:
        self._reading.forget()
        self.put(self._key(key), value)

    def __delitem__(self, key: Any) -> None:
        self._reading.forget()
        if not self.delete(self._key(key)):
            raise KeyError(key)

    def do_remove(self) -> None:
        """Remove the documents of this namespace, and nothing else."""
        self._reading.forget()
        self.delete_all()

    def get_creation_lock(self, key: Any) -> Lease:
        """A lock for making one cache value, shared by all processes that use the store."""
        record = self.records.record(self._key(key))[len(self.settings.prefix) :]
        # A record key begins with its kind and a colon, so none looks like the hash of another.
        name = record.decode() if len(record) <= LONGEST_IN_LOCK else f"sha256-{hashlib.sha256(record).hexdigest()}"
        lock = keys.Namespace(self.settings.prefix, "lock", "creation").record(name)
        return Lease(self.store, lock, self.settings.creation_lease)

    def _key(self, key: Any) -> Any:
        """A key of the dictionary interface as `read` and the others take it."""
        return key


class _Reading(threading.local):
    """What the current thread has found by ``in`` and not yet asked for by ``[]``, under a read lock."""

    #: How many read locks the thread has.
    depth: int = 0
    _found: tuple[str | None, Document | None] = (None, None)

    def remember(self, key: str | None, document: Document | None) -> None:
        """Keep ``document`` for `take`, if there is a read lock."""
        if self.depth:
            self._found = key, document

    def take(self, key: str | None) -> Document | None:
        """The document remembered under ``key``, once: its receiver may change it."""
        found, document = self._found
        self.forget()
        return document if found == key else None

    def forget(self) -> None:
        self._found = None, None


class TCJSONNamespaceManager(DocumentManager):
    """Beaker's sessions and caches, as ``ext:tcjson``.

    beaker.session.Session makes one for each request that loads a session, with the session's id for its namespace;
    beaker.cache.Cache makes one for each cache and keeps it, shared by threads, for ever.

    :param timeout: only from Session: seconds after the last access at which the record may go; already longer than
        the session's own timeout (Session adds two minutes).
    """

    def __init__(self, namespace: str, timeout: float | None = None, **options: Any) -> None:
        serves_session = _comes_from_session(options)
        super().__init__(namespace, kind="session" if serves_session else "cache", **options)
        if self.settings.encrypted:
            require_authenticating_cipher()
        if serves_session and timeout is None:
            warn_without_timeout(self.settings)
        self._session = (
            SessionRecord(self.store, self.records.record(SESSION_KEY), self.settings, timeout)
            if serves_session
            else None
        )

    def __contains__(self, key: Any) -> bool:
        if self._session is not None and key == SESSION_KEY:
            return self._session.exists()
        try:
            return super().__contains__(key)
        except DocumentDamagedError:
            # Beaker removes only what it finds (beaker.container.Value.clear_value). Where it reads, it takes the
            # KeyError that comes next for absence (Value.get_value, has_current_value).
            return True

    def __getitem__(self, key: Any) -> Any:
        if self._session is not None and key == SESSION_KEY:
            return self._load_session(self._session)
        try:
            document = super().__getitem__(key)
        except DocumentDamagedError as error:
            if self._session is not None:
                raise
            # What is in a cache can be made anew, and then overwrites the damage.
            observe.count("documents.damaged")
            _say_damaged(shortened(self.records.record(self._key(key)))[:LONGEST_SHOWN], str(error))
            raise KeyError(key) from error
        if self.settings.types != "strict":
            document = tagged.untag(document)
        if "stored" in document:
            return document["stored"], document.get("expire"), document.get("value")
        return document.get("value")

    def __setitem__(self, key: Any, value: Any) -> None:
        if self._session is not None and key == SESSION_KEY:
            self._session.save(value)
        else:
            self.set_value(key, value)

    def renew(self, session_id: str) -> None:
        """Serve this session under another id: the next save stores it there and removes the present record."""
        if self._session is not None:
            self.namespace = session_id
            self.records = keys.Namespace(self.settings.prefix, "session", session_id, self.settings.hash_ids)
            self._session.renew(self.records.record(SESSION_KEY))

    @property
    def is_stored(self) -> bool:
        """Whether this session had a record when it was last loaded or saved; no look-up."""
        return self._session is not None and self._session.is_stored

    def discard(self) -> None:
        """Remove the session if it still is as it was loaded. If that fails, its expiry comes soon enough."""
        if self._session is not None:
            self._session.discard()

    def set_value(self, key: Any, value: Any, expiretime: float | None = None) -> None:
        """Store a cache entry.

        :param value: what beaker.container.Value makes: (time stored, seconds to live or None, value).
        :param expiretime: seconds to live. The record stays `Settings.cache_grace` longer.
        """
        if isinstance(value, tuple) and len(value) == 3 and isinstance(value[0], float):
            stored, expire, value = value
            document: Document = {"stored": stored, "expire": expire, "value": value}
        else:
            document = {"value": value}
        if expiretime is not None:
            document[EXPIRES] = document.get("stored", time.time()) + expiretime + self.settings.cache_grace
        if self.settings.types != "strict":
            root = f"{self.records.kind}[{self._key(key)!r}]"
            document = tagged.tag(document, self.settings.types, root, self.settings.max_value)
        super().__setitem__(key, document)

    def __delitem__(self, key: Any) -> None:
        if self._session is not None and key == SESSION_KEY:
            self._session.delete()
        else:
            super().__delitem__(key)

    def _key(self, key: Any) -> str:
        # Beaker's Cache encodes text by this rule (beaker.cache.Cache._get_value); whoever passes text to the manager
        # itself means the same record.
        return key.decode("latin-1") if isinstance(key, bytes) else key.encode("ascii", "backslashreplace").decode()

    def _load_session(self, session: SessionRecord) -> str:
        # With invalidate_corrupt, which its middleware sets, Beaker answers any error of a load with a second load
        # under a new id, from within its "except" block. If the outage was over by then, the visitor would silently
        # get a new, empty session: so that second load has to fail as the first one did.
        handled = sys.exc_info()[1]
        if isinstance(handled, SessionUnavailable) and handled.session_id != self.namespace:
            raise SessionUnavailable(handled.reason, handled.session_id) from handled
        try:
            payload = session.load()
        except StoreUnavailable as error:
            raise SessionUnavailable(str(error), self.namespace) from error
        except DocumentDamagedError as error:
            log.warning("%s %s is damaged: %s", DAMAGE, shortened(self.records.record(SESSION_KEY)), error)
            raise DocumentDamagedError(f"{DAMAGE} is damaged: {error}") from error
        if payload is None:
            raise KeyError(SESSION_KEY)
        return payload


class TCJSONContainer(Container):
    """Beaker's older interface to the same thing."""

    namespace_class = TCJSONNamespaceManager


def require_authenticating_cipher() -> None:
    """:raises ConfigurationError: Beaker would decipher sessions with a library that anybody's ciphertext satisfies.

    Beaker unpickles what it has deciphered. Its other modules authenticate nothing (or, with no library, do not even
    encipher), so whoever can write to the store could run code.
    """
    if get_crypto_module("default").__name__ != AUTHENTICATING:
        raise ConfigurationError(
            "beaker.session.encrypted is true, but Beaker does not find the one library with which it also "
            "authenticates what it deciphers: pip install cryptography"
        )


@functools.cache
def warn_without_timeout(settings: Settings) -> None:
    """Say in the log, once for each settings in a process, that sessions are kept for ever, unless they are not."""
    if settings.max_lifetime is None:
        log.warning(
            "beaker.session.timeout is not set, so sessions never end and nothing removes them: set it to the seconds "
            "after the last request at which they do, such as beaker.session.timeout = 86400"
        )


@functools.lru_cache(maxsize=1000)
def _say_damaged(entry: str, damage: str) -> None:
    """Say in the log, once for each entry in a process, that a cache has it and cannot use it."""
    log.warning("the entry %s is damaged and counts as absent: %s", entry, damage)


def register() -> None:
    """Make ``ext:tcjson`` known to Beaker where entry points cannot be found, as in a zip application."""
    try:
        clsmap[TYPE]  # has Beaker look at the entry points, which it would otherwise find taken later
    except KeyError:
        clsmap._clsmap[TYPE] = TCJSONNamespaceManager


def _comes_from_session(options: dict[str, Any]) -> bool:
    """Whether beaker.session.Session gave these options: it always passes these two on, in this form (Session.load)."""
    return "data_dir" in options and options.get("digest_filenames") is False
