"""Confirmations: somebody has asked for something, and whoever reads the mail of that address has to agree to it.

A secret is mailed to the address; whoever comes back with it, by a mail or by a click, to this process or another,
has agreed. Of several that come at once, one is told so.

`ConfirmationStorage` keeps them with the methods of salmon.confirm.ConfirmationStorage. `Confirmations` is what a web
application uses, and `engine` makes the same of it for Salmon's handlers. Salmon is imported only for the latter.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Final, NamedTuple

from beaker_statestore import observe
from beaker_statestore.collection import Collection
from beaker_statestore.documents import EXPIRES, Document
from beaker_statestore.exceptions import ConfigurationError, DocumentDamagedError
from beaker_statestore.mailqueue import MailQueue, check_lifetime
from beaker_statestore.queuedmail import canonical, is_automatic, taken_apart
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import Store

__all__ = ["LIFETIME", "Asked", "Claim", "ConfirmationStorage", "Confirmations", "canonical", "engine"]

log = logging.getLogger(__name__)

#: How long there is to confirm unless told otherwise, in seconds: three days.
LIFETIME: Final = 3 * 86400.0
#: Used by whom when it was called off; no other user has this name, since theirs are hashes.
CANCELLED: Final = "cancelled"


class Stored(NamedTuple):
    """What `ConfirmationStorage` knows of one target and address."""

    secret: str
    #: What was kept for it, such as the key of a mail in a queue.
    pending: str | None
    #: Who has used it; None: nobody yet.
    user: str | None


class ConfirmationStorage:
    """Which secret confirms what, with the methods of salmon.confirm.ConfirmationStorage.

    There is one confirmation for each target (what is confirmed: ``subscribe``) and address; a later one replaces the
    former. Both may be any text. Of a text that is one address, only that counts, as `canonical` has it.

    :param store: a Store, the URL of one, or `Settings`.
    :param lifetime: how long each is good, in seconds.
    :param name: keeps the confirmations of several applications apart, as ``prefix`` does.
    :param options: as for `Settings.from_options`.
    :raises ConfigurationError: an option is wrong.

    Safe for threads, and for processes that share the store. Every method raises `StoreUnavailable` when the store
    fails.
    """

    def __init__(
        self,
        store: Store | str | Settings,
        lifetime: float = LIFETIME,
        *,
        name: str = "confirmations",
        **options: Any,
    ) -> None:
        check_lifetime(lifetime)
        self.lifetime = lifetime
        self._documents = Collection(Settings.at(store, **options), "confirm", name)

    @classmethod
    def from_settings(
        cls,
        application: Mapping[str, Any] | str | os.PathLike[str],
        *,
        section: str | None = None,
        **options: Any,
    ) -> ConfirmationStorage:
        """A storage by the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :param options: ``lifetime`` and ``name``, as above.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        return cls(Settings.of(application, section), **options)

    def get(self, target: str, from_address: str | None) -> tuple[str, str | None] | tuple[None, None]:
        """The secret, as it was given to `store`, and the pending id; (None, None): there is none, or it was used."""
        stored = self.find(target, from_address)
        return (None, None) if stored is None or stored.user is not None else (stored.secret, stored.pending)

    def find(self, target: str, from_address: str | None) -> Stored | None:
        """As `get`, with who has used it."""
        document = self._documents.read(_key(target, from_address))
        return None if document is None else _stored(document)

    def store(
        self, target: str, from_address: str | None, expected_secret: str, pending_message_id: str | None
    ) -> Stored | None:
        """Keep the secret and the pending id until they are deleted, replaced, or `lifetime` is over.

        :return: what it has replaced; None: there was none.
        """
        new: Document = {
            "secret": expected_secret,
            "pending": pending_message_id,
            EXPIRES: time.time() + self.lifetime,
        }
        former: Stored | None = None

        def replaced(document: Document | None) -> Document:
            nonlocal former
            former = None if document is None else _stored(document)
            return new

        self._documents.modify(_key(target, from_address), replaced)
        return former

    def use(self, target: str, from_address: str | None, secret: str, user: str) -> Stored | None:
        """The confirmation with this secret, if this ``user`` is the one who uses it: the first, then and ever after.

        What is used stays, for `find` to tell by whom, until it expires or is replaced; `get` knows it no more.

        :param user: tells those apart who come with the same secret. Whoever could not be answered, as the store
            failed, comes again under the same name.
        :return: None: there is none, the secret is wrong, or somebody else has used it.
        """

        def used(document: Document | None) -> Document | None:
            right = document is not None and hmac.compare_digest(
                _stored(document).secret.encode("utf-8", "surrogatepass"), secret.encode("utf-8", "surrogatepass")
            )
            return {"user": user, **document} if document is not None and right else document

        document = self._documents.modify(_key(target, from_address), used)
        stored = None if document is None else _stored(document)
        if (
            stored is None
            or stored.user != user
            or not hmac.compare_digest(
                stored.secret.encode("utf-8", "surrogatepass"), secret.encode("utf-8", "surrogatepass")
            )
        ):
            return None
        return stored

    def delete(self, target: str, from_address: str | None) -> None:
        """Forget the confirmation; nothing happens if there is none."""
        self._documents.delete(_key(target, from_address))

    def clear(self) -> None:
        """Forget all confirmations of this storage, and nothing else. Meant for tests."""
        self._documents.delete_all()


