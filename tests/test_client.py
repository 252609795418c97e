"""The client of Tyrant servers, against a peer that fails at exactly the byte it is told."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import pytest

from beaker_statestore.exceptions import (
    ConfigurationError,
    OutcomeUnknown,
    ProtocolError,
    StateStoreError,
    StoreUnavailable,
)
from beaker_statestore.testing import fork
from beaker_statestore.tyrant import client as client_module
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.client import Client, Connection, NotSentError, Pool, RefusedError, check_status, connect
from beaker_statestore.tyrant.commands import (
    ADDINT,
    CAS,
    COMMANDS,
    EXT,
    FAILURE,
    FORBIDDEN,
    FWMKEYS,
    GET,
    MGET,
    MISC,
    PROBE,
    PUT,
    PUTNR,
    REPL,
    RESTORE,
    RNUM,
    STORE_FAILED,
    SUCCESS,
    SYNC,
    VANISH,
    Command,
    Kind,
    Reply,
    Request,
    is_repeatable,
)
from beaker_statestore.tyrant.wire import encode_reply
from tests.peer import Answer, Peer, Records

OK = b"\0"


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests that provoke hundreds of retries need not wait for each."""
    monkeypatch.setattr(client_module, "RETRY_PAUSE", (0.0, 0.0))


@pytest.fixture(params=["tcp", "unix"])
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    with Peer(unix=request.param == "unix") as peer:
        yield peer


def client_of(peer: Peer, *, size: int = 16, timeout: float = 5.0, max_idle: float = 60.0) -> Client:
    return Client(Pool(peer.address, size=size, max_idle=max_idle), timeout=timeout)


def some_arguments(command: Command) -> tuple[object, ...]:
    kinds = {field.name: field.kind for field in command.header}
    examples: dict[Kind, object] = {Kind.LENGTH: b"k", Kind.COUNT: [b"k"], Kind.NUMBER: 1}
    return tuple(examples[kinds[name]] for name in command.parameters)


#: Every command that is answered, and the ext and misc functions for which sending again is another matter.
REQUESTS = [command(*some_arguments(command)) for command in COMMANDS.values() if command not in (REPL, PUTNR)] + [
    EXT(PROBE, b"", b"", 0),
    EXT(CAS, b"k", b"v", 0),
    MISC(b"get", [b"k"], 0),
    MISC(b"putlist", [b"k", b"v"], 0),
]


def name_of(request: Request) -> str:
    command, arguments = request
    return f"{command.name}-{arguments[0].decode()}" if command in (EXT, MISC) else command.name


# -- connecting


def test_a_refused_connection_says_what_to_start() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = Address(*unused.getsockname())
        with Client(Pool(address)) as client, pytest.raises(StoreUnavailable) as caught:
            client.call(GET(b"k"))
    assert str(caught.value) == (
        f"no Tyrant server answers at {address} (connection refused): "
        f"start one with `statestore serve --listen {address}`"
    )
    assert isinstance(caught.value.__cause__, ConnectionRefusedError)
    assert not isinstance(caught.value, OutcomeUnknown)


def test_a_socket_that_may_not_be_opened_says_so() -> None:
    """Root may open any, so there is no trying it."""
    said = client_module._why_not_connected(Address(path="/s"), PermissionError(13, "Permission denied"))
    assert said == "may not connect to the Tyrant server at unix:/s (Permission denied): check the socket's permissions"


def test_the_default_address_needs_no_option_to_be_served() -> None:
    said = client_module._why_not_connected(Address(), ConnectionRefusedError())
    assert said.endswith("start one with `statestore serve`")


def test_a_path_too_long_for_a_unix_socket_says_so() -> None:
    with (
        Client(Pool(Address(path="/x" * 100))) as client,
        pytest.raises(StoreUnavailable, match="path too long"),
    ):
        client.call(GET(b"k"))


def test_a_unix_socket_that_is_not_there_says_so(tmp_path: os.PathLike[str]) -> None:
    with (
        Client(Pool(Address(path=f"{tmp_path}/none"))) as client,
        pytest.raises(StoreUnavailable, match=r"unix:.*/none \(there is no such socket\)"),
    ):
        client.call(GET(b"k"))


