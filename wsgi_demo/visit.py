"""One request and what a view needs to answer it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl, quote, urlsplit

from webob import Request, Response
from webob.exc import HTTPBadRequest, HTTPForbidden, HTTPNotFound, HTTPSeeOther

from wsgi_demo import pages
from wsgi_demo.invitations import MOST_ADDRESSES, Invitations
from wsgi_demo.live import Live
from wsgi_demo.newsletter import Newsletter
from wsgi_demo.settings import Settings, is_loopback
from wsgi_demo.visitor import Visitor

__all__ = ["Visit"]

#: Two for each address of an invitation, and some.
MOST_FIELDS = 2 * MOST_ADDRESSES + 20


#: static/live.js asks with this header.
LOOK = "X-Live"


@dataclass
class Visit:
    """A request, who makes it, and the application's parts."""

    request: Request
    settings: Settings
    newsletter: Newsletter
    invitations: Invitations
    live: Live | None
    #: What the address of the page has in it, such as a secret.
    captures: Mapping[str, str]

    @cached_property
    def visitor(self) -> Visitor:
        """Who makes the request."""
        return Visitor(self.request.environ)

    @property
    def local(self) -> bool:
        """Whether to show what only a developer at this very machine may see.

        A proxy makes everybody look local, and a web site can have its own name lead to 127.0.0.1 (DNS rebinding): so
        the name that the browser asked for counts, too.
        """
        environ = self.request.environ
        return (
            self.settings.development
            and is_loopback(environ.get("REMOTE_ADDR"))
            and is_loopback(urlsplit(f"//{self.request.host}").hostname)
            and not any(name in environ for name in ("HTTP_FORWARDED", "HTTP_X_FORWARDED_FOR"))
        )

    def require_local(self) -> None:
        """:raises HTTPNotFound: this is not `local`."""
        if not self.local:
            raise HTTPNotFound

    def require_address(self) -> str:
        """The address of a visitor who has signed in.

        :raises HTTPForbidden: he has not.
        """
        if self.visitor.address is None:
            raise HTTPForbidden("You are not signed in, or no longer.")
        return self.visitor.address

    @cached_property
    def form(self) -> Mapping[str, str]:
        """What the form says; nothing if it was not sent as our forms are.

        :raises HTTPBadRequest: it has more fields than any form of ours.
        """
        if self.request.content_type != "application/x-www-form-urlencoded":
            return {}
        try:
            return dict(parse_qsl(self.request.body_file.read().decode(errors="replace"), max_num_fields=MOST_FIELDS))
        except ValueError as error:
            raise HTTPBadRequest from error

    def field(self, name: str) -> str:
        """What was written into a field of the form."""
        return self.form.get(name, "").strip()

    def url(self, path: str) -> str:
        """The address of one of our pages, wherever the application is mounted."""
        return quote(self.request.script_name) + path

    def redirect(self, path: str) -> Response:
        """Send the browser on to a page of ours, so that reloading does not repeat what was done."""
        return HTTPSeeOther(location=self.url(path))

    def events(self) -> str | None:
        """For `page`: where a script gets what happens from now on; None if this visitor gets nothing.

        Ask before you read what the page shows, so that nothing can change in between and go unnoticed.
        """
        if self.live is None or not (self.visitor.address or self.local):
            return None
        return self.url(f"/events?after={self.live.latest()}")

    def page(self, template: str, status: int = 200, *, events: str | None = None, **values: Any) -> Response:
        """A page for this visitor.

        :param events: what `events` answered, if the page is to change by itself. It is then asked for once more by
            GET at the address that the browser shows.
        """
        looks = LOOK in self.request.headers
        return pages.render(
            template,
            status,
            letters=self.newsletter.letters,
            local=self.local,
            # They are for the page that the visitor is about to get, not for one that he already has.
            notices=[] if looks else self.visitor.notices(),
            events=events,
            settings=self.settings,
            url=self.url,
            visitor=self.visitor,
            **values,
        )
