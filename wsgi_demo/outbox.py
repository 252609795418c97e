"""The outbox: a mail server that delivers nothing. It keeps each mail in a Maildir, for the web page to show.

It plays the rest of the world, so that the demo needs no mail server and nothing leaves the machine. It must not know
the list.
"""

from __future__ import annotations

import email
import logging
import mailbox
import os
import signal
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any

from aiosmtpd.controller import Controller

from wsgi_demo.plaintext import plain_text
from wsgi_demo.settings import Endpoint, from_command_line

__all__ = ["KeptMail", "Outbox", "serve"]

log = logging.getLogger(__name__)

#: The oldest mails above this number are thrown away.
MOST_MAILS = 200
#: The largest mail, in bytes.
LARGEST_MAIL = 1024 * 1024


@dataclass(frozen=True)
class KeptMail:
    """One mail, as one recipient got it."""

    #: Its name in the outbox.
    key: str
    recipient: str
    message: EmailMessage

    @property
    def text(self) -> str:
        """What it says."""
        return plain_text(self.message) or ""

    @property
    def subject(self) -> str:
        """What it is about."""
        return self.message["Subject"] or "(no subject)"


class Outbox:
    """The mails that were sent, in a Maildir; one copy for each recipient."""

    def __init__(self, path: str) -> None:
        self.path = path
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._maildir = mailbox.Maildir(path, factory=None)
        self._new = Path(path, "new")

    def keep(self, recipient: str, content: bytes) -> None:
        """Keep one recipient's copy of a mail."""
        self._maildir.add(b"Delivered-To: " + recipient.encode() + b"\r\n" + content)
        for path in self._newest_first()[MOST_MAILS:]:
            path.unlink(missing_ok=True)

    def mails(self, recipient: str | None = None, limit: int = MOST_MAILS) -> list[KeptMail]:
        """The mails to ``recipient``, or to everybody, newest first."""
        kept = (self._read(path) for path in self._newest_first())
        wanted = (mail for mail in kept if mail is not None and recipient in (None, mail.recipient))
        return [mail for mail, _ in zip(wanted, range(limit), strict=False)]

    def mail(self, key: str) -> KeptMail | None:
        """The mail of that name."""
        return next((self._read(path) for path in self._newest_first() if path.name == key), None)

    def clear(self) -> None:
        """Throw all mails away."""
        for path in self._newest_first():
            path.unlink(missing_ok=True)

    def _newest_first(self) -> list[Path]:
        # Names tell the order only by the second, times of files by the nanosecond.
        return sorted(self._new.iterdir(), key=_age)

    def _read(self, path: Path) -> KeptMail | None:
        try:
            message = email.message_from_bytes(path.read_bytes(), _class=EmailMessage, policy=default)
        except FileNotFoundError:
            # Thrown away just now.
            return None
        return KeptMail(path.name, str(message["Delivered-To"]), message)


def _age(path: Path) -> int:
    try:
        return -path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


class _Keeper:
    """What aiosmtpd calls when a mail has come."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox

    async def handle_DATA(self, server: Any, session: Any, envelope: Any) -> str:  # noqa: N802 - aiosmtpd's name
        for recipient in envelope.rcpt_tos:
            self._outbox.keep(recipient, envelope.content)
        log.info("kept a mail to %s", ", ".join(envelope.rcpt_tos))
        return "250 Kept"


def serve(outbox: Outbox, endpoint: Endpoint) -> Controller:
    """Start receiving mail in a thread; the caller stops it."""
    controller = Controller(
        _Keeper(outbox),
        hostname=endpoint.host,
        port=endpoint.port,
        server_hostname="localhost",
        data_size_limit=LARGEST_MAIL,
        ready_timeout=10,
    )
    controller.start()
    return controller


def main() -> None:
    """Receive mail until the process is ended."""
    settings = from_command_line(__doc__)
    logging.getLogger("mail.log").setLevel(logging.WARNING)  # aiosmtpd's, which tells every step of every connection
    os.umask(0o077)
    serve(Outbox(settings.outbox), settings.relay)
    log.info("the outbox listens on %s and keeps mails in %s", settings.relay, settings.outbox)
    signal.pause()


if __name__ == "__main__":
    main()
