"""pytyrant's interface, whole, against a real server; and what its users meet when that is not there."""

from __future__ import annotations

import inspect
import math
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from beaker_statestore.exceptions import OutcomeUnknown, StateStoreError, StoreUnavailable
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant import pytyrant
from beaker_statestore.tyrant.commands import FAILURE, FORBIDDEN, STORE_FAILED, SUCCESS, TOO_MUCH, Reply, Request
from beaker_statestore.tyrant.pytyrant import (
    PyTableTyrant,
    PyTyrant,
    Tyrant,
    TyrantError,
    TyrantOutcomeUnknown,
    TyrantUnavailable,
)
from beaker_statestore.tyrant.wire import encode_reply
from tests.peer import Answer, Peer


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    with ServerProcess("memory:", arguments=["--unmask", "all"]) as server:
        yield server


@pytest.fixture
def t(server: ServerProcess) -> Iterator[PyTyrant]:
    host, _, port = server.url.rpartition(":")
    with PyTyrant.open(host, int(port)) as t:
        t.clear()
        yield t


@pytest.fixture
def raw(t: PyTyrant) -> Tyrant:
    return t.t


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def peers(peer: Peer) -> Iterator[PyTyrant]:
    with PyTyrant.open(peer.address.host, peer.address.port) as t:
        yield t


# -- the names


def test_every_public_name_of_pytyrant_is_there() -> None:
    """As of pytyrant 1.1.17, without its helpers for sockets."""
    names = {
        "": """C DEFAULT_PORT MAGIC PyTableTyrant PyTyrant QUERY_OPERATIONS Query RDBMONOULOG RDBQONUMASC RDBQONUMDESC
            RDBQOSTRASC RDBQOSTRDESC RDBXOLCKGLB RDBXOLCKREC Tyrant TyrantError dict_to_list list_to_dict""",
        "Tyrant": """adddouble addint close copy ext fwmkeys get iterinit iternext mget misc open out put putcat putkeep
            putnr putshl restore rnum setmst size stat sync vanish vsiz""",
        "PyTyrant": """__contains__ __delitem__ __getitem__ __iter__ __len__ __setitem__ call_func clear close concat
            get get_size get_stats has_key items iteritems iterkeys itervalues keys multi_del multi_get multi_set open
            pop popitem prefix_keys setdefault sync update values""",
        "PyTableTyrant": "search concat multi_get multi_set setdefault",
        "Query": "__getitem__ __iter__ __len__ filter items order_by_num order_by_str",
    }
    for place, expected in names.items():
        home = getattr(pytyrant, place) if place else pytyrant
        assert [name for name in expected.split() if not hasattr(home, name)] == []


@pytest.mark.parametrize(
    ("function", "names"),
    [
        (Tyrant.open, "host port"),
        (Tyrant.__init__, "self sock"),
        (Tyrant.putshl, "self key value width"),
        (Tyrant.mget, "self klst"),
        (Tyrant.fwmkeys, "self prefix maxkeys"),
        (Tyrant.addint, "self key num"),
        (Tyrant.ext, "self func opts key value"),
        (Tyrant.restore, "self path msec"),
        (Tyrant.setmst, "self host port"),
        (Tyrant.misc, "self func opts args"),
        (PyTyrant.__init__, "self t"),
        (PyTyrant.multi_get, "self keys no_update_log"),
        (PyTyrant.multi_set, "self items no_update_log"),
        (PyTyrant.multi_del, "self keys no_update_log"),
        (PyTyrant.call_func, "self func key value record_locking global_locking"),
        (PyTyrant.prefix_keys, "self prefix maxkeys"),
        (PyTyrant.concat, "self key value width"),
        (PyTableTyrant.concat, "self key value width no_update_log"),
        (PyTableTyrant.setdefault, "self key value no_update_log"),
    ],
)
def test_parameters_have_pytyrants_names_and_order(function: Callable[..., object], names: str) -> None:
    assert list(inspect.signature(function).parameters)[: len(names.split())] == names.split()


