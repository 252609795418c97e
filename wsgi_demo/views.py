"""The pages: one function for each thing a browser can ask for."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

from webob import Response
from webob.exc import HTTPForbidden, HTTPServiceUnavailable

from wsgi_demo import live, pages
from wsgi_demo.automatic import is_address
from wsgi_demo.live import TooManyStreamsError
from wsgi_demo.newsletter import NEWS, Confirmation
from wsgi_demo.relay import RelayError
from wsgi_demo.routes import Routes
from wsgi_demo.visit import Visit
from wsgi_demo.visitor import ADDRESS

__all__ = ["routes"]

routes = Routes()

SECRET = "[0-9a-fA-F]{32}"  # noqa: S105 - a pattern, no secret


@routes.get("/")
def home(visit: Visit) -> Response:
    """Who has signed in sees how he stands; everybody else, how to join and how to sign in."""
    address = visit.visitor.address
    if address is None:
        return visit.page("welcome.html", problem=None, given="")
    events = visit.events()
    return visit.page("states.html", events=events, states=visit.newsletter.states_of(address), news=NEWS)


@routes.post("/sign-in")
def ask_for_link(visit: Visit) -> Response:
    """Mail a link. The answer is the same for every address, so it tells nobody who is on the list."""
    given = visit.field("address").lower()
    if not is_address(given):
        problem = "That is not a mail address. Please write one like ann@example.com."
        return visit.page("welcome.html", status=400, problem=problem, given=given)
    try:
        visit.newsletter.mail_sign_in(given)
    except RelayError as error:
        raise HTTPServiceUnavailable from error
    return visit.redirect("/check-your-mail")


@routes.get("/check-your-mail")
def check_your_mail(visit: Visit) -> Response:
    """What comes after asking for a link."""
    return visit.page("check-your-mail.html")


@routes.get(f"/sign-in/(?P<secret>{SECRET})")
def show_sign_in(visit: Visit) -> Response:
    """Only a button: mail scanners open every link, and must not use it up."""
    address = visit.newsletter.can_sign_in(visit.captures["secret"], visit.visitor.token)
    return _stale_link(visit) if address is None else visit.page("sign-in.html", address=address)


@routes.post(f"/sign-in/(?P<secret>{SECRET})")
def sign_in(visit: Visit) -> Response:
    """Sign in. Until the browser has its new session, it can repeat this, and nobody else can."""
    address = visit.newsletter.sign_in(visit.captures["secret"], visit.visitor.make_token())
    if address is None:
        return _stale_link(visit)
    visit.visitor.sign_in(address)
    return visit.redirect("/")


@routes.get(f"/confirm/(?P<secret>{SECRET})")
def show_confirm(visit: Visit) -> Response:
    """Only a button, for the same reason."""
    question = visit.newsletter.asked(visit.captures["secret"])
    return _stale_link(visit) if question is None else visit.page("confirm.html", question=question)


@routes.post(f"/confirm/(?P<secret>{SECRET})")
def confirm(visit: Visit) -> Response:
    """Do what a reply to the confirmation does."""
    outcome, address = visit.newsletter.confirm(visit.captures["secret"])
    if outcome is Confirmation.EXPIRED:
        return _stale_link(visit)
    was = "already was" if outcome is Confirmation.ALREADY else "is now"
    visit.visitor.tell(f"{address} {was} a member of {visit.newsletter.letters.list_address}.")
    return visit.redirect("/")


@routes.post("/leave")
def leave(visit: Visit) -> Response:
    """Leave the list, or forget a subscription that was not confirmed."""
    left = visit.newsletter.leave(visit.require_address())
    visit.visitor.tell("You have left the list." if left else "You were not on the list any more.")
    return visit.redirect("/")


@routes.post("/reset")
def reset(visit: Visit) -> Response:
    """Start again after an ERROR."""
    done = visit.newsletter.reset(visit.require_address(), visit.field("key"))
    visit.visitor.tell("The error is forgotten; you can start again." if done else "There was no error any more.")
    return visit.redirect("/")


@routes.post("/sign-out")
def sign_out(visit: Visit) -> Response:
    """End the session."""
    visit.visitor.sign_out()
    return visit.redirect("/signed-out")


@routes.get("/signed-out")
def signed_out(visit: Visit) -> Response:
    """What comes after signing out."""
    return visit.page("signed-out.html")


@routes.get("/events")
def events(visit: Visit) -> Response:
    """What happens, as it happens, as far as it is this visitor's business; for static/live.js."""
    address, local = visit.visitor.address, visit.local
    if visit.live is None or not (address or local):
        raise HTTPForbidden
    known = visit.request.headers.get("Last-Event-ID") or visit.request.GET.get("after", "")
    after = int(known) if re.fullmatch("[0-9]{1,18}", known) else None
    try:
        stream = visit.live.stream(after, functools.partial(_public, address, local))
    except TooManyStreamsError as error:
        raise HTTPServiceUnavailable from error
    return Response(app_iter=stream, headers=list(live.HEADERS.items()))


def _public(address: str | None, local: bool, event: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What of an event the owner of ``address`` may know."""
    kind = event.get("event")
    if kind == "state" and address is not None and event.get("sender") == address:
        return {"event": kind, "key": event["key"], "state": event["state"]}
    if kind == "revoked" and address is not None and (event.get("by"), event.get("value")) == (ADDRESS, address):
        return {"event": kind}
    return {"event": kind} if local and kind in ("sent", "undeliverable") else None


@routes.get(r"/static/(?P<name>style\.css|live\.js)")
def static(visit: Visit) -> Response:
    """The few static files."""
    return pages.static(visit.captures["name"])


def _stale_link(visit: Visit) -> Response:
    return visit.page("stale-link.html", status=410)
