"""Python values that JSON does not have <-> plain JSON: ``types = tagged``. It must not know stores or pickles.

A tagged value is an object of one key: ``{"$datetime": "2026-11-21T05:00:00+00:00"}``. Tags are put on and taken off at
the doors only, where Beaker hands values over; documents at rest, in the merge and in every swap are plain JSON.

Both directions undo each other exactly: `untag` gives every tagged value back as it was, and `tag` gives every document
back as it was that `untag` has read, whoever wrote it. So a request that changes nothing writes nothing. For that,
`untag` reads only what `tag` itself would have written; every other object is the plain dict that it is. An
application's own dict that would be read as a tagged value gets one more ``$``.
"""

from __future__ import annotations

import base64
import collections
import datetime
import decimal
import functools
import importlib.resources
import json
import logging
import os
import re
import uuid
import zoneinfo
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, Final

from beaker_statestore import documents
from beaker_statestore.documents import MAX_BYTES, Document, Refused, TooLarge, Walk

__all__ = ["MAX_COLLISIONS", "SETS", "StrictWalk", "TaggedWalk", "reads", "tag", "untag", "zoned"]

log = logging.getLogger(__name__)

#: Says that an object is no tagged value.
_PLAIN: Final = object()
#: The tags whose argument is a list of members in no order.
SETS: Final[dict[str, Callable[[list[Any]], Any]]] = {"$set": set, "$frozenset": frozenset}
#: A time zone's name in the IANA database. Only such a name is ever looked up.
_ZONE: Final = re.compile(r"[A-Za-z0-9_+-]{1,32}(?:/[A-Za-z0-9_+-]{1,32}){0,3}")
#: A point in time as `zoned` writes it: RFC 9557, 4.1, but for the offset, which follows from the zone.
_MOMENT: Final = re.compile(rf"([0-9T:.+-]{{1,60}})(?:\[({_ZONE.pattern})\])?(\[_fold=1\])?")
_NO_OFFSET: Final = datetime.timedelta(0)
#: How many members of a set may have one hash. A set compares each of them with each, so thousands, which is easily
#: arranged with numbers (CPython hashes them modulo 2**61 - 1), would keep a process busy. By chance not even three do.
MAX_COLLISIONS: Final = 32
#: How many places `warn` remembers, so that it names each of them once.
_MAX_PLACES: Final = 1000


def tag(
    document: Document,
    types: str,
    root: str = "session",
    max_bytes: int = MAX_BYTES,
    walk: type[TaggedWalk] | None = None,
) -> Document:
    """``document`` as plain JSON, a copy that shares nothing with it.

    :param types: of `beaker_statestore.settings.Settings`: ``strict``, ``tagged`` or ``warn``.
    :param root: what messages call it.
    :param max_bytes: the longest result, in bytes of JSON text.
    :param walk: knows more spellings of the values.
    :raises DocumentRefusedError: there is something in it that this cannot hold; the message names the place.
    :raises ValueTooLargeError: it is too long.
    """
    if types == "strict":
        return documents.normalize(document, root, max_bytes, StrictWalk)
    tagged = documents.normalize(document, root, max_bytes, walk or TaggedWalk)
    if types == "warn":
        _warn(tagged, root)
    return tagged


def untag(document: Document) -> dict[str, Any]:
    """``document`` with the values that its tags stand for."""
    texts: _Texts = {}
    return {name: _value(member, texts) for name, member in document.items()}


# -- values -> JSON


class StrictWalk(Walk):
    """Strict JSON for those who could have ``types = tagged``."""

    def other(self, value: Any, levels: int) -> Any:
        try:
            return super().other(value, levels)
        except Refused as refused:
            if documents.qualified(type(value)) in _TAGGED_NAMES:
                refused.what += ", or set types = tagged"
            raise