def test_constants_are_those_of_the_protocol() -> None:
    assert (pytyrant.DEFAULT_PORT, pytyrant.MAGIC) == (1978, 0xC8)
    assert (pytyrant.RDBMONOULOG, pytyrant.RDBXOLCKREC, pytyrant.RDBXOLCKGLB) == (1, 1, 2)
    assert (pytyrant.RDBQOSTRASC, pytyrant.RDBQOSTRDESC, pytyrant.RDBQONUMASC, pytyrant.RDBQONUMDESC) == (0, 1, 2, 3)
    assert (pytyrant.C.put, pytyrant.C.vanish, pytyrant.C.misc) == (0x10, 0x72, 0x90)
    assert pytyrant.QUERY_OPERATIONS["streq"] == "0"
    assert pytyrant.QUERY_OPERATIONS["numoreq"] == "14"


# -- Tyrant: the commands


def refused(function: Callable[[], object]) -> int:
    """The status with which the server refuses."""
    with pytest.raises(TyrantError) as caught:
        function()
    status: int = caught.value.args[0]
    return status


def test_put_get_out_and_vsiz(raw: Tyrant) -> None:
    raw.put(b"k", b"\0value\xff")
    assert raw.get(b"k") == b"\0value\xff"
    assert raw.vsiz(b"k") == 7
    raw.out(b"k")
    assert [refused(partial(f, b"k")) for f in (raw.get, raw.out, raw.vsiz)] == [1, 1, 1]


def test_text_is_encoded_as_utf_8_and_comes_back_as_bytes(raw: Tyrant) -> None:
    raw.put("schlüssel", "wért")
    assert raw.get("schlüssel".encode()) == "wért".encode()
    assert raw.fwmkeys("schl", 10) == ["schlüssel".encode()]
    assert raw.misc("get", 0, ["schlüssel"]) == ["wért".encode()]


@pytest.mark.parametrize("wrong", [5, None, 1.5, ["k"]])
def test_what_is_neither_bytes_nor_text_is_refused_before_it_is_sent(raw: Tyrant, wrong: object) -> None:
    for arguments in ((wrong, b"v"), (b"k", wrong)):
        with pytest.raises(TypeError):
            raw.put(*arguments)
    assert raw.rnum() == 0


def test_putkeep_putcat_putshl_and_putnr(raw: Tyrant) -> None:
    raw.putkeep(b"k", b"abc")
    assert refused(lambda: raw.putkeep(b"k", b"xyz")) == 1
    raw.putcat(b"k", b"def")
    assert raw.get(b"k") == b"abcdef"
    raw.putshl(b"k", b"gh", 4)
    assert raw.get(b"k") == b"efgh"
    raw.putnr(b"k", b"last")
    assert raw.get(b"k") == b"last"


def test_mget_and_fwmkeys(raw: Tyrant) -> None:
    for number in range(5):
        raw.put(b"k%d" % number, b"%d" % number)
    assert raw.mget([b"k3", "k0", b"none"]) == [(b"k3", b"3"), (b"k0", b"0")]
    assert raw.mget([]) == []
    assert sorted(raw.fwmkeys(b"k", -1)) == [b"k0", b"k1", b"k2", b"k3", b"k4"]
    assert len(raw.fwmkeys(b"k", 3)) == 3
    assert raw.fwmkeys(b"none", 10) == []


def test_iterinit_and_iternext(raw: Tyrant) -> None:
    for key in (b"a", b"b"):
        raw.put(key, b"")
    raw.iterinit()
    assert sorted([raw.iternext(), raw.iternext()]) == [b"a", b"b"]
    assert refused(raw.iternext) == 1


def test_addint_and_adddouble(raw: Tyrant) -> None:
    assert [raw.addint(b"i", 5), raw.addint(b"i", -12), raw.addint(b"i", 0)] == [5, -7, -7]
    assert raw.get(b"i") == struct.pack("=i", -7)
    assert raw.adddouble(b"d", 2.25) == 2.25
    assert raw.adddouble(b"d", -4) == -1.75
    assert raw.adddouble(b"d", math.inf) == math.inf
    raw.put(b"text", b"no number")
    assert refused(lambda: raw.addint(b"text", 1)) == 1
    assert refused(lambda: raw.adddouble(b"text", 1)) == 1


