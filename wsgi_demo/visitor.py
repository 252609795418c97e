"""One visitor, as his session remembers him: who he is, his CSRF token, what to tell him on the next page.

Beside it there is his slate, for what has another life than a session: see `beaker_statestore.slates`.
"""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Mapping
from typing import Any

from beaker_statestore.slates import Slate

__all__ = ["ADDRESS", "Visitor"]

#: Under which key a session says whose it is; `beaker.session.index` names it, too.
ADDRESS = "address"
TOKEN = "csrf_token"  # noqa: S105 - a name, no secret
NOTICES = "notices"


class Visitor:
    """Wraps the session that Beaker has put into the WSGI environment; a visitor without one costs no record."""

    def __init__(self, environ: Mapping[str, Any]) -> None:
        """:param environ: with what `beaker_statestore.websession` and `beaker_statestore.slatesession` put there."""
        self._environ = environ
        self._session = environ["beaker.session"]
        self._login = environ["slates.login"]

    @property
    def address(self) -> str | None:
        """The mail address that he has proved to be his; None until he has signed in.

        Two cookies say who he is, and only what both say counts: so to end one of them is enough to sign him out, and
        to plant one is not enough to sign him in.
        """
        address = self._session.get(ADDRESS)
        return None if address is None or address != self._login.user else str(address)

    @property
    def slate(self) -> Slate | None:
        """What is kept of him for longer than a session; None until he has signed in."""
        slate: Slate | None = self._environ["slates.user"]
        return None if self.address is None else slate

    @property
    def token(self) -> str | None:
        """What every form has to bring back, to show that it came from one of our pages in this session.

        None until there has been a form.
        """
        token = self._session.get(TOKEN)
        return None if token is None else str(token)

    def make_token(self) -> str:
        """The `token` for a form; the first one makes the session one that is stored."""
        if self.token is None:
            self._session[TOKEN] = secrets.token_urlsafe(24)
            self._session.save()
        return str(self.token)

    def owns(self, token: str) -> bool:
        """Whether ``token`` is this session's."""
        return self.token is not None and hmac.compare_digest(self.token.encode(), token.encode())

    def sign_in(self, address: str) -> None:
        """Make him the owner of ``address``, under a new session id: somebody may have planted the old one.

        Nothing that the old session had is in the new one; and the old one ends only once the new one is stored, so
        that a request that an outage breaks off can be repeated (`beaker_statestore.websession.StateSession`). So the
        login token comes first.
        """
        slate = self._login.sign_in(address)
        with slate.edit("user") as user:
            user["last_here"] = user.get("here")
            user["here"] = time.time()
        self._session.clear()
        self._session.regenerate_id()
        self._session[ADDRESS] = address
        self._session.save()

    def sign_out(self) -> None:
        """Forget him; whoever still has the old cookies gets nothing for them."""
        # The session last: without its token this could not be asked for again.
        self._login.sign_out()
        self._session.delete()

    def tell(self, notice: str) -> None:
        """Have the next page say ``notice``."""
        self._session[NOTICES] = [*self._session.get(NOTICES, ()), notice]
        self._session.save()

    def notices(self) -> list[str]:
        """What to tell him now; asked again, there is nothing left to tell."""
        notices: list[str] = self._session.pop(NOTICES, [])
        if notices:
            self._session.save()
        return notices