def test_a_host_name_that_cannot_be_is_no_crash() -> None:
    with Client(Pool(Address("x" * 64))) as client, pytest.raises(StoreUnavailable, match="cannot find the host"):
        client.call(GET(b"k"))


def unused_even_port() -> int:
    while True:
        with socket.socket() as odd, socket.socket() as even, contextlib.suppress(OSError):
            odd.bind(("127.0.0.1", 0))
            port = int(odd.getsockname()[1]) ^ 1
            even.bind(("127.0.0.1", port))
            return port


def test_a_connection_to_oneself_is_no_server() -> None:
    """TCP connects a port to itself if nobody listens there and the kernel chooses just that one for our own end.

    Linux chooses even ones first, each time another, so that some tries are needed for one hit.
    """
    address = Address(port=unused_even_port())
    for _ in range(10_000):
        with contextlib.suppress(StoreUnavailable), connect(address, time.monotonic() + 5) as sock:
            pytest.fail(f"{sock} is connected")


@pytest.mark.parametrize("unix", [False, True])
def test_connecting_ends_at_its_deadline_when_nobody_accepts(unix: bool, tmp_path: os.PathLike[str]) -> None:
    with socket.socket(socket.AF_UNIX if unix else socket.AF_INET) as listener, contextlib.ExitStack() as waiting:
        listener.bind(f"{tmp_path}/socket" if unix else ("127.0.0.1", 0))
        listener.listen(0)
        address = Address.of(listener.getsockname())
        started = 0.0

        def fill_the_queue() -> None:
            nonlocal started
            while True:
                started = time.monotonic()
                waiting.enter_context(connect(address, started + 0.3))

        with pytest.raises(StoreUnavailable, match="no connection in time"):
            fill_the_queue()
        assert 0.3 <= time.monotonic() - started < 0.5


def test_connecting_to_a_full_unix_socket_goes_on_when_there_is_room(tmp_path: os.PathLike[str]) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.ExitStack() as accepted:
        listener.bind(f"{tmp_path}/socket")
        listener.listen(0)
        address = Address.of(listener.getsockname())
        with ThreadPoolExecutor(8) as threads:
            deadline = time.monotonic() + 5
            results = [threads.submit(connect, address, deadline) for _ in range(8)]
            for _ in range(8):
                accepted.enter_context(listener.accept()[0])
            for result in results:
                result.result().close()


def test_small_requests_are_not_held_back() -> None:
    with Peer() as peer, connect(peer.address, time.monotonic() + 5) as sock:
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- deadlines


@pytest.mark.parametrize("answer", [b"", OK, OK + b"\0\0\0\5hel"])
def test_a_stalled_answer_ends_at_the_deadline(peer: Peer, answer: bytes) -> None:
    peer.script = lambda *_: Answer(answer, "stall")
    with client_of(peer, timeout=0.3) as client:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match="did not answer get in time") as caught:
            client.call(GET(b"k"))
        assert 0.3 <= time.monotonic() - started < 0.4
    assert not isinstance(caught.value, OutcomeUnknown)  # a get changes nothing
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_a_stalled_write_has_an_unknown_outcome(peer: Peer) -> None:
    peer.script = lambda *_: Answer(b"", "stall")
    with (
        client_of(peer, timeout=0.2) as client,
        pytest.raises(OutcomeUnknown, match="did not answer put in time, so whether it was carried out is unknown"),
    ):
        client.call(PUT(b"k", b"v"))


def test_the_deadline_is_for_the_whole_answer_and_not_for_each_byte_of_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def dribble() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                for byte in OK + b"\0\0\1\0" + 256 * b"x":
                    connection.send(bytes((byte,)))
                    time.sleep(0.05)

        thread = threading.Thread(target=dribble)
        thread.start()
        with Client(Pool(Address.of(listener.getsockname())), timeout=0.4) as client:
            started = time.monotonic()
            with pytest.raises(StoreUnavailable, match="in time"):
                client.call(GET(b"k"))
            assert 0.4 <= time.monotonic() - started < 0.5
        thread.join()


