"""Which commands clients may use: that a mask has no gaps, whatever the protocol and the detour."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore.exceptions import ConfigurationError
from beaker_statestore.stores import cabinet
from beaker_statestore.stores.base import Verbs
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import apart, commands, mask, swap, verbs
from beaker_statestore.tyrant.calls import Door, binary_call
from beaker_statestore.tyrant.commands import (
    ADDDOUBLE,
    ADDINT,
    CAS,
    COPY,
    EXT,
    FAILURE,
    FORBIDDEN,
    FWMKEYS,
    GET,
    ITERINIT,
    ITERNEXT,
    MGET,
    MISC,
    OPTIMIZE,
    OUT,
    PUT,
    PUTCAT,
    PUTKEEP,
    PUTNR,
    PUTSHL,
    RESTORE,
    RNUM,
    SETMST,
    SIZE,
    STAT,
    SUCCESS,
    SYNC,
    VANISH,
    VSIZ,
    Reply,
    Request,
)
from beaker_statestore.tyrant.http import HTTPPolicy
from beaker_statestore.tyrant.mask import CLOSED, OPEN, Mask, effects
from beaker_statestore.tyrant.server import ServerOptions
from beaker_statestore.tyrant.wire import encode_request
from tests.serving import ServerThread

OK = Reply(SUCCESS)
DANGEROUS = {"vanish", "copy", "restore", "setmst", "optimize", "functions"}
READING = {"get", "mget", "vsiz", "iterinit", "iternext", "fwmkeys", "rnum", "size", "stat"}
WRITING = {"put", "putkeep", "putcat", "putshl", "putnr", "out", "addint", "adddouble", "vanish"}
DOORS = {door.value for door in Door}
#: All that can be masked.
LEAVES = {command.name for command in commands.COMMANDS.values()} | {"functions"} | DOORS


def forbidden(masked: str = "", unmasked: str = "", default: Mask = OPEN) -> frozenset[str]:
    """What is forbidden by options whose values have blanks between."""
    return Mask.of(masked.split(), unmasked.split(), default).forbidden


# -- what the options say


@pytest.mark.parametrize(
    ("masked", "unmasked", "default", "expected"),
    [
        ("", "", OPEN, set()),
        ("", "", CLOSED, DANGEROUS),
        ("get", "", OPEN, {"get"}),
        ("get,put", "", OPEN, {"get", "put"}),
        ("put", "", CLOSED, DANGEROUS | {"put"}),
        ("", "vanish", CLOSED, DANGEROUS - {"vanish"}),
        ("", "all", CLOSED, set()),
        ("all", "", OPEN, LEAVES - DOORS),
        ("all", "get", OPEN, LEAVES - DOORS - {"get"}),
        (
            "all",
            "allread",
            OPEN,
            LEAVES - DOORS - READING,
        ),
        ("allread", "get", OPEN, READING - {"get"}),
        ("get", "allread", OPEN, {"get"}),
        ("get", "all", CLOSED, {"get"}),
        ("allmanage", "all", CLOSED, {"sync", "optimize", "copy", "restore", "setmst"}),
        ("vanish", "allwrite", CLOSED, DANGEROUS),
        ("get", "get", OPEN, {"get"}),
        (
            "allwrite",
            "allwrite",
            CLOSED,
            DANGEROUS | WRITING,
        ),
        ("all", "all", OPEN, LEAVES - DOORS),
        ("slave", "", OPEN, {"repl"}),
        ("allhttp", "all", OPEN, {"allhttp"}),
        ("allorg allmc", "", OPEN, {"allorg", "allmc"}),
        ("functions", "all", OPEN, {"functions"}),
    ],
)
def test_one_goes_before_many_and_many_before_all(
    masked: str, unmasked: str, default: Mask, expected: set[str]
) -> None:
    assert forbidden(masked, unmasked, default) == expected


_names = st.lists(st.sampled_from(sorted(LEAVES | {"all", "allread", "allwrite", "allmanage", "slave"})), max_size=6)


@given(_names, _names)
def test_the_order_of_names_and_how_they_are_spread_over_options_does_not_matter(
    masked: list[str], unmasked: list[str]
) -> None:
    once = Mask.of(masked, unmasked, CLOSED)
    assert Mask.of(masked[::-1], unmasked[::-1], CLOSED) == once
    joined = [" , ".join(masked)] if masked else []
    assert Mask.of(joined, [",".join(unmasked)] if unmasked else [], CLOSED) == once
    for name in masked:
        if name in LEAVES:
            assert name in once.forbidden
    for name in set(unmasked) - set(masked):
        if name in LEAVES:
            assert name not in once.forbidden


@pytest.mark.parametrize(
    ("masked", "unmasked", "culprit"),
    [
        (["vanihs"], [], r"--mask vanihs: no such command or group; did you mean vanish\?"),
        (["get,PUT"], [], "--mask PUT: no such command or group"),
        ([], ["copy", "x"], "--unmask x: no such command or group; it may be adddouble, addint, all, allhttp, "),
        (["0x1"], [], "--mask 0x1: no such"),
        # A variable that was to have names in it, and has none, must not leave all open.
        ([""], [], "--mask : no such"),
        (["get,"], [], "--mask : no such"),
        (["cas"], [], "--mask cas: no such"),
    ],
)
def test_a_name_that_is_unknown_is_refused(masked: list[str], unmasked: list[str], culprit: str) -> None:
    with pytest.raises(ConfigurationError, match=culprit):
        Mask.of(masked, unmasked, OPEN)


# -- what requests do


class Case(NamedTuple):
    """A request as it is sent, and what is known about it."""

    sent: bytes
    door: Door
    #: What masking closes it.
    effects: set[str]
    #: What is answered if it is refused, or the beginning of that.
    refusal: bytes
    #: Whether it changes `RECORDS` when it is carried out.
    changes: bool


RECORDS = {b"k": b"1234", b"other": b"x"}


def binary(request: Request, named: str, *, changes: bool = False) -> Case:
    refusal = {MISC: b"\x03\0\0\0\0", PUTNR: b""}.get(request.command, b"\x03")
    return Case(encode_request(request), Door.BINARY, {request.command.name, *named.split()}, refusal, changes)


def misc(name: bytes, *arguments: bytes, named: str, changes: bool = False) -> Case:
    return binary(MISC(name, list(arguments), 0), named, changes=changes)


def memcached(line: bytes, named: str, *, changes: bool = False) -> Case:
    refusal = b"" if b"noreply" in line else b"CLIENT_ERROR forbidden\r\n"
    return Case(line, Door.MEMCACHED, set(named.split()), refusal, changes)


def http(
    method: bytes, named: str, *, key: bytes = b"k", head: bytes = b"", body: bytes = b"", changes: bool = False
) -> Case:
    sent = b"%b /%b HTTP/1.1\r\nHost: localhost\r\n%bContent-Length: %d\r\n\r\n%b" % (
        method,
        key,
        head,
        len(body),
        body,
    )
    return Case(sent, Door.HTTP, set(named.split()), b"HTTP/1.1 403 Forbidden\r\n", changes)


CASES = [
    binary(PUT(b"k", b"v"), "", changes=True),
    binary(PUTKEEP(b"new", b"v"), "", changes=True),
    binary(PUTCAT(b"k", b"v"), "", changes=True),
    binary(PUTSHL(b"k", b"v", 2), "", changes=True),
    binary(PUTNR(b"k", b"v"), "put", changes=True),
    binary(OUT(b"k"), "", changes=True),
    binary(GET(b"k"), ""),
    binary(MGET([b"k"]), "get"),
    binary(VSIZ(b"k"), ""),
    binary(ITERINIT(), ""),
    binary(ITERNEXT(), ""),
    binary(FWMKEYS(b"", -1), ""),
    binary(ADDINT(b"k", 1), "", changes=True),
    binary(ADDDOUBLE(b"new", 1, 0), "", changes=True),
    binary(SYNC(), ""),
    binary(OPTIMIZE(b""), ""),
    binary(VANISH(), "", changes=True),
    binary(COPY(b"x"), ""),
    binary(RESTORE(b"x", 0, 0), ""),
    binary(SETMST(b"x", 1, 0, 0), ""),
    binary(RNUM(), ""),
    binary(SIZE(), ""),
    binary(STAT(), "rnum size"),
    misc(b"put", b"k", b"v", named="put", changes=True),
    misc(b"put\0anything", b"k", b"v", named="put", changes=True),
    misc(b"putkeep", b"new", b"v", named="putkeep", changes=True),
    misc(b"putcat", b"k", b"v", named="putcat", changes=True),
    misc(b"putlist", b"k", b"v", named="put", changes=True),
    misc(b"out", b"k", named="out", changes=True),
    misc(b"outlist", b"k", named="out", changes=True),
    misc(b"get", b"k", named="get"),
    misc(b"getlist", b"k", named="get mget"),
    misc(b"getpart", b"k", named="get"),
    misc(b"iterinit", named="iterinit"),
    misc(b"iternext", named="iternext get"),
    misc(b"regex", b"k", named="fwmkeys get"),
    misc(b"range", named="fwmkeys get"),
    misc(b"sync", named="sync"),
    misc(b"optimize", named="optimize"),
    misc(b"vanish", named="vanish", changes=True),
    misc(b"error", named=""),
    misc(b"nonsense", named=""),
    binary(EXT(b"statestore", b"", b"", 0), ""),
    binary(EXT(CAS, b"k", swap.pack(b"1234", None), 0), "put out", changes=True),
    binary(EXT(b"scan", b"", b"", 0), "fwmkeys"),
    binary(EXT(b"wait", b"k", b"0", 0), "vsiz"),
    binary(EXT(b"statistics", b"", b"", 0), "stat rnum size"),
    binary(EXT(b"replace", b"k", b"v", 0), "put", changes=True),
    binary(EXT(b"append", b"k", b"v", 0), "putcat", changes=True),
    binary(EXT(b"prepend", b"k", b"v", 0), "put", changes=True),
    binary(EXT(b"incr", b"k", b"1", 0), "put addint", changes=True),
    binary(EXT(b"decr", b"k", b"1", 0), "put addint", changes=True),
    binary(EXT(b"mine", b"k", b"v", 0), "functions", changes=True),
    binary(EXT(b"nobodys", b"k", b"v", 0), "functions"),
    memcached(b"set k 0 0 1\r\nv\r\n", "put", changes=True),
    memcached(b"set k 0 0 1 noreply\r\nv\r\n", "put", changes=True),
    memcached(b"add new 0 0 1\r\nv\r\n", "putkeep", changes=True),
    memcached(b"replace k 0 0 1\r\nv\r\n", "put", changes=True),
    memcached(b"append k 0 0 1\r\nv\r\n", "putcat", changes=True),
    memcached(b"prepend k 0 0 1\r\nv\r\n", "put", changes=True),
    memcached(b"get k\r\n", "get"),
    memcached(b"gets k other\r\n", "get mget"),
    memcached(b"delete k\r\n", "out", changes=True),
    memcached(b"delete k noreply\r\n", "out", changes=True),
    memcached(b"incr k 1\r\n", "put addint", changes=True),
    memcached(b"decr k 1 noreply\r\n", "put addint", changes=True),
    memcached(b"flush_all\r\n", "vanish", changes=True),
    memcached(b"flush_all noreply\r\n", "vanish", changes=True),
    memcached(b"stats\r\n", "stat rnum size"),
    memcached(b"version\r\n", ""),
    http(b"GET", "get"),
    http(b"HEAD", "get"),
    http(b"PUT", "put", body=b"v", changes=True),
    http(b"PUT", "putkeep", key=b"new", head=b"X-TT-PDMODE: 1\r\n", body=b"v", changes=True),
    http(b"PUT", "putcat", head=b"X-TT-PDMODE: 2\r\n", body=b"v", changes=True),
    http(b"DELETE", "out", changes=True),
    http(b"OPTIONS", "stat rnum size"),
    http(b"POST", "misc put", head=b"X-TT-MNAME: put\r\n", body=b"a=k&b=v", changes=True),
    http(b"POST", "misc put", head=b"X-TT-MNAME: putlist\r\n", body=b"a=k&b=v", changes=True),
    http(b"POST", "misc vanish", head=b"X-TT-MNAME: vanish\r\n", changes=True),
    http(b"POST", "misc fwmkeys get", head=b"X-TT-MNAME: regex\r\n", body=b"a=k"),
    http(b"POST", "ext put out", head=b"X-TT-XNAME: cas\r\n", body=swap.pack(b"1234", b"5"), changes=True),
    http(b"POST", "ext functions", head=b"X-TT-XNAME: mine\r\n", body=b"v", changes=True),
    http(b"POST", ""),
]


def mine(records: Verbs, key: bytes, value: bytes) -> bytes:
    """A function of the operator's."""
    records.put(key, value)
    return b"done"


