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

from beaker_statestore.router import RouterStateStorage
from beaker_statestore.websession import make_filter
from wsgi_demo import development, pages, views
from wsgi_demo.letters import Letters
from wsgi_demo.newsletter import Newsletter
from wsgi_demo.relay import Relay
from wsgi_demo.routes import Routes
from wsgi_demo.settings import Settings, from_command_line
from wsgi_demo.visit import Visit

__all__ = ["Web", "main"]

log = logging.getLogger(__name__)

ROUTES = Routes(views.routes, development.routes)

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
        self._with_sessions = make_filter(self._views, _session_settings(settings))

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        request = Request(environ)
        try:
            response = request.get_response(self._with_sessions)
        except Exception:
            # Not the whole path, which may hold a secret.
            log.exception("500 for %s /%s", request.method, environ["PATH_INFO"].strip("/").partition("/")[0])
            response = request.get_response(self._error(request, 500))
        if response.status_code == 503:
            # From the session filter, or from a view that could not send a mail.
            # With a cookie if there is one: then the session is stored, and under a new id.
            headers = {"Retry-After": "5", **response.headers}
            response = request.get_response(self._error(request, 503, headers))
        response.headers.update(pages.HEADERS)
        response.headers.setdefault("Cache-Control", "no-store")
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
            response = self._error(request, error.status_code, error.headers)
        return response(environ, start_response)  # type: ignore[no-any-return]  # WebOb has no hints

    def _answer(self, request: Request) -> Response:
        if (request.content_length or 0) > LARGEST_REQUEST:
            raise HTTPRequestEntityTooLarge
        try:
            view, captures = ROUTES.find(request.method, request.path_info)
        except UnicodeDecodeError as error:
            raise HTTPBadRequest from error
        visit = Visit(request, self._settings, self._newsletter, captures)
        if request.method == "POST" and not visit.visitor.owns(visit.field("csrf_token")):
            raise HTTPForbidden
        return view(visit)

    def _error(self, request: Request, status: int, headers: Mapping[str, str] | None = None) -> Response:
        title, text = ERRORS.get(status, ERRORS[500])
        response = pages.render(
            "error.html",
            status,
            title=title,
            text=text,
            url=Visit(request, self._settings, self._newsletter, {}).url,
            letters=self._newsletter.letters,
        )
        kept = ("Allow", "Retry-After", "Set-Cookie")
        response.headers.update({name: value for name, value in (headers or {}).items() if name in kept})
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
    waitress.serve(
        Web(settings),
        listen=str(settings.web),
        url_prefix=unquote(settings.path, "latin-1"),  # as WSGI decodes paths (PEP 3333)
        threads=8,
        ident=None,
        max_request_body_size=8 * LARGEST_REQUEST,
    )


if __name__ == "__main__":
    main()
