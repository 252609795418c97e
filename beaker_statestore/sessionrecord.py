"""One session as one request sees it: loaded once, committed any number of times, losing nobody's changes.

Beaker hands over the whole session at the end of a request, with no word about what the request did to it. So this
keeps what the application last saw or wrote (``base``) and the exact bytes last known to be in the store
(``stored``). A commit takes the difference between ``base`` and the new session, applies it to what is stored, and
swaps; if somebody else was quicker it reads again and repeats. It knows neither Beaker's classes nor engines.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any, Final

from beaker_statestore import documents, observe, payloads
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import ACCESSED, CREATED, EXPIRES, OPAQUE, RESERVED, REVOKED, SERIALIZER, Document
from beaker_statestore.exceptions import (
    Conflict,
    ContentionError,
    DocumentDamagedError,
    DocumentRefusedError,
    OutcomeUnknown,
    SessionMoved,
    StoreUnavailable,
)
from beaker_statestore.payloads import Form
from beaker_statestore.sessionindex import GRACE, SessionIndex
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import CONTENTION_DEADLINE, UNREAD, Store, Unread

__all__ = ["SessionRecord"]

#: What Beaker itself puts into every session, even one that the application has emptied
#: (beaker.session._ConfigurableSession.clear).
CONFIGURATION: Final = frozenset({"_domain", "_path"})
#: What changes when a session is only read.
TOUCHED: Final = frozenset({ACCESSED, EXPIRES})

#: What Session adds to its timeout before it hands it on, in seconds (beaker.session.Session.__init__).
BEAKERS_GRACE: Final = 120.0

#: The form in which this process last saw Beaker save, for each store's settings.
_last_form: dict[Settings, Form] = {}


class _Ended(Exception):  # noqa: N818 - never leaves this module
    """The session that a save is for has been ended by somebody else meanwhile."""


class SessionRecord:
    """The record of one session id, for the length of one request. Not for sharing between threads.

    :param timeout: seconds after its last access at which the record may be removed; None: never.
    """

    def __init__(self, store: Store, key: bytes, settings: Settings, timeout: float | None) -> None:
        self._store = store
        self._key = key
        # Where the next save is to store it, if that is another place.
        self._renewed: bytes | None = None
        self._settings = settings
        self._codec = DocumentCodec.of(settings)
        self._timeout = timeout
        self._touch_interval = settings.touch_interval
        if timeout is not None:
            self._touch_interval = min(settings.touch_interval, max(0.0, timeout - BEAKERS_GRACE) / 10)
        self._index = SessionIndex(store, settings) if settings.index else None
        # What the application was given at load, and what it last saw or wrote; None: no session was there.
        self._loaded: Document | None = None
        self._base: Document | None = None
        self._known_since = 0.0
        self._stored: bytes | Unread | None = UNREAD

    def load(self) -> str | None:
        """The session in the form that Beaker can read, or None when there is none or it has expired.

        :raises DocumentDamagedError: the record is none of ours.
        :raises StoreUnavailable: the store failed.
        """
        data = self._store.get(self._key)
        document = self._open(data)
        if document is not None and REVOKED in document:
            document = None
        self._stored = data
        self._loaded = None if document is None else _mergeable(document)
        self._remember(self._loaded)
        if document is None:
            return None
        if OPAQUE in document:
            return self._opaque(document[OPAQUE])
        # The time of access in front, as a sign of ours: see `_is_as_loaded`.
        application = {ACCESSED: document.get(ACCESSED, time.time()), **document}
        return payloads.write(
            {name: value for name, value in application.items() if name not in RESERVED},
            self._form(document),
            types=self._settings.types,
        )

    def exists(self) -> bool:
        """Whether `load` would find a session."""
        document = self._open(self._store.get(self._key))
        return document is not None and REVOKED not in document

    @property
    def is_stored(self) -> bool:
        """Whether the session had a record when it was last loaded or saved."""
        return isinstance(self._stored, bytes)

    def save(self, payload: object) -> None:
        """Commit what the application did to the session since it was loaded or last saved.

        :param payload: the whole session as Beaker's serializer made it.
        :raises DocumentRefusedError: it holds what JSON cannot; nothing was written.
        :raises Conflict: with ``conflict = raise``, another request has changed the same key meanwhile.
        :raises StoreUnavailable: the store failed; whether the change is stored may be unknown.
        """
        read = payloads.read(
            payload,
            encrypted=self._settings.encrypted,
            max_bytes=self._settings.max_value,
            types=self._settings.types,
        )
        if read.document is None:
            self._replace(self._dated({OPAQUE: read.opaque}, time.time()))
            return
        documents.refuse_reserved(read.document)
        if read.form is not None:
            _last_form[self._settings] = read.form
        if read.document.keys() <= CONFIGURATION:
            self.delete()
            return
        ours, base = self._complete(read.document), self._base
        if base is not None and self._loaded is not None and self._is_as_loaded(read.document):
            # It has values in common with the session, though, so what was changed inside of them counts.
            ours = documents.merge(self._loaded, ours, base).document
        if self._renewed is None and base is not None and documents.difference(base, ours) <= TOUCHED:
            self._touch(base, ours)
        else:
            self._commit(base, ours, read.form)

    def delete(self) -> None:
        """Remove the record, whatever others have done to it. A request still in flight cannot bring it back."""
        self._store.modify(self._key, functools.partial(self._unless_revoked, self._key, None), known=self._stored)
        if self._renewed is not None:
            # A save that failed half way may have left it there.
            self._store.modify(self._renewed, functools.partial(self._unless_revoked, self._renewed, None))
        self._renewed = self._stored = self._base = self._loaded = None

    def discard(self) -> None:
        """Remove the record if it is as it was loaded; if that fails, leave it to its expiry."""
        if isinstance(self._stored, bytes):
            try:
                self._store.compare_and_swap(self._key, self._stored, None)
            except StoreUnavailable:
                observe.count("session.discard_failed")

    def renew(self, key: bytes) -> None:
        """Have the next save store the session under another key, and remove the record that there is."""
        self._renewed = key

    def _is_as_loaded(self, saved: Document) -> bool:
        """Whether Beaker saves the session as it was loaded, whatever the request has done to it since.

        That is ``Session.save(accessed_only=True)``, which must not undo an earlier, explicit save of the same
        request (pyramid_beaker issue 26). Beaker does not tell, but the order of keys does: it then hands over the
        mapping that it was given by `load`, which begins with the time of access, and otherwise one that begins with
        what ``Session.clear()`` puts into it.
        """
        return self._loaded is not None and next(iter(saved)) == ACCESSED

    def _commit(self, base: Document | None, ours: Document, form: Form | None) -> None:
        target = self._renewed or self._key
        moves = target != self._key
        listed_until = self._enlist(target, None if moves else base, ours)
        loaded = self._stored
        took_in = False

        def merged(current: bytes | None) -> bytes:
            nonlocal took_in
            if time.monotonic() > listed_until:
                raise StoreUnavailable("this process stood still in the middle of saving a session; nothing was saved")
            theirs = self._open(current, though_expired=base is not None)
            if theirs is not None and REVOKED in theirs:
                if current != loaded:
                    raise _Ended
                theirs = None  # the visitor has come back after the revocation
            if base is not None and (theirs is None or self._is_another(base, theirs)):
                raise _Ended
            if theirs is None or OPAQUE in theirs:
                return self._encode(ours, form, target)
            merge = documents.merge(base or {}, ours, _mergeable(theirs))
            took_in = current != loaded
            if merge.conflicts:
                observe.count("session.conflict", len(merge.conflicts))
                if self._settings.conflict == "raise":
                    raise Conflict(merge.conflicts)
            if moves:
                # What others have stored is listed under the old key only.
                self._enlist(target, ours, merge.document)
            if current is not None and not merge.changed and not moves:
                return current
            return self._encode(merge.document, form, target)

        self._write(target, merged)
        if took_in and self._stored is not None:
            observe.count("session.merged")
        self._remember(ours)

    def _is_another(self, base: Document, theirs: Document) -> bool:
        """Whether the record is another session, begun under this id after the one that this request knows had ended.

        Of two requests that begin a session at once the earlier's time counts (`documents.merge`), so a time of
        creation that is later than when ``base`` was taken is of no session that was there then. Where it is the same
        session, the times are equal, however the clocks of the hosts differ.
        """
        created = theirs.get(CREATED)
        return created != base.get(CREATED) and documents.is_number(created) and created > self._known_since

    def _remember(self, base: Document | None) -> None:
        self._base = base
        self._known_since = time.time()

    def _touch(self, base: Document, ours: Document) -> None:
        """Note the time of access, unless somebody else has changed the record meanwhile: then it is fresh anyway.

        (Or, after ``statestore reseal``, the next request does it.)
        """
        if ours[ACCESSED] - base.get(ACCESSED, 0) < self._touch_interval:
            observe.count("session.touch_skipped")
            return
        stored = self._stored
        if not isinstance(stored, bytes):
            return
        theirs = self._open(stored, though_expired=True)
        if theirs is None or OPAQUE in theirs:
            return
        merge = documents.merge(base, ours, _mergeable(theirs))
        self._enlist(self._key, base, merge.document)
        touched = self._encode(merge.document, theirs.get(SERIALIZER), self._key)
        try:
            if self._store.compare_and_swap(self._key, stored, touched, merge.document.get(EXPIRES)):
                self._stored = touched
                observe.count("session.touched")
            else:
                observe.count("session.touch_dropped")
        except OutcomeUnknown:
            # Done or not, nothing is lost, and the next commit finds out which.
            observe.count("session.touch_unknown")

    def _enlist(self, key: bytes, before: Document | None, after: Document) -> float:
        """Have the index list the session before it is stored; until when that holds, on the monotonic clock.

        A listing without a live session is dropped after a while, so a save must not come much later.
        """
        until = time.monotonic() + GRACE / 2
        listed = self._index is not None and self._index.enlist(key, before, after)
        return until if listed else math.inf

    def _replace(self, opaque: Document) -> None:
        """Store what cannot be merged. Even so, a session that others have deleted stays deleted."""
        target, known = self._renewed or self._key, self._base

        def replaced(current: bytes | None) -> bytes:
            if known is not None and current is None:
                raise _Ended
            return self._encode(opaque, None, target)

        self._write(target, replaced)
        self._base = self._loaded = _mergeable(opaque)

    def _complete(self, application: Document) -> Document:
        """``application`` with its expiry and with the times that ``session.clear()`` throws away but Beaker needs."""
        now = time.time()
        known = self._base or {}
        ours = {ACCESSED: now, CREATED: known.get(CREATED, now), **application}
        accessed = ours[ACCESSED]
        if not documents.is_number(accessed):
            raise DocumentRefusedError(
                f"session['{ACCESSED}'] is {accessed!r}; Beaker keeps the time of the last access there, in seconds: "
                "give the application's value another name"
            )
        return self._dated(ours, accessed)

    def _dated(self, document: Document, accessed: float) -> Document:
        ends = [end_of(document, self._settings.max_lifetime)]
        if self._timeout is not None:
            ends.append(accessed + self._timeout)
        expiry = min(ends)
        return document if expiry == math.inf else {**document, EXPIRES: expiry}

    def _write(self, target: bytes, function: Callable[[bytes | None], bytes]) -> None:
        """Store under ``target`` what ``function`` makes of the record; nothing if it raises `_Ended`."""
        try:
            if target == self._key:
                # What was never loaded has just got its id: most likely there is no record.
                known = None if isinstance(self._stored, Unread) else self._stored
                self._stored = self._store.modify(target, function, known=known, expires_at=documents.expires_at)
            else:
                self._stored = self._move(target, function)
            observe.count("session.saved")
        except _Ended:
            observe.count("session.dropped")
            self._stored = None
        self._key, self._renewed = target, None

    def _move(self, target: bytes, function: Callable[[bytes | None], bytes]) -> bytes | None:
        """Store under ``target`` what ``function`` makes of the record, and then remove the record.

        In this order, and both or nothing: until the last step the old key is good and nobody knows the new one, so
        that whatever fails can be repeated. The last step removes exactly what was stored under the new key, so no
        change is lost that others make meanwhile; and if they end the session, it ends under both keys.

        :raises SessionMoved: whether the last step was done is unknown, and there is no asking.
        """
        former = self._key
        deadline = time.monotonic() + CONTENTION_DEADLINE
        stored: bytes | None = None
        doubt: OutcomeUnknown | None = None
        # Whoever has ended the session since it was loaded must not be overtaken.
        current = self._store.get(former)
        while doubt is None or current is not None:
            try:
                new = function(current)
            except (Conflict, _Ended):
                if stored is not None:
                    self._store.modify(target, functools.partial(self._unless_revoked, target, None), known=stored)
                raise
            stored = self._store.modify(
                target,
                functools.partial(self._unless_revoked, target, new),
                known=stored,
                expires_at=documents.expires_at,
            )
            if stored != new:
                raise _Ended  # there is a mark
            doubt = None
            try:
                if self._store.compare_and_swap(former, current, None):
                    break
            except OutcomeUnknown as error:
                doubt = error
            try:
                current = self._store.get(former)
            except StoreUnavailable as error:
                if doubt is None:
                    raise
                self._key, self._renewed, self._stored = target, None, stored
                raise SessionMoved(str(error)) from error
            if time.monotonic() >= deadline:
                raise doubt or ContentionError("others changed the session for as long as we tried to give it a new id")
        return stored

    def _unless_revoked(self, key: bytes, new: bytes | None, there: bytes | None) -> bytes | None:
        """``new``, but for a mark that somebody has put under ``key``: it says more than absence does."""
        try:
            revoked = there is not None and REVOKED in self._codec.decode(there, key)
        except DocumentDamagedError:
            revoked = False
        return there if revoked else new

    def _encode(self, document: Document, form: Form | None, key: bytes) -> bytes:
        if form is not None:
            document = {**document, SERIALIZER: form}
        return self._codec.encode(document, key, "session")

    def _open(self, data: bytes | None, *, though_expired: bool = False) -> Document | None:
        """The document in the record; None if there is none, or it has expired.

        :param though_expired: to a request that has run longer than the session had to live, it is still its own, for
            a while: the index lists it so long.
        """
        now = time.time()
        if data is None or not though_expired:
            document = self._codec.current(data, self._key)
            return None if document is None or end_of(document, self._settings.max_lifetime) <= now else document
        document = self._codec.decode(data, self._key)
        return None if documents.is_expired(document, now - GRACE / 2) else document

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


def end_of(document: Document, max_lifetime: float | None) -> float:
    """When a session ends however much it is used, in epoch seconds; infinity: never."""
    created = document.get(CREATED)
    if max_lifetime is None or not documents.is_number(created):
        return math.inf
    return created + max_lifetime
