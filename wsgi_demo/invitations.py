"""Members invite others: a task of several pages, kept as one document of the member's slate until it is done.

The document has one field for each address, and each commit changes only what its window has changed, so windows that
work on different addresses do not disturb each other, and nothing is locked while somebody thinks. What is to be said
about an address (already a member, say) is not in it but looked up each time, since it changes meanwhile. Nobody but
this module reads the document.
"""

from __future__ import annotations

import enum
import hashlib
import itertools
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from beaker_statestore.collection import Collection
from beaker_statestore.documents import EXPIRES
from beaker_statestore.keys import Namespace
from beaker_statestore.locks import Lease
from beaker_statestore.settings import Settings as StoreSettings
from beaker_statestore.slates import Slate
from wsgi_demo.automatic import is_address
from wsgi_demo.newsletter import CONFIRMING, DAY, ERROR, MEMBER, Newsletter
from wsgi_demo.relay import RelayError
from wsgi_demo.settings import Settings

__all__ = [
    "LARGEST_TEXT",
    "MOST_ADDRESSES",
    "MOST_AT_ONCE",
    "BusyError",
    "ChangedError",
    "Entry",
    "Finding",
    "Invitations",
    "OvertakenError",
    "Review",
    "Round",
    "TooMuchError",
    "parse",
]

#: The document's name in the slate.
INVITATION = "invitation"

#: How many addresses one invitation may have, and how much text may be read for them at once, in bytes.
MOST_ADDRESSES = 1000
LARGEST_TEXT = 64 * 1024
LONGEST_ADDRESS = 254
#: How long an invitation waits for its author, in seconds: it holds other people's addresses.
LIFETIME = 30 * DAY
#: For how long somebody who was invited counts as invited of late, in seconds: as long as the link in his mail is good.
OF_LATE = 3 * DAY
#: How many mails go out at one press of the button, and for how many seconds, so that a browser never waits for long.
MOST_AT_ONCE = 100
ROUND = 20.0
#: For how long a window that was sending and is heard of no more keeps others from going on, in seconds: more than a
#: round and its last mail should take.
LEASE = 60.0


class TooMuchError(Exception):
    """More was given than an invitation takes; the message says how much, and how much it may be."""


class OvertakenError(Exception):
    """Another window has changed the same addresses, and that stands."""

    def __init__(self, notes: list[str]) -> None:
        """:param notes: what happened, in sentences."""
        super().__init__(*notes)
        self.notes = notes


class ChangedError(Exception):
    """Not the same would be asked as the page has shown, so nobody was."""


class BusyError(Exception):
    """Another window is sending this very invitation, so this one sends nothing."""


class Finding(enum.Enum):
    """What there is to say about an address; the value follows it in a sentence."""

    FINE = "will be asked"
    NO_ADDRESS = "is not a mail address"
    REPEATED = "is in the list already"
    MEMBER = "is a member already"
    ERROR = "is in the state ERROR, and has to start again first"
    INVITED = "was invited by somebody else of late"
    AGAIN = "was invited by you of late"
    CONFIRMING = "has been asked to confirm, and has not answered yet"
    REFUSED = "was refused by the mail server"
    TWICE = "was in the list more than once, and will be asked once"


#: What is asked unless its author says no, and what only if he says yes. All else is not asked.
ASKED = frozenset({Finding.FINE, Finding.TWICE})
ASKED_IF_WANTED = frozenset({Finding.INVITED, Finding.AGAIN, Finding.CONFIRMING, Finding.REFUSED})


@dataclass(frozen=True)
class Entry:
    """One address of an invitation."""

    id: str
    address: str
    finding: Finding
    #: Whether it will be asked, as things are.
    keep: bool
    #: Its field of the document.
    row: Mapping[str, Any]

    @property
    def is_open(self) -> bool:
        """Whether its author decides about it."""
        return self.finding in ASKED or self.finding in ASKED_IF_WANTED

    @property
    def is_wrong(self) -> bool:
        """Whether its author may correct it."""
        return self.finding is Finding.NO_ADDRESS

    @property
    def shown(self) -> str:
        """For a form to give back: it tells what the form's reader has changed from what another window has."""
        return _shown(self.address if self.is_wrong else self.keep)


@dataclass(frozen=True)
class Review:
    """An invitation as it stands."""

    entries: list[Entry]

    @property
    def conflicts(self) -> list[Entry]:
        """Those about which there is something to say."""
        return [entry for entry in self.entries if entry.finding is not Finding.FINE]

    @property
    def fine(self) -> list[Entry]:
        """The others."""
        return [entry for entry in self.entries if entry.finding is Finding.FINE]

    @property
    def chosen(self) -> list[Entry]:
        """Those that will be asked."""
        return [entry for entry in self.entries if entry.keep]

    @property
    def fingerprint(self) -> str:
        """The same for as long as the same will be asked."""
        return _digest("\n".join(sorted(entry.address for entry in self.chosen)))


