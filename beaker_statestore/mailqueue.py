"""A queue of mails in the store that all processes share, in place of a Maildir on one machine.

It has the methods of salmon.queue.Queue, so that it can be a router's UNDELIVERABLE_QUEUE or hold the mails that wait
for a confirmation. Each mail is one readable document: ``{"at": ..., "from": ..., "mail": "<the text>", ...}``. Salmon
is imported only where a MailRequest is made; the rest, listing, reading, re-delivery, works without it.
"""

from __future__ import annotations

import base64
import logging
import os
import re
import secrets
import smtplib
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from email.errors import HeaderParseError
from email.header import decode_header, make_header
from email.message import Message
from email.parser import BytesParser, HeaderParser
from email.utils import getaddresses, parseaddr
from functools import cache
from typing import Any, Final

from beaker_statestore import keys, observe
from beaker_statestore.collection import Collection
from beaker_statestore.documents import EXPIRES, Document, is_number
from beaker_statestore.events import Events
from beaker_statestore.exceptions import (
    DocumentDamagedError,
    DocumentRefusedError,
    OutcomeUnknown,
    QueueFullError,
    StateStoreError,
    ValueTooLargeError,
)
from beaker_statestore.locks import Lease
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import Store

__all__ = ["Deliver", "Envelope", "MailQueue", "QueuedMail", "smtp"]

log = logging.getLogger(__name__)

#: The largest mail unless told otherwise, in bytes: the most that Salmon's receivers accept (smtpd.DATA_SIZE_DEFAULT).
LARGEST: Final = 32 * 1024 * 1024
#: How many mails a queue has at most unless told otherwise.
LIMIT: Final = 10_000
#: After this part of the room that a count found has been used, the mails are counted again. So as many processes can
#: push into one queue before its limit may be passed.
ROOM_SHARE: Final = 16
#: How long a re-delivery whose process has died keeps others from trying, in seconds.
SENDING_LEASE: Final = 120.0

#: In a document there is no more of a header than so many characters, found in so many bytes.
SHOWN_HEADER: Final = 200
HEADERS: Final = 64 * 1024
#: Of an address in an envelope, in characters. (One that can be delivered has 254 at most.)
LONGEST_ADDRESS: Final = 2000
#: What a document may take beside the mail, in bytes: four headers or addresses, and the names of the fields.
BESIDE: Final = 64 * 1024

#: Sends a mail: its bytes, the sender (empty: nobody) and the recipients of its envelope. Raises if it could not.
Deliver = Callable[[bytes, str, Sequence[str]], None]

#: As JSON each of these takes six characters; with any of them a mail is no text that people could read.
_CONTROLS: Final = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")
#: An address alone, as Salmon makes it of an envelope's.
_BARE: Final = re.compile(r"[^\s<>]+@[^\s<>]+")
#: A key's time: microseconds since 1970, in hexadecimal digits.
_TIME: Final = re.compile(r"([0-9a-f]{14})-[0-9a-f]{16}")


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
    #: The headers of these names, decoded, on one line, and no longer than `SHOWN_HEADER`; empty: there is none.
    subject: str
    from_: str
    to: str
    #: None: it was pushed without one.
    envelope: Envelope | None

    @property
    def sender(self) -> str:
        """Whom to name as the sender when it is sent once more; empty, as for bounces, if nobody is to be answered.

        Without an envelope, who is in the From header.
        """
        if self.envelope is None:
            return parseaddr(self._header("from"))[1]
        sender = self.envelope.sender or ""
        # Salmon has an address alone if the envelope had any, and the header, whatever it is, if it had none.
        return sender if _BARE.fullmatch(sender) else ""

    @property
    def recipients(self) -> list[str]:
        """Whom to send it to; without an envelope, who is in the To header."""
        if self.envelope is not None and self.envelope.recipient:
            return [parseaddr(self.envelope.recipient)[1] or self.envelope.recipient]
        return [address for _, address in getaddresses([self._header("to")]) if address]

    def headers(self) -> list[tuple[str, str]]:
        """Name and value of each header, decoded and on one line, in their order."""
        return [(name, _readable(value, HEADERS)) for name, value in _headers(self.data).items()]

    def text(self) -> str | None:
        """The first plain text in it, however it may be encoded; None: there is none."""
        try:
            for part in BytesParser().parsebytes(self.data).walk():
                if part.get_content_type() == "text/plain" and part.get_content_disposition() != "attachment":
                    payload = part.get_payload(decode=True)
                    if isinstance(payload, bytes):
                        return _decoded(payload, part.get_content_charset("utf-8"))
        except Exception:
            # What parsers raise for what somebody has made up can be anything.
            log.info("no text can be read in the mail %s", self.key, exc_info=True)
        return None

    def _header(self, name: str) -> str:
        # Not decoded: a name in a header may have been encoded so that it reads like one more address.
        return _storable(_headers(self.data).get(name, "")) or ""


