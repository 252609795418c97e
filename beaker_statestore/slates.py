"""Slates: many small documents for each user in the place of one session, and login tokens with a life of their own.

The idea is fumanchu's ("Slates, a replacement for sessions"): what a session keeps in one bag, and under one lock, are
tokens that expire, user information that hardly ever changes, and the data of one task, thrown away when it is done.
Here each of them is a document by itself, committed atomically by itself, so nothing waits while somebody thinks::

    slates = Slates("127.0.0.1:1978")
    slate = slates["zed"]
    with slate.edit("new_id_set") as document:
        document["addresses"] = addresses
    slate["new_id_set"]["addresses"]
    slate.pop("new_id_set")

A slate is a namespace of its user's name; the logins of all users are in two namespaces beside them. It must not know
any framework or engine.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Final, TypeVar

from beaker_statestore import documents, keys, observe
from beaker_statestore.collection import Collection, birth, born
from beaker_statestore.documents import COMMIT, EXPIRES, RESERVED, Document
from beaker_statestore.exceptions import Conflict, DocumentError, DocumentRefusedError
from beaker_statestore.settings import Settings
from beaker_statestore.stores.base import Store
from beaker_statestore.tokens import Tokens, check_seconds, valid_name

__all__ = ["KEEP", "Keep", "Slate", "Slates"]

D = TypeVar("D")

#: A record outlives its document by so many seconds, so that an expiry takes nothing from an edit under way. What was
#: edited then lives on for as long, unless the edit says it.
LATE: Final = 3600.0
#: How often `Slate.modify` runs its function, unless told otherwise.
TRIES: Final = 50
#: A document touched when less than this part of its lifetime is over is left as it is.
FRESH: Final = 0.1


class Keep:
    """The type of `KEEP`, so that it is distinct from ``None``, which means never."""

    def __repr__(self) -> str:
        return "KEEP"


#: As a ``lifetime``: the document expires when it would have, and a new one never.
KEEP: Final = Keep()

_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


class _Required:
    """The type of `_REQUIRED`, the default of `Slate.pop`."""


_REQUIRED: Final = _Required()


class Slates:
    """All slates in a store, by their users' names.

    :param store: a store or its URL.
    :param options: those of `Settings`, such as ``prefix``, ``store_key`` and ``max_value``.
    :raises ConfigurationError: an option is wrong.

    ``slates[user]`` makes no round trip. A user may be called anything of up to `MAX_NAME` characters. Safe for
    threads. Every method of slates and tokens raises `StoreUnavailable` when the store fails.
    """

    def __init__(self, store: Store | str | Settings, **options: Any) -> None:
        settings = Settings.at(store, **options)
        self._settings = settings
        #: Who has signed in.
        self.auth = Tokens(settings)

    @classmethod
    def from_settings(
        cls, application: Mapping[str, Any] | str | os.PathLike[str], *, section: str | None = None
    ) -> Slates:
        """By the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        return cls(Settings.of(application, section))

    def __getitem__(self, user: str) -> Slate:
        return Slate(self._settings, user)


