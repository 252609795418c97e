"""A queue of mails in the store that all processes share, in place of a Maildir on one machine.

It has the methods of salmon.queue.Queue that others than that class call, so it can be a router's UNDELIVERABLE_QUEUE
or hold the mails that wait for a confirmation. Each mail is one readable document: ``{"at": ..., "envelope": ...,
"mail": "<the text>"}``. Salmon is imported only where a MailRequest is made; the rest, listing, reading, re-delivery,
works without it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import secrets
import smtplib
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from beaker_statestore import keys, observe
from beaker_statestore.collection import Collection
from beaker_statestore.documents import Document, is_number
from beaker_statestore.events import Events
from beaker_statestore.exceptions import (
    ConfigurationError,
    DocumentDamagedError,
    OutcomeUnknown,
    QueueFullError,
    StateStoreError,
    StoreUnavailable,
    ValueTooLargeError,
)
from beaker_statestore.locks import Lease
from beaker_statestore.queuedmail import Envelope, QueuedMail, document_of, mail_of, taken_apart
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store

__all__ = ["Deliver", "Envelope", "MailQueue", "QueuedMail", "count_by_queue", "smtp"]

log = logging.getLogger(__name__)

#: The largest mail unless told otherwise, in bytes: the most that Salmon's receivers accept (smtpd.DATA_SIZE_DEFAULT).
LARGEST: Final = 32 * 1024 * 1024
#: How many mails a queue has at most unless told otherwise.
LIMIT: Final = 10_000
#: After this part of the room that a count found has been used, the mails are counted again. So as many processes can
#: push into one queue before its limit may be passed.
ROOM_SHARE: Final = 16
#: For so long a queue that was found full refuses without counting again, in seconds.
FULL_FOR: Final = 1.0
#: How long a re-delivery whose process has died keeps others from trying, in seconds.
SENDING_LEASE: Final = 120.0
#: How long one by `smtp` takes at most until the mail is sent, and then until the server has said goodbye, in seconds.
#: Together they are less than the lease, so that nobody else begins meanwhile.
LONGEST_DIALOGUE: Final = 80.0
LONGEST_ANSWER: Final = 30.0
#: What a document may take beside the mail, in bytes: three addresses, and the names of the fields.
BESIDE: Final = 64 * 1024

#: Sends a mail: its bytes, the sender (empty: nobody) and the recipients of its envelope. Raises if it could not. What
#: takes longer than `SENDING_LEASE` may be done by another, too.
Deliver = Callable[[bytes, str, Sequence[str]], None]

#: A key's time: microseconds since 1970, in hexadecimal digits.
_TIME: Final = re.compile(r"([0-9a-f]{14})-[0-9a-f]{16}")


class MailQueue:
    """Mails in the order in which they were pushed. Safe for threads, and for processes that share the store.

    :param store: a Store, the URL of one, or `Settings`.
    :param name: keeps queues apart.
    :param limit: how many mails it has at most. Counting takes a scan, so it is not done for every push: the limit
        holds for up to `ROOM_SHARE` processes that push at the same time, and room is noticed within `FULL_FOR`.
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
        if lifetime is not None:
            check_lifetime(lifetime)
        self.name = name
        self.limit = limit
        self.largest = largest
        self.lifetime = lifetime
        # Of text without controls, JSON makes twice as much at most (quotation marks, line ends), and base64 less.
        self._mails = Collection(replace(settings, max_value=2 * largest + BESIDE), "mail", name)
        self._locks = keys.Namespace(settings.prefix, "lock", f"mail.{name}")
        self._event = event or ""
        self._events = Events.of(settings) if event else None
        self._naming = threading.Lock()
        self._latest = 0
        self._counting = threading.Lock()
        self._room = 0
        #: Whoever began to wait before this time, on the monotonic clock, is refused, and why.
        self._refusal: tuple[float, type[StoreUnavailable], str] = (-math.inf, StoreUnavailable, "")

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
        """Store a mail, and answer its key. Whatever is in it is not looked at.

        :param message: its bytes or text, an email.message.Message, a salmon.mail.MailRequest, or anything of which
            ``str`` makes a mail, such as a salmon.mail.MailResponse. A MailRequest is stored as it was received, with
            its envelope; to store what a handler has made of it, push ``str(message)``.
        :raises ValueTooLargeError: it is above `largest`; nothing was stored.
        :raises QueueFullError: there is no room.
        """
        data, envelope = taken_apart(message)
        if len(data) > self.largest:
            raise ValueTooLargeError(
                f"this mail has {len(data):,} bytes; the queue {self.name!r} takes up to {self.largest:,} (largest)"
            )
        try:
            self._take_room()
        except QueueFullError:
            observe.count("mails.refused")
            raise
        key = self._new_key()
        self._mails.put(key, document_of(data, envelope, self.lifetime))
        observe.count("mails.pushed")
        if self._events is not None:
            self._events.publish(self._event, queue=self.name, mail=key)
        return key

    def pop(self) -> tuple[str, Any] | tuple[None, None]:
        """Remove a mail and answer its key and a salmon.mail.MailRequest; (None, None) if there is none.

        It is the oldest of those whose keys the store lists first: of all, if they are not many. Of several that pop
        at once, one gets it. Only when an answer of the store was lost may it be two: rather than that nobody has it.
        A mail that Salmon cannot read, or whose record is damaged, is passed over and stays.
        """
        for page in self._mails.pages():
            for key in sorted(key for key in page if key is not None):
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
        return None if document is None else mail_of(key, document)

    def mails(self) -> Iterator[QueuedMail]:
        """All mails, the oldest first, each read when it is its turn. A damaged record is logged and passed over."""
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

    def redeliver(self, key: str, deliver: Deliver, to: Sequence[str] = ()) -> bool:
        """Send the mail once more, and then remove it; False if there was none.

        Of several that want to at once, one sends it, and the others wait and find it gone. When its process dies
        between sending and removing, or an answer is lost, it will be sent again: at least once.

        :param deliver: sends it; see `smtp`. What it raises is raised here, and the mail stays.
        :param to: addresses to send it to, instead of the one that its envelope names.
        :raises StateStoreError: no envelope says whom it was for, so ``to`` has to.
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
                raise StateStoreError(f"no envelope says whom the mail {key} in {self.name} was for: say to whom")
            deliver(mail.data, mail.sender, recipients)
            observe.count("mails.redelivered")
            self.remove(key)
            return True
        finally:
            lease.release()

    def _new_key(self) -> str:
        with self._naming:
            self._latest = max(self._latest + 1, time.time_ns() // 1000)
            return f"{self._latest:014x}-{secrets.token_hex(8)}"

    def _take_room(self) -> None:
        """Count one mail in. One thread counts all, and those who wait for it have what it found."""
        begun = time.monotonic()
        with self._counting:
            if self._room == 0:
                until, kind, reason = self._refusal
                if begun < until:
                    raise kind(reason)
                try:
                    self._room = self._free_room()
                except StoreUnavailable as error:
                    full = isinstance(error, QueueFullError)
                    self._refusal = time.monotonic() + (FULL_FOR if full else 0.0), type(error), str(error)
                    raise
            self._room -= 1

    def _free_room(self) -> int:
        free = self.limit - self.count()
        if free <= 0:
            raise QueueFullError(
                f"the queue {self.name!r} has {self.limit:,} mails, as many as it may (limit): remove some"
            )
        return max(1, free // ROOM_SHARE)

    def _removed(self, key: str, stored: bytes | None) -> bool:
        try:
            return self._mails.store.compare_and_swap(self._mails.records.record(key), stored, None)
        except OutcomeUnknown as error:
            log.warning("popped the mail %s of %s, and it may come once more: %s", key, self.name, error)
            return True

    def _request(self, key: str, document: Document) -> Any:
        from salmon.mail import MailRequest

        mail = mail_of(key, document)
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


def count_by_queue(store: Store | str | Settings, **options: Any) -> dict[str, int]:
    """How many mails each queue has, by name; those whose lifetime is over may be among them.

    :param store: as for `MailQueue`, and so ``options``.
    :raises StoreUnavailable: the store failed.
    """
    settings = Settings.at(store, **options)
    start = keys.kind_prefix(settings.prefix, "mail")
    records = set(open_store(settings.url, **settings.timing).keys(start))
    names = (record[len(start) :].decode("utf-8", "replace").partition(":")[0] for record in records)
    return dict(sorted(Counter(map(keys.unescape, names)).items()))


def smtp(host: str, port: int, timeout: float = LONGEST_ANSWER) -> Deliver:
    """Deliveries to an SMTP server, for `MailQueue.redeliver`.

    :param timeout: how long each answer of the server may take, in seconds, up to `LONGEST_ANSWER`; all of them may
        take `LONGEST_DIALOGUE`.

    They raise OSError, of which smtplib.SMTPException is one, unless the server has taken the mail for all recipients.
    """

    def deliver(data: bytes, sender: str, recipients: Sequence[str]) -> None:
        deadline = time.monotonic() + LONGEST_DIALOGUE
        with smtplib.SMTP(host, port, timeout=min(timeout, LONGEST_ANSWER)) as server, _ended(server, deadline):
            server.ehlo_or_helo_if_needed()
            options = ["BODY=8BITMIME"] if server.has_extn("8bitmime") else []
            if not all(address.isascii() for address in (sender, *recipients)):
                options.append("SMTPUTF8")
            # Salmon's receivers make line ends those of files; on the wire each is two bytes (RFC 5321, 2.3.8).
            refused = server.sendmail(sender, recipients, re.sub(rb"\r\n|\r|\n", b"\r\n", data), options)
            if refused:
                raise smtplib.SMTPRecipientsRefused(refused)

    return deliver


@contextlib.contextmanager
def _ended(server: smtplib.SMTP, deadline: float) -> Iterator[None]:
    """Within it, the connection ends at ``deadline``: smtplib's own time-out is for each read."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError(f"it took the mail server more than {LONGEST_DIALOGUE:g} s to begin")

    def end() -> None:
        connection = server.sock
        if connection is not None:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(left, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_lifetime(seconds: object) -> None:
    """Refuse what is no length of time.

    :raises ConfigurationError: it is none.
    """
    if not is_number(seconds) or not 0 < seconds < math.inf:
        raise ConfigurationError(f"lifetime = {seconds!r}: give a number of seconds above 0, such as 3600")


def _time_of(key: str) -> float | None:
    match = _TIME.fullmatch(key)
    return None if match is None else int(match[1], 16) / 1e6