@dataclass(frozen=True)
class Asked:
    """What `Confirmations.ask` has begun."""

    #: 32 hexadecimal digits, which survive mail programs and letter case.
    secret: str = field(repr=False)
    #: Where to mail it: the one address that was asked for.
    address: str
    #: What had been kept for the secret that is no longer good, to be thrown away.
    replaced: str | None


@dataclass(frozen=True)
class Claim:
    """What a secret stands for."""

    target: str
    #: The one that the secret was mailed to, as `canonical` has it.
    address: str
    #: What was given to `Confirmations.ask` to be kept for it.
    pending: str | None


class Confirmations:
    """Secrets to be mailed, of which only hashes are stored.

    :param storage: where they are.
    """

    def __init__(self, storage: ConfirmationStorage) -> None:
        self.storage = storage

    def ask(self, target: str, address: str | None, pending: str | None = None) -> Asked:
        """A new secret, to be mailed to the ``address`` in the answer, and to nobody else.

        Whatever secret there was for the same target and address is no longer good.

        :param pending: any text to keep for whoever comes with the secret, such as the key of a mail in a `MailQueue`.
        :raises ValueError: this is not exactly one address (`canonical`).
        """
        to = canonical(address)
        if to is None:
            raise ValueError(f"{address!r} is not one mail address")
        secret = secrets.token_hex(16)
        former = self.storage.store(target, to, _hash(secret), pending)
        return Asked(secret, to, None if former is None else former.pending)

    def look(self, target: str, address: str, secret: str, by: str | None = None) -> Claim | None:
        """What `claim` would answer now, without using the secret.

        For the page that a link leads to: programs that look at mails follow links, but press no buttons.
        """
        stored = self.storage.find(target, address)
        if stored is None or not hmac.compare_digest(
            stored.secret.encode("utf-8", "surrogatepass"), _hash(secret).encode()
        ):
            return None
        mine = stored.user is None or (by is not None and stored.user == _hash(by))
        return _claim(target, address, stored) if mine else None

    def claim(self, target: str, address: str, secret: str, by: str | None = None) -> Claim | None:
        """Use the secret; None: it is wrong, too old, or somebody else has used it. Of several at once, one gets it.

        :param by: what comes with one and the same request however often it is tried, and with no other, such as a
            form's hidden random value or a mail's Message-ID. Whoever has got the claim gets it again, so that what
            an outage breaks off, here or in what follows, can be tried again. Without it every call counts as another
            request: after `StoreUnavailable` the secret may be used up, and nobody have got it.
        """
        user = secrets.token_hex(16) if by is None else _hash(by)
        return self._use(target, address, secret, user)

    def cancel(self, target: str, address: str, secret: str) -> Claim | None:
        """Call off what was asked, as whoever gets a mail that he did not ask for may want; None: as for `claim`.

        Doing so twice is harmless. Of this and a `claim` at once, one gets it.
        """
        return self._use(target, address, secret, CANCELLED)

    def _use(self, target: str, address: str, secret: str, user: str) -> Claim | None:
        stored = self.storage.use(target, address, _hash(secret), user)
        if stored is None:
            return None
        observe.count("confirmations.cancelled" if user == CANCELLED else "confirmations.claimed")
        return _claim(target, address, stored)


