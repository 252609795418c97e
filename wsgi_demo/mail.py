"""The mail application's process: Salmon receives SMTP, and the router's states are in the store.

What Lamson calls ``config/boot.py``: settings first, then the handlers, then the receiver.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from email.message import EmailMessage
from typing import Any

from salmon.routing import Router
from salmon.server import SMTPError, SMTPReceiver

from beaker_statestore import router, statistics
from beaker_statestore.mailqueue import MailQueue
from wsgi_demo import config
from wsgi_demo.letters import Letters
from wsgi_demo.newsletter import Newsletter
from wsgi_demo.relay import Relay, RelayError
from wsgi_demo.settings import Settings, from_command_line

__all__ = ["Receiver", "boot", "main"]

log = logging.getLogger(__name__)


class Receiver(SMTPReceiver):
    """Salmon's receiver, which accepts everything, with two answers of our own."""

    def process_message(self, Peer: Any, From: str, To: list[str], Data: bytes, **options: Any) -> str | None:  # noqa: N803
        """The SMTP answer to a mail; None for 250."""
        if not all(any(True for _ in Router.match(address)) for address in To):
            return "550 5.1.1 There is no such address here"
        if From in ("", "<>"):
            # A bounce: nobody to have a state, nobody to answer (RFC 5321, 4.5.5).
            log.info("ignored a bounce to %s", ", ".join(To))
            return None
        return super().process_message(Peer, From, To, Data, **options)  # type: ignore[no-any-return]


class DeferringRelay(Relay):
    """While the world takes no mail from us, we take none: the sending server keeps it and tries again."""

    def deliver(self, message: EmailMessage, to: Iterable[str] | None = None) -> None:
        """As in `Relay`, with SMTPError 451, which the router lets through, for an error."""
        try:
            super().deliver(message, to)
        except RelayError as error:
            raise SMTPError(451, f"4.4.1 Cannot pass mail on; try again later ({error})") from error


def boot(settings: Settings) -> None:
    """Configure Salmon's router: its states, its handlers, its queue for what went wrong."""
    states = router.install(Router, settings.given, on_outage="defer")
    Router.UNDELIVERABLE_QUEUE = MailQueue.from_settings(settings.given, settings.undeliverable)
    letters = Letters(settings)
    config.newsletter = Newsletter(settings, states, DeferringRelay(settings.relay, letters.bounces_address))
    config.development = settings.development
    Router.defaults(host=re.escape(settings.host))
    # Only now, since @route reads the defaults while the module is imported.
    Router.load(["wsgi_demo.handlers"])


def main() -> None:
    """Receive mail until the process is ended. What was not answered with 250 yet, the sender still has."""
    settings = from_command_line(__doc__)
    statistics.install()
    boot(settings)
    Receiver(settings.smtp.host, settings.smtp.port).start()
    log.info("the mail application listens on %s", settings.smtp)


if __name__ == "__main__":
    main()
