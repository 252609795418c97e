"""Long polls: ``ext("wait", key, milliseconds)`` answers ``1`` as soon as there is a record, or ``0``.

A `WaitingRoom` has those who wait, and is told of all that has been carried out. What may have made one of the records
that are waited for has them looked at, so that whoever is woken is told what is true, whichever way it came there.

No wake-up is lost: one who waits is in the room before the store is looked at for the first time, and a key that is
written while it is being looked at is looked at again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterable, Sequence
from functools import partial
from typing import Any, Final

from beaker_statestore.complaints import Complaints
from beaker_statestore.stores.base import LocalStore, LocalVerbs
from beaker_statestore.tyrant import commands
from beaker_statestore.tyrant.apart import ABSENT, PRESENT, Wait
from beaker_statestore.tyrant.commands import STORE_FAILED, TOO_MUCH, Reply, Request
from beaker_statestore.tyrant.texts import function_name
from beaker_statestore.tyrant.verbs import report

__all__ = ["WaitingRoom"]

#: Keys of those who wait are kept for as long as they do, so longer ones, in bytes, cannot be waited for.
LONGEST_KEY: Final = 64 * 1024
#: One look goes no further once it has taken so many seconds.
LOOK_SECONDS: Final = 0.005
#: Looking may take such a part of the time: after a look there is a pause as long as makes it so. Pauses are saved up
#: until they come to so many seconds, as the loop's timers tell no shorter ones.
LOOK_PART: Final = 0.1
SHORTEST_PAUSE: Final = 0.001

#: Commands that write the record of their first argument; all others, ``ext`` and ``misc`` apart, make none.
_WRITING: Final = frozenset(
    {
        commands.PUT,
        commands.PUTKEEP,
        commands.PUTCAT,
        commands.PUTSHL,
        commands.PUTNR,
        commands.ADDINT,
        commands.ADDDOUBLE,
    }
)
_CALLING: Final = frozenset({commands.EXT, commands.MISC})
#: Functions of ``ext`` that change no record, or only one that is there.
_MAKING_NONE: Final = frozenset(
    {
        commands.PROBE,
        commands.SCAN,
        commands.WAIT,
        commands.STATISTICS,
        commands.REPLACE,
        commands.APPEND,
        commands.PREPEND,
        commands.INCR,
        commands.DECR,
    }
)
_FIRST: Final = slice(1)
_NONE: Final = slice(0)
#: Which arguments of the functions of ``misc`` are keys of records that they write.
_MISC: Final[dict[bytes, slice]] = {
    **dict.fromkeys((b"put", b"putkeep", b"putcat", b"putdup", b"putdupback"), _FIRST),
    b"putlist": slice(None, None, 2),
    **dict.fromkeys((*commands.REPEATABLE_MISC, b"out", b"outlist", b"iterinit", b"iternext", b"sync"), _NONE),
}

#: Runs a short job on the store where batches do (`Server.between`).
Between = Callable[[Callable[[], Any]], Awaitable[Any]]
#: Begins a task, which is ended with the server.
Begin = Callable[[Coroutine[Any, Any, None]], None]


class WaitingRoom:
    """Those who wait for records of a store. For the loop's thread only."""

    def __init__(self, store: LocalStore, most: int, between: Between, begin: Begin, complain: Complaints) -> None:
        """:param most: so many may wait at a time."""
        self._store = store
        self._most = most
        self._between = between
        self._begin = begin
        self._complain = complain
        self._closed = False
        #: What each of those who wait is to be told: that there is a record now, or that the wait is over.
        self._answers: dict[Hashable, asyncio.Future[Reply]] = {}
        #: The same by what they wait for.
        self._waited_for: dict[bytes, set[asyncio.Future[Reply]]] = {}
        #: Those of these keys that may have a record now.
        self._due: dict[bytes, None] = {}
        self._looking = False
        #: Until when there is no look, by the clock.
        self._pause_until = 0.0
        #: How many have been told of a record after a wait, waited in vain, and were not let in.
        self.woken = self.in_vain = self.refused = 0

    def __len__(self) -> int:
        return len(self._answers)

    async def wait(self, who: Hashable, wait: Wait, *, patient: bool) -> Reply:
        """The reply to ``wait``, as soon as there is one.

        :param who: for `dismiss`; waits for nothing else at the time.
        :param patient: otherwise it only looks.
        """
        if len(wait.key) > LONGEST_KEY:
            return Reply(TOO_MUCH)
        if len(self._answers) >= self._most:
            self.refused += 1
            self._complain("a client may not wait: %d do, as many as may (--max-waiters)", len(self._answers))
            return Reply(TOO_MUCH)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Reply] = loop.create_future()
        self._answers[who] = answer
        self._waited_for.setdefault(wait.key, set()).add(answer)
        try:
            await self._between(wait.step)
            if wait.reply is PRESENT or self._closed or not patient:
                return wait.reply
            timer = loop.call_later(wait.seconds, _tell, answer, ABSENT)
            try:
                reply = await answer
            finally:
                timer.cancel()
        finally:
            del self._answers[who]
            others = self._waited_for[wait.key]
            others.discard(answer)
            if not others:
                del self._waited_for[wait.key]
        if reply is PRESENT:
            self.woken += 1
        else:
            self.in_vain += 1
        return reply

    def dismiss(self, who: Hashable) -> None:
        """``who`` may be waiting, and is to wait no more."""
        answer = self._answers.get(who)
        if answer is not None:
            _tell(answer, ABSENT)

    def close(self) -> None:
        """Let all go, and nobody wait any more."""
        self._closed = True
        for answer in self._answers.values():
            _tell(answer, ABSENT)

    def carried_out(self, requests: Iterable[Request]) -> None:
        """``requests`` have been carried out, or may have been."""
        if not self._waited_for:
            return
        for request in requests:
            keys = self._written(request)
            if keys is None:
                self._due.update(dict.fromkeys(self._waited_for))
                break
            for key in keys:
                if key in self._waited_for:
                    self._due[key] = None
        if self._due and not self._looking:
            self._looking = True
            self._begin(self._look())

    def _written(self, request: Request) -> Sequence[bytes] | None:
        """The keys of all records that ``request`` may have made; ``None``: any."""
        command, arguments = request
        keys: Sequence[bytes] | None = ()
        if command in _WRITING:
            keys = arguments[:1]
        elif command is commands.EXT:
            name, key = arguments[:2]
            keys = (key,) if name == commands.CAS else () if name in _MAKING_NONE else None
        elif command is commands.MISC:
            places = _MISC.get(function_name(arguments[0]))
            keys = None if places is None else arguments[1][places]
        # In a fixed-length database many keys mean the same record: 7, 07, and perhaps next.
        return None if keys and self._store.kind == "fixed-length" else keys

    async def _look(self) -> None:
        """Look at the keys that are due until none is."""
        try:
            while self._due:
                pause = self._pause_until - time.monotonic()
                if pause > SHORTEST_PAUSE:
                    await asyncio.sleep(pause)
                    continue
                # Out of the way before looking: what is written from now on is due again.
                keys, self._due = [key for key in self._due if key in self._waited_for], {}
                try:
                    present, looked, took = await self._between(partial(self._look_at, keys))
                except Exception as error:  # noqa: BLE001 - whatever it was, those who wait for these get an answer
                    report(error)
                    self._tell_of(keys, Reply(STORE_FAILED))
                    continue
                self._due = {**dict.fromkeys(keys[looked:]), **self._due}
                self._pause_until = max(self._pause_until, time.monotonic() - took) + took / LOOK_PART
                self._tell_of(present, PRESENT)
        finally:
            self._looking = False

    def _look_at(self, keys: list[bytes]) -> tuple[list[bytes], int, float]:
        """Those of the first of ``keys`` that have a record, how many were looked at, and how many seconds it took."""
        # By this thread's own clock: that a machine is busy with something else is no reason for a longer pause.
        began = time.thread_time()

        def look(records: LocalVerbs) -> tuple[list[bytes], int]:
            present = []
            enough = time.monotonic() + LOOK_SECONDS
            for looked, key in enumerate(keys, 1):
                if records.get(key) is not None:
                    present.append(key)
                if time.monotonic() > enough:
                    return present, looked
            return present, len(keys)

        ((present, looked),) = self._store.apply([look])
        return present, looked, time.thread_time() - began

    def _tell_of(self, keys: Iterable[bytes], reply: Reply) -> None:
        for key in keys:
            for answer in self._waited_for.get(key, ()):
                _tell(answer, reply)


def _tell(answer: asyncio.Future[Reply], reply: Reply) -> None:
    if not answer.done():
        answer.set_result(reply)
