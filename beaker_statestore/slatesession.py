"""Slates for WSGI applications: whoever has signed in, by a token in a cookie, and signing in and out.

    application = SlateMiddleware(application, Slates.from_settings("production.ini"))

    environ["slates.user"]      the `Slate` of whoever has signed in, or None
    environ["slates.login"]     a `SlateLogin`: sign_in(user), sign_out()

A token that has expired is no good from the next request on; the request under way is finished as any other. It must
never know an engine or a socket.
"""

from __future__ import annotations

import difflib
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from configparser import ConfigParser
from dataclasses import dataclass
from typing import Any, Final

from webob.cookies import make_cookie

from beaker_statestore import observe
from beaker_statestore.exceptions import ConfigurationError, StateStoreError
from beaker_statestore.slates import Slate, Slates
from beaker_statestore.tokens import LIFETIME, Login, check_seconds
from beaker_statestore.webanswers import Headers, OutageFilter, WSGIApplication

__all__ = ["SlateLogin", "SlateMiddleware", "filter_app_factory"]

log = logging.getLogger(__name__)

#: For how long nobody stays signed in without signing in anew, in seconds, however often he comes.
LONGEST: Final = 90 * 86400.0
#: What the options of `filter_app_factory` begin with.
PREFIX: Final = "slates."
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)
#: What cannot end the attribute that it is put into, nor the header (RFC 6265, 4.1.1).
_PATH: Final = re.compile(r"/[!-:<-~]*", re.ASCII)
_DOMAIN: Final = re.compile(r"[A-Za-z0-9.-]+", re.ASCII)
#: One directive of a Cache-Control header; a comma within quotation marks belongs to it.
_DIRECTIVE: Final = re.compile(r'(?:[^,"]|"[^"]*"?)+')
#: What would let a shared cache keep an answer, and what `_privately` says itself.
_CACHED: Final = frozenset({"public", "s-maxage", "private"})


@dataclass(frozen=True)
class _Cookie:
    """How the cookie looks."""

    name: str
    lifetime: float
    longest: float | None
    secure: bool
    samesite: str
    path: str
    domain: str | None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(f"a cookie cannot be called {self.name!r}: use letters, digits, - and _")
        if not _PATH.fullmatch(self.path):
            raise ConfigurationError(f"a cookie's path cannot be {self.path!r}: begin with /, as in a URL")
        if self.domain is not None and not _DOMAIN.fullmatch(self.domain):
            raise ConfigurationError(f"a cookie's domain cannot be {self.domain!r}: write the name of a host")
        try:
            check_seconds(self.lifetime)
            if self.longest is not None:
                check_seconds(self.longest)
            self.header("a")
        except (ValueError, OverflowError) as error:
            raise ConfigurationError(f"the slates' cookie is not possible so: {error}") from error
        if self.samesite.lower() == "none" and not self.secure:
            raise ConfigurationError("browsers refuse a cookie with samesite = None unless it is secure")
        # RFC 6265bis, 4.1.3: browsers refuse what does not keep the promise of the name, however that is capitalised.
        name = self.name.lower()
        if name.startswith(("__host-", "__secure-")) and not self.secure:
            raise ConfigurationError(f"a cookie called {self.name} has to be secure")
        if name.startswith("__host-") and (self.path != "/" or self.domain is not None):
            raise ConfigurationError(f"a cookie called {self.name} needs the path / and no domain")

    def token(self, environ: Mapping[str, Any]) -> str | None:
        """What the client has sent under this name, whatever it is."""
        # Of a cookie's quoting, a token of ours needs nothing; some clients put all values in quotation marks.
        pairs = (pair.partition("=") for pair in environ.get("HTTP_COOKIE", "").split(";"))
        values = [value.strip(' \t"') for name, _, value in pairs if name.strip() == self.name]
        return values[-1] if values else None

    def header(self, token: str | None) -> str:
        """The value of a Set-Cookie header; for None one that makes the browser forget the cookie.

        The browser keeps it for twice the token's life, so that the answer that renewed it may get lost once: it is the
        token's expiry that counts.
        """
        return str(
            make_cookie(
                self.name,
                token,
                max_age=math.ceil(2 * self.lifetime),
                path=self.path,
                domain=self.domain,
                secure=self.secure,
                httponly=True,
                samesite=self.samesite,
            )
        )


