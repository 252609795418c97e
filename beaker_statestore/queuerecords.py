"""What a queue keeps besides its messages' bodies, as data: heads, cursors, dead letters; and how they are named.

It must not know where any of it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeGuard

from beaker_statestore.documents import Document
from beaker_statestore.exceptions import ConfigurationError, DocumentDamagedError

__all__ = ["Cursor", "DeadLetter", "Entry", "Head", "Message", "Page", "is_number", "time_of", "valid_name"]

_NAME: Final = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)


def valid_name(name: str, what: str) -> str:
    """``name`` itself.

    :param what: what it is to name, for the message.
    :raises ConfigurationError: it cannot be the name of a queue or a consumer.
    """
    if not _NAME.fullmatch(name):
        raise ConfigurationError(
            f"{name!r} cannot name a {what}: use 1 to 64 of the letters A to Z and a to z, digits, and . _ - "
        )
    return name


@dataclass(frozen=True, slots=True)
class Head:
    """What a queue's record ``floor`` says."""

    #: Below it there is nothing any more.
    floor: int = 1
    #: Below it, all has been removed; between here and the floor, a trimmer may be at work, or have died.
    swept: int = 1
    #: The names of all consumers, each with the number that it began at.
    consumers: Mapping[str, int] = field(default_factory=dict)

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
            and all(is_number(number) for number in consumers.values())
        ):
            raise DocumentDamagedError("a queue's record 'floor' does not say where the floor is")
        return cls(floor, swept, consumers)

    @property
    def document(self) -> Document:
        """As it is stored."""
        return {"floor": self.floor, "swept": self.swept, "consumers": dict(self.consumers)}


@dataclass(frozen=True, slots=True)
class Entry:
    """A message as it is stored."""

    number: int
    #: None: it is damaged.
    document: Document | None
    #: What is wrong with it.
    damage: str = ""
    #: How long its record is, in bytes.
    size: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """What was found from some number on."""

    floor: int
    #: All that follow each other without a gap.
    entries: list[Entry]
    #: The highest number that is known to be taken, if any.
    known: int | None


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
    owner: str | None = None
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
            known = {name: document[name] for name in cls.__dataclass_fields__}
            cursor = cls(**known)
            sound = all(type(n) is int for n in (cursor.next, cursor.beat, cursor.tries, cursor.missed, *cursor.again))
        except (KeyError, TypeError):
            sound = False
        if not sound:
            raise DocumentDamagedError("it is a document, but no cursor of a queue's consumer")
        return cursor

    def moved(self, number: int) -> Cursor:
        """This one at ``number``, if that is not back. What was tried belonged to the message before."""
        return self if number <= self.next else replace(self, next=number, tries=0, error=None)


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
    damaged: bool = False


def is_number(value: object) -> TypeGuard[int]:
    """Whether ``value`` can be a message's number."""
    return type(value) is int and value >= 1


def time_of(value: object) -> float:
    """``value`` if it is a time, else 0."""
    return float(value) if type(value) in (int, float) else 0.0  # type: ignore[arg-type]
