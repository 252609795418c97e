"""One visitor, as his session remembers him: who he is, his CSRF token, what to tell him on the next page."""

from __future__ import annotations

import hmac
import secrets
from typing import Any

__all__ = ["Visitor"]

ADDRESS = "address"
TOKEN = "csrf_token"  # noqa: S105 - a name, no secret
NOTICES = "notices"


class Visitor:
    """Wraps the session that Beaker has put into the WSGI environment; a visitor without one costs no record."""

    def __init__(self, session: Any) -> None:
        self._session = session

    @property
    def address(self) -> str | None:
        """The mail address that he has proved to be his; None until he has signed in."""
        address = self._session.get(ADDRESS)
        return None if address is None else str(address)

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
        that a request that an outage breaks off can be repeated (`beaker_statestore.websession.StateSession`).
        """
        self._session.clear()
        self._session.regenerate_id()
        self._session[ADDRESS] = address
        self._session.save()

    def sign_out(self) -> None:
        """Forget him; whoever still has the old cookie gets nothing for it."""
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
