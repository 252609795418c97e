"""The states of a mail router (Lamson's model, today Salmon's) in the store that the web application uses.

All states of one sender are one document, ``{"<state key>": "<state>"}``, so they are one read, and changing all of
them is one commit. Salmon is not imported here but for its SMTPError, when a delivery has to be deferred: the storage
has the methods that its Router calls (salmon.routing.StateStorage), and needs nothing else of it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Literal, TypeVar

from beaker_statestore import keys
from beaker_statestore.documents import RESERVED
from beaker_statestore.events import Events
from beaker_statestore.exceptions import (
    ConfigurationError,
    QueueFullError,
    StateStoreError,
    StoreUnavailable,
    ValueTooLargeError,
)
from beaker_statestore.namespace import DocumentManager
from beaker_statestore.settings import read_ini, session_options

__all__ = ["ERROR", "START", "ClearRefusedError", "RouterStateStorage", "install"]

log = logging.getLogger(__name__)

T = TypeVar("T")

#: The state of everybody of whom nothing is known (salmon.routing.ROUTE_FIRST_STATE). It is never stored.
START: Final = "START"
#: The state into which the router puts a sender whose message made a handler raise.
ERROR: Final = "ERROR"

#: With ``on_outage="wait"``: seconds between two tries, at first and at most.
FIRST_PAUSE: Final = 0.1
LONGEST_PAUSE: Final = 5.0


class ClearRefusedError(StateStoreError):
    """`RouterStateStorage.clear` is for tests and was not allowed."""


class RouterStateStorage:
    """Lamson's StateStorage: which state a sender is in, for each state key.

    Keys and senders are kept exactly as given; the sender may be None. Safe for threads, and for processes that share
    the store. Every method raises `StoreUnavailable` when the store fails.

    :param allow_clear: whether `clear` may run.
    :param options: as for `Settings.from_options`, ``url`` above all.
    """

    def __init__(self, *, allow_clear: bool = False, **options: Any) -> None:
        self.allow_clear = allow_clear
        self.documents = DocumentManager(None, kind="state", **options)
        self.events = Events.of(self.documents.settings)
        self._memory = _Memory()

    @classmethod
    def from_settings(
        cls,
        settings: Mapping[str, Any] | str | os.PathLike[str],
        *,
        section: str | None = None,
        allow_clear: bool = False,
    ) -> RouterStateStorage:
        """A storage by the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        mapping = settings if isinstance(settings, Mapping) else read_ini(settings, section)
        return cls(allow_clear=allow_clear, **session_options(mapping))

    def get(self, key: str, sender: str | None) -> str:
        """The sender's state for ``key``; `START` when nothing is known."""
        seen = self._memory.states
        if seen is None:
            return self.states_of(sender).get(key, START)
        if sender not in seen:
            seen[sender] = self._patiently(lambda: self.states_of(sender))
        return seen[sender].get(key, START)

    def set(self, key: str, sender: str | None, state: str) -> None:
        """Put the sender into ``state`` for ``key``. Setting `START` forgets what was known."""
        _refuse_other_than_text(key=key, state=state)
        if state == ERROR:
            _refuse_error_for_outage()
        self._patiently(lambda: self._change(sender, lambda states: {**states, key: state}))

    def move(self, key: str, sender: str | None, before: str | Collection[str], after: str) -> bool:
        """Put the sender into ``after`` if he is in ``before``; False, and no change, if he is in another state.

        Of several that want the same at the same moment, as a mail and a click may, one gets True. It can be more
        only if an answer of the store was lost: what is found done then counts as one's own.

        :param before: a state, or several of which any will do.
        """
        _refuse_other_than_text(key=key, state=after)
        acceptable = {before} if isinstance(before, str) else set(before)
        moved = False

        def change(states: dict[str, str]) -> dict[str, str]:
            nonlocal moved
            moved = states.get(key, START) in acceptable
            return {**states, key: after} if moved else states

        self._change(sender, change)
        return moved

    def states_of(self, sender: str | None) -> dict[str, str]:
        """All that is known of the sender: state key -> state."""
        return _states(self.documents.read(sender))

    def set_all(self, sender: str | None, state: str) -> None:
        """Put the sender into ``state`` for every state key of which anything is known, in one commit."""
        _refuse_other_than_text(state=state)
        self._change(sender, lambda states: dict.fromkeys(states, state))

    def pages(self) -> Iterator[list[tuple[str | None, dict[str, str]]]]:
        """Everybody of whom anything is known, with their states, page by page. Somebody may come more than once."""
        for senders in self.documents.pages():
            yield [(sender, _states(document)) for sender, document in self.documents.read_many(senders).items()]

    def clear(self) -> None:
        """Forget everything of everybody, but nothing besides states and nothing of another prefix.

        :raises ClearRefusedError: the storage was not made with ``allow_clear``.
        """
        if not self.allow_clear:
            raise ClearRefusedError(
                "clear() forgets the states of all senders; it is meant for tests, which make their storage with "
                "allow_clear=True"
            )
        self.documents.remove()
        if self._memory.states is not None:
            self._memory.states.clear()

    @contextmanager
    def delivery(self, deadline: float = 0.0) -> Iterator[None]:
        """Within it, this thread reads each sender's states once, however many handlers the router considers.

        :param deadline: until when, on the monotonic clock, `get` and `set` try again when the store fails. They can:
            doing either twice does no harm.
        """
        memory = self._memory
        if memory.states is not None:
            yield
            return
        memory.states, memory.deadline = {}, deadline
        try:
            yield
        finally:
            memory.states, memory.deadline = None, 0.0

    def _patiently(self, function: Callable[[], T]) -> T:
        return _until(self._memory.deadline, function)

    def _change(self, sender: str | None, change: Callable[[dict[str, str]], dict[str, str]]) -> None:
        seen = self._memory.states
        if seen is not None:
            # Should the change fail, what was seen may be wrong.
            seen.pop(sender, None)
        before: dict[str, str] = {}

        def changed(document: dict[str, Any] | None) -> dict[str, Any]:
            nonlocal before
            before = _states(document)
            return _document(change(before))

        after = _states(self.documents.modify(sender, changed))
        if seen is not None:
            seen[sender] = after
        if self.events is not None:
            for key in sorted(before.keys() | after.keys()):
                if before.get(key) != after.get(key):
                    self.events.publish("state", sender=sender, key=key, state=after.get(key, START))


