"""Somebody whose one session is opened again and again, as Beaker does for each request."""

from __future__ import annotations

import uuid
from typing import Any, TypeVar

from beaker.session import Session

__all__ = ["Visitor"]

V = TypeVar("V", bound="Visitor")


class Visitor:
    """Opens one session as often as wanted, each time as Beaker does for a new request."""

    def __init__(self, options: dict[str, Any], **session_options: Any) -> None:
        self.id = uuid.uuid4().hex
        self.options = {"type": "ext:tcjson", "use_cookies": False, **options, **session_options}

    @property
    def record(self) -> bytes:
        """The record key of the session."""
        return f"{self.options.get('prefix', '')}session:{self.id}".encode()

    def request(self, **changed: Any) -> Session:
        return Session({}, id=self.id, **{**self.options, **changed})

    def saves(self, **data: Any) -> None:
        session = self.request()
        session.update(data)
        session.save()

    def starts_with(self: V, **data: Any) -> V:
        self.saves(**data)
        return self

    def leaves(self) -> None:
        session = self.request()
        session.delete()
        session.save()

    def sees(self, **changed: Any) -> dict[str, Any]:
        return {name: value for name, value in self.request(**changed).items() if not name.startswith("_")}
