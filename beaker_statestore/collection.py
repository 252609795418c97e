"""The documents of one kind in one namespace of any store; what is built of documents is built on this.

It must not know what the documents are about, nor any framework or engine.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Final, NamedTuple

from beaker_statestore import documents, keys, observe
from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import COMMIT, EXPIRES, Document
from beaker_statestore.exceptions import ContentionError, DocumentDamagedError, OutcomeUnknown
from beaker_statestore.keys import shortened
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import CONTENTION_DEADLINE, UNREAD, Unread

__all__ = ["Collection", "Fetched"]

log = logging.getLogger(__name__)

#: A document has the tokens of so many changes, the last ones that had to be told from others (`Collection.modify`).
COMMITS: Final = 16
#: How many random bytes one has. It need only differ from the others in the same document.
TOKEN_BYTES: Final = 6


class Fetched(NamedTuple):
    """What `Collection.fetch` found."""

    #: None: there is none, or its ``_expires`` has passed.
    document: Document | None
    #: The very bytes of the record, for `Collection.modify` to start from; None: there is none.
    stored: bytes | None


class Collection:
    """The documents of one kind in one namespace.

    :param settings: which store, and how documents are kept in it.
    :param kind: one of `keys.KINDS`, what the records are for.
    :param name: keeps documents of one kind apart; None where a kind has no such division.
    :raises ConfigurationError: these do not fit each other.

    Methods raise `StoreUnavailable` when the store fails, `DocumentRefusedError` for what JSON cannot hold, and
    `DocumentDamagedError` for a record that is not a document of ours. Instances hold no connection of their own and
    may be shared by threads.
    """

    def __init__(self, settings: Settings, kind: str, name: str | None) -> None:
        self.settings = settings
        self.store = open_store(settings.url, **settings.timing)
        self.codec = DocumentCodec.of(settings)
        self.records = keys.Namespace(settings.prefix, kind, name, settings.hash_ids)

    def read(self, key: str | None) -> Document | None:
        """The document under ``key``; None when there is none or its ``_expires`` has passed."""
        return self.fetch(key).document

    def fetch(self, key: str | None) -> Fetched:
        """The document under ``key`` together with the bytes that `modify` can start from."""
        record = self.records.record(key)
        stored = self.store.get(record)
        return Fetched(self.codec.current(stored, record), stored)

    def read_many(self, keys: Iterable[str | None]) -> dict[str | None, Document]:
        """The documents of those of ``keys`` that have one, all read together.

        One damaged record must not hide all others, so here it is logged and passed over.
        """
        wanted = {self.records.record(key): key for key in keys}
        found = {}
        for record, data in self.store.get_many(wanted).items():
            try:
                document = self.codec.current(data, record)
            except DocumentDamagedError as error:
                observe.count("documents.damaged")
                log.warning("passed over %s: %s", shortened(record), error)
                continue
            if document is not None:
                found[wanted[record]] = document
        return found

    def pages(self) -> Iterator[list[str | None]]:
        """The keys of all documents, page by page, as they are in the store; some may have expired.

        Each key that is there all the time comes at least once. Not for hot paths.
        """
        for page in self.store.pages(self.records.scan_prefix):
            yield [self.records.key(record) for record in page]

    def put(self, key: str | None, document: Document) -> None:
        """Store ``document`` under ``key``, whatever was there."""
        record = self.records.record(key)
        self.store.put(record, self.encode(key, document), document.get(EXPIRES))

    def add(self, key: str | None, document: Document) -> bool:
        """Store ``document`` if there is none under ``key``; False when there is. Expired is as good as absent.

        Of several that add at once, one gets True.
        """
        added = False

        def unless_there(current: Document | None) -> Document | None:
            nonlocal added
            added = current is None
            return document if added else current

        self.modify(key, unless_there, own=True)
        return added

    def modify(
        self,
        key: str | None,
        function: Callable[[Document | None], Document | None],
        *,
        known: bytes | Unread | None = UNREAD,
        own: bool = False,
    ) -> Document | None:
        """Replace the document under ``key`` by what ``function`` makes of it, atomically, and answer the new one.

        :param function: gets the current document (its own copy) or None, and returns the new one, or None or an
            empty one to remove it. It is called again when somebody else was quicker, so it must have no side
            effects.
        :param known: the record as `fetch` found it; saves a read if it still is so.
        :param own: the change must be told from the same one made by another, as counting must: the document gets a
            random token (`documents.COMMIT`). Then a change whose answer was lost is neither lost nor done twice,
            unless, before it could be read back, others have removed the document or changed it `COMMITS` times.
        """
        record = self.records.record(key)
        # What may have been stored instead of `base`, or may yet be, by its token.
        tried: dict[str, bytes] = {}
        base: bytes | None = None
        done: bytes | None = None

        def on_bytes(current: bytes | None) -> bytes | None:
            nonlocal base, done
            before = self.codec.current(current, record)
            commits = _commits(before)
            # It was done, and the answer lost; others have changed the document again since.
            done = next((tried[token] for token in commits if token in tried), None)
            if done is not None:
                return current
            if current != base:
                tried.clear()
                base = current
            after = function(before)
            if not after:
                return None
            if current is not None and before is not None and documents.same(after, self.codec.decode(current, record)):
                return current
            if not own:
                return self.encode(key, after)
            token = secrets.token_urlsafe(TOKEN_BYTES)
            tried[token] = self.encode(key, {**after, COMMIT: [token, *commits][:COMMITS]})
            return tried[token]

        stored = self.store.modify(record, on_bytes, known=known, expires_at=documents.expires_at)
        new = stored if done is None else done
        return None if new is None else self.codec.decode(new, record)

    def take(self, key: str | None, condition: Callable[[Document], bool] | None = None) -> Document | None:
        """Remove the document under ``key`` and answer it; of several that take it at once, one gets it.

        :param condition: leave it, and answer None, unless this is true of it.
        :raises OutcomeUnknown: it is gone, and whether this call removed it or another did, nobody knows.
        :raises ContentionError: others kept changing it for `CONTENTION_DEADLINE` seconds.
        """
        record = self.records.record(key)
        deadline = time.monotonic() + CONTENTION_DEADLINE
        while time.monotonic() < deadline:
            document, stored = self.fetch(key)
            if document is None or not (condition is None or condition(document)):
                return None
            try:
                if self.store.compare_and_swap(record, stored, None):
                    return document
            except OutcomeUnknown:
                if self.store.get(record) != stored:
                    raise
            observe.count("store.contention")
        raise ContentionError(f"others kept changing {shortened(record)} while we tried to take it")

    def delete(self, key: str | None) -> bool:
        """Remove the document under ``key``; False when there was none."""
        record = self.records.record(key)
        try:
            return self.store.delete(record)
        except OutcomeUnknown:
            # Absent now is what was asked for, whoever did it.
            if self.store.get(record) is not None:
                raise
            return True

    def delete_all(self) -> None:
        """Remove the documents of this namespace, and nothing else."""
        for page in self.store.pages(self.records.scan_prefix):
            self.store.delete_many(page)

    def encode(self, key: str | None, document: Document) -> bytes:
        """``document`` as it is stored under ``key``."""
        return self.codec.encode(document, self.records.record(key), f"{self.records.kind}[{key!r}]")


def _commits(document: Document | None) -> list[str]:
    """The tokens in a document, the newest first."""
    commits = (document or {}).get(COMMIT)
    return [token for token in commits if isinstance(token, str)] if isinstance(commits, list) else []
