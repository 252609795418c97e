"""HTTP/1.1 as Tokyo Tyrant speaks it: requests <-> the same commands. No sockets, clocks or threads.

``GET HEAD PUT DELETE`` read, tell, write and delete the record whose key is the request's target less its first
slash, percent-decoded, a ``+`` being a space and a query being part of it. ``PUT`` keeps what is there with
``X-TT-PDMODE: 1`` and appends to it with 2. ``POST`` calls the ``ext`` function ``X-TT-XNAME`` with that key and its
body, or the ``misc`` function ``X-TT-MNAME`` with the values of its form data; ``OPTIONS`` answers ``stat``. A
value is called ``application/json`` if it is that. ``HEAD`` is answered as ``GET`` is, less the body, also where
nothing is found (there the original sends no headers).

Browsers are the danger: any page somebody opens may send requests to this port. So those of other origins are
refused (fetch standard: ``Origin``, ``Sec-Fetch-Site``), those that name a host which is not this one too (a name
whose address was changed to this one, "DNS rebinding"), no page may read an answer, and no answer is ever a page.

The other danger is two readers of one connection that disagree where a request ends (RFC 9112, section 11.2). So
what the standard only tolerates is refused, a body is as long as the one ``Content-Length`` says, and what is refused
ends its connection. For the same reason ``PUT`` has to have one (the original stores an empty value without it), and
a mode has to be one of these (the original replaces with any other).

``Expect: 100-continue`` is answered only by the final answer. A client that waits for leave sends its body after a
moment anyway (RFC 9110, section 10.1.1; curl after a second, if the body has more than a mebibyte).
"""

from __future__ import annotations

import binascii
import ipaddress
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from http import HTTPStatus
from typing import Final, NamedTuple

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.tyrant.calls import Call, Door
from beaker_statestore.tyrant.commands import (
    EXT,
    FAILURE,
    FORBIDDEN,
    GET,
    MISC,
    OUT,
    PUT,
    PUTCAT,
    PUTKEEP,
    STAT,
    SUCCESS,
    TOO_MUCH,
    Reply,
    Request,
)
from beaker_statestore.tyrant.wire import LONG, Encoded, Limits, Line, Reading

__all__ = ["HTTPPolicy", "read", "speaks"]

#: Bytes of the request line, and of one header line (as in the original), their ends included.
LONGEST_LINE: Final = 8191
#: Bytes and number of all header lines.
LONGEST_HEAD: Final = 64 * 1024
MOST_HEADERS: Final = 100
#: Values above this are not asked whether they are JSON.
LONGEST_JSON: Final = 256 * 1024
#: In values above this every byte is escaped, which takes less time than to look at each.
LONGEST_SEARCHED: Final = 4096

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_VERSION_AT_END: Final = re.compile(rb"[ \t]HTTP/[0-9.]+[ \t]*\r?\n\Z")
_REQUEST_LINE: Final = re.compile(rb"(%b) ([^\x00-\x20\x7f]+) HTTP/([0-9]+\.[0-9]+)\r\n" % _TOKEN)
_HEADER: Final = re.compile(rb"(%b):([\t\x20-\x7e\x80-\xff]*)\r\n" % _TOKEN)
_LENGTH: Final = re.compile(rb"[0-9]{1,18}")
_OPTION: Final = re.compile(rb"[0-9]{1,9}")
_BAD_ESCAPE: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
#: How each byte is written in form data; as they are, those that the original (tcurlencode) leaves so.
_ESCAPES: Final = [
    b"%c" % byte if re.match(rb"[0-9A-Za-z_.!~*'()-]", b"%c" % byte) else b"%%%02X" % byte for byte in range(256)
]
_AUTHORITY: Final = re.compile(r"(\[[0-9a-f:.]+\]|[0-9a-z._-]+)(:[0-9]{0,5})?")
_ABSOLUTE: Final = re.compile(rb"https?://([^/?#]*)(.*)", re.IGNORECASE)

#: The headers that are read here. More than one of a kind is refused, except for the list ``Connection``.
_CONNECTION: Final = b"connection"
_KNOWN: Final = frozenset(
    {
        _CONNECTION,
        b"content-length",
        b"expect",
        b"host",
        b"origin",
        b"sec-fetch-site",
        b"transfer-encoding",
        b"x-tt-mname",
        b"x-tt-mopts",
        b"x-tt-pdmode",
        b"x-tt-xname",
        b"x-tt-xopts",
    }
)
#: What every answer says: it is what it says it is, for nobody's store and no other origin's page.
_GUARD: Final = (
    b"X-Content-Type-Options: nosniff\r\nCache-Control: no-store\r\nCross-Origin-Resource-Policy: same-origin\r\n"
)
_TEXT: Final = b"text/plain; charset=utf-8"
_FORM: Final = b"application/x-www-form-urlencoded"
_BYTES: Final = b"application/octet-stream"
_JSON: Final = b"application/json"