def test_ext_and_misc(raw: Tyrant) -> None:
    assert b"cas" in raw.ext("statestore", 0, b"", b"").split()
    assert refused(lambda: raw.ext("nosuch", pytyrant.RDBXOLCKREC, b"k", b"v")) == 1
    assert raw.misc("putlist", pytyrant.RDBMONOULOG, ["a", "1", "b", "2"]) == []
    assert raw.misc("getlist", 0, (key for key in ["b", "a"])) == [b"b", b"2", b"a", b"1"]
    assert refused(lambda: raw.misc("get", 0, ["none"])) == 1
    assert raw.misc("getlist", 0, []) == []


def test_rnum_size_stat_sync_and_vanish(raw: Tyrant) -> None:
    raw.put(b"k", b"v" * 100)
    assert raw.rnum() == 1
    assert raw.size() >= 100
    assert b"rnum\t1\n" in raw.stat()
    raw.sync()
    raw.vanish()
    assert raw.rnum() == 0


def test_what_the_server_forbids_is_an_error(raw: Tyrant) -> None:
    forbidden: list[Callable[[], None]] = [
        lambda: raw.copy("/backup"),
        lambda: raw.restore("/log", 0),
        lambda: raw.setmst("example.org", 1978),
    ]
    assert [refused(function) for function in forbidden] == [1, 1, 1]
    assert raw.rnum() == 0


def test_what_is_sent_where_pytyrant_sent_something_else(peer: Peer, peers: PyTyrant) -> None:
    peers.t.restore("/log", 7)
    peers.t.setmst("master", 1979)
    assert [(request.command.name, request.arguments) for request in peer.requests] == [
        ("restore", (b"/log", 7, 0)),
        ("setmst", (b"master", 1979, 0, 0)),
    ]


def test_what_is_masked_or_too_long_is_an_error_with_the_remedy_and_no_absence() -> None:
    with ServerProcess("memory:", arguments=["--mask", "get,vsiz", "--max-reply", "1"]) as server:
        host, _, port = server.url.rpartition(":")
        with PyTyrant.open(host, int(port)) as t:
            with pytest.raises(TyrantError, match="start it with --unmask vanish") as caught:
                t.clear()
            assert caught.value.args[0] == FORBIDDEN
            reads: list[Callable[[], object]] = [lambda: t["k"], lambda: t.get("k"), lambda: "k" in t]
            for read in reads:
                with pytest.raises(TyrantError, match=r"start it with --unmask (get|vsiz)"):
                    read()
            t.multi_set([(f"{number:0600000d}", "v") for number in range(2)])
            with pytest.raises(TyrantError, match="--max-reply") as caught:
                t.prefix_keys("")
            assert caught.value.args[0] == TOO_MUCH


def test_an_error_says_what_the_status_means(raw: Tyrant) -> None:
    with pytest.raises(TyrantError, match=r"^get: there is no such record \(status 1\)$") as caught:
        raw.get(b"none")
    assert isinstance(caught.value, StateStoreError)


# -- PyTyrant: the mapping


def test_it_is_a_mapping(t: PyTyrant) -> None:
    t["a"] = "1"
    t[b"b"] = b"2"
    assert t["a"] == b"1"
    assert "a" in t
    assert t.has_key(b"b")
    assert "none" not in t
    assert len(t) == 2
    assert sorted(t) == sorted(t.keys()) == sorted(t.iterkeys()) == [b"a", b"b"]
    assert sorted(t.values()) == sorted(t.itervalues()) == [b"1", b"2"]
    assert sorted(t.items()) == sorted(t.iteritems()) == [(b"a", b"1"), (b"b", b"2")]
    assert dict(t) == {b"a": b"1", b"b": b"2"}
    assert t.get("a") == b"1"
    assert t.get("none") is None
    assert t.get("none", b"other") == b"other"
    del t["a"]
    assert t.keys() == [b"b"]
    assert isinstance(t.keys(), list)
    assert t
    t.clear()
    assert len(t) == 0
    assert not t


