"""The pages on which a member invites others: addresses, a look at them, and, perhaps days later, the sending.

What they work on is in the member's slate (`invitations`), so it is there in every browser in which he signs in, and
for as many windows as he likes at the same time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from webob import Response
from webob.exc import HTTPBadRequest, HTTPServiceUnavailable

from beaker_statestore.slates import Slate
from wsgi_demo.invitations import (
    MOST_ADDRESSES,
    BusyError,
    ChangedError,
    OvertakenError,
    Review,
    Round,
    TooMuchError,
)
from wsgi_demo.newsletter import MEMBER
from wsgi_demo.relay import RelayError
from wsgi_demo.routes import Routes
from wsgi_demo.visit import Visit

__all__ = ["routes"]

routes = Routes()

#: How many wrong addresses the page offers to correct, so that what it sends back stays small.
CORRECTED_AT_ONCE = 100


def members_only(view: Callable[[Visit, Slate], Response]) -> Callable[[Visit], Response]:
    """Let ``view`` answer members, and give it their slate; others are told what they lack."""

    @functools.wraps(view)
    def guarded(visit: Visit) -> Response:
        slate = visit.visitor.slate
        if slate is None or visit.newsletter.state(slate.name) != MEMBER:
            return visit.page("invite-members-only.html", status=403)
        return view(visit, slate)

    return guarded


@routes.get("/invite")
@members_only
def upload(visit: Visit, slate: Slate) -> Response:
    """A field for addresses; whoever comes back is told of what he has begun."""
    return _upload(visit, slate)


@routes.post("/invite")
@members_only
def add(visit: Visit, slate: Slate) -> Response:
    """Take the addresses, beside those that are there already."""
    given = visit.field("addresses")
    if not given:
        return _upload(visit, slate, status=400, problem="Please write at least one address.")
    try:
        visit.invitations.add(slate, given)
    except TooMuchError as error:
        return _upload(visit, slate, status=400, problem=str(error), given=given)
    return visit.redirect("/invite/review")


@routes.get("/invite/review")
@members_only
def review(visit: Visit, slate: Slate) -> Response:
    """The addresses, those with conflicts first."""
    return _review(visit, visit.invitations.look(slate))


@routes.post("/invite/review")
@members_only
def decide(visit: Visit, slate: Slate) -> Response:
    """Save the decisions."""
    try:
        shown = dict(word.split(":", 1) for word in visit.field("shown").split())
    except ValueError as error:
        raise HTTPBadRequest from error
    corrected = {id_: visit.field(f"address-{id_}").lower() for id_ in shown if f"corrected-{id_}" in visit.form}
    wanted = {id_: corrected.get(id_, f"keep-{id_}" in visit.form) for id_ in shown}
    try:
        visit.invitations.decide(slate, shown, wanted)
    except OvertakenError as error:
        notes = [*error.notes, "What the other window did stands, and is shown here. All else that you did is saved."]
        return _review(visit, visit.invitations.look(slate), 409, notes)
    if visit.field("then") == "later":
        visit.visitor.tell("Your invitation is kept. It is under “Invite”, in every browser in which you sign in.")
        return visit.redirect("/")
    return visit.redirect("/invite/confirm")


@routes.get("/invite/confirm")
@members_only
def show_confirm(visit: Visit, slate: Slate) -> Response:
    """Whom the mails will go to, and the button that sends them."""
    return _confirm(visit, visit.invitations.look(slate))


@routes.post("/invite/confirm")
@members_only
def confirm(visit: Visit, slate: Slate) -> Response:
    """Send the mails, or as many as a browser can wait for."""
    try:
        done = visit.invitations.send(slate, visit.field("fingerprint"))
    except ChangedError:
        note = "The list has changed since that page was made, perhaps in another window. So no mail was sent."
        return _review(visit, visit.invitations.look(slate), 409, [f"{note} Here is the list as it is now."])
    except BusyError:
        note = "Another window of yours is sending this invitation just now, so this one sent nothing."
        return _confirm(visit, visit.invitations.look(slate), 409, f"{note} Look again in a minute.")
    except RelayError as error:
        raise HTTPServiceUnavailable from error
    visit.visitor.tell(_told(done))
    return visit.redirect("/invite/confirm" if done.left else "/")


@routes.post("/invite/discard")
@members_only
def discard(visit: Visit, slate: Slate) -> Response:
    """Throw the list away."""
    thrown = visit.invitations.discard(slate)
    visit.visitor.tell("The invitation is thrown away." if thrown else "There was no invitation any more.")
    return visit.redirect("/")


def _upload(visit: Visit, slate: Slate, status: int = 200, problem: str | None = None, given: str = "") -> Response:
    values: dict[str, Any] = {"size": visit.invitations.size(slate), "most": MOST_ADDRESSES}
    return visit.page("invite.html", status, problem=problem, given=given, **values)


def _review(visit: Visit, review: Review, status: int = 200, notes: list[str] | None = None) -> Response:
    if not review.entries:
        return visit.page("invite-nothing.html", status=409 if notes else 404)
    wrong = [entry for entry in review.entries if entry.is_wrong]
    return visit.page(
        "invite-review.html",
        status,
        review=review,
        wrong=wrong[:CORRECTED_AT_ONCE],
        not_shown=len(wrong[CORRECTED_AT_ONCE:]),
        open=[entry for entry in review.conflicts if entry.is_open],
        closed=[entry for entry in review.conflicts if not entry.is_open and not entry.is_wrong],
        notes=notes or [],
    )


def _confirm(visit: Visit, review: Review, status: int = 200, note: str | None = None) -> Response:
    if not review.entries:
        return visit.page("invite-nothing.html", status=409 if note else 404)
    return visit.page("invite-confirm.html", status, review=review, note=note)


def _told(done: Round) -> str:
    told = f"{done.sent:,} {'mail has' if done.sent == 1 else 'mails have'} gone out."
    if done.refused:
        told += f" The mail server refused {done.refused:,}; they are in your list still."
    if done.unsent:
        told += f" {done.unsent:,} got none: they have had enough mail from us of late, or have joined meanwhile."
    return told