class TaggedWalk(Walk):
    """Gives the types of this module their JSON form."""

    __slots__ = ("_texts",)

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._texts: _Texts = {}

    def other(self, value: Any, levels: int) -> Any:
        kind = type(value)
        if kind is tuple:
            self._open("$tuple", levels)
            return {"$tuple": self.copy_list(value, levels - 1)}
        if kind is set or kind is frozenset:
            if _collide(value):
                raise Refused(
                    f"is a {kind.__name__} with more than {MAX_COLLISIONS} members of one hash; store it as a list"
                )
            return self.tag_set(f"${kind.__name__}", value, value, levels)
        if kind not in _WRITERS:
            return super().other(value, levels)
        name, write = _WRITERS[kind]
        return self.tag_scalar(name, write(value), levels)

    def tag_scalar(self, name: str, argument: Any, levels: int) -> Document:
        """The object of one tag whose argument is JSON."""
        self._open(name, levels)
        return {name: self.copy(argument, levels - 1)}

    def tag_set(self, name: str, container: object, members: Collection[Any], levels: int) -> Document:
        """The object of a set, in an order that depends on nothing but its members.

        :param container: what stands for the set where it was found.
        """
        self._open(name, levels)
        self.enter(members, levels - 1)
        copy = []
        for member in members:
            try:
                copy.append(self.copy(member, levels - 2))
            except Refused as refused:
                refused.leave(container, None)
                raise
        texts = {id(member): _text(member, self._texts) for member in copy}
        argument = sorted(copy, key=lambda member: texts[id(member)])
        self._texts[id(argument)] = _joined(texts[id(member)] for member in argument)
        return {name: argument}

    def copy_dict(self, value: dict[Any, Any], levels: int) -> Document:
        copy = super().copy_dict(value, levels)
        if len(copy) == 1:
            [(key, argument)] = copy.items()
            if key[:1] == "$":
                name = _name(key)
                # What follows looks at everything inside, so it must not be done again on every level around it.
                if name in SETS and type(value[key]) is list and any(map(_has_no_hash, value[key])):
                    return copy
                if reads(name, argument):
                    self.left -= 1
                    if self.left < 0:
                        raise TooLarge
                    return {f"${key}": argument}
        return copy

    def _open(self, name: str, levels: int) -> None:
        self.enter(name, levels)
        self.left -= len(name) + 3


def _has_no_hash(member: Any) -> bool:
    """Whether the object that the walk makes of ``member`` stands for something that no set can hold.

    Dicts do, even those that look like tagged values: they get one more ``$``.
    """
    return type(member) is list or type(member) is dict or (type(member) is tuple and any(map(_has_no_hash, member)))


def _collide(members: Collection[Any]) -> bool:
    """Whether too many of a set's members have one hash.

    :raises TypeError: one has none.
    """
    return len(members) > MAX_COLLISIONS and max(collections.Counter(map(hash, members)).values()) > MAX_COLLISIONS


#: The JSON text of each set's argument, by its id, until the set around it has taken it from here. So a set inside
#: many others is written once.
_Texts = dict[int, str]
_encode: Final = json.JSONEncoder(separators=(",", ":")).encode


def _text(member: Any, texts: _Texts) -> str:
    """The text by which a set's members are sorted: the same whichever codec is installed."""
    if type(member) is dict and len(member) == 1:
        [(name, argument)] = member.items()
        if name == "$tuple" and type(argument) is list:
            return f'{{"$tuple":{_joined(_text(inner, texts) for inner in argument)}}}'
        if id(argument) in texts:
            return f"{{{_encode(name)}:{texts.pop(id(argument))}}}"
    return _encode(member)


def _joined(texts: Iterable[str]) -> str:
    return f"[{','.join(texts)}]"


def zoned(moment: datetime.datetime | datetime.time, zone: str | None) -> str:
    """A time as text, such as ``2026-11-21T06:00:00[Europe/Berlin]``.

    The zone stands for the offset, as it does in Python: when a country's rules change, the local time stays. The fold
    is written where it is 1, the second of the two times when clocks are set back.

    :param zone: its name; None: the time has a fixed offset or none.
    :raises Refused: no zone has such a name or such an offset.
    """
    if zone is not None and not _ZONE.fullmatch(zone):
        raise Refused(f"is in the time zone {documents.shortened(zone)}, whose name no database has")
    if (moment.utcoffset() or _NO_OFFSET).microseconds:
        # Python itself writes them, but reads +00:00:00.000001 as +00:00.
        raise Refused("is a time with fractions of a second in its offset; no zone has any")
    return f"{moment.isoformat()}{f'[{zone}]' if zone is not None else ''}{'[_fold=1]' if moment.fold else ''}"


