"""``statestore stats``: what a server has to tell about itself, once or over and over."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from beaker_statestore.console import Output, Seconds, configured_store, output_option, store_options
from beaker_statestore.exceptions import ConfigurationError, StateStoreError, StoreUnavailable
from beaker_statestore.settings import Settings
from beaker_statestore.stores.tyrant import TyrantStore
from beaker_statestore.stores.urls import redacted
from beaker_statestore.tyrant.client import MissingFunctionError

__all__ = ["stats"]

#: Seconds between looks where nobody says.
_INTERVAL: Final = 2.0
#: A name and its value want so many columns of the terminal.
_PAIR: Final = 46
#: Figures that are as they are and do not grow, so that their rates tell nothing.
_STATES: Final = frozenset(
    {
        "Connections",
        "Connections at Most",
        "Connections Idle",
        "Connections Open",
        "Memory Held (Bytes)",
        "Pool Size",
        "Process ID",
        "Records",
        "Size of Store (Bytes)",
        "Threads Waiting",
        "Waiting",
    }
)
#: Figures that are times, in epoch seconds.
_TIMES: Final = frozenset({"Last Sweep", "Start Time", "When"})
#: Ends of the names of figures whose unit stands with the value when people read it.
_SECONDS: Final = " (Seconds)"
_BYTES: Final = " (Bytes)"

Namespaces = Mapping[str, Mapping[str, Any]]


@click.command()
@click.argument("where", required=False, metavar="[URL|INI]")
@store_options
@click.option(
    "--watch",
    is_flag=False,
    flag_value=_INTERVAL,
    type=Seconds(min_open=True),
    metavar="[SECONDS]",
    help=f"Look again every so often, until Ctrl-C, and tell rates.  [default: {_INTERVAL:g}]",
)
@output_option
def stats(settings: Settings, output: Output, watch: float | None) -> None:
    """Tell how a server is doing: its clients, requests, waits, batches, store and sweeps.

    URL is the server's, and INI the application's file. The server has to be `statestore serve`. As JSON, each look is
    one line: namespaces, in them figures and collections of records, as in Python's `logging.statistics`.
    """
    store = configured_store(settings)
    if not isinstance(store, TyrantStore):
        store.close()
        raise ConfigurationError(
            f"{redacted(settings.url)} is no server, and only a server keeps statistics of its own: give the address "
            "of a `statestore serve`"
        )
    with store, contextlib.suppress(KeyboardInterrupt):
        if watch is None:
            _show(output, _look(store), Console(highlight=False))
        else:
            _watch(store, output, watch)


def _look(store: TyrantStore) -> Namespaces:
    try:
        text = store.statistics()
    except MissingFunctionError as error:
        raise ConfigurationError(
            f"{store!r} is an original ttserver or an older `statestore serve`, which keep no statistics: start one of "
            "this version in its place"
        ) from error
    try:
        found = json.loads(text)
        return {str(name): dict(namespace) for name, namespace in found.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StateStoreError(f"{store!r} answered statistics that are none: {error}") from error


def _show(output: Output, namespaces: Namespaces, console: Console) -> None:
    if output.as_json:
        output.value(namespaces)
    else:
        console.print(_report(namespaces, None, console.width))


def _watch(store: TyrantStore, output: Output, interval: float) -> None:
    console = Console(highlight=False)
    if output.as_json or not console.is_terminal:
        while True:
            _show(output, _look(store), console)
            time.sleep(interval)
    with Live(console=console, screen=True, auto_refresh=False) as live:
        shown: RenderableType = ""
        before: _Look | None = None
        while True:
            try:
                look = _Look(_look(store), before)
                shown, before = _report(look.namespaces, look, console.width), look
                head = f"{time.strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends it"
            except StoreUnavailable as error:
                head = f"{time.strftime('%H:%M:%S')}: {error}"
            live.update(Group(_text(head, "dim"), shown), refresh=True)
            time.sleep(interval)


class _Look:
    """What there was to see at a moment, and how fast it grows."""

    def __init__(self, namespaces: Namespaces, before: _Look | None) -> None:
        self.namespaces = namespaces
        self.at = time.monotonic()
        self._before = None if before is None else before.namespaces
        self._seconds = 0.0 if before is None else self.at - before.at

    def rate(self, *path: str) -> str:
        """By how much a second the figure at ``path`` has grown since the look before; nothing if it has not."""
        now, then = _at(self.namespaces, path), _at(self._before, path)
        whole = all(isinstance(figure, int) and not isinstance(figure, bool) for figure in (now, then))
        if not whole or now <= then or path[-1] in _STATES:
            return ""
        each = (now - then) / self._seconds
        return f" +{_number(each)}/s" if not _counts_bytes(path[-1]) else f" +{_size(each)}/s"


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


# -- for people


def _report(namespaces: Namespaces, look: _Look | None, width: int) -> RenderableType:
    parts: list[RenderableType] = []
    for name, namespace in namespaces.items():
        parts += [_text(name, "bold"), Padding(_scalars(name, namespace, look, width), (0, 0, 0, 2))]
        for heading, records in _collections(namespace):
            parts += ["", Padding(_text(heading, "italic"), (0, 0, 0, 2))]
            parts.append(Padding(_records((name, heading), records, look), (0, 0, 0, 2)))
        parts.append("")
    return Group(*parts[:-1])


def _scalars(name: str, namespace: Mapping[str, Any], look: _Look | None, width: int) -> Table:
    """All figures, downwards in as many columns as there is room for."""
    figures = [(title, value) for title, value in namespace.items() if not isinstance(value, (dict, list))]
    columns = max(1, (width - 2) // _PAIR)
    rows = -(-len(figures) // columns)
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
    for row in range(rows):
        cells: list[Text] = []
        for title, value in figures[row::rows]:
            rate = look.rate(name, title) if look is not None else ""
            cells += [_text(_titled(title), "dim"), _text(_value(title, value)).append(rate, "green")]
        table.add_row(*cells)
    return table


def _collections(namespace: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
    for heading, found in namespace.items():
        if isinstance(found, list):
            found = dict(enumerate(found, 1))
        if isinstance(found, dict):
            records: dict[str, Mapping[str, Any]] = {str(n): r for n, r in found.items() if isinstance(r, dict)}
            if records:
                yield heading, records


def _records(path: tuple[str, str], records: dict[str, Mapping[str, Any]], look: _Look | None) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("")
    columns = []
    for title in dict.fromkeys(title for record in records.values() for title in record):
        values = [_text(_value(title, record[title]) if title in record else "") for record in records.values()]
        numbers = all(isinstance(record.get(title, 0), (int, float)) for record in records.values())
        right = numbers and title not in _TIMES
        table.add_column(_text(_titled(title)), justify="right" if right else "left", overflow="fold")
        columns.append(values)
        rates = [look.rate(*path, name, title) if look is not None else "" for name in records]
        if any(rates):
            table.add_column("", no_wrap=True)
            columns.append([_text(rate.lstrip(), "green") for rate in rates])
    for name, *cells in zip(records, *columns, strict=True):
        table.add_row(_text(name), *cells)
    return table


def _titled(title: str) -> str:
    return title.removesuffix(_SECONDS).removesuffix(_BYTES)


def _text(text: str, style: str = "") -> Text:
    """``text``, which comes from who knows whom, as nothing that a terminal obeys."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in text), style=style)


def _value(title: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else "yes" if value is True else "no" if value is False else str(value)
    if title in _TIMES:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(value))
    if title.endswith(_SECONDS):
        return _period(value)
    if title == "Process ID":
        return str(value)
    return _size(value) if _counts_bytes(title) else _number(value)


def _counts_bytes(title: str) -> bool:
    return title.startswith("Bytes ") or title.endswith(_BYTES)


def _number(number: float) -> str:
    if isinstance(number, int) or number >= 100:
        return f"{number:,.0f}"
    return f"{number:.3g}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _period(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
