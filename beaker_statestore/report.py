"""``logging.statistics`` as a web page, as JSON and for Prometheus: a WSGI application.

    from beaker_statestore import report, statistics
    statistics.install()
    app = report.make_app()

It shows what all packages of the process keep there, and who may open it may pause their counting: mount it behind
access control. The links on the page are relative, so it can be mounted anywhere.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import json
import logging
import posixpath
import time
from collections.abc import Callable, Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote, urlsplit

from webob import Request, Response

from beaker_statestore.exceptions import ConfigurationError, MissingDriverError
from beaker_statestore.statistics import EVENTS, GAUGES, extrapolate_statistics, jsonable, own

if TYPE_CHECKING:
    from prometheus_client import Metric

__all__ = ["make_app"]

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

#: Of `statistics.Totals`, what Prometheus gets as a counter.
_COUNTERS: Final = {
    "hits": "records that were asked for and there",
    "misses": "records that were asked for and not there",
    "errors": "operations that failed",
    "retries": "operations that were sent again",
    "sent_bytes": "bytes of requests",
    "received_bytes": "bytes of replies",
}
#: A page with more rows than this in one table helps nobody; JSON has them all.
MOST_ROWS: Final = 1000
MOST_COLUMNS: Final = 50

_STYLE: Final = """
:root { color-scheme: light dark; --line: #c9ced6; --quiet: #586069; --back: #fff; --card: #f5f7f9; --text: #1b1f24;
  --press: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --line: #3c444d; --quiet: #9aa4af; --back: #14181d; --card: #1d232a; --text: #e6e9ec; --press: #8cc2ff; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1.25rem 3rem; max-width: 84rem; background: var(--back); color: var(--text);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0.5rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 0; overflow-wrap: anywhere; }
a { color: var(--press); }
nav { display: flex; flex-wrap: wrap; gap: 0.25rem 1.25rem; color: var(--quiet); }
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 0.5rem 1rem; margin: 2rem 0 0.75rem; }
button { font: inherit; min-height: 2rem; padding: 0 0.9rem; border: 1px solid var(--press); border-radius: 0.4rem;
  background: var(--back); color: var(--press); cursor: pointer; }
button:focus-visible, a:focus-visible, .wide:focus-visible { outline: 2px solid var(--press); outline-offset: 2px; }
dl { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: 0 2rem; margin: 0; }
dl div { display: flex; justify-content: space-between; gap: 1rem; padding: 0.2rem 0;
  border-bottom: 1px solid var(--line); }
