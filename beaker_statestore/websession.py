"""Beaker's sessions for WSGI applications: ids that end when they should, and honest answers when the store fails.

Stock Beaker takes any id that a client sends, and leaves the old record behind when a session gets a new id or ends;
`StateSession` does neither. Stock Beaker answers an outage with whatever the server makes of an exception, mostly a
500. The filter here makes it a 503 with Retry-After, also when the store failed only at the end of the request, in
start_response, where Beaker saves. It must never know an engine or a socket.
"""

from __future__ import annotations

import logging
import pkgutil
import time
import warnings
from collections.abc import Mapping
from typing import Any

from beaker.exceptions import BeakerWarning
from beaker.middleware import SessionMiddleware
from beaker.session import Session

from beaker_statestore.codec import DocumentCodec
from beaker_statestore.documents import ACCESSED, CREATED
from beaker_statestore.exceptions import ConfigurationError, SessionMoved, SessionUnavailable
from beaker_statestore.keys import SESSION_KEY, is_session_id
from beaker_statestore.namespace import (
    DAMAGE,
    TCJSONNamespaceManager,
    require_authenticating_cipher,
    warn_without_timeout,
)
from beaker_statestore.sessionrecord import CONFIGURATION
from beaker_statestore.settings import SESSION_PREFIXES, Settings, session_options
from beaker_statestore.stores import open_store
from beaker_statestore.webanswers import OutageFilter, WSGIApplication

__all__ = ["OutageFilter", "StateSession", "filter_app_factory", "make_filter"]

log = logging.getLogger(__name__)


