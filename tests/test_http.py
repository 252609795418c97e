"""HTTP as data: one golden table of exchanges, and what is done about clients, and pages in browsers, that attack."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from socketserver import ThreadingMixIn
from typing import Any, NamedTuple
from unittest.mock import ANY as ANYTHING
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from selenium import webdriver
from selenium.webdriver.common.by import By

from beaker_statestore.exceptions import ConfigurationError, ProtocolError
from beaker_statestore.stores import open_store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import ServerProcess
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
    STORE_FAILED,
    SUCCESS,
    Reply,
    Request,
)
from beaker_statestore.tyrant.http import LONGEST_JSON, HTTPPolicy
from beaker_statestore.tyrant.mask import OPEN
from beaker_statestore.tyrant.protocols import CallDecoder
from beaker_statestore.tyrant.server import ServerLimits, ServerOptions
from beaker_statestore.tyrant.wire import LIMITS, Encoded, Limits, encode_request
from tests.serving import PATIENCE, ServerThread, joined
from tests.test_demo_browser import QUIET

OK = Reply(SUCCESS)
FAILED = Reply(FAILURE)
BROKEN = Reply(STORE_FAILED)
MASKED = Reply(FORBIDDEN)
POLICY = HTTPPolicy(hosts=["Store.Example", "10.0.0.5"])


class Answer(NamedTuple):
    """An answer, taken apart; of the headers that all have, only that they are there was looked at."""

    status: int
    kind: str
    body: bytes
    connection: str = ""


GUARDS = {
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
}


def taken_apart(encoded: Encoded) -> Answer:
    data = joined(encoded)
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("ascii").split("\r\n")
    version, status, _ = first.split(" ", 2)
    assert version == "HTTP/1.1"
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    assert len(headers) == len(lines)
    assert headers.items() >= GUARDS.items()
    assert not [name for name in headers if name.startswith("access-control")]
    assert int(headers["content-length"]) == len(body)
    return Answer(int(status), headers["content-type"], body, headers.get("connection", ""))


def text(status: int, body: str, connection: str = "") -> Answer:
    return Answer(status, "text/plain; charset=utf-8", body.encode(), connection)


def binary(body: bytes) -> Answer:
    return Answer(200, "application/octet-stream", body)


def form(body: bytes) -> Answer:
    return Answer(200, "application/x-www-form-urlencoded", body)


NOT_FOUND = text(404, "Not Found\n")
CREATED = text(201, "Created\n")
ERROR = text(500, "Internal Server Error\n")

#: What is sent, what is to be carried out, and the answer to each reply. Where the transcripts of an original server
#: have the same exchange, it is the same but for headers.
GOLDEN: list[tuple[bytes, Request | None, list[tuple[Reply, Answer]]]] = [
    (
        b"GET /web%20key HTTP/1.1\r\n\r\n",
        GET(b"web key"),
        [
            (Reply(SUCCESS, b"hello"), binary(b"hello")),
            (Reply(SUCCESS, b'{"a": 1}'), Answer(200, "application/json", b'{"a": 1}')),
            (FAILED, NOT_FOUND),
        ],
    ),
    (b"GET /web+key HTTP/1.1\r\n\r\n", GET(b"web key"), [(FAILED, NOT_FOUND)]),
    (b"GET / HTTP/1.1\r\n\r\n", GET(b""), []),
    (b"GET //p HTTP/1.1\r\n\r\n", GET(b"/p"), []),
    (b"GET /p?q=1&r#s HTTP/1.1\r\n\r\n", GET(b"p?q=1&r#s"), []),
    (b"GET /%00%ff%2B%3d=3D%25 HTTP/1.1\r\n\r\n", GET(b"\0\xff+==3D%"), []),
    (b"GET /\xd0\xba/../x HTTP/1.1\r\n\r\n", GET(b"\xd0\xba/../x"), []),
    (b"GET http://LocalHost:1978/p HTTP/1.1\r\nHost: localhost:1978\r\n\r\n", GET(b"p"), []),
    (b"GET http://127.0.0.1?p HTTP/1.1\r\n\r\n", GET(b"?p"), []),
    (b"PUT /p HTTP/1.1\r\nContent-Length: 5\r\n\r\nhello", PUT(b"p", b"hello"), [(OK, CREATED), (FAILED, ERROR)]),
    (b"PUT /p HTTP/1.1\r\ncontent-length:0\r\nX-TT-PDMODE: 0\r\n\r\n", PUT(b"p", b""), [(OK, CREATED)]),
    (
        b"PUT /p HTTP/1.1\r\nExpect: 100-Continue\r\nContent-Length: 1\t\r\nX-TT-PDMODE: 1\r\n\r\nx",
        PUTKEEP(b"p", b"x"),
        [(OK, CREATED), (FAILED, text(409, "Conflict\n"))],
    ),
    (
        b"PUT /p HTTP/1.1\r\nX-TT-PDMODE: 2\r\nContent-Length: 1\r\n\r\n!",
        PUTCAT(b"p", b"!"),
        [(OK, CREATED), (FAILED, ERROR)],
    ),
    (b"DELETE /p HTTP/1.1\r\nContent-Length: 0\r\n\r\n", OUT(b"p"), [(OK, text(200, "OK\n")), (FAILED, NOT_FOUND)]),
    (
        b"POST / HTTP/1.1\r\nX-TT-MNAME: get\r\nContent-Length: 13\r\n\r\na=web%20key&b",
        MISC(b"get", [b"web key", b""], 0),
        [
            (Reply(SUCCESS, [b"hello!"]), form(b"res1=hello!")),
            (Reply(SUCCESS, [b"a b&=%\xff", b"", b"~'()*_.-"]), form(b"res1=a%20b%26%3D%25%FF&res2=&res3=~'()*_.-")),
            (Reply(SUCCESS, []), form(b"")),
            (FAILED, ERROR),
        ],
    ),
    (
        b"POST / HTTP/1.1\r\nX-TT-MNAME: putlist\r\nX-TT-MOPTS: 1\r\nContent-Length: 14\r\n\r\na=1&&a=+2=&=%3",
        None,
        [(OK, text(400, "Bad Request: a percent sign begins no escape\n", "close"))],
    ),
    (
        b"POST / HTTP/1.1\r\nX-TT-MNAME: putlist\r\nX-TT-MOPTS: 1\r\nContent-Length: 15\r\n\r\na=1&&a=+2=&=%33",
        MISC(b"putlist", [b"1", b" 2=", b"3"], 1),
        [(Reply(SUCCESS, []), form(b""))],
    ),
    (b"POST / HTTP/1.1\r\nX-TT-MNAME: sync\r\n\r\n", MISC(b"sync", [], 0), [(Reply(SUCCESS, []), form(b""))]),
    (
        b"POST /k HTTP/1.1\r\nX-TT-MNAME: sync\r\nX-TT-XNAME: f\r\nX-TT-XOPTS: 3\r\nContent-Length: 1\r\n\r\nv",
        EXT(b"f", b"k", b"v", 3),
        [(Reply(SUCCESS, b"{}"), binary(b"{}")), (FAILED, ERROR)],
    ),
    (b"POST /x HTTP/1.1\r\nContent-Length: 1\r\n\r\nv", None, [(OK, text(400, "Bad Request\n"))]),
]
REQUESTS = [(data, request) for data, request, _ in GOLDEN]
ANSWERS = [(data, reply, answer) for data, _, answers in GOLDEN for reply, answer in answers]

#: What follows everything that is refused, in the same packet: a write in each of the protocols.
WRITES = {
    "binary": encode_request(PUT(b"stolen", b"1")),
    "memcached": b"set stolen 0 0 1\r\n1\r\n",
    "http": b"PUT /stolen HTTP/1.1\r\nContent-Length: 1\r\n\r\n1",
}


def call_of(data: bytes, limits: Limits = LIMITS, policy: HTTPPolicy = POLICY) -> Call:
    """The only call in ``data``."""
    decoder = CallDecoder(limits, policy)
    decoder.feed(data)
    call = decoder.next()
    assert call is not None
    assert decoder.buffered == 0
    return call


def with_headers(*lines: str, request: str = "GET /k HTTP/1.1") -> bytes:
    return "\r\n".join([request, *lines, "", ""]).encode("latin-1")


def fed_whole(data: bytes) -> Call | None:
    return call_of(data)


def fed_byte_by_byte(data: bytes) -> Call | None:
    decoder = CallDecoder(LIMITS, POLICY)
    for place in range(len(data) - 1):
        decoder.feed(data[place : place + 1])
        assert decoder.next() is None, f"complete after {place + 1} of {len(data)} bytes"
        assert decoder.midway
        assert decoder.buffered == place + 1
    decoder.feed(data[-1:])
    return decoder.next()


def fed_with_garbage_behind(data: bytes) -> Call | None:
    decoder = CallDecoder(LIMITS, POLICY)
    decoder.feed(data + b"garbage")
    call = decoder.next()
    assert call is not None
    assert decoder.buffered == (0 if call.last else len(b"garbage"))
    return call


def shown(value: Any) -> str:
    return repr(value)[:60]


@pytest.mark.parametrize("feed", [fed_whole, fed_byte_by_byte, fed_with_garbage_behind])
@pytest.mark.parametrize(("data", "request_"), REQUESTS, ids=shown)
def test_requests_are_decoded(data: bytes, request_: Request | None, feed: Callable[[bytes], Call | None]) -> None:
    call = feed(data)
    assert call is not None
    assert (call.request, call.door) == (request_, Door.HTTP)
    assert call.last == (b"%3" in data and request_ is None)


@pytest.mark.parametrize(("data", "reply", "answer"), ANSWERS, ids=shown)
def test_replies_are_encoded(data: bytes, reply: Reply, answer: Answer) -> None:
    assert taken_apart(call_of(data).encode(reply)) == answer


@pytest.mark.parametrize("data", [data for data, request in REQUESTS if request is not None], ids=shown)
def test_no_failure_looks_like_absence_or_success(data: bytes) -> None:
    call = call_of(data)
    assert taken_apart(call.encode(BROKEN)) == ERROR
    refused = call.refused()
    assert (refused.request, refused.last) == (None, False)
    assert taken_apart(refused.encode(OK)) == text(403, "Forbidden\n")


@pytest.mark.parametrize("reply", [Reply(SUCCESS, b'{"a": 1}'), Reply(SUCCESS, b"\xff"), FAILED, BROKEN, MASKED])
def test_head_tells_what_get_answers(reply: Reply) -> None:
    head, get = call_of(b"HEAD /k HTTP/1.1\r\n\r\n"), call_of(b"GET /k HTTP/1.1\r\n\r\n")
    assert head.request == get.request
    whole = joined(get.encode(reply))
    assert head.encode(reply) == whole[: whole.index(b"\r\n\r\n") + 4]


@pytest.mark.parametrize("target", [b"/", b"/any", b"*"])
def test_options_tell_the_figures_but_no_counters(target: bytes) -> None:
    call = call_of(b"OPTIONS %b HTTP/1.1\r\n\r\n" % target)
    assert call.request == STAT()
    answer = joined(
        call.encode(Reply(SUCCESS, b"version\t9\nrnum\t3\npath\t/a b\nru_user\t0.5\ncnt_put\t7\nevil\t\r\x01\n"))
    )
    assert taken_apart(answer) == text(200, "")
    lines = answer.split(b"\r\n")
    assert [line for line in lines if line.startswith((b"Allow", b"X-TT"))] == [
        b"Allow: OPTIONS, GET, HEAD, PUT, POST, DELETE",
        b"X-TT-VERSION: 9",
        b"X-TT-RNUM: 3",
        b"X-TT-PATH: /a b",
        b"X-TT-RU_USER: 0.5",
    ]


@pytest.mark.parametrize(
    ("version", "connection", "last", "said"),
    [
        ("1.1", [], False, ""),
        ("1.0", [], True, "close"),
        ("1.1", ["close"], True, "close"),
        ("1.1", ["Keep-Alive"], False, ""),
        ("1.0", ["keep-alive"], False, "keep-alive"),
        ("1.1", ["keep-alive, CLOSE"], True, "close"),
        ("1.1", ["keep-alive", "close"], True, "close"),
        ("1.0", ["keep-alive", "close"], True, "close"),
        ("1.1", ["Upgrade, HTTP2-Settings"], False, ""),
    ],
)
def test_the_connection_is_kept_or_not(version: str, connection: list[str], last: bool, said: str) -> None:
    lines = [f"Connection: {value}" for value in connection]
    call = call_of(with_headers(*lines, request=f"GET /k HTTP/{version}"))
    assert call.last == last
    assert taken_apart(call.encode(FAILED)).connection == said
    assert call.refused().last == last


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize(
    "data", [with_headers("Connection: close"), with_headers(request="GET /k HTTP/1.0")], ids=["close", "1.0"]
)
def test_behind_the_last_request_nothing_is_read_any_more(data: bytes, behind: bytes) -> None:
    decoder = CallDecoder(LIMITS, POLICY)
    decoder.feed(data + behind)
    call = decoder.next()
    assert call is not None
    assert call.request == GET(b"k")
    decoder.feed(behind)
    assert decoder.next() is None
    assert decoder.buffered == 0


# -- what a value is


@pytest.mark.parametrize(
    "value",
    [
        b"{}",
        b"[]",
        b' {"a": [1, 2.5e3, null, true, "\xc3\xa9"]}\n',
        b"null",
        b"1",
        b'"x"',
        b'"' + b"x" * (LONGEST_JSON - 2) + b'"',
        b"1" * 10_000,
        b"[" * 50 + b"]" * 50,
    ],
    ids=shown,
)
def test_a_value_that_is_json_is_called_so(value: bytes) -> None:
    assert taken_apart(call_of(with_headers()).encode(Reply(SUCCESS, value))).kind == "application/json"


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"<script>alert(1)</script>",
        b"{",
        b"{}}",
        b"{'a': 1}",
        b"NaN",
        b"[Infinity]",
        b'"\xff"',
        b'"\x00"',
        b"\xef\xbb\xbf{}",
        '{"a": 1}'.encode("utf-16"),
        b"[" * 200_000,
        b'"' + b"x" * (LONGEST_JSON - 1) + b'"',
        b"x" * 1_000_000,
    ],
    ids=shown,
)
def test_any_other_value_is_bytes(value: bytes) -> None:
    answer = taken_apart(call_of(with_headers()).encode(Reply(SUCCESS, value)))
    assert answer == binary(value)


def test_a_long_value_among_results_is_escaped_throughout() -> None:
    call = call_of(b"POST / HTTP/1.1\r\nX-TT-MNAME: get\r\n\r\n")
    answer = taken_apart(call.encode(Reply(SUCCESS, [b"a" * 4096, b"a\xff" * 2049])))
    assert answer.body == b"res1=" + b"a" * 4096 + b"&res2=" + b"%61%FF" * 2049


# -- whose requests are answered


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["Host: localhost"],
        ["host: LOCALHOST:1978"],
        ["Host: 127.0.0.1:1978"],
        ["Host: 127.9.8.7"],
        ["Host: [::1]:1978"],
        ["Host: store.example"],
        ["Host: STORE.example:80"],
        ["Host: 10.0.0.5:1978"],
        ["Host: localhost:1978", "Origin: http://localhost:1978"],
        ["Host: store.example", "Origin: https://Store.Example", "Sec-Fetch-Site: same-origin"],
        ["Host: localhost", "Sec-Fetch-Site: none"],
    ],
    ids=shown,
)
def test_programs_and_pages_of_this_origin_are_answered(lines: list[str]) -> None:
    assert call_of(with_headers(*lines)).request == GET(b"k")


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize(
    "lines",
    [
        ["Host: evil.example"],
        ["Host: localhost.evil.example"],
        ["Host: evil.example:1978"],
        ["Host: 10.0.0.6"],
        ["Host: 0.0.0.0"],
        ["Host: localhost:123456"],
        ["Host: localhost:80:80"],
        ["Host: user@localhost"],
        ["Host: [::1"],
        ["Host: ::1"],
        ["Host: localhost, evil.example"],
        ["Host: localhost/"],
        ["Host:"],
        ["Host: localhost", "Origin: http://evil.example"],
        ["Host: localhost", "Origin: null"],
        ["Host: localhost", "Origin:"],
        ["Host: localhost:1978", "Origin: http://localhost"],
        ["Host: localhost", "Origin: http://localhost:3000"],
        ["Host: localhost", "Origin: ftp://localhost"],
        ["Origin: http://localhost"],
        ["Host: localhost", "Sec-Fetch-Site: cross-site"],
        ["Host: localhost", "Sec-Fetch-Site: same-site"],
        ["Host: localhost", "Sec-Fetch-Site: anything"],
        ["Host: localhost", "Sec-Fetch-Site:"],
        ["Host: localhost", "Origin: http://localhost", "Sec-Fetch-Site: cross-site"],
    ],
    ids=shown,
)
@pytest.mark.parametrize("method", ["GET", "PUT", "POST", "DELETE", "OPTIONS", "HEAD"])
def test_nobody_else_is(lines: list[str], behind: bytes, method: str) -> None:
    decoder = CallDecoder(LIMITS, POLICY)
    decoder.feed(with_headers(*lines, "Content-Length: 0", request=f"{method} /k HTTP/1.1") + behind)
    call = decoder.next()
    assert call is not None
    assert (call.request, call.last) == (None, True)
    answer = taken_apart(call.encode(OK))
    assert (answer.status, answer.connection) == (403, "close")
    assert decoder.next() is None


@pytest.mark.parametrize("host", ["", "*", "a b", "example.org:80", "[::1]:80", "http://example.org", "a/b"])
def test_a_policy_names_what_is_no_host(host: str) -> None:
    with pytest.raises(ConfigurationError, match="is no host"):
        HTTPPolicy(hosts=[host])


@pytest.mark.parametrize("host", ["fd00::1", "[fd00::1]", "FD00::1"])
def test_a_policy_may_name_an_ipv6_address(host: str) -> None:
    assert call_of(with_headers("Host: [fd00::1]:1978"), policy=HTTPPolicy(hosts=[host])).request == GET(b"k")


# -- clients that break the protocol

PUT_1 = "PUT /k HTTP/1.1"
#: What is answered so, whereupon the connection ends. All of it would store something if it were taken for good.
REFUSED: dict[str, tuple[int, bytes]] = {
    "no content length": (411, with_headers(request=PUT_1)),
    "chunks": (411, with_headers("Transfer-Encoding: chunked", request=PUT_1)),
    "chunks on a get": (411, with_headers("Transfer-Encoding: chunked")),
    "chunks and a length": (400, with_headers("Transfer-Encoding: chunked", "Content-Length: 1", request=PUT_1)),
    "no encoding and a length": (400, with_headers("Transfer-Encoding: identity", "Content-Length: 1", request=PUT_1)),
    "two lengths": (400, with_headers("Content-Length: 1", "Content-Length: 2", request=PUT_1)),
    "the same length twice": (400, with_headers("Content-Length: 1", "content-length: 1", request=PUT_1)),
    "a list of lengths": (400, with_headers("Content-Length: 1, 1", request=PUT_1)),
    "a negative length": (400, with_headers("Content-Length: -1", request=PUT_1)),
    "a signed length": (400, with_headers("Content-Length: +1", request=PUT_1)),
    "a hexadecimal length": (400, with_headers("Content-Length: 0x1", request=PUT_1)),
    "an empty length": (400, with_headers("Content-Length:", request=PUT_1)),
    "a length with an underscore": (400, with_headers("Content-Length: 1_0", request=PUT_1)),
    "a length above the limit": (413, with_headers("Content-Length: 268435457", request=PUT_1)),
    "a length beyond all": (413, with_headers("Content-Length: 999999999999999999", request=PUT_1)),
    "a body on a get": (400, with_headers("Content-Length: 1")),
    "a folded header": (400, with_headers("X-A: b", " c", request=PUT_1)),
    "a folded length": (400, with_headers("Content-Length:", " 1", request=PUT_1)),
    "a blank before the colon": (400, with_headers("Content-Length : 1", request=PUT_1)),
    "a header without a colon": (400, with_headers("Content-Length", request=PUT_1)),
    "a header without a name": (400, with_headers(": 1", request=PUT_1)),
    "a blank in a name": (400, with_headers("X A: 1", request=PUT_1)),
    "a zero byte in a header": (400, with_headers("X-A: \0", request=PUT_1)),
    "a carriage return in a header": (400, with_headers("X-A: b\rContent-Length: 1", request=PUT_1)),
    "a delete character": (400, with_headers("X-A: \x7f", request=PUT_1)),
    "a header that ends in a line feed only": (400, with_headers("X-A: b\nContent-Length: 1", request=PUT_1)),
    "a head that ends in line feeds only": (400, b"PUT /k HTTP/1.1\r\nContent-Length: 0\n\n"),
    "a request line that ends in a line feed only": (400, b"GET /k HTTP/1.1\n\r\n"),
    "four words": (400, with_headers(request="GET /k x HTTP/1.1")),
    "two words": (400, with_headers(request="GET HTTP/1.1")),
    "two blanks": (400, with_headers(request="GET  /k HTTP/1.1")),
    "a tab": (400, with_headers(request="GET\t/k HTTP/1.1")),
    "a leading blank": (400, with_headers(request=" GET /k HTTP/1.1")),
    "a trailing blank": (400, with_headers(request="GET /k HTTP/1.1 ")),
    "a zero byte in the target": (400, with_headers(request="GET /\0 HTTP/1.1")),
    "a comma for a method": (400, with_headers(request="GET, /k HTTP/1.1")),
    "half an escape": (400, with_headers(request="GET /% HTTP/1.1")),
    "an escape of one digit": (400, with_headers(request="GET /%1 HTTP/1.1")),
    "an escape that is none": (400, with_headers(request="GET /%zz HTTP/1.1")),
    "no path": (400, with_headers(request="GET k HTTP/1.1")),
    "an asterisk": (400, with_headers(request="GET * HTTP/1.1")),
    "another scheme": (400, with_headers(request="GET ftp://localhost/k HTTP/1.1")),
    "another host as target": (403, with_headers(request="GET http://evil.example/k HTTP/1.1")),
    "an address with a user": (403, with_headers(request="GET http://a@localhost/k HTTP/1.1")),
    "two hosts that differ": (400, with_headers("Host: 127.0.0.1", request="GET http://localhost/k HTTP/1.1")),
    "two hosts": (400, with_headers("Host: localhost", "Host: localhost")),
    "two origins": (400, with_headers("Host: localhost", "Origin: http://localhost", "Origin: http://localhost")),
    "two sites": (400, with_headers("Sec-Fetch-Site: none", "Sec-Fetch-Site: none")),
    "two modes": (400, with_headers("X-TT-PDMODE: 1", "X-TT-PDMODE: 0", "Content-Length: 0", request=PUT_1)),
    "an unknown mode": (400, with_headers("X-TT-PDMODE: 3", "Content-Length: 0", request=PUT_1)),
    "a mode that is no number": (400, with_headers("X-TT-PDMODE: keep", "Content-Length: 0", request=PUT_1)),
    "options that are no number": (400, with_headers("X-TT-XNAME: f", "X-TT-XOPTS: -1", request="POST /k HTTP/1.1")),
    "too long a name": (400, with_headers("X-TT-MNAME: " + "f" * 1024, request="POST / HTTP/1.1")),
    "another expectation": (417, with_headers("Expect: the unexpected", "Content-Length: 0", request=PUT_1)),
    "too long a request line": (414, with_headers(request=f"GET /{'k' * 8192} HTTP/1.1")),
    "too long a header": (431, with_headers("X-A: " + "b" * 8192)),
    "too many headers": (431, with_headers(*(f"X-{number}: b" for number in range(101)))),
    "too long a head": (431, with_headers(*(f"X-{number}: {'b' * 8000}" for number in range(9)))),
    "trace": (501, with_headers(request="TRACE /k HTTP/1.1")),
    "connect": (400, with_headers(request="CONNECT localhost:1978 HTTP/1.1")),
    "small letters": (501, with_headers(request="put /k HTTP/1.1")),
    "HTTP/2": (505, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/0.9": (505, with_headers(request="GET /k HTTP/0.9")),
    "HTTP/1.2": (505, with_headers(request="GET /k HTTP/1.2")),
    "HTTP/1.10": (505, with_headers(request="GET /k HTTP/1.10")),
    "HTTP/1": (400, with_headers(request="GET /k HTTP/1")),
}


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize(("status", "data"), REFUSED.values(), ids=list(REFUSED))
def test_behind_what_is_refused_nothing_is_read_any_more(status: int, data: bytes, behind: bytes) -> None:
    decoder = CallDecoder(LIMITS, POLICY)
    decoder.feed(with_headers(request="GET /before HTTP/1.1") + data + behind)
    first = decoder.next()
    assert first is not None
    assert first.request == GET(b"before")
    call = decoder.next()
    assert call is not None
    assert (call.request, call.last) == (None, True)
    answer = taken_apart(call.encode(OK))
    assert (answer.status, answer.connection) == (status, "close")
    decoder.feed(behind)
    assert decoder.next() is None
    assert decoder.buffered == 0


#: What is not answered at all.
UNKNOWN = {
    "an empty line first": b"\r\n" + with_headers(),
    "no version": with_headers(request="GET /k"),
    "another protocol": with_headers(request="GET /k HTTQ/1.1"),
    "a version in words": with_headers(request="GET /k HTTP/one"),
    "two carriage returns": b"GET /k HTTP/1.1\r\r\n\r\n",
}


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("data", UNKNOWN.values(), ids=list(UNKNOWN))
def test_behind_what_is_unknown_nothing_is_read_any_more(data: bytes, behind: bytes) -> None:
    decoder = CallDecoder(LIMITS, POLICY)
    decoder.feed(data + behind)
    for _ in range(2):
        with pytest.raises(ProtocolError):
            decoder.next()
        decoder.feed(behind)
    assert decoder.buffered == 0


@pytest.mark.parametrize("behind", WRITES.values(), ids=list(WRITES))
@pytest.mark.parametrize("data", [data for data, _ in REQUESTS], ids=shown)
def test_http_is_off_unless_somebody_asks_for_it(data: bytes, behind: bytes) -> None:
    decoder = CallDecoder()
    decoder.feed(data + behind)
    with pytest.raises(ProtocolError, match="HTTP is not spoken here"):
        decoder.next()
    decoder.feed(behind)
    with pytest.raises(ProtocolError):
        decoder.next()


@pytest.mark.parametrize(
    ("within", "beyond", "limits", "status"),
    [
        (
            with_headers("Content-Length: 8", request=PUT_1) + b"12345678",
            with_headers("Content-Length: 9", request=PUT_1),
            Limits(blob=8),
            413,
        ),
        (
            with_headers("Content-Length: 8", request=PUT_1) + b"12345678",
            with_headers("Content-Length: 9", request=PUT_1),
            Limits(message=len(with_headers("Content-Length: 8", request=PUT_1)) + 8),
            413,
        ),
        (
            b"POST / HTTP/1.1\r\nContent-Length: 3\r\nX-TT-MNAME: f\r\n\r\na&b",
            b"POST / HTTP/1.1\r\nContent-Length: 5\r\nX-TT-MNAME: f\r\n\r\na&b&c",
            Limits(count=2),
            413,
        ),
        (
            with_headers("X-TT-MNAME: nam", request="POST / HTTP/1.1"),
            with_headers("X-TT-MNAME: name", request="POST / HTTP/1.1"),
            Limits(name=3),
            400,
        ),
        (
            with_headers(request=f"GET /{'k' * (8191 - 16)} HTTP/1.1"),
            with_headers(request=f"GET /{'k' * (8192 - 16)} HTTP/1.1"),
            LIMITS,
            414,
        ),
        (with_headers("A: " + "b" * (8191 - 5)), with_headers("A: " + "b" * (8192 - 5)), LIMITS, 431),
        (
            with_headers(*(f"X-{number}: b" for number in range(100))),
            with_headers(*(f"X-{number}: b" for number in range(101))),
            LIMITS,
            431,
        ),
    ],
)
def test_each_limit_holds_to_the_byte(within: bytes, beyond: bytes, limits: Limits, status: int) -> None:
    assert call_of(within, limits).request is not None
    assert taken_apart(call_of(beyond, limits).encode(OK)).status == status


# -- anything at all

PIECES = [
    *(data for data, _ in REQUESTS),
    *(data for _, data in list(REFUSED.values())[:20]),
    *WRITES.values(),
    b"get k l\r\n",
    b"set k 0 0 5\r\n",
    b"quit\r\n",
    b"Host: localhost\r\n",
    b"Content-Length: 5\r\n",
    b"\r\n",
    b"\xc8\x30",
    b"HTTP/1.1",
]


def calls_in(pieces: Iterator[bytes] | list[bytes], limits: Limits) -> list[Any]:
    """What a decoder makes of ``pieces``; its end, if it broke."""
    decoder = CallDecoder(limits, POLICY)
    found: list[Any] = []
    for piece in pieces:
        decoder.feed(piece)
        try:
            while (call := decoder.next()) is not None:
                found.append((call.request, call.door, call.last, call.encode(FAILED)))
        except ProtocolError:
            assert decoder.buffered == 0
            return [*found, "broken"]
    return found


@given(
    st.lists(st.sampled_from(PIECES) | st.binary(max_size=20), max_size=6).map(b"".join),
    st.lists(st.integers(0, 200), max_size=8),
)
@example(b"get k l\r\n" + PIECES[0] + b"\xc8\x30\0\0\0\1kbogus\r\n", [1, 2, 3])
def test_any_bytes_make_the_same_calls_however_they_are_cut(data: bytes, cuts: list[int]) -> None:
    limits = Limits(blob=2000, count=50, name=50, message=4000, line=9000)
    places = sorted({min(cut, len(data)) for cut in cuts} | {0, len(data)})
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    whole = calls_in([data], limits)
    assert calls_in(pieces, limits) == whole
    assert calls_in([data[place : place + 1] for place in range(len(data))], limits) == whole
    assert len(whole) <= len(data)


@given(st.binary(max_size=60), st.binary(max_size=60))
def test_any_record_arrives_as_it_was(key: bytes, value: bytes) -> None:
    target = "".join(f"%{byte:02x}" for byte in key)
    call = call_of(with_headers(f"Content-Length: {len(value)}", request=f"PUT /{target} HTTP/1.1") + value)
    assert call.request == PUT(key, value)


# -- the real thing: the standard library's client against a server

OPTIONS = ServerOptions(tcp_mask=OPEN, http=HTTPPolicy())


def ask(connection: http.client.HTTPConnection, method: str, target: str, **more: Any) -> Answer:
    connection.request(method, target, **more)
    response = connection.getresponse()
    return Answer(
        response.status,
        response.headers["Content-Type"],
        response.read(),
        response.headers.get("Connection", ""),
    )


def test_records_can_be_kept_by_http() -> None:
    store = MemoryStore()
    document = json.dumps({"name": "Ж"}).encode()
    with ServerThread(store, options=OPTIONS) as server:
        connection = http.client.HTTPConnection(server.address.host, server.address.port, timeout=PATIENCE)
        try:
            assert ask(connection, "PUT", "/a%20key", body=document) == CREATED
            assert ask(connection, "GET", "/a%20key") == Answer(200, "application/json", document)
            assert ask(connection, "HEAD", "/a%20key") == Answer(200, "application/json", b"")
            assert ask(connection, "PUT", "/a%20key", body=b"x", headers={"X-TT-PDMODE": "1"}).status == 409
            assert ask(connection, "POST", "/", body=b"k=a+key", headers={"X-TT-MNAME": "out"}).status == 200
            assert ask(connection, "GET", "/a%20key") == NOT_FOUND
            assert ask(connection, "DELETE", "/a%20key") == NOT_FOUND
            assert ask(connection, "OPTIONS", "*").status == 200
            large = bytes(range(256)) * 20_000
            assert ask(connection, "PUT", "/large", body=large) == CREATED
            assert ask(connection, "GET", "/large") == binary(large)
            assert store.get(b"large") == large
            # Until here it was one connection, and now it ends.
            sock = connection.sock
            refused = ask(connection, "DELETE", "/large", headers={"Origin": "http://evil.example"})
            assert (refused.status, refused.connection) == (403, "close")
            assert connection.sock is not sock
        finally:
            connection.close()
        assert store.get(b"large") == large


def test_who_sends_too_much_is_told_so_although_he_goes_on_sending() -> None:
    store = MemoryStore()
    with (
        ServerThread(store, options=OPTIONS, limits=ServerLimits(message=100_000)) as server,
        server.connect() as client,
    ):
        client.send(with_headers("Content-Length: 300000", request=PUT_1) + b"x" * 300_000)
        assert taken_apart(client.receive_to_end()).status == 413
        assert store.get(b"k") is None


@pytest.mark.parametrize("arguments", [["--http"], ["--http", "--http-host", "store.example"], []])
def test_a_server_process_answers_http_if_it_is_told_to(arguments: list[str]) -> None:
    with ServerProcess(arguments=arguments) as process:
        open_store(process.url).put(b"k", b"{}")
        host, _, port = process.url.partition(":")

        def get(headers: dict[str, str]) -> Answer:
            with contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=PATIENCE)) as connection:
                return ask(connection, "GET", "/k", headers=headers)

        if not arguments:
            with pytest.raises((http.client.RemoteDisconnected, ConnectionResetError)):
                get({})
            return
        assert get({}) == Answer(200, "application/json", b"{}")
        assert get({"Host": "store.example"}).status == (200 if "store.example" in arguments else 403)
        # The name is allowed to programs; a page from elsewhere stays what it is.
        assert get({"Host": "store.example", "Origin": "http://evil.example"}).status == 403


# -- the real thing: a page from elsewhere, in a browser that somebody has opened

#: All that a page can do to make its reader's browser send something. Answers what it could learn of each attempt.
ATTACK = r"""
const [target, secret, done] = arguments;
const learnt = {};
const note = (name, promise) => promise.then(
    (value) => { learnt[name] = value; }, (error) => { learnt[name] = "refused"; });
