"""What happens to a mail: the list's state functions, in the manner of Lamson, run by Salmon's router.

The router looks at the address a mail was sent to and at the state its sender is in, and calls the function that has
the name of that state. People travel START -> CONFIRMING -> MEMBER and, by leaving, back to START; a function that
raises puts them into ERROR.

A state function may return the one to go to, and the router then stores that, last of all. Ours change the state
themselves and return nothing: the confirmation that START mails can be answered, by mail or by a click, before START
has returned, and storing CONFIRMING then would undo it.
"""

# ruff: noqa: ARG001, N802 - Lamson's manner: the router fixes the parameters, and states are named in capitals

from __future__ import annotations

import email
import email.policy
from typing import Any

from salmon.routing import route, route_like, state_key_generator, stateless

from wsgi_demo.automatic import people_only
from wsgi_demo.config import development, newsletter
from wsgi_demo.newsletter import NEWS, Confirmation
from wsgi_demo.plaintext import plain_text

__all__ = ["CONFIRMING", "ERROR", "MEMBER", "START", "bounces", "confirm", "leave"]


@state_key_generator
def state_key(module: str, message: Any) -> str:
    """One list, one state key: every address of the list leads to the same states."""
    return NEWS


@route("news@(host)")
@people_only
def START(message: Any, host: str) -> None:
    """Somebody new writes: ask whether he wants to join."""
    if newsletter.move(message.From, START.__name__, CONFIRMING.__name__):
        newsletter.ask(message.From, message)


@route_like(START)
@people_only
def CONFIRMING(message: Any, host: str) -> None:
    """He writes again instead of confirming: perhaps the first confirmation was lost."""
    newsletter.ask(message.From, message)


@route_like(START)
@people_only
def MEMBER(message: Any, host: str) -> None:
    """A member's mail goes out to all members."""
    subject = message["Subject"] or "(no subject)"
    if development and subject.strip().lower() == "crash":
        raise RuntimeError("a mail with the subject 'crash' makes this handler raise, to show what happens then")
    text = plain_text(email.message_from_bytes(message.Data, policy=email.policy.default))
    if text is None:
        newsletter.answer(newsletter.letters.no_text(message.From))
    else:
        newsletter.publish(message.From, subject, text)


@route_like(START)
@people_only
def ERROR(message: Any, host: str) -> None:
    """Our fault, and only he can tell when to start again."""
    newsletter.answer(newsletter.letters.in_error(message.From))


@route("news-confirm-(secret)@(host)", secret="[0-9a-z]+")  # noqa: S106 - a pattern, no password
@stateless
@people_only
def confirm(message: Any, secret: str, host: str) -> None:
    """A reply to a confirmation. The secret says who is meant: mail may be read at one address, answered from another.

    People only: an absence note that answers the confirmation has not agreed to anything.
    """
    outcome, address = newsletter.confirm(secret)
    letters = newsletter.letters
    if address is None or outcome is Confirmation.EXPIRED:
        newsletter.answer(letters.expired(message.From))
    else:
        newsletter.answer(letters.welcome(address))


@route("news-leave@(host)")
@stateless
@people_only
def leave(message: Any, host: str) -> None:
    """Whoever wants to go can go, without being asked twice; one mail says so."""
    if newsletter.leave(message.From):
        newsletter.answer(newsletter.letters.left(message.From))
    else:
        newsletter.answer(newsletter.letters.not_a_member(message.From))


@route("news-bounces@(host)")
@stateless
def bounces(message: Any, host: str) -> None:
    """Mails that came back. A real list would count them and drop dead addresses; none is ever answered."""
