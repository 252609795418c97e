"""Beaker's session payload <-> document: the only place that touches pickle. It must not know stores.

beaker.session.Session hands its namespace manager one str for the whole session (Session._encrypt_data): base64 of a
pickle, base64 of zlib-compressed JSON, or, with ``encrypt_key``, a nonce in base64 and then base64 of ciphertext. A
custom serializer can make anything.

A pickle is taken apart and never executed: in place of every class and function that it names stands a `Recorder`
that does nothing but bear the name, so that the strict walk in `documents` can say what was found where.
"""

from __future__ import annotations

import base64
import binascii
import copyreg
import io
import json
import pickle
import pickletools
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeGuard

from beaker_statestore import documents
from beaker_statestore.documents import MAX_BYTES, Document
from beaker_statestore.exceptions import DocumentRefusedError, ValueTooLargeError

__all__ = ["Form", "Payload", "read", "write"]

#: Which of Beaker's serializers made a payload: its ``data_serializer``.
Form = Literal["pickle", "json"]

#: How much longer than our text of the same document Beaker's own may be: it writes "\u00e9" (6 bytes) for 2 bytes
#: of UTF-8, and a pickle spends 4 bytes more on each short str. Our own limit is checked exactly afterwards.
_VERBOSITY: Final = 8
#: The longest nonce that we look for, in characters; 24 for 128 bits is Beaker's default, 8 what it had before 1.8.
_MAX_NONCE: Final = 64
#: The pickle protocol that Beaker writes (beaker.util.PickleSerializer).
_PROTOCOL: Final = 2
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


def read(payload: object, *, encrypted: bool = False, max_bytes: int = MAX_BYTES) -> Payload:
    """What is in ``payload``. Nothing in it is executed.

    :param encrypted: the application says that it uses ``encrypt_key``, so that ciphertext is what has to come.
    :param max_bytes: the largest document, in bytes of our JSON text.
    :raises DocumentRefusedError: it holds what JSON cannot, or nobody can tell what it holds, or it is not encrypted
        although it should be.
    :raises ValueTooLargeError: it is too large.
    """
    if not isinstance(payload, str):
        raise DocumentRefusedError(f"a session's payload is a str, but this is a {type(payload).__name__}")
    if len(payload) > _VERBOSITY * max_bytes:
        raise ValueTooLargeError(
            f"the session takes {len(payload):,} characters in Beaker's form; the limit is {max_bytes:,} bytes of JSON"
        )
    form = _form(payload)
    if form is not None:
        try:
            value = _load(payload, form, _VERBOSITY * max_bytes)
        except _Unreadable as error:
            if not encrypted:
                raise DocumentRefusedError(f"the session looks like Beaker's {form}, but {error}") from None
        else:
            if encrypted:
                raise DocumentRefusedError(_NOT_ENCRYPTED)
            return Payload(documents.normalize(value, "session", max_bytes), form)
    if _is_plain_behind_nonce(payload, _VERBOSITY * max_bytes):
        raise DocumentRefusedError(_NO_CRYPTOGRAPHY)
    if not encrypted:
        raise DocumentRefusedError(_CUSTOM_SERIALIZER)
    return Payload(opaque=payload)


def write(document: Document, form: Form) -> str:
    """A freshly made payload of ``document``, which Beaker's serializer of that form reads as the same value."""
    if form == "pickle":
        data = pickle.dumps(document, _PROTOCOL)
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
                _load(payload[length:], form, limit)
            except _Unreadable:
                continue
            return True
    return False


def _load(payload: str, form: Form, limit: int) -> Any:
    """The value in ``payload``, with stand-ins for what is not data.

    :param limit: the longest JSON text to unpack, in bytes.
    """
    try:
        data = base64.b64decode(payload, validate=True)
    except ValueError:
        raise _Unreadable("is not base64 throughout") from None
    return _unpickle(data) if form == "pickle" else _unzip(data, limit)


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

    def __new__(cls, *args: object) -> Any:
        if len(args) == 2 and _is_stand_in(args[0]):
            return _stand_in(args[0].__module__, f"{args[0].__qualname__}.{args[1]}")
        return object.__new__(cls)


class _Reconstructor(Recorder):
    """In protocols 0 and 1 an object is spelled ``copyreg._reconstructor(class, ...)``."""

    def __new__(cls, *args: object) -> Any:
        return object.__new__(args[0] if args and _is_stand_in(args[0]) else cls)


def _is_stand_in(value: object) -> TypeGuard[type[Recorder]]:
    return isinstance(value, type) and issubclass(value, Recorder)


def _stand_in(module: str, name: str) -> type[Recorder]:
    base = _SPECIAL.get((module, name), Recorder)
    return type("Recorder", (base,), {"__module__": module, "__qualname__": name})


_SPECIAL: Final[dict[tuple[str, str], type[Recorder]]] = {
    ("builtins", "getattr"): _Getattr,
    ("copyreg", "_reconstructor"): _Reconstructor,
}


class _Unpickler(pickle.Unpickler):
    """Resolves no name at all. Persistent ids and out-of-band buffers are refused by its base class."""

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
            stand_in = self._stand_ins[module, name] = _stand_in(module, name)
        return stand_in


def _unpickle(data: bytes) -> Any:
    # Sizes need no guard here: what comes in is what Beaker in this very process has just written.
    if data[-1:] != _LAST_OPCODE:
        raise _Unreadable("is cut off")
    if _has_extension_codes(data):
        raise _Unreadable("uses copyreg's extension codes, which mean nothing outside of the program that wrote it")
    stream = io.BytesIO(data)
    try:
        value = _Unpickler(stream).load()
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
