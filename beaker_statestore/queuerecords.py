"""What a queue keeps besides its messages' bodies, as data: heads, cursors, dead letters; and how they are named.

It must not know where any of it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, NamedTuple, TypeGuard

from beaker_statestore.documents import Document
from beaker_statestore.exceptions import ConfigurationError, DocumentDamagedError

__all__ = [
    "Cursor",
    "DeadLetter",
    "Enrolment",
    "Entry",
    "Head",
    "Message",
    "Page",
    "is_name",
    "is_number",
    "number_in",
    "time_of",
    "valid_name",
    "whole",
]

#: How many digits a number has at most: nobody can push more.
LONGEST_NUMBER: Final = 18

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_NO_CURSOR: Final = "it is a document, but no cursor of a queue's consumer"
_NO_LETTER: Final = "it is a document, but no dead letter"


def is_name(text: str) -> bool:
    """Whether ``text`` can name a queue or a consumer."""
    return _NAME.fullmatch(text) is not None


def valid_name(name: str, what: str) -> str:
    """``name`` itself.

    :param what: what it is to name, for the message.
    :raises ConfigurationError: it cannot be the name of a queue or a consumer.
    """
    if not is_name(name):
        raise ConfigurationError(
            f"{name!r} cannot name a {what}: use 1 to 64 of the letters A to Z and a to z, digits, and . _ - "
        )
    return name


class Enrolment(NamedTuple):
    """Since when somebody is a consumer."""

    #: The number that it began at.
    start: int
    #: Random, so that it is not taken for a consumer of the same name that was forgotten.
    token: str


@dataclass(frozen=True, slots=True)
class Head:
    """What a queue's record ``floor`` says."""

    #: Below it there is nothing any more.
    floor: int = 1
    #: Below it, all has been removed; between here and the floor, a trimmer may be at work, or have died.
    swept: int = 1
    #: All consumers, by their names.
    consumers: Mapping[str, Enrolment] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Document | None) -> Head:
        """:raises DocumentDamagedError: it is no such document."""
        if document is None:
            return cls()
        floor, swept, consumers = (document.get(name) for name in ("floor", "swept", "consumers"))
        if not (
            is_number(floor)
            and is_number(swept)
            and isinstance(consumers, dict)
            and all(
                isinstance(enrolment, list)
                and len(enrolment) == 2
                and is_number(enrolment[0])
                and isinstance(enrolment[1], str)
                for enrolment in consumers.values()
            )
        ):
            raise DocumentDamagedError("a queue's record 'floor' does not say where the floor is")
        return cls(floor, swept, {name: Enrolment(*enrolment) for name, enrolment in consumers.items()})

    @property
    def document(self) -> Document:
        """As it is stored; never anything that `of` would not take."""
        consumers = {name: list(enrolment) for name, enrolment in self.consumers.items()}
        document: Document = {"floor": self.floor, "swept": self.swept, "consumers": consumers}
        Head.of(document)
        return document


@dataclass(frozen=True, slots=True)
class Entry:
    """A message as it is stored."""

    number: int
    #: None: it is damaged, or none.
    document: Document | None
    #: What is wrong with it.
    damage: str = ""
    #: How long its record is, in bytes.
    size: int = 0
    #: Whether its number only says that there is no message.
    is_tombstone: bool = False

    @property
    def token(self) -> str | None:
        """By which it is told from another message of its number, if it is one."""
        token = (self.document or {}).get("token")
        return token if isinstance(token, str) else None


@dataclass(frozen=True, slots=True)
class Page:
    """What was found from some number on."""

    head: Head
    #: All that follow each other without a gap.
    entries: list[Entry]
    #: Whether the message before these is gone, though it is not below the floor.
    is_torn: bool
    #: The token of that message, by which it is told from another of its number; None: there is none.
    token_before: str | None
    #: The record that was to be read with them.
    beside: bytes | None


@dataclass(frozen=True, slots=True)
class Message:
    """What a consumer receives."""

    number: int
    #: What was pushed, a JSON value.
    body: Any
    #: When, in epoch seconds, by the producer's clock.
    pushed_at: float
    #: How often it has been delivered to this consumer, as far as that is known; 1 is the first time.
    attempt: int = 1
    #: Whether it was a dead letter.
    redelivered: bool = False
    #: Under which lease it was delivered.
    lease: str = field(default="", repr=False, compare=False)

    @classmethod
    def of(cls, entry: Entry, attempt: int = 1, lease: str = "") -> Message:
        """The message of an entry that is not damaged."""
        document = entry.document or {}
        return cls(entry.number, document["body"], time_of(document.get("at")), attempt, lease=lease)


