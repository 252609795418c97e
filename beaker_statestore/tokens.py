"""Login tokens: who has signed in, for how long, and ending it from elsewhere.

A token has a life of its own, which has nothing to do with that of any document. It is stored only as a hash.

Records of kind ``slate``, in two namespaces that no user's slate can have, as an underscore in front is escaped there:

    _auth     hash of a token -> ``{"user": ..., "proof": ..., "latest": <when it expires at the latest, if ever>}``
    _tokens   user -> ``{"<hash of a token>": <when it expires>, ...}``, the listing of his tokens

It must not know any framework or engine.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import re
import secrets
import time
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Final, NamedTuple, TypeGuard

from beaker_statestore import documents, keys, observe
from beaker_statestore.collection import Collection
from beaker_statestore.documents import EXPIRES, REVOKED, Document
from beaker_statestore.exceptions import DocumentDamagedError, StoreUnavailable, ValueTooLargeError
from beaker_statestore.settings import Settings

__all__ = ["LIFETIME", "Login", "Tokens", "check_seconds", "valid_name"]

log = logging.getLogger(__name__)

#: The longest name of a user or a document, in characters.
MAX_NAME: Final = 1000
#: How long a token is good, in seconds.
LIFETIME: Final = 14 * 86400.0
#: How much longer than its token a listing stands, and the mark in the place of a token that was revoked, in seconds:
#: far longer than any deadline of a request, and than clocks of hosts differ.
GRACE: Final = 3600.0
#: The most tokens that a user has at once; the next one ends that which would expire first.
MAX_TOKENS: Final = 1000
#: The size limit of our own documents, in bytes, whatever the application's is: a listing has 60 for each token.
LARGEST: Final = 64 * (MAX_TOKENS + 10)

#: 256 random bits, as secrets.token_urlsafe writes them.
TOKEN_BYTES: Final = 32
_TOKEN: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)
_LISTED: Final = re.compile(r"[0-9a-f]{32}", re.ASCII)


class Login(NamedTuple):
    """What a token stands for."""

    user: str
    #: In epoch seconds.
    expires_at: float
    #: Until when it can be renewed, in epoch seconds; infinite if for ever.
    latest: float = math.inf


class _Digest(NamedTuple):
    """The SHA-256 of a token, in halves. Of a token itself nothing is ever stored.

    A token has 256 random bits, so its hash needs neither salt nor secret. One half is the record's key. Stores compare
    keys in whatever time it takes, so the other half is compared here, in constant time.
    """

    key: str
    proof: str

    @classmethod
    def of(cls, token: str) -> _Digest:
        digest = hashlib.sha256(token.encode("ascii")).hexdigest()
        return cls(digest[:32], digest[32:])

    def login(self, document: Document | None) -> Login | None:
        """Whom the token's record says it belongs to; None: to nobody any more."""
        user, proof, expires_at = ((document or {}).get(name) for name in ("user", "proof", EXPIRES))
        if not (isinstance(user, str) and isinstance(proof, str) and documents.is_number(expires_at)):
            return None
        latest = (document or {}).get("latest")
        same = hmac.compare_digest(_bytes(proof), _bytes(self.proof))
        return (
            Login(keys.unescape(user), expires_at, latest if documents.is_number(latest) else math.inf)
            if same
            else None
        )