@pytest.mark.parametrize(
    "missing",
    [lambda t: t["none"], lambda t: t.__delitem__("none"), lambda t: t.get_size("none"), lambda t: t.pop("none")],
)
def test_what_is_not_there_is_a_key_error(t: PyTyrant, missing: Callable[[PyTyrant], object]) -> None:
    with pytest.raises(KeyError, match="none"):
        missing(t)


def test_pop_popitem_and_setdefault(t: PyTyrant) -> None:
    assert t.setdefault("a", b"1") == b"1"
    assert t.setdefault("a", b"2") == b"1"
    assert t.pop("a") == b"1"
    assert t.pop("a", b"gone") == b"gone"
    t["b"] = b"3"
    assert t.popitem() == (b"b", b"3")
    with pytest.raises(KeyError):
        t.popitem()


@pytest.mark.parametrize("other", [{"a": "1", b"b": b"2"}, [("a", "1"), (b"b", b"2")], iter([("a", "1"), ("b", "2")])])
def test_update_takes_what_dictionaries_take(t: PyTyrant, other: object) -> None:
    t.update(other, c="3")
    assert dict(t) == {b"a": b"1", b"b": b"2", b"c": b"3"}
    t.update()
    t.update(None)
    t.update({})
    t.update(c="4")
    assert t["c"] == b"4"


def test_many_at_once(t: PyTyrant) -> None:
    t.multi_set([("a", "1"), (b"b", b"2"), ("c", "3")])
    assert t.multi_get(["c", b"a"]) == [b"3", b"1"]
    t.multi_del(key for key in ["a", "none"])
    assert t.multi_get(["a", "b", "c"], no_update_log=True) == [None, b"2", b"3"]
    assert t.multi_get(["b", "none"]) == [b"2", None]
    assert t.multi_get([]) == []


def test_concat_prefix_keys_and_get_size(t: PyTyrant) -> None:
    t.concat("key", "foo")
    t.concat("key", "bar")
    assert t["key"] == b"foobar"
    t.concat("key", "!", width=4)
    assert t["key"] == b"bar!"
    assert t.get_size("key") == 4
    t.update({"ka": "", "kb": "", "l": ""})
    assert sorted(t.prefix_keys("k")) == [b"ka", b"kb", b"key"]
    assert len(t.prefix_keys("k", 2)) == 2
    assert t.prefix_keys("k", maxkeys=0) == []


def test_call_func_get_stats_and_sync(t: PyTyrant, peer: Peer, peers: PyTyrant) -> None:
    assert t.call_func("statestore", "", "").startswith(b"statestore")
    assert t.get_stats()["rnum"] == "0"
    assert float(t.get_stats()["time"]) == pytest.approx(time.time(), abs=60)
    t.sync()
    peers.call_func("f", "k", "v", record_locking=True, global_locking=True)
    assert peer.requests[-1].arguments == (b"f", b"k", b"v", 3)


def test_it_is_shown_and_compared_without_asking_the_server(t: PyTyrant) -> None:
    calls = t.get_stats()["cnt_iterinit"]
    assert repr(t).startswith("<PyTyrant over <Tyrant 127.0.0.1:")
    assert t == t
    assert t != {}
    assert {t: 1}[t] == 1
    assert t.get_stats()["cnt_iterinit"] == calls


def test_programs_written_for_pytyrant_run(server: ServerProcess) -> None:
    """How it was used: a session in a store, made where there is none, and an error where there is no record."""

    def create(session: str) -> bool:
        try:
            db.t.putkeep(session, "made")
        except pytyrant.TyrantError as error:
            if error.args[0] == 1:
                return False
            raise
        return True

    host, port = server.url.split(":")
    db = pytyrant.PyTyrant.open(host, int(port))
    try:
        db["__test_key__"] = "foo"
        db.concat("__test_key__", "bar")
        assert db["__test_key__"] == b"foobar"
        del db["__test_key__"]
        assert [create("session"), create("session")] == [True, False]
    finally:
        db.close()