class Masked(ServerThread):
    """A server whose mask for TCP can be changed, for connections to come."""

    def __init__(self) -> None:
        self.store = MemoryStore()
        super().__init__(self.store, options=ServerOptions(functions={b"mine": mine}))

    def forbid(self, *names: str) -> None:
        """Forbid these, and have `RECORDS` and nothing else."""
        self._server.options = ServerOptions(tcp_mask=Mask(frozenset(names)), http=HTTPPolicy())
        self.store.clear()
        self.store.put_many(RECORDS)

    @property
    def records(self) -> dict[bytes, bytes]:
        return self.store.get_many(self.store.keys())

    def answer(self, *sent: bytes) -> bytes:
        """All that a new connection answers to what is sent at once."""
        with self.connect() as client:
            client.send(b"".join(sent))
            with contextlib.suppress(OSError):
                client.socket.shutdown(socket.SHUT_WR)
            return client.receive_to_end()


@pytest.fixture(scope="module")
def server() -> Iterator[Masked]:
    server = Masked()
    with server:
        yield server


@pytest.mark.parametrize("case", CASES, ids=lambda case: repr(case.sent[:40]))
def test_each_effect_closes_a_request_and_nothing_else_does(server: Masked, case: Case) -> None:
    server.forbid(*(LEAVES - case.effects - {case.door.value}))
    open_answer = server.answer(case.sent)
    assert not case.refusal or not open_answer.startswith(case.refusal)
    assert (server.records != RECORDS) == case.changes
    for name in (*case.effects, case.door.value):
        server.forbid(name)
        assert server.answer(case.sent).startswith(case.refusal)
        assert server.records == RECORDS


