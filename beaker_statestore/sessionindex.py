"""Which sessions a value such as a user's name has: one document for each value, with the sessions that may have it.

The index is a superset. A session is listed before its record says the value, and what a listed record really says is
looked up by whoever reads the index (`beaker_statestore.sessions`). So whatever goes wrong in between, no session with
the value is unlisted. A document of the index is ``{"<session>": <when listed>, ...}``.

It must not know Beaker's classes or engines.
"""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from beaker_statestore import documents, keys, observe
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import EXPIRES, RESERVED, Document
from beaker_statestore.exceptions import DocumentError, DocumentRefusedError, ValueTooLargeError
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import Store

__all__ = ["GRACE", "SessionIndex", "indexed_text"]

#: A listed session whose record does not say the value may be about to say it, for so many seconds. It is far longer
#: than any deadline of a request, and than clocks of hosts differ: the time of listing is the writer's.
GRACE: Final = 3600.0
#: A listing is renewed when a session's expiry gets into another one of these, in seconds: once a day of use, and
#: however settings change meanwhile.
PERIOD: Final = 86400.0
#: How many sessions of a value are looked up at most while another is listed, to drop the dead.
LOOKED_UP: Final = 100

_MEMBER: Final = re.compile(keys.SESSION_PART)


def indexed_text(field: str, value: object) -> str | None:
    """The value of a session's field ``field`` as the index spells it; None: nobody's session, which is not listed.

    :raises DocumentRefusedError: nobody could ask for such a value.
    """
    if value is None or value is False or value == "":
        return None
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise DocumentRefusedError(
        f"session[{field!r}] is a {type(value).__name__}; beaker.session.index finds sessions by it, so it "
        "has to be text or a whole number"
    )


class SessionIndex:
    """The index documents of one application. Safe for threads."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self._store = store
        self._codec = DocumentCodec.of(settings)
        self._prefix = settings.prefix
        self._sessions = keys.kind_prefix(settings.prefix, "session")
        #: The fields by which sessions are found.
        self.fields = settings.index

    def record(self, field: str, text: str) -> bytes:
        """The record key of the document that lists the sessions whose ``field`` is ``text``."""
        return keys.Namespace(self._prefix, "index", field).record(text)

    def session_record(self, member: str) -> bytes:
        """The record key of a listed session."""
        return self._sessions + member.encode("ascii")

    def members(self, field: str, text: str) -> dict[str, float]:
        """The sessions that may have ``text`` in ``field``, each with the time of its listing in epoch seconds."""
        record = self.record(field, text)
        return dict(_members(self._codec.current(self._store.get(record), record) or {}))

    def enlist(self, session_record: bytes, before: Document | None, after: Document) -> bool:
        """Make sure that the session is listed under all that ``after`` says, before it is stored.

        :param before: what the store is known to hold of the session; None: nothing.
        :return: whether anything had to be written.
        :raises DocumentRefusedError: a value cannot be in the index.
        :raises StoreUnavailable: the store failed; the session must not be stored then.
        """
        texts = {field: indexed_text(field, after.get(field)) for field in self.fields}
        if before is not None and _period(before) == _period(after):
            texts = {f: text for f, text in texts.items() if not documents.same(before.get(f), after.get(f))}
        member = session_record[len(self._sessions) :].decode("ascii")
        for field, text in texts.items():
            if text is not None:
                self._add(field, text, member, _period(after))
        return any(text is not None for text in texts.values())

    def _add(self, field: str, text: str, member: str, period: int | None) -> None:
        record = self.record(field, text)
        seen = self._store.get(record)
        listed = dict(_members(self._codec.current(seen, record) or {}))
        try:
            self._write(record, seen, self._dead(field, text, listed, LOOKED_UP), member, period)
        except ValueTooLargeError:
            try:
                self._write(record, seen, self._dead(field, text, listed, len(listed)), member, period)
            except ValueTooLargeError:
                # The original names the largest fields, which are ids.
                raise ValueTooLargeError(
                    f"{len(listed):,} sessions have {text[:40]!r} in {field!r}, more than the index can hold: do not "
                    f"give so many the same value, leave {field} out of beaker.session.index, or raise max_value"
                ) from None

    def _write(
        self, record: bytes, seen: bytes | None, dead: Mapping[str, float], member: str, period: int | None
    ) -> None:
        def added(current: bytes | None) -> bytes:
            document = self._codec.current(current, record) or {}
            # It never expires while one of its sessions has no expiry, and otherwise outlives the last of them.
            forever = period is None or (bool(document) and EXPIRES not in document)
            kept = {m: since for m, since in _members(document) if dead.get(m) != since}
            until = {} if forever or period is None else {EXPIRES: max(document.get(EXPIRES, 0), (period + 2) * PERIOD)}
            return self._codec.encode({**kept, member: time.time(), **until}, record, "index")

        self._store.modify(record, added, known=seen, expires_at=documents.expires_at)
        observe.count("index.listed")

    def _dead(self, field: str, text: str, members: Mapping[str, float], most: int) -> dict[str, float]:
        """Those of ``members`` that were listed longer than `GRACE` ago and have been without the value as long.

        :param most: how many to look up; others have their turn at another time.
        """
        oldest = time.time() - GRACE
        old = [member for member, since in members.items() if since < oldest]
        if len(old) > most:
            old = random.sample(old, most)
        found = self._store.get_many(map(self.session_record, old)) if old else {}
        return {m: members[m] for m in old if self._is_dead(found.get(self.session_record(m)), m, field, text, oldest)}

    def _is_dead(self, data: bytes | None, member: str, field: str, text: str, oldest: float) -> bool:
        try:
            expiry = None if data is None else documents.expires_at(data)
            # A request under way may bring back what has expired, but not what has expired long ago.
            if data is None or (expiry is not None and expiry < oldest):
                return True
            return indexed_text(field, self._codec.decode(data, self.session_record(member)).get(field)) != text
        except DocumentError:
            return True


def _members(document: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for member, since in document.items():
        # Others may have written it: nothing but a session's name may become a record key.
        if member not in RESERVED and _MEMBER.fullmatch(member):
            yield member, since if documents.is_number(since) else 0.0


def _period(document: Document) -> int | None:
    expiry = document.get(EXPIRES)
    return None if expiry is None else int(expiry // PERIOD)
