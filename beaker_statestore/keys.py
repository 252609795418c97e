"""Prefix, kind, namespace and key <-> record key. What is stored under a record key is none of its business.

A record key is readable text, UTF-8, and no two different things ever get the same one:

    [prefix]session:<session id>                  the session itself, which Beaker calls 'session'
    [prefix]state:<sender>
    [prefix]<kind>:<namespace>:<key>              everything else

Namespaces, senders and keys are escaped, so that the colons above are the only ones behind the kind, and any str can
be one: empty, with control characters, with lone surrogates (mail headers have them).
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from beaker_statestore.exceptions import ConfigurationError, ValueTooLargeError

__all__ = [
    "KINDS",
    "MAX_KEY",
    "SESSION_KEY",
    "Namespace",
    "escape",
    "escape_field",
    "is_session_id",
    "kind_prefix",
    "prefix_and_kind",
    "shortened",
    "shortened_ids",
    "unescape",
    "validate_prefix",
]

#: What records are for. No kind is the end of another: `validate_prefix` relies on it.
KINDS: Final = frozenset({"session", "cache", "state", "slate", "queue", "lock", "index", "confirm", "mail"})
#: The kinds whose records belong to no namespace.
UNDIVIDED: Final = frozenset({"state"})
#: The longest record key, in bytes.
MAX_KEY: Final = 64 * 1024
#: The longest prefix, in characters.
MAX_PREFIX: Final = 64
#: How many characters of a session's id people are shown: enough to tell sessions apart, too few to become one.
SHOWN: Final = 8

#: The key under which Beaker keeps a session in the session's namespace (beaker.session.Session.save).
SESSION_KEY: Final = "session"

_PREFIX: Final = re.compile(r"[A-Za-z0-9._/:-]*", re.ASCII)
#: What uuid.uuid4().hex looks like, which is what Beaker makes (beaker.session._session_id).
_SESSION_ID: Final = re.compile(r"[0-9a-f]{32}")
#: Such an id, or the hash of one (`_session_part`), within other text.
#: A regular expression for what is between a session's kind and what follows: its id, or the hash of it.
SESSION_PART: Final = r"(?:[0-9a-f]{32}|sha256-[0-9a-f]{64})"
_ID_WITHIN: Final = re.compile(
    rf"(?<![0-9A-Za-z])(?:([0-9a-f]{{{SHOWN}}})[0-9a-f]{{{32 - SHOWN}}}"
    rf"|(sha256-[0-9a-f]{{{SHOWN}}})[0-9a-f]{{{64 - SHOWN}}})(?![0-9A-Za-z])"
)
#: The shortest prefix is the only valid one: a longer one would hold the kind and its colon.
_PREFIX_AND_KIND: Final = re.compile(rf"([A-Za-z0-9._/:-]{{0,{MAX_PREFIX}}}?)({'|'.join(sorted(KINDS))}):", re.ASCII)
#: Controls would spoil listings; UTF-8 has no surrogates; the other two are our own signs.
_UNSAFE: Final = re.compile("[%:\x00-\x1f\x7f-\x9f\ud800-\udfff]")
#: In a field's name a colon means nothing, but an underscore in front marks the fields of ours.
_UNSAFE_IN_FIELD: Final = re.compile("^_|[%\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_ESCAPED: Final = re.compile("(?:%[0-9A-F]{2})+")
#: Stands for a key of None; `escape` never makes it.
_NONE: Final = "%"


def escape(text: str) -> str:
    """``text`` without colons, controls and lone surrogates; different texts stay different.

    They and the percent sign become ``%XX`` for each byte of their UTF-8 form; all else stays as it is.
    """
    return _UNSAFE.sub(_percent, text)


def escape_field(text: str) -> str:
    """``text`` as a field's name in a document: never one of our own (``_expires``), and always storable."""
    return _UNSAFE_IN_FIELD.sub(_percent, text)


def unescape(text: str) -> str:
    """The opposite of `escape` and of `escape_field`. What neither of them can have made comes back as it is."""
    return _ESCAPED.sub(_unpercent, text)


def _percent(match: re.Match[str]) -> str:
    return "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass"))


def _unpercent(match: re.Match[str]) -> str:
    try:
        return bytes.fromhex(match[0].replace("%", "")).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError:
        return match[0]


@lru_cache
def validate_prefix(prefix: str) -> None:
    """Return if ``prefix`` keeps its records apart from those of every other valid prefix.

    It must hold no kind followed by a colon. Proof: let a record key begin both with P + K + ":" and with p + k + ":",
    where P is at least as long as p. If p + k + ":" ends within P, then P holds k + ":", which is forbidden.
    Otherwise P ends somewhere in p + k, and what is left of k before its colon is K, as kinds hold no colons. No kind
    is the end of another, so that is all of k: P = p and K = k. So a record key tells its prefix and its kind, and
    behind them, where all colons are ours, its namespace and its key.

    :raises ConfigurationError: it does not.
    """
    if len(prefix) > MAX_PREFIX:
        raise ConfigurationError(f"prefix has {len(prefix)} characters; it may have {MAX_PREFIX}")
    if not _PREFIX.fullmatch(prefix):
        raise ConfigurationError(
            f"prefix = {prefix!r}: use only the letters A to Z and a to z, digits, and . _ - / : (such as 'shop:')"
        )
    for kind in sorted(KINDS):
        if f"{kind}:" in prefix:
            remedy = prefix.replace(f"{kind}:", f"{kind}/")
            raise ConfigurationError(
                f"prefix = {prefix!r} holds '{kind}:', which begins the records of that kind; write {remedy!r}, say"
            )


