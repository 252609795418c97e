"""What the handlers work with; `wsgi_demo.mail` fills it in before they are imported (Lamson's ``config.settings``)."""

from __future__ import annotations

from wsgi_demo.newsletter import Newsletter

__all__ = ["development", "newsletter"]

newsletter: Newsletter
#: Whether a mail may make a handler raise, to show what happens then.
development: bool
