"""What the store in a Tyrant server adds to the promises of every store: its URL, its batches, its failures.

That it keeps those promises is tested by the conformance suite, over a real server.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from beaker_statestore.exceptions import (
    ConfigurationError,
    OutcomeUnknown,
    ProtocolError,
    StateStoreError,
    StoreUnavailable,
)
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.tyrant import BATCH, TyrantStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant import paging
from beaker_statestore.tyrant.commands import (
    CAS,
    EXT,
    FAILURE,
    MISC,
    NO_UPDATE_LOG,
    PROBE,
    STORE_FAILED,
    SUCCESS,
    Reply,
    Request,
)
from beaker_statestore.tyrant.wire import encode_reply
from tests.peer import Answer, Peer


@pytest.fixture(scope="module", params=["tcp", "unix"])
def server(request: pytest.FixtureRequest) -> Iterator[ServerProcess]:
    with tempfile.TemporaryDirectory() as directory:
        unix = f"{directory}/socket" if request.param == "unix" else None
        with ServerProcess("memory:", unix=unix) as server:
            yield server


@pytest.fixture
def store(server: ServerProcess) -> Iterator[TyrantStore]:
    with TyrantStore.from_url(server.url) as store:
        store.delete_many(list(store.keys()))
        yield store


@pytest.fixture
def peer() -> Iterator[Peer]:
    with Peer() as peer:
        yield peer


@pytest.fixture
def peers_store(peer: Peer) -> Iterator[TyrantStore]:
    with TyrantStore.from_url(str(peer.address), timeout=5.0) as store:
        yield store


def answering(reply: Reply) -> Callable[[Request, int, int], bytes]:
    """The script of a server that can do everything, and says this to each request."""

    def script(request: Request, _connection: int, _number: int) -> bytes:
        if request == EXT(PROBE, b"", b"", 0):
            return encode_reply(EXT, Reply(SUCCESS, b"statestore cas scan"))
        return encode_reply(request.command, reply)

    return script


def sent(peer: Peer) -> list[Request]:
    """What has arrived but for the probes."""
    return [request for request in peer.requests if request != EXT(PROBE, b"", b"", 0)]


#: Every verb that can fail, called somehow.
VERBS: dict[str, Callable[[Store], object]] = {
    "get": lambda store: store.get(b"k"),
    "get_many": lambda store: store.get_many([b"k"]),
    "put": lambda store: store.put(b"k", b"v"),
    "put_many": lambda store: store.put_many({b"k": b"v"}),
    "add": lambda store: store.add(b"k", b"v"),
    "delete": lambda store: store.delete(b"k"),
    "delete_many": lambda store: store.delete_many([b"k"]),
    "compare_and_swap": lambda store: store.compare_and_swap(b"k", b"old", b"new"),
    "scan": lambda store: store.scan(),
    "count": lambda store: store.count(),
    "size": lambda store: store.size(),
    "sync": lambda store: store.sync(),
    "ping": lambda store: store.ping(),
    "modify": lambda store: store.modify(b"k", lambda _: b"new", known=b"old"),
    "command": lambda store: store.command("getlist", [b"k"]),
}
CHANGES = {"put", "put_many", "add", "delete", "delete_many", "compare_and_swap"}


# -- the URL


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost", "localhost:1978"),
        ("127.0.0.1:9999", "127.0.0.1:9999"),
        ("tyrant://127.0.0.1:9999", "127.0.0.1:9999"),
        ("tyrant://db.example/", "db.example:1978"),
        ("[::1]:1979", "[::1]:1979"),
        ("tyrant://[::1]", "[::1]:1978"),
        ("unix:/run/statestore.socket", "unix:/run/statestore.socket"),
        ("unix:/run/statestore.socket?timeout=1.5&pool_size=2&connect_timeout=0.5", "unix:/run/statestore.socket"),
    ],
)
def test_a_url_names_a_server(url: str, shown: str) -> None:
    with TyrantStore.from_url(url) as store:
        assert repr(store) == f"<TyrantStore {shown}>"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("tyrant://", "write host:port"),
        ("tyrant://host:0", "write host:port"),
        ("tyrant://host:65536", r"check its host and port|Port out of range|write host:port"),
        ("host:port", "write host:port"),
        ("::1", r"write host:port, \[::1\]:port"),
        ("unix:", "unix:/path/to/socket"),
        ("host/path", "write host:port"),
        ("host?tiemout=3", "unknown option 'tiemout'.*connect_timeout.* pool_size.* timeout"),
        ("host?timeout=soon", "timeout is 'soon'.*give a number"),
        ("host?timeout=0", "timeout is 0"),
        ("host?timeout=nan", "timeout is nan"),
        ("host?connect_timeout=-1", "connect_timeout is -1"),
        ("host?pool_size=0", "pool_size is 0"),
        ("host?pool_size=2.5", "pool_size is '2.5'"),
    ],
)
def test_a_url_that_is_wrong_is_refused_with_what_to_write(url: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        TyrantStore.from_url(url)


@pytest.mark.parametrize("url", ["tyrant://me:SECRET@host:1978", "me:SECRET@host", "tyrant://me:SECRET@host?oops=1"])
def test_a_password_in_a_url_is_never_shown(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        TyrantStore.from_url(url)
    error: BaseException | None = caught.value
    while error is not None:
        assert "SECRET" not in str(error)
        error = error.__cause__


def test_the_options_of_the_url_count(peer: Peer) -> None:
    peer.script = lambda *_: Answer(b"", "stall")
    url = f"{peer.address}?timeout=0.2&pool_size=1"
    with TyrantStore.from_url(url, timeout=60.0, pool_size=9) as store, ThreadPoolExecutor(4) as threads:
        started = time.monotonic()
        results = [threads.submit(store.get, b"k") for _ in range(4)]
        assert all(isinstance(result.exception(), StoreUnavailable) for result in results)
        assert 0.2 <= time.monotonic() - started < 0.4
    assert peer.most_at_once == 1


def test_a_store_connects_only_when_it_is_used() -> None:
    with TyrantStore.from_url("127.0.0.1:1"), TyrantStore.from_url("unix:/nowhere/socket"):
        pass


# -- verbs and commands


@pytest.mark.parametrize("verb", VERBS)
def test_a_failure_of_the_servers_store_is_never_taken_for_absence(
    peer: Peer, peers_store: TyrantStore, verb: str
) -> None:
    peer.script = answering(Reply(STORE_FAILED))
    with pytest.raises(StoreUnavailable, match=r"the store behind the Tyrant server at .* failed"):
        VERBS[verb](peers_store)


@pytest.mark.parametrize("verb", sorted(VERBS.keys() - {"get", "add", "delete", "command", "modify"}))
def test_a_refusal_is_never_taken_for_a_result(peer: Peer, peers_store: TyrantStore, verb: str) -> None:
    peer.script = answering(Reply(FAILURE))
    with pytest.raises(StoreUnavailable, match=r"refused .*: see its log, and whether the command is masked"):
        VERBS[verb](peers_store)


@pytest.mark.parametrize("verb", sorted(CHANGES))
def test_a_change_without_an_answer_is_sent_once_and_its_outcome_is_unknown(
    peer: Peer, peers_store: TyrantStore, verb: str
) -> None:
    probed = answering(Reply(SUCCESS))
    peer.script = lambda request, *_: (
        probed(request, 0, 0) if request == EXT(PROBE, b"", b"", 0) else Answer(b"", "close")
    )
    with pytest.raises(OutcomeUnknown, match="ext cas" if verb == "compare_and_swap" else None):
        VERBS[verb](peers_store)
    assert len(sent(peer)) == 1


def test_modify_reads_back_after_a_swap_without_an_answer(server: ServerProcess, store: TyrantStore) -> None:
    """Through a peer that passes everything on to a real server, and drops the answer to the first swap."""
    store.put(b"k", b"old")
    dropped = threading.Event()

    def script(request: Request, _connection: int, _number: int) -> Answer:
        reply = store._client.call(request)
        if request.arguments[:1] == (CAS,) and not dropped.is_set():
            dropped.set()
            return Answer(b"", "close")
        return Answer(encode_reply(request.command, reply))

    with Peer(script) as peer, TyrantStore.from_url(str(peer.address)) as far:
        assert far.modify(b"k", lambda value: (value or b"") + b"+") == b"old+"
    assert dropped.is_set()
    assert store.get(b"k") == b"old+"
    assert sum(request.arguments[:1] == (CAS,) for request in peer.requests) == 1


@pytest.mark.parametrize("answer", [b"", b"2", b"ok", b"path:cas:k:"])
def test_a_swap_answered_with_nonsense_has_an_unknown_outcome(
    peer: Peer, peers_store: TyrantStore, answer: bytes
) -> None:
    peer.script = answering(Reply(SUCCESS, answer))
    with pytest.raises(OutcomeUnknown, match="answered ext cas with"):
        peers_store.compare_and_swap(b"k", b"old", b"new")


@pytest.mark.parametrize("verb", ["compare_and_swap", "modify"])
def test_an_original_server_is_refused_with_what_to_start(peer: Peer, peers_store: TyrantStore, verb: str) -> None:
    peer.script = lambda request, *_: encode_reply(request.command, Reply(FAILURE))
    with pytest.raises(ConfigurationError, match=r"an original ttserver .*: run `statestore serve` in its place"):
        VERBS[verb](peers_store)


def test_many_records_are_sent_for_in_batches(peer: Peer, peers_store: TyrantStore) -> None:
    peer.script = answering(Reply(SUCCESS, []))
    items = {b"%d" % number: b"v" for number in range(2 * BATCH + 1)}
    peers_store.get_many(items)
    peers_store.put_many(items)
    peers_store.delete_many(items)
    peers_store.get_many([])
    peers_store.put_many({})
    requests = sent(peer)
    assert [len(request.arguments[0]) for request in requests[:3]] == [BATCH, BATCH, 1]
    puts = [argument for request in requests[3:6] for argument in request.arguments[1]]
    assert puts == [part for item in items.items() for part in item]
    outs = [argument for request in requests[6:] for argument in request.arguments[1]]
    assert outs == list(items)


def test_many_large_records_fit_into_the_servers_messages(store: TyrantStore) -> None:
    items = {b"%d" % number: bytes((number,)) * 2**20 for number in range(70)}  # above its limit of 64 MiB together
    store.put_many(items)
    assert store.get_many(items) == items
    assert store.count() == 70


def test_as_many_large_records_are_read_as_fit_into_a_message(store: TyrantStore) -> None:
    items = {b"%03d" % number: bytes((number,)) * 1_400_000 for number in range(60)}  # a sealed megabyte each
    for key, value in items.items():
        store.put(key, value)
    assert list(store.get_many(items).items()) == list(items.items())


def test_a_store_that_fails_behind_its_server_fails_soon_for_many_records(peer: Peer, peers_store: TyrantStore) -> None:
    peer.script = answering(Reply(STORE_FAILED))
    with pytest.raises(StoreUnavailable, match=r"the store behind the Tyrant server at .* failed"):
        peers_store.get_many([b"%d" % number for number in range(2 * BATCH)])
    assert [len(request.arguments[0]) for request in sent(peer)] == [50]


def test_reads_stay_out_of_a_servers_update_log(peer: Peer, peers_store: TyrantStore) -> None:
    peers_store.command("getlist", [b"k"])
    peers_store.command("putlist", [b"k", b"v"])
    assert peer.requests == [MISC(b"getlist", [b"k"], NO_UPDATE_LOG), MISC(b"putlist", [b"k", b"v"], 0)]


def test_a_command_answers_what_the_function_does(store: TyrantStore) -> None:
    assert store.command("putcat", [b"k", b"a"]) == []
    assert store.command("putcat", [b"k", b"b"]) == []
    assert store.command("range", [b"a"]) == [b"k", b"ab"]
    with pytest.raises(StateStoreError, match="did not carry out misc 'nosuch'"):
        store.command("nosuch")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_page_of_nothing_is_refused(store: TyrantStore, limit: int) -> None:
    with pytest.raises(ValueError, match="would never end"):
        store.scan(limit=limit)
    store.ping()


# -- a server that comes and goes


def test_a_server_killed_and_started_again_is_used_at_once() -> None:
    with ServerProcess("memory:") as server, TyrantStore.from_url(server.url) as store:
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(lambda number: store.add(b"%d" % number, b"v"), range(200)))
        assert store.count() == 200
        server.kill()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="connection refused"):
            store.get(b"k")
        assert time.monotonic() - started < 0.5
        server.start()
        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(lambda number: store.add(b"%d" % number, b"v"), range(200)))
        assert store.count() == 200


def test_a_server_that_hangs_holds_nobody_up_for_longer_than_the_deadline() -> None:
    with ServerProcess("memory:") as server, TyrantStore.from_url(f"{server.url}?timeout=0.3&pool_size=4") as store:
        store.put(b"k", b"before")
        server.pause()
        try:
            started = time.monotonic()
            with ThreadPoolExecutor(8) as threads:
                puts = [threads.submit(store.put, b"k", b"%d" % number) for number in range(8)]
                errors = [put.exception() for put in puts]
            assert 0.3 <= time.monotonic() - started < 0.6
        finally:
            server.resume()
        assert all(isinstance(error, StoreUnavailable) for error in errors)
        # Of the one whose connection had been open; the others could not even ask what the server can do.
        assert sum(isinstance(error, OutcomeUnknown) for error in errors) >= 1
        # What had been sent may be carried out late; what is sent now comes after it.
        for number in range(50):
            value = b"after %d" % number
            store.put(b"other", value)
            assert store.get(b"other") == value
        assert store.get(b"k") != b"before"


def test_a_closed_store_says_so(server: ServerProcess) -> None:
    store = TyrantStore.from_url(server.url)
    store.ping()
    store.close()
    assert store.closed
    with pytest.raises(StateStoreError, match="has been closed"):
        store.ping()


# -- pages on the wire


@given(st.none() | st.binary(), st.integers(1, 2**32 - 1))
def test_what_is_asked_of_a_scan_comes_over_as_it_was(cursor: bytes | None, limit: int) -> None:
    assert paging.unpack_request(paging.pack_request(cursor, limit)) == (cursor, limit)


@given(st.lists(st.binary()), st.none() | st.binary())
def test_a_page_comes_over_as_it_was(keys: list[bytes], cursor: bytes | None) -> None:
    assert paging.unpack_page(paging.pack_page(keys, cursor)) == (keys, cursor)


@given(st.binary())
def test_no_bytes_make_a_page_or_a_request_that_packs_otherwise(packed: bytes) -> None:
    for unpack, pack in ((paging.unpack_request, paging.pack_request), (paging.unpack_page, paging.pack_page)):
        try:
            unpacked = unpack(packed)
        except ProtocolError:
            continue
        assert pack(*unpacked) == packed


def test_the_packing_of_pages_is_fixed() -> None:
    assert paging.pack_request(None, 1000) == b"\0\0\0\3\xe8"
    assert paging.pack_request(b"", 1) == b"\1\0\0\0\1"
    assert paging.pack_request(b"ab", 2) == b"\1\0\0\0\2ab"
    assert paging.pack_page([], None) == b"\0\0\0\0\0"
    assert paging.pack_page([b"a", b"", b"bc"], b"bc") == b"\1\0\0\0\2bc\0\0\0\1a\0\0\0\0\0\0\0\2bc"
