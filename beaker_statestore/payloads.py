"""Beaker's session payload <-> document: the only place that touches pickle. It must not know stores.

beaker.session.Session hands its namespace manager one str for the whole session (Session._encrypt_data): base64 of a
pickle, base64 of zlib-compressed JSON, or, with ``encrypt_key``, a nonce in base64 and then base64 of ciphertext. A
custom serializer can make anything.

A pickle is taken apart and never executed: in place of every class and function that it names stands a `Recorder`
that does nothing but bear the name, so that the strict walk in `documents` can say what was found where. With
``types = tagged`` the stand-ins of few types (`_TAGGED`) also keep what they were called with, and it is read as data.
"""

from __future__ import annotations

import base64
import binascii
import copyreg
import datetime
import decimal
import io
import json
import pickle
import pickletools
import uuid
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Literal, TypeGuard

from beaker_statestore import documents, tagged
from beaker_statestore.documents import MAX_BYTES, Document, Refused
from beaker_statestore.exceptions import DocumentRefusedError, ValueTooLargeError

__all__ = ["Form", "Payload", "read", "write"]

#: Which of Beaker's serializers made a payload: its ``data_serializer``.
Form = Literal["pickle", "json"]

#: How many times the largest document Beaker's form of one may have, to be read at all. A document within the limit
#: never has 8 times its length: Beaker writes "\u00e9" (6 bytes) for 2 bytes of UTF-8, and a pickle spends 4 bytes more
#: on each short str. The rest is read for the sake of the message, which is to name the fields that take the room. It
#: costs no more than a second copy of what the application has in memory; our own limit is checked exactly afterwards.
_READ: Final = 32
#: The longest nonce that we look for, in characters; 24 for 128 bits is Beaker's default, 8 what it had before 1.8.
_MAX_NONCE: Final = 64
#: The pickle protocol that Beaker writes (beaker.util.PickleSerializer).
_PROTOCOL: Final = 2
#: The one in which values beyond JSON are handed to it: the oldest that keeps a time's fold. Beaker reads any.
_TAGGED_PROTOCOL: Final = 4
#: What the pickle of a dict begins with behind its protocol: EMPTY_DICT, or FRAME from protocol 4 on.
_FIRST_OPCODES: Final = b"}\x95"
#: What a pickle ends with: STOP.
_LAST_OPCODE: Final = b"."

_CUSTOM_SERIALIZER: Final = (
    "the session is neither Beaker's pickle nor its JSON. Remove a custom data_serializer: 'pickle' and 'json' are "
    "understood, and with both the store holds plain JSON. If the application uses encrypt_key, set "
    "encrypted = true beside it"
)
_NO_CRYPTOGRAPHY: Final = (
    "encrypt_key is set, but Beaker has found no AES library and has not encrypted the session: "
    'pip install "cryptography", or remove encrypt_key'
)
_NOT_ENCRYPTED: Final = (
    "encrypted = true is set, but the session is not encrypted: set encrypt_key and validate_key, or remove encrypted"
)


@dataclass(frozen=True, slots=True)
class Payload:
    """What a payload held: either ``document`` and ``form``, or ``opaque``."""

    document: Document | None = None
    form: Form | None = None
    #: Ciphertext, the payload itself.
    opaque: str | None = None