dt, dd { overflow-wrap: anywhere; min-width: 0; }
dt { color: var(--quiet); }
dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; }
.none { color: var(--quiet); }
.wide { overflow-x: auto; margin-top: 1.5rem; }
table { border-collapse: collapse; min-width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.25rem; }
th, td { padding: 0.25rem 0.75rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
thead th { background: var(--card); font-weight: 600; white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 400; }
.number { text-align: right; }
@media (max-width: 60rem) { dl { grid-template-columns: repeat(2, minmax(0, 1fr)); } }
@media (max-width: 38rem) { dl { grid-template-columns: minmax(0, 1fr); } }
"""
_STYLE_HASH: Final = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; frame-ancestors 'none'; "
        "base-uri 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def make_app(*, title: str = "Statistics", hosts: Iterable[str] | None = ()) -> Application:
    """A WSGI application that reports the statistics of this process.

    ``GET /`` is a page, ``GET /data`` the same as JSON, ``GET /metrics`` what of it is ours as Prometheus reads it
    (with the extra ``metrics``), and ``POST /pause`` and ``POST /resume`` stop and restart the counting of the
    namespace that the form's field ``namespace`` names, by its ``Enabled``.

    A request to another ``Host`` than the application's own is refused: it is how a page of any site, whose name its
    owner lets stand for this address, would read the report through a browser that can reach it (DNS rebinding).

    :param title: of the page.
    :param hosts: besides ``localhost`` and addresses in digits, which nobody can rebind, the names, without ports, by
        which browsers come; None: any. That is safe behind access control by cookies or passwords, which browsers send
        to no other name, and not behind one by addresses, or none.
    """
    if isinstance(hosts, str):
        raise ConfigurationError(f"hosts is {hosts!r}: give a list of names, such as [{hosts!r}]")
    admitted = None if hosts is None else frozenset(host.lower().strip("[]") for host in hosts)
    pages: dict[str, tuple[str, Callable[[Request], Response]]] = {
        "/": ("GET", lambda _: _page(title)),
        "/data": ("GET", lambda _: _data()),
        "/metrics": ("GET", _metrics),
        "/pause": ("POST", lambda request: _switch(request, on=False)),
        "/resume": ("POST", lambda request: _switch(request, on=True)),
    }

    def respond(request: Request) -> Response:
        try:
            path, mount = request.path_info, request.script_name
            host = _host(request)
        except ValueError as error:
            return _plain(400, f"The request cannot be read: {error}.")
        if not (host is None or admitted is None or host in admitted or _means_itself(host)):
            return _plain(403, "The report is not at this host; if it is to be, name it in make_app(hosts=...).")
        if not path and mount and not mount.endswith("/"):
            # So that relative links lead to what is below.
            return Response(status=308, location=quote(posixpath.basename(mount)) + "/")
        if (path or "/") not in pages:
            return _plain(404, "There is no such page.")
        method, page = pages[path or "/"]
        allowed = ("GET", "HEAD") if method == "GET" else (method,)
        if request.method not in allowed:
            response = _plain(405, f"This takes {' or '.join(allowed)}.")
            response.allow = allowed
            return response
        return page(request)

    def app(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        response = respond(Request(environ))
        response.headers.update(_HEADERS)
        # Not called as WSGI applications are: WebOb would make the Location absolute, by a Host that may be a proxy's.
        start_response(response.status, response.headerlist)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else response.app_iter

    return app


def _host(request: Request) -> str | None:
    """The host that was asked for; every browser says which.

    :raises ValueError: it is none.
    """
    authority = request.headers.get("Host")
    return None if authority is None else urlsplit(f"//{authority}").hostname or ""


def _means_itself(host: str) -> bool:
    """Whether nobody can let this host stand for another."""
    try:
        return host == "localhost" or bool(ipaddress.ip_address(host))
    except ValueError:
        return False


def _plain(status: int, text: str) -> Response:
    return Response(status=status, text=f"{text}\n", content_type="text/plain", charset="UTF-8")


def _everything() -> dict[str, Any]:
    everything: dict[str, Any] = jsonable(extrapolate_statistics(_root()))
    return everything


def _root() -> dict[Any, Any]:
    root = getattr(logging, "statistics", None)
    return root if isinstance(root, dict) else {}


def _data() -> Response:
    text = json.dumps(_everything(), sort_keys=True, indent=1, allow_nan=False)
    return Response(text=text, content_type="application/json", charset="UTF-8")


# -- pause and resume


def _switch(request: Request, *, on: bool) -> Response:
    try:
        if _is_cross_site(request):
            return _plain(403, "Another site's page has sent this.")
        name = request.POST.get("namespace")
    except Exception as error:  # noqa: BLE001 - WebOb says by errors of many kinds what is wrong with a form
        return _plain(400, f"The request cannot be read: {error}.")
    for key, namespace in _root().copy().items():
        if str(key) == name and isinstance(namespace, dict) and "Enabled" in namespace:
            namespace["Enabled"] = on
            return Response(status=303, location="./")
    return _plain(404, "There is no namespace of that name whose counting can be paused.")


def _is_cross_site(request: Request) -> bool:
    """Whether a browser says that the form is not from this page.

    By Sec-Fetch-Site (Fetch Metadata), which a proxy leaves alone; where it is not sent, because the page did not come
    by TLS, by Origin (Fetch standard, 3.2), which browsers add to each POST. Other clients send neither.
    """
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None:
        return site not in ("same-origin", "none")
    origin = request.headers.get("Origin")
    return origin is not None and urlsplit(origin).netloc != request.host


# -- the page


def _page(title: str) -> Response:
    everything = _everything()
    sections = "".join(_section(name, namespace) for name, namespace in sorted(everything.items()))
    nothing = "<p>Nobody keeps statistics in this process: <code>logging.statistics</code> is empty.</p>"
    html = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<header>
<h1>{escape(title)}</h1>
<nav aria-label="Other forms"><span>{_moment(time.time())}</span> <a href="./">Refresh</a> <a href="data">JSON</a>
<a href="metrics">Prometheus</a></nav>
</header>
<main>
{sections or nothing}</main>
</body>
</html>
"""
    # What cannot be encoded, half a surrogate pair, is nothing that a page could show.
    return Response(body=html.encode(errors="replace"), content_type="text/html", charset="UTF-8")


def _section(name: str, namespace: Any) -> str:
    if not isinstance(namespace, dict):
        namespace = {"Value": namespace}
    scalars = {key: value for key, value in namespace.items() if not _is_collection(value)}
    collections = {key: value for key, value in namespace.items() if _is_collection(value)}
    pairs = "".join(
        f"<div><dt>{escape(key)}</dt><dd{_class(value)}>{_shown(key, value)}</dd></div>\n"
        for key, value in scalars.items()
    )
    button = _button(name, bool(namespace["Enabled"])) if "Enabled" in namespace else ""
    tables = "".join(_table(key, value) for key, value in collections.items())
    return (
        f'<section>\n<div class="head"><h2>{escape(name)}</h2>{button}</div>\n'
        f"{f'<dl>{pairs}</dl>' if pairs else ''}\n{tables}</section>\n"
    )


def _button(name: str, enabled: bool) -> str:
    action, label = ("pause", "Pause") if enabled else ("resume", "Resume")
    return (
        f'<form method="post" action="{action}"><input type="hidden" name="namespace" value="{escape(name)}">'
        f'<button aria-label="{label} {escape(name)}">{label}</button></form>'
    )


def _is_collection(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(isinstance(member, dict) for member in value)
    return isinstance(value, dict)


def _table(name: str, collection: Any) -> str:
    records = collection if isinstance(collection, dict) else dict(enumerate(collection))
    rows = {str(key): row if isinstance(row, dict) else {"Value": row} for key, row in records.items()}
    heading = f"<caption>{escape(name)}{'' if rows else ': none'}</caption>"
    if not rows:
        return f'<div class="wide"><table>{heading}</table></div>\n'
    every = list(dict.fromkeys(column for row in rows.values() for column in row))
    columns = every[:MOST_COLUMNS]
    numeric = {
        c for c in columns if all(_is_number(row[c]) and not _is_moment(c, row[c]) for row in rows.values() if c in row)
    }
    mark = {column: ' class="number"' if column in numeric else "" for column in columns}
    head = "".join(f'<th scope="col"{mark[column]}>{escape(column)}</th>' for column in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(key)}</th>'
        + "".join(f"<td{mark[c]}>{_cell(c, row)}</td>" for c in columns)
        + "</tr>\n"
        for key, row in list(rows.items())[:MOST_ROWS]
    )
    left_out = [
        f"{there - shown:,} more {what}"
        for there, shown, what in ((len(rows), MOST_ROWS, "rows"), (len(every), MOST_COLUMNS, "columns"))
        if there > shown
    ]
    more = f'<p>{" and ".join(left_out)} are in <a href="data">JSON</a>.</p>' if left_out else ""
    return (
        f'<div class="wide" role="region" aria-label="{escape(name)}" tabindex="0"><table>{heading}\n'
        f'<thead><tr><th scope="col">Id</th>{head}</tr></thead>\n<tbody>\n{body}</tbody></table></div>{more}\n'
    )


def _cell(column: str, row: dict[str, Any]) -> str:
    if column not in row:
        return ""
    text = _shown(column, row[column])
    return f"<span{_class(row[column])}>{text}</span>" if _class(row[column]) else text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_moment(name: str, value: Any) -> bool:
    """Whether it is a time in epoch seconds, which statistics have as floats."""
    return isinstance(value, float) and value > 1e8 and ("Time" in name or "When" in name)


def _moment(seconds: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g}"


def _class(value: Any) -> str:
    return ' class="none"' if value in (0, None, "") and value is not False else ""


def _shown(name: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if _is_moment(name, value):
        return _moment(value)
    if isinstance(value, int):
        # No thousands where it is a name.
        return str(value) if name.endswith("ID") else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4f}".rstrip("0").rstrip(".")
    return escape(value if isinstance(value, str) else json.dumps(value, sort_keys=True))


# -- Prometheus


def _metrics(request: Request) -> Response:
    try:
        body, content_type = prometheus(request.headers.get("Accept", ""))
    except MissingDriverError as error:
        return _plain(501, f"{error}.")
    response = Response(body=body)
    response.headers["Content-Type"] = content_type
    return response


def prometheus(accept: str = "") -> tuple[bytes, str]:
    """Our own statistics as Prometheus reads them, and the type of that text.

    :param accept: what the reader's header of this name says it prefers.
    :raises MissingDriverError: prometheus-client is not installed.
    """
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
    except ImportError:
        raise MissingDriverError(
            'metrics for Prometheus need a package that is not installed: pip install "beaker-statestore[metrics]"'
        ) from None
    registry = CollectorRegistry()
    registry.register(_Families())
    try:
        encode, content_type = choose_encoder(accept)
    except Exception:  # noqa: BLE001 - it trips over versions that are none; whatever was meant, all read the default
        encode, content_type = choose_encoder("")
    return encode(registry), content_type


def _utf8(label: str) -> str:
    return label.encode(errors="backslashreplace").decode()


class _Families:
    """A collector for prometheus-client. The names are of the form that its manual asks for (Naming)."""

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        labels = ["server", "kind"]
        latency = HistogramMetricFamily(
            "beaker_statestore_operation_seconds", "How long operations took, the failed ones included.", labels=labels
        )
        counters = {
            name: CounterMetricFamily(f"beaker_statestore_{name}", f"{meaning}.", labels=labels)
            for name, meaning in _COUNTERS.items()
        }
        for (server, kind), totals in own.totals().items():
            key = (_utf8(server), _utf8(kind))
            buckets = [(repr(seconds), float(n)) for seconds, n in totals.cumulative()]
            latency.add_metric(key, [*buckets, ("+Inf", float(totals.count))], totals.seconds)
            for name, counter in counters.items():
                counter.add_metric(key, getattr(totals, name.removesuffix("_bytes")))
        yield latency
        yield from counters.values()
        states = own.gauges()
        for name, figure in GAUGES.items():
            gauge = GaugeMetricFamily(f"beaker_statestore_pool_{name}", f"{figure.meaning}.", labels=["server"])
            for server, state in sorted(states.items()):
                gauge.add_metric([_utf8(server)], state.get(name, 0))
            yield gauge
        others = CounterMetricFamily("beaker_statestore_events", "Whatever else has happened.", labels=["event"])
        for name, n in own.events().items():
            if name in EVENTS:
                metric = f"beaker_statestore_{name.replace('.', '_')}"
                yield CounterMetricFamily(metric, f"{EVENTS[name].meaning}.", value=n)
            else:
                others.add_metric([_utf8(name)], n)
        yield others
