"""Whose sessions there are, and ending them from elsewhere: "log out everywhere", "where am I signed in?".

With ``beaker.session.index = user`` in the INI file::

    sessions = Sessions.from_settings("development.ini")
    sessions.of("zed@example.com")
    sessions.revoke("zed@example.com", keep=session.id)

It must not know Beaker's classes or engines.
"""

from __future__ import annotations

import logging
import os
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from beaker_statestore import documents, keys, observe, tagged
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import ACCESSED, CREATED, EXPIRES, RESERVED, REVOKED, Document
from beaker_statestore.events import Events
from beaker_statestore.exceptions import ConfigurationError, ContentionError, DocumentError, StoreUnavailable
from beaker_statestore.keys import SESSION_KEY
from beaker_statestore.sealing import StoreKeyError
from beaker_statestore.sessionindex import GRACE, SessionIndex, indexed_text
from beaker_statestore.sessionrecord import end_of
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store

__all__ = ["Sessions", "StoredSession"]


log = logging.getLogger(__name__)

#: How often `Sessions.revoke` looks for sessions that have been listed meanwhile; people sign in slower than that.
ROUNDS: Final = 20


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as the store has it."""

    #: Its id as it may be shown: the beginning of it.
    shown_id: str
    #: When it was begun and last used, in epoch seconds; the latter may lag behind by ``touch_interval``.
    created: float | None
    accessed: float | None
    #: What the application keeps in it. Not part of the ``repr``, as there may be secrets in it.
    data: dict[str, Any] = field(repr=False)


class Sessions:
    """The sessions of an application, by the values of the top-level keys that ``beaker.session.index`` names.

    Sessions that were saved before that line was there are found once the value changes; those with a timeout also
    once they have been used on another day. Every method raises `StoreUnavailable` when the store fails. Safe for
    threads.
    """

    def __init__(self, settings: Settings) -> None:
        """:raises ConfigurationError: there is no ``index`` among the settings."""
        if not settings.index:
            raise ConfigurationError(
                "beaker.session.index is not set, so nobody knows whose sessions there are: name the key that holds "
                "the user's name, for example beaker.session.index = user"
            )
        self._settings = settings
        self._store = open_store(settings.url, **settings.timing)
        self._codec = DocumentCodec.of(settings)
        self._index = SessionIndex(self._store, settings)
        self._events = Events.of(settings)

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any] | str | os.PathLike[str], *, section: str | None = None
    ) -> Sessions:
        """By the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        return cls(Settings.of(settings, section))

    def of(self, value: str | int, *, by: str | None = None) -> list[StoredSession]:
        """The live sessions that have ``value``, the one last used first.

        One that has timed out is among them for the two minutes that Beaker adds to its timeout.

        :param by: one of the indexed keys; the first of them when left out.
        """
        by, text = self._asked(value, by)
        members = self._index.members(by, text)
        records = {self._index.session_record(member): member for member in members}
        found = []
        for record, data in self._store.get_many(records).items():
            try:
                document = self._codec.current(data, record)
                if (
                    document is not None
                    and indexed_text(by, document.get(by)) == text
                    and end_of(document, self._settings.max_lifetime) > time.time()
                ):
                    found.append(self._described(records[record], document))
            except DocumentError as error:
                log.warning("passed over %s: %s", keys.shortened(record), error)
        return sorted(found, key=lambda session: -(session.accessed or 0))

    def _described(self, member: str, document: Document) -> StoredSession:
        beakers = {ACCESSED, CREATED, "_domain", "_path"}
        data = {name: value for name, value in document.items() if name not in RESERVED | beakers}
        return StoredSession(
            shown_id=keys.shortened_ids(member),
            created=_number(document.get(CREATED)),
            accessed=_number(document.get(ACCESSED)),
            data=data if self._settings.types == "strict" else tagged.untag(data),
        )

    def revoke(self, value: str | int, *, keep: str | Collection[str] = (), by: str | None = None) -> int:
        """End all sessions that have ``value``, and answer how many that were.

        A request that is under way in one of them cannot bring it back. A login that is half done, so that the index
        lists its session already and the record says nobody yet, comes to nothing: what it saves is dropped, as after
        a logout. (Only a session that says another value at that moment is left alone; it stays listed.)

        :param keep: the id of a session that stays, such as that of whoever asks for it; of a `StateSession`, which
            may be about to get another id, ``session.ids``.
        :param by: one of the indexed keys; the first of them when left out.
        :raises StoreUnavailable: the store failed, and sessions may be left. If it is only that one of them is sealed
            with a key that is not here, or that others kept changing it, all others have been ended.
        """
        by, text = self._asked(value, by)
        kept = {self._record_of(session_id) for session_id in ([keep] if isinstance(keep, str) else keep)}
        oldest = time.time() - GRACE
        ended = 0
        failure: StoreUnavailable | None = None
        seen: set[str] = set()
        # A session that gets a new id meanwhile is listed under that one before the old record goes.
        for _ in range(ROUNDS):
            new = {m: listed for m, listed in self._index.members(by, text).items() if m not in seen}
            if not new:
                break
            seen.update(new)
            for member, listed in new.items():
                record = self._index.session_record(member)
                try:
                    ended += record not in kept and self._end(record, by, text, about_to=listed > oldest)
                except (ContentionError, StoreKeyError) as error:
                    failure = failure or error
        observe.count("sessions.revoked", ended)
        if self._events is not None and ended:
            self._events.publish("revoked", by=by, value=text, ended=ended)
        if failure is not None:
            raise failure
        return ended

    def _end(self, record: bytes, by: str, text: str, *, about_to: bool) -> bool:
        """Put a mark in the place of a session, for which every request under way will drop what it saves.

        :param about_to: whether also if the record does not say any value (yet).
        :return: whether the session was a live one with this value.
        """
        expiry = time.time() + GRACE
        mark = self._codec.encode({REVOKED: secrets.token_hex(8), EXPIRES: expiry}, record, "revocation")
        lived = False

        def marked(current: bytes | None) -> bytes | None:
            nonlocal lived
            try:
                document = self._codec.current(current, record)
                said = None if document is None else indexed_text(by, document.get(by))
            except DocumentError:
                lived = False
                return current  # damage is left for people to look at
            lived = said == text
            return mark if lived or (said is None and about_to) else current

        self._store.modify(record, marked, expires_at=documents.expires_at)
        return lived

    def _asked(self, value: str | int, by: str | None) -> tuple[str, str]:
        by = by or self._index.fields[0]
        if by not in self._index.fields:
            raise ConfigurationError(f"sessions are not found by {by!r}: add it to beaker.session.index")
        text = indexed_text(by, value)
        if text is None:
            raise ValueError(f"{value!r} is nobody's {by}")
        return by, text

    def _record_of(self, session_id: str) -> bytes:
        return keys.Namespace(self._settings.prefix, "session", session_id, self._settings.hash_ids).record(SESSION_KEY)


def _number(value: object) -> float | None:
    return value if documents.is_number(value) else None