def _write_moment(moment: datetime.datetime | datetime.time) -> str:
    zone = moment.tzinfo
    if zone is None or type(zone) is datetime.timezone:
        return zoned(moment, None)
    if type(zone) is zoneinfo.ZoneInfo and zone.key is not None:
        return zoned(moment.replace(tzinfo=None), zone.key)
    raise Refused(
        f"is {documents.name_of(moment)} with {documents.name_of(zone)} for its zone; use datetime.timezone or "
        "zoneinfo.ZoneInfo"
    )


def _write_decimal(number: decimal.Decimal) -> str:
    if not number.is_finite():
        raise Refused(f"is Decimal('{number}'), which is no number; store None or text instead")
    return str(number)


def _write_timedelta(span: datetime.timedelta) -> list[int]:
    return [span.days, span.seconds, span.microseconds]


#: Of each type its tag and the function that makes the tag's argument, or raises `Refused`.
_WRITERS: Final[dict[type, tuple[str, Callable[[Any], Any]]]] = {
    datetime.datetime: ("$datetime", _write_moment),
    datetime.date: ("$date", datetime.date.isoformat),
    datetime.time: ("$time", _write_moment),
    datetime.timedelta: ("$timedelta", _write_timedelta),
    decimal.Decimal: ("$decimal", _write_decimal),
    uuid.UUID: ("$uuid", str),
    bytes: ("$bytes", lambda data: base64.b64encode(data).decode("ascii")),
}
_TAGGED_NAMES: Final = {documents.qualified(kind) for kind in (*_WRITERS, set, frozenset)}


# -- JSON -> values


def _value(json_value: Any, texts: _Texts) -> Any:
    kind = type(json_value)
    if kind is list:
        return [_value(member, texts) for member in json_value]
    if kind is not dict:
        return json_value
    plain = {key: _value(member, texts) for key, member in json_value.items()}
    if len(plain) == 1:
        [(key, members)] = plain.items()
        if key[:1] == "$":
            name = _name(key)
            made = _make(name, json_value[key], members, texts)
            if made is not _PLAIN:
                return made if key == name else {key[1:]: members}
    return plain


def _name(key: str) -> str:
    """The tag that an escaped key is about; an application's own key has one ``$`` more each time it is escaped."""
    return f"${key.lstrip('$')}"


def reads(name: str, argument: Any) -> bool:
    """Whether ``{name: argument}`` is a tagged value."""
    if name == "$tuple":
        return type(argument) is list
    texts: _Texts = {}
    if name in _READERS:
        return _make(name, argument, None, texts) is not _PLAIN
    if name not in SETS or type(argument) is not list:
        return False
    return _make(name, argument, _value(argument, texts), texts) is not _PLAIN


def _make(name: str, argument: Any, members: Any, texts: _Texts) -> Any:
    """The value of ``{name: argument}``, or `_PLAIN` if `tag` writes no value so.

    :param members: ``argument`` with the values that its own tags stand for.
    """
    if name == "$tuple":
        return tuple(members) if type(argument) is list else _PLAIN
    if name in SETS:
        return _make_set(name, argument, members, texts)
    read = _READERS.get(name)
    if read is None or type(argument) is not (list if name == "$timedelta" else str):
        return _PLAIN
    try:
        value = read(argument)
        tag_of_value, write = _WRITERS[type(value)]
        return value if tag_of_value == name and documents.same(write(value), argument) else _PLAIN
    # LookupError: there is no such zone here. OSError: there is, but not to be read.
    except (ValueError, TypeError, ArithmeticError, LookupError, OSError, Refused):
        return _PLAIN


