"""What a WSGI application answers when the store fails, or when somebody else was quicker.

The start of the application's answer is held back until it has returned, so that an exception on the way out can still
become an answer of its own. It must never know an engine, a socket or what the application keeps in the store.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from webob.exc import HTTPConflict, HTTPServiceUnavailable

from beaker_statestore.exceptions import Conflict, SessionMoved, StoreUnavailable

__all__ = ["Headers", "OutageFilter", "WSGIApplication"]

log = logging.getLogger(__name__)

#: What Retry-After says, in seconds: a restarted server answers sooner than that.
RETRY_AFTER: Final = 5

Headers = list[tuple[str, str]]
WSGIApplication = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


class OutageFilter:
    """A WSGI filter that turns `StoreUnavailable` into 503 with Retry-After, and `Conflict` into 409.

    The answer carries none of the application's headers, so no cookie either: the visitor keeps the session that he
    has. (Only after `SessionMoved` that is the one with the new id.) Once the application's answer is under way to
    the client, the exception is left to the server.
    """

    def __init__(
        self,
        app: WSGIApplication,
        retry_after: int = RETRY_AFTER,
        *,
        finish: Callable[[dict[str, Any], Headers], Headers] | None = None,
    ) -> None:
        """:param retry_after: after how many seconds a client should try again.
        :param finish: gets the environment and the headers of the application's answer when that goes out for certain,
            and returns those to send; again, if the application starts anew.
        """
        self.app = app
        self.retry_after = retry_after
        self.finish = finish

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer the request; the start of the application's answer is held back until it has returned."""

        def begin(status: str, headers: Headers, *more: Any) -> Any:
            return start_response(status, headers if self.finish is None else self.finish(environ, headers), *more)

        start = _HeldStart(begin)
        body: Iterable[bytes] = ()
        try:
            body = self.app(environ, start)
            if not start.called:
                # A generator does nothing, and so cannot fail, before its first chunk is asked for.
                body = _Resumed(body)
        except (StoreUnavailable, Conflict) as error:
            _close(body)
            if start.sent:
                raise
            answer = self._conflict(error) if isinstance(error, Conflict) else self._outage(error)
            return answer(environ, start_response)  # type: ignore[no-any-return]  # WebOb has no hints
        except BaseException:
            _close(body)
            raise
        try:
            start.send()
        except BaseException:
            _close(body)
            raise
        return body

    def _outage(self, error: StoreUnavailable) -> HTTPServiceUnavailable:
        # Without the path, which may hold a secret.
        log.error("503: %s", error)
        headers = [("Retry-After", str(self.retry_after)), ("Cache-Control", "no-store")]
        if isinstance(error, SessionMoved) and error.cookie:
            headers.append(("Set-Cookie", error.cookie))
        return HTTPServiceUnavailable("The session store is out of reach; please try again in a moment.", headers)

    def _conflict(self, error: Conflict) -> HTTPConflict:
        log.info("409: %s", error)
        return HTTPConflict(
            "Another request of yours, perhaps in another window, has changed the same thing meanwhile, so this one "
            "was not carried out, or not all of it. Please load the page again, look what is there now, and decide.",
            headers=[("Cache-Control", "no-store")],
        )


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
