"""The list itself: who is in which state, and what moves people on. Mail and web both act through it.

A sender's state belongs to the mail router, which keeps it in `RouterStateStorage`; its names are those of the state
functions in `handlers`. Two people, two mails or a mail and a click may come at the same moment to different
processes, so every change of state here names the states that it starts from, and is done or not done: see `move`.
"""

from __future__ import annotations

import enum
import itertools
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from email.message import EmailMessage
from typing import Any

from beaker_statestore.confirmations import Confirmations, ConfirmationStorage
from beaker_statestore.exceptions import QueueFullError, ValueTooLargeError
from beaker_statestore.mailqueue import MailQueue, QueuedMail
from beaker_statestore.router import ERROR, START, RouterStateStorage
from wsgi_demo.letters import Letters
from wsgi_demo.onetime import MailBudget, Secrets
from wsgi_demo.relay import Relay
from wsgi_demo.settings import Settings

__all__ = ["CONFIRMING", "ERROR", "MEMBER", "NEWS", "START", "Confirmation", "Newsletter", "Question"]

log = logging.getLogger(__name__)

#: The list's state key.
NEWS = "news"

CONFIRMING = "CONFIRMING"
MEMBER = "MEMBER"

MINUTE = 60.0
DAY = 24 * 60 * MINUTE

#: What a confirmation confirms.
JOIN = "join"
#: How long there is to confirm, in seconds.
TIME_TO_CONFIRM = 3 * DAY
#: Until then the mail of whoever is asked is kept, if it is no larger (in bytes), and for so many people. Anybody can
#: send mails in anybody's name, so there is not much room for them.
LARGEST_KEPT = 64 * 1024
MOST_KEPT = 1000


class Confirmation(enum.Enum):
    """What a confirmation did."""

    DONE = "made a member just now"
    ALREADY = "was a member already"
    EXPIRED = "the secret is unknown, used, replaced or too old"


@dataclass(frozen=True)
class Question:
    """What somebody is asked who has not confirmed yet."""

    address: str
    #: The mail for which he is asked; None if there was none, or it could not be kept.
    mail: QueuedMail | None


