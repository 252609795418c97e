"""One mail of a queue: its bytes, its envelope, the document they are in, and what can be read in them.

A mail comes from anybody. So nothing in it is parsed on its way into the store, where that could keep it from getting
there; what its headers and its text say is found out when somebody asks, and whatever parsers raise then, the rest of
the mail can still be read.
"""

from __future__ import annotations

import base64
import logging
import re
import time
from dataclasses import dataclass, field
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesParser, HeaderParser
from functools import cached_property
from typing import Any, Final

from beaker_statestore.documents import EXPIRES, Document, is_number
from beaker_statestore.exceptions import DocumentDamagedError, DocumentRefusedError

__all__ = ["Envelope", "QueuedMail", "canonical", "is_automatic", "one_address"]

log = logging.getLogger(__name__)

#: How much of a mail is looked through for its headers, and for its text, in bytes.
HEADERS: Final = 64 * 1024
LOOKED_THROUGH: Final = 256 * 1024
#: How many multiparts may be in that. Python's parser compares each line with the boundaries of all that are around it,
#: and half a minute goes by for what somebody has made up to that end.
MULTIPARTS: Final = 50
#: `QueuedMail.subject`, `from_` and `to` have no more characters than that.
SHOWN_HEADER: Final = 200
#: One with more characters is shown as it is: to decode it takes the square of its length.
DECODED: Final = 4096
#: An address is looked for in no more characters than that. (One that can be delivered has 254 at most.)
LONGEST_ADDRESS: Final = 1000

#: As JSON each of these takes six characters; with any of them a mail is no text that people could read.
_CONTROLS: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
#: What mail programs agree upon: no quoted local part, no comment, no route, no second address. In front of the angle
#: there may be a name.
_ADDRESS: Final = r"""[^\s\x00-\x1f\x7f"(),:;<>@[\\\]]+@(?:[^\s\x00-\x1f\x7f"(),:;<>@[\\\]]+|\[[0-9A-Za-z.:]+\])"""
_NAME: Final = r"""(?:"[^"\\\x00-\x08\x0a-\x1f\x7f]*"|[^"(),:;<>@[\\\]\x00-\x08\x0a-\x1f\x7f]*)\s*"""
_ONE_ADDRESS: Final = re.compile(rf"({_ADDRESS})|{_NAME}<({_ADDRESS})>")
_ASCII_LOWER: Final = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def one_address(text: str | None) -> str | None:
    """The bare address in a text that has exactly one, with or without a name: ``Zed <zed@example.com>``; else None."""
    match = _ONE_ADDRESS.fullmatch(text.strip()) if text is not None and len(text) <= LONGEST_ADDRESS else None
    return None if match is None else match[1] or match[2]


def canonical(text: str | None) -> str | None:
    """As `one_address`, with the letters A to Z in lower case, so that equal texts are the same mailbox.

    Other letters stay: some have a lower case that is another address (``K``, the Kelvin sign, becomes ``k``).
    """
    address = one_address(text)
    return None if address is None else address.translate(_ASCII_LOWER)


def is_automatic(data: bytes) -> bool:
    """Whether a program has written this mail, as far as that can be told: a bounce, an absence note.

    Those come with an empty sender or should (RFC 3834, 3.3; RFC 3464), and are never answered (RFC 3834, 2).
    """
    headers = {name.lower(): value.strip().lower() for name, value in _headers(data)}
    return (
        headers.get("auto-submitted", "no").partition(";")[0].strip() != "no"
        or headers.get("content-type", "").startswith("multipart/report")
        or headers.get("return-path") == "<>"
        or (one_address(headers.get("from")) or "").startswith("mailer-daemon@")
    )


@dataclass(frozen=True)
class Envelope:
    """Whom a mail came from and whom it was for, as the router that pushed it knew."""

    #: The host that sent it, and its port; or a name; None: not known.
    peer: str | tuple[Any, ...] | None
    #: As salmon.mail.MailRequest has it: of a bounce, which has no sender, this is its whole From header.
    sender: str | None
    recipient: str | None


