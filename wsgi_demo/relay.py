"""Hands mails over to the mail server that delivers them; in the demo that is the outbox."""

from __future__ import annotations

import itertools
import smtplib
from collections.abc import Iterable
from email.message import EmailMessage

from wsgi_demo.settings import Endpoint

__all__ = ["Relay", "RelayError", "submit"]

#: How long the other side may take for each step, in seconds.
TIMEOUT = 10.0
#: A server has to take this many recipients at once (RFC 5321, 4.5.3.1.8), not more.
MOST_RECIPIENTS = 100


class RelayError(Exception):
    """The mail server did not take the mail, or not for everybody; its words are the message."""

    @property
    def is_final(self) -> bool:
        """Whether it refused this mail for good (RFC 5321, 4.2.1), so that to try again is of no use."""
        return str(self).startswith("5")


class Relay:
    """The mail server for what we send."""

    def __init__(self, server: Endpoint, bounces: str) -> None:
        """:param bounces: the address to which the world returns what it cannot deliver."""
        self._server = server
        self._bounces = bounces

    def deliver(self, message: EmailMessage, to: Iterable[str] | None = None) -> None:
        """Send ``message`` to the addresses ``to``, by default to the one that it names.

        :raises RelayError: it was not taken. Some of many recipients may have got it.
        """
        recipients = iter([message["To"]] if to is None else to)
        while batch := list(itertools.islice(recipients, MOST_RECIPIENTS)):
            submit(self._server, message, self._bounces, batch)


def submit(server: Endpoint, message: EmailMessage, sender: str, recipients: list[str]) -> str:
    """Speak SMTP with ``server`` once, and answer what it said to the mail.

    :raises RelayError: it could not be reached, or refused the mail or a recipient.
    """
    try:
        with smtplib.SMTP(server.host, server.port, local_hostname="localhost", timeout=TIMEOUT) as smtp:
            refused = smtp.send_message(message, sender, recipients)
    except smtplib.SMTPResponseException as error:
        raise RelayError(_words(error.smtp_code, error.smtp_error)) from error
    except smtplib.SMTPRecipientsRefused as error:
        raise RelayError(_words(*next(iter(error.recipients.values())))) from error
    except (OSError, smtplib.SMTPException) as error:
        raise RelayError(f"no mail server at {server}: {error}") from error
    if refused:
        raise RelayError(_words(*next(iter(refused.values()))))
    return "250 OK"


def _words(code: int, text: bytes | str) -> str:
    return f"{code} {text.decode(errors='replace') if isinstance(text, bytes) else text}"