_requests = st.lists(st.sampled_from(CASES), min_size=1, max_size=5)


@given(st.sets(st.sampled_from(sorted(LEAVES))), _requests)
def test_a_request_is_carried_out_if_and_only_if_none_of_its_effects_is_masked(
    server: Masked, masked: set[str], cases: list[Case]
) -> None:
    server.forbid(*masked)
    allowed = [case for case in cases if masked.isdisjoint(case.effects | {case.door.value})]
    for case in cases:
        answer = server.answer(case.sent)
        assert case in allowed or (answer.startswith(case.refusal) and bool(answer) == bool(case.refusal))
    found = server.records
    # What is left is what the permitted ones alone make of it.
    server.forbid()
    for case in allowed:
        server.answer(case.sent)
    assert found == server.records


def test_every_command_has_a_case() -> None:
    binary_cases = {case.sent[1] for case in CASES if case.door is Door.BINARY}
    assert commands.COMMANDS.keys() - binary_cases == {commands.REPL.id}  # which is never served


def test_what_a_misc_function_does_is_known_for_each_that_an_engine_may_carry_out() -> None:
    known = set(mask._MISC)
    carried_out = {*verbs._FUNCTIONS, *apart._FUNCTIONS, *cabinet._FUNCTIONS}
    assert known == carried_out
    assert set(verbs.BUILT_IN) == set(mask._EXT)
    assert set().union(*mask._MISC.values(), *mask._EXT.values()) <= LEAVES - DOORS - {"functions"}