class Newsletter:
    """One announcement list."""

    def __init__(self, settings: Settings, states: RouterStateStorage, relay: Relay) -> None:
        """:param states: where the mail router keeps its states."""
        self.states = states
        self.letters = Letters(settings)
        self._relay = relay
        self._confirmations = Confirmations(ConfirmationStorage.from_settings(settings.given, lifetime=TIME_TO_CONFIRM))
        self._addressees = Secrets(settings.given, JOIN, TIME_TO_CONFIRM)
        self._pending = MailQueue.from_settings(
            settings.given, "pending", limit=MOST_KEPT, largest=LARGEST_KEPT, lifetime=TIME_TO_CONFIRM, event=None
        )
        self._sign_ins = Secrets(settings.given, "sign-in", 15 * MINUTE)
        self._answers = MailBudget(settings.given, "answers", per_hour=6)
        self._links = MailBudget(settings.given, "sign-in", per_hour=6)

    def state(self, address: str) -> str:
        """The state of ``address`` on this list."""
        return self.states_of(address)[NEWS]

    def states_of(self, address: str) -> dict[str, str]:
        """The states of ``address`` for every handler that knows it, and for this list in any case."""
        return {NEWS: START, **self.states.states_of(address)}

    def states_among(self, addresses: Iterable[str]) -> dict[str, str]:
        """The states of many on this list, read together; those in START are left out."""
        found = self.states.documents.read_many(addresses)
        return {str(address): states[NEWS] for address, states in found.items() if NEWS in states}

    def move(self, address: str, before: str | Collection[str], after: str, key: str = NEWS) -> bool:
        """Change the state from ``before``, or any of several, to ``after``; False, and no change, when it was another.

        Of several that want the same at once, one gets True. Only when an answer of the store was lost can it be
        two, since what is then found done counts as one's own. So True may lead to what does no harm when it happens
        twice, such as the same letter once more, and to nothing else.
        """
        return self.states.move(key, address, before, after)

    def members(self) -> Iterator[str]:
        """The addresses of all members. Reads every state there is: a list of thousands would keep an index."""
        people = itertools.chain.from_iterable(self.states.pages())
        yield from dict.fromkeys(address for address, states in people if address and states.get(NEWS) == MEMBER)

    def invite(self, address: str) -> bool:
        """Ask ``address`` to join, which has not written itself; False if it may not be asked, or not so often."""
        asks = self.move(address, START, CONFIRMING) or self.state(address) == CONFIRMING
        return asks and self.ask(address)

    def ask(self, address: str, message: Any = None) -> bool:
        """Mail a confirmation to ``address``; False if that has got too many of late.

        It replaces an earlier one.

        :param message: the mail (a salmon.mail.MailRequest) because of which we ask. It is kept until he confirms.
        """
        return self._mail(
            self._answers, address, lambda: self.letters.confirmation(address, self._new_secret(address, message))
        )

    def asked(self, secret: str) -> Question | None:
        """What the confirmation with this ``secret`` asks, and whom; None if it is no longer good."""
        address = self._addressees.address(secret)
        claim = None if address is None else self._confirmations.look(JOIN, address, secret)
        if claim is None:
            return None
        return Question(claim.address, None if claim.pending is None else self._pending.read(claim.pending))

    def confirm(self, secret: str) -> tuple[Confirmation, str | None]:
        """Make the owner of ``secret`` a member; answers what came of it, and the address if the secret is known.

        Whatever an outage breaks off here can be tried again, by the same or another way, and comes to the same end:
        of several that confirm at once the one wins that changes the state, and the secret is used only after that.
        """
        address = self._addressees.address(secret)
        if address is None:
            return Confirmation.EXPIRED, None
        claim = self._confirmations.look(JOIN, address, secret)
        moved = claim is not None and self.move(address, CONFIRMING, MEMBER)
        if claim is not None:
            if claim.pending is not None:
                self._pending.remove(claim.pending)
            self._confirmations.claim(JOIN, address, secret)
        if moved:
            return Confirmation.DONE, address
        return (Confirmation.ALREADY if self.state(address) == MEMBER else Confirmation.EXPIRED), address

    def leave(self, address: str) -> bool:
        """End a membership, or a subscription that was not confirmed; False when there was neither."""
        return self.move(address, (MEMBER, CONFIRMING), START)

    def reset(self, address: str, key: str = NEWS) -> bool:
        """Forget an ERROR, so that ``address`` can start again; False when there was none."""
        return self.move(address, ERROR, START, key)

    def publish(self, author: str, subject: str, text: str) -> None:
        """Send a post to all members. Its author is among them, and so sees that it went out."""
        self._deliver(self.letters.post(author, subject, text), self.members())

    def answer(self, letter: EmailMessage) -> None:
        """Send a letter that answers a mail, unless its recipient has got too many of late."""
        self._mail(self._answers, letter["To"], lambda: letter)

    def mail_sign_in(self, address: str) -> None:
        """Mail a link to sign in, unless ``address`` has got too many of late."""
        self._mail(self._links, address, lambda: self.letters.sign_in(address, self._sign_ins.make(address)))

    def can_sign_in(self, secret: str, token: str | None) -> str | None:
        """Whom a link would sign in in the session with this ``token``; None if it is no longer good there."""
        return self._sign_ins.address(secret, token)

    def sign_in(self, secret: str, token: str) -> str | None:
        """Whom a link signs in; None if it is no longer good. From now on it is good in this session alone.

        Whoever gets the address has to end that session once he has signed in.
        """
        return self._sign_ins.take(secret, token)

    def _new_secret(self, address: str, message: Any) -> str:
        """A secret with which ``address`` can confirm, in place of an earlier one."""
        asked = self._confirmations.ask(JOIN, address, self._kept(message))
        self._addressees.note(asked.secret, address)
        if asked.replaced is not None:
            self._pending.remove(asked.replaced)
        return asked.secret

    def _kept(self, message: Any) -> str | None:
        """The key under which ``message`` is kept; None if it is not."""
        if message is None:
            return None
        try:
            return self._pending.push(message)
        except (QueueFullError, ValueTooLargeError) as error:
            log.info("a mail is not kept, and its sender is asked all the same: %s", error)
            return None

    def _mail(self, budget: MailBudget, address: str, write: Callable[[], EmailMessage]) -> bool:
        if not budget.spend(address):
            return False
        try:
            self._deliver(write())
        except Exception:
            budget.refund(address)
            raise
        return True

    def _deliver(self, message: EmailMessage, to: Iterable[str] | None = None) -> None:
        self._relay.deliver(message, to)
        if self.states.events is not None:
            self.states.events.publish("sent")