class MailQueue:
    """Mails in the order in which they were pushed. Safe for threads, and for processes that share the store.

    :param store: a Store, the URL of one, or `Settings`.
    :param name: keeps queues apart.
    :param limit: how many mails it has at most. Counting takes a scan, so it is not done for every push: the limit
        holds for up to `ROOM_SHARE` processes that push at the same time.
    :param largest: of a mail, in bytes.
    :param lifetime: how long a mail stays, in seconds; None: until it is removed.
    :param event: as what `Events` tell of a mail that is pushed, where the settings have ``events``; None: not at all.
    :param options: as for `Settings.from_options`.
    :raises ConfigurationError: an option is wrong.

    Every method raises `StoreUnavailable` when the store fails.
    """

    def __init__(
        self,
        store: Store | str | Settings,
        name: str,
        *,
        limit: int = LIMIT,
        largest: int = LARGEST,
        lifetime: float | None = None,
        event: str | None = "undeliverable",
        **options: Any,
    ) -> None:
        settings = Settings.at(store, **options)
        self.name = name
        self.limit = limit
        self.largest = largest
        self.lifetime = lifetime
        # Of text without controls, JSON makes twice as much at most (quotation marks, line ends), and base64 less.
        self._mails = Collection(replace(settings, max_value=2 * largest + BESIDE), "mail", name)
        self._locks = keys.Namespace(settings.prefix, "lock", f"mail.{name}")
        self._event = event or ""
        self._events = Events.of(settings) if event else None
        self._lock = threading.Lock()
        self._latest = 0
        self._room = 0
        self._ahead: deque[str] = deque()

    @classmethod
    def from_settings(
        cls,
        application: Mapping[str, Any] | str | os.PathLike[str],
        name: str,
        *,
        section: str | None = None,
        **options: Any,
    ) -> MailQueue:
        """A queue by the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :param options: ``limit``, ``largest``, ``lifetime`` and ``event``, as above.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        return cls(Settings.of(application, section), name, **options)

    def push(self, message: object) -> str:
        """Store a mail, and answer its key.

        :param message: its bytes or text, an email.message.Message, a salmon.mail.MailRequest, whose envelope is kept
            with it, or anything of which ``str`` makes a mail, such as a salmon.mail.MailResponse. A MailRequest that
            no handler has changed is stored as it was received, byte for byte; one that was changed, as it is now.
        :raises ValueTooLargeError: it is above `largest`; nothing was stored. Where Salmon's receivers are, it is a
            salmon.server.SMTPError, too: the sending server hears 552 and tells whoever wrote it.
        :raises QueueFullError: there is no room.
        """
        data, envelope = _taken_apart(message)
        if len(data) > self.largest:
            raise _too_large(
                f"this mail has {len(data):,} bytes; the queue {self.name!r} takes up to {self.largest:,} (largest)"
            )
        self._take_room()
        key = self._new_key()
        self._mails.put(key, _document(data, envelope, self.lifetime))
        observe.count("mails.pushed")
        if self._events is not None:
            self._events.publish(self._event, queue=self.name, mail=key)
        return key

    def pop(self) -> tuple[str, Any] | tuple[None, None]:
        """Remove the oldest mail and answer its key and a salmon.mail.MailRequest; (None, None) if there is none.

        Of several that pop at once, one gets it. Only when an answer of the store was lost may it be two: rather than
        that nobody has it. A mail that Salmon cannot read, or whose record is damaged, is passed over and stays.
        """
        for key in self._to_pop():
            try:
                document, stored = self._mails.fetch(key)
                request = None if document is None else self._request(key, document)
            except DocumentDamagedError as error:
                log.warning("passed over the mail %s in %s: %s", key, self.name, error)
                continue
            if request is not None and self._removed(key, stored):
                return key, request
        return None, None

    def get(self, key: str) -> Any:
        """The mail as a salmon.mail.MailRequest, which stays; None: there is none, or Salmon cannot read it."""
        document = self._mails.read(key)
        return None if document is None else self._request(key, document)

    def read(self, key: str) -> QueuedMail | None:
        """The mail, which stays; None: there is none."""
        document = self._mails.read(key)
        return None if document is None else _queued(key, document)

    def mails(self) -> Iterator[QueuedMail]:
        """All mails, the oldest first. One whose record is damaged is logged and passed over."""
        for key in self.keys():
            try:
                mail = self.read(key)
            except DocumentDamagedError as error:
                log.warning("passed over the mail %s in %s: %s", key, self.name, error)
                continue
            if mail is not None:
                yield mail

    def remove(self, key: str) -> bool:
        """Remove the mail; False if there was none."""
        return self._mails.delete(key)

    def keys(self) -> list[str]:
        """The keys of all mails, the oldest first."""
        found = {key for page in self._mails.pages() for key in page if key is not None}
        if self.lifetime is not None:
            earliest = time.time() - self.lifetime
            found = {key for key in found if (at := _time_of(key)) is None or at > earliest}
        return sorted(found)

    def __len__(self) -> int:
        """How many mails there are."""
        return len(self.keys())

    count = __len__

    def __bool__(self) -> bool:
        """True, also when it is empty: whether there is a queue must not depend on what is in it."""
        return True

    def clear(self) -> None:
        """Remove all mails of this queue, and nothing else."""
        self._mails.delete_all()

    def oversize(self, key: str) -> tuple[bool, None]:
        """Whether the mail is above `largest`, and None where Salmon names a file.

        `push` refuses such mails, so it has come from where the limit is higher.
        """
        mail = self.read(key)
        return mail is not None and len(mail.data) > self.largest, None

    def redeliver(self, key: str, deliver: Deliver, to: Sequence[str] = ()) -> bool:
        """Send the mail once more, and then remove it; False if there was none.

        Of several that want to at once, one sends it, and the others wait and find it gone. When its process dies
        between sending and removing, or an answer is lost, it will be sent again: at least once.

        :param deliver: sends it; see `smtp`. What it raises is raised here, and the mail stays.
        :param to: addresses to send it to, instead of those that it was for.
        :raises StateStoreError: it was for nobody, as far as can be told.
        :raises ContentionError: another has been sending it for minutes.
        """
        lease = Lease(self._mails.store, self._locks.record(key), SENDING_LEASE)
        lease.acquire()
        try:
            mail = self.read(key)
            if mail is None:
                return False
            recipients = list(to) or mail.recipients
            if not recipients:
                raise StateStoreError(f"the mail {key} in {self.name} does not say whom it was for: say to whom")
            deliver(mail.data, mail.sender, recipients)
            observe.count("mails.redelivered")
            self.remove(key)
            return True
        finally:
            lease.release()

    def _new_key(self) -> str:
        with self._lock:
            self._latest = max(self._latest + 1, time.time_ns() // 1000)
            return f"{self._latest:014x}-{secrets.token_hex(8)}"

    def _take_room(self) -> None:
        with self._lock:
            if self._room == 0:
                free = self.limit - self.count()
                if free <= 0:
                    observe.count("mails.refused")
                    raise QueueFullError(
                        f"the queue {self.name!r} has {self.limit:,} mails, as many as it may (limit): remove some"
                    )
                self._room = max(1, free // ROOM_SHARE)
            self._room -= 1

    def _to_pop(self) -> Iterator[str]:
        """The keys to try in one `pop`, each for one thread, the oldest first.

        They are listed once for many pops, since all that are pushed meanwhile are younger.
        """
        listed = False
        while True:
            with self._lock:
                if not self._ahead:
                    if listed:
                        return
                    listed = True
                    self._ahead.extend(self.keys())
                    if not self._ahead:
                        return
                key = self._ahead.popleft()
            yield key

    def _removed(self, key: str, stored: bytes | None) -> bool:
        try:
            return self._mails.store.compare_and_swap(self._mails.records.record(key), stored, None)
        except OutcomeUnknown as error:
            log.warning("popped the mail %s of %s, and it may come once more: %s", key, self.name, error)
            return True

    def _request(self, key: str, document: Document) -> Any:
        from salmon.mail import MailRequest

        mail = _queued(key, document)
        try:
            if mail.envelope is None:
                return MailRequest(self.name, None, None, mail.data)
            request = MailRequest(mail.envelope.peer, mail.envelope.sender, mail.envelope.recipient, mail.data)
        except Exception:
            # What Salmon's parsers raise for what somebody has made up can be anything.
            log.exception("Salmon cannot read the mail %s of %s", key, self.name)
            return None
        # It makes a bare address of what it is given, which these need not have been.
        request.From, request.To = mail.envelope.sender, mail.envelope.recipient
        return request


def smtp(host: str, port: int, timeout: float = 30.0) -> Deliver:
    """Deliveries to an SMTP server, for `MailQueue.redeliver`.

    :param timeout: how long each answer of the server may take, in seconds.

    They raise OSError, of which smtplib.SMTPException is one, unless the server has taken the mail for all recipients.
    """

    def deliver(data: bytes, sender: str, recipients: Sequence[str]) -> None:
        with smtplib.SMTP(host, port, timeout=timeout) as server:
            server.ehlo_or_helo_if_needed()
            options = ["BODY=8BITMIME"] if server.has_extn("8bitmime") else []
            if not all(address.isascii() for address in (sender, *recipients)):
                options.append("SMTPUTF8")
            # Salmon's receivers make line ends those of files; on the wire each is two bytes (RFC 5321, 2.3.8).
            refused = server.sendmail(sender, recipients, re.sub(rb"\r\n|\r|\n", b"\r\n", data), options)
            if refused:
                raise smtplib.SMTPRecipientsRefused(refused)

    return deliver


# -- message -> document


def _taken_apart(message: object) -> tuple[bytes, Envelope | None]:
    """The bytes of what was pushed, and its envelope if it has one."""
    if isinstance(message, (bytes, bytearray)):
        return bytes(message), None
    if isinstance(message, Message):
        return message.as_bytes(), None
    received = getattr(message, "Data", None)
    if not isinstance(received, (bytes, str)):
        return _encoded(str(message)), None
    request: Any = message
    envelope = Envelope(_peer(request.Peer), _address(request.From), _address(request.To))
    return _encoded(str(request) if _changed(request) else received), envelope


def _changed(request: Any) -> bool:
    """Whether a handler has changed the MailRequest, and Salmon can write down what has come of it."""
    try:
        fresh = type(request)(request.Peer, request.From, request.To, request.Data)
        if fresh.base.mime_part.as_bytes() == request.base.mime_part.as_bytes():
            return False
        str(request)
    except Exception:  # noqa: BLE001 - Salmon raises anything for what somebody has made up; it must not be lost
        return False
    return True


def _encoded(text: str | bytes) -> bytes:
    try:
        # Parsers of Python's keep bytes that are no text as surrogates (PEP 383).
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise DocumentRefusedError(
            "the mail's text has a lone surrogate in it, which is no character: push bytes"
        ) from None


def _document(data: bytes, envelope: Envelope | None, lifetime: float | None) -> Document:
    now = time.time()
    headers = _headers(data)
    document: Document = {
        "at": now,
        "subject": _readable(headers.get("subject")),
        "from": _readable(headers.get("from")),
        "to": _readable(headers.get("to")),
    }
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


def _headers(data: bytes) -> Message:
    # Of bytes, the parser would give up all that is not ASCII; UTF-8 is allowed (RFC 6532).
    return HeaderParser().parsestr(data[:HEADERS].decode("utf-8", "surrogateescape"))


def _readable(value: object, length: int = SHOWN_HEADER) -> str:
    """A header as people read it, on one line."""
    raw = "" if value is None else str(value)[: 4 * length]
    try:
        text = str(make_header(decode_header(raw)))
    except (HeaderParseError, LookupError, ValueError):
        text = raw
    text = " ".join(text.split())
    return _storable(text if len(text) <= length else f"{text[: length - 1]}…") or ""


def _storable(text: object) -> str | None:
    """Text without lone surrogates, which JSON does not have."""
    return None if text is None else str(text).encode("utf-8", "replace").decode("utf-8")


def _address(address: object) -> str | None:
    return _storable(address if address is None else str(address)[:LONGEST_ADDRESS])


def _peer(peer: object) -> str | tuple[Any, ...] | None:
    if isinstance(peer, (tuple, list)):
        return tuple(part if isinstance(part, int) else _address(part) for part in peer[:4])
    return _address(peer)


def _decoded(payload: bytes, charset: str) -> str:
    try:
        return payload.decode(charset, "replace")
    except LookupError:
        return payload.decode("utf-8", "replace")


# -- document -> mail


def _queued(key: str, document: Document) -> QueuedMail:
    try:
        text = document.get("mail")
        data = text.encode("utf-8") if text is not None else base64.b64decode(document["mail_base64"], validate=True)
        at = document["at"]
        envelope = document.get("envelope")
        return QueuedMail(
            key=key,
            at=float(at) if is_number(at) else 0.0,
            data=data,
            subject=str(document.get("subject", "")),
            from_=str(document.get("from", "")),
            to=str(document.get("to", "")),
            envelope=None if envelope is None else _envelope(envelope),
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DocumentDamagedError(f"the record of the mail {key} is none that a queue has made") from error


def _envelope(document: Document) -> Envelope:
    peer = document["peer"]
    return Envelope(tuple(peer) if isinstance(peer, list) else peer, document["from"], document["to"])


def _time_of(key: str) -> float | None:
    match = _TIME.fullmatch(key)
    return None if match is None else int(match[1], 16) / 1e6


# -- Salmon's receivers


def _too_large(text: str) -> ValueTooLargeError:
    """The error to raise, which Salmon's receivers answer as 552 where they are."""
    server = sys.modules.get("salmon.server")
    return ValueTooLargeError(text) if server is None else _answered(server.SMTPError)(552, f"5.3.4 {text}")


@cache
def _answered(smtp_error: type[Exception]) -> Callable[[int, str], ValueTooLargeError]:
    return type("MailTooLargeError", (smtp_error, ValueTooLargeError), {"__doc__": "552 for the sending server."})
