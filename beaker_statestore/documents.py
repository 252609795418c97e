"""JSON documents <-> bytes, strictly, and the three-way merge of documents. It must not know where documents live.

A document is one JSON object. At rest it is its own compact UTF-8 text, with no envelope. Fields of ours at its top
level begin with an underscore and are few (`RESERVED`).

simplejson is the reference codec and orjson, where installed, the fast one. Both give the same values for the same
bytes and refuse the same bytes and values, because what they disagree about (lone surrogates, NaN, integers beyond
64 bit, a byte order mark, subclasses, depth) is settled here before or after them.
"""

from __future__ import annotations

import base64
import contextlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, TypeGuard

import simplejson

from beaker_statestore.exceptions import DocumentDamagedError, DocumentRefusedError, ValueTooLargeError

__all__ = [
    "COMMIT",
    "EXPIRES",
    "MAX_BYTES",
    "MAX_DEPTH",
    "OPAQUE",
    "RESERVED",
    "REVOKED",
    "SEALED",
    "SERIALIZER",
    "Document",
    "Merge",
    "Refused",
    "TooLarge",
    "Walk",
    "decode",
    "difference",
    "encode",
    "expires_at",
    "is_expired",
    "is_number",
    "merge",
    "name_of",
    "name_of_type",
    "normalize",
    "qualified",
    "refuse_reserved",
    "same",
    "shortened",
]

#: One JSON object: str -> None, bool, int, float, str, list or dict of these.
Document = dict[str, Any]

#: When the record may be removed, in epoch seconds; absent: never.
EXPIRES: Final = "_expires"
#: The form in which Beaker wants the session back (`payloads.Form`).
SERIALIZER: Final = "_serializer"
#: A payload that nobody here can read, instead of the session's fields.
OPAQUE: Final = "_opaque"
#: A whole document encrypted by ``store_key`` (`sealing`), beside nothing but `EXPIRES`.
SEALED: Final = "_sealed"
#: Stands for a session that was ended from elsewhere, against requests that had loaded it before; a random token.
REVOKED: Final = "_revoked"
#: Random tokens of the last changes, the newest first, where two could make the same of a document (a counter's).
COMMIT: Final = "_commit"
#: The fields of ours; applications cannot have their own of these names.
RESERVED: Final = frozenset({COMMIT, EXPIRES, SERIALIZER, OPAQUE, REVOKED, SEALED})

#: Beaker's own fields in a session, in epoch seconds (beaker.session.Session.load).
ACCESSED: Final = "_accessed_time"
CREATED: Final = "_creation_time"

#: The largest document that `encode` makes unless told otherwise, in bytes. Browsers' tabs and mail handlers read and
#: write whole documents, so a larger one is a mistake or an attack; memcached draws the same line.
MAX_BYTES: Final = 1024 * 1024
#: How many lists and dicts may be inside each other. Far below what any codec or Python's stack allows (orjson
#: writes 253), and far above what people write.
MAX_DEPTH: Final = 100

#: What JSON readers in other languages can hold as an integer, and orjson's range.
_MIN_INT: Final = -(2**63)
_MAX_INT: Final = 2**64 - 1

# -- codecs


@dataclass(frozen=True, slots=True)
class _Codec:
    """``dumps`` gets what `normalize` made. ``loads`` may raise any ValueError, or RecursionError."""

    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes], Any]


def _integer(digits: str) -> int | float:
    # Beyond 64 bits orjson reads a number as JavaScript does. At most 20 characters can be in range.
    if len(digits) <= 20 and _MIN_INT <= (number := int(digits)) <= _MAX_INT:
        return number
    return _finite(digits)


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError("a number beyond the range of floats")
    return number


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_encoder: Final = simplejson.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)
_decoder: Final = simplejson.JSONDecoder(parse_int=_integer, parse_float=_finite, parse_constant=_no_constant)


def _simple_dumps(value: Any) -> bytes:
    return _encoder.encode(value).encode("utf-8")


