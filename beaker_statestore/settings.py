"""Settings: from the options that Beaker hands over, or an INI file, to one frozen, checked object.

Both doors read the same lines, ``beaker.session.*`` of one section. This module does not know what the settings are
used for.
"""

from __future__ import annotations

import configparser
import difflib
import functools
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Final

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.keys import validate_prefix

__all__ = ["Settings", "UnknownOptionWarning", "cache_options", "read_ini", "session_options"]

#: The application that PasteDeploy loads from a file when no other is named (``paste.deploy.loadwsgi.loadcontext``).
DEFAULT_SECTION: Final = "app:main"
SESSION_PREFIXES: Final = ("beaker.session.", "session.")
CACHE_PREFIXES: Final = ("beaker.cache.", "cache.")
#: The ways of a section to set the URL: for itself, for all, and from what is set for all.
URL_LINES: Final = frozenset(f"{verb}{prefix}url" for verb in ("", "set ", "get ") for prefix in SESSION_PREFIXES)

#: Beaker passes on every option that it does not use up itself, also those that only its own back ends or its
#: middleware know (beaker.middleware, beaker.util.parse_cache_config_options); these mean nothing here and are no
#: mistake of anybody's.
BEAKERS_OWN: Final = frozenset(
    {
        "auto",
        "cookie_domain",
        "cookie_expires",
        "cookie_path",
        "crypto_type",
        "data_dir",
        "data_serializer",
        "digest_filenames",
        "enabled",
        "encrypt_key",
        "encrypt_nonce_bits",
        "expire",
        "expiretime",
        "httponly",
        "id",
        "invalidate_corrupt",
        "key",
        "key_length",
        "lock_dir",
        "log_file",
        "namespace_class",
        "regions",
        "samesite",
        "save_accessed_time",
        "secret",
        "secure",
        "session_class",
        "starttime",
        "timeout",
        "type",
        "use_cookies",
        "validate_key",
        "webtest_varname",
    }
)


#: The least characters of a secret, 128 bits in hexadecimal digits.
SHORTEST_SECRET: Final = 32
#: Stands in ``store_key`` while records in the clear are read, too; in front, they are also written.
PLAINTEXT: Final = "plaintext"


class UnknownOptionWarning(UserWarning):
    """An option that nobody reads; most likely a typing mistake."""


def _text(value: object) -> str:
    return str(value).strip()


def _text_or_none(value: object) -> str | None:
    return None if value is None else _text(value) or None


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    word = str(value).strip().lower()
    if word in ("true", "yes", "on", "1"):
        return True
    if word in ("false", "no", "off", "0"):
        return False
    raise ValueError("write true or false")


def _seconds(value: object) -> float:
    try:
        seconds = float(str(value))
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise ValueError("give a number of seconds above 0, for example 5")
    return seconds


def _seconds_or_none(value: object) -> float | None:
    return None if value in (None, "") else _seconds(value)


def _seconds_or_zero(value: object) -> float:
    return 0.0 if str(value).strip() in ("0", "0.0") else _seconds(value)


def _positive(value: object) -> int:
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("give a whole number above 0, for example 16")
    return number


def _serializer(value: object) -> str | None:
    if value in (None, "", "pickle", "json"):
        return str(value) if value else None
    raise ValueError("write pickle or json, as for Beaker's data_serializer")