def test_a_peer_that_does_not_read_ends_at_the_deadline() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        Client(Pool(Address.of(listener.getsockname())), timeout=0.3) as client,
    ):
        request = PUT(b"k", bytes(32 * 1024 * 1024))
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown, match="in time"):
            client.call(request)
        assert 0.3 <= time.monotonic() - started < 0.5


def test_a_late_answer_never_reaches_a_later_call(peer: Peer) -> None:
    late = threading.Event()
    records = Records()
    records.values = {b"slow": b"of slow", b"quick": b"of quick"}

    def script(request: Request, connection: int, number: int) -> bytes:
        if request == GET(b"slow"):
            assert late.wait(10)
        return records(request, connection, number)

    peer.script = script
    with client_of(peer, timeout=0.2) as client:
        with pytest.raises(StoreUnavailable):
            client.call(GET(b"slow"))
        late.set()
        for _ in range(20):
            assert client.call(GET(b"quick")).value == b"of quick"
    assert peer.connections == 2


def test_an_interrupted_call_leaves_nothing_behind(peer: Peer) -> None:
    class Interrupt(BaseException):
        pass

    def interrupt(*_: object) -> None:
        raise Interrupt

    go_on = threading.Event()
    records = Records()
    records.values = {b"slow": b"of slow", b"quick": b"of quick"}

    def script(request: Request, connection: int, number: int) -> bytes:
        if request == GET(b"slow"):
            assert go_on.wait(10)
        return records(request, connection, number)

    peer.script = script
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with client_of(peer, size=1) as client:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(Interrupt):
                client.call(GET(b"slow"))
            threading.Timer(0.2, go_on.set).start()  # so that the late answer comes just when the next is awaited
            assert client.call(GET(b"quick")).value == b"of quick"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_nothing_is_sent_when_it_is_already_too_late(peer: Peer) -> None:
    with contextlib.closing(Connection.open(peer.address, time.monotonic() + 5)) as connection:
        with pytest.raises(NotSentError, match="in time; nothing had been sent"):
            connection.call([PUT(b"k", b"v")], time.monotonic() - 0.001)
        assert connection.call([GET(b"k")], time.monotonic() + 5) == [(FAILURE, None)]
    assert peer.names() == ["get"]


# -- answers that break off, and what is sent again

#: Commands with a whole answer each, one of every form that an answer can have.
ANSWERS = [
    (PUT(b"k", b"v"), Reply(SUCCESS)),
    (GET(b"k"), Reply(SUCCESS, b"value")),
    (GET(b"k"), Reply(FAILURE)),
    (MGET([b"a", b"b"]), Reply(SUCCESS, [(b"a", b"1"), (b"b", b"")])),
    (FWMKEYS(b"k", 9), Reply(SUCCESS, [b"k1", b"k2"])),
    (ADDINT(b"k", 3), Reply(SUCCESS, 8)),
    (RNUM(), Reply(SUCCESS, 7)),
    (MISC(b"getlist", [b"k"], 1), Reply(SUCCESS, [b"k", b"v"])),
    (MISC(b"putlist", [b"k", b"v"], 0), Reply(FAILURE)),
    (COMMANDS[0x61](b"k", 1, 0), Reply(SUCCESS, 1.5)),
]


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize(("request_", "reply"), ANSWERS)
def test_an_answer_cut_at_any_byte_is_sent_for_again_or_its_outcome_is_unknown(
    request_: Request, reply: Reply, end: Literal["close", "reset"]
) -> None:
    whole = encode_reply(request_.command, reply)
    expected = [] if reply.status != SUCCESS and request_.command is MISC else reply.value
    with Peer() as peer, client_of(peer, size=1) as client:
        for cut in range(len(whole)):
            peer.requests.clear()

            def script(_request: Request, _connection: int, number: int, cut: int = cut) -> Answer:
                return Answer(whole[:cut], end) if number == 1 else Answer(whole)

            peer.script = script
            if is_repeatable(request_):
                assert client.call(request_) == (reply.status, expected)
                assert peer.requests == [request_, request_]
            else:
                with pytest.raises(OutcomeUnknown, match="unknown"):
                    client.call(request_)
                assert peer.requests == [request_]
            # Whatever came of it, the next call is right.
            assert client.call(request_) == (reply.status, expected)


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("end", ["close", "reset"])
@pytest.mark.parametrize("request_", REQUESTS, ids=name_of)
def test_only_what_does_no_harm_is_sent_again_and_only_once(request_: Request, end: Literal["close", "reset"]) -> None:
    with (
        Peer(lambda *_: Answer(b"", end)) as peer,
        client_of(peer) as client,
        pytest.raises(StoreUnavailable, match=f"broke before {request_.command.name}.* was answered") as caught,
    ):
        client.call(request_)
    assert peer.requests == [request_] * (2 if is_repeatable(request_) else 1)
    assert isinstance(caught.value, OutcomeUnknown) is not is_repeatable(request_)