def _simple_loads(data: bytes) -> Any:
    text = data.decode("utf-8")
    if text.startswith("\ufeff"):
        raise ValueError("a byte order mark is not JSON")
    value = _decoder.decode(text)
    if "\\u" in text:
        # An escaped lone surrogate cannot be written as UTF-8.
        _simple_dumps(value)
    return value


_SIMPLEJSON: Final = _Codec(_simple_dumps, _simple_loads)
try:
    import orjson
except ImportError:
    _ORJSON: _Codec | None = None
else:
    _ORJSON = _Codec(orjson.dumps, orjson.loads)

_codec = _ORJSON or _SIMPLEJSON


# -- values -> bytes


def encode(document: Document, root: str = "document", max_bytes: int = MAX_BYTES) -> bytes:
    """``document`` as it is stored.

    :param root: what error messages call it, for example ``session``.
    :param max_bytes: the longest result.
    :raises ValueTooLargeError: it is longer.
    :raises DocumentRefusedError: there is something in it that JSON cannot hold.
    """
    data = _codec.dumps(normalize(document, root, max_bytes))
    if len(data) > max_bytes:
        _refuse_size(document, root, len(data), max_bytes)
    return data


def normalize(
    document: Document, root: str = "document", max_bytes: int = MAX_BYTES, walk: type[Walk] | None = None
) -> Document:
    """A copy of ``document`` that shares no list or dict with it and holds nothing but JSON values.

    Tuples become lists, as in Beaker's own JSON serializer. Everything else that would come back as something else is
    refused, subclasses of JSON's types too (a ``Markup`` that came back as a str would be escaped, an ``OrderedDict``
    would lose its methods).

    :param walk: lets more through than strict JSON, as `beaker_statestore.tagged` does.
    :raises ValueTooLargeError: it would be longer than ``max_bytes``, as far as can be told without encoding it.
    :raises DocumentRefusedError: there is something in it that JSON cannot hold; the message names the place.
    """
    if type(document) is not dict:
        raise DocumentRefusedError(f"{root} is {name_of(document)}; it has to be a dict")
    walk = walk or Walk
    try:
        return Walk.copy_dict(walk(max_bytes), document, MAX_DEPTH)
    except Refused as refused:
        raise DocumentRefusedError(refused.message(root)) from None
    except TooLarge:
        _refuse_size(document, root, None, max_bytes, walk)


def refuse_reserved(document: Mapping[str, Any], root: str = "session") -> None:
    """Return if none of the application's fields has a name that is ours.

    :raises DocumentRefusedError: one has.
    """
    for name in sorted(RESERVED.intersection(document)):
        raise DocumentRefusedError(f"{root}[{name!r}] is a name that the store uses itself; give it another one")


class TooLarge(Exception):  # noqa: N818 - never leaves `normalize`
    """The document's text would be longer than allowed."""


class Refused(Exception):  # noqa: N818 - never leaves `normalize`
    """What was found. The way to it is noted while the walk unwinds, so that a walk that succeeds pays nothing."""

    def __init__(self, what: str, *, too_deep: bool = False) -> None:
        self.what = what
        self.steps: list[str] = []
        #: The ids of the containers on the way, where that has become too long.
        self._passed: set[int] | None = set() if too_deep else None

    def leave(self, container: object, step: object) -> None:
        if self._passed is not None:
            if id(container) in self._passed:
                self.what = "contains itself, which JSON cannot express"
                self.steps.clear()
                return
            self._passed.add(id(container))
        # The members of a set have no place in it.
        self.steps.append("[*]" if step is None else f"[{shortened(step)}]")

    def message(self, root: str) -> str:
        steps = self.steps[::-1]
        if len(steps) > 12:
            steps[6:-6] = ["..."]
        return f"{root}{''.join(steps)} {self.what}"


