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
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from beaker_statestore import documents, keys, observe
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import ACCESSED, CREATED, EXPIRES, RESERVED, REVOKED, Document
from beaker_statestore.exceptions import ConfigurationError, DocumentError
from beaker_statestore.keys import SESSION_KEY
from beaker_statestore.sessionindex import GRACE, SessionIndex, indexed_text
from beaker_statestore.settings import Settings, read_ini, session_options
from beaker_statestore.stores import open_store

__all__ = ["Sessions", "StoredSession"]


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredSession:
    """A session as the store has it."""

    #: Its id as it may be shown: the beginning of it.
    shown_id: str
    #: When it was begun and last used, in epoch seconds; the latter may lag behind by ``touch_interval``.
    created: float | None
    accessed: float | None
    #: What the application keeps in it.
    data: Document


class Sessions:
    """The sessions of an application, by the values of the top-level keys that ``beaker.session.index`` names.

    Sessions that were saved before that line was there are found once they are a day older and used, or when the
    value changes. Every method raises `StoreUnavailable` when the store fails. Safe for threads.
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

    @classmethod
    def from_settings(
        cls, settings: Mapping[str, Any] | str | os.PathLike[str], *, section: str | None = None
    ) -> Sessions:
        """By the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        mapping = settings if isinstance(settings, Mapping) else read_ini(settings, section)
        return cls(Settings.from_options(session_options(mapping)))

    def of(self, value: str | int, *, field: str | None = None) -> list[StoredSession]:
        """The live sessions whose ``field`` is ``value``, the one last used first.

        :param field: one of the indexed keys; the first of them when left out.
        """
        field, text = self._asked(value, field)
        members = self._index.members(field, text)
        records = {self._index.session_record(member): member for member in members}
        found = []
        for record, data in self._store.get_many(records).items():
            try:
                if self._index.said(record, data, field) == text:
                    found.append(_stored_session(records[record], self._codec.decode(data, record)))
            except DocumentError as error:
                log.warning("passed over %s: %s", keys.shortened(record), error)
        return sorted(found, key=lambda session: -(session.accessed or 0))

    def revoke(self, value: str | int, *, keep: str | None = None, field: str | None = None) -> int:
        """End all sessions whose ``field`` is ``value``, and answer how many that were.

        A request that is under way in one of them cannot bring it back. A login that is half done, so that the index
        lists its session already and the record does not say it yet, comes to nothing: what it saves is dropped, as
        after a logout. (Only a session that says another value at that moment is left alone; it stays listed.)

        :param keep: the id of a session that stays, such as that of whoever asks for it.
        :param field: one of the indexed keys; the first of them when left out.
        """
        field, text = self._asked(value, field)
        kept = None if keep is None else self._record_of(keep)
        oldest = time.time() - GRACE
        ended = 0
        for member, listed in self._index.members(field, text).items():
            record = self._index.session_record(member)
            if record != kept:
                ended += self._end(record, field, text, about_to=listed > oldest)
        observe.count("sessions.revoked", ended)
        return ended

    def _end(self, record: bytes, field: str, text: str, *, about_to: bool) -> bool:
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
                said = self._index.said(record, current, field)
            except DocumentError:
                lived = False
                return current  # damage is left for people to look at
            lived = said == text
            return mark if lived or (said is None and about_to) else current

        self._store.modify(record, marked, expires_at=documents.expires_at)
        return lived

    def _asked(self, value: str | int, field: str | None) -> tuple[str, str]:
        field = field or self._index.fields[0]
        if field not in self._index.fields:
            raise ConfigurationError(f"sessions are not found by {field!r}: add it to beaker.session.index")
        text = indexed_text(field, value)
        if text is None:
            raise TypeError(f"None is nobody's {field}")
        return field, text

    def _record_of(self, session_id: str) -> bytes:
        return keys.Namespace(self._settings.prefix, "session", session_id, self._settings.hash_ids).record(SESSION_KEY)


def _stored_session(member: str, document: Document) -> StoredSession:
    beakers = {ACCESSED, CREATED, "_domain", "_path"}
    return StoredSession(
        shown_id=keys.shortened_ids(member),
        created=_time(document.get(CREATED)),
        accessed=_time(document.get(ACCESSED)),
        data={name: value for name, value in document.items() if name not in RESERVED | beakers},
    )


def _time(value: Any) -> float | None:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
