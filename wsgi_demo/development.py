"""For developers at this machine only: the outbox as a page, and a form in place of a mail program."""

from __future__ import annotations

from email.message import EmailMessage
from email.policy import SMTP
from email.utils import localtime, make_msgid, parseaddr

from webob import Response
from webob.exc import HTTPNotFound

from wsgi_demo.automatic import is_address
from wsgi_demo.outbox import KeptMail, Outbox
from wsgi_demo.relay import RelayError, submit
from wsgi_demo.routes import Routes
from wsgi_demo.visit import Visit

__all__ = ["routes"]

routes = Routes()

#: How many mails the page shows.
SHOWN = 30


@routes.get("/outbox")
def outbox(visit: Visit) -> Response:
    """All mails that were sent, newest first, and the form to send one."""
    visit.require_local()
    draft = {"sender": visit.visitor.address or "ann@example.com", "subject": "Hello", "text": "Hello, I am new here."}
    draft["recipient"] = visit.newsletter.letters.list_address
    events = visit.events()
    mails = Outbox(visit.settings.outbox).mails(limit=SHOWN)
    return visit.page("outbox.html", events=events, mails=mails, draft=draft, problem=None)


@routes.get("/outbox/(?P<key>[^/]+)")
def read(visit: Visit) -> Response:
    """One mail, and the form to reply to it."""
    visit.require_local()
    mail = Outbox(visit.settings.outbox).mail(visit.captures["key"])
    if mail is None:
        raise HTTPNotFound
    return visit.page("mail.html", mail=mail, draft=_reply(mail), problem=None)


@routes.post("/outbox")
def send(visit: Visit) -> Response:
    """Send what the form says to the mail application, as any mail program would: by SMTP."""
    visit.require_local()
    draft = {name: visit.field(name) for name in ("sender", "recipient", "subject", "text")}
    if not (is_address(draft["sender"]) and is_address(draft["recipient"])):
        return visit.page("send.html", status=400, draft=draft, problem="A mail needs one address from and one to.")
    message = EmailMessage(policy=SMTP.clone(cte_type="7bit"))
    message["From"] = draft["sender"]
    message["To"] = draft["recipient"]
    message["Subject"] = " ".join(draft["subject"].split())
    message["Date"] = localtime()
    message["Message-ID"] = make_msgid(domain="browser.invalid")
    message.set_content(draft["text"])
    try:
        submit(visit.settings.smtp, message, draft["sender"], [draft["recipient"]])
    except RelayError as error:
        return visit.page("send.html", status=502, draft=draft, problem=f"The mail was not taken: {error}")
    visit.visitor.tell(f"The mail application took your mail to {draft['recipient']}.")
    return visit.redirect("/outbox")


def _reply(mail: KeptMail) -> dict[str, str]:
    header = mail.message["Reply-To"] or mail.message["From"] or ""
    return {
        "sender": mail.recipient,
        "recipient": parseaddr(str(header))[1],
        "subject": mail.subject if mail.subject.lower().startswith("re:") else f"Re: {mail.subject}",
        "text": "Yes.",
    }
