"""One-time secrets that are mailed to an address, and how many mails an address may get.

A secret proves that whoever has it reads the mail of that address. The store holds its hash, so reading the store
lets nobody in. All of it is documents of the kind ``confirm``, shared by the web and the mail application.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import Any

from beaker_statestore.namespace import DocumentManager
from beaker_statestore.settings import session_options

__all__ = ["MailBudget", "Secrets"]

#: By whom a secret was used: a hash.
USED = "used"


class Secrets:
    """Secrets for one purpose; each good for one address, once, and for a limited time."""

    def __init__(self, settings: Mapping[str, Any], purpose: str, lifetime: float) -> None:
        """:param lifetime: in seconds."""
        self._documents = DocumentManager(purpose, kind="confirm", **session_options(settings))
        self._lifetime = lifetime

    def make(self, address: str) -> str:
        """A new secret for ``address``: 32 hexadecimal digits, which survive mail programs and letter case."""
        secret = secrets.token_hex(16)
        self.note(secret, address)
        return secret

    def note(self, secret: str, address: str) -> None:
        """Know that somebody else has made ``secret`` for ``address``."""
        self._documents[_hash(secret)] = {"address": address, "_expires": time.time() + self._lifetime}

    def address(self, secret: str, by: str | None = None) -> str | None:
        """The address that the secret was mailed to; None if it is unknown, too old, or used by another than ``by``."""
        document = self._documents.read(_hash(secret))
        mine = None if by is None else _hash_of_user(by)
        return None if document is None or document.get(USED, mine) != mine else str(document["address"])

    def take(self, secret: str, by: str) -> str | None:
        """As `address`, and from now on the secret is good for ``by`` alone, who may take it again.

        So of several who take it at once exactly one gets the address, and what an outage breaks off can be repeated.

        :param by: what only its owner knows, such as a session's token. Once that is forgotten, the secret is used up.
        """
        mine = _hash_of_user(by)
        document = self._documents.modify(_hash(secret), lambda document: document and {USED: mine, **document})
        return None if document is None or document[USED] != mine else str(document["address"])


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.lower().encode()).hexdigest()


def _hash_of_user(user: str) -> str:
    return hashlib.sha256(user.encode()).hexdigest()


class MailBudget:
    """How many mails of one sort an address gets in an hour, however often somebody asks for them."""

    HOUR = 3600.0

    def __init__(self, settings: Mapping[str, Any], sort: str, per_hour: int) -> None:
        self._documents = DocumentManager(f"mails-{sort}", kind="confirm", **session_options(settings))
        self._per_hour = per_hour

    def spend(self, address: str) -> bool:
        """Whether ``address`` may get one more mail now, which is then counted."""
        now = time.time()
        allowed = False

        def counted(document: Mapping[str, Any] | None) -> dict[str, Any]:
            nonlocal allowed
            sent = [t for t in (document or {}).get("sent", ()) if now - t < self.HOUR]
            allowed = len(sent) < self._per_hour
            return {"sent": [*sent, now] if allowed else sent, "_expires": now + self.HOUR}

        self._documents.modify(address, counted)
        return allowed

    def refund(self, address: str) -> None:
        """The mail that was counted last did not go out."""
        self._documents.modify(address, lambda document: document and {**document, "sent": document["sent"][:-1]})
