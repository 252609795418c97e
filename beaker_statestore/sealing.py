"""Authenticated encryption of one record's bytes. It must not know what they say.

Sealed text is the base64 of

    format (1 byte) | key identifier (8) | nonce (12) | AES-256-GCM ciphertext | tag (16)

Each record has a key of its own, derived from the secret and the record key by HKDF-SHA256. So the bytes of one record
do not open under another's key, and what AES-GCM can bear is counted for each record by itself: with random nonces of
96 bits, NIST SP 800-38D, 8.3 allows 2**32 messages to a key, which keeps the odds that a nonce comes twice below
2**-32 (section 8). A record that is written a hundred times a second gets there after 16 months.

RFC 5869 is the derivation; its section 3.2 is why the record key belongs into ``info``. H. Krawczyk, "Cryptographic
Extraction and Key Derivation: The HKDF Scheme" (CRYPTO 2010) proves that the keys are independent as long as the
secret is random enough. HKDF is slow for nobody, so a phrase that people remember is no such secret (RFC 5869, 4).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentDamagedError,
    MissingDriverError,
    StoreUnavailable,
)

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["Sealer", "StoreKeyError"]

FORMAT: Final = b"\x01"
IDENTIFIER_LENGTH: Final = 8
NONCE_LENGTH: Final = 12
TAG_LENGTH: Final = 16
HEADER_LENGTH: Final = len(FORMAT) + IDENTIFIER_LENGTH + NONCE_LENGTH

#: RFC 5869, 3.1: the same for all who derive; it keeps these keys apart from others made from the same secret.
SALT: Final = b"beaker_statestore sealing"
#: How ``info`` begins, for each of the two things that are derived from a secret.
FOR_IDENTIFIER: Final = b"identifier"
FOR_RECORD: Final = b"record "


class StoreKeyError(StoreUnavailable, ConfigurationError):
    """A record and this process's ``store_key`` do not go together; the record was left as it is.

    It is no damage: another process may have the key, and this one once it is configured like that. So it is
    answered as an outage is (503, SMTP 451), which costs nobody a session or a mail.
    """


class Sealer:
    """Seals with the first of ``secrets`` and opens with all. Safe for threads and forks.

    :raises MissingDriverError: the package ``cryptography`` is not installed.
    """

    def __init__(self, secrets: Sequence[str]) -> None:
        try:
            from cryptography.exceptions import InvalidTag
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise MissingDriverError(
                'store_key needs the package cryptography: pip install "beaker-statestore[encryption]"'
            ) from error
        self._aead, self._invalid, self._hkdf, self._hash = AESGCM, InvalidTag, HKDF, SHA256()
        encoded = [secret.encode() for secret in secrets]
        self._secrets = {self._derive(secret, FOR_IDENTIFIER, IDENTIFIER_LENGTH): secret for secret in encoded}
        self._identifier = next(iter(self._secrets))

    def seal(self, data: bytes, record: bytes) -> str:
        """``data`` as text that only opens under the record key ``record``; another text each time."""
        nonce = os.urandom(NONCE_LENGTH)
        header = FORMAT + self._identifier + nonce
        sealed = self._cipher(self._identifier, record).encrypt(nonce, data, header)
        return base64.b64encode(header + sealed).decode("ascii")

    def is_latest(self, text: str) -> bool:
        """Whether ``text`` was sealed with the first of the secrets."""
        # These are nine bytes, so whole groups of base64 characters.
        return text.startswith(base64.b64encode(FORMAT + self._identifier).decode("ascii"))

    def open(self, text: str, record: bytes) -> bytes:
        """The bytes that were sealed as ``text`` under ``record``.

        :raises StoreKeyError: they were sealed with a secret that is not here, or by a later release.
        :raises DocumentDamagedError: this is not what was sealed.
        """
        try:
            raw = base64.b64decode(text, validate=True)
        except ValueError:
            raw = b""
        # Unused bits of the last character would make another text of the same bytes (RFC 4648, 3.5).
        if len(raw) < HEADER_LENGTH + TAG_LENGTH or base64.b64encode(raw).decode("ascii") != text:
            raise DocumentDamagedError("the record's sealed text is cut short or is no base64")
        if not raw.startswith(FORMAT):
            raise StoreKeyError(
                f"the record is sealed in format {raw[0]}, and this release knows only format {FORMAT[0]}: "
                "upgrade beaker-statestore"
            )
        header = raw[:HEADER_LENGTH]
        identifier = header[len(FORMAT) : len(FORMAT) + IDENTIFIER_LENGTH]
        if identifier not in self._secrets:
            raise StoreKeyError(
                "the record is sealed with a key that is not among those of store_key: add it there, behind the first; "
                "if it is lost, only removing the record helps (statestore delete)"
            )
        try:
            return self._cipher(identifier, record).decrypt(header[-NONCE_LENGTH:], raw[HEADER_LENGTH:], header)
        except self._invalid:
            raise DocumentDamagedError(
                "the record's seal is broken: it was altered, or sealed as another record and moved here"
            ) from None

    def _cipher(self, identifier: bytes, record: bytes) -> AESGCM:
        return self._aead(self._derive(self._secrets[identifier], FOR_RECORD + record, 32))

    def _derive(self, secret: bytes, info: bytes, length: int) -> bytes:
        return self._hkdf(self._hash, length, SALT, info).derive(secret)