def test_what_is_never_answered_arrives_though_the_client_is_closed_at_once(peer: Peer) -> None:
    with client_of(peer) as client:
        assert client.call(PUTNR(b"k", b"v")) == (SUCCESS, None)
    peer.wait_for_requests(1)
    assert peer.requests == [PUTNR(b"k", b"v")]


def test_a_pipeline_is_sent_again_only_if_all_of_it_may_be() -> None:
    with Peer(lambda *_: Answer(b"", "close")) as peer, client_of(peer) as client:
        with pytest.raises(OutcomeUnknown, match="get, put"):
            client.pipeline([GET(b"k"), PUT(b"k", b"v"), GET(b"k")])
        assert peer.connections == 1
        with pytest.raises(StoreUnavailable):
            client.pipeline([GET(b"k"), RNUM()])
        assert peer.connections == 3


def test_what_had_not_left_is_sent_again_whatever_it_is(peer: Peer) -> None:
    sock = connect(peer.address, time.monotonic() + 5)
    sock.shutdown(socket.SHUT_WR)  # looks alive, and nothing can be sent on it
    pool = Pool(peer.address, opened=[Connection(sock, peer.address)])
    with Client(pool) as client:
        assert client.call(ADDINT(b"k", 1)).value == 0
    assert peer.names() == ["addint"]


def test_a_retry_does_not_go_beyond_the_deadline() -> None:
    def script(_request: Request, connection: int, _number: int) -> Answer:
        if connection == 1:
            time.sleep(0.25)
            return Answer(b"", "close")
        return Answer(b"", "stall")

    with Peer(script) as peer, client_of(peer, timeout=0.5) as client:
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            client.call(GET(b"k"))
        assert 0.5 <= time.monotonic() - started < 0.6
        assert peer.connections == 2


# -- peers that are out of step


@pytest.mark.parametrize("answer", [OK + b"\0\0\0\1vx", OK + b"\0\0\0\1v" + OK], ids=["a byte", "an answer"])
def test_bytes_that_nobody_asked_for_end_the_connection(peer: Peer, answer: bytes) -> None:
    peer.script = lambda request, connection, _: answer if connection <= 2 else OK + b"\0\0\0\1v"
    with client_of(peer) as client:
        with pytest.raises(StoreUnavailable, match=r"does not speak the Tyrant protocol.*nobody asked for"):
            client.call(GET(b"k"))
        assert client.call(GET(b"k")).value == b"v"
    assert peer.connections == 3


def test_bytes_sent_to_an_idle_connection_end_it(peer: Peer) -> None:
    peer.script = lambda *_: OK + b"\0\0\0\1v"
    with client_of(peer) as client:
        assert client.call(GET(b"k")).value == b"v"
        peer.push(OK + b"\0\0\0\1x")
        assert client.call(GET(b"k")).value == b"v"
    assert peer.connections == 2


