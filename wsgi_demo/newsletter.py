"""The list itself: who is in which state, and what moves people on. Mail and web both act through it.

A sender's state belongs to the mail router, which keeps it in `RouterStateStorage`; its names are those of the state
functions in `handlers`. Two people, two mails or a mail and a click may come at the same moment to different
processes, so every change of state here names the states that it starts from, and is done or not done: see `move`.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Collection, Iterator
from email.message import EmailMessage

from beaker_statestore.router import ERROR, START, RouterStateStorage
from wsgi_demo.letters import Letters
from wsgi_demo.onetime import MailBudget, Secrets
from wsgi_demo.relay import Relay
from wsgi_demo.settings import Settings

__all__ = ["CONFIRMING", "ERROR", "MEMBER", "NEWS", "START", "Confirmation", "Newsletter"]

#: The list's state key.
NEWS = "news"

CONFIRMING = "CONFIRMING"
MEMBER = "MEMBER"

MINUTE = 60.0
DAY = 24 * 60 * MINUTE


class Confirmation(enum.Enum):
    """What a confirmation did."""

    DONE = "made a member just now"
    ALREADY = "was a member already"
    EXPIRED = "the secret is unknown, used or too old"


class Newsletter:
    """One announcement list."""

    def __init__(self, settings: Settings, states: RouterStateStorage, relay: Relay) -> None:
        """:param states: where the mail router keeps its states."""
        self.states = states
        self.letters = Letters(settings)
        self._relay = relay
        self._confirmations = Secrets(settings.given, "join", 3 * DAY)
        self._sign_ins = Secrets(settings.given, "sign-in", 15 * MINUTE)
        self._answers = MailBudget(settings.given, "answers", per_hour=6)
        self._links = MailBudget(settings.given, "sign-in", per_hour=6)

    def state(self, address: str) -> str:
        """The state of ``address`` on this list."""
        return self.states_of(address)[NEWS]

    def states_of(self, address: str) -> dict[str, str]:
        """The states of ``address`` for every handler that knows it, and for this list in any case."""
        return {NEWS: START, **self.states.states_of(address)}

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

    def ask(self, address: str) -> None:
        """Mail a confirmation to ``address``, unless it has got too many of late."""
        self._mail(
            self._answers, address, lambda: self.letters.confirmation(address, self._confirmations.make(address))
        )

    def asked(self, secret: str) -> str | None:
        """Who is asked by the confirmation with this ``secret``; None if it is no longer good."""
        return self._confirmations.address(secret)

    def confirm(self, secret: str) -> tuple[Confirmation, str | None]:
        """Make the owner of ``secret`` a member; answers what came of it, and the address if the secret is known.

        Whatever an outage breaks off here can be tried again, and comes to the same end.
        """
        address = self._confirmations.address(secret)
        moved = address is not None and self.move(address, CONFIRMING, MEMBER)
        self._confirmations.use(secret)
        if moved:
            return Confirmation.DONE, address
        address = address or self._confirmations.user(secret)
        member = address is not None and self.state(address) == MEMBER
        return (Confirmation.ALREADY if member else Confirmation.EXPIRED), address

    def leave(self, address: str) -> bool:
        """End a membership, or a subscription that was not confirmed; False when there was neither."""
        return self.move(address, (MEMBER, CONFIRMING), START)

    def reset(self, address: str, key: str = NEWS) -> bool:
        """Forget an ERROR, so that ``address`` can start again; False when there was none."""
        return self.move(address, ERROR, START, key)

    def publish(self, author: str, subject: str, text: str) -> None:
        """Send a post to all members. Its author is among them, and so sees that it went out."""
        self._relay.deliver(self.letters.post(author, subject, text), self.members())

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

    def _mail(self, budget: MailBudget, address: str, write: Callable[[], EmailMessage]) -> None:
        if not budget.spend(address):
            return
        try:
            self._relay.deliver(write())
        except Exception:
            budget.refund(address)
            raise