# -- tables, which only an original server has


def test_a_table_is_refused_by_a_server_without_tables(server: ServerProcess) -> None:
    host, _, port = server.url.rpartition(":")
    with PyTableTyrant.open(host, int(port)) as table:
        assert refused(lambda: list(table.search.filter(name__streq="zed"))) == 1


def test_rows_travel_as_pytyrant_sends_them(peer: Peer) -> None:
    row = {b"name": b"Zed", b"age": b"30"}
    results: dict[bytes, list[bytes]] = {
        b"get": [b"name", b"Zed", b"age", b"30"],
        b"getlist": [b"zed", b"name\0Zed\0age\0" + b"30"],
    }

    def script(request: Request, _connection: int, _number: int) -> bytes:
        return encode_reply(request.command, Reply(SUCCESS, results.get(request.arguments[0], [])))

    peer.script = script
    with PyTableTyrant.open(peer.address.host, peer.address.port) as table:
        table["zed"] = {"name": "Zed", "age": "30"}
        assert table["zed"] == row
        assert table.setdefault("zed", row) == row
        assert table.multi_get(["zed", "none"]) == [row, None]
        table.multi_set([("zed", row)])
        table.update({"zed": row})
        table.concat("zed", {"age": "31"})
        with pytest.raises(ValueError, match="width"):
            table.concat("zed", {"age": "31"}, 5)
    columns = [b"zed", b"name", b"Zed", b"age", b"30"]
    packed = [b"zed", b"name\0Zed\0age\0" + b"30"]
    assert [(request.arguments[0], request.arguments[1]) for request in peer.requests] == [
        (b"put", columns),
        (b"get", [b"zed"]),
        (b"putkeep", columns),
        (b"getlist", [b"zed", b"none"]),
        (b"putlist", packed),
        (b"putlist", packed),
        (b"putcat", [b"zed", b"age", b"31"]),
    ]


def test_searches_travel_as_pytyrant_sends_them(peer: Peer) -> None:
    peer.script = lambda request, *_: encode_reply(request.command, Reply(SUCCESS, [b"k1", b"k2", b"k3"]))
    with PyTableTyrant.open(peer.address.host, peer.address.port) as table:
        everybody = table.search
        some = everybody.filter(name__strbw="Z").filter(age__numbt=["20", "40"])
        assert list(some) == [b"k1", b"k2", b"k3"]
        assert len(some) == 3
        assert some[1] == b"k2"
        assert some[1:] == [b"k2", b"k3"]
        assert some[7] is None
        assert repr(some) == repr([b"k1", b"k2", b"k3"])
        assert len(peer.requests) == 1  # what has been found is kept
        ordered = everybody.order_by_str("name").order_by_num("-age")
        assert ordered[0] == b"k1"
        assert ordered[2:10:2] == [b"k1", b"k3"]
        assert ordered[5:] == [b"k1", b"k2", b"k3"]
        assert everybody.conditions == []
        for bad in ({"name": "Zed"}, {"name__like": "Zed"}):
            with pytest.raises(ValueError, match="column__operation"):
                everybody.filter(**bad)
        with pytest.raises(ValueError, match="negative"):
            ordered[-1]
    orders = [b"setorder\0name\0" + b"0", b"setorder\0age\0" + b"3"]
    assert [request.arguments[1] for request in peer.requests] == [
        [b"addcond\0name\0" + b"2\0Z", b"addcond\0age\0" + b"13\0" + b"20,40"],
        [*orders, b"setlimit\0" + b"1\0" + b"0"],
        [*orders, b"setlimit\0" + b"8\0" + b"2"],
        [*orders, b"setlimit\0" + b"-1\0" + b"5"],
    ]


