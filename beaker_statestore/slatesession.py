"""Slates for WSGI applications: whoever has signed in, by a token in a cookie, and signing in and out.

    application = SlateMiddleware(application, Slates.from_settings("production.ini"))

    environ["slates.user"]      the `Slate` of whoever has signed in, or None
    environ["slates.login"]     a `SlateLogin`: sign_in(user), sign_out()

A token that has expired is no good from the next request on; the request under way is finished as any other. It must
never know an engine or a socket.
"""

from __future__ import annotations

import difflib
import math
import re
import time
from collections.abc import Callable, Iterable, Mapping
from configparser import ConfigParser
from dataclasses import dataclass
from typing import Any, Final

from webob.cookies import make_cookie, parse_cookie

from beaker_statestore import observe
from beaker_statestore.exceptions import ConfigurationError, StateStoreError
from beaker_statestore.slates import Slate, Slates
from beaker_statestore.tokens import LIFETIME, check_seconds
from beaker_statestore.webanswers import OutageFilter, WSGIApplication

__all__ = ["SlateLogin", "SlateMiddleware", "filter_app_factory"]

#: What the options of `filter_app_factory` begin with.
PREFIX: Final = "slates."
_NAME: Final = re.compile(r"[A-Za-z0-9_-]+", re.ASCII)


@dataclass(frozen=True)
class _Cookie:
    """How the cookie looks."""

    name: str
    lifetime: float
    secure: bool
    samesite: str
    path: str
    domain: str | None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigurationError(f"a cookie cannot be called {self.name!r}: use letters, digits, - and _")
        try:
            check_seconds(self.lifetime)
            self.header("a")
        except ValueError as error:
            raise ConfigurationError(f"the slates' cookie is not possible so: {error}") from error
        if self.samesite.lower() == "none" and not self.secure:
            raise ConfigurationError("browsers refuse a cookie with samesite = None unless it is secure")
        # RFC 6265bis, 4.1.3: browsers refuse what does not keep the promise of the name.
        if self.name.startswith(("__Host-", "__Secure-")) and not self.secure:
            raise ConfigurationError(f"a cookie called {self.name} has to be secure")
        if self.name.startswith("__Host-") and (self.path != "/" or self.domain is not None):
            raise ConfigurationError(f"a cookie called {self.name} needs the path / and no domain")

    def token(self, environ: Mapping[str, Any]) -> str | None:
        """What the client has sent under this name, whatever it is."""
        sent = dict(parse_cookie(environ.get("HTTP_COOKIE", "")))
        value = sent.get(self.name.encode())
        return None if value is None else value.decode("latin-1")

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

    A request without the cookie costs no round trip, one with it costs one. A token of which more than half of its
    life is over is renewed, and the cookie set again. If the store fails, also while the application uses a slate, the
    answer is 503 with Retry-After, and a `Conflict` that the application does not catch is a 409; neither touches the
    cookie.

    :param app: the application.
    :param slates: where the slates are.
    :param cookie: its name. With ``__Host-`` in front, no other host of the domain can set it.
    :param lifetime: how long nobody may come before he has to sign in again, in seconds.
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
        cookie: str = "slate",
        lifetime: float = LIFETIME,
        secure: bool = True,
        samesite: str = "Lax",
        path: str = "/",
        domain: str | None = None,
    ) -> None:
        self._app = app
        self._slates = slates
        self._cookie = _Cookie(cookie, lifetime, secure, samesite, path, domain)
        self._filter = OutageFilter(self._answer)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer the request."""
        return self._filter(environ, start_response)

    def _answer(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        login = environ["slates.login"] = SlateLogin(self._slates, self._cookie, environ)

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            return start_response(status, [*headers, *login.headers()], *more)

        return self._app(environ, start)


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
        self._set_cookie: str | None = None
        self._answered = False
        self._be(*self._checked(cookie.token(environ)))

    def sign_in(self, user: str) -> Slate:
        """Sign ``user`` in, by a new token in the cookie, and answer his slate: make sure before that it is he.

        The token that came with the request ends, whoever it belonged to.

        :raises StateStoreError: the answer has been started, so that there can be no cookie; nothing was done.
        """
        self._refuse_if_answered("sign_in")
        before = self.token
        token = self._slates.auth.issue(user, self._cookie.lifetime)
        self._set_cookie = self._cookie.header(token)
        self._slates.auth.revoke(before)
        self._be(user, token)
        return self._slates[user]

    def sign_out(self) -> None:
        """End the token, and have the browser forget the cookie. Nobody is signed in for the rest of the request.

        :raises StateStoreError: the answer has been started; nothing was done.
        """
        self._refuse_if_answered("sign_out")
        self._slates.auth.revoke(self.token)
        self._set_cookie = self._cookie.header(None)
        self._be(None, None)

    def headers(self) -> list[tuple[str, str]]:
        """What the answer needs besides the application's headers; from now on it cannot be changed."""
        self._answered = True
        if self._set_cookie is None:
            return []
        # A shared cache may otherwise keep the answer, and the cookie with it (RFC 9111, 7.3).
        return [("Set-Cookie", self._set_cookie), ("Cache-Control", "private")]

    def _checked(self, token: str | None) -> tuple[str | None, str | None]:
        login = self._slates.auth.look_up(token)
        if login is None:
            return None, None
        if token is not None and login.expires_at - time.time() < self._cookie.lifetime / 2:
            if not self._slates.auth.renew(token, self._cookie.lifetime):
                return None, None
            self._set_cookie = self._cookie.header(token)
            observe.count("tokens.renewed")
        return login.user, token

    def _be(self, user: str | None, token: str | None) -> None:
        self.user, self.token = user, token
        self._environ["slates.user"] = None if user is None else self._slates[user]

    def _refuse_if_answered(self, method: str) -> None:
        if self._answered:
            raise StateStoreError(f"{method} comes too late: call it before start_response, which sends the cookie")


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
    "secure": _flag,
    "samesite": str,
    "path": str,
    "domain": lambda text: text or None,
}