def _make_set(name: str, argument: Any, members: Any, texts: _Texts) -> Any:
    if type(argument) is not list:
        return _PLAIN
    try:
        if _collide(members):
            return _PLAIN
        made = SETS[name](members)
    except (TypeError, ValueError, ArithmeticError):  # a member that has no hash
        return _PLAIN
    order = [_text(member, texts) for member in argument]
    if len(made) != len(argument) or order != sorted(order):
        return _PLAIN
    texts[id(argument)] = _joined(order)
    return made


def _read_datetime(argument: Any) -> datetime.datetime:
    iso, zone, fold = _parts(argument)
    moment = datetime.datetime.fromisoformat(iso)
    return moment.replace(tzinfo=moment.tzinfo if zone is None else zone, fold=fold)


def _read_time(argument: Any) -> datetime.time:
    iso, zone, fold = _parts(argument)
    moment = datetime.time.fromisoformat(iso)
    return moment.replace(tzinfo=moment.tzinfo if zone is None else zone, fold=fold)


def _parts(argument: Any) -> tuple[str, zoneinfo.ZoneInfo | None, int]:
    found = _MOMENT.fullmatch(argument)
    if found is None:
        raise ValueError("no time")
    iso, zone, fold = found.groups()
    return iso, None if zone is None else _zone(zone), 0 if fold is None else 1


# More than there are, so that whoever names them in turn has none read from its file again and again.
@functools.lru_cache(maxsize=2048)
def _zone(name: str) -> zoneinfo.ZoneInfo:
    # ZoneInfo takes many times as long to find out that there is none.
    if not any(os.path.isfile(os.path.join(path, name)) for path in zoneinfo.TZPATH) and name not in _packaged_zones():
        raise LookupError(name)
    return zoneinfo.ZoneInfo(name)


@functools.cache
def _packaged_zones() -> frozenset[str]:
    """The names of the zones in the package tzdata, which zoneinfo falls back on."""
    try:
        return frozenset(importlib.resources.files("tzdata").joinpath("zones").read_text("utf-8").split())
    except (ImportError, OSError):
        return frozenset()


def _read_timedelta(argument: Any) -> datetime.timedelta:
    days, seconds, microseconds = argument
    return datetime.timedelta(days, seconds, microseconds)


_READERS: Final[dict[str, Callable[[Any], Any]]] = {
    "$datetime": _read_datetime,
    "$date": datetime.date.fromisoformat,
    "$time": _read_time,
    "$timedelta": _read_timedelta,
    "$decimal": decimal.Decimal,
    "$uuid": uuid.UUID,
    "$bytes": lambda text: base64.b64decode(text, validate=True),
}


# -- warn

_places: set[str] = set()


def _warn(tagged: Document, root: str) -> None:
    """Log each place of a tagged value, once in the life of the process."""
    # A key is data; what is under one cache key is as under any other.
    place = root.partition("[")[0] + ("[*]" if "[" in root else "")
    for name, member in untag(tagged).items():
        for found in _found(member, f"{place}[{documents.shortened(name)}]"):
            if found in _places:
                continue
            if len(_places) == _MAX_PLACES:
                _places.add("")
                log.warning("values that JSON does not have are in more than %s places; no more are named", _MAX_PLACES)
            if len(_places) > _MAX_PLACES:
                return
            _places.add(found)
            log.warning("%s", found)


def _found(value: Any, place: str) -> Iterator[str]:
    kind = type(value)
    if kind is dict:
        for name, member in value.items():
            yield from _found(member, f"{place}[{documents.shortened(name)}]")
        return
    if documents.qualified(kind) in _TAGGED_NAMES or kind is tuple:
        effect = "come back as a list" if kind is tuple else "be refused"
        yield f"{place} is {documents.name_of_type(kind)}; with types = strict it would {effect}"
    if kind is list or kind is tuple or kind is set or kind is frozenset:
        for member in value:
            yield from _found(member, f"{place}[*]")
