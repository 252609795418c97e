"""One session as one request sees it: loaded once, committed any number of times, losing nobody's changes.

Beaker hands over the whole session at the end of a request, with no word about what the request did to it. So this
keeps what the application last saw or wrote (``base``) and the exact bytes last known to be in the store
(``stored``). A commit takes the difference between ``base`` and the new session, applies it to what is stored, and
swaps; if somebody else was quicker it reads again and repeats. It knows neither Beaker's classes nor engines.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from beaker_statestore import documents, observe, payloads
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import ACCESSED, CREATED, EXPIRES, OPAQUE, RESERVED, SERIALIZER, Document
from beaker_statestore.exceptions import DocumentDamagedError, DocumentRefusedError, OutcomeUnknown
from beaker_statestore.payloads import Form
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import UNREAD, Store, Unread

__all__ = ["SessionRecord"]

#: What Beaker itself puts into every session, even one that the application has emptied
#: (beaker.session._ConfigurableSession.clear).
CONFIGURATION: Final = frozenset({"_domain", "_path"})
#: What changes when a session is only read.
TOUCHED: Final = frozenset({ACCESSED, EXPIRES})

#: The form in which this process last saw Beaker save, for each store's settings.
_last_form: dict[Settings, Form] = {}


class SessionRecord:
    """The record of one session id, for the length of one request. Not for sharing between threads.

    :param timeout: seconds after its last access at which the record may be removed; None: never.
    """

    def __init__(self, store: Store, key: bytes, settings: Settings, timeout: float | None) -> None:
        self._store = store
        self._key = key
        self._settings = settings
        self._codec = DocumentCodec.of(settings)
        self._timeout = timeout
        # What the application was given at load, and what it last saw or wrote; None: no session was there.
        self._loaded: Document | None = None
        self._base: Document | None = None
        self._stored: bytes | Unread | None = UNREAD

    def load(self) -> str | None:
        """The session in the form that Beaker can read, or None when there is none or it has expired.

        :raises DocumentDamagedError: the record is none of ours.
        :raises StoreUnavailable: the store failed.
        """
        data = self._store.get(self._key)
        document = self._open(data)
        self._stored = data
        self._base = self._loaded = None if document is None else _mergeable(document)
        if document is None:
            return None
        if OPAQUE in document:
            return self._opaque(document[OPAQUE])
        # The time of access in front, as a sign of ours: see `_is_as_loaded`.
        application = {ACCESSED: document.get(ACCESSED, time.time()), **document}
        return payloads.write(
            {name: value for name, value in application.items() if name not in RESERVED}, self._form(document)
        )

    def exists(self) -> bool:
        """Whether `load` would find a session."""
        return self._open(self._store.get(self._key)) is not None

    def save(self, payload: object) -> None:
        """Commit what the application did to the session since it was loaded or last saved.

        :param payload: the whole session as Beaker's serializer made it.
        :raises DocumentRefusedError: it holds what JSON cannot; nothing was written.
        :raises StoreUnavailable: the store failed; whether the change is stored may be unknown.
        """
        read = payloads.read(payload, encrypted=self._settings.encrypted, max_bytes=self._settings.max_value)
        if read.document is None:
            self._replace(self._dated({OPAQUE: read.opaque}, time.time()))
            return
        documents.refuse_reserved(read.document)
        if read.form is not None:
            _last_form[self._settings] = read.form
        if read.document.keys() <= CONFIGURATION:
            self.delete()
            return
        ours = self._complete(read.document)
        base = self._loaded if self._is_as_loaded(read.document) else self._base
        if base is not None and documents.difference(base, ours) <= TOUCHED:
            self._touch(base, ours)
        else:
            self._commit(base, ours, read.form)

    def delete(self) -> None:
        """Remove the record, whatever others have done to it. A request still in flight cannot bring it back."""
        try:
            self._store.delete(self._key)
        except OutcomeUnknown:
            self._store.delete(self._key)
        self._stored = self._base = self._loaded = None

    def _is_as_loaded(self, saved: Document) -> bool:
        """Whether Beaker saves the session as it was loaded, whatever the request has done to it since.

        That is ``Session.save(accessed_only=True)``, which must not undo an earlier, explicit save of the same
        request (pyramid_beaker issue 26). Beaker does not tell, but the order of keys does: it then hands over the
        mapping that it was given by `load`, which begins with the time of access, and otherwise one that begins with
        what ``Session.clear()`` puts into it.
        """
        return self._loaded is not None and next(iter(saved)) == ACCESSED

    def _commit(self, base: Document | None, ours: Document, form: Form | None) -> None:
        def merged(current: bytes | None) -> bytes | None:
            # To a request that has run longer than the session had to live, an expired record is still its own.
            theirs = self._open(current, though_expired=base is not None)
            if theirs is None and base is not None:
                return _dropped(current)
            if theirs is None or OPAQUE in theirs:
                return self._encode(ours, form)
            merge = documents.merge(base or {}, ours, _mergeable(theirs))
            if merge.conflicts:
                observe.count("session.conflict", len(merge.conflicts))
            return self._encode(merge.document, form)

        self._stored = self._modify(merged)
        self._base = ours

    def _touch(self, base: Document, ours: Document) -> None:
        """Note the time of access, unless somebody else has changed the record meanwhile: then it is fresh anyway."""
        stored = self._stored
        theirs = None if isinstance(stored, Unread) else self._open(stored, though_expired=True)
        if theirs is None or isinstance(stored, Unread) or OPAQUE in theirs:
            return
        merge = documents.merge(base, ours, _mergeable(theirs))
        touched = self._encode(merge.document, theirs.get(SERIALIZER))
        try:
            if self._store.compare_and_swap(self._key, stored, touched, merge.document.get(EXPIRES)):
                self._stored = touched
            else:
                observe.count("session.touch_dropped")
        except OutcomeUnknown:
            # Done or not, nothing is lost, and the next commit finds out which.
            observe.count("session.touch_unknown")

    def _replace(self, opaque: Document) -> None:
        """Store what cannot be merged. Even so, a session that others have deleted stays deleted."""
        known = self._base

        def replaced(current: bytes | None) -> bytes | None:
            if known is not None and current is None:
                return _dropped(current)
            return self._encode(opaque, None)

        self._stored = self._modify(replaced)
        self._base = self._loaded = _mergeable(opaque)

    def _complete(self, application: Document) -> Document:
        """``application`` with its expiry and with the times that ``session.clear()`` throws away but Beaker needs."""
        now = time.time()
        known = self._base or {}
        ours = {ACCESSED: now, CREATED: known.get(CREATED, now), **application}
        accessed = ours[ACCESSED]
        if isinstance(accessed, bool) or not isinstance(accessed, (int, float)):
            raise DocumentRefusedError(
                f"session['{ACCESSED}'] is {accessed!r}; Beaker keeps the time of the last access there, in seconds: "
                "give the application's value another name"
            )
        return self._dated(ours, accessed)

    def _dated(self, document: Document, accessed: float) -> Document:
        return document if self._timeout is None else {**document, EXPIRES: accessed + self._timeout}

    def _modify(self, function: Callable[[bytes | None], bytes | None]) -> bytes | None:
        return self._store.modify(self._key, function, known=self._stored, expires_at=documents.expires_at)

    def _encode(self, document: Document, form: Form | None) -> bytes:
        if form is not None:
            document = {**document, SERIALIZER: form}
        return self._codec.encode(document, self._key, "session")

    def _open(self, data: bytes | None, *, though_expired: bool = False) -> Document | None:
        if data is None:
            return None
        document = self._codec.decode(data, self._key)
        return document if though_expired or not documents.is_expired(document, time.time()) else None

    def _opaque(self, ciphertext: Any) -> str:
        if not isinstance(ciphertext, str):
            raise DocumentDamagedError(f"{OPAQUE} holds {type(ciphertext).__name__}, not text")
        if not self._settings.encrypted:
            raise DocumentDamagedError(
                "the session is stored as ciphertext; if the application uses beaker.session.encrypt_key, "
                "set beaker.session.encrypted = true"
            )
        return ciphertext

    def _form(self, document: Document) -> Form:
        known = self._settings.serializer or _last_form.get(self._settings) or document.get(SERIALIZER)
        return "json" if known == "json" else "pickle"


def _mergeable(document: Document) -> Document:
    """The document without the fields that describe its form; they are no part of the session."""
    return {name: value for name, value in document.items() if name not in (SERIALIZER, OPAQUE)}


def _dropped(current: bytes | None) -> bytes | None:
    """Leave the record as it is: the session was there and is gone, so somebody has logged out."""
    observe.count("session.dropped")
    return current
