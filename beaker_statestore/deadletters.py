"""The dead letters of a queue's consumer: records ``dead=<name>=<number>``. It must not know what becomes of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict

from beaker_statestore.exceptions import DocumentDamagedError
from beaker_statestore.queuelog import QueueLog
from beaker_statestore.queuerecords import DeadLetter, number_in, whole

__all__ = ["DeadLetters"]


class DeadLetters:
    """The dead letters of the consumer ``name``."""

    def __init__(self, queue: QueueLog, name: str) -> None:
        self._queue = queue
        self._start = f"dead={name}="

    def numbers(self) -> list[int]:
        """Of all of them, in order. Not for hot paths."""
        found = (key.removeprefix(self._start) for key in self._queue.keys(self._start))
        return sorted({number for text in found if (number := number_in(text)) is not None})

    def __iter__(self) -> Iterator[DeadLetter]:
        for number in self.numbers():
            letter = self.get(number)
            if letter is not None:
                yield letter

    def get(self, number: int) -> DeadLetter | None:
        """The one of this number; None: there is none. One that cannot be read is ``damaged``, and says why."""
        try:
            document = self._queue.documents.read(self._key(number))
            return None if document is None else DeadLetter.of(document)
        except DocumentDamagedError as error:
            return DeadLetter(number, None, 0.0, f"this dead letter is damaged: {error}", 0, 0.0, damaged=True)

    def put(self, letter: DeadLetter) -> None:
        """Keep ``letter``; doing so twice does no harm."""
        self._queue.documents.put(self._key(letter.number), asdict(letter))

    def discard(self, number: int) -> bool:
        """Remove the one of this number; False: there is none."""
        return self._queue.documents.delete(self._key(number))

    def _key(self, number: int) -> str:
        return f"{self._start}{whole(number, 'a dead letter', 0):016d}"