class Tokens:
    """Who has signed in: tokens, each good for one user and for a time. `Slates.auth` is one.

    A token's expiry has nothing to do with any document's, and is looked at when the token is checked, once: a request
    that takes longer than its token's life finishes as any other.

    Each user has a listing of his tokens' hashes. A token is listed before it is good, so that no good one is ever
    unlisted, whatever fails in between.
    """

    def __init__(self, settings: Settings) -> None:
        ours = replace(settings, max_value=LARGEST)
        self._logins = Collection(ours, "slate", "_auth")
        self._listings = Collection(ours, "slate", "_tokens")

    def issue(self, user: str, lifetime: float = LIFETIME, *, longest: float | None = None) -> str:
        """A new token for ``user``: 43 characters that are good in a cookie or a URL.

        If all tokens of the user are revoked at the same moment, it may be one of them.

        :param lifetime: how long it is good, in seconds.
        :param longest: for how long it can be renewed, in seconds from now; None: for ever.
        """
        valid_name(user, "a user")
        latest = {} if longest is None else {"latest": _token_end(longest)}
        expires_at = min(_token_end(lifetime), latest.get("latest", math.inf))
        token = secrets.token_urlsafe(TOKEN_BYTES)
        digest = _Digest.of(token)
        begun = time.monotonic()
        self._enlist(user, digest.key, expires_at)
        if time.monotonic() - begun > GRACE / 2:
            raise StoreUnavailable("the process stood still while a token was issued; nothing was issued, try again")
        login = {"user": keys.escape_field(user), "proof": digest.proof, **latest, EXPIRES: expires_at}
        self._logins.add(digest.key, login)
        observe.count("tokens.issued")
        return token

    def check(self, token: str | None) -> str | None:
        """The name of the user whose token it is; None if it is unknown, expired, revoked, or none of ours at all."""
        login = self.look_up(token)
        return None if login is None else login.user

    def look_up(self, token: str | None) -> Login | None:
        """The same as `check`, and until when the token is good. One round trip, none for what cannot be a token."""
        if not _is_token(token):
            return None
        digest = _Digest.of(token)
        return digest.login(self._read(digest.key))

    def renew(self, token: str | None, lifetime: float = LIFETIME) -> bool:
        """Have the token expire ``lifetime`` seconds from now, or when it has to; False if it is not good."""
        login = self.look_up(token)
        if token is None or login is None:
            return False
        digest = _Digest.of(token)
        expires_at = min(_token_end(lifetime), login.latest)
        self._enlist(login.user, digest.key, expires_at)
        renewed = False

        def later(current: Document | None) -> Document | None:
            nonlocal renewed
            renewed = digest.login(current) is not None
            return {**(current or {}), EXPIRES: expires_at} if renewed else current

        self._logins.modify(digest.key, later)
        return renewed

    def revoke(self, token: str | None) -> bool:
        """End the token; False if it was not good."""
        login = self.look_up(token)
        if token is None or login is None:
            return False
        digest = _Digest.of(token)
        ended = self._end(digest.key, login.user)
        self._unlist(login.user, {digest.key})
        return ended

    def revoke_all(self, user: str, *, keep: str | None = None) -> int:
        """Log the user out everywhere: end all of his tokens, and answer how many that were.

        A login that is half done comes to nothing: its token is listed, and will not become good.

        :param keep: a token that stays, such as that of whoever asks.
        """
        listed = _listed(self._listings.read(valid_name(user, "a user")))
        if _is_token(keep):
            listed.pop(_Digest.of(keep).key, None)
        ended = sum(self._end(key, user) for key in listed)
        if listed:
            self._unlist(user, listed.keys())
        observe.count("tokens.revoked", ended)
        return ended

    def _read(self, key: str) -> Document | None:
        try:
            return self._logins.read(key)
        except DocumentDamagedError as error:
            # As with a damaged session: whoever it belonged to has to sign in again, and the record stays as evidence.
            observe.count("documents.damaged")
            log.warning("a login token's record is damaged, so nobody is signed in by it: %s", error)
            return None

    def _end(self, key: str, user: str) -> bool:
        """Put a mark in the place of a token, whether it is there already or about to be; True if it was good."""
        lived = False

        def marked(current: Document | None) -> Document | None:
            nonlocal lived
            lived = current is not None and current.get("user") == keys.escape_field(user)
            if lived or current is None:
                return {REVOKED: secrets.token_hex(8), EXPIRES: time.time() + GRACE}
            return current

        try:
            self._logins.modify(key, marked)
        except DocumentDamagedError as error:
            log.warning("a login token's record is damaged, and no good as it is: %s", error)
        return lived

    def _enlist(self, user: str, key: str, expires_at: float) -> None:
        fetched = self._listings.fetch(user)
        others = {other: end for other, end in _listed(fetched.document).items() if other != key}
        first_to_expire = sorted(others, key=others.__getitem__)
        superfluous = set(first_to_expire[: max(0, len(others) + 1 - MAX_TOKENS)])
        for other in superfluous:
            self._end(other, user)

        def with_key(current: Document | None) -> Document | None:
            listed = _listed(current)
            # Never earlier than the token: it may be what another renewal has made of it meanwhile.
            return _listing({**listed, key: max(expires_at, listed.get(key, 0.0))}, superfluous)

        self._listings.modify(user, with_key, known=fetched.stored)

    def _unlist(self, user: str, ended: Set[str]) -> None:
        try:
            self._listings.modify(user, lambda current: _listing(_listed(current), ended))
        except DocumentDamagedError as error:
            # They have ended, and that is what was asked for.
            log.warning("the listing of a user's login tokens is damaged: %s", error)


def _listed(document: Document | None) -> dict[str, float]:
    """The tokens in a listing that may be good, each with its expiry. Others may have written it."""
    oldest = time.time() - GRACE
    return {
        key: end
        for key, end in (document or {}).items()
        if _LISTED.fullmatch(key) and documents.is_number(end) and end > oldest
    }


def _listing(members: Mapping[str, float], ended: Set[str]) -> Document | None:
    """The listing of ``members`` but those that have ``ended``; it stands a while longer than the last of them."""
    left = {key: end for key, end in members.items() if key not in ended}
    return {**left, EXPIRES: max(left.values()) + GRACE} if left else None


def _is_token(text: object) -> TypeGuard[str]:
    """Whether it looks like a token of ours; what comes from a cookie comes from anybody."""
    return isinstance(text, str) and _TOKEN.fullmatch(text) is not None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _token_end(lifetime: float) -> float:
    check_seconds(lifetime)
    return time.time() + lifetime


def valid_name(name: str, whose: str) -> str:
    """``name``, if it can be one.

    :raises TypeError: it is no str.
    :raises ValueTooLargeError: it is too long.
    """
    if not isinstance(name, str):
        raise TypeError(f"the name of {whose} is {documents.name_of(name)}; it has to be a str")
    if len(name) > MAX_NAME:
        raise ValueTooLargeError(
            f"the name of {whose} has {len(name):,} characters, above the limit of {MAX_NAME:,}; use a digest of it"
        )
    return name


def check_seconds(lifetime: float) -> None:
    """:raises ValueError: it is no length of time."""
    if not documents.is_number(lifetime) or not 0 < lifetime < math.inf:
        raise ValueError(f"lifetime = {lifetime!r}: give a number of seconds above 0, such as 3600")