def engine(storage: ConfirmationStorage, pending: MailQueue) -> Any:
    """A salmon.confirm.ConfirmationEngine over ``storage``, whose pending mails are in ``pending``.

    Salmon's own makes a Maildir for them. ``verify`` and ``cancel`` are as atomic as `Confirmations.claim`, and of
    secrets only hashes are stored; ``verify`` takes ``by`` as that does. A sender who asks again gets a new secret, and
    his former mail is removed.

    ``send`` mails the secret to ``message.From``, which is the address that it confirms. (Salmon's mails it to whomever
    the From header names: so anybody gets the secret of any address.) What a program has written, such as a bounce,
    and what has no sender, is not answered; then nothing is stored, and ``send`` answers False.

    ``verify`` answers the mail that waited. What was begun by `Confirmations.ask` has none, and is confirmed by
    ``claim``, which is that of `Confirmations`.

    :raises ConfigurationError: the mails would be gone before the secrets are.
    """
    if pending.lifetime is not None and pending.lifetime < storage.lifetime:
        raise ConfigurationError(
            f"the pending mails in {pending.name!r} stay for {pending.lifetime:g} s, and confirmations for "
            f"{storage.lifetime:g}: make MailQueue's lifetime at least as long"
        )
    return _engine_class()(storage, pending)


@cache
def _engine_class() -> Any:
    from salmon import view
    from salmon.confirm import ConfirmationEngine

    class StoreConfirmationEngine(ConfirmationEngine):
        def __init__(self, storage: ConfirmationStorage, pending: MailQueue) -> None:
            self.storage = storage
            self.pending = pending
            self.confirmations = Confirmations(storage)
            self.claim = self.confirmations.claim

        def send(self, relay: Any, target: str, message: Any, template: str, vars: dict[str, Any]) -> bool:  # noqa: A002
            address = canonical(message.From)
            if address is None or is_automatic(taken_apart(message)[0]):
                log.info("asked nobody to confirm %r: %r has no address, or is a program", target, message.From)
                return False
            vars.update(relay=relay, target=target, message=message, template=template, to_confirm=address)
            vars["confirm_address"] = self.register(target, message)
            question = view.respond(
                vars,
                template,
                # Each is a template itself, and an address may have percent signs.
                To="%(to_confirm)s",
                From="%(confirm_address)s@%(host)s",
                Subject="Confirmation required",
            )
            question["Reply-To"] = question["From"]
            relay.deliver(question)
            return True

        def register(self, target: str, message: Any) -> str:
            key = self.push_pending(message)
            asked = self.confirmations.ask(target, message.From, key)
            if asked.replaced is not None:
                self.delete_pending(asked.replaced)
            return f"{target}-confirm-{asked.secret}"

        def verify(self, target: str, from_address: str, expect_secret: str, by: str | None = None) -> Any:
            secret = expect_secret or ""
            claim = self.confirmations.look(target, from_address, secret, by)
            # Read first, so that an outage here leaves the secret as good as it was.
            message = None if claim is None or claim.pending is None else self.get_pending(claim.pending)
            if message is None or self.confirmations.claim(target, from_address, secret, by) is None:
                return None
            return message

        def cancel(self, target: str, from_address: str, expect_secret: str) -> None:
            claim = self.confirmations.cancel(target, from_address, expect_secret or "")
            if claim is not None and claim.pending is not None:
                self.delete_pending(claim.pending)

    return StoreConfirmationEngine


def _stored(document: Document) -> Stored:
    secret, pending, user = (document.get(name) for name in ("secret", "pending", "user"))
    if not isinstance(secret, str):
        raise DocumentDamagedError("a confirmation's record has no secret in it")
    return Stored(secret, pending, user)


def _claim(target: str, address: str, stored: Stored) -> Claim | None:
    one = canonical(address)
    return None if one is None else Claim(target, one, stored.pending)


def _key(target: str, address: str | None) -> str:
    """As no target has a slash in it, and no hash an at sign, different ones stay different."""
    one = canonical(address) or hashlib.sha256((address or "").encode("utf-8", "surrogatepass")).hexdigest()
    return f"{target.replace('%', '%25').replace('/', '%2F')}/{one}"


def _hash(secret: str) -> str:
    """A secret has 128 random bits, so its hash needs neither salt nor work."""
    return hashlib.sha256(secret.lower().encode("utf-8", "surrogatepass")).hexdigest()
