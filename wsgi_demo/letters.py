"""Every mail that we send, word for word. Nothing is sent here.

All of them carry what keeps machines from answering machines (RFC 3834) and what lets mail programs show a list for
what it is (RFC 2369, RFC 2919).
"""

from __future__ import annotations

import textwrap
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from email.utils import format_datetime, localtime, make_msgid

from wsgi_demo.settings import Settings

__all__ = ["Letters"]

#: Any 7 bit relay will do.
POLICY = SMTP.clone(cte_type="7bit")
LONGEST_SUBJECT = 200


class Letters:
    """The writer of our mails; knows the list's addresses and the web application's links."""

    def __init__(self, settings: Settings) -> None:
        self._base_url = settings.base_url
        self._host = settings.host
        self.list_address = f"news@{settings.host}"
        self.leave_address = f"news-leave@{settings.host}"
        self.bounces_address = f"news-bounces@{settings.host}"

    def confirm_address(self, secret: str) -> str:
        """Whoever writes to it confirms."""
        return f"news-confirm-{secret}@{self._host}"

    def link(self, path: str) -> str:
        """The web address of one of our pages."""
        return self._base_url + path

    def confirmation(self, to: str, secret: str) -> EmailMessage:
        """Asks the owner of the address whether it was him who wrote."""
        return self._automatic(
            to,
            "Please confirm: do you want to join?",
            f"""\
            Somebody, hopefully you, wrote to {self.list_address} from your address
            {to}.

            To join the list, do one of these:

              * reply to this mail, whatever you write, or
              * open {self.link(f"/confirm/{secret}")}

            This is good for three days, or until you get a newer mail like it. The page
            behind the link shows what we got; it went to nobody, since only members'
            mails go out to the list.

            If it was not you, ignore this mail, and nothing will happen.
            """,
            reply_to=self.confirm_address(secret),
        )

    def welcome(self, to: str) -> EmailMessage:
        """Tells a new member what he can do."""
        return self._automatic(
            to,
            "You are a member",
            f"""\
            {to} is a member of {self.list_address} now.

            What you write to {self.list_address} goes out to all members.
            To leave, write to {self.leave_address}.
            To see where you stand, sign in at {self.link("/")}
            """,
        )

    def expired(self, to: str) -> EmailMessage:
        """Answers a confirmation whose secret is unknown, used, replaced or too old."""
        return self._automatic(
            to,
            "That confirmation is no longer good",
            f"""\
            You replied to a confirmation that has been used already, is too old, or was
            followed by a newer one, so it changed nothing.

            To join, write to {self.list_address} and reply to the mail that you get.
            To see where you stand, sign in at {self.link("/")}
            """,
        )

    def left(self, to: str) -> EmailMessage:
        """Says goodbye. Whoever was not the one who asked for it learns of it, too."""
        return self._automatic(
            to,
            "You have left the list",
            f"""\
            {to} is no longer a member of {self.list_address}, and gets no more mail
            from it.

            If that was a mistake, or it was not you, write to {self.list_address} to
            join again.
            """,
        )

    def not_a_member(self, to: str) -> EmailMessage:
        """Answers somebody who wants to leave without being in."""
        return self._automatic(
            to,
            "You are not a member",
            f"""\
            {to} is not a member of {self.list_address}, so there is nothing to leave.
            Perhaps you get the list's mail at another address: write from that one.
            """,
        )

    def in_error(self, to: str) -> EmailMessage:
        """Answers somebody who is in the state ERROR."""
        return self._automatic(
            to,
            "Something of ours broke",
            f"""\
            An earlier mail of yours made our program fail, so you are in the state
            ERROR and this mail did not go out.

            Sign in at {self.link("/")} to start again.
            """,
        )

    def no_text(self, to: str) -> EmailMessage:
        """Answers a post that has no plain text in it."""
        return self._automatic(
            to,
            "Your mail did not go out",
            f"""\
            Your mail to {self.list_address} has no plain text in it, and the list takes
            only that. Please send it again as plain text.
            """,
        )

    def sign_in(self, to: str, secret: str) -> EmailMessage:
        """Brings a one-time link."""
        return self._automatic(
            to,
            "Your link to sign in",
            f"""\
            Open this link to sign in:

            {self.link(f"/sign-in/{secret}")}

            It works once, within 15 minutes.

            If you did not ask for it, ignore this mail: nobody can sign in without it.
            """,
        )

    def post(self, author: str, subject: str, text: str) -> EmailMessage:
        """A member's mail, as it goes out to the members."""
        subject = _one_line(subject)
        if "[news]" not in subject:
            subject = f"[news] {subject}"
        # The author's own domain may forbid others to send in its name (DMARC), so the list sends in its own.
        message = self._message(f"{author} via news", self.list_address, subject, text)
        message["To"] = self.list_address
        message["Reply-To"] = author
        message["Precedence"] = "list"
        return message

    def _automatic(self, to: str, subject: str, text: str, reply_to: str | None = None) -> EmailMessage:
        message = self._message("news", reply_to or self.list_address, subject, textwrap.dedent(text))
        message["To"] = to
        if reply_to is not None:
            message["Reply-To"] = reply_to
        message["Precedence"] = "bulk"
        message["Auto-Submitted"] = "auto-replied"
        return message

    def _message(self, name: str, address: str, subject: str, text: str) -> EmailMessage:
        message = EmailMessage(policy=POLICY)
        message["From"] = Address(name, addr_spec=address)
        message["Subject"] = subject
        message["Date"] = format_datetime(localtime())
        message["Message-ID"] = make_msgid(domain=self._host)
        message["List-Id"] = f"<news.{self._host}>"
        message["List-Post"] = f"<mailto:{self.list_address}>"
        message["List-Unsubscribe"] = f"<mailto:{self.leave_address}>"
        message.set_content(text)
        return message


def _one_line(text: str) -> str:
    return " ".join(text.split())[:LONGEST_SUBJECT]