@pytest.mark.parametrize("name", [b"tranbegin", b"trancommit", b"path", b"copy", b"restore", b"addint", b"", b"PUT"])
def test_no_other_is_carried_out_by_tokyo_cabinet(tmp_path: Path, name: bytes) -> None:
    for database in ("*", "+", "a.tch", "a.tcb", "a.tcf", "a.tct"):
        with cabinet.CabinetStore(database if database in "*+" else tmp_path / database, reserve=1 << 20) as store:
            assert store.native["misc"](name, [b"1", b"2"], 0) is None


@pytest.mark.parametrize("function", [b"search", b"metasearch"])
@pytest.mark.parametrize("argument", [b"out", b"OUT", b"Remove", b"out\0", b"remove\0x"])
def test_a_search_that_removes_what_it_finds_is_masked_as_removing(function: bytes, argument: bytes) -> None:
    # All that there is, perhaps.
    assert {"out", "vanish"} <= effects(MISC(function, [b"addcond\0a\0STREQ\0b", argument], 0), Door.BINARY)
    assert "out" not in effects(MISC(function, [b"addcond\0a\0STREQ\0out"], 0), Door.BINARY)


def test_a_search_that_removes_leaves_the_records_where_out_is_masked(tmp_path: Path) -> None:
    store = cabinet.CabinetStore(tmp_path / "a.tct", reserve=1 << 20)
    options = ServerOptions(tcp_mask=Mask(frozenset({"out"})))
    with ServerThread(store, options=options) as server, server.connect() as client:
        replies = client.ask(
            MISC(b"put", [b"k", b"column", b"value"], 0),
            MISC(b"search", [b"addcond\0column\0STREQ\0value", b"OUT"], 0),
            MISC(b"search", [b"addcond\0column\0STREQ\0value"], 0),
        )
    assert replies == [Reply(SUCCESS, []), Reply(FORBIDDEN, []), Reply(SUCCESS, [b"k"])]