@dataclass(frozen=True)
class Round:
    """What one press of the button did."""

    sent: int
    #: To how many no mail went: they have got too many of late, or have joined meanwhile.
    unsent: int
    #: How many the mail server has refused; they stay in the list, not chosen.
    refused: int
    #: How many are still to be asked.
    left: int


class Invitations:
    """The invitations of all members; each method works on the one in the slate it is given."""

    def __init__(self, settings: Settings, newsletter: Newsletter) -> None:
        """:param newsletter: asks those who are invited."""
        stored = StoreSettings.of(settings.given)
        self._newsletter = newsletter
        #: By address: who has invited it of late, and with which token.
        self._invited = Collection(stored, "confirm", "invited")
        self._locks = Namespace(stored.prefix, "lock", "invitation")

    def add(self, slate: Slate, text: str) -> int:
        """Put the addresses in ``text`` into the invitation, a new one if there is none; how many were not in it yet.

        :raises TooMuchError: these are more than it takes, so none was put in.
        """
        if (size := len(text.encode())) > LARGEST_TEXT:
            raise TooMuchError(f"That is {size:,} bytes of text; we take {LARGEST_TEXT:,} at a time.")
        given = parse(text)
        new: set[str] = set()

        def put(task: dict[str, Any]) -> None:
            new.clear()
            for written, times in given.items():
                row = task.get(_digest(written))
                if row is None:
                    new.add(written)
                    task[_digest(written)] = {"address": written, "times": times}
            if len(task) > MOST_ADDRESSES:
                raise TooMuchError(
                    f"With these, the list has {len(task):,} addresses; an invitation takes {MOST_ADDRESSES:,}."
                )

        _change(slate, put)
        return len(new)

    def size(self, slate: Slate) -> int:
        """How many addresses there are in the invitation; 0 when there is none."""
        return len(slate.get(INVITATION, {}))

    def look(self, slate: Slate) -> Review:
        """The invitation as it stands, with what there is to say about each address at the moment."""
        rows: Mapping[str, Any] = slate.get(INVITATION, {})
        addresses = [row["address"] for row in rows.values()]
        states = self._newsletter.states_among(addresses)
        invited = self._invited.read_many(addresses)
        entries: list[Entry] = []
        seen: set[str] = set()
        for id_, row in sorted(rows.items(), key=lambda item: (item[1]["address"], item[0])):
            address = row["address"]
            finding = _finding(row, states.get(address), invited.get(address), slate.name, seen)
            seen.add(address)
            # What was under way when an outage broke it off is what he wanted, whatever he is told of it now.
            keep = row.get("keep", "token" in row or finding in ASKED)
            entries.append(Entry(id_, address, finding, keep and finding in ASKED | ASKED_IF_WANTED, row))
        return Review(entries)

    def decide(self, slate: Slate, shown: Mapping[str, str], wanted: Mapping[str, bool | str]) -> None:
        """Save what the author has decided on a page, at which he may have looked for long.

        :param shown: `Entry.shown` of each entry that he could decide about.
        :param wanted: for each of these, whether to ask it, or the corrected address; an empty one removes it.
        :raises OvertakenError: another window has changed some of the same meanwhile. All else is saved.
        """
        notes: list[str] = []

        def apply(task: dict[str, Any]) -> None:
            notes.clear()
            for id_, was in shown.items():
                wish = wanted[id_]
                row = task.get(id_)
                if _shown(wish) == was or (row is None and not wish):
                    continue
                if row is None:
                    notes.append(
                        "An address that you have changed is no longer in the list: another window removed it."
                    )
                elif isinstance(wish, bool):
                    task[id_] = {**row, "keep": wish}
                    task[id_].pop("token", None)
                elif row["address"] == wish:
                    continue
                elif _shown(row["address"]) != was:
                    notes.append(
                        f"Another window has changed an address to “{row['address']}”, and you to “{wish}”: "
                        "if you want yours, add it."
                    )
                elif wish:
                    task[id_] = {**row, "address": wish[:LONGEST_ADDRESS]}
                else:
                    del task[id_]

        _change(slate, apply)
        if notes:
            raise OvertakenError(notes)

    def send(self, slate: Slate, fingerprint: str) -> Round:
        """Ask those that are chosen, up to `MOST_AT_ONCE`; the last round ends the invitation.

        An address leaves the document once its mail is out. So whatever breaks off a round can be followed by another,
        which asks the others; and the one whose mail was just going out, once more if nobody can tell.

        :param fingerprint: of the `Review` that the author has agreed to.
        :raises ChangedError: it is no longer that one.
        :raises BusyError: another window is sending it.
        :raises RelayError: the mail server takes nothing at the moment.
        """
        lease = Lease(self._invited.store, self._locks.record(slate.name), LEASE)
        if not lease.acquire(wait=False):
            raise BusyError
        try:
            return self._send(slate, fingerprint)
        finally:
            lease.release()

    def discard(self, slate: Slate) -> bool:
        """Throw the invitation away; False when there was none."""
        return slate.pop(INVITATION, None) is not None

    def _send(self, slate: Slate, fingerprint: str) -> Round:
        review = self.look(slate)
        if review.fingerprint != fingerprint or not review.entries:
            raise ChangedError
        rows: dict[str, dict[str, Any]] = {}

        def begin(task: dict[str, Any]) -> None:
            rows.clear()
            for entry in review.chosen:
                row = task.get(entry.id)
                if row != entry.row:
                    raise ChangedError
                # What an earlier round has begun keeps its token, so that it is known when it was done.
                rows[entry.id] = task[entry.id] = {"token": secrets.token_hex(8), **row}

        task = _change(slate, begin)
        until = time.monotonic() + ROUND
        sent = unsent = refused = 0
        for id_, row in itertools.islice(rows.items(), MOST_AT_ONCE):
            if time.monotonic() > until:
                break
            if task.get(id_) != row:
                continue  # another window has removed it, or thrown all of it away
            try:
                if self._invite(slate.name, row["address"], row["token"]):
                    sent += 1
                else:
                    unsent += 1
                task = _change(slate, partial(_remove, {id_: row}))
            except RelayError as error:
                if not error.is_final:
                    raise
                refused += 1
                task = _change(slate, partial(_refuse, id_))
        left = sum(task.get(id_) == row for id_, row in rows.items())
        if not (left or refused):
            # Only what another window has added or changed since stays, and is an invitation of its own.
            _change(slate, partial(_remove, {entry.id: entry.row for entry in review.entries}))
        return Round(sent, unsent, refused, left)

    def _invite(self, author: str, address: str, token: str) -> bool:
        """Ask ``address``, if that has not been done with this ``token``; whether it was asked."""
        before = self._invited.read(address)
        if before is not None and before["token"] == token:
            return True
        if not self._newsletter.invite(address):
            return False
        self._invited.put(address, {"by": author, "token": token, EXPIRES: time.time() + OF_LATE})
        return True


