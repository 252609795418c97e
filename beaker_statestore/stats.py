"""``statestore stats``: what a server has to tell about itself, once or over and over."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, Final, NamedTuple

import click
from rich.cells import cell_len
from rich.console import Console, Group, JustifyMethod, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from beaker_statestore.console import Output, Seconds, configured_store, output_option, store_options
from beaker_statestore.exceptions import ConfigurationError, StateStoreError, StoreUnavailable
from beaker_statestore.settings import Settings
from beaker_statestore.statistics import jsonable
from beaker_statestore.stores.tyrant import TyrantStore
from beaker_statestore.stores.urls import redacted
from beaker_statestore.tyrant.client import MissingFunctionError

__all__ = ["stats"]

#: Seconds between looks where nobody says.
_INTERVAL: Final = 2.0
#: A name and its value want so many columns of the terminal, and no name of a record gets more of it than this part.
_PAIR: Final = 39
_NAMES_PART: Final = 0.5
#: Between a column and the next.
_PADDING: Final = 2
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
@click.option("--watch", is_flag=True, help="Look again and again, until Ctrl-C, and tell rates.")
@click.option(
    "--every",
    type=Seconds(min_open=True),
    metavar="SECONDS",
    help=f"Watch, and look so often.  [default: {_INTERVAL:g}]",
)
@output_option
def stats(settings: Settings, output: Output, watch: bool, every: float | None) -> None:
    """Tell how a server is doing: its clients, requests, waits, batches, store and sweeps.

    URL is the server's, and INI the application's file. The server has to be `statestore serve`. What is 0 is left out.
    As JSON, each look is one line with everything: namespaces, in them figures and collections of records, as in
    Python's `logging.statistics`.
    """
    store = configured_store(settings)
    if not isinstance(store, TyrantStore):
        store.close()
        raise ConfigurationError(
            f"{redacted(settings.url)} is no server, and only a server keeps statistics of its own: give the address "
            "of a `statestore serve`"
        )
    with store, contextlib.suppress(KeyboardInterrupt):
        look = _Look(_look(store), None)
        console = Console(highlight=False)
        if watch or every is not None:
            _watch(store, look, output, console, every or _INTERVAL)
        elif output.as_json:
            output.value(look.namespaces)
        else:
            console.print(_report(look, console.width))


def _look(store: TyrantStore) -> Namespaces:
    try:
        text = store.statistics()
    except MissingFunctionError as error:
        raise ConfigurationError(
            f"{store!r} is an original ttserver or an older `statestore serve`, which keep no statistics: start one of "
            "this version in its place"
        ) from error
    try:
        # What it answers may be anything; from here on it is not too deep and has no number that JSON lacks.
        found = jsonable(json.loads(text))
        return {str(name): dict(namespace) for name, namespace in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise StateStoreError(f"{store!r} answered statistics that are none: {error}") from error


def _watch(store: TyrantStore, look: _Look, output: Output, console: Console, interval: float) -> None:
    """Show ``look``, and what there is to see from then on. Outages are told and waited for."""
    live = Live(console=console, screen=True, auto_refresh=False)
    moves = console.is_terminal and not console.is_dumb_terminal and not output.as_json
    trouble = ""
    try:
        while True:
            if moves:
                head = f"{time.strftime('%H:%M:%S')}, every {interval:g} s; Ctrl-C ends it"
                _show(live, Group(_text(trouble or head, "dim"), _report(look, console.width)))
            elif trouble:
                click.echo(trouble, err=True)
            elif output.as_json:
                output.value(look.namespaces)
            else:
                console.print(_report(look, console.width), "")
            time.sleep(interval)
            try:
                look, trouble = _Look(_look(store), look), ""
            except StoreUnavailable as error:
                trouble = f"{time.strftime('%H:%M:%S')}: {error}"
    finally:
        live.stop()


def _show(live: Live, shown: RenderableType) -> None:
    """In a screen of its own, if that has room for it; or else below what was shown before, to be scrolled."""
    if len(live.console.render_lines(shown, pad=False)) <= live.console.height:
        live.start()
        live.update(shown, refresh=True)
    else:
        live.stop()
        live.console.print("", shown)


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
        try:
            each = (now - then) / self._seconds
        except OverflowError:
            return ""
        return f" +{_number(each)}/s" if not _counts_bytes(path[-1]) else f" +{_size(each)}/s"


def _at(found: Any, path: tuple[str, ...]) -> Any:
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


# -- for people


def _report(look: _Look, width: int) -> RenderableType:
    """All that is not 0."""
    parts: list[RenderableType] = []
    for name, namespace in look.namespaces.items():
        texts = [f"{title}: {_value(title, value)}" for title, value in namespace.items() if _is_text(value)]
        parts.append(_text(name, "bold").append_text(_text("".join(f"  {text}" for text in texts), "not bold dim")))
        parts.append(Padding(_scalars(name, namespace, look, width - 2), (0, 0, 0, 2)))
        for heading, records in _collections(namespace):
            parts.append(Padding(_text(heading, "italic"), (0, 0, 0, 2)))
            parts.append(Padding(_records((name, heading), records, look, width - 2), (0, 0, 0, 2)))
    return Group(*parts)


def _is_text(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and bool(value))


def _scalars(name: str, namespace: Mapping[str, Any], look: _Look, width: int) -> RenderableType:
    """All numbers, downwards in as many columns as there is room for; the value first, since a name can be cut."""
    pairs = [
        (_text(_value(title, value)).append(look.rate(name, title), "green"), _text(_titled(title), "dim"))
        for title, value in namespace.items()
        if isinstance(value, (int, float)) and value and not _is_text(value)
    ]
    columns = width // _PAIR
    if not columns:
        return Text("\n", no_wrap=True, overflow="ellipsis").join(Text("  ").join(pair) for pair in pairs)
    rows = -(-len(pairs) // columns)
    table = Table.grid(padding=(0, 2))
    for _ in range(columns):
        table.add_column(no_wrap=True, justify="right")
        table.add_column(no_wrap=True)
    for row in range(rows):
        table.add_row(*(cell for pair in pairs[row::rows] for cell in pair))
    return table


def _collections(namespace: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Mapping[str, Any]]]]:
    for heading, found in namespace.items():
        if isinstance(found, list):
            found = dict(enumerate(found, 1))
        if isinstance(found, dict):
            records: dict[str, Mapping[str, Any]] = {str(n): r for n, r in found.items() if isinstance(r, dict)}
            if records:
                yield heading, records


class _Column(NamedTuple):
    title: Text
    cells: list[Text]
    right: bool

    def width(self, *, title_in_one_line: bool) -> int:
        """How many columns of the terminal it takes, with its padding. Its cells are not broken."""
        titles = [self.title.plain] if title_in_one_line else self.title.plain.split()
        return _PADDING + max(cell_len(text) for text in (*titles, *(cell.plain for cell in self.cells)))


def _records(path: tuple[str, str], records: dict[str, Mapping[str, Any]], look: _Look, width: int) -> Table:
    """As many columns as there is room for, without those that are 0 throughout."""
    names = _Column(_text(""), [_text(name) for name in records], right=False)
    columns = [names, *_columns(path, records, look)]
    wide = sum(column.width(title_in_one_line=True) for column in columns) <= width
    table = Table(box=None, padding=(0, _PADDING, 0, 0), header_style="dim")
    left = width
    for column in columns:
        needed = column.width(title_in_one_line=wide)
        if column is names:
            needed = min(needed, max(_PADDING + 1, int(width * _NAMES_PART)))
        left -= needed
        if left < 0:
            break
        justify: JustifyMethod = "right" if column.right else "left"
        table.add_column(column.title, justify=justify, width=needed - _PADDING, overflow="fold")
    for row in zip(*(column.cells for column in columns[: len(table.columns)]), strict=True):
        table.add_row(*row)
    return table


def _columns(path: tuple[str, str], records: dict[str, Mapping[str, Any]], look: _Look) -> Iterator[_Column]:
    for title in dict.fromkeys(title for record in records.values() for title in record):
        values = [record.get(title) for record in records.values()]
        if not any(values):
            continue
        numbers = all(isinstance(value, (int, float, NoneType)) for value in values) and title not in _TIMES
        yield _Column(_text(_titled(title)), [_text(_value(title, value)) for value in values], numbers)
        rates = [look.rate(*path, name, title).lstrip() for name in records]
        if any(rates):
            yield _Column(_text(""), [_text(rate, "green") for rate in rates], right=False)


def _titled(title: str) -> str:
    return title.removesuffix(_SECONDS).removesuffix(_BYTES)


def _text(text: str, style: str = "") -> Text:
    """``text``, which comes from who knows whom, as nothing that a terminal obeys."""
    return Text("".join(c if c.isprintable() else "\ufffd" for c in text), style=style)


def _value(title: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "" if value is None else "yes" if value is True else "no" if value is False else str(value)
    try:
        if title in _TIMES:
            moment, now = time.localtime(value), time.localtime()
            return time.strftime("%H:%M:%S" if moment[:3] == now[:3] else "%Y-%m-%d %H:%M:%S", moment)
        if title.endswith(_SECONDS):
            return _period(value)
        if title == "Process ID":
            return str(value)
        return _size(value) if _counts_bytes(title) else _number(value)
    except (OverflowError, ValueError, OSError):
        return str(value)  # a time in no calendar, or more than a float can be


def _counts_bytes(title: str) -> bool:
    return title.startswith("Bytes ") or title.endswith(_BYTES)


def _number(number: float) -> str:
    """All of what is small, and three digits of what is not: whoever wants more reads the JSON."""
    if isinstance(number, int) and abs(number) < 100_000:
        return f"{number:,}"
    return _scaled(number, 1000, ("", "k", "M", "G", "T"))


def _size(size: float) -> str:
    return _scaled(size, 1024, (" B", " KiB", " MiB", " GiB", " TiB"))


def _scaled(number: float, step: int, units: Sequence[str]) -> str:
    *smaller, largest = units
    for unit in smaller:
        if abs(number) < 999.5:
            return f"{number:.3g}{unit}"
        number /= step
    return f"{number:.3g}{largest}"


def _period(seconds: float) -> str:
    if seconds < 60 or seconds > 1e10:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days:,} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