# -- what the original's masks leave open (and what they do not)


DETOURS_OF_PUT = [
    misc(b"put", b"k", b"v", named=""),
    misc(b"putlist", b"k", b"v", named=""),
    memcached(b"set k 0 0 1\r\nv\r\n", ""),
    memcached(b"replace k 0 0 1\r\nv\r\n", ""),
    http(b"PUT", "", body=b"v"),
    http(b"POST", "", head=b"X-TT-MNAME: put\r\n", body=b"a=k&b=v"),
    http(b"POST", "", head=b"X-TT-XNAME: replace\r\n", body=b"v"),
    binary(EXT(CAS, b"k", swap.pack(b"1234", b"v"), 0), ""),
    binary(PUTNR(b"k", b"v"), ""),
]


@pytest.mark.parametrize("case", DETOURS_OF_PUT, ids=lambda case: repr(case.sent[:40]))
@pytest.mark.parametrize("masked", ["put", "allwrite", "all"])
def test_where_put_is_masked_no_detour_stores(server: Masked, case: Case, masked: str) -> None:
    server.forbid(*forbidden(masked))
    assert server.answer(case.sent).startswith(case.refusal)
    assert server.records == RECORDS


def test_what_alone_is_unmasked_is_open_by_every_door(server: Masked) -> None:
    server.forbid(*forbidden("all", "get"))
    assert server.answer(encode_request(GET(b"k"))) == b"\0\0\0\0\x041234"
    assert server.answer(b"get k\r\n") == b"VALUE k 0 4\r\n1234\r\nEND\r\n"
    assert server.answer(b"GET /k HTTP/1.1\r\nHost: localhost\r\n\r\n").endswith(b"\r\n\r\n1234")
    assert server.answer(encode_request(MISC(b"get", [b"k"], 0))) == b"\x03\0\0\0\0"