class Walk:
    """Copies a value and counts what its JSON text takes at least.

    Each value is counted with the one character that has to follow it. The count ends what would take for ever: lists
    that hold the same list many times, which hold the same list many times, and so on. A subclass gives more values
    a JSON form (`other`).
    """

    __slots__ = ("left",)

    def __init__(self, max_bytes: int) -> None:
        self.left = max_bytes + 1  # nothing has to follow the outermost value

    def copy(self, value: Any, levels: int) -> Any:
        kind = type(value)
        if kind is str:
            self.left -= (len(value) if value.isascii() else _utf8_length(value)) + 3
        elif kind is dict:
            return self.copy_dict(value, levels)
        elif kind is list:
            return self.copy_list(value, levels)
        elif kind is float:
            if not math.isfinite(value):
                raise Refused(f"is {value}, which JSON does not have; store None or text instead")
            self.left -= 4
        elif kind is int:
            if not _MIN_INT <= value <= _MAX_INT:
                raise Refused("is an integer beyond 64 bits; store it as text, str(...)")
            self.left -= 2
        elif value is None or kind is bool:
            self.left -= 5
        else:
            return self.other(value, levels)
        if self.left < 0:
            raise TooLarge
        return value

    def other(self, value: Any, levels: int) -> Any:
        """The JSON form of what is none of JSON's types.

        :param levels: how many lists and dicts it may consist of, one inside the other.
        :raises Refused: it has none.
        """
        if type(value) is tuple:
            return self.copy_list(value, levels)
        raise Refused(f"is {name_of(value)}; {_remedy(value)}")

    def copy_dict(self, value: dict[Any, Any], levels: int) -> Document:
        self.enter(value, levels)
        copy = {}
        for key, member in value.items():
            if type(key) is not str:
                raise Refused(f"has a key that is {name_of(key)}; JSON has only str there: use str(...)")
            try:
                self.left -= (len(key) if key.isascii() else _utf8_length(key)) + 3
                copy[key] = self.copy(member, levels - 1)
            except Refused as refused:
                refused.leave(value, key)
                raise
        return copy

    def copy_list(self, value: list[Any] | tuple[Any, ...], levels: int) -> list[Any]:
        self.enter(value, levels)
        copy = []
        for index, member in enumerate(value):
            try:
                copy.append(self.copy(member, levels - 1))
            except Refused as refused:
                refused.leave(value, index)
                raise
        return copy

    def enter(self, container: object, levels: int) -> None:
        if levels == 0:
            raise Refused(f"is inside more than {MAX_DEPTH} lists and dicts; store it flatter", too_deep=True)
        self.left -= 2 if container else 3
        if self.left < 0:
            raise TooLarge


def _utf8_length(text: str) -> int:
    try:
        return len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise Refused("has a lone surrogate in its text, which UTF-8 cannot express") from None


def name_of(value: object) -> str:
    """What to call a value that is not JSON's, by what its type says about itself: it may be a stand-in."""
    if isinstance(value, type):
        return f"the class or function {qualified(value)}"
    return name_of_type(type(value))


def name_of_type(kind: type) -> str:
    """What to call a value of that type."""
    name = qualified(kind)
    if name == "bytes":
        return name
    return f"{'an' if name[:1] in 'aeiou' else 'a'} {name}"


def qualified(kind: type) -> str:
    """The full name of a type, as a message shows it."""
    module, name = str(kind.__module__), kind.__qualname__
    # A name from a pickle can be anything; in a message it must neither end the line nor fill the log.
    return ascii(name if module == "builtins" else f"{module}.{name}")[1:-1][:100]


_REMEDIES: Final = {
    "bytearray": "store text, for example base64",
    "bytes": "store text, for example base64 or .decode()",
    "datetime.date": "store it as text, for example .isoformat()",
    "datetime.datetime": "store it as text, for example .isoformat(), or as a number, .timestamp()",
    "datetime.time": "store it as text, for example .isoformat()",
    "datetime.timedelta": "store it as a number, .total_seconds()",
    "decimal.Decimal": "store it as text, str(...)",
    "frozenset": "store it as a list, sorted(...)",
    "set": "store it as a list, sorted(...)",
    "uuid.UUID": "store it as text, str(...)",
}


def _remedy(value: object) -> str:
    known = _REMEDIES.get(qualified(type(value)))
    if known is not None:
        return known
    for plain in (str, int, float, dict, list, tuple):
        if isinstance(value, plain):
            return f"it would come back as a plain {plain.__name__}: store {plain.__name__}(...)"
    return "store None, bool, int, float, str, list or dict"