def read(payload: object, *, encrypted: bool = False, max_bytes: int = MAX_BYTES, types: str = "strict") -> Payload:
    """What is in ``payload``. Nothing in it is executed.

    :param encrypted: the application says that it uses ``encrypt_key``, so that ciphertext is what has to come.
    :param max_bytes: the largest document, in bytes of our JSON text.
    :param types: what becomes of values that JSON does not have (`beaker_statestore.tagged`). Beaker's JSON form has
        none: tags in it are stored as they are.
    :raises DocumentRefusedError: it holds what JSON cannot, or nobody can tell what it holds, or it is not encrypted
        although it should be.
    :raises ValueTooLargeError: it is too large. The message names the largest fields, unless Beaker's form of it is
        longer than 32 times ``max_bytes``: so much is not even read.
    """
    if not isinstance(payload, str):
        raise DocumentRefusedError(f"a session's payload is a str, but this is a {type(payload).__name__}")
    if len(payload) > _READ * max_bytes:
        raise ValueTooLargeError(
            f"the session takes {len(payload):,} characters in Beaker's form; the limit is {max_bytes:,} bytes of JSON"
        )
    form = _form(payload)
    if form is not None:
        try:
            value = _load(payload, form, _READ * max_bytes, _Unpickler if types == "strict" else _TaggedUnpickler)
        except _Unreadable as error:
            if not encrypted:
                raise DocumentRefusedError(f"the session looks like Beaker's {form}, but {error}") from None
        else:
            if encrypted:
                raise DocumentRefusedError(_NOT_ENCRYPTED)
            if form == "json":
                return Payload(documents.normalize(value, "session", max_bytes), form)
            return Payload(tagged.tag(value, types, "session", max_bytes, _PickleWalk), form)
    if _is_plain_behind_nonce(payload, _READ * max_bytes):
        raise DocumentRefusedError(_NO_CRYPTOGRAPHY)
    if not encrypted:
        raise DocumentRefusedError(_CUSTOM_SERIALIZER)
    return Payload(opaque=payload)


def write(document: Document, form: Form, *, types: str = "strict") -> str:
    """A freshly made payload of ``document``, which Beaker's serializer of that form reads as the same value.

    :param types: unless ``strict``, a pickle has the values that tags stand for. JSON has the tags themselves.
    """
    if form == "pickle":
        data = (
            pickle.dumps(document, _PROTOCOL)
            if types == "strict"
            else pickle.dumps(tagged.untag(document), _TAGGED_PROTOCOL)
        )
    else:
        data = zlib.compress(json.dumps(document).encode("ascii"))
    return base64.b64encode(data).decode("ascii")


class _Unreadable(Exception):  # noqa: N818 - never leaves this module
    """Why a payload is not what its first bytes promise."""


def _form(payload: str) -> Form | None:
    """Which form ``payload`` has, going by its first three bytes."""
    try:
        head = binascii.a2b_base64(payload[:4])
    except ValueError:
        return None
    if len(head) < 3:
        return None
    if head[0] == 0x80 and head[1] <= pickle.HIGHEST_PROTOCOL and head[2] in _FIRST_OPCODES:
        return "pickle"
    if head[0] == 0x78 and int.from_bytes(head[:2], "big") % 31 == 0:  # a zlib header: RFC 1950, 2.2
        return "json"
    return None


def _is_plain_behind_nonce(payload: str, limit: int) -> bool:
    """Whether this is what Beaker makes with ``encrypt_key`` when it has no AES library (beaker.crypto.noencryption).

    A few right bytes in ciphertext are a matter of luck, so the whole body has to be readable.
    """
    for length in range(4, _MAX_NONCE + 1, 4):
        form = _form(payload[length : length + 4])
        if form is not None:
            try:
                _load(payload[length:], form, limit, _Unpickler)
            except _Unreadable:
                continue
            return True
    return False


def _load(payload: str, form: Form, limit: int, unpickler: type[_Unpickler]) -> Any:
    """The value in ``payload``, with stand-ins for what is not data.

    :param limit: the longest JSON text to unpack, in bytes.
    """
    try:
        data = base64.b64decode(payload, validate=True)
    except ValueError:
        raise _Unreadable("is not base64 throughout") from None
    return _unpickle(data, unpickler) if form == "pickle" else _unzip(data, limit)


def _unzip(data: bytes, limit: int) -> Any:
    unpacker = zlib.decompressobj()
    try:
        text = unpacker.decompress(data, limit + 1)
    except zlib.error as error:
        raise _Unreadable(f"cannot be unpacked: {error}") from None
    if len(text) > limit:
        raise ValueTooLargeError(f"the session unpacks to more than {limit:,} bytes; at most that many are read")
    if not unpacker.eof:
        raise _Unreadable("is cut off")
    if unpacker.unused_data:
        raise _Unreadable("has something behind its end")
    try:
        # Lenient, as Beaker's own: the strict walk names the place of a NaN, which no JSON reader does.
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _Unreadable(f"is not JSON: {error}") from None