def parse(text: str) -> dict[str, int]:
    """What ``text`` has in it that may be an address, in lower case, and how often.

    It may be a list, one in a line or several with commas between them, or a table with one column of addresses, as
    spreadsheets and address books export it. A line without any address counts as a whole, for its author to correct.
    """
    found: dict[str, int] = {}
    for line in text.lower().splitlines():
        cells = [re.sub(r".*<(.*)>", r"\1", cell).strip(" \t\"'<>") for cell in re.split(r"[,;\t]", line)]
        for address in [cell for cell in cells if "@" in cell] or [line.strip(" \t,;")]:
            if address:
                found[address[:LONGEST_ADDRESS]] = found.get(address[:LONGEST_ADDRESS], 0) + 1
    return found


def _finding(
    row: Mapping[str, Any], state: str | None, invited: Mapping[str, Any] | None, author: str, seen: set[str]
) -> Finding:
    if not (is_address(row["address"]) and row["address"].isascii()):
        return Finding.NO_ADDRESS
    if row["address"] in seen:
        return Finding.REPEATED
    if state in (MEMBER, ERROR):
        return Finding.MEMBER if state == MEMBER else Finding.ERROR
    if row.get("refused"):
        return Finding.REFUSED
    if invited is not None:
        return Finding.AGAIN if invited["by"] == author else Finding.INVITED
    if state == CONFIRMING:
        return Finding.CONFIRMING
    return Finding.TWICE if row["times"] > 1 else Finding.FINE


def _refuse(id_: str, task: dict[str, Any]) -> None:
    """Have the author decide anew about a row whose address the mail server has refused."""
    if id_ in task:
        task[id_] = {"address": task[id_]["address"], "times": 1, "keep": False, "refused": True}


def _remove(rows: Mapping[str, Any], task: dict[str, Any]) -> None:
    """Remove ``rows``, except those that another window has changed meanwhile."""
    for id_, row in rows.items():
        if task.get(id_) == row:
            del task[id_]


def _change(slate: Slate, change: Callable[[dict[str, Any]], None]) -> Mapping[str, Any]:
    """Have ``change`` change the document, and answer it as it is then. Once it is empty, there is none."""
    return slate.modify(INVITATION, change, lifetime=LIFETIME)


def _shown(value: bool | str) -> str:
    return _digest(value) if isinstance(value, str) else str(int(value))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]
