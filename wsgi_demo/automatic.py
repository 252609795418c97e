"""Tells mails of people from mails of machines: answering machines makes loops (RFC 3834, section 2)."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from email.utils import parseaddr
from typing import Any

__all__ = ["is_address", "is_automatic", "people_only"]

log = logging.getLogger(__name__)

#: Enough to keep nonsense out and header syntax apart; only a mail to an address can tell whether it exists.
ADDRESS = re.compile(r"[^\s@<>()\[\]\\,;:\"]{1,64}@[^\s@<>()\[\]\\,;:\"]{1,189}")
MACHINES = re.compile(r"(mailer-daemon|postmaster|no-?reply|owner-.*|.*-(owner|bounces?|request|errors))@")


def is_address(text: str) -> bool:
    """Whether ``text`` has the form of a mail address."""
    return ADDRESS.fullmatch(text) is not None


def is_automatic(message: Any) -> bool:
    """Whether a machine wrote ``message`` (a salmon.mail.MailRequest), or nobody who could be answered."""
    sender = message.From or ""
    return (
        not is_address(sender)
        or MACHINES.match(sender) is not None
        or (message["Auto-Submitted"] or "no").partition(";")[0].strip().lower() != "no"
        or (message["Precedence"] or "").strip().lower() in ("bulk", "junk", "list")
        or (message["Content-Type"] or "").lower().startswith("multipart/report")
        or "List-Id" in message
        or parseaddr(message["Return-Path"] or sender)[1] == ""
    )


def people_only(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``handler`` see only mails that people wrote; others are accepted and forgotten."""

    @functools.wraps(handler)
    def guarded(message: Any, **captures: str) -> Any:
        if is_automatic(message):
            log.info("ignored an automatic mail from %s to %s", message.From, message.To)
            return None
        return handler(message, **captures)

    return guarded