# -- pickle as data


class Recorder:
    """Stands for an instance of a class, or the result of a function, that a pickle names. It does nothing.

    Each name gets a subclass of its own that bears it as ``__module__`` and ``__qualname__``. Whatever a pickle does
    to an object ends up here: calls and ``__new__`` (REDUCE, NEWOBJ, INST, OBJ), state (BUILD), members (APPENDS,
    SETITEMS, ADDITEMS).
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def _ignore(*ignored: object) -> None:  # the pickle may "call" it on the class, without an instance
        pass

    __setstate__ = __setitem__ = append = extend = add = _ignore


class _Getattr(Recorder):
    """In protocol 2 a class inside a class is spelled ``getattr(Outer, "Inner")``."""

    #: What stands for names with a dot.
    special: ClassVar[_Bases] = {}

    def __new__(cls, *args: object) -> Any:
        if len(args) == 2 and _is_stand_in(args[0]):
            return _stand_in(args[0].__module__, f"{args[0].__qualname__}.{args[1]}", cls.special)
        return object.__new__(cls)


class _Reconstructor(Recorder):
    """In protocols 0 and 1 an object is spelled ``copyreg._reconstructor(class, ...)``."""

    def __new__(cls, *args: object) -> Any:
        return object.__new__(args[0] if args and _is_stand_in(args[0]) else cls)


def _is_stand_in(value: object) -> TypeGuard[type[Recorder]]:
    return isinstance(value, type) and issubclass(value, Recorder)


def _stand_in(module: str, name: str, special: _Bases) -> type[Recorder]:
    base = special.get((module, name), Recorder)
    return type("Recorder", (base,), {"__module__": module, "__qualname__": name})


#: Which stand-ins do more than bear their names.
_Bases = Mapping[tuple[str, str], type[Recorder]]
_SPECIAL: Final[_Bases] = {
    ("builtins", "getattr"): _Getattr,
    ("copyreg", "_reconstructor"): _Reconstructor,
}


class _Unpickler(pickle.Unpickler):
    """Resolves no name at all. Persistent ids and out-of-band buffers are refused by its base class."""

    special: ClassVar[_Bases] = _SPECIAL

    def __init__(self, stream: io.BytesIO) -> None:
        super().__init__(stream)
        self._stand_ins: dict[tuple[str, str], type[Recorder]] = {}

    def find_class(self, module: str, name: str) -> type[Recorder]:
        # Protocol 2 spells names as Python 2 did.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if (module, name) == ("_codecs", "encode"):
            module, name = "builtins", "bytes"  # protocol 2 has no bytes: they are encode("...", "latin1")
        stand_in = self._stand_ins.get((module, name))
        if stand_in is None:
            stand_in = self._stand_ins[module, name] = _stand_in(module, name, self.special)
        return stand_in


def _unpickle(data: bytes, unpickler: type[_Unpickler]) -> Any:
    # Sizes need no guard here: what comes in is what Beaker in this very process has just written.
    if data[-1:] != _LAST_OPCODE:
        raise _Unreadable("is cut off")
    if _has_extension_codes(data):
        raise _Unreadable("uses copyreg's extension codes, which mean nothing outside of the program that wrote it")
    stream = io.BytesIO(data)
    try:
        value = unpickler(stream).load()
    except _Unreadable:
        raise
    except Exception as error:  # noqa: BLE001 - a malformed pickle can raise anything
        raise _Unreadable(f"cannot be read: {type(error).__name__}: {ascii(str(error))[1:-1][:100]}") from None
    if stream.read(1):
        raise _Unreadable("has something behind its end")
    return value


def _has_extension_codes(data: bytes) -> bool:
    """Whether ``data`` names something by a number of copyreg's extension registry.

    The C unpickler takes what such a number stands for from a cache of the process, past `find_class`, and what
    `find_class` returns it puts there. While no number is registered, which is everywhere, it refuses them itself.
    """
    if not getattr(copyreg, "_inverted_registry", True):
        return False
    try:
        return any(opcode.name.startswith("EXT") for opcode, _, _ in pickletools.genops(data))
    except Exception:  # noqa: BLE001 - a malformed pickle; the unpickler would execute its valid part
        return True


# -- the tagged types' spellings in pickles


class _Call(Recorder):
    """Keeps what it was called with, for `_PickleWalk`. Still nothing is done with it while the pickle is read."""

    args: tuple[object, ...] = ()
    #: What BUILD gave it; None: nothing, and the class itself: something no pickler gives it.
    state: object = None

    def __new__(cls, *args: object, **kwargs: object) -> Any:
        call = object.__new__(cls)
        call.args = args
        if kwargs:
            call.state = _Call
        return call

    def _set_state(*args: object) -> None:  # see Recorder._ignore
        if len(args) == 2 and isinstance(args[0], _Call):
            args[0].state = args[1]

    def _spoil(*args: object) -> None:
        if args and isinstance(args[0], _Call):
            args[0].state = _Call

    __setstate__ = _set_state
    __setitem__ = append = extend = add = _spoil


class _TaggedGetattr(_Getattr):
    #: A zone is ``getattr(ZoneInfo, "_unpickle")(name, from cache?)``.
    special: ClassVar[_Bases] = {("zoneinfo", "ZoneInfo._unpickle"): _Call}


class _Malformed(Exception):  # noqa: N818 - never leaves this module
    """No pickler calls it so."""


def _called(value: object, module: str, name: str) -> tuple[object, ...] | None:
    """The arguments of ``module.name`` if that is what ``value`` stands for."""
    if isinstance(value, _Call) and (type(value).__module__, type(value).__qualname__) == (module, name):
        if value.state is not None:
            raise _Malformed
        return value.args
    return None


def _bytes_of(value: object) -> bytes:
    if type(value) is bytes:
        return value
    match _called(value, "builtins", "bytes"):
        case ():
            return b""
        case (str(text), "latin1"):
            try:
                return text.encode("latin-1")
            except UnicodeEncodeError:
                raise _Malformed from None
    raise _Malformed


def _packed(call: _Call, length: int) -> bytes:
    packed = _bytes_of(call.args[0] if call.args else None)
    if len(packed) != length:
        raise _Malformed
    return packed


def _is_int(value: object) -> TypeGuard[int]:
    return type(value) is int


def _timedelta(call: _Call) -> datetime.timedelta:
    match call.args:
        case (days, seconds, microseconds) if _is_int(days) and _is_int(seconds) and _is_int(microseconds):
            return datetime.timedelta(days, seconds, microseconds)
    raise _Malformed


def _zone(args: tuple[object, ...]) -> tuple[datetime.timezone | None, str | None]:
    """A time's zone, of which it has one or none: a fixed offset, or a name."""
    match args:
        case ():
            return None, None
        case (_Call() as zone,):
            match _called(zone, "datetime", "timezone"):
                case (_Call() as offset,) | (_Call() as offset, str()):
                    if _called(offset, "datetime", "timedelta") is not None:
                        return datetime.timezone(_timedelta(offset)), None
            match _called(zone, "zoneinfo", "ZoneInfo._unpickle"):
                case (str(name), 0 | 1):
                    return None, name
        case (Recorder() as zone,):
            raise Refused(
                f"is a time with {documents.name_of(zone)} for its zone; use datetime.timezone or zoneinfo.ZoneInfo"
            )
    raise _Malformed