def test_what_the_server_forbids_is_said_and_is_no_absence(peer: Peer) -> None:
    peer.script = lambda *_: bytes([FORBIDDEN])
    with client_of(peer) as client, pytest.raises(ConfigurationError, match=r"does not let its clients do get.*--mask"):
        client.call(GET(b"k"))


@pytest.mark.parametrize(
    ("request_", "remedy"),
    [
        (VANISH(), "start it with --unmask vanish"),
        (MISC(b"vanish", [], 0), "start it with --unmask vanish"),
        (EXT(b"take", b"k", b"", 0), "start it with --unmask functions"),
        (EXT(CAS, b"k", b"", 0), "see the options --mask and --unmask"),
        (MISC(b"search", [], 0), "see the options --mask and --unmask"),
        (RESTORE(b"log", 0, 0), "no update log"),
    ],
)
def test_what_to_unmask_is_named_where_it_is_plain(request_: Request, remedy: str) -> None:
    with pytest.raises(RefusedError, match=remedy) as refused:
        check_status(Address(), request_, FORBIDDEN)
    assert refused.value.status == FORBIDDEN


@pytest.mark.parametrize(("length", "hinted"), [(2**20 + 1, True), (1000, False)])
def test_who_is_closed_upon_a_large_request_hears_of_the_limit(peer: Peer, length: int, hinted: bool) -> None:
    peer.script = lambda *_: Answer(b"", "close")
    with client_of(peer) as client, pytest.raises(StoreUnavailable, match="broke before put was answered") as broken:
        client.call(PUT(b"k", bytes(length)))
    assert ("may be more than the server takes (--max-message" in str(broken.value)) == hinted


@pytest.mark.parametrize("status", [b"\5", b"1", b"\xff"])
def test_a_status_that_there_is_not_is_no_absence(peer: Peer, status: bytes) -> None:
    """A client that took text for replies has been seen to report statuses such as 49."""
    peer.script = lambda *_: status
    with client_of(peer) as client, pytest.raises(StoreUnavailable, match=f"there is no status {ord(status)}"):
        client.call(GET(b"k"))


def test_a_server_of_something_else_is_found_out(peer: Peer) -> None:
    peer.script = lambda *_: b"HTTP/1.1 400 Bad Request\r\n\r\n"
    with client_of(peer) as client:
        with pytest.raises(StoreUnavailable, match=r"does not speak the Tyrant protocol.*check the address"):
            client.call(GET(b"k"))
        with pytest.raises(OutcomeUnknown, match="does not speak the Tyrant protocol"):
            client.call(PUT(b"k", b"v"))
    assert peer.connections == 3


def test_an_answer_longer_than_any_may_be_costs_no_memory(peer: Peer) -> None:
    peer.script = lambda *_: Answer(OK + b"\xff\xff\xff\xff", "stall")
    with client_of(peer) as client, pytest.raises(StoreUnavailable, match="above the limit"):
        client.call(GET(b"k"))


def test_the_failure_of_the_store_behind_a_server_is_no_absence(peer: Peer) -> None:
    peer.script = lambda request, *_: encode_reply(request.command, Reply(STORE_FAILED))
    with client_of(peer) as client:
        for request in (GET(b"k"), PUT(b"k", b"v"), MISC(b"get", [b"k"], 1)):
            with pytest.raises(StoreUnavailable, match=f"failed to carry out {request.command.name}"):
                client.call(request)
    assert peer.connections == 1  # the connection itself is as good as before
    assert peer.names() == ["get", "put", "misc"]


def test_a_request_that_cannot_be_encoded_harms_nothing(peer: Peer) -> None:
    with client_of(peer) as client:
        client.call(SYNC())
        with pytest.raises(ProtocolError):
            client.call(ADDINT(b"k", 2**40))
        with pytest.raises(ProtocolError):
            client.call(MISC(bytes(2000), [], 0))
        client.call(SYNC())
    assert peer.names() == ["sync", "sync"]
    assert peer.connections == 1


# -- pipelines