def shortened(step: object) -> str:
    """A key or index as a message shows it."""
    text = ascii(step)
    return text if len(text) <= 80 else f"{text[:60]}...{text[-10:]}"


def _refuse_size(document: Document, root: str, size: int | None, max_bytes: int, walk: type[Walk] = Walk) -> NoReturn:
    """Say which fields take the room."""
    sizes: list[tuple[int, str]] = []
    left = 4 * max_bytes  # what measuring may cost
    for name, value in document.items():
        measuring = walk(left)
        before = measuring.left
        with contextlib.suppress(TooLarge, Refused):
            measuring.copy(value, MAX_DEPTH)
        least = before - measuring.left
        sizes.append((least, f"{shortened(name)} with {'about' if measuring.left >= 0 else 'more than'} {least:,}"))
        left -= least
        if left <= 0:
            break
    largest = [text for _, text in sorted(sizes, key=lambda measured: -measured[0])[:3]]
    taken = "more than" if size is None else f"{size:,} bytes, above"
    raise ValueTooLargeError(
        f"{root} takes {taken} the limit of {max_bytes:,} bytes; its largest fields are {', '.join(largest)}"
    )


# -- bytes -> values


def decode(data: bytes, max_bytes: int | None = None) -> Document:
    """The document that is stored as ``data``. Of a field given twice the last one counts.

    :param max_bytes: refuse to read more than this; None: there is no limit but the store's own.
    :raises DocumentDamagedError: it is not one JSON object, or deeper than `MAX_DEPTH`; the message says what it
        is. Nothing in it is ever executed.
    """
    if max_bytes is not None and len(data) > max_bytes:
        raise DocumentDamagedError(f"the record has {len(data):,} bytes, above the limit of {max_bytes:,}")
    try:
        value = _codec.loads(data)
    except (ValueError, RecursionError):
        raise DocumentDamagedError(f"the record holds {_guess(data)}, not a JSON object") from None
    if type(value) is not dict:
        raise DocumentDamagedError(f"the record holds {_JSON_NAMES[type(value)]}, not a JSON object")
    # Fewer brackets than levels need no counting of levels.
    if data.count(b"{") + data.count(b"[") > MAX_DEPTH and _deeper(value, MAX_DEPTH):
        raise DocumentDamagedError(f"the record holds more than {MAX_DEPTH} lists and objects inside each other")
    return value


_JSON_NAMES: Final[Mapping[type, str]] = {
    dict: "a JSON object",
    list: "a JSON array",
    str: "a JSON string",
    int: "a JSON number",
    float: "a JSON number",
    bool: "a JSON true or false",
    type(None): "a JSON null",
}


def _deeper(value: Any, levels: int) -> bool:
    layer: list[Any] = [value]
    for _ in range(levels):
        layer = [
            member
            for container in layer
            for member in (container.values() if type(container) is dict else container)
            if type(member) is dict or type(member) is list
        ]
        if not layer:
            return False
    return True


def _guess(data: bytes) -> str:
    """What ``data``, which no codec could read, seems to be. Never shows any of it: it may be a secret."""
    if not data.strip():
        return "nothing"
    found = _signature(data)
    if found is not None:
        return found
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return f"{len(data):,} bytes that are not UTF-8 text"
    try:
        inside = _signature(base64.b64decode(text.strip(), validate=True))
    except ValueError:
        inside = None
    if inside is not None:
        return f"base64 text of what looks like {inside}"
    if text.startswith("\ufeff"):
        return "text with a byte order mark"
    return f"{len(text):,} characters of text that is not JSON"


def _signature(data: bytes) -> str | None:
    if data[:1] == b"\x80" and data[1:2] <= b"\x05" and data[-1:] == b".":
        return "a pickle"
    if len(data) > 2 and data[0] == 0x78 and int.from_bytes(data[:2], "big") % 31 == 0:  # RFC 1950, 2.2
        return "zlib data"
    return None


# -- expiry