def test_nothing_that_is_masked_looks_like_success(server: Masked) -> None:
    server.forbid(*forbidden("all"))
    requests = [MGET([b"k"]), FWMKEYS(b"", -1), RNUM(), SIZE(), STAT(), GET(b"k"), OUT(b"k"), MISC(b"get", [b"k"], 0)]
    with server.connect() as client:
        replies = client.ask(*requests)
    assert {reply.status for reply in replies} == {FORBIDDEN}
    assert server.answer(*map(encode_request, requests)) == 7 * b"\x03" + b"\x03\0\0\0\0"
    assert server.answer(b"stats\r\n", b"get k\r\n") == 2 * b"CLIENT_ERROR forbidden\r\n"


def test_behind_a_refusal_the_rest_of_a_packet_is_carried_out(server: Masked) -> None:
    server.forbid("put", "vanish")
    with server.connect() as client:
        replies = client.ask(PUT(b"k", b"v"), PUTCAT(b"k", b"5"), VANISH(), GET(b"k"))
    assert replies == [Reply(FORBIDDEN), OK, Reply(FORBIDDEN), Reply(SUCCESS, b"12345")]
    assert server.answer(
        b"set k 0 0 4\r\nget \r\n", b"delete other\r\n", encode_request(RNUM())
    ) == b"CLIENT_ERROR forbidden\r\nDELETED\r\n" + b"\0" + (1).to_bytes(8, "big")


@pytest.mark.parametrize(
    "silent", [encode_request(PUTNR(b"k", b"v")), b"set k 0 0 1 noreply\r\nv\r\n", b"replace k 0 0 1 noreply\r\nv\r\n"]
)
def test_where_no_reply_could_tell_of_a_refusal_the_connection_ends(server: Masked, silent: bytes) -> None:
    server.forbid("put")
    with server.connect() as client:
        client.send(encode_request(VSIZ(b"k")) + silent + encode_request(OUT(b"k")))
        assert client.receive_to_end() == b"\0\0\0\0\x04"
    assert server.records == RECORDS


# -- what is closed though nobody says so


def test_by_tcp_what_a_session_store_never_needs_is_closed_and_cas_is_open() -> None:
    store = MemoryStore()
    with ServerThread(store, options=ServerOptions(functions={b"mine": mine})) as server, server.connect() as client:
        refused = [
            VANISH(),
            MISC(b"vanish", [], 0),
            COPY(b"x"),
            RESTORE(b"x", 0, 0),
            SETMST(b"h", 1, 0, 0),
            OPTIMIZE(b""),
            MISC(b"optimize", [], 0),
            EXT(b"mine", b"k", b"v", 0),
        ]
        assert {status for status, _ in client.ask(*refused)} == {FORBIDDEN}
        client.send(b"flush_all\r\n")
        assert client.receive(24) == b"CLIENT_ERROR forbidden\r\n"
        assert client.ask(EXT(CAS, b"k", swap.pack(None, b"v"), 0), OUT(b"k"), PUT(b"k", b"v"), SYNC()) == [
            Reply(SUCCESS, swap.SWAPPED),
            OK,
            OK,
            OK,
        ]
    assert store.closed


def test_by_a_unix_socket_all_is_open(tmp_path: Path) -> None:
    options = ServerOptions(functions={b"mine": mine})
    with (
        ServerThread(MemoryStore(), address=f"unix:{tmp_path}/s", options=options) as server,
        server.connect() as client,
    ):
        assert client.ask(EXT(b"mine", b"k", b"v", 0), OPTIMIZE(b""), VANISH(), RNUM()) == [
            Reply(SUCCESS, b"done"),
            OK,
            OK,
            Reply(SUCCESS, 0),
        ]
        # These are carried out, which here means that they fail.
        assert client.ask(COPY(b"x"), RESTORE(b"x", 0, 0), SETMST(b"h", 1, 0, 0)) == 3 * [Reply(FAILURE)]


def test_a_mask_that_forbids_nothing_forbids_nothing() -> None:
    assert not OPEN.forbids(binary_call(VANISH()))
    assert CLOSED.forbids(binary_call(VANISH()))
    assert CLOSED.forbidden == DANGEROUS