@dataclass(frozen=True)
class QueuedMail:
    """One mail of a queue. What it says came from anybody."""

    key: str
    #: When it was pushed, in epoch seconds.
    at: float
    #: The mail itself, byte for byte.
    data: bytes = field(repr=False)
    #: None: it was pushed without one.
    envelope: Envelope | None

    @property
    def subject(self) -> str:
        """Decoded, on one line, and no longer than `SHOWN_HEADER`, as the next two; empty: there is none."""
        return _readable(self._header("subject"), SHOWN_HEADER)

    @property
    def from_(self) -> str:
        """The From header."""
        return _readable(self._header("from"), SHOWN_HEADER)

    @property
    def to(self) -> str:
        """The To header."""
        return _readable(self._header("to"), SHOWN_HEADER)

    @property
    def sender(self) -> str:
        """Whom to name as the sender when it is sent once more; empty, as for bounces, if nobody is to be answered.

        Without an envelope, who is in the From header. Salmon names that also where the envelope's sender was empty,
        so of what a program has written nobody is the sender.
        """
        stated = self._header("from") if self.envelope is None else self.envelope.sender
        address = one_address(stated)
        if address is None or is_automatic(self.data):
            return ""
        # Salmon has an address alone if the envelope had any, and the header, whatever it is, if it had none.
        return address if self.envelope is None or address == stated else ""

    @property
    def recipients(self) -> list[str]:
        """Whom it was for; empty: there is no envelope that says so. The To header may name anybody."""
        recipient = None if self.envelope is None else self.envelope.recipient
        return [] if recipient is None or one_address(recipient) != recipient else [recipient]

    def headers(self) -> list[tuple[str, str]]:
        """Name and value of each header, decoded and on one line, in their order."""
        return [(name, _readable(value, HEADERS)) for name, value in self._headers]

    def text(self) -> str | None:
        """The first plain text in it, however it may be encoded; None: there is none.

        It is looked for in the first `LOOKED_THROUGH` bytes, unless they have more than `MULTIPARTS` parts of parts.
        """
        beginning = self.data[:LOOKED_THROUGH]
        if beginning.lower().count(b"multipart/") > MULTIPARTS:
            return None
        try:
            for part in BytesParser().parsebytes(beginning).walk():
                if part.get_content_type() == "text/plain" and part.get_content_disposition() != "attachment":
                    payload = part.get_payload(decode=True)
                    if isinstance(payload, bytes):
                        return _decoded(payload, part.get_content_charset("utf-8"))
        except Exception:
            # What parsers raise for what somebody has made up can be anything.
            log.info("no text can be read in the mail %s", self.key, exc_info=True)
        return None

    @cached_property
    def _headers(self) -> list[tuple[str, str]]:
        return _headers(self.data)

    def _header(self, name: str) -> str:
        return next((value for header, value in self._headers if header.lower() == name), "")


# -- message -> document -> mail


def taken_apart(message: object) -> tuple[bytes, Envelope | None]:
    """The bytes of what was pushed, and its envelope if it has one.

    :raises DocumentRefusedError: it is text that has no bytes.
    """
    if isinstance(message, (bytes, bytearray)):
        return bytes(message), None
    if isinstance(message, Message):
        return message.as_bytes(), None
    received = getattr(message, "Data", None)
    if not isinstance(received, (bytes, str)):
        return _encoded(str(message)), None
    request: Any = message
    return _encoded(received), Envelope(_peer(request.Peer), _stated(request.From), _stated(request.To))


def document_of(data: bytes, envelope: Envelope | None, lifetime: float | None) -> Document:
    """What is stored of a mail that has just come."""
    now = time.time()
    document: Document = {"at": now}
    if envelope is not None:
        document["envelope"] = {"peer": envelope.peer, "from": envelope.sender, "to": envelope.recipient}
    try:
        text = data.decode("utf-8")
        if _CONTROLS.search(text):
            raise ValueError
        document["mail"] = text
    except ValueError:
        document["mail_base64"] = base64.b64encode(data).decode("ascii")
    if lifetime is not None:
        document[EXPIRES] = now + lifetime
    return document


def mail_of(key: str, document: Document) -> QueuedMail:
    """The mail in a document.

    :raises DocumentDamagedError: there is none.
    """
    try:
        text = document.get("mail")
        data = text.encode("utf-8") if text is not None else base64.b64decode(document["mail_base64"], validate=True)
        at = document["at"]
        envelope = document.get("envelope")
        return QueuedMail(
            key=key,
            at=float(at) if is_number(at) else 0.0,
            data=data,
            envelope=None if envelope is None else _envelope(envelope),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DocumentDamagedError(f"the record of the mail {key} is none that a queue has made") from error


def _envelope(document: Document) -> Envelope:
    peer = document["peer"]
    return Envelope(tuple(peer) if isinstance(peer, list) else peer, document["from"], document["to"])


def _encoded(text: str | bytes) -> bytes:
    try:
        # Parsers of Python's keep bytes that are no text as surrogates (PEP 383).
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise DocumentRefusedError(
            "the mail's text has a lone surrogate in it, which is no character: push bytes"
        ) from None


def _peer(peer: object) -> str | tuple[Any, ...] | None:
    if isinstance(peer, (tuple, list)):
        return tuple(part if isinstance(part, int) else _stated(part) for part in peer[:4])
    return _stated(peer)


def _stated(text: object) -> str | None:
    return None if text is None else _storable(str(text)[:LONGEST_ADDRESS])


def _storable(text: str) -> str:
    """Text without lone surrogates, which JSON does not have."""
    return text.encode("utf-8", "replace").decode("utf-8")


# -- bytes -> what people read


def _headers(data: bytes) -> list[tuple[str, str]]:
    """Name and value of each header, on one line, not decoded: what is encoded there is no address (RFC 2047, 5)."""
    try:
        # Of bytes, the parser would give up all that is not ASCII; UTF-8 is allowed (RFC 6532).
        message = HeaderParser().parsestr(data[:HEADERS].decode("utf-8", "replace"))
        return [(name, "".join(str(value).splitlines())) for name, value in message.items()]
    except Exception:
        log.info("a mail's headers cannot be read", exc_info=True)
        return []


def _readable(header: str, length: int) -> str:
    """A header as people read it, on one line."""
    raw = header[: 4 * length]
    try:
        text = str(make_header(decode_header(raw))) if len(raw) <= DECODED else raw
    except Exception:  # noqa: BLE001 - it names its charset itself, and codecs raise whatever they like
        text = raw
    text = _storable(" ".join(text.split()))
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _decoded(payload: bytes, charset: str) -> str:
    try:
        return payload.decode(charset, "replace")
    except Exception:  # noqa: BLE001 - as above
        return payload.decode("utf-8", "replace")