def test_a_pipeline_is_answered_in_order(peer: Peer) -> None:
    keys = [b"%d" % number for number in range(500)]
    with client_of(peer) as client:
        writes: list[Request] = [(PUTNR if number % 3 else PUT)(key, key) for number, key in enumerate(keys)]
        assert client.pipeline(writes) == [Reply(SUCCESS)] * 500
        assert [value for _, value in client.pipeline([GET(key) for key in keys])] == keys
        assert client.pipeline([GET(b"0"), GET(b"none"), RNUM()]) == [(SUCCESS, b"0"), (FAILURE, None), (SUCCESS, 500)]
        assert client.pipeline([]) == []
    assert peer.connections == 1


def test_a_pipeline_longer_than_all_buffers_does_not_lock_up(peer: Peer) -> None:
    """The peer answers each request before it reads the next, so neither side can send all before it reads."""
    filler = bytes(100_000)
    peer.script = lambda request, *_: OK + len(filler).to_bytes(4, "big") + filler
    with client_of(peer, timeout=20) as client:
        replies = client.pipeline([GET(b"%d" % number + filler) for number in range(200)])
    assert [value == filler for _, value in replies] == [True] * 200


# -- the pool


def test_threads_do_not_get_each_others_answers_and_the_pool_keeps_its_bound(peer: Peer) -> None:
    def work(worker: int) -> int:
        for number in range(60):
            key = b"%d.%d" % (worker, number)
            client.call(PUT(key, b"value of " + key))
            assert client.call(GET(key)).value == b"value of " + key
            assert client.pipeline([GET(key), GET(b"none")]) == [(SUCCESS, b"value of " + key), (FAILURE, None)]
        return worker

    with client_of(peer, size=7, timeout=30) as client, ThreadPoolExecutor(50) as threads:
        assert sorted(threads.map(work, range(50))) == list(range(50))
    assert peer.most_at_once <= 7
    assert peer.connections <= 7


def test_threads_whose_connections_keep_breaking_do_not_get_each_others_answers() -> None:
    records = Records()

    def script(request: Request, connection: int, number: int) -> Answer:
        answer = records(request, connection, number)
        if number % 7 == 0:
            return Answer(answer[: len(answer) // 2], "reset" if number % 2 else "close")
        return Answer(answer)

    outcomes: Counter[str] = Counter()

    def work(worker: int) -> None:
        for number in range(40):
            key = b"%d.%d" % (worker, number)
            try:
                client.call(PUT(key, b"value of " + key))
                value = client.call(GET(key)).value
            except OutcomeUnknown:
                outcomes["unknown"] += 1
            except StoreUnavailable:
                outcomes["unavailable"] += 1
            else:
                assert value == b"value of " + key
                outcomes["done"] += 1

    with Peer(script) as peer:
        with client_of(peer, size=5, timeout=30) as client, ThreadPoolExecutor(20) as threads:
            list(threads.map(work, range(20)))
        peer.wait_until_open(0)
    assert outcomes["done"] > 500
    assert outcomes["unknown"] > 20


def test_the_connection_used_last_is_used_again(peer: Peer) -> None:
    with client_of(peer) as client:
        deadline = time.monotonic() + 5
        held = [client.pool.acquire(deadline) for _ in range(3)]
        for connection in held:
            client.pool.release(connection)
        for _ in range(3):
            connection = client.pool.acquire(deadline)
            assert connection is held[-1]
            client.pool.release(connection)


def test_waiting_for_a_connection_ends_at_the_deadline(peer: Peer) -> None:
    with client_of(peer, size=2, timeout=0.2) as client:
        deadline = time.monotonic() + 5
        held = [client.pool.acquire(deadline), client.pool.acquire(deadline)]
        started = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"all 2 connections .* stayed in use: .* raise pool_size"):
            client.call(GET(b"k"))
        assert 0.2 <= time.monotonic() - started < 0.3
        client.pool.release(held.pop())
        client.call(SYNC())
        client.pool.release(held.pop())


def test_a_connection_given_back_goes_to_who_waits(peer: Peer) -> None:
    with client_of(peer, size=1) as client, ThreadPoolExecutor(1) as threads:
        held = client.pool.acquire(time.monotonic() + 5)
        waiting = threads.submit(client.call, RNUM())
        client.pool.release(held)
        assert waiting.result(5).value == 0
    assert peer.connections == 1


def test_failed_attempts_to_connect_use_nothing_up() -> None:
    peer = Peer()
    peer.start()
    peer.stop()
    with Client(Pool(peer.address, size=1)) as client:
        for _ in range(5):
            with pytest.raises(StoreUnavailable, match="connection refused"):
                client.call(SYNC())
        with peer:
            client.call(SYNC())


def test_an_idle_connection_that_died_is_replaced_and_nothing_is_sent_twice(peer: Peer) -> None:
    with client_of(peer) as client:
        client.call(ADDINT(b"k", 1))
        peer.break_connections()
        peer.wait_until_open(0)
        client.call(ADDINT(b"k", 1))
    assert peer.names() == ["addint", "addint"]
    assert peer.connections == 2


def test_a_connection_idle_for_too_long_is_replaced(peer: Peer) -> None:
    with client_of(peer, max_idle=0.05) as client:
        client.call(SYNC())
        first = client.pool._idle[0]
        first.idle_since -= 0.06
        client.call(SYNC())
        assert first.closed
    assert peer.connections == 2


def test_a_server_that_comes_back_is_used_at_once(peer: Peer) -> None:
    def work(_: int) -> None:
        assert client.call(PUT(b"k", b"v")).status == SUCCESS

    with client_of(peer, size=8) as client, ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(100)))
        peer.stop()
        started = time.monotonic()
        with pytest.raises(StoreUnavailable):
            client.call(GET(b"k"))
        assert time.monotonic() - started < 0.5
        peer.start()
        # Writes, which are not sent twice: each idle connection must be known to be dead before it is used.
        list(threads.map(work, range(100)))


