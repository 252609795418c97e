"""Documents <-> the bytes of their records, by one application's settings. It must not know where records are.

What stands between a document and its bytes at rest (the strict JSON of `documents`, and later encryption) is here,
below the merge and everything else that works on documents.
"""

from __future__ import annotations

import functools
import time

from beaker_statestore import documents
from beaker_statestore.documents import Document
from beaker_statestore.settings import Settings

__all__ = ["DocumentCodec"]


class DocumentCodec:
    """The one way from documents to records and back for all who share these settings. Safe for threads."""

    def __init__(self, settings: Settings) -> None:
        self._max_value = settings.max_value

    @classmethod
    def of(cls, settings: Settings) -> DocumentCodec:
        """The codec for ``settings``; one instance each."""
        return _codec(settings)

    def encode(self, document: Document, record: bytes, root: str) -> bytes:
        """``document`` as it is stored under the record key ``record``.

        :param root: what messages call it, for example ``session``.
        :raises DocumentRefusedError: there is something in it that JSON cannot hold, or it is too large.
        """
        return documents.encode(document, root=root, max_bytes=self._max_value)

    def decode(self, data: bytes, record: bytes) -> Document:
        """The document that is stored as ``data`` under ``record``.

        :raises DocumentDamagedError: it is none of ours.
        """
        return documents.decode(data)

    def current(self, data: bytes | None, record: bytes) -> Document | None:
        """The document that is stored as ``data`` under ``record``; None if there is none or its time has come."""
        if data is None:
            return None
        document = self.decode(data, record)
        return None if documents.is_expired(document, time.time()) else document


_codec = functools.cache(DocumentCodec)
