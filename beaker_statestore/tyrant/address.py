"""Where a Tyrant server is: a host and a TCP port, or the path of a Unix socket. Opens no sockets."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Final

from beaker_statestore.exceptions import ConfigurationError

__all__ = ["DEFAULT_PORT", "Address"]

#: ttserver's (TTDEFPORT).
DEFAULT_PORT: Final = 1978

_UNIX: Final = "unix:"
_SCHEME: Final = "tyrant://"
_HOST_AND_PORT: Final = re.compile(
    r"(?:\[(?P<numeric>[0-9A-Fa-f:.%]+)\]|(?P<host>[^\s\[\]:/@?#]+))(?::(?P<port>[0-9]+))?/?"
)


@dataclass(frozen=True, slots=True)
class Address:
    """A host and a port, unless there is a ``path``, which then counts alone."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    path: str | None = None

    @classmethod
    def parse(cls, text: str, *, lowest_port: int = 1) -> Address:
        """The address that ``text`` names.

        :param text: ``host``, ``host:port``, ``[::1]:port``, any of these after ``tyrant://``, or ``unix:/path``.
        :param lowest_port: 0 where that may stand for any free port.
        :raises ConfigurationError: it is none of these.
        """
        if text.startswith(_UNIX):
            path = text.removeprefix(_UNIX)
            if path and "\0" not in path:
                return cls(path=path)
        else:
            match = _HOST_AND_PORT.fullmatch(text.removeprefix(_SCHEME))
            if match:
                port = int(match["port"] or DEFAULT_PORT)
                if lowest_port <= port < 65536:
                    return cls(match["numeric"] or match["host"], port)
        # What stands before an @ may be a password, and messages end up in logs.
        shown = "an address with @ in it" if "@" in text else repr(text)
        raise ConfigurationError(
            f"{shown} is not the address of a Tyrant server: write host:port, [::1]:port or unix:/path/to/socket"
        )

    @classmethod
    def of(cls, name: str | bytes | tuple[object, ...]) -> Address:
        """The address that ``socket.getsockname`` or ``getpeername`` calls ``name``."""
        if isinstance(name, (str, bytes)):
            return cls(path=os.fsdecode(name))
        host, port, *_ = name
        return cls(str(host), int(str(port)))

    def __str__(self) -> str:
        if self.path is not None:
            return _UNIX + self.path
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"