@dataclass(frozen=True, slots=True)
class Cursor:
    """What a consumer's record says."""

    #: The number of the first message that has not been acknowledged.
    next: int
    #: To which `Enrolment` it belongs.
    enrolment: str = ""
    owner: str | None = None
    #: How long the owner may be silent, in seconds.
    lease: float = 0.0
    beat: int = 0
    #: How often that message has failed, and how it did the last time.
    tries: int = 0
    error: str | None = None
    #: How many messages were gone before this consumer had seen them.
    missed: int = 0
    #: Dead letters to be delivered once more.
    again: list[int] = field(default_factory=list)
    at: float = 0.0

    @classmethod
    def of(cls, document: Document) -> Cursor:
        """:raises DocumentDamagedError: it is no such document."""
        try:
            cursor = cls(**{name: document[name] for name in cls.__dataclass_fields__})
        except KeyError:
            raise DocumentDamagedError(_NO_CURSOR) from None
        if not (
            is_number(cursor.next)
            and all(type(count) is int for count in (cursor.beat, cursor.tries, cursor.missed))
            and all(is_time(seconds) for seconds in (cursor.lease, cursor.at))
            and isinstance(cursor.enrolment, str)
            and all(text is None or isinstance(text, str) for text in (cursor.owner, cursor.error))
            and isinstance(cursor.again, list)
            and all(map(is_number, cursor.again))
        ):
            raise DocumentDamagedError(_NO_CURSOR)
        return cursor

    @property
    def document(self) -> Document:
        """As it is stored; never anything that `of` would not take."""
        document = asdict(self)
        Cursor.of(document)
        return document

    def moved(self, number: int) -> Cursor:
        """This one at ``number``, if that is not back. What was tried belonged to the message before."""
        return self if number <= self.next else replace(self, next=number, tries=0, error=None)

    def passed(self, first: int, number: int) -> Cursor:
        """This one behind what is not to be delivered, from ``first`` to before ``number``.

        If something before it has been delivered and not acknowledged, it stays: that may come again, and then this
        does, too.
        """
        return self.moved(number) if self.next == first else self


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A message that a consumer could not handle."""

    number: int
    #: None, too, if the message was damaged.
    body: Any
    pushed_at: float
    #: What the last try ended with.
    error: str
    tries: int
    #: When it was given up, in epoch seconds.
    at: float
    #: The message, or this record of it, cannot be read.
    damaged: bool = False

    @classmethod
    def of(cls, document: Document) -> DeadLetter:
        """:raises DocumentDamagedError: it is no such document."""
        try:
            letter = cls(**{name: document[name] for name in cls.__dataclass_fields__})
        except KeyError:
            raise DocumentDamagedError(_NO_LETTER) from None
        if not (
            is_number(letter.number)
            and is_time(letter.pushed_at)
            and is_time(letter.at)
            and isinstance(letter.error, str)
            and type(letter.tries) is int
            and isinstance(letter.damaged, bool)
        ):
            raise DocumentDamagedError(_NO_LETTER)
        return letter


def is_number(value: object) -> TypeGuard[int]:
    """Whether ``value`` can be a message's number."""
    return type(value) is int and value >= 1


def is_time(value: object) -> TypeGuard[float]:
    """Whether ``value`` can be seconds."""
    return type(value) in (int, float)


def time_of(value: object) -> float:
    """``value`` if it is a time, else 0."""
    return float(value) if is_time(value) else 0.0


def number_in(text: str) -> int | None:
    """The number that ``text`` is, as the last part of a record's key; None: it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= LONGEST_NUMBER else None


def whole(value: object, what: str, least: int = 1) -> int:
    """``value`` itself.

    :param what: what it is, for the message.
    :raises ConfigurationError: it is no int from ``least`` on; ``True`` and ``5.0`` are none, which JSON tells from 5.
    """
    if type(value) is not int or value < least:
        raise ConfigurationError(f"{what} is {value!r}: give a whole number (an int), {least} or more")
    return value
