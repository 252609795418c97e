"""The words in a mail."""

from __future__ import annotations

from email.message import EmailMessage

__all__ = ["plain_text"]


def plain_text(message: EmailMessage) -> str | None:
    """The plain text of ``message``; None when it has none that can be read."""
    body = message.get_body(("plain",))
    try:
        return None if body is None else str(body.get_content())
    except LookupError:
        # A charset or an encoding that nobody knows.
        return None
