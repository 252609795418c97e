"""The web application: sessions, the views, and a presentable answer whatever happens.

A page is made by a function of `views` or `development`; this module finds it, and guards it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import unquote

import waitress
from webob import Request, Response
from webob.exc import HTTPBadRequest, HTTPException, HTTPForbidden, HTTPRequestEntityTooLarge

from beaker_statestore import report, statistics
from beaker_statestore.exceptions import Conflict
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.slates import Slates
from beaker_statestore.slatesession import SlateMiddleware
from beaker_statestore.websession import make_filter
from wsgi_demo import development, inviting, pages, undeliverable, views
from wsgi_demo.invitations import Invitations
from wsgi_demo.letters import Letters
from wsgi_demo.live import MOST_STREAMS, Live
from wsgi_demo.newsletter import Newsletter
from wsgi_demo.relay import Relay
from wsgi_demo.routes import Routes
from wsgi_demo.settings import Settings, from_command_line
from wsgi_demo.visit import Visit

__all__ = ["Web", "main"]

log = logging.getLogger(__name__)

ROUTES = Routes(views.routes, inviting.routes, development.routes, undeliverable.routes)

#: No form of ours is larger, in bytes.
LARGEST_REQUEST = 128 * 1024

#: What the page for an error says, by status.
ERRORS: Mapping[int, tuple[str, str]] = {
    400: ("That did not make sense", "Your browser sent something that we cannot read."),
    403: (
        "That was not allowed",
        "The page that you came from was too old, or your browser keeps no cookies. Start again, please.",
    ),
    404: ("There is no such page", "Perhaps the address was cut off on its way. Check it, or go back to the start."),
    405: ("That cannot be done here", "This address takes other requests. Go back to the start and try again."),
    409: (
        "Another window was quicker",
        "It changed the same thing at the same moment, so this one saved nothing. Look at how it is now, and decide.",
    ),
    413: ("That was too much", "What you sent is larger than anything we take."),
    500: ("Something of ours broke", "It is not your fault. We have noted it."),
    503: (
        "Please try again in a moment",
        "Something that we need is out of reach. Nothing is lost, and it does no harm to do the same once more.",
    ),
}


class Web:
    """The WSGI application."""

    def __init__(self, settings: Settings) -> None:
        states = RouterStateStorage.from_settings(settings.given)
        letters = Letters(settings)
        self._settings = settings
        self._newsletter = Newsletter(settings, states, Relay(settings.relay, letters.bounces_address))
        self._invitations = Invitations(settings, self._newsletter)
        self._live = Live.of(settings.given)
        with_sessions = make_filter(self._views, _session_settings(settings))
        # Outside, since a session may only be stored at the end of what its own filter sees to be no outage.
        self._with_logins = SlateMiddleware(
            with_sessions,
            Slates.from_settings(settings.given),
            cookie="demo_slate",
            path=settings.path or "/",
            secure=settings.secure,
        )
        self._report = report.make_app()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        room = environ["PATH_INFO"].lstrip("/").partition("/")[0]
        try:
            if room == "statistics" and self._visit(request, {}).local:
                mounted = Request(environ.copy())
                mounted.path_info_pop()
                # With headers of its own, and no session: it is wanted most while the store is away.
                return self._report(mounted.environ, start_response)
            # A stylesheet needs no store either.
            response = request.get_response(self._views if room == "static" else self._with_logins)
        except Exception:
            # Not the whole path, which may hold a secret.
            log.exception("500 for %s /%s", request.method, room)
            response = request.get_response(self._error(request, 500))
        if response.status_code == 503:
            # From the session filter, or from a view that could not send a mail.
            # With a cookie if there is one: then the session is stored, and under a new id.
            headers = [("Retry-After", response.headers.get("Retry-After", "5"))]
            cookies = [("Set-Cookie", cookie) for cookie in response.headers.getall("Set-Cookie")]
            response = request.get_response(self._error(request, 503, headers + cookies))
        response.headers.update(pages.HEADERS)
        if room != "static":
            response.headers["Cache-Control"] = "no-store"
        if "Location" in response.headers:
            # WebOb made it absolute, with the scheme and the host that we see; behind a proxy, only the browser knows.
            response.headers["Location"] = response.headers["Location"].removeprefix(request.host_url)
        start_response(response.status, response.headerlist)
        return response.app_iter  # type: ignore[no-any-return]  # WebOb has no hints

    def _views(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = self._answer(request)
        except HTTPException as error:
            response = self._error(request, error.status_code, error.headers.items())
        except Conflict:
            response = self._error(request, 409)
        return response(environ, start_response)  # type: ignore[no-any-return]  # WebOb has no hints

    def _answer(self, request: Request) -> Response:
        if (request.content_length or 0) > LARGEST_REQUEST:
            raise HTTPRequestEntityTooLarge
        try:
            view, captures = ROUTES.find(request.method, request.path_info)
        except UnicodeDecodeError as error:
            raise HTTPBadRequest from error
        visit = self._visit(request, captures)
        if request.method == "POST" and not visit.visitor.owns(visit.field("csrf_token")):
            raise HTTPForbidden
        return view(visit)

    def _visit(self, request: Request, captures: Mapping[str, str]) -> Visit:
        return Visit(request, self._settings, self._newsletter, self._invitations, self._live, captures)

    def _error(self, request: Request, status: int, headers: Iterable[tuple[str, str]] = ()) -> Response:
        title, text = ERRORS.get(status, ERRORS[500])
        response = pages.render(
            "error.html",
            status,
            title=title,
            text=text,
            url=self._visit(request, {}).url,
            letters=self._newsletter.letters,
        )
        kept = ("Allow", "Retry-After", "Set-Cookie")
        response.headerlist += [(name, value) for name, value in headers if name in kept]
        return response


def _session_settings(settings: Settings) -> Mapping[str, Any]:
    """Beaker's options as given; where nothing is, a cookie that no script reads and no other application gets."""
    careful = {
        "cookie_path": settings.path or "/",
        "httponly": "true",
        "samesite": "Lax",
        "secure": str(settings.secure).lower(),
    }
    return {**{f"beaker.session.{name}": value for name, value in careful.items()}, **settings.given}


def main() -> None:
    """Serve browsers until the process is ended."""
    settings = from_command_line(__doc__)
    statistics.install()
    waitress.serve(
        Web(settings),
        listen=str(settings.web),
        url_prefix=unquote(settings.path, "latin-1"),  # as WSGI decodes paths (PEP 3333)
        threads=MOST_STREAMS + 8,
        channel_request_lookahead=1,  # so that waitress reads, and sees the end, while a stream is open
        ident=None,
        max_request_body_size=8 * LARGEST_REQUEST,
    )


if __name__ == "__main__":
    main()