@dataclass(frozen=True, slots=True)
class HTTPPolicy:
    """Whose requests are answered: those of programs, and of pages of the same origin.

    :raises ConfigurationError: one of ``hosts`` is neither a name nor an address.
    """

    #: Besides ``localhost`` and loopback addresses, names and addresses that a ``Host`` may have, with any port.
    hosts: Iterable[str] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "hosts", frozenset(map(_named_host, self.hosts)))

    def admits(self, authority: str) -> bool:
        """Whether ``authority``, a host in small letters and perhaps a port, is this server."""
        match = _AUTHORITY.fullmatch(authority)
        if match is None:
            return False
        host = match[1].strip("[]")
        return host == "localhost" or host in self.hosts or _is_loopback(host)


def _named_host(host: str) -> str:
    bare = host.lower()
    if ":" in bare and not bare.startswith("["):
        bare = f"[{bare}]"
    match = _AUTHORITY.fullmatch(bare)
    if match is None or match[2] is not None:
        raise ConfigurationError(f"the HTTP host {host} is no host; write a name or an address, without a port")
    return match[1].strip("[]")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def speaks(line: bytes) -> bool:
    """Whether ``line`` begins a request of this protocol: it ends in a version of HTTP, well-formed or not."""
    return _VERSION_AT_END.search(line, max(len(line) - 64, 0)) is not None


def read(line: bytes, limits: Limits, policy: HTTPPolicy) -> Reading[Call]:
    """The request that ``line`` begins, with its headers and body.

    What is malformed, too large or of another origin becomes a call that does nothing, answers so, and is the last of
    its connection.
    """
    try:
        return (yield from _read(line, limits, policy))
    except _Refusal as refusal:
        return _told(_CLOSING, refusal.status, refusal.reason)


class _Refusal(Exception):  # noqa: N818 - it becomes an answer
    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class _Manner(NamedTuple):
    """How the answers to one request are written."""

    last: bool
    #: The header line that says what becomes of the connection, where that is not understood.
    connection: bytes = b""
    with_body: bool = True

    def answer(self, status: int, kind: bytes, body: bytes, more: bytes = b"") -> Encoded:
        """An answer with a body of that content type; ``more`` are lines for its head."""
        head = b"HTTP/1.1 %d %b\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b%b%b\r\n" % (
            status,
            HTTPStatus(status).phrase.encode(),
            kind,
            len(body),
            more,
            _GUARD,
            self.connection,
        )
        if not self.with_body:
            return head
        return (head, body) if len(body) > LONG else head + body

    def text(self, status: int, reason: str = "") -> Encoded:
        """An answer in words."""
        phrase = HTTPStatus(status).phrase
        return self.answer(status, _TEXT, (f"{phrase}: {reason}\n" if reason else f"{phrase}\n").encode())

    def failure(self, reply: Reply, status: int) -> Encoded:
        """The answer to what has not been done, ``status`` if that is because of what is or is not there."""
        if reply.status == TOO_MUCH:
            return self.text(500, "the answer would be above the server's limit")
        return self.text({FAILURE: status, FORBIDDEN: HTTPStatus.FORBIDDEN}.get(reply.status, 500))


_CLOSING: Final = _Manner(last=True, connection=b"Connection: close\r\n")


# -- requests


class _Message(NamedTuple):
    """A request that is well-formed."""

    key: bytes
    headers: Mapping[bytes, bytes]
    body: bytes
    limits: Limits
    manner: _Manner


def _read(line: bytes, limits: Limits, policy: HTTPPolicy) -> Reading[Call]:
    if len(line) > LONGEST_LINE:
        raise _Refusal(414, f"the request line is longer than {LONGEST_LINE} bytes")
    match = _REQUEST_LINE.fullmatch(line)
    if match is None:
        raise _Refusal(400, "the request line is malformed")
    method, target, version = match.groups()
    if version not in (b"1.0", b"1.1"):
        raise _Refusal(505, "only HTTP/1.1 and 1.0 are spoken here")
    headers, size = yield from _read_headers(limits)
    path = _guarded(method, target, headers, policy)
    if method not in _METHODS:
        raise _Refusal(501, f"the methods are {_ALLOWED}")
    if headers.get(b"expect", b"100-continue").lower() != b"100-continue":
        raise _Refusal(417, "only 100-continue may be expected")
    key = _unquoted(path.removeprefix(b"/"))
    length = _length(headers)
    if length is None and method == b"PUT":
        raise _Refusal(411, "without a Content-Length there is nothing to store")
    if length and method not in (b"PUT", b"POST"):
        raise _Refusal(400, f"{method.decode()} takes no body")
    if length and length > min(limits.blob, limits.message - len(line) - size):
        raise _Refusal(413, "the body is longer than a value may be")
    body = (yield length) if length else b""
    return _METHODS[method](_Message(key, headers, body, limits, _manner(method, version, headers)))