def _one_of(*words: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        word = str(value).strip().lower()
        if word not in words:
            raise ValueError(f"write {', '.join(words[:-1])} or {words[-1]}")
        return word

    return parse


def _split(value: object) -> list[str]:
    if isinstance(value, str):
        words = re.split(r"[\s,]+", value)
    elif isinstance(value, Iterable):
        words = list(map(str, value))
    elif value:
        raise ValueError("write text, or a list of texts")
    else:
        words = []
    return [word for word in words if word]


def _words(value: object) -> tuple[str, ...]:
    """A list, or text with blanks, commas or line ends between its words."""
    return tuple(dict.fromkeys(_split(value)))


def _fields(value: object) -> tuple[str, ...]:
    names = _words(value)
    for name in names:
        if name.startswith("_"):
            raise ValueError(f"{name} is a field of Beaker's or of ours; name the application's own, such as user")
        if name.lower() in ("true", "yes", "on", "false", "no", "off"):
            raise ValueError("name the keys under which the sessions hold what they are to be found by, such as user")
    return names


def _secrets(value: object) -> tuple[str, ...]:
    words = _split(value)
    if words.count(PLAINTEXT) > 1:
        raise ValueError(f"the word {PLAINTEXT} is there twice; in front it stops encryption, behind the keys not")
    for number, secret in enumerate(words, 1):
        if "," in secret:
            raise ValueError(f"word {number} has a comma in it; separate keys by blanks, and use none with a comma")
        if len(secret) < SHORTEST_SECRET and secret != PLAINTEXT:
            raise ValueError(
                f"word {number} has {len(secret)} characters; a key needs at least {SHORTEST_SECRET}, make one by "
                f"python3 -c 'import secrets; print(secrets.token_hex(32))' (the one other word is {PLAINTEXT})"
            )
    return () if words == [PLAINTEXT] else tuple(dict.fromkeys(words))


def _prefix(value: object) -> str:
    prefix = _text(value)
    validate_prefix(prefix)
    return prefix


def _url(value: object) -> Any:
    # A Store in place of its URL is passed through, as Beaker's Redis back end takes a client object.
    return _text(value) if isinstance(value, str) else value


def _option(parse: Callable[[object], Any], default: Any) -> Any:
    return field(default=default, metadata={"parse": parse})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the adapters need to know. Every option has the name of its field."""

    #: Where the store is: ``127.0.0.1:1978``, ``unix:/path``, ... (see `beaker_statestore.stores.open_store`).
    url: Any = field(metadata={"parse": _url})
    #: Put before every record key, to keep applications apart that share a server.
    prefix: str = _option(_prefix, "")
    #: How long connecting may take, in seconds.
    connect_timeout: float = _option(_seconds, 2.0)
    #: How long one call may take in all, in seconds. (``timeout`` is Beaker's word for a session's life.)
    deadline: float = _option(_seconds, 5.0)
    #: The most connections that this process opens.
    pool_size: int = _option(_positive, 16)
    #: In which of Beaker's two forms to hand sessions back; None: whichever Beaker used last.
    serializer: str | None = _option(_serializer, None)
    #: The application uses Beaker's ``encrypt_key``: store what cannot be read, and do not merge it.
    encrypted: bool = _option(_flag, False)
    #: What becomes of a save that changes a key which another request has changed meanwhile: ``last``, it wins;
    #: ``raise``, it raises `Conflict` and writes nothing.
    conflict: str = _option(_one_of("last", "raise"), "last")
    #: Whether to insist on a store that can compare and swap. Without it, an original ttserver will do.
    atomic: bool = _option(_flag, True)
    #: A session's time of access is written when it is this much older, in seconds; never more than a tenth of the
    #: timeout. So a session may end that much early.
    touch_interval: float = _option(_seconds_or_zero, 60.0)
    #: How long after its creation a session ends, however much it is used, in seconds; None: never.
    max_lifetime: float | None = _option(_seconds_or_none, None)
    #: Keep only hashes of session ids in the store, so that nobody can use what he reads there as a cookie.
    hash_ids: bool = _option(_flag, False)
    #: The sessions' top-level keys by whose values sessions can be found (`beaker_statestore.sessions`).
    index: tuple[str, ...] = _option(_fields, ())
    #: Secrets to encrypt every document with: the first encrypts, all decrypt. None: documents are stored in the clear.
    #: The word ``plaintext`` behind them: those in the clear are read, too; in front: and written.
    store_key: tuple[str, ...] = field(default=(), metadata={"parse": _secrets}, repr=False)
    #: What becomes of what JSON does not have: ``strict``, it is refused; ``tagged``, it is stored as
    #: ``{"$datetime": ...}`` and the like; ``warn``, the same, and each kind is logged.
    types: str = _option(_one_of("strict", "tagged", "warn"), "strict")
    #: How long the lock for making a cache entry stands when its holder is heard of no more, in seconds.
    creation_lease: float = _option(_seconds, 60.0)
    #: The largest document, in bytes.
    max_value: int = _option(_positive, 1024 * 1024)
    #: How long a cache entry stays behind its expiry, in seconds, for Beaker to serve while it is made anew.
    cache_grace: float = _option(_seconds, 120.0)

    #: The queue (`beaker_statestore.fanout`) that tells what happens to states, sessions and mails; None: none does.
    events: str | None = _option(_text_or_none, None)

    @classmethod
    def at(cls, store: Any, **options: Any) -> Settings:
        """Those of a store, or of its URL, with ``options``; settings come back as they are.

        :raises ConfigurationError: an option is wrong, or given beside settings, which have it already.
        """
        if not isinstance(store, Settings):
            return cls.from_options({"url": store, **options})
        if options:
            raise ConfigurationError(f"{', '.join(options)} and settings are given; put it into the settings")
        return store

    @classmethod
    def of(cls, application: Mapping[str, Any] | str | os.PathLike[str], section: str | None = None) -> Settings:
        """By the ``beaker.session.*`` lines of an INI file, or of the mapping made from one.

        :param section: of the file, where `read_ini` cannot tell by itself.
        :raises ConfigurationError: the file, or a setting in it, is missing or wrong.
        """
        mapping = application if isinstance(application, Mapping) else read_ini(application, section)
        return cls.from_options(session_options(mapping))

    @classmethod
    def from_options(cls, options: Mapping[str, Any], *, origin: str = "beaker.session") -> Settings:
        """Settings out of Beaker's keyword arguments or an INI section's options, which may be text.

        :param origin: what stands before an option's name in messages.
        :raises ConfigurationError: a value is wrong, or the URL is missing.
        """
        parsers = {f.name: f.metadata["parse"] for f in fields(cls)}
        values = {}
        for name, value in options.items():
            if name in parsers:
                try:
                    values[name] = parsers[name](value)
                except ValueError as error:
                    shown = "not usable" if name == "store_key" else repr(value)
                    raise ConfigurationError(f"{origin}.{name} is {shown}: {error}") from error
            elif name not in BEAKERS_OWN:
                _warn_unknown(name, origin)
        if values.get("url") in (None, ""):
            of_regions = f" (a region needs its own, {origin}.<region>.url)" if origin == "beaker.cache" else ""
            raise ConfigurationError(
                f"{origin}.url is not set{of_regions}: give the store's address, for example "
                f"{origin}.url = 127.0.0.1:1978"
            )
        settings = cls(**values)
        if settings.encrypted and (settings.index or settings.max_lifetime is not None):
            what = "index" if settings.index else "max_lifetime"
            raise ConfigurationError(
                f"{origin}.{what} needs to look into sessions, and encrypt_key hides them: leave encrypt_key and "
                f"encrypted out, and set {origin}.store_key"
            )
        return settings

    @property
    def timing(self) -> dict[str, Any]:
        """What `beaker_statestore.stores.open_store` takes besides the URL."""
        return {
            "connect_timeout": self.connect_timeout,
            "timeout": self.deadline,
            "pool_size": self.pool_size,
            "atomic": self.atomic,
        }


# Beaker hands over the same options for every session; finding what was meant takes longer than all else here.
@functools.cache
def _warn_unknown(name: str, origin: str) -> None:
    known = [f.name for f in fields(Settings)]
    close = difflib.get_close_matches(name, [*known, *BEAKERS_OWN], n=1)
    hint = f"did you mean {origin}.{close[0]}?" if close else f"known are {', '.join(sorted(known))}"
    warnings.warn(f"{origin}.{name} is not an option of ext:tcjson; {hint}", UnknownOptionWarning, stacklevel=2)


def read_ini(path: str | os.PathLike[str], section: str | None = None) -> dict[str, str]:
    """What an application gets that PasteDeploy loads from this section: its local options over the global ones.

    The rules are those of ``paste.deploy.loadwsgi.ConfigLoader``: ``%(here)s`` is filled in; what ``[DEFAULT]`` sets, a
    section changes by ``set name = value`` only; ``get name = other`` takes a global option; ``use`` goes on in another
    section or, by ``config:other.ini#name``, in another file.

    :param section: such as ``app:main``. By default ``app:main`` if it has ``beaker.session.url`` or goes on elsewhere,
        else the one section that has.
    :raises ConfigurationError: there is no such file or section, or the file is not INI; the message names the place.
    """
    path = os.path.abspath(path)
    try:
        shared, local = _read_file(path, section, {})
    except RecursionError as error:
        raise ConfigurationError(f"{path}: following `use` comes back to where it began") from error
    return {**shared, **local}


def _read_file(path: str, section: str | None, outer: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The global and the local options of one section; ``outer`` are the global ones of a file that uses this one."""
    parser = configparser.ConfigParser(defaults={**outer, "here": os.path.dirname(path), "__file__": path})
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # options are case-sensitive in PasteDeploy
    try:
        with open(path, encoding="utf-8") as file:
            parser.read_file(file)
        return _read_section(parser, path, _section_with_url(parser, path) if section is None else section, outer)
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except configparser.NoSectionError as error:
        there = ", ".join(f"[{name}]" for name in parser.sections()) or "none"
        raise ConfigurationError(f"{path} has no section [{error.section}]; there are {there}") from error
    except (configparser.Error, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not a valid INI file: {_what_is_wrong(error)}") from None


def _what_is_wrong(error: Exception) -> str:
    """What the parser says, without the text that it shows: there may be a secret in it."""
    if isinstance(error, configparser.InterpolationMissingOptionError):
        return f"[{error.section}] {error.option} uses %({error.reference})s, which nothing sets"
    if isinstance(error, configparser.InterpolationError):
        return f"[{error.section}] {error.option} has a % that cannot be filled in; a % itself is written %%"
    if isinstance(error, configparser.MissingSectionHeaderError):
        return f"line {error.lineno} stands before any [section]"
    if isinstance(error, configparser.ParsingError):
        return f"line {error.errors[0][0]} is neither an option nor a [section], nor indented to go on with one"
    return str(error)


def _read_section(
    parser: configparser.ConfigParser, path: str, section: str, outer: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    defaults = dict(parser.items(configparser.DEFAULTSECT))
    added, taken, local = {}, {}, {}
    for option in parser.options(section):
        if option.startswith("set "):
            added[option[4:].strip()] = parser.get(section, option)
        elif option.startswith("get "):
            taken[option[4:].strip()] = parser.get(section, option)
        elif option not in defaults:
            local[option] = parser.get(section, option)
    shared = {**defaults, **outer, **added}
    for option, source in taken.items():
        if source not in shared:
            raise ConfigurationError(f"{path}: [{section}] has `get {option} = {source}`, but nothing sets {source}")
        local[option] = shared[source]
    use = local.pop("use", "")
    if not _goes_on(use):
        return shared, local
    kind = section.partition(":")[0]
    if use.lower().startswith("config:"):
        file, _, name = use.partition(":")[2].partition("#")
        file = os.path.abspath(os.path.join(os.path.dirname(path), file))
        used_shared, used_local = _read_file(file, f"{kind}:{name or 'main'}", shared)
    else:
        used_shared, used_local = _read_section(parser, path, f"{kind}:{use}", shared)
    return {**used_shared, **added, "__file__": shared["__file__"]}, {**used_local, **local}


def _goes_on(use: str) -> bool:
    """Whether ``use`` names a section, here or in another file, and not the code of an application."""
    scheme, colon, _ = use.partition(":")
    return bool(use) and (not colon or scheme.lower() == "config")


def _section_with_url(parser: configparser.ConfigParser, path: str) -> str:
    having = [name for name in parser.sections() if not URL_LINES.isdisjoint(parser.options(name))]
    if DEFAULT_SECTION in having or _goes_on(parser.get(DEFAULT_SECTION, "use", raw=True, fallback="")):
        return DEFAULT_SECTION
    if len(having) == 1:
        return having[0]
    if having:
        names = ", ".join(f"[{name}]" for name in having)
        raise ConfigurationError(f"{path} sets beaker.session.url in {names}: say which section to use")
    raise ConfigurationError(
        f"{path} has no section that sets beaker.session.url; "
        f"add to [{DEFAULT_SECTION}], for example: beaker.session.url = 127.0.0.1:1978"
    )


def session_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``beaker.session.*`` (or ``session.*``) options of an application's settings, without that prefix."""
    return _options(settings, SESSION_PREFIXES)


def cache_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The ``beaker.cache.*`` (or ``cache.*``) options of an application's settings, but for those of single regions."""
    return {name: value for name, value in _options(settings, CACHE_PREFIXES).items() if "." not in name}


def _options(settings: Mapping[str, Any], prefixes: Sequence[str]) -> dict[str, Any]:
    return {
        name[len(prefix) :]: value
        for prefix in reversed(prefixes)
        for name, value in settings.items()
        if name.startswith(prefix)
    }
