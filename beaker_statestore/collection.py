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
from beaker_statestore.stores.base import CONTENTION_DEADLINE, UNREAD, Unread, back_off

__all__ = ["Collection", "Fetched", "birth", "born"]

log = logging.getLogger(__name__)

#: A document has so many tokens: that of its birth, and those of the last changes (`Collection.modify`).
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
            random token (`documents.COMMIT`), by which a change whose answer was lost recognises itself. So it is
            never done twice. A document that ``function`` answers without the tokens it was given is a new one.
        :raises OutcomeUnknown: only if ``own``: the answer was lost, and others have changed the document so much
            since, or removed it, that nobody can tell whether the change was done.
        """
        record = self.records.record(key)

        def on_bytes(current: bytes | None) -> bytes | None:
            before = self.codec.current(current, record)
            after = function(before)
            if not after:
                return None
            if current is not None and before is not None and documents.same(after, self.codec.decode(current, record)):
                return current
            return self.encode(key, _changed(after) if own else after)

        if own:
            new, _ = self._change(record, on_bytes, known)
        else:
            new = self.store.modify(record, on_bytes, known=known, expires_at=documents.expires_at)
        return None if new is None else self.codec.decode(new, record)

    def take(self, key: str | None, condition: Callable[[Document], bool] | None = None) -> Document | None:
        """Remove the document under ``key`` and answer it; of several that take it at once, one gets it.

        :param condition: leave it, and answer None, unless this is true of it.
        :raises OutcomeUnknown: it is gone or changed, and whether this call removed it or another did, nobody knows.
        :raises ContentionError: others kept changing it for `CONTENTION_DEADLINE` seconds.
        """
        record = self.records.record(key)
        taken: Document | None = None

        def removed(current: bytes | None) -> bytes | None:
            nonlocal taken
            document = self.codec.current(current, record)
            taken = document if document is not None and (condition is None or condition(document)) else None
            return current if taken is None else None

        _, answered = self._change(record, removed, UNREAD)
        if not answered:
            raise _unknown(record)
        return taken

    def _change(
        self, record: bytes, change: Callable[[bytes | None], bytes | None], known: bytes | Unread | None
    ) -> tuple[bytes | None, bool]:
        """`Store.modify`, for a change that must neither be done twice nor be taken for somebody else's.

        A swap without an answer may have been carried out, or may yet be, as a stalled server is late. What the store
        has then must tell: the very record from before says that it can be tried again (that there is none does not:
        ours may have come and gone), a token of ours that it was done, and the newest token from before, without ours,
        that it was not and never will be.

        :return: what was stored, and False if that is nothing, and nobody knows who has removed the record.
        :raises OutcomeUnknown: there was no answer, and what the store has does not tell.
        """
        begun = time.monotonic()
        current, is_read = (self.store.get(record), True) if isinstance(known, Unread) else (known, False)
        # What was to be in the place of `base`, by swaps without an answer.
        unsure: list[bytes | None] = []
        tries = 0
        while True:
            try:
                new = change(current)
            except Exception as error:
                # It must not say that nothing was written.
                if unsure:
                    raise _unknown(record) from error
                raise
            if new != current:
                hint = documents.expires_at(new) if self.store.expires and new is not None else None
                try:
                    if self.store.compare_and_swap(record, current, new, hint):
                        return new, True
                    observe.count("store.contention")
                except OutcomeUnknown:
                    observe.count("store.outcome_unknown")
                    unsure.append(new)
                tries += 1
            elif is_read:
                return new, True
            base, current, is_read = current, self.store.get(record), True
            if unsure and (current is None or current != base):
                if current is None and None in unsure:
                    return None, False
                tokens = self._tokens_in(current, record)
                for ours in unsure:
                    if set(tokens).intersection(self._tokens_in(ours, record)[:1]):
                        return ours, True
                # Between the last two of a full list there may have been others, so also ours.
                if not set(tokens[: COMMITS - 1]).intersection(self._tokens_in(base, record)[:1]):
                    raise _unknown(record)
                unsure.clear()
            if time.monotonic() >= begun + CONTENTION_DEADLINE:
                if unsure:
                    raise _unknown(record)
                raise ContentionError(f"others kept changing {shortened(record)} while we tried to, {tries} times")
            back_off(tries, begun)

    def _tokens_in(self, stored: bytes | None, record: bytes) -> list[str]:
        return [] if stored is None else _tokens(self.codec.decode(stored, record))

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


def born(document: Document) -> Document:
    """``document`` as a new one, which can be told from others that were under its name before, or will be."""
    return {**document, COMMIT: [secrets.token_urlsafe(TOKEN_BYTES)]}


def birth(document: Document | None) -> str | None:
    """The token that a document has had from its beginning; None: it has none."""
    return next(reversed(_tokens(document)), None)


def _changed(document: Document) -> Document:
    """``document`` with one token more: the oldest, its `birth`, is never dropped."""
    before = _tokens(document)
    return {**document, COMMIT: [secrets.token_urlsafe(TOKEN_BYTES), *before[:-1][: COMMITS - 2], *before[-1:]]}


def _tokens(document: Document | None) -> list[str]:
    """The tokens in a document, the newest first."""
    tokens = (document or {}).get(COMMIT)
    return [token for token in tokens if isinstance(token, str)] if isinstance(tokens, list) else []


def _unknown(record: bytes) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the answer to a change of {shortened(record)} was lost, and what is there now does not tell whether it was "
        "done: look, and decide"
    )
