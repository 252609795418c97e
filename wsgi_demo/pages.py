"""HTML out of templates, and the headers that keep browsers careful with it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape
from webob import Response

__all__ = ["HEADERS", "render", "stylesheet"]

#: For every answer. Our pages need no script, no frame and nothing from elsewhere; their addresses may hold secrets.
HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": "default-src 'none'; style-src 'self'; img-src data:; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
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


def stylesheet() -> Response:
    """The one static file; browsers keep it and ask whether it is still good."""
    content = files("wsgi_demo").joinpath("static/style.css").read_bytes()
    response = Response(content, content_type="text/css", charset="utf-8", cache_control="no-cache")
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


_templates.filters["with_links"] = _with_links