def test_after_one_break_no_other_idle_connection_is_trusted(peer: Peer) -> None:
    """A connection can look alive and be dead: the rest of those are not tried one after the other."""
    deadline = time.monotonic() + 5
    with client_of(peer) as client:
        held = [client.pool.acquire(deadline) for _ in range(4)]
        for connection in held:
            client.pool.release(connection)
        peer.script = lambda request, connection, _: Answer(b"", "close") if connection <= 4 else Answer(OK)
        assert client.call(SYNC()).status == SUCCESS
        assert [connection.closed for connection in held] == [True] * 4


def test_closing_closes_idle_connections_now_and_lent_ones_when_they_come_back(peer: Peer) -> None:
    client = client_of(peer)
    held = client.pool.acquire(time.monotonic() + 5)
    client.call(SYNC())
    peer.wait_until_open(2)
    client.close()
    peer.wait_until_open(1)
    client.pool.release(held)
    peer.wait_until_open(0)
    client.close()
    with pytest.raises(StateStoreError, match="has been closed") as caught:
        client.call(SYNC())
    assert not isinstance(caught.value, StoreUnavailable)


def test_a_client_that_is_forgotten_closes_its_connections(peer: Peer) -> None:
    client = client_of(peer)
    client.call(SYNC())
    peer.wait_until_open(1)
    del client
    gc.collect()
    peer.wait_until_open(0)


@pytest.mark.parametrize("bad", [{"size": 0}, {"connect_timeout": 0}, {"connect_timeout": float("nan")}])
def test_a_pool_that_cannot_work_is_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError):
        Pool(Address(), **bad)  # type: ignore[arg-type]  # that is what is tested


@pytest.mark.parametrize("timeout", [0, -1, float("inf"), float("nan")])
def test_a_client_without_a_deadline_is_refused(timeout: float) -> None:
    with pytest.raises(ConfigurationError, match="timeout is"):
        Client(Pool(Address()), timeout=timeout)


