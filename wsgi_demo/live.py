"""What is published to the queue of events, handed to the pages that are open: server-sent events.

(https://html.spec.whatwg.org/multipage/server-sent-events.html.) A stream is an answer that goes on for a while, so it
keeps a thread of the web server: hence there is a most, and hence one thread follows the queue for all of them.

This module does not know who may see what: a stream is given a function that says so.
"""

from __future__ import annotations

import json
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from beaker_statestore.events import Events
from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.fanout import Follower, Message, Queue
from beaker_statestore.settings import Settings as StoreSettings

__all__ = ["HEADERS", "MOST_STREAMS", "Live", "Stream", "TooManyStreamsError"]

log = logging.getLogger(__name__)

#: How many streams there are at once in one process. The server needs more threads than that, to answer all else.
MOST_STREAMS = 16
#: After so many seconds a stream ends, and the browser asks for the next; so no mistake of ours lasts.
LIFE = 30.0
#: After so many seconds of silence a comment is sent: the server notices by it that the browser has gone.
HEARTBEAT = 2.0
#: How long a browser waits before it asks for the next stream, in milliseconds.
RETRY = 1000
#: How long the queue is asked to wait for an event, in seconds. The thread outlives the last stream by as much.
PATIENCE = 5.0
#: Who missed more events than that is told that there were some, and not which.
MOST_MISSED = 1000

#: For an answer that is a stream. Proxies must not collect it: nginx obeys X-Accel-Buffering; for others switch the
#: buffering of /events off (Apache: flushpackets=on) and compress no text/event-stream. Their time-out for a silent
#: answer (nginx: proxy_read_timeout) only has to be longer than HEARTBEAT.
HEADERS: Mapping[str, str] = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}

#: What a visitor gets to know of an event; None: nothing, it does not concern him.
Public = Callable[[Mapping[str, Any]], Mapping[str, Any] | None]


class TooManyStreamsError(Exception):
    """There are `MOST_STREAMS` already."""


class Live:
    """The events, and who listens to them in this process. Safe for threads."""

    def __init__(self, events: Queue, most: int = MOST_STREAMS) -> None:
        """:param most: how many streams there may be at once."""
        self._events = events
        self._most = most
        self._lock = threading.Lock()
        self._streams: set[Stream] = set()
        self._follower: Follower | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Live | None:
        """By ``beaker.session.*``; None without ``beaker.session.events``."""
        events = Events.of(StoreSettings.of(given))
        return None if events is None else cls(events.queue)

    def latest(self) -> int:
        """The number of the latest event.

        :raises StoreUnavailable: the store failed.
        """
        return self._events.follow("now").position - 1

    def stream(self, after: int | None, public: Public) -> Stream:
        """A body for a WSGI answer, which has to be closed.

        :param after: the number of the event that the page knows; None: it knows all that has happened.
        :raises TooManyStreamsError: there are too many.
        :raises StoreUnavailable: the store failed. Once there is a stream, it ends instead.
        """
        with self._lock:
            if len(self._streams) >= self._most:
                raise TooManyStreamsError
            if self._follower is None:
                self._follower = self._events.follow("now")
                threading.Thread(target=self._hand_out, args=(self._follower,), name="events", daemon=True).start()
            latest = self._follower.position - 1
            stream = Stream(self, latest if after is None else after, latest, public)
            self._streams.add(stream)
            return stream

    def behind(self, after: int) -> Follower:
        """Reads the events behind the number ``after``."""
        return self._events.follow(after + 1)

    def leave(self, stream: Stream) -> None:
        """Hand nothing out to it any more."""
        with self._lock:
            self._streams.discard(stream)

    def _hand_out(self, follower: Follower) -> None:
        """Follow the queue while there is a stream, or until the store fails: then all streams end."""
        try:
            while self._follower is follower:
                message = follower.receive(PATIENCE)
                # Within the lock, so that the next stream finds either this follower at work, or none.
                with self._lock:
                    if not self._streams:
                        self._follower = None
                    elif message is not None:
                        for stream in self._streams:
                            stream.hand(message)
        except StateStoreError as error:
            log.warning("the event streams end: %s", error)
        finally:
            with self._lock:
                if self._follower is follower:
                    self._follower = None
                    for stream in self._streams:
                        stream.hand(None)


class Stream:
    """One page's events, as the chunks of an answer."""

    def __init__(self, live: Live, after: int, latest: int, public: Public) -> None:
        """:param latest: from behind this number on, events are handed to it."""
        self._live = live
        self._after = after
        self._latest = latest
        self._public = public
        self._handed: queue.Queue[Message | None] = queue.Queue(MOST_MISSED)
        self._over = False

    def hand(self, message: Message | None) -> None:
        """Pass an event on, or None for the end."""
        try:
            self._handed.put_nowait(message)
        except queue.Full:
            # The browser reads too slowly. It can come again, and ask for what is missing.
            self._over = True

    def close(self) -> None:
        """It is over, also if it was never read."""
        self._live.leave(self)

    def __iter__(self) -> Iterator[bytes]:
        deadline = time.monotonic() + LIFE
        yield f"retry: {RETRY}\n\n".encode()
        try:
            yield from self._catch_up()
        except StateStoreError as error:
            log.warning("an event stream ends: %s", error)
            return
        while (left := deadline - time.monotonic()) > 0 and not self._over:
            try:
                message = self._handed.get(timeout=min(HEARTBEAT, left))
            except queue.Empty:
                yield b":\n\n"
                continue
            if message is None:
                break
            yield self._told(message)
        # An event without data is none; but the browser remembers the number, and asks for what follows it.
        yield f"id: {self._after}\n\n".encode()

    def _catch_up(self) -> Iterator[bytes]:
        # What is handed out may be a little behind the page.
        latest = self._latest if self._after <= self._latest else self._live.latest()
        # Not if they are too many, or if the number is of another store, or made up.
        known = 0 <= latest - self._after <= MOST_MISSED
        if not known:
            self._after = latest
        follower = self._live.behind(self._after)
        while follower.position <= self._latest and (message := follower.receive(0)) is not None:
            yield self._told(message)
        self._after = max(self._after, self._latest)
        if follower.missed or not known:
            yield self._event({"event": "missed"})

    def _told(self, message: Message) -> bytes:
        """What to send for an event: nothing if it is known, or does not concern the visitor."""
        if message.number <= self._after:
            return b""
        self._after = message.number
        shown = self._public(message.body) if isinstance(message.body, dict) else None
        if shown is None:
            return b""
        # Who has been signed out gets to know that, and nothing more.
        self._over = self._over or shown.get("event") == "revoked"
        return self._event(shown)

    def _event(self, shown: Mapping[str, Any]) -> bytes:
        return f"id: {self._after}\nevent: change\ndata: {json.dumps(shown)}\n\n".encode()
