"""For developers at this machine only: the mails that made a handler raise, to read, to deliver again, to delete."""

from __future__ import annotations

import itertools

from webob import Response
from webob.exc import HTTPNotFound

from beaker_statestore.exceptions import StateStoreError, StoreUnavailable
from beaker_statestore.mailqueue import MailQueue, QueuedMail, smtp
from wsgi_demo.relay import TIMEOUT
from wsgi_demo.routes import Routes
from wsgi_demo.visit import Visit

__all__ = ["routes"]

routes = Routes()

#: How many mails the page shows.
SHOWN = 30
KEY = "(?P<key>[0-9a-f-]{1,64})"


@routes.get("/undeliverable")
def undeliverable(visit: Visit) -> Response:
    """The mails, newest first."""
    visit.require_local()
    events = visit.events()
    queue = _queue(visit)
    keys = queue.keys()
    found = (queue.read(key) for key in reversed(keys))
    mails = list(itertools.islice((mail for mail in found if mail is not None), SHOWN))
    return visit.page("undeliverable.html", events=events, mails=mails, count=len(keys))


@routes.get(f"/undeliverable/{KEY}")
def read(visit: Visit) -> Response:
    """One mail."""
    visit.require_local()
    return visit.page("undeliverable-mail.html", mail=_mail(visit), problem=None)


@routes.post(f"/undeliverable/{KEY}/deliver")
def deliver(visit: Visit) -> Response:
    """Hand it to the mail application once more, by SMTP; it is removed when that has taken it."""
    visit.require_local()
    mail = _mail(visit)
    server = visit.settings.smtp
    try:
        # A mail that Salmon could not even read has come without its envelope; whatever comes here is for the list.
        to = mail.recipients or [visit.newsletter.letters.list_address]
        _queue(visit).redeliver(mail.key, smtp(server.host, server.port, TIMEOUT), to)
    except StoreUnavailable:
        raise
    except (OSError, StateStoreError) as error:
        problem = f"The mail was not taken, and stays here: {error}"
        return visit.page("undeliverable-mail.html", status=502, mail=mail, problem=problem)
    visit.visitor.tell(f"The mail application took the mail from {mail.sender} once more.")
    return visit.redirect("/undeliverable")


@routes.post(f"/undeliverable/{KEY}/delete")
def delete(visit: Visit) -> Response:
    """Throw it away."""
    visit.require_local()
    _queue(visit).remove(visit.captures["key"])
    visit.visitor.tell("The mail is deleted.")
    return visit.redirect("/undeliverable")


def _queue(visit: Visit) -> MailQueue:
    return MailQueue.from_settings(visit.settings.given, visit.settings.undeliverable)


def _mail(visit: Visit) -> QueuedMail:
    mail = _queue(visit).read(visit.captures["key"])
    if mail is None:
        raise HTTPNotFound
    return mail