def kind_prefix(prefix: str, kind: str) -> bytes:
    """What all record keys of ``kind`` under ``prefix`` begin with, and no others.

    :raises ConfigurationError: there is no such kind, or ``prefix`` is not valid.
    """
    if kind not in KINDS:
        raise ConfigurationError(f"there is no kind {kind!r} of records; the kinds are {', '.join(sorted(KINDS))}")
    validate_prefix(prefix)
    return f"{prefix}{kind}:".encode("ascii")


def prefix_and_kind(record: bytes) -> tuple[str, str] | None:
    """Under which prefix ``record`` is a record key, and of which kind; there is one answer at most.

    None: under no prefix that is valid. See `validate_prefix` for the proof.
    """
    match = _PREFIX_AND_KIND.match(record[: 2 * MAX_PREFIX].decode("ascii", "replace"))
    return None if match is None else (match[1], match[2])


@dataclass(frozen=True, slots=True)
class Namespace:
    """The record keys of one namespace.

    :param prefix: keeps applications apart that share a store; see `validate_prefix`.
    :param kind: one of `KINDS`.
    :param name: the namespace; of a session its id. None for the states of mail senders, and only for them.
    :param hash_ids: whether a session's id shows up only as its hash.
    :raises ConfigurationError: these do not fit each other.
    """

    prefix: str
    kind: str
    name: str | None
    hash_ids: bool = False
    #: What all record keys of this namespace begin with, and no others.
    scan_prefix: bytes = field(init=False)

    def __post_init__(self) -> None:
        start = kind_prefix(self.prefix, self.kind)
        if (self.name is None) != (self.kind in UNDIVIDED):
            raise ConfigurationError(f"records of kind {self.kind!r} cannot be in the namespace {self.name!r}")
        if self.name is not None:
            # All forms of a session's id are such that none begins with another, so that it needs no colon behind it.
            part = _session_part(self.name, self.hash_ids) if self.kind == "session" else escape(self.name) + ":"
            start += part.encode("utf-8")
        object.__setattr__(self, "scan_prefix", start)

    def record(self, key: str | None) -> bytes:
        """The record key of ``key``. None is a key of its own, different from every str.

        :raises ValueTooLargeError: it would be longer than `MAX_KEY`.
        """
        part = _NONE if key is None else escape(key)
        if self.kind == "session":
            part = "" if key == SESSION_KEY else ":" + part
        record = self.scan_prefix + part.encode("utf-8")
        if len(record) > MAX_KEY:
            start = "None" if key is None else repr(key[:40])
            raise ValueTooLargeError(
                f"a {self.kind} key that begins with {start} gives a record key of {len(record)} bytes, above the "
                f"limit of {MAX_KEY}; use a digest of it as the key"
            )
        return record

    def key(self, record: bytes) -> str | None:
        """The key whose record key is ``record``, one that begins with `scan_prefix`.

        The opposite of `record`. What somebody else has put there gives some text, whose `record` is another one.
        """
        text = record[len(self.scan_prefix) :].decode("utf-8", "replace")
        if self.kind == "session":
            if not text:
                return SESSION_KEY
            text = text.removeprefix(":")
        return None if text == _NONE else unescape(text)


def is_session_id(text: str) -> bool:
    """Whether Beaker can have made this id (uuid.uuid4().hex); any other was chosen by a client."""
    return _SESSION_ID.fullmatch(text) is not None


def shortened(record: bytes | str) -> str:
    """A record key as people are shown it: no session's id in it has more than `SHOWN` characters, and a ``…``.

    So ``session:01234567…``, and ``session:sha256-01234567…`` where only hashes are stored; no record of ours has an id
    of another shape in its key. What is before the first ``…`` is how the record key begins. A cache's keys are its
    application's own, digests among them, and stay whole. What is not UTF-8 comes back as surrogates (PEP 383).
    """
    text = record.decode("utf-8", "surrogateescape") if isinstance(record, bytes) else record
    match = _PREFIX_AND_KIND.match(text)
    if match is None or match[2] == "cache":
        return text
    return match[0] + shortened_ids(text[match.end() :])


def shortened_ids(text: str) -> str:
    """``text`` with all that looks like a session's id, or the hash of one, shortened as by `shortened`."""
    return _ID_WITHIN.sub(lambda match: f"{match[1] or match[2]}…", text)


def _session_part(session_id: str, hashed: bool) -> str:
    """Ids come from cookies, that is from anybody; one that Beaker cannot have made shows up as its hash only.

    An id has 122 random bits, so its hash needs neither salt nor secret.
    """
    if not hashed and is_session_id(session_id):
        return session_id
    return "sha256-" + hashlib.sha256(session_id.encode("utf-8", "surrogatepass")).hexdigest()