def _datetime_argument(call: _Call) -> str:
    # As datetime.datetime.__reduce_ex__ has it; the constructor would believe any day and hour that is packed so.
    high, low, month, day, hour, minute, second, *microsecond = _packed(call, 10)
    offset, zone = _zone(call.args[1:])
    moment = datetime.datetime(
        high * 256 + low, month & 0x7F, day, hour, minute, second, int.from_bytes(microsecond, "big"), offset,
        fold=month >> 7,
    )  # fmt: skip
    return tagged.zoned(moment, zone)


def _time_argument(call: _Call) -> str:
    hour, minute, second, *microsecond = _packed(call, 6)
    offset, zone = _zone(call.args[1:])
    time = datetime.time(hour & 0x7F, minute, second, int.from_bytes(microsecond, "big"), offset, fold=hour >> 7)
    return tagged.zoned(time, zone)


def _date_value(call: _Call) -> datetime.date:
    high, low, month, day = _packed(call, 4)
    if len(call.args) != 1:
        raise _Malformed
    return datetime.date(high * 256 + low, month, day)


def _decimal_value(call: _Call) -> decimal.Decimal:
    match call.args:
        case (str(text),):
            number = decimal.Decimal(text)
            if str(number) == text:
                return number
    raise _Malformed


def _uuid_value(call: _Call) -> uuid.UUID:
    match call.args, call.state:
        # How it was made ("is_safe") is no part of its value.
        case (), {"int": number, **rest} if _is_int(number) and rest.keys() <= {"is_safe"}:
            return uuid.UUID(int=number)
    raise _Malformed