const fetched = (options) => fetch(target + secret, options).then(async (r) => r.type + (await r.text()));
const loaded = (kind, attributes) => new Promise((resolve, reject) => {
    const element = Object.assign(document.createElement(kind), attributes);
    element.onload = () => resolve("loaded");
    element.onerror = () => reject(new Error("not loaded"));
    document.body.append(element);
});
const posted = (type, name, value) => new Promise((resolve) => {
    const frame = Object.assign(document.createElement("iframe"), {name: "frame" + Math.random()});
    document.body.append(frame);
    const form = Object.assign(document.createElement("form"), {
        method: "POST", action: target + "/stolen", enctype: type, target: frame.name});
    form.append(Object.assign(document.createElement("textarea"), {name: name, value: value}));
    document.body.append(form);
    frame.onload = () => resolve("sent");
    form.submit();
});
const set = "set stolen 0 0 1\r\n1\r\n";
const opened = new Promise((resolve, reject) => {
    const socket = new WebSocket(target.replace("http", "ws") + secret);
    socket.onopen = () => resolve("opened");
    socket.onerror = () => reject(new Error("not opened"));
});
Promise.all([
    note("beacon", Promise.resolve(navigator.sendBeacon(target + "/stolen", set) ? "sent" : "refused")),
    note("get", fetched({})),
    note("opaque get", fetched({mode: "no-cors"})),
    note("get with credentials", fetched({credentials: "include"})),
    note("put", fetched({method: "PUT", body: "1"})),
    note("delete", fetched({method: "DELETE"})),
    note("post misc", fetched({method: "POST", body: "a=stolen&b=1", headers: {"X-TT-MNAME": "put"}})),
    note("opaque post", fetched({method: "POST", body: set, mode: "no-cors"})),
    note("method of memcached", fetched({method: "flush_all"})),
    note("form", posted("application/x-www-form-urlencoded", "a", "stolen")),
    note("form of lines", posted("text/plain", set, set)),
    note("form of parts", posted("multipart/form-data", "a", set)),
    note("image", loaded("img", {src: target + secret})),
    note("script", loaded("script", {src: target + secret})),
    note("style", loaded("link", {rel: "stylesheet", href: target + secret})),
    note("socket", opened),
]).then(() => done(learnt));
"""
#: What each attempt tells its page; of those that are only sent, nothing.
NOTHING_LEARNT = {
    "get": "refused",
    "opaque get": "refused",
    "get with credentials": "refused",
    "put": "refused",
    "delete": "refused",
    "post misc": "refused",
    "opaque post": "refused",
    "method of memcached": "refused",
    "form": "sent",
    "form of lines": "sent",
    "form of parts": "sent",
    "image": "refused",
    "script": "refused",
    "style": "refused",
    "socket": "refused",
    "beacon": "sent",
}
SECRET = b'{"secret": "of a session"}'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    driver, program = shutil.which("chromedriver"), shutil.which("chromium")
    assert driver, "the browser tests need: apt-get install chromium chromium-driver"
    assert program, "the browser tests need: apt-get install chromium chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = program
    profile = tmp_path_factory.mktemp("profile")
    for argument in [*QUIET, f"--user-data-dir={profile}", "--host-resolver-rules=MAP evil.example 127.0.0.1"]:
        options.add_argument(argument)
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as opened:
        opened.set_page_load_timeout(PATIENCE)
        opened.set_script_timeout(PATIENCE)
        yield opened


@pytest.fixture
def page_elsewhere() -> Iterator[int]:
    """The port of a web server with a page of somebody else's."""

    def page(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [("Content-Type", "text/html")])
        return [b"<!doctype html><title>Elsewhere</title><body>"]

    class Silent(WSGIRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with make_server("127.0.0.1", 0, page, ThreadingServer, Silent) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join(PATIENCE)


class ThreadingServer(ThreadingMixIn, WSGIServer):
    """For a browser, which opens connections before it needs them."""

    daemon_threads = True


def counts_of(server: ServerThread) -> dict[str, int]:
    """How often which command has been carried out."""
    with server.connect() as client:
        ((_, text),) = client.ask(STAT())
    figures = dict(line.split("\t", 1) for line in text.decode().splitlines())
    return {name: int(count) for name, count in figures.items() if name.startswith("cnt_") and int(count)}


@pytest.mark.parametrize("with_http", [True, False], ids=["http", "no http"])
@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "evil.example"])
def test_a_page_from_elsewhere_reads_and_changes_nothing(
    browser: webdriver.Chrome, page_elsewhere: int, host: str, with_http: bool
) -> None:
    store = MemoryStore()
    store.put(b"secret", SECRET)
    options = ServerOptions(tcp_mask=OPEN, http=HTTPPolicy() if with_http else None)
    with ServerThread(store, options=options) as server:
        browser.get(f"http://{host}:{page_elsewhere}/")
        target = f"http://{server.address}"
        assert browser.execute_async_script(ATTACK, target, "/secret") == NOTHING_LEARNT | (
            {} if with_http else {"form": ANYTHING, "form of lines": ANYTHING, "form of parts": ANYTHING}
        )
        assert counts_of(server) == {}
        assert list(store.ordered_keys()) == [b"secret"]
        assert store.get(b"secret") == SECRET


