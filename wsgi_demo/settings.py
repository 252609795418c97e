"""What the INI file says to the demo: the ``demo.*`` lines, checked, beside ``beaker.session.*`` as they are."""

# ruff: noqa: RUF009 - no default here can change

from __future__ import annotations

import argparse
import difflib
import ipaddress
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any
from urllib.parse import urlsplit

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.settings import read_ini

__all__ = ["Endpoint", "Settings", "from_command_line", "is_loopback"]

PREFIX = "demo."


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """:raises ValueError: ``text`` is not HOST:PORT."""
        host, _, port = text.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ValueError("write HOST:PORT, for example 127.0.0.1:8823")
        return cls(host.strip("[]"), int(port))

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def is_loopback(host: str | None) -> bool:
    """Whether ``host``, a name or an address, can only mean this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _base_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("write the address at which browsers find the application, for example http://127.0.0.1:8080")
    if not text.isascii():
        raise ValueError("write it as browsers send it, with %C3%BC for ü")
    return text.rstrip("/")


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("write true or false")
    return text.lower() == "true"


def _option(parse: Callable[[str], Any], default: str) -> Any:
    return field(default=parse(default), metadata={"parse": parse})


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The demo's settings. Each but the last is an option of its own name, such as ``demo.base_url``."""

    #: Where browsers find the web application; links in mails begin with it.
    base_url: str = _option(_base_url, "http://127.0.0.1:8080")
    #: What stands behind the @ in the list's addresses.
    host: str = _option(str.lower, "localhost")
    #: Where the web application listens.
    web: Endpoint = _option(Endpoint.parse, "127.0.0.1:8080")
    #: Where the mail application listens.
    smtp: Endpoint = _option(Endpoint.parse, "127.0.0.1:8823")
    #: The mail server that takes what we send; in the demo, the outbox.
    relay: Endpoint = _option(Endpoint.parse, "127.0.0.1:8824")
    #: The Maildir in which the outbox keeps what it takes.
    outbox: str = _option(str, "var/outbox")
    #: The queue for mails that made a handler raise, in the store.
    undeliverable: str = _option(str, "undeliverable")
    #: Show the outbox, and other things that only somebody on this machine may see.
    development: bool = _option(_flag, "false")
    #: All that was given, for those who read ``beaker.session.*``.
    given: Mapping[str, Any]

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Settings:
        """:raises ConfigurationError: a ``demo.*`` option is unknown or wrong; the message says what to write."""
        parsers = {PREFIX + f.name: (f.name, f.metadata["parse"]) for f in fields(cls) if f.metadata}
        values = {}
        for option, text in given.items():
            if option in parsers:
                name, parse = parsers[option]
                try:
                    values[name] = parse(str(text).strip())
                except ValueError as error:
                    raise ConfigurationError(f"{option} is {text!r}: {error}") from error
            elif option.startswith(PREFIX):
                close = difflib.get_close_matches(option, parsers, n=1)
                hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(parsers))}"
                raise ConfigurationError(f"there is no option {option}; {hint}")
        settings = cls(given=given, **values)
        if settings.development and not is_loopback(urlsplit(settings.base_url).hostname):
            raise ConfigurationError(
                f"demo.development = true shows everybody's mail, and demo.base_url is {settings.base_url}: "
                "use it only with an address of this machine, such as http://127.0.0.1:8080"
            )
        return settings

    @property
    def path(self) -> str:
        """The path of `base_url`, below which the application is mounted, percent-encoded; empty for the root."""
        return urlsplit(self.base_url).path

    @property
    def secure(self) -> bool:
        """Whether browsers come by HTTPS."""
        return self.base_url.startswith("https:")


def from_command_line(description: str | None, arguments: Sequence[str] | None = None) -> Settings:
    """The settings that one of the demo's processes is started with: an INI file, and options that replace its own."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("ini", help="the INI file, such as ini/development.ini")
    parser.add_argument(
        "--set", action="append", default=[], metavar="OPTION=VALUE", help="instead of what the file says"
    )
    parsed = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        replaced = dict(option.split("=", 1) for option in parsed.set)
        return Settings.from_mapping({**read_ini(parsed.ini), **replaced})
    except ConfigurationError as error:
        parser.error(str(error))