class Slate:
    """The documents of one user; `Slates` makes it.

    What is read is the caller's own copy, and read-only at its top level, since to change it would change nothing
    stored. What is written is plain JSON (`DocumentRefusedError` names what is not). An empty document is as good as
    none, and an expired one is none.
    """

    def __init__(self, settings: Settings, user: str) -> None:
        """:raises ValueTooLargeError: the name is longer than `MAX_NAME` characters."""
        #: Whose slate it is.
        self.name = valid_name(user, "a user")
        # An underscore in front is for namespaces of ours.
        self._documents = Collection(settings, "slate", keys.escape_field(user))
        self._max_value = settings.max_value

    def __repr__(self) -> str:
        return f"<Slate of {self.name!r}>"

    # -- reading

    @property
    def user(self) -> Mapping[str, Any]:
        """The document ``user``, about the user: read on almost every page and changed hardly ever; empty if absent."""
        return self.get("user", _NOTHING)

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        """:raises KeyError: there is no such document."""
        found = self.get(name)
        if found is None:
            raise KeyError(name)
        return found

    def get(self, name: str, default: D = None) -> Mapping[str, Any] | D:  # type: ignore[assignment]  # D is None then
        """The document ``name``; ``default`` if there is none."""
        fields = _fields(self._documents.read(valid_name(name, "a document")))
        return MappingProxyType(fields) if fields else default

    def __contains__(self, name: str) -> bool:
        return self.get(name) is not None

    def names(self) -> list[str]:
        """The names of all documents, sorted. Looks through the whole slate, so not for hot paths."""
        found: set[str] = set()
        for page in self._documents.pages():
            read = self._documents.read_many(page)
            found.update(name for name, document in read.items() if name is not None and _fields(document))
        return sorted(found)

    # -- writing

    def __setitem__(self, name: str, document: Mapping[str, Any]) -> None:
        self.put(name, document)

    def put(self, name: str, document: Mapping[str, Any], *, lifetime: float | None = None) -> None:
        """Store the whole document, whatever was there; an empty one removes it.

        It is another document than that which was there: whoever is editing that one gets a `Conflict`.

        :param lifetime: after how many seconds it expires; None: never.
        """
        _check(lifetime)
        fields = self._plain(valid_name(name, "a document"), document)
        if fields:
            self._documents.put(name, born({**fields, **_expiry(lifetime)}))
        else:
            self._documents.delete(name)

    def __delitem__(self, name: str) -> None:
        """:raises KeyError: there is no such document."""
        if name not in self or not self._documents.delete(name):
            raise KeyError(name)

    def clear(self) -> None:
        """Remove all documents of this slate, one by one. Looks through the whole slate. No token is revoked."""
        self._documents.delete_all()

    @contextmanager
    def edit(self, name: str, *, lifetime: float | Keep | None = KEEP) -> Iterator[Document]:
        """Change a document within a ``with``, and commit what changed at its end, all of it or nothing.

        The body gets a dict of its own, empty if there is no such document; nothing is held or locked meanwhile. The
        top-level fields that it has added, changed or removed are applied to what the store has by then, so that two
        who change different fields both succeed. If the body raises, nothing is written; nor if it changes nothing. A
        document that ends up empty is removed.

        A document that expires meanwhile is kept whole. Without a ``lifetime`` it then lives on for `LATE` seconds.
        An edit that ends later than `LATE` seconds after the expiry finds it removed, which is a conflict.

        :param lifetime: after how many seconds from the commit the document expires; None: never; `KEEP`: when it
            would have, and a new one never.
        :raises Conflict: somebody else has changed the same fields meanwhile, if only to the same values, or has
            removed the document or replaced it by another.
        :raises ContentionError: others kept changing it for 5 seconds, which are conflicts of nobody.
        :raises OutcomeUnknown: an answer was lost, and nobody can tell whether the edit was done.
        """
        _check(lifetime)
        fetched = self._documents.fetch(valid_name(name, "a document"))
        base = _fields(fetched.document)
        document = copy.deepcopy(base)
        yield document
        ours = self._plain(name, document)
        changed = documents.difference(base, ours)
        if not changed:
            return
        merged = False

        def committed(current: Document | None) -> Document | None:
            nonlocal merged
            if base and (current is None or birth(fetched.document) not in (None, birth(current))):
                if current is None and not ours:
                    return None
                raise Conflict(sorted(base.keys() | ours.keys()))
            theirs = _own(current) if base else _fields(current)
            changed_by_others = documents.difference(base, theirs)
            # Two who come to the same value may both have counted one further, so that is a conflict, too.
            conflicts = {name for name in changed & changed_by_others if name in ours or name in theirs}
            if conflicts:
                raise Conflict(sorted(conflicts))
            merged = bool(changed_by_others)
            is_late = bool(base) and _is_over(current)
            life = LATE if is_late and isinstance(lifetime, Keep) else lifetime
            kept = {name: value for name, value in theirs.items() if name not in changed}
            after = {**kept, **{name: ours[name] for name in changed & ours.keys()}}
            return _dated(after, current if theirs else None, life)

        try:
            self._documents.modify(name, committed, known=fetched.stored, own=True)
        except Conflict:
            observe.count("slates.conflicts")
            raise
        observe.count("slates.merged" if merged else "slates.committed")

    def modify(
        self,
        name: str,
        function: Callable[[Document], object],
        *,
        lifetime: float | Keep | None = KEEP,
        tries: int = TRIES,
    ) -> Mapping[str, Any]:
        """Have ``function`` change a document, and answer the document as it is then.

        For what cannot be merged because it depends on what is there, such as two fields that have to add up. Where
        `edit` raises `Conflict`, here the function runs again, on what the other has stored.

        :param function: gets a dict of its own, empty if there is no such document, and changes it; leaves it empty to
            remove the document. It must have no other effect, as it may run several times. If it raises, nothing is
            written. What it returns is ignored.
        :param lifetime: as for `edit`.
        :param tries: how often it may run.
        :raises Conflict: somebody else was quicker each time.
        """
        if tries < 1:
            raise ValueError(f"tries = {tries!r}: the function has to run at least once")
        _check(lifetime)
        valid_name(name, "a document")
        runs = 0
        wanted: frozenset[str] = frozenset()

        def changed(current: Document | None) -> Document | None:
            nonlocal runs, wanted
            if runs == tries:
                observe.count("slates.conflicts")
                raise Conflict(sorted(wanted))
            runs += 1
            fields = _fields(current)
            document = copy.deepcopy(fields)
            function(document)
            ours = self._plain(name, document)
            wanted = documents.difference(fields, ours)
            return _dated(ours, current if fields else None, lifetime) if wanted else current

        return MappingProxyType(_fields(self._documents.modify(name, changed, own=True)))

    def pop(self, name: str, default: D | _Required = _REQUIRED) -> Document | D:
        """Remove a document and answer it; of several that pop it at once, one gets it.

        :param default: the answer if there is none.
        :raises KeyError: there is none, and no default.
        :raises OutcomeUnknown: it is gone or changed, and whether this call removed it or another, nobody knows.
        """
        taken = self._documents.take(valid_name(name, "a document"), lambda document: bool(_fields(document)))
        if taken is not None:
            return _fields(taken)
        if isinstance(default, _Required):
            raise KeyError(name)
        return default

    def setdefault(self, name: str, document: Mapping[str, Any], *, lifetime: float | None = None) -> Mapping[str, Any]:
        """Store a document unless there is one, and answer the one that is there then: the same to all who try.

        :param lifetime: of a new one, in seconds; None: it never expires.
        """
        _check(lifetime)
        fields = self._plain(valid_name(name, "a document"), document)

        def unless_there(current: Document | None) -> Document | None:
            return current if _fields(current) or not fields else born({**fields, **_expiry(lifetime)})

        return MappingProxyType(_fields(self._documents.modify(name, unless_there)))

    def increment(self, name: str, field: str, by: float = 1, *, lifetime: float | Keep | None = KEEP) -> Any:
        """Add ``by`` to the number in a field, 0 if it is absent, and answer the sum. Nobody else gets the same one.

        :param lifetime: as for `edit`.
        :raises DocumentError: there is something else than a number.
        """
        if not documents.is_number(by):
            raise TypeError(f"{by!r} cannot be added: give a number")

        def added(document: Document) -> None:
            number = document.get(field, 0)
            if not documents.is_number(number):
                raise self._misfit(name, field, number, "a number to add to")
            document[field] = number + by

        return self._counting(name, field, added, lifetime)[field]

    def append(self, name: str, field: str, value: Any, *, lifetime: float | Keep | None = KEEP) -> int:
        """Append ``value`` to the list in a field, empty if it is absent, and answer the new length.

        :param lifetime: as for `edit`.
        :raises DocumentError: there is something else than a list.
        """

        def added(document: Document) -> None:
            values = document.setdefault(field, [])
            if not isinstance(values, list):
                raise self._misfit(name, field, values, "a list to append to")
            values.append(value)

        return len(self._counting(name, field, added, lifetime)[field])

    def _counting(
        self, name: str, field: str, function: Callable[[Document], None], lifetime: float | Keep | None
    ) -> Document:
        """`modify` without a limit of tries: what `increment` and `append` do is never a conflict."""
        _check(lifetime)
        valid_name(name, "a document")
        documents.refuse_reserved({field: None}, f"slate[{name!r}]")

        def changed(current: Document | None) -> Document | None:
            document = _fields(current)
            before = current if document else None
            function(document)
            return _dated(document, before, lifetime)

        return self._documents.modify(name, changed, own=True) or {}

    def touch(self, name: str, lifetime: float | None) -> bool:
        """Have a document expire ``lifetime`` seconds from now (None: never); False if there is none.

        One that has been renewed less than a tenth of its lifetime ago is only read.
        """
        _check(lifetime)
        found = False

        def renewed(current: Document | None) -> Document | None:
            nonlocal found
            fields = _fields(current)
            found = bool(fields)
            if current is None or not found or _is_fresh(current, lifetime):
                return current
            return _dated(fields, current, lifetime)

        self._documents.modify(valid_name(name, "a document"), renewed)
        return found

    def _plain(self, name: str, document: Mapping[str, Any]) -> Document:
        """A copy of ``document`` as it will come back from the store.

        :raises DocumentRefusedError: it cannot be stored.
        """
        if not isinstance(document, Mapping):
            raise DocumentRefusedError(f"the document {name!r} has to be a mapping, not {documents.name_of(document)}")
        root = f"slate[{name!r}]"
        documents.refuse_reserved(document, root)
        return documents.normalize(dict(document), root, self._max_value)

    def _misfit(self, name: str, field: str, value: object, wanted: str) -> DocumentError:
        return DocumentError(f"slate[{name!r}][{field!r}] is {documents.name_of(value)}, not {wanted}")


