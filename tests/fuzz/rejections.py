"""Every way in which a request ends its connection: nothing behind it is to be executed, in whatever protocol."""

from __future__ import annotations

from urllib.parse import quote

from beaker_statestore.tyrant.commands import PUT, REPL
from beaker_statestore.tyrant.wire import encode_request

__all__ = ["LAST", "MASKED", "REJECTED", "WITHOUT_HTTP", "writes_of"]


def writes_of(key: bytes, value: bytes) -> dict[str, bytes]:
    """A write of that record in each of the protocols; ``key`` has no blanks."""
    return {
        "binary": encode_request(PUT(key, value)),
        "memcached": b"set %b 0 0 %d\r\n%b\r\n" % (key, len(value), value),
        "HTTP": b"PUT /%b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (quote(key).encode(), len(value), value),
    }


def _http(first: bytes, *headers: bytes, body: bytes = b"") -> bytes:
    return b"\r\n".join([first, *headers, b"", b""]) + body


#: A second request within what a careless reader takes for the body of the first, or for no part of it.
_INNER = b"PUT /inner HTTP/1.1\r\nContent-Length: 1\r\n\r\n1"

#: What is rejected by any server that speaks HTTP.
REJECTED: dict[str, bytes] = {
    # The binary protocol: the first five are those after which the original reads on.
    "a negative length": bytes.fromhex("C820 FFFFFFFF"),
    "a negative width": bytes.fromhex("C813 00000001 00000001 FFFFFFFF 6B 76"),
    "a name that is too long, for misc": bytes.fromhex("C890 00000400 00000000 00000000"),
    "a name that is too long, for ext": bytes.fromhex("C868 00000400 00000000 00000000 00000000"),
    "replication's mark for a request": bytes.fromhex("C910 00000001 00000001 6B 76") + b"\n",
    "an unknown command": bytes.fromhex("C899"),
    "a key that is too long": bytes.fromhex("C830 10000001"),
    "a value that is too long": bytes.fromhex("C810 00000001 10000001 6B"),
    "the longest length": bytes.fromhex("C830 7FFFFFFF"),
    "a list that is too long": bytes.fromhex("C831 00100001"),
    "a list whose second element is too long": bytes.fromhex("C831 00000002 00000001 6B 7FFFFFFF"),
    "arguments of which the second is too long": bytes.fromhex(
        "C890 00000003 00000000 00000002 6F7574 00000001 6B FFFFFFFF"
    ),
    "replication": encode_request(REPL(1, 1)),
    "a greeting of TLS": bytes.fromhex("16030100C5010000C10303") + bytes(range(32, 64)) + b"\n",
    # Lines.
    "an empty line": b"\r\n",
    "a line feed": b"\n",
    "an unknown verb": b"bogus\r\n",
    "zero bytes": b"\0" * 8 + b"\n",
    # memcached.
    "memcached: too few words": b"set k 0 1\r\n1\r\n",
    "memcached: too many words": b"set k 0 0 1 1\r\n1\r\n",
    "memcached: a length that is no number": b"set k 0 0 x\r\n",
    "memcached: a negative length": b"set k 0 0 -1\r\n",
    "memcached: a length that is too long": b"set k 0 0 268435457\r\n",
    "memcached: data that goes on": b"set k 0 0 1\r\n1xx",
    "memcached: data without its end": b"set k 0 0 3\r\n123\n\n",
    "memcached: get of nothing": b"get\r\n",
    "memcached: delete of two": b"delete a b\r\n",
    "memcached: incr by text": b"incr k x\r\n",
    "memcached: flush_all in a while": b"flush_all 10\r\n",
    "memcached: a carriage return within": b"get a\rb\r\n",
    "memcached: cas": b"cas k 0 0 1 1\r\n1\r\n",
    "memcached: touch": b"touch k 0\r\n",
    "memcached: capital letters": b"SET k 0 0 1\r\n1\r\n",
    "memcached: the binary protocol": bytes.fromhex("80000000010000000000") + b"\n",
    # HTTP.
    "HTTP: a body on a GET": _http(b"GET /k HTTP/1.1", b"Content-Length: %d" % len(_INNER), body=_INNER),
    "HTTP: a body on a DELETE": _http(b"DELETE /q HTTP/1.1", b"Content-Length: %d" % len(_INNER), body=_INNER),
    "HTTP: chunks": _http(
        b"PUT /k HTTP/1.1", b"Transfer-Encoding: chunked", body=b"2D\r\n" + _INNER + b"\r\n0\r\n\r\n"
    ),
    "HTTP: chunks and a length": _http(
        b"PUT /k HTTP/1.1", b"Content-Length: 4", b"Transfer-Encoding: chunked", body=b"2D\r\n" + _INNER
    ),
    "HTTP: two lengths": _http(b"PUT /k HTTP/1.1", b"Content-Length: 1", b"Content-Length: 0", body=b"1"),
    "HTTP: a list of lengths": _http(b"PUT /k HTTP/1.1", b"Content-Length: 1, 1", body=b"1"),
    "HTTP: a negative length": _http(b"PUT /k HTTP/1.1", b"Content-Length: -1"),
    "HTTP: a length that is no number": _http(b"PUT /k HTTP/1.1", b"Content-Length: 0x1", body=b"1"),
    "HTTP: a length that is too long": _http(b"PUT /k HTTP/1.1", b"Content-Length: 268435457"),
    "HTTP: no length": _http(b"PUT /k HTTP/1.1"),
    "HTTP: a folded header": _http(b"PUT /k HTTP/1.1", b"X: y", b" Content-Length: 1", b"Content-Length: 0"),
    "HTTP: a blank before the colon": _http(b"PUT /k HTTP/1.1", b"Content-Length : 1", body=b"1"),
    "HTTP: a line feed for a line end": b"PUT /k HTTP/1.1\nContent-Length: 0\n\n",
    "HTTP: a bad escape": _http(b"GET /% HTTP/1.1"),
    "HTTP: a strange host": _http(b"GET /k HTTP/1.1", b"Host: evil.example"),
    "HTTP: a strange origin": _http(b"GET /k HTTP/1.1", b"Host: localhost", b"Origin: http://evil.example"),
    "HTTP: another site": _http(b"GET /k HTTP/1.1", b"Sec-Fetch-Site: cross-site"),
    "HTTP: another method": _http(b"TRACE /k HTTP/1.1"),
    "HTTP: version 2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP: no version": _http(b"GET /k"),
    "HTTP: a method that is memcached's": _http(b"flush_all / HTTP/1.1"),
    "HTTP: a tunnel": _http(b"CONNECT localhost:1978 HTTP/1.1"),
    "HTTP: another expectation": _http(b"PUT /k HTTP/1.1", b"Expect: tea", b"Content-Length: 0"),
}

#: What is good, and by its own word the last: the answer is a good one.
LAST: dict[str, bytes] = {
    "memcached: quit": b"quit\r\n",
    "HTTP: close": _http(b"GET /before HTTP/1.1", b"Connection: close"),
    "HTTP: close, of a body": _http(b"PUT /last HTTP/1.1", b"Connection: close", b"Content-Length: 1", body=b"1"),
    "HTTP: version 1.0": _http(b"GET /before HTTP/1.0"),
}

#: What a server rejects that does not speak HTTP.
WITHOUT_HTTP: dict[str, bytes] = {
    "a GET": _http(b"GET /k HTTP/1.1"),
    "a PUT": _http(b"PUT /k HTTP/1.1", b"Content-Length: 1", body=b"1"),
    "a POST with a body of requests": _http(b"POST / HTTP/1.1", b"Content-Length: %d" % len(_INNER), body=_INNER),
}
#: What a server rejects on which ``put`` is masked; the answer cannot say so.
MASKED: dict[str, bytes] = {
    "putnr": bytes.fromhex("C818 00000001 00000001 6B 31"),
    "set without a reply": b"set k 0 0 1 noreply\r\n1\r\n",
}
