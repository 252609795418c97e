"""Sockets to listen on: which may be opened, and what to say when one cannot be. Knows nothing of what comes in."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
import stat
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from beaker_statestore import ports
from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.tyrant.address import Address

__all__ = ["BACKLOG", "SOCKET_MODE", "inherited", "listen"]

#: How many connections may wait to be accepted.
BACKLOG: Final = 1024
#: How long to wait for whoever may still listen on a Unix socket, in seconds.
PROBE_TIMEOUT: Final = 1.0
#: A peer that has vanished without a word is given up after about four minutes: probes begin after so many seconds,
#: come so many seconds apart, and so many must stay unanswered.
KEEPALIVE: Final = ((socket.TCP_KEEPIDLE, 120), (socket.TCP_KEEPINTVL, 30), (socket.TCP_KEEPCNT, 4))

#: SD_LISTEN_FDS_START of systemd.
_FIRST_INHERITED: Final = 3
#: Only the owner may connect: there are sessions behind it.
SOCKET_MODE: Final = 0o600


def listen(address: Address, *, allow_remote: bool = False, socket_mode: int = SOCKET_MODE) -> list[socket.socket]:
    """Sockets that listen at ``address``: one, or one for each address that a host name has.

    :param allow_remote: permit addresses that other machines can reach.
    :param socket_mode: who may connect to a Unix socket, as file modes say it.
    :raises ConfigurationError: it is not possible, or not permitted; the message says what to do.
    """
    if address.path is not None:
        return [_listen_unix(address.path, socket_mode)]
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"cannot listen at {address}: {address.host!r} is no host here: {error}") from error
    if not allow_remote:
        for *_, name in found:
            _check_loopback(address, name)
    if address.port == 0:
        found = found[:1]  # each would get a port of its own
    with ExitStack() as opened:
        try:
            sockets = [opened.enter_context(_open(family, name)) for family, _, _, _, name in found]
        except OSError as error:
            raise ConfigurationError(_why_not_bound(address, error)) from error
        opened.pop_all()
    return sockets


def inherited(*, allow_remote: bool = False) -> list[socket.socket]:
    """The sockets that systemd has opened for this process, and listens at (sd_listen_fds(3)); none if there are none.

    :param allow_remote: as for `listen`.
    :raises ConfigurationError: one is nothing to accept connections on, or may be reached from other machines.
    """
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        count = int(os.environ.get("LISTEN_FDS", "0"))
    except ValueError:
        raise ConfigurationError(f"LISTEN_FDS={os.environ['LISTEN_FDS']} is no number of file descriptors") from None
    sockets = []
    for number in range(_FIRST_INHERITED, _FIRST_INHERITED + count):
        try:
            sock = socket.socket(fileno=number)
            listens = sock.type == socket.SOCK_STREAM and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ConfigurationError(
                f"file descriptor {number} of LISTEN_FDS is no socket: {error.strerror}"
            ) from error
        if not listens:
            raise ConfigurationError(f"file descriptor {number} of LISTEN_FDS is no stream socket that listens")
        if sock.family != socket.AF_UNIX and not allow_remote:
            _check_loopback(Address.of(sock.getsockname()), sock.getsockname())
        os.set_inheritable(number, False)
        if sock.family != socket.AF_UNIX:
            _ask_for_the_vanished(sock)
        sockets.append(sock)
    return sockets


def _check_loopback(address: Address, name: Any) -> None:
    if not ipaddress.ip_address(str(name[0]).partition("%")[0]).is_loopback:
        raise ConfigurationError(
            f"{address} can be reached from other machines, and the protocol knows no passwords: "
            "listen at 127.0.0.1 or a Unix socket, or give --allow-remote, best with --tls-ca"
        )


def _open(family: int, name: Any) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            # Without this, a restart would have to wait for the connections of before to be forgotten (TIME_WAIT).
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _ask_for_the_vanished(sock)
        if family == socket.AF_INET6:
            # Otherwise [::] would claim the port of all IPv4 addresses too.
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(name)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def _ask_for_the_vanished(sock: socket.socket) -> None:
    """Have the sockets that ``sock`` accepts, which inherit it, do as `KEEPALIVE` says."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE:
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def _why_not_bound(address: Address, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = ports.holder(address.port) or "another process"
        return f"port {address.port} of {address.host} is taken by {holder}: stop it, or give another port by --listen"
    if error.errno == errno.EACCES:
        return f"may not listen at {address}: ports below 1024 are reserved; give another by --listen"
    return f"cannot listen at {address}: {error.strerror}; give another address by --listen"


def _listen_unix(path: str, mode: int) -> socket.socket:
    _remove_stale(path)
    try:
        # Where the file system heeds the mode of what is bound, nobody else gets in before chmod either.
        umask = os.umask(0o777 & ~mode)
        try:
            sock = _open(socket.AF_UNIX, path)
        finally:
            os.umask(umask)
        os.chmod(path, mode)
        return sock
    except OSError as error:  # a path that is too long has no strerror
        why = error.strerror or error
        raise ConfigurationError(f"cannot listen at unix:{path}: {why}; give another path by --listen") from error


def _remove_stale(path: str) -> None:
    """Remove the socket that a server which was killed has left at ``path``, unless somebody answers on it."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return  # nothing there; or bind will say what is wrong
    if not stat.S_ISSOCK(mode):
        raise ConfigurationError(f"cannot listen at unix:{path}: a file is there; give another path by --listen")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(PROBE_TIMEOUT)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            Path(path).unlink(missing_ok=True)
            return
        except OSError:
            pass  # it does not let us in, or is too busy: either way it lives
    raise ConfigurationError(
        f"cannot listen at unix:{path}: another server answers there; stop it, or give another path by --listen"
    )