def expires_at(data: bytes) -> float | None:
    """When the record that is stored as ``data`` may be removed, in epoch seconds; None: never.

    :raises DocumentDamagedError: it is not one of our documents.
    """
    # Any field's name may be spelled with \u escapes. This saves reading most documents that never expire.
    if b"_expires" not in data and b"\\u" not in data:
        return None
    return _expiry(decode(data))


def is_expired(document: Document, now: float) -> bool:
    """Whether the document's time has come.

    :param now: epoch seconds.
    :raises DocumentDamagedError: its `EXPIRES` is not a number.
    """
    expiry = _expiry(document)
    return expiry is not None and expiry <= now


def _expiry(document: Document) -> float | None:
    if EXPIRES not in document:
        return None
    expiry = document[EXPIRES]
    if not is_number(expiry):
        raise DocumentDamagedError(f"the record's {EXPIRES!r} is {_JSON_NAMES[type(expiry)]}, not a number")
    return float(expiry)


# -- comparing and merging

_ABSENT: Final = object()


def same(a: Any, b: Any) -> bool:
    """Whether two JSON values are the same to a reader in any language: 1, 1.0 and true are three values."""
    if a is b:
        return True
    kind = type(a)
    if kind is not type(b):
        return False
    if kind is dict:
        return len(a) == len(b) and all(same(value, b.get(key, _ABSENT)) for key, value in a.items())
    if kind is list:
        return len(a) == len(b) and all(map(same, a, b))
    if kind is float:
        # -0.0 == 0.0, yet they are written differently.
        return bool(a == b) and math.copysign(1, a) == math.copysign(1, b)
    return bool(a == b)


def difference(base: Document, ours: Document) -> frozenset[str]:
    """The top-level fields that ``ours`` has added, changed or removed relative to ``base``."""
    return frozenset(
        name for name in base.keys() | ours.keys() if not same(base.get(name, _ABSENT), ours.get(name, _ABSENT))
    )


@dataclass(frozen=True, slots=True)
class Merge:
    """The result of `merge`."""

    document: Document
    #: The fields that both sides have changed, to different values, sorted. Ours are in the document.
    conflicts: tuple[str, ...]
    #: Whether the document differs from theirs, that is, has to be written.
    changed: bool


def merge(base: Document, ours: Document, theirs: Document) -> Merge:
    """What ``ours`` has changed at its top level relative to ``base``, applied to ``theirs``; all else as in theirs.

    Times are no conflicts: of last access and of expiry the later counts (an absent expiry means never), and of
    creation, where two requests have created the session at once, the earlier. The times of access and creation are
    never removed, since ``session.clear()`` does it without meaning it.

    The result shares values with ``ours`` and ``theirs``; treat all of them as frozen.
    """
    document = dict(theirs)
    conflicts = []
    for name in sorted(difference(base, ours)):
        before, mine, other = (side.get(name, _ABSENT) for side in (base, ours, theirs))
        if name in _TIMES and all(time is _ABSENT or is_number(time) for time in (before, mine, other)):
            mine = _merged_time(name, before, mine, other)
        elif not same(before, other) and not same(mine, other):
            conflicts.append(name)
        if mine is _ABSENT:
            document.pop(name, None)
        else:
            document[name] = mine
    return Merge(document, tuple(conflicts), changed=not same(document, theirs))


_TIMES: Final = frozenset({ACCESSED, CREATED, EXPIRES})


def _merged_time(name: str, before: Any, mine: Any, other: Any) -> Any:
    """What one of `_TIMES` becomes that is not ours as it was in base."""
    if before is _ABSENT and other is _ABSENT:
        return mine
    if name == EXPIRES:
        # Absent means never, and that is later than any time.
        return _ABSENT if mine is _ABSENT or other is _ABSENT else max(mine, other)
    if mine is _ABSENT or other is _ABSENT:
        return other if mine is _ABSENT else mine
    if name == ACCESSED:
        return max(mine, other)
    # Without a base two requests have created the same session; with one, the application has set the time itself.
    return min(mine, other) if before is _ABSENT else mine


def is_number(value: object) -> TypeGuard[float]:
    """Whether a JSON value is a number; true and false are none, although Python takes them for integers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)