def _members(call: _Call) -> list[Any]:
    match call.args:
        case (list(members),):
            return members
    raise _Malformed


#: How the value is made of what the pickle calls. Times and sets are not made: zones would have to be looked up, and
#: stand-ins in a set are not what they stand for.
_VALUES: Final[dict[tuple[str, str], Callable[[_Call], Any]]] = {
    ("builtins", "bytes"): _bytes_of,
    ("datetime", "date"): _date_value,
    ("datetime", "timedelta"): _timedelta,
    ("decimal", "Decimal"): _decimal_value,
    ("uuid", "UUID"): _uuid_value,
}
_TIMES: Final[dict[tuple[str, str], tuple[str, Callable[[_Call], str]]]] = {
    ("datetime", "datetime"): ("$datetime", _datetime_argument),
    ("datetime", "time"): ("$time", _time_argument),
}
_SETS: Final = {("builtins", "set"): "$set", ("builtins", "frozenset"): "$frozenset"}
_TAGGED: Final[_Bases] = {
    **_SPECIAL,
    **dict.fromkeys((*_VALUES, *_TIMES, *_SETS, ("datetime", "timezone")), _Call),
    ("builtins", "getattr"): _TaggedGetattr,
}


class _TaggedUnpickler(_Unpickler):
    """Resolves no name either."""

    special = _TAGGED


class _PickleWalk(tagged.TaggedWalk):
    """Knows what the stand-ins stand for."""

    __slots__ = ("_in_set",)

    def __init__(self, max_bytes: int) -> None:
        super().__init__(max_bytes)
        self._in_set = False

    def other(self, value: Any, levels: int) -> Any:
        if not isinstance(value, _Call):
            return super().other(value, levels)
        name = type(value).__module__, type(value).__qualname__
        try:
            if value.state is not None and name != ("uuid", "UUID"):
                raise _Malformed
            if name in _TIMES:
                tag, argument_of = _TIMES[name]
                return self.tag_scalar(tag, argument_of(value), levels)
            if name in _VALUES:
                return self.copy(_VALUES[name](value), levels)
            if name in _SETS:
                return self._tag_set(_SETS[name], value, levels)
        except (_Malformed, ValueError, ArithmeticError, LookupError):
            raise Refused(f"is {documents.name_of(value)} as Python writes none") from None
        return super().other(value, levels)

    def _tag_set(self, tag: str, call: _Call, levels: int) -> Document:
        # Whether the members have hashes and differ, the outermost set tells of all inside it.
        outermost, self._in_set = not self._in_set, True
        copy = self.tag_set(tag, call, _members(call), levels)
        if outermost:
            self._in_set = False
            if not tagged.reads(tag, copy[tag]):
                raise Refused(
                    f"is {documents.name_of(call)} as Python writes none, or with more than {tagged.MAX_COLLISIONS} "
                    "members of one hash; store it as a list"
                )
        return copy