# -- forks


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # the peer's threads do not matter to the child
def test_a_forked_child_does_not_use_its_parents_connections(peer: Peer) -> None:
    def work(who: bytes) -> None:
        for number in range(200):
            key = b"%s.%d" % (who, number)
            client.call(PUT(key, b"value of " + key))
            assert client.call(GET(key)).value == b"value of " + key

    with client_of(peer) as client:
        client.call(SYNC())
        with ThreadPoolExecutor(1) as threads:
            at_the_same_time = threads.submit(work, b"parent")
            fork(lambda: work(b"child"))
            at_the_same_time.result()
        client.call(SYNC())
        assert peer.connections == 2  # the parent's went on, and was not closed by the child


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_child_forked_while_threads_hold_everything_can_still_call(peer: Peer) -> None:
    stop = threading.Event()

    def work(worker: int) -> None:
        while not stop.is_set():
            assert client.call(GET(b"k")).value == b"v"

    def child_work() -> None:
        client.call(PUT(b"k", b"v"))
        with ThreadPoolExecutor(4) as threads:
            assert [reply.value for reply in threads.map(client.call, [GET(b"k")] * 50)] == [b"v"] * 50

    with client_of(peer, size=2) as client:
        client.call(PUT(b"k", b"v"))
        with ThreadPoolExecutor(6) as threads:
            workers = [threads.submit(work, number) for number in range(6)]
            try:
                for _ in range(10):
                    fork(child_work)
            finally:
                stop.set()
            for worker in workers:
                worker.result()


# -- what a server can do


def capable(request: Request, connection: int, number: int) -> bytes:
    if request.command is EXT and request.arguments[0] == PROBE:
        return encode_reply(EXT, Reply(SUCCESS, b"statestore cas"))
    return encode_reply(request.command, Reply(SUCCESS, b"1"))


def test_each_new_connection_is_asked_once_what_the_server_can_do(peer: Peer) -> None:
    cas = EXT(CAS, b"k", b"packed", 0)
    peer.script = capable
    with client_of(peer) as client:
        client.call(GET(b"k"))
        for _ in range(3):
            assert client.call(cas, requires=CAS).value == b"1"
        assert peer.requests == [GET(b"k"), EXT(PROBE, b"", b"", 0), cas, cas, cas]
        peer.requests.clear()
        peer.break_connections()
        peer.wait_until_open(0)
        client.call(cas, requires=CAS)
        assert peer.requests == [EXT(PROBE, b"", b"", 0), cas]


@pytest.mark.parametrize("reply", [Reply(FAILURE), Reply(SUCCESS, b""), Reply(SUCCESS, b"path:statestore::")])
def test_a_server_that_cannot_do_it_is_refused_before_it_is_asked_to(peer: Peer, reply: Reply) -> None:
    peer.script = lambda request, *_: encode_reply(request.command, reply)
    said = "an original ttserver without our function 'cas': run `statestore serve`"
    with client_of(peer) as client, pytest.raises(ConfigurationError, match=said):
        client.call(EXT(CAS, b"k", b"packed", 0), requires=CAS)
    assert peer.requests == [EXT(PROBE, b"", b"", 0)]


def test_an_outage_while_asking_passes_and_is_not_taken_for_an_original_server(peer: Peer) -> None:
    cas = EXT(CAS, b"k", b"packed", 0)
    peer.script = lambda request, *_: encode_reply(request.command, Reply(STORE_FAILED))
    with client_of(peer) as client:
        with pytest.raises(StoreUnavailable, match=r"failed to carry out ext statestore: see") as raised:
            client.call(cas, requires=CAS)
        assert not isinstance(raised.value, OutcomeUnknown)
        assert cas not in peer.requests
        connections = peer.connections
        peer.script = capable
        assert client.call(cas, requires=CAS).value == b"1"
        assert peer.connections == connections


def test_a_break_while_asking_leaves_the_request_itself_unsent(peer: Peer) -> None:
    peer.script = lambda request, connection, number: Answer(b"", "close") if number == 1 else capable(request, 0, 0)
    with client_of(peer) as client:
        assert client.call(EXT(CAS, b"k", b"packed", 0), requires=CAS).value == b"1"
    assert [request.arguments[0] for request in peer.requests] == [PROBE, PROBE, CAS]