# -- when the server is not there


def test_an_outage_is_an_oserror_and_ours_and_no_tyrant_error(peer: Peer, peers: PyTyrant) -> None:
    """Programs take TyrantError for "no such record", so an outage must not be one."""
    peer.stop()
    try:
        for call in (
            lambda: peers["k"],
            lambda: "k" in peers,
            lambda: peers.get("k"),
            lambda: peers.setdefault("k", "v"),
        ):
            with pytest.raises(TyrantUnavailable) as caught:
                call()
            assert isinstance(caught.value, (OSError, socket.error))
            assert isinstance(caught.value, StoreUnavailable)
            assert not isinstance(caught.value, (TyrantError, KeyError))
        with pytest.raises(TyrantUnavailable, match="connection refused"):
            Tyrant.open(peer.address.host, peer.address.port)
    finally:
        peer.start()
    peers["k"] = "v"
    assert peers["k"] == b"v"  # the same object goes on


def test_a_write_without_an_answer_says_so(peer: Peer, peers: PyTyrant) -> None:
    peer.script = lambda *_: Answer(b"", "close")
    with pytest.raises(TyrantOutcomeUnknown, match="unknown") as caught:
        peers["k"] = "v"
    assert isinstance(caught.value, (OSError, OutcomeUnknown, TyrantUnavailable))
    assert peer.names() == ["put"]


def test_the_failure_of_the_servers_store_is_an_outage(peer: Peer, peers: PyTyrant) -> None:
    peer.script = lambda request, *_: encode_reply(request.command, Reply(STORE_FAILED))
    with pytest.raises(TyrantUnavailable):
        peers.get("k", "default")


def test_iterating_ends_at_the_end_and_not_at_an_outage(peer: Peer, peers: PyTyrant) -> None:
    def script(request: Request, _connection: int, number: int) -> Answer:
        if request.command.name == "iternext" and number == 4:
            return Answer(b"", "close")
        return Answer(encode_reply(request.command, Reply(SUCCESS, b"k")))

    peer.script = script
    keys = iter(peers)
    assert [next(keys), next(keys)] == [b"k", b"k"]
    with pytest.raises(TyrantUnavailable):
        next(keys)
    peer.script = lambda request, *_: encode_reply(
        request.command, Reply(SUCCESS if request.command.name == "iterinit" else FAILURE)
    )
    assert peers.keys() == []


def test_a_call_ends_at_its_deadline(peer: Peer) -> None:
    peer.script = lambda *_: Answer(b"", "stall")
    with PyTyrant.open(peer.address.host, peer.address.port, timeout=0.2) as t:
        started = time.monotonic()
        with pytest.raises(TyrantUnavailable, match="in time"):
            t.get("k")
        assert 0.2 <= time.monotonic() - started < 0.3


def test_a_socket_of_ones_own_can_be_used_with_its_timeout(peer: Peer) -> None:
    peer.script = lambda *_: Answer(b"", "stall")
    sock = socket.create_connection((peer.address.host, peer.address.port), timeout=0.2)
    t = PyTyrant(Tyrant(sock))
    started = time.monotonic()
    with t, pytest.raises(TyrantUnavailable, match="in time"):
        t.get("k")
    assert 0.2 <= time.monotonic() - started < 0.3
    assert peer.connections == 1


def test_a_unix_socket_is_a_host_without_a_port() -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/socket"
        with ServerProcess("memory:", unix=path), PyTyrant.open(path, 0) as t:
            t["k"] = "v"
            assert dict(t) == {b"k": b"v"}


def test_threads_may_share_one_object_and_its_one_connection(peer: Peer, peers: PyTyrant) -> None:
    start = threading.Barrier(10)

    def work(worker: int) -> None:
        start.wait(10)
        for number in range(50):
            key = f"{worker}.{number}"
            peers[key] = "value of " + key
            assert peers[key] == b"value of " + key.encode()

    with ThreadPoolExecutor(10) as threads:
        list(threads.map(work, range(10)))
    assert peer.connections == 1