def _read_headers(limits: Limits) -> Reading[tuple[dict[bytes, bytes], int]]:
    """The headers that are known here, their names in small letters, and how many bytes all have."""
    headers: dict[bytes, bytes] = {}
    size = 0
    for _ in range(MOST_HEADERS + 1):
        line = yield Line(limits.line)
        size += len(line)
        if len(line) > LONGEST_LINE or size > LONGEST_HEAD:
            raise _Refusal(431, f"a header line may have {LONGEST_LINE} bytes, all together {LONGEST_HEAD}")
        if line == b"\r\n":
            return headers, size
        match = _HEADER.fullmatch(line)
        if match is None:
            raise _Refusal(400, "a header line is malformed")
        name, value = match[1].lower(), match[2].strip(b" \t")
        if name not in _KNOWN:
            continue
        if name in headers:
            if name != _CONNECTION:
                raise _Refusal(400, f"there is more than one {name.decode()}")
            value = headers[name] + b"," + value
        headers[name] = value
    raise _Refusal(431, f"there are more than {MOST_HEADERS} headers")


def _guarded(method: bytes, target: bytes, headers: Mapping[bytes, bytes], policy: HTTPPolicy) -> bytes:
    """The path in ``target``, once host and origin have been found to be this server's."""
    host = headers[b"host"].decode("latin-1").lower() if b"host" in headers else None
    path = target
    absolute = _ABSOLUTE.fullmatch(target)
    if absolute is not None:
        authority, path = absolute[1].decode("latin-1").lower(), absolute[2]
        if host not in (None, authority):
            raise _Refusal(400, "target and Host differ")
        host = authority
    elif not target.startswith(b"/") and (method, target) != (b"OPTIONS", b"*"):
        raise _Refusal(400, "the target is no path")
    if host is not None and not policy.admits(host):
        raise _Refusal(403, "the server does not answer for this host")
    origin = headers.get(b"origin", b"").decode("latin-1").lower()
    if b"origin" in headers and (host is None or origin not in (f"http://{host}", f"https://{host}")):
        raise _Refusal(403, "the request comes from another origin")
    if headers.get(b"sec-fetch-site", b"none").lower() not in (b"same-origin", b"none"):
        raise _Refusal(403, "the request comes from another site")
    return path


def _length(headers: Mapping[bytes, bytes]) -> int | None:
    announced = headers.get(b"content-length")
    if b"transfer-encoding" in headers:
        if announced is None:
            raise _Refusal(411, "a body needs a Content-Length, and no Transfer-Encoding")
        raise _Refusal(400, "Content-Length and Transfer-Encoding contradict each other")
    if announced is None:
        return None
    if not _LENGTH.fullmatch(announced):
        raise _Refusal(400, "the Content-Length is no number")
    return int(announced)


def _manner(method: bytes, version: bytes, headers: Mapping[bytes, bytes]) -> _Manner:
    asked = {word.strip(b" \t").lower() for word in headers.get(_CONNECTION, b"").split(b",")}
    last = b"close" in asked or (version == b"1.0" and b"keep-alive" not in asked)
    connection = b"Connection: close\r\n" if last else b"Connection: keep-alive\r\n" if version == b"1.0" else b""
    return _Manner(last, connection, with_body=method != b"HEAD")


def _unquoted(text: bytes) -> bytes:
    """``text`` with its percent escapes and plus signs resolved."""
    if _BAD_ESCAPE.search(text):
        raise _Refusal(400, "a percent sign begins no escape")
    # Quoted-printable is the same with another sign, and read in place, where urllib would make an object an escape.
    return binascii.a2b_qp(text.replace(b"+", b" ").replace(b"=", b"=3D").replace(b"%", b"="))


def _quoted(value: bytes) -> bytes:
    if len(value) > LONGEST_SEARCHED:
        return b"%" + value.hex("%").encode().upper()
    return b"".join(map(_ESCAPES.__getitem__, value))


def _option(message: _Message, name: bytes) -> int:
    text = message.headers.get(name, b"0")
    if not _OPTION.fullmatch(text):
        raise _Refusal(400, f"{name.decode()} is no number")
    return int(text)


# -- methods


def _get(message: _Message) -> Call:
    return _call(message, GET(message.key), _write_value)


