"""Warnings that clients can bring about as often as they like, and with which nobody may fill the log."""

from __future__ import annotations

import logging
import time
from typing import Final

__all__ = ["Complaints"]

#: Seconds from one warning to the next.
SILENCE: Final = 60.0


class Complaints:
    """Logs one warning a minute, and all others at the level INFO."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._silent_until = 0.0

    def __call__(self, message: str, *arguments: object) -> None:
        """Log ``message``, with ``arguments`` as `logging` takes them."""
        now = time.monotonic()
        loud = now >= self._silent_until
        if loud:
            self._silent_until = now + SILENCE
        self._logger.log(logging.WARNING if loud else logging.INFO, message, *arguments)
