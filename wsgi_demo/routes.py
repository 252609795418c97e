"""Which view answers which request."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from webob.exc import HTTPMethodNotAllowed, HTTPNotFound

__all__ = ["Routes"]

View = Callable[[Any], Any]


class Routes:
    """A table of views by path pattern and method; it is filled by decorators."""

    def __init__(self, *others: Routes) -> None:
        """:param others: tables to start with."""
        self._table: dict[str, dict[str, View]] = {}
        for other in others:
            self._table.update(other._table)

    def get(self, pattern: str) -> Callable[[View], View]:
        """Have the decorated view answer GET (and so HEAD) for paths that match ``pattern`` as a whole."""
        return self._add(pattern, "GET")

    def post(self, pattern: str) -> Callable[[View], View]:
        """The same for POST."""
        return self._add(pattern, "POST")

    def find(self, method: str, path: str) -> tuple[View, Mapping[str, str]]:
        """The view, and what ``path`` has in the places of the pattern's named groups.

        :raises HTTPNotFound: there is no such path.
        :raises HTTPMethodNotAllowed: there is, but not for ``method``.
        """
        for pattern, views in self._table.items():
            if match := re.fullmatch(pattern, path):
                view = views.get("GET" if method == "HEAD" else method)
                if view is None:
                    allowed = ["HEAD", *views] if "GET" in views else list(views)
                    raise HTTPMethodNotAllowed(headers=[("Allow", ", ".join(allowed))])
                return view, match.groupdict()
        raise HTTPNotFound

    def _add(self, pattern: str, method: str) -> Callable[[View], View]:
        def decorate(view: View) -> View:
            self._table.setdefault(pattern, {})[method] = view
            return view

        return decorate
