"""Store URLs taken apart, and shown without their passwords. Knows no store and no scheme by name."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Final
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from beaker_statestore.exceptions import ConfigurationError

_CREDENTIALS: Final = re.compile(r"(?:^|(?<=//)).*@")
_UNITS: Final = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def redacted(url: str) -> str:
    """``url`` as it may be shown to anybody: what stands before an ``@`` is left out, passwords and all."""
    return _CREDENTIALS.sub("...@", url)


def split(url: str) -> SplitResult:
    """``url`` in parts.

    :raises ConfigurationError: it is not a URL; its password is not shown.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # is computed, and refused, only now
    except ValueError as error:
        # Not `from error`: its text may quote the password.
        raise ConfigurationError(f"{redacted(url)} is not a URL of a store: {_reason(error, url)}") from None
    return parts


def _reason(error: ValueError, url: str) -> str:
    return "check its host and port" if "@" in url else str(error)


def options(url: str, known: Collection[str]) -> dict[str, str]:
    """The parameters behind the ``?`` of ``url``.

    :raises ConfigurationError: one is not among ``known``, or is there twice.
    """
    found: dict[str, str] = {}
    # A plus stands for itself, as it does in the rest of a URL: only forms mean a space by it.
    for name, value in parse_qsl(split(url).query.replace("+", "%2B"), keep_blank_values=True):
        if name not in known:
            names = ", ".join(sorted(known)) or "none"
            raise ConfigurationError(f"unknown option {name!r} in {redacted(url)}; the options here are: {names}")
        if name in found:
            raise ConfigurationError(f"the option {name!r} is twice in {redacted(url)}")
        found[name] = value
    return found


def file_path(url: str) -> str:
    """The path of a file that ``url`` names, ``scheme:///absolute/path`` or ``scheme:relative/path``.

    More slashes than three do no harm: that is what ``lmdb:///%(here)s/state.lmdb`` becomes in an INI file.

    :raises ConfigurationError: there is a host in it (a slash is missing), or no path.
    """
    parts = split(url)
    if parts.netloc:
        raise ConfigurationError(
            f"{redacted(url)} names the host {parts.hostname!r}; "
            f"for a file write three slashes, as in {parts.scheme}:///var/lib/name"
        )
    path = unquote(parts.path)
    if not path.strip("/"):
        raise ConfigurationError(f"{redacted(url)} names no file; write {parts.scheme}:///var/lib/name")
    return "/" + path.lstrip("/") if path.startswith("/") else path


def byte_size(text: str, name: str) -> int:
    """``text`` as a number of bytes: ``1073741824``, ``1024M`` and ``1GiB`` are the same.

    :raises ConfigurationError: it is none; the message has the option's ``name``.
    """
    match = re.fullmatch(r"(\d+)\s*(?:([kmgt])(?:i?b)?)?", text.strip().lower())
    if match is None:
        raise ConfigurationError(f"{name} = {text!r} is not a size; write bytes, or a number with K, M, G or T")
    return int(match[1]) * _UNITS[match[2] or ""]
