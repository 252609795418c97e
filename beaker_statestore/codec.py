"""Documents <-> the bytes of their records, by one application's settings. It must not know where records are.

What stands between a document and its bytes at rest (the strict JSON of `documents`, and the encryption of `sealing`)
is here, below the merge and everything else that works on documents.

A sealed document is at rest a JSON object, too: its text, encrypted, as `documents.SEALED`, and, for sweepers and
engines, its `documents.EXPIRES` in the clear. Nobody vouches for that copy, so it can only end a record's life: whoever
can change it can delete the record as well. Above that, the one inside counts.
"""

from __future__ import annotations

import functools
import sys
import time

from beaker_statestore import documents
from beaker_statestore.documents import EXPIRES, SEALED, Document
from beaker_statestore.exceptions import DocumentDamagedError, DocumentRefusedError
from beaker_statestore.keys import shortened
from beaker_statestore.sealing import Sealer, StoreKeyError
from beaker_statestore.settings import PLAINTEXT, Settings

__all__ = ["DocumentCodec"]


class DocumentCodec:
    """The one way from documents to records and back for all who share these settings. Safe for threads.

    :raises MissingDriverError: there is a ``store_key``, and the package for it is not installed.
    """

    def __init__(self, settings: Settings) -> None:
        self._max_value = settings.max_value
        keys = settings.store_key
        secrets = [key for key in keys if key != PLAINTEXT]
        self._sealer = Sealer(secrets) if secrets else None
        self._seals = bool(secrets) and keys[0] != PLAINTEXT
        self._reads_plain = not secrets or PLAINTEXT in keys

    @classmethod
    def of(cls, settings: Settings) -> DocumentCodec:
        """The codec for ``settings``; one instance each."""
        return _codec(settings)

    def encode(self, document: Document, record: bytes, root: str) -> bytes:
        """``document`` as it is stored under the record key ``record``; sealed, it is another each time.

        :param root: what messages call it, for example ``session``.
        :raises DocumentRefusedError: there is something in it that JSON cannot hold, or it is too large.
        """
        if SEALED in document:
            raise DocumentRefusedError(f"{root}[{SEALED!r}] is a name that the store uses itself; give it another one")
        return self._stored(documents.encode(document, root=root, max_bytes=self._max_value), document, record)

    def _stored(self, data: bytes, document: Document, record: bytes) -> bytes:
        if self._sealer is None or not self._seals:
            return data
        sealed: Document = {SEALED: self._sealer.seal(data, record)}
        if EXPIRES in document:
            sealed[EXPIRES] = document[EXPIRES]
        # The limit is the document's; encryption makes a third more of it.
        return documents.encode(sealed, max_bytes=sys.maxsize)

    def decode(self, data: bytes, record: bytes) -> Document:
        """The document that is stored as ``data`` under ``record``.

        :raises DocumentDamagedError: it is none of ours.
        :raises StoreKeyError: it is sealed and there is no key for it here, or it is not and should be.
        """
        return self._opened(documents.decode(data), record)

    def rewritten(self, data: bytes, record: bytes) -> bytes | None:
        """``data`` as `encode` would store it today: sealed with the first key, or in the clear; None if it is so.

        None, too, if it has expired. Its size is not looked at: it has been stored before.

        :raises DocumentDamagedError: it is none of ours.
        :raises StoreKeyError: there is no key for it here.
        """
        stored = documents.decode(data)
        text = stored.get(SEALED)
        if text is None and not self._seals:
            return None
        if type(text) is str and self._seals and self._sealer is not None and self._sealer.is_latest(text):
            return None
        if documents.is_expired(stored, time.time()):
            return None
        document = self._opened(stored, record)
        return self._stored(documents.encode(document, max_bytes=sys.maxsize), document, record)

    def current(self, data: bytes | None, record: bytes) -> Document | None:
        """The document that is stored as ``data`` under ``record``; None if there is none or its time has come.

        What has expired needs no key, so that a key can be given up once all that it sealed has.
        """
        if data is None:
            return None
        now = time.time()
        stored = documents.decode(data)
        if documents.is_expired(stored, now):
            return None
        document = self._opened(stored, record)
        return None if documents.is_expired(document, now) else document

    def _opened(self, stored: Document, record: bytes) -> Document:
        if SEALED not in stored:
            if not self._reads_plain:
                # Whoever can write to the store could otherwise make himself any session he likes.
                raise StoreKeyError(
                    f"{shortened(record)} is in the clear, and store_key asks for sealed records: to take over what "
                    f"was stored without a key, write the word {PLAINTEXT} behind the keys for a while"
                )
            return stored
        if self._sealer is None:
            raise StoreKeyError(
                f"{shortened(record)} is sealed: set store_key to the key that it was sealed with "
                "(beaker.session.store_key, or beaker.cache.store_key for a cache)"
            )
        text = stored[SEALED]
        if type(text) is not str or not stored.keys() <= {SEALED, EXPIRES}:
            raise DocumentDamagedError(f"the record has {SEALED!r}, but not as text with nothing besides {EXPIRES!r}")
        try:
            return documents.decode(self._sealer.open(text, record))
        except StoreKeyError as error:
            raise StoreKeyError(f"{shortened(record)}: {error}") from None


# Settings may hold a store, so not for ever. An application has two or three.
_codec = functools.lru_cache(maxsize=64)(DocumentCodec)
