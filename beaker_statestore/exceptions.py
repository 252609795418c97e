"""The error family: what went wrong, told apart by what the caller can do about it.

Absence is no error anywhere in this package: it is ``None``, ``False`` or, where Beaker's interface asks for it,
``KeyError``. Damage (`DocumentError`) and outage (`StoreUnavailable`) are different things and never look like
absence. None of these is a ``KeyError`` or a ``TypeError``: Beaker takes those two, when a session is loaded, to
mean "make a new session" (beaker.session.Session.load).
"""

from __future__ import annotations

from collections.abc import Sequence


class StateStoreError(Exception):
    """Whatever this package raises on purpose."""


class ConfigurationError(StateStoreError, ValueError):
    """A setting is wrong or missing; the message names it and what to write instead."""


class MissingDriverError(ConfigurationError):
    """An optional package is not installed; the message has the line to type."""


class StoreUnavailable(StateStoreError):  # noqa: N818 - named for the condition, as HTTP's "Service Unavailable"
    """The store did not answer in time, refused, or broke off: try again later.

    Web applications answer 503 with Retry-After, mail applications SMTP 451.
    """


class OutcomeUnknown(StoreUnavailable):
    """The request may have been executed, and no answer came. Only reading back can tell."""


class SessionUnavailable(StoreUnavailable):
    """The store failed while a session was being loaded."""

    #: How every message begins.
    PREFIX = "the session store is out of reach"

    def __init__(self, reason: str, session_id: str) -> None:
        super().__init__(f"{self.PREFIX}: {reason}")
        self.reason = reason
        #: Which session; never shown in a message, since whoever knows it owns the session.
        self.session_id = session_id


class SessionMoved(StoreUnavailable):
    """The session is stored under its new id, and whether the record under the old one is gone is unknown.

    So it is the new id that is good for certain, and that the visitor should get, even with the answer 503.
    """

    #: The cookie with the new id, as the value of a Set-Cookie header; None where there are no cookies.
    cookie: str | None = None


class ContentionError(StoreUnavailable):
    """Others kept changing the record for as long as we were willing to try."""


class QueueFullError(StoreUnavailable):
    """A queue has as much as it may; nothing was written. Try again later, or see why nobody takes anything out."""


class Conflict(StateStoreError):  # noqa: N818 - what happened, and often nobody's fault
    """Somebody else has changed the same fields meanwhile, and the caller asked not to overwrite that.

    Nothing was written. Load again, look, and decide.
    """

    def __init__(self, fields: Sequence[str]) -> None:
        super().__init__(f"another request has changed {', '.join(map(repr, fields))} meanwhile; nothing was written")
        #: The names of these fields.
        self.fields = tuple(fields)


class ProtocolError(StateStoreError):
    """Bytes that are not the protocol. The connection they came on must not be used again."""


class DocumentError(StateStoreError):
    """A value and a JSON document do not fit each other."""


class DocumentRefusedError(DocumentError):
    """The application gave a value that JSON cannot hold; nothing was written.

    The message names the place in the value (``session['cart'][2]``) and the type that was found there.
    """


class DocumentDamagedError(DocumentError):
    """The store holds a record that is not one of our documents; it was left as it is."""


class ValueTooLargeError(DocumentRefusedError):
    """The application gave a value above the configured size; nothing was written."""