def _check(lifetime: float | Keep | None) -> None:
    """:raises ValueError: it is no length of time."""
    if not (lifetime is None or isinstance(lifetime, Keep)):
        check_seconds(lifetime)


def _expiry(lifetime: float | None) -> Document:
    """The field of ours that a document of that lifetime has from now on."""
    return {} if lifetime is None else {EXPIRES: time.time() + lifetime + LATE}


def _is_over(document: Document | None) -> bool:
    """Whether the document has expired; its record stands for `LATE` seconds more."""
    return documents.is_expired(document or {}, time.time() + LATE)


def _fields(document: Document | None) -> Document:
    """The application's fields of a document; none if it has expired."""
    return {} if _is_over(document) else _own(document)


def _own(document: Document | None) -> Document:
    """The application's fields of a document, even if it has expired."""
    return {name: value for name, value in (document or {}).items() if name not in RESERVED}


def _dated(fields: Document, before: Document | None, lifetime: float | Keep | None) -> Document | None:
    """The document of the application's ``fields`` that follows ``before``; None if they are none."""
    if not fields:
        return None
    ours = {name: value for name, value in (before or {}).items() if name in (COMMIT, EXPIRES)}
    if not isinstance(lifetime, Keep):
        ours.pop(EXPIRES, None)
        ours.update(_expiry(lifetime))
    return {**fields, **ours}


def _is_fresh(document: Document, lifetime: float | None) -> bool:
    """Whether renewing it would hardly change its expiry."""
    expires_at = document.get(EXPIRES)
    if lifetime is None or expires_at is None:
        return lifetime is expires_at
    return bool(0 <= time.time() + lifetime + LATE - expires_at < FRESH * lifetime)