class SlateMiddleware:
    """A WSGI filter that tells an application who has signed in.

    A request without the cookie costs no round trip, one with it costs one, also for a static file: serve these beside
    it. A token of which more than half of its life is over is renewed when the answer begins, and the cookie set again.
    If the store fails, also while the application uses a slate, the answer is 503 with Retry-After, and a `Conflict`
    that the application does not catch is a 409; neither touches the cookie.

    Where there is a session filter, put this one outside: inside, its 503 would be an answer like any other to that
    filter, which would store what a request has left half done.

    :param app: the application.
    :param slates: where the slates are.
    :param cookie: its name. With ``__Host-`` in front, no other host of the domain can set it. None: ``__Host-slate``
        where browsers accept that (``secure``, ``path`` ``/``, no ``domain``), else ``slate``.
    :param lifetime: how long nobody may come before he has to sign in again, in seconds.
    :param longest: after how many seconds he has to sign in again, however often he has come; None: never.
    :param secure: whether the browser sends it over HTTPS only. False is for development.
    :param samesite: ``Lax``, ``Strict`` or ``None``: whether it is sent when another site leads to this one.
    :param path: under which it is sent.
    :param domain: to whose hosts it is sent; None: only to the one that set it.
    :raises ConfigurationError: browsers would refuse such a cookie.
    """

    def __init__(
        self,
        app: WSGIApplication,
        slates: Slates,
        *,
        cookie: str | None = None,
        lifetime: float = LIFETIME,
        longest: float | None = LONGEST,
        secure: bool = True,
        samesite: str = "Lax",
        path: str = "/",
        domain: str | None = None,
    ) -> None:
        if cookie is None:
            cookie = "__Host-slate" if secure and path == "/" and domain is None else "slate"
        self._app = app
        self._slates = slates
        self._cookie = _Cookie(cookie, lifetime, longest, secure, samesite, path, domain)
        self._filter = OutageFilter(self._answer, finish=_finished)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer the request."""
        return self._filter(environ, start_response)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        environ["slates.login"] = SlateLogin(self._slates, self._cookie, environ)
        return self._app(environ, start_response)


def _finished(environ: dict[str, Any], headers: Headers) -> Headers:
    cookie = environ["slates.login"].cookie()
    return headers if cookie is None else [*_privately(headers), ("Set-Cookie", cookie)]


def _privately(headers: Headers) -> Headers:
    """``headers``, by which no shared cache keeps the answer, and the cookie with it (RFC 9111, 7.3)."""
    others = [(name, value) for name, value in headers if name.lower() != "cache-control"]
    given = _DIRECTIVE.findall(",".join(value for name, value in headers if name.lower() == "cache-control"))
    kept = [text.strip() for text in given if text.strip() and text.partition("=")[0].strip().lower() not in _CACHED]
    return [*others, ("Cache-Control", ", ".join([*kept, "private"]))]


class SlateLogin:
    """Who makes this request, and signing in and out; ``environ["slates.login"]`` is one."""

    #: The name of whoever has signed in; None: nobody has.
    user: str | None
    #: The token by which he has, for `Tokens.revoke_all` to keep. Whoever knows it is signed in.
    token: str | None

    def __init__(self, slates: Slates, cookie: _Cookie, environ: dict[str, Any]) -> None:
        self._slates = slates
        self._cookie = cookie
        self._environ = environ
        self._answered = False
        self._set_cookie: str | None = None
        #: What ends when the answer goes out with another token.
        self._former: list[str | None] = []
        token = cookie.token(environ)
        login = slates.auth.look_up(token)
        #: The token that is to be renewed.
        self._due = token if login is not None and self._is_due(login) else None
        self._be(*((None, None) if login is None else (login.user, token)))

    def sign_in(self, user: str) -> Slate:
        """Sign ``user`` in, by a new token in the cookie, and answer his slate: make sure before that it is he.

        The token that came with the request ends when the answer goes out, whoever it belonged to. If none goes out,
        after an outage or a conflict, it stays, as does the cookie.

        :raises StateStoreError: the answer has gone out, so that there can be no cookie; nothing was done.
        """
        self._refuse_if_answered("sign_in")
        token = self._slates.auth.issue(user, self._cookie.lifetime, longest=self._cookie.longest)
        self._set_cookie = self._cookie.header(token)
        self._former.append(self.token)
        self._be(user, token)
        return self._slates[user]

    def sign_out(self) -> None:
        """End the token, and have the browser forget the cookie. Nobody is signed in for the rest of the request.

        :raises StateStoreError: the answer has gone out; nothing was done.
        """
        self._refuse_if_answered("sign_out")
        for token in (*self._former, self.token):
            self._slates.auth.revoke(token)
        self._former.clear()
        self._set_cookie = self._cookie.header(None)
        self._be(None, None)

    def cookie(self) -> str | None:
        """The value of the answer's Set-Cookie header, if it needs one; from now on that cannot be changed.

        A store that fails now does not spoil an answer that is ready: the next request renews the token, and a former
        one, which no browser sends any more, stays until it expires.
        """
        self._answered = True
        former, self._former = self._former, []
        due, self._due = self._due, None
        try:
            for token in former:
                self._slates.auth.revoke(token)
            # Only now, so that no cookie goes out for a token that another request has ended by signing in anew.
            if self._set_cookie is None and self._slates.auth.renew(due, self._cookie.lifetime):
                self._set_cookie = self._cookie.header(due)
                observe.count("tokens.renewed")
        except StateStoreError as error:
            log.warning("the answer goes out, but a login token could not be renewed or ended: %s", error)
        return self._set_cookie

    def _is_due(self, login: Login) -> bool:
        return login.expires_at < min(time.time() + self._cookie.lifetime / 2, login.latest)

    def _be(self, user: str | None, token: str | None) -> None:
        self.user, self.token = user, token
        self._environ["slates.user"] = None if user is None else self._slates[user]

    def _refuse_if_answered(self, method: str) -> None:
        if self._answered:
            raise StateStoreError(f"{method} comes too late: call it before start_response")


def filter_app_factory(app: WSGIApplication, global_conf: Mapping[str, Any], **local_conf: Any) -> WSGIApplication:
    """`SlateMiddleware` as PasteDeploy's ``paste.filter_app_factory``: ``use = egg:beaker-statestore#slates``.

    The store is that of the ``beaker.session.*`` lines; the options are `SlateMiddleware`'s, as ``slates.cookie``,
    ``slates.lifetime`` and so on.

    :raises ConfigurationError: an option is wrong or missing.
    """
    settings = {**global_conf, **local_conf}
    given = {name[len(PREFIX) :]: value for name, value in settings.items() if name.startswith(PREFIX)}
    options = {}
    for name, value in given.items():
        if name not in _OPTIONS:
            near = difflib.get_close_matches(name, _OPTIONS, n=1)
            hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known are {', '.join(_OPTIONS)}"
            raise ConfigurationError(f"{PREFIX}{name} is not an option; {hint}")
        try:
            options[name] = _OPTIONS[name](str(value).strip())
        except ValueError as error:
            raise ConfigurationError(f"{PREFIX}{name} is {value!r}: {error}") from error
    return SlateMiddleware(app, Slates.from_settings(settings), **options)


def _flag(text: str) -> bool:
    try:
        return ConfigParser.BOOLEAN_STATES[text.lower()]
    except KeyError:
        raise ValueError("write true or false") from None


_OPTIONS: Final[dict[str, Callable[[str], Any]]] = {
    "cookie": str,
    "lifetime": float,
    "longest": lambda text: float(text) if text else None,
    "secure": _flag,
    "samesite": str,
    "path": str,
    "domain": lambda text: text or None,
}
