"""Beaker's sessions for WSGI applications, with an honest answer while the store is out of reach.

Stock Beaker answers an outage with whatever the server makes of an exception, mostly a 500. The filter here makes it
a 503 with Retry-After, also when the store failed only at the end of the request, in start_response, where Beaker
saves. It must never know an engine or a socket.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final

from beaker.exceptions import BeakerWarning
from beaker.middleware import SessionMiddleware
from webob.exc import HTTPServiceUnavailable

from beaker_statestore.exceptions import ConfigurationError, SessionUnavailable, StoreUnavailable
from beaker_statestore.settings import SESSION_PREFIXES, Settings, session_options
from beaker_statestore.stores import open_store

__all__ = ["OutageFilter", "filter_app_factory", "make_filter"]

log = logging.getLogger(__name__)

#: What Retry-After says, in seconds: a restarted server answers sooner than that.
RETRY_AFTER: Final = 5

WSGIApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def make_filter(app: WSGIApplication, settings: Mapping[str, Any]) -> WSGIApplication:
    """``app`` with a session in ``environ["beaker.session"]``, and a 503 when the store fails.

    :param settings: an application's settings, of which the ``beaker.session.*`` are used; as the type,
        ``ext:tcjson`` is the default, and the options of another are left to Beaker.
    :raises ConfigurationError: an option is wrong or missing, or contradicts another.
    """
    options = {name: value for name, value in settings.items() if name.startswith(SESSION_PREFIXES)}
    chosen = session_options(options)
    if chosen.setdefault("type", "ext:tcjson") != "ext:tcjson":
        return OutageFilter(SessionMiddleware(app, options))
    options["beaker.session.type"] = "ext:tcjson"
    serializer = chosen.get("data_serializer", "pickle")
    if serializer in ("pickle", "json"):
        if chosen.get("serializer", serializer) != serializer:
            raise ConfigurationError(
                f"beaker.session.serializer is {chosen['serializer']!r}, but Beaker's data_serializer is "
                f"{serializer!r}: leave the first one out, it follows the other"
            )
        options["beaker.session.serializer"] = serializer
    if chosen.get("encrypt_key") and chosen.get("crypto_type", "default") not in ("default", "cryptography"):
        raise ConfigurationError(
            f"beaker.session.crypto_type is {chosen['crypto_type']!r}, which enciphers sessions without authenticating "
            "them: whoever can write to the store could run code. Leave the option out, and pip install cryptography"
        )
    # Whatever is wrong is better said when the application starts than to its first visitor.
    checked = Settings.from_options(chosen)
    open_store(checked.url, **checked.timing)
    _keep_session_ids_out_of_warnings()
    return OutageFilter(SessionMiddleware(app, options))


def filter_app_factory(app: WSGIApplication, global_conf: Mapping[str, Any], **local_conf: Any) -> WSGIApplication:
    """`make_filter` as PasteDeploy's ``paste.filter_app_factory``: ``use = egg:beaker-statestore#session``."""
    return make_filter(app, {**global_conf, **local_conf})


def _keep_session_ids_out_of_warnings() -> None:
    """Silence Beaker's warning about a load that met an outage: it quotes the id, which is still good.

    beaker.session.Session.__init__ issues it before its second load. The outage itself is logged here, without id.
    """
    message = rf"Invalidating corrupt session .*; error was: {SessionUnavailable.PREFIX}"
    warnings.filterwarnings("ignore", message, BeakerWarning)


class OutageFilter:
    """A WSGI filter that turns `StoreUnavailable` into 503 with Retry-After.

    The answer carries none of the application's headers, so no cookie either: the visitor keeps the session that he
    has. Once the application's answer is under way to the client, the exception is left to the server.
    """

    def __init__(self, app: WSGIApplication, retry_after: int = RETRY_AFTER) -> None:
        """:param retry_after: after how many seconds a client should try again."""
        self.app = app
        self.retry_after = retry_after

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer the request; the start of the application's answer is held back until it has returned."""
        start = _HeldStart(start_response)
        body: Iterable[bytes] = ()
        try:
            body = self.app(environ, start)
            if not start.called:
                # A generator does nothing, and so cannot fail, before its first chunk is asked for.
                body = _Resumed(body)
        except StoreUnavailable as error:
            _close(body)
            if start.sent:
                raise
            # Without the path, which may hold a secret.
            log.error("503: %s", error)
            unavailable = HTTPServiceUnavailable(
                "The session store is out of reach; please try again in a moment.",
                headers=[("Retry-After", str(self.retry_after)), ("Cache-Control", "no-store")],
            )
            return unavailable(environ, start_response)  # type: ignore[no-any-return]  # WebOb has no hints
        start.send()
        return body


class _HeldStart:
    """A start_response that can still be taken back."""

    def __init__(self, start_response: Callable[..., Any]) -> None:
        self._start_response = start_response
        self._arguments: tuple[Any, ...] = ()
        self._write: Callable[[bytes], Any] | None = None

    @property
    def called(self) -> bool:
        """Whether the application has started its answer."""
        return bool(self._arguments)

    @property
    def sent(self) -> bool:
        """Whether the server has been told."""
        return self._write is not None

    def __call__(self, *arguments: Any) -> Callable[[bytes], Any]:
        self._arguments = arguments
        if self.sent:
            # Starting anew is the server's to judge: it knows whether the headers are out (PEP 3333, exc_info).
            self._write = self._start_response(*arguments)
        return self._write_now

    def send(self) -> None:
        """Pass the application's start on to the server, for good."""
        if self.called and not self.sent:
            self._write = self._start_response(*self._arguments)

    def _write_now(self, data: bytes) -> None:
        self.send()
        if self._write is not None:
            self._write(data)


class _Resumed:
    """A response body whose first chunk has already been taken out."""

    def __init__(self, body: Iterable[bytes]) -> None:
        self._body = body
        self._rest = iter(body)
        self._taken = list(itertools.islice(self._rest, 1))

    def __iter__(self) -> Iterator[bytes]:
        return itertools.chain(self._taken, self._rest)

    def close(self) -> None:
        """Close the application's body, as PEP 3333 asks of whoever takes it."""
        _close(self._body)


def _close(body: Iterable[bytes]) -> None:
    close = getattr(body, "close", None)
    if close is not None:
        close()