class _Memory(threading.local):
    """What a thread knows of the delivery that it is busy with: who it has read, and how long it may wait."""

    states: dict[str | None, dict[str, str]] | None = None
    deadline: float = 0.0


def _states(document: Mapping[str, Any] | None) -> dict[str, str]:
    stored = (document or {}).items()
    return {keys.unescape(name): state for name, state in stored if name not in RESERVED and isinstance(state, str)}


def _document(states: Mapping[str, str]) -> dict[str, Any]:
    return {keys.escape_field(key): state for key, state in states.items() if state != START}


def _refuse_other_than_text(**given: object) -> None:
    for name, value in given.items():
        if not isinstance(value, str):
            raise TypeError(f"the {name} of a router's state is {value!r}; it has to be a str")


def _refuse_error_for_outage() -> None:
    """Raise the outage again if that is what the router is about to punish a sender for.

    salmon.routing.RoutingBase.call_safely sets `ERROR` from within the "except" block in which it caught what the
    handler raised; an outage of the store is not the sender's fault and will pass.
    """
    error: BaseException | None = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, StoreUnavailable):
            raise StoreUnavailable(f"a handler met an outage of the store: {error}") from error
        error = error.__cause__ or error.__context__


def install(
    router: Any,
    settings: Mapping[str, Any] | str | os.PathLike[str],
    *,
    section: str | None = None,
    on_outage: Literal["defer", "wait"] = "defer",
    patience: float = 300.0,
    allow_clear: bool = False,
) -> RouterStateStorage:
    """Give Salmon's ``Router`` its states from the store named in ``settings``, and answer the storage.

    Call it in ``config/boot.py``. Installing again replaces what was installed before.

    :param settings: the path of the INI file that the web application uses, or the mapping made from it.
    :param section: of the file, where `read_ini` cannot tell by itself.
    :param on_outage: what becomes of a message when the store is out of reach. ``defer``, for SMTPReceiver and
        LMTPReceiver: it is answered with SMTP 451, and the sending server keeps it and tries again. ``wait``, for
        QueueReceiver, which has taken the message out of its queue already: what the router asks of the store is
        asked again until ``patience`` is over. Either way a handler may run again for the same message: after 451, or
        when it has met the outage by itself.
    :param patience: in seconds. Then the outage is raised, and the receiver pushes the message to the undeliverable
        queue.
    :param allow_clear: whether the storage's `clear` may run, as Salmon's conversations in tests want it.
    :raises ConfigurationError: a setting is missing or wrong.
    """
    if on_outage not in ("defer", "wait"):
        raise ConfigurationError(f"on_outage is {on_outage!r}: write 'defer' for receivers, 'wait' for QueueReceiver")
    if hasattr(router, "STATE_STORAGE"):
        warnings.warn(
            "Router.STATE_STORAGE is set, which Salmon never reads: the attribute is Router.STATE_STORE "
            "(and install() has set it)",
            stacklevel=2,
        )
    storage = RouterStateStorage.from_settings(settings, section=section, allow_clear=allow_clear)
    deliver = _installed.get(router.deliver, router.deliver)
    policy = _deferring(deliver, storage) if on_outage == "defer" else _waiting(deliver, storage, patience)
    router.deliver = policy
    router.STATE_STORE = storage
    _installed[policy] = deliver
    return storage


#: What `install` has put in place of a router's ``deliver`` -> what was there.
_installed: Final[weakref.WeakKeyDictionary[Callable[[Any], None], Callable[[Any], None]]] = weakref.WeakKeyDictionary()


def _deferring(deliver: Callable[[Any], None], storage: RouterStateStorage) -> Callable[[Any], None]:
    from salmon.server import SMTPError

    def deliver_or_defer(message: Any) -> None:
        try:
            with storage.delivery():
                deliver(message)
        except StoreUnavailable as error:
            log.error("deferred a mail to %s by 451: %s", message.To, error)
            full = isinstance(error, QueueFullError) or isinstance(error.__cause__, QueueFullError)
            what = "4.3.1 Too many mails are waiting here" if full else "4.3.0 The state store is out of reach"
            raise SMTPError(451, f"{what}; try again later") from error
        except ValueTooLargeError as error:
            # Nothing has it, and it will not get smaller: the sender has to know.
            raise SMTPError(552, f"5.3.4 {error}") from error

    return deliver_or_defer


def _waiting(deliver: Callable[[Any], None], storage: RouterStateStorage, patience: float) -> Callable[[Any], None]:
    def deliver_or_wait(message: Any) -> None:
        deadline = time.monotonic() + patience

        def attempt() -> None:
            with storage.delivery(deadline):
                deliver(message)

        _until(deadline, attempt)

    return deliver_or_wait


def _until(deadline: float, function: Callable[[], T]) -> T:
    """What ``function`` answers, tried again with growing pauses while the store fails and there is time."""
    pause = FIRST_PAUSE
    while True:
        try:
            return function()
        except StoreUnavailable as error:
            if time.monotonic() + pause > deadline:
                raise
            log.warning("waiting for the state store: %s", error)
        time.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