def _put(message: _Message) -> Call:
    mode = _option(message, b"x-tt-pdmode")
    if mode >= len(_PUTS):
        raise _Refusal(400, "x-tt-pdmode is 1 to keep what is there, 2 to append to it, otherwise 0")
    command, failed = _PUTS[mode]
    return _call(message, command(message.key, message.body), partial(_write_done, HTTPStatus.CREATED, failed))


_PUTS: Final = ((PUT, 500), (PUTKEEP, HTTPStatus.CONFLICT), (PUTCAT, 500))


def _delete(message: _Message) -> Call:
    return _call(message, OUT(message.key), partial(_write_done, HTTPStatus.OK, HTTPStatus.NOT_FOUND))


def _post(message: _Message) -> Call:
    function = message.headers.get(b"x-tt-xname")
    if function is not None:
        _check_name(function, message.limits)
        return _call(message, EXT(function, message.key, message.body, _option(message, b"x-tt-xopts")), _write_result)
    function = message.headers.get(b"x-tt-mname")
    if function is not None:
        _check_name(function, message.limits)
        return _call(message, MISC(function, _form_values(message), _option(message, b"x-tt-mopts")), _write_results)
    return _told(message.manner, HTTPStatus.BAD_REQUEST)


def _check_name(function: bytes, limits: Limits) -> None:
    if len(function) > limits.name:
        raise _Refusal(400, f"a function's name is longer than {limits.name} bytes")


def _form_values(message: _Message) -> list[bytes]:
    """The values of form data in its order; their names do not matter, and need not differ as in the original."""
    # Counted first, since a million values take far more room than their text.
    if message.body.count(b"&") >= message.limits.count:
        raise _Refusal(413, f"there are more than {message.limits.count} values")
    return [_unquoted(field.partition(b"=")[2]) for field in message.body.split(b"&") if field]


def _options(message: _Message) -> Call:
    return _call(message, STAT(), _write_statistics)


_METHODS: Final[Mapping[bytes, Callable[[_Message], Call]]] = {
    b"OPTIONS": _options,
    b"GET": _get,
    b"HEAD": _get,
    b"PUT": _put,
    b"POST": _post,
    b"DELETE": _delete,
}
_ALLOWED: Final = ", ".join(method.decode() for method in _METHODS)


# -- reply -> answer


def _call(message: _Message, request: Request, write: Callable[[_Manner, Reply], Encoded]) -> Call:
    return Call(request, partial(write, message.manner), Door.HTTP, message.manner.last)


def _told(manner: _Manner, status: int, reason: str = "") -> Call:
    """A call whose answer is known, unless even that is forbidden."""

    def encode(reply: Reply) -> Encoded:
        return manner.text(HTTPStatus.FORBIDDEN) if reply.status == FORBIDDEN else manner.text(status, reason)

    return Call(None, encode, Door.HTTP, manner.last)


def _write_value(manner: _Manner, reply: Reply) -> Encoded:
    if reply.status != SUCCESS:
        return manner.failure(reply, HTTPStatus.NOT_FOUND)
    return manner.answer(HTTPStatus.OK, _JSON if _is_json(reply.value) else _BYTES, reply.value)


def _write_done(done: int, failed: int, manner: _Manner, reply: Reply) -> Encoded:
    return manner.text(done) if reply.status == SUCCESS else manner.failure(reply, failed)


def _write_result(manner: _Manner, reply: Reply) -> Encoded:
    return manner.answer(HTTPStatus.OK, _BYTES, reply.value) if reply.status == SUCCESS else manner.failure(reply, 500)


def _write_results(manner: _Manner, reply: Reply) -> Encoded:
    if reply.status != SUCCESS:
        return manner.failure(reply, 500)
    fields = (b"res%d=%b" % (number, _quoted(value)) for number, value in enumerate(reply.value, 1))
    return manner.answer(HTTPStatus.OK, _FORM, b"&".join(fields))


def _write_statistics(manner: _Manner, reply: Reply) -> Encoded:
    """The figures of ``stat`` less its counters. What a mask forbids is among what is allowed here, and answers 403."""
    if reply.status != SUCCESS:
        return manner.failure(reply, 500)
    lines = [f"Allow: {_ALLOWED}\r\n".encode()]
    for figure in reply.value.split(b"\n"):
        name, _, value = figure.partition(b"\t")
        line = b"X-TT-%b: %b\r\n" % (name.upper(), value)
        if name and not name.startswith(b"cnt_") and _HEADER.fullmatch(line):
            lines.append(line)
    return manner.answer(HTTPStatus.OK, _TEXT, b"", b"".join(lines))


def _is_json(value: bytes) -> bool:
    if len(value) > LONGEST_JSON:
        return False
    try:
        # Numbers are not wanted, and making a long one takes the square of its length.
        json.loads(value.decode("utf-8"), parse_int=str, parse_float=str, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
