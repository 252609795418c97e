"""HTML out of templates, and the headers that keep browsers careful with it."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape
from webob import Response

__all__ = ["HEADERS", "render", "static"]

#: For every answer. Our pages need no script but a file of ours, no frame and nothing from elsewhere; their addresses
#: may hold secrets.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; "
    "img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

_templates = jinja2.Environment(
    loader=jinja2.PackageLoader("wsgi_demo"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, status: int = 200, **values: Any) -> Response:
    """The page made of one template."""
    text = _templates.get_template(template).render(**values)
    return Response(text, status=status, content_type="text/html", charset="utf-8")


def static(name: str) -> Response:
    """A file of the directory ``static``; browsers keep it and ask whether it is still good."""
    content = (files("wsgi_demo") / "static" / name).read_bytes()
    kind = "text/javascript" if name.endswith(".js") else "text/css"
    response = Response(content, content_type=kind, charset="utf-8", cache_control="no-cache")
    response.md5_etag()
    response.conditional_response = True
    return response


def _with_links(text: str, base_url: str) -> Markup:
    """``text`` in which the addresses of our own pages can be clicked."""
    pieces = re.split(rf"({re.escape(base_url)}/\S*)", text)
    return Markup().join(
        Markup('<a href="{0}">{0}</a>').format(piece) if index % 2 else escape(piece)
        for index, piece in enumerate(pieces)
    )


def _time(at: float) -> str:
    """An epoch time by this machine's clock."""
    return time.strftime("%H:%M:%S", time.localtime(at))


_templates.filters["with_links"] = _with_links
_templates.filters["time"] = _time


def _last_here(user: Mapping[str, Any]) -> str:
    """When somebody signed in before this time, as his slate's document ``user`` says."""
    before = user.get("last_here")
    return (
        "here for the first time"
        if before is None
        else time.strftime("last here %d %b %Y, %H:%M UTC", time.gmtime(before))
    )


_templates.filters["last_here"] = _last_here
