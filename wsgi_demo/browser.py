"""A browser small enough to read: it keeps cookies, follows redirects, and fills in forms. For `check`."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from html.parser import HTMLParser
from http.cookiejar import CookieJar
from typing import Any
from urllib.parse import urlencode, urljoin

__all__ = ["Browser", "Page"]

TIMEOUT = 10.0
#: Tags that have no end.
VOID = frozenset({"br", "hr", "img", "input", "link", "meta"})


@dataclass
class Button:
    """What a button says, and what it adds to the fields of its form."""

    fields: dict[str, str]
    words: str = ""


@dataclass
class Form:
    """A form: where it goes, what it has in its fields, and its buttons."""

    action: str
    fields: dict[str, str] = field(default_factory=dict)
    buttons: list[Button] = field(default_factory=list)


@dataclass
class Page:
    """What came back."""

    url: str
    status: int
    headers: Message
    forms: list[Form]
    #: The words, without the tags.
    text: str
    #: The words that the page marks as one's present state.
    state: str
    #: Where a script would get the events that concern the page; empty: nowhere.
    events: str

    def __str__(self) -> str:
        return f"{self.status} {self.text}"


class Browser:
    """One visitor's browser."""

    def __init__(self) -> None:
        self._opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))

    def open(self, url: str, fields: dict[str, str] | None = None) -> Page:
        """GET a page, or POST the fields of a form."""
        data = None if fields is None else urlencode(fields).encode()
        request = urllib.request.Request(url, data)  # noqa: S310 - only the demo's own addresses
        try:
            answer = self._opener.open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            reader = _Reader()
            reader.feed(answer.read().decode())
            text = " ".join("".join(reader.words).split())
            return Page(
                answer.url, answer.status, answer.headers, reader.forms, text, reader.state.strip(), reader.events
            )

    def press(self, page: Page, button: str, **fields: str) -> Page:
        """Fill in the form on ``page`` that has this button, and press it.

        :raises LookupError: there is no such button.
        """
        for form in page.forms:
            for candidate in form.buttons:
                if candidate.words.strip() == button:
                    return self.open(urljoin(page.url, form.action), {**form.fields, **candidate.fields, **fields})
        raise LookupError(f"no button {button!r} on the page {page.text!r}")

    @contextmanager
    def following(self, page: Page) -> Iterator[Iterator[Any]]:
        """The events that concern ``page``, as they come: what static/live.js would get.

        They end when the server ends them, or has been silent for `TIMEOUT` seconds (TimeoutError).
        """
        with self._opener.open(urljoin(page.url, page.events), timeout=TIMEOUT) as stream:
            lines = (line.decode() for line in stream)
            yield (json.loads(line.removeprefix("data:")) for line in lines if line.startswith("data:"))


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.forms: list[Form] = []
        self.words: list[str] = []
        self.state = ""
        self.events = ""
        self._open: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        if tag == "form":
            self.forms.append(Form(attributes.get("action") or ""))
        elif tag == "input" and self.forms and (attributes.get("type") != "checkbox" or "checked" in attributes):
            self.forms[-1].fields[attributes.get("name") or ""] = attributes.get("value") or ""
        elif tag == "button" and self.forms:
            name = attributes.get("name")
            self.forms[-1].buttons.append(Button({name: attributes.get("value") or ""} if name else {}))
        elif tag == "script":
            self.events = attributes.get("data-events") or ""
        if tag not in VOID:
            self._open.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        for tag, attributes in self._open[-1:]:
            if tag == "button" and self.forms:
                self.forms[-1].buttons[-1].words += data
            if "aria-current" in attributes or attributes.get("class") == "state":
                self.state += data