def test_a_page_whose_name_comes_to_mean_this_server_reads_and_changes_nothing(browser: webdriver.Chrome) -> None:
    """As in DNS rebinding: for the browser it is one origin, and asks nobody's leave."""
    store = MemoryStore()
    store.put(b"secret", SECRET)
    with ServerThread(store, options=OPTIONS) as server:
        origin = f"http://evil.example:{server.address.port}"
        browser.get(f"{origin}/secret")
        assert browser.find_element(By.TAG_NAME, "body").text == "Forbidden: the server does not answer for this host"
        learnt = browser.execute_async_script(ATTACK, origin, "/secret")
        assert SECRET.decode() not in json.dumps(learnt)
        assert counts_of(server) == {}
        assert list(store.ordered_keys()) == [b"secret"]


def test_whoever_types_the_address_reads_the_record_and_no_page_of_it(browser: webdriver.Chrome) -> None:
    """What the tests above refuse does work, so it is not the browser that refuses it."""
    store = MemoryStore()
    store.put(b"secret", SECRET)
    store.put(b"page", b"<!doctype html><title>Page</title><script>document.title = 'ran'</script>")
    with ServerThread(store, options=OPTIONS) as server:
        origin = f"http://localhost:{server.address.port}"
        browser.get(f"{origin}/secret")
        assert SECRET.decode() in browser.find_element(By.TAG_NAME, "body").text
        read = "fetch('/secret').then((answer) => answer.text()).then(arguments[0])"
        assert browser.execute_async_script(read) == SECRET.decode()
        browser.execute_async_script(ATTACK, origin, "/secret")
        assert store.get(b"secret") is None
        assert store.get(b"stolen") == b"1"
        browser.get(f"{origin}/page")  # to be saved, if anything; the browser stays where it was
        assert browser.title not in ("Page", "ran")
