"""What happens to mail states, sessions and mails, told to a queue, for pages and processes that want to know.

With ``beaker.session.events = events`` in the INI file, `beaker_statestore.router`, `beaker_statestore.sessions` and
`beaker_statestore.mailqueue` publish to the queue ``events`` (`beaker_statestore.fanout`) of the same store::

    {"event": "state", "at": 1764150000.25, "sender": "zed@example.com", "key": "shop.handlers", "state": "MEMBER"}
    {"event": "revoked", "at": ..., "by": "user", "value": "zed@example.com", "ended": 2}
    {"event": "undeliverable", "at": ..., "queue": "undeliverable", "mail": "<its key in that queue>"}

An event is published after its change is done, so it tells nothing that is not so; a process that is killed between the
two, or an outage that comes just then, keeps it to itself. Whoever must know for certain asks for the state.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from beaker_statestore import observe
from beaker_statestore.exceptions import StateStoreError, StoreUnavailable
from beaker_statestore.fanout import Queue
from beaker_statestore.settings import Settings

__all__ = ["Events"]

log = logging.getLogger(__name__)

#: For how long nothing is published after the store has failed, in seconds: who waits for it is somebody's request.
SILENCE: Final = 5.0


class Events:
    """Publishes to a queue. It never stands in the way of what it tells: a full queue forgets its oldest messages."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue
        self._silent_until = 0.0

    @classmethod
    def of(cls, settings: Settings) -> Events | None:
        """Those of an application; None if it has not set ``events``, and wants none.

        :raises ConfigurationError: it has, and that is no name of a queue.
        """
        if settings.events is None:
            return None
        return cls(Queue(settings, settings.events, when_full="forget"))

    def publish(self, kind: str, **fields: Any) -> None:
        """Tell that something of this ``kind`` has happened. Never raises for a store that fails: it has, all the same.

        If the store fails (a server that hangs takes its deadline for that), the events of the next `SILENCE` seconds
        are lost at once.

        :param fields: JSON values. In text, what UTF-8 cannot express (mail headers have it) is escaped.
        """
        if time.monotonic() < self._silent_until:
            observe.count("events.lost")
            return
        told = {name: _expressible(value) for name, value in fields.items()}
        try:
            self.queue.push({"event": kind, "at": round(time.time(), 3), **told})
        except StateStoreError as error:
            if isinstance(error, StoreUnavailable):
                self._silent_until = time.monotonic() + SILENCE
            observe.count("events.lost")
            log.warning("nobody is told of an event (%s): %s", kind, error)


def _expressible(value: Any) -> Any:
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value