class StateSession(Session):
    """Beaker's session, and an id is good only as long as it should be.

    - An id that a client sends and that no record has is replaced by a fresh one. Nothing is stored for it, and no
      cookie sent, before the session is saved.
    - After `regenerate_id` and a save the old id is no good any more; what other requests have done under it
      meanwhile is kept, and if one of them has ended the session, it stays ended.
    - `invalidate` and `delete` remove the record at once, whether the session is saved afterwards or not.

    An id that the application itself chooses (``id=``) is left as it is. With another type than ``ext:tcjson`` all is
    as in Beaker. Parameters are Beaker's; methods raise `StoreUnavailable` when the store fails.
    """

    cookie_expires: Any

    def __init__(self, request: dict[str, Any], id: str | None = None, **options: Any) -> None:  # noqa: A002 - Beaker's
        self._id_is_given = bool(id)
        self._id_was_renewed = False
        # Beaker itself calls `invalidate`: within a load, for a session that has timed out; and in its __init__ after
        # a load that failed, for whatever reason.
        self._is_loading = False
        self._is_opening = True
        super().__init__(request, id=id, **options)
        self._is_opening = False

    def load(self) -> None:
        """Load the session, or begin a new one if there is none."""
        if not self._is_ours:
            super().load()
            return
        if not self._id_is_given and not is_session_id(self.id):
            # Beaker cannot have made it, so there is nothing to look for.
            self._begin()
            return
        wanted = self.id
        self._is_loading = True
        try:
            super().load()
        finally:
            self._is_loading = False
        if self.is_new and self.id == wanted and not self._id_is_given:
            self._begin()

    def save(self, accessed_only: bool = False) -> None:
        """Store the session; if it got a new id, under that one, and remove the old record.

        :param accessed_only: as in Beaker: what the application has changed is not to be saved.
        :raises SessionMoved: the session has got its new id, and whether the old one is still good is unknown.
        """
        if not self._is_ours:
            super().save(accessed_only)
            return
        manager = self._manager
        if accessed_only:
            if manager is None or not self.save_atime:
                return
        elif self.keys() <= CONFIGURATION:
            # Whatever the form at rest: nobody could tell that an enciphered one is empty.
            self._remove()
            return
        elif manager is None and not self.is_new:
            # What was deleted stays deleted, and what is said after a good-bye is said to somebody new.
            self._create_id()
        if manager is not None and manager.namespace != self.id:
            manager.renew(self.id)
        try:
            # Beaker takes a new session for one without a record, although it may have been saved in this request.
            super().save(accessed_only and not (self._id_was_renewed and self.is_new))
        except SessionMoved as error:
            error.cookie = self.request.get("cookie_out")
            raise
        if self._id_was_renewed and self.use_cookies:
            # If somebody has ended the session meanwhile, or renewed its id, too, the visitor has that answer's cookie.
            self.request["set_cookie"] = self.namespace.is_stored

    def regenerate_id(self) -> None:
        """Have the session saved under a new id, as it should be whenever somebody signs in.

        The visitor gets the new id, and the old one ends, when the session is saved. Beaker's middleware does so at
        the end of every request that has used the session, unless ``save_accessed_time`` is false.
        """
        super().regenerate_id()
        if self._is_ours:
            self._id_was_renewed = True
            if self.use_cookies:
                self.request["set_cookie"] = False

    def invalidate(self) -> None:
        """End the session at once, and begin a new one."""
        if not self._is_ours or (self._is_opening and not self._is_loading):
            # After a load that failed. A damaged record may be wanted as evidence, so it is left as it is; and Beaker
            # loads once more, which tells damage from an outage (`TCJSONNamespaceManager`).
            super().invalidate()
            return
        if self._is_loading:
            self.namespace.discard()
        else:
            self._remove()
        self.was_invalidated = True
        self._begin()

    def delete(self) -> None:
        """End the session at once, and have the browser forget its id."""
        if not self._is_ours:
            super().delete()
            return
        self._remove()
        # Beaker would give the expiry in the past to any later cookie as well.
        cookie_expires = self.cookie_expires
        super().delete()
        self.cookie_expires = cookie_expires

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the session: between `regenerate_id` and the save that follows there are two."""
        stored = set() if self._manager is None else {str(self._manager.namespace)}
        return frozenset({str(self.id), *stored})

    @property
    def _is_ours(self) -> bool:
        return isinstance(self.namespace_class, type) and issubclass(self.namespace_class, TCJSONNamespaceManager)

    @property
    def _manager(self) -> TCJSONNamespaceManager | None:
        """The manager of the record that the session was loaded from or stored in; None if it has no record."""
        return getattr(self, "namespace", None)

    def _remove(self) -> None:
        if self._manager is not None:
            del self.namespace[SESSION_KEY]
            del self.namespace

    def _begin(self) -> None:
        """Be a new session, under a fresh id, that has no record."""
        self.clear()
        self._create_id()
        self[ACCESSED] = self[CREATED] = time.time()
        self.accessed_dict = self.copy()
        if self._manager is not None:
            del self.namespace


def make_filter(app: WSGIApplication, settings: Mapping[str, Any]) -> WSGIApplication:
    """``app`` with a `StateSession` in ``environ["beaker.session"]``, and a 503 when the store fails.

    :param settings: an application's settings, of which the ``beaker.session.*`` are used; as the type,
        ``ext:tcjson`` is the default, and the options of another are left to Beaker. With ``session_class`` the
        application has its own class: the class, or ``package.module:Class``.
    :raises ConfigurationError: an option is wrong or missing, or contradicts another.
    """
    chosen = session_options(settings)
    if chosen.setdefault("type", "ext:tcjson") != "ext:tcjson":
        log.warning("beaker.session.type is %s: sessions are Beaker's own affair, and not in our store", chosen["type"])
        return OutageFilter(SessionMiddleware(app, _prefixed(chosen)))
    serializer = chosen.get("data_serializer", "pickle")
    if serializer in ("pickle", "json"):
        if chosen.get("serializer", serializer) != serializer:
            raise ConfigurationError(
                f"beaker.session.serializer is {chosen['serializer']!r}, but Beaker's data_serializer is "
                f"{serializer!r}: leave the first one out, it follows the other"
            )
        chosen["serializer"] = serializer
    # Whatever is wrong is better said when the application starts than to its first visitor.
    checked = Settings.from_options(chosen)
    _check_encryption(chosen, checked)
    chosen["session_class"] = _session_class(chosen.get("session_class"))
    open_store(checked.url, **checked.timing)
    DocumentCodec.of(checked)
    if not chosen.get("timeout"):
        warn_without_timeout(checked)
    _keep_session_ids_out_of_warnings()
    return OutageFilter(SessionMiddleware(app, _prefixed(chosen)))


def _prefixed(chosen: Mapping[str, Any]) -> dict[str, Any]:
    return {SESSION_PREFIXES[0] + name: value for name, value in chosen.items()}


def _check_encryption(chosen: Mapping[str, Any], checked: Settings) -> None:
    """:raises ConfigurationError: Beaker's ``encrypt_key`` is set, and would not protect what is stored."""
    if not chosen.get("encrypt_key"):
        return
    if chosen.get("crypto_type", "default") not in ("default", "cryptography"):
        raise ConfigurationError(
            f"beaker.session.crypto_type is {chosen['crypto_type']!r}, which enciphers sessions without authenticating "
            "them: whoever can write to the store could run code. Leave the option out, and pip install cryptography"
        )
    if not checked.encrypted:
        raise ConfigurationError(
            "beaker.session.encrypt_key is set, and sessions so enciphered cannot be merged: put beaker.session."
            "store_key in its place, which encrypts all that is stored and keeps the merge; or, if overlapping "
            "requests may lose each other's changes, add beaker.session.encrypted = true"
        )
    if not chosen.get("validate_key"):
        raise ConfigurationError(
            "beaker.session.encrypt_key needs another secret beside it: beaker.session.validate_key"
        )
    require_authenticating_cipher()


def _session_class(given: object) -> type[Session]:
    """The class of the sessions: the application's own if it has one."""
    if given in (None, ""):
        return StateSession
    try:
        found = pkgutil.resolve_name(given) if isinstance(given, str) else given
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"beaker.session.session_class is {given!r}, which cannot be imported ({error}): write package.module:Class"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Session)):
        raise ConfigurationError(
            f"beaker.session.session_class is {given!r}, which is no subclass of beaker.session.Session: leave it out, "
            "or derive the class from beaker_statestore.websession.StateSession"
        )
    return found


def filter_app_factory(app: WSGIApplication, global_conf: Mapping[str, Any], **local_conf: Any) -> WSGIApplication:
    """`make_filter` as PasteDeploy's ``paste.filter_app_factory``: ``use = egg:beaker-statestore#session``."""
    return make_filter(app, {**global_conf, **local_conf})


def _keep_session_ids_out_of_warnings() -> None:
    """Silence Beaker's warning about a load that met an outage or damage: it quotes the id, which may still be good.

    beaker.session.Session.__init__ issues it before its second load. Both are logged by us, without id.
    """
    message = rf"Invalidating corrupt session .*; error was: ({SessionUnavailable.PREFIX}|{DAMAGE})"
    warnings.filterwarnings("ignore", message, BeakerWarning)
