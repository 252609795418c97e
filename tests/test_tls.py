"""TLS between clients and servers: whom each believes, what is said when one does not, and what a break leaves."""

from __future__ import annotations

import configparser
import contextlib
import os
import re
import select
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
from click.testing import CliRunner

from beaker_statestore.cli import main
from beaker_statestore.exceptions import ConfigurationError, OutcomeUnknown, StoreUnavailable
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.stores.tyrant import TyrantStore
from beaker_statestore.testing import ServerProcess, fork
from beaker_statestore.tyrant import client as client_module
from beaker_statestore.tyrant import tls
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.client import Client, Connection, NotSentError, Pool
from beaker_statestore.tyrant.commands import ADDINT, GET, PUT, PUTCAT, PUTNR, RNUM, SUCCESS, Reply, Request
from beaker_statestore.tyrant.server import ServerOptions
from beaker_statestore.tyrant.tls import RECORD, TLS, Channel
from beaker_statestore.tyrant.transport import TLSTransport
from beaker_statestore.tyrant.wire import encode_reply, encode_request
from tests.certificates import Authority
from tests.faults.servers import eventually
from tests.peer import Answer, Peer, Script
from tests.proxy import Proxy
from tests.serving import LOOPS, ServerThread

#: How long anything may take here before a test fails, in seconds.
PATIENCE = 20.0


@dataclass(frozen=True)
class Files:
    """Paths of certificates."""

    ca: str
    server: str
    client: str
    other_ca: str
    other_client: str
    directory: Path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def files(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Files:
    directory = tmp_path_factory.mktemp("other")
    other = Authority(directory, "other")
    return Files(
        authority.file,
        authority.sign("server"),
        authority.sign("client", [], client=True),
        other.file,
        other.sign("stranger", [], client=True),
        directory,
    )


class _Socket(ssl.SSLSocket):
    def shutdown(self, how: int) -> None:
        """As the death of a process does; the class above would go on in the clear."""
        socket.socket.shutdown(self, how)


class TLSPeer(Peer):
    """A `Peer` behind the TLS of somebody else, who sends session tickets."""

    def __init__(self, certificate: str, script: Script | None = None, *, ca: str | None = None) -> None:
        super().__init__(script)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.sslsocket_class = _Socket
        self.context.load_cert_chain(certificate)
        if ca is not None:
            self.context.load_verify_locations(ca)
            self.context.verify_mode = ssl.CERT_REQUIRED
        #: How connections ended: in order, or by which error.
        self.ends: list[str] = []

    def _converse(self, connection: socket.socket, number: int) -> None:
        connection.settimeout(PATIENCE)
        try:
            encrypted = self.context.wrap_socket(connection, server_side=True, suppress_ragged_eofs=False)
            with self._changed:
                self._open[number] = encrypted
            with encrypted:
                super()._converse(encrypted, number)
        except OSError as error:
            self._note(str(error))
        else:
            self._note("in order")

    def __enter__(self) -> TLSPeer:
        super().__enter__()
        return self

    def _note(self, end: str) -> None:
        with self._changed:
            self.ends.append(end)
            self._changed.notify_all()

    def wait_for_end(self) -> str:
        """How the first connection ended."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.ends, PATIENCE)
            return self.ends[0]


def url_of(address: Address, files: Files, **options: str) -> str:
    given = {"ca": files.ca, **options}
    return f"tyrants://{address}?" + "&".join(f"{name}={value}" for name, value in given.items() if value)


@contextlib.contextmanager
def client_of(address: Address, files: Files, *, timeout: float = 5.0) -> Iterator[Client]:
    with Client(Pool(address, tls=TLS(tls.client_context(ca=files.ca))), timeout=timeout) as client:
        yield client


def why(url: str) -> str:
    """Why the store at ``url`` cannot be reached."""
    with open_store(url) as store, pytest.raises(StoreUnavailable) as caught:
        store.put(b"key", b"value")
    assert not isinstance(caught.value, OutcomeUnknown)
    return str(caught.value)


@pytest.fixture(params=["TLSv1_2", "TLSv1_3"])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return ssl.TLSVersion[request.param]


# -- a store over TLS


def test_a_store_speaks_tls(files: Files, version: ssl.TLSVersion, counted: Counter[str]) -> None:
    with TLSPeer(files.server) as peer:
        peer.context.minimum_version = peer.context.maximum_version = version
        with open_store(url_of(peer.address, files)) as store:
            for size in (0, 1, RECORD - 9, RECORD, RECORD + 1, 3_000_000):
                store.put(b"%d" % size, bytes(size))
                assert store.get(b"%d" % size) == bytes(size)
            assert store.get(b"none") is None
            assert len(store.get_many([b"0", b"1", b"3000000"])) == 3
    assert counted["tyrant.connections"] == 1


def test_nothing_that_tls_1_2_has_replaced_is_spoken(files: Files) -> None:
    with TLSPeer(files.server) as peer:
        peer.context.maximum_version = ssl.TLSVersion.TLSv1_2
        for context in (tls.client_context(), tls.server_context(files.server)):
            assert context.minimum_version is ssl.TLSVersion.TLSv1_2
        # That old versions are switched off in OpenSSL's own configuration, too, is not for us to test.
    for name in ("verify=no", "insecure=1", "check_hostname=0"):
        with pytest.raises(ConfigurationError, match="unknown option"):
            open_store(f"tyrants://localhost?{name}")


def test_requests_without_answers_leave_whole(files: Files) -> None:
    with TLSPeer(files.server) as peer, client_of(peer.address, files) as client:
        client.pipeline([PUTNR(b"%d" % number, bytes(100_000)) for number in range(20)])
        peer.wait_for_requests(20)


def test_many_requests_in_flight_do_not_block_each_other(files: Files) -> None:
    """More than the buffers of both ways hold, so replies must be read while requests leave."""
    with TLSPeer(files.server) as peer, client_of(peer.address, files, timeout=PATIENCE) as client:
        client.call(PUT(b"k", bytes(1_000_000)))
        replies = client.pipeline([PUT(b"x", bytes(1_000_000)), GET(b"k")] * 12)
    assert replies == [Reply(SUCCESS), Reply(SUCCESS, bytes(1_000_000))] * 12


def test_settings_the_command_line_and_percent_escapes(files: Files, tmp_path: Path) -> None:
    with TLSPeer(files.server) as peer:
        place = tmp_path / "a place+100%"
        place.mkdir()
        (place / "ca.pem").write_text(Path(files.ca).read_text())
        escaped = f"{tmp_path}/a%20place+100%25/ca.pem".replace("%", "%%")
        ini = configparser.ConfigParser()
        ini.read_string(f"[app]\nbeaker.session.url = tyrants://{peer.address}?ca={escaped}")
        settings = Settings.from_options({"url": ini["app"]["beaker.session.url"]})
        with open_store(settings.url, **settings.timing) as store:
            assert isinstance(store, TyrantStore)
            store.put(b"key", b"value")
        result = CliRunner().invoke(main, ["ping", "--url", url_of(peer.address, files)], catch_exceptions=False)
        assert (result.exit_code, result.stderr if result.stderr_bytes else "") == (0, "")


# -- whom a client believes


@pytest.mark.parametrize(
    ("hosts", "days", "said"),
    [
        (["example.org"], (-1, 30), r"is for others .*127\.0\.0\.1.*server_name="),
        (["localhost"], (-1, 30), r"is for others .*127\.0\.0\.1.*server_name="),
        ([], (-1, 30), "is for others"),
        (["127.0.0.1"], (-5, -1), "has expired: renew it"),
        (["127.0.0.1"], (1, 30), "not valid yet: check the clocks"),
    ],
    ids=["another-host", "another-name-of-it", "no-name", "expired", "too-early"],
)
def test_a_certificate_that_is_not_good_is_an_outage(
    authority: Authority, files: Files, hosts: list[str], days: tuple[int, int], said: str
) -> None:
    certificate = authority.sign("bad", hosts, begins=days[0], ends=days[1])
    with TLSPeer(certificate) as peer:
        message = why(url_of(peer.address, files))
        assert peer.requests == []
    assert message.startswith(f"no TLS with the Tyrant server at {peer.address}: the server's certificate")
    assert re.search(said, message), message


def test_a_name_that_nothing_but_the_common_name_has_is_none(authority: Authority, files: Files) -> None:
    with TLSPeer(authority.sign("localhost", [])) as peer:
        assert "is for others" in why(url_of(Address("localhost", peer.address.port), files))


def test_server_name_says_what_a_certificate_is_for(authority: Authority, files: Files) -> None:
    with TLSPeer(authority.sign("elsewhere", ["store.example.org"])) as peer:
        with open_store(url_of(peer.address, files, server_name="store.example.org")) as store:
            store.put(b"key", b"value")
        assert "is for others" in why(url_of(peer.address, files, server_name="other.example.org"))


def test_an_authority_is_trusted_only_if_it_is_named(files: Files) -> None:
    with TLSPeer(files.server) as peer:
        for ca in (files.other_ca, ""):
            message = why(url_of(peer.address, files, ca=ca))
            assert "nobody whom we trust has signed the server's certificate" in message
            assert message.endswith("as ca=")
        assert peer.requests == []


def test_a_servers_own_certificate_can_be_all_that_is_trusted(files: Files) -> None:
    with TLSPeer(files.server) as peer, open_store(url_of(peer.address, files, ca=files.server)) as store:
        store.put(b"key", b"value")


# -- whom a server believes


def test_a_client_shows_its_certificate(files: Files, version: ssl.TLSVersion) -> None:
    with TLSPeer(files.server, ca=files.ca) as peer:
        peer.context.minimum_version = peer.context.maximum_version = version
        with open_store(url_of(peer.address, files, cert=files.client)) as store:
            store.put(b"key", b"value")
        assert peer.names()[-1] == "put"


def test_a_client_without_a_certificate_hears_that_it_needs_one(files: Files, version: ssl.TLSVersion) -> None:
    with TLSPeer(files.server, ca=files.ca) as peer:
        peer.context.minimum_version = peer.context.maximum_version = version
        message = why(url_of(peer.address, files))
        assert "demands a certificate of its clients" in message
        assert "cert= and key=" in message
        assert peer.requests == []


def test_a_client_with_a_strange_certificate_hears_that_it_is_strange(files: Files, version: ssl.TLSVersion) -> None:
    with TLSPeer(files.server, ca=files.ca) as peer:
        peer.context.minimum_version = peer.context.maximum_version = version
        message = why(url_of(peer.address, files, cert=files.other_client))
        assert "does not accept our certificate (it does not trust the authority that signed it)" in message
        assert peer.requests == []


def test_a_refusal_is_a_refusal_only_before_the_first_answer(files: Files) -> None:
    """Whoever has answered once has let us in; what breaks later may have been carried out."""
    alert = ssl.SSLError(1, "bad certificate")
    alert.reason = "SSLV3_ALERT_BAD_CERTIFICATE"
    with TLSPeer(files.server) as peer:
        pool = Pool(peer.address, tls=TLS(tls.client_context(ca=files.ca)))
        connection = Connection.open(peer.address, time.monotonic() + PATIENCE, pool.tls)
        assert connection._transport.has_refused(alert)
        connection.call([PUT(b"k", b"v")], time.monotonic() + PATIENCE)
        assert not connection._transport.has_refused(alert)
        connection.close()


# -- files


def test_wrong_files_are_named_before_anything_is_connected(authority: Authority, files: Files) -> None:
    no_pem = files.directory / "no.pem"
    no_pem.write_bytes(b"\x30\x82")
    torn = files.directory / "torn.pem"
    torn.write_bytes(Path(files.ca).read_bytes()[:200])
    fifo = files.directory / "fifo"
    os.mkfifo(fifo)
    locked = authority.sign("locked", passphrase=b"s3cret")
    for options, said in {
        "ca=/no/such/file": r"there is no file '/no/such/file' \(ca=\)",
        "ca=": "ca= is empty",
        "ca=%00": r"cannot read .* \(ca=\)",
        f"ca={files.directory}": r"\(ca=\): it is no file",
        f"ca={fifo}": r"\(ca=\): it is no file",
        f"ca={no_pem}": r"no.pem' \(ca=\) holds no certificate in PEM",
        f"ca={torn}": r"cannot read '.*torn.pem' \(ca=\)",
        "cert=/no/such/file": r"there is no file '/no/such/file' \(cert=\)",
        f"cert={files.ca}": r"\(cert=\) holds no private key: give its file as key=",
        f"cert={files.client}&key=/none": r"there is no file '/none' \(key=\)",
        f"cert={files.client}&key={files.ca}": r"\(key=\) holds no private key in PEM",
        f"cert={files.client}&key={files.server}": "does not fit the certificate",
        f"cert={locked}": "needs a passphrase: store it without one",
        f"key={files.client}": "cert= is not",
        "server_name=.x": "no name that a certificate can be for",
        "server_name=": "server_name= is empty",
    }.items():
        with pytest.raises(ConfigurationError, match=said) as caught:
            open_store(f"tyrants://localhost?{options}")
        assert "s3cret" not in str(caught.value)


def test_a_file_that_may_not_be_read_is_named(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read any, so there is no trying it."""

    def deny(self: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", deny)
    with pytest.raises(ConfigurationError, match=r"may not read .* \(ca=\): let the user of this process"):
        tls.client_context(ca=files.ca)


def test_a_servers_options_are_named_as_it_has_them(files: Files) -> None:
    for arguments, said in (
        (("/none",), "--tls-cert"),
        ((files.server, files.client), "--tls-key.*does not fit.*--tls-cert"),
        ((files.server, None, "/none"), "--tls-ca"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            tls.server_context(*arguments)


@pytest.mark.parametrize(
    "url", ["tyrant://localhost?ca=/x", "tyrant://localhost?timeout=1&cert=/x", "unix:/x?server_name=x"]
)
def test_options_of_tls_are_refused_where_all_would_be_in_the_clear(url: str) -> None:
    with pytest.raises(ConfigurationError, match="is for TLS, and the URL says to do without"):
        open_store(url)


@pytest.mark.parametrize("url", ["tyrants://unix:/x", "tyrants:///x", "tyrants://tyrant://x", "tyrants://u:s3cret@x"])
def test_tls_needs_a_host(url: str) -> None:
    with pytest.raises(ConfigurationError, match="not the address of a Tyrant server") as caught:
        open_store(url)
    assert "s3cret" not in str(caught.value)


# -- whoever speaks no TLS


def test_a_server_without_tls_is_not_spoken_to_in_the_clear(tyrant_server: ServerProcess, files: Files) -> None:
    message = why(url_of(Address.parse(tyrant_server.url), files))
    assert "TLS" in message
    assert "port" in message


def test_a_server_of_something_else_is_found_out(files: Files) -> None:
    with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (address, _):
        assert "what answers does not speak TLS: check the port" in why(url_of(address, files))


def test_a_handshake_without_an_answer_ends_in_time_and_nothing_else_was_sent(files: Files) -> None:
    with listening(b"") as (address, received):
        began = time.monotonic()
        message = why(url_of(address, files, connect_timeout="0.3"))
        assert 0.3 <= time.monotonic() - began < 5
    assert "no handshake in time" in message
    assert received[:1] == b"\x16"  # a handshake's record (RFC 8446, 5.1)
    assert b"\xc8" + PUT.id.to_bytes(1, "big") not in received


@contextlib.contextmanager
def listening(answer: bytes) -> Iterator[tuple[Address, bytearray]]:
    """Somebody who gives one answer to all connections, and what they have sent."""
    received = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.settimeout(PATIENCE)
                        received.extend(connection.recv(65536))
                        connection.sendall(answer)
                        while data := connection.recv(65536):
                            received.extend(data)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield Address(*listener.getsockname()), received
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(PATIENCE)
            assert not thread.is_alive()


# -- connections that are kept


def open_connection(peer: Peer, files: Files) -> Connection:
    return Connection.open(peer.address, time.monotonic() + PATIENCE, TLS(tls.client_context(ca=files.ca)))


def wait_until_readable(connection: Connection) -> None:
    assert select.select([connection._transport._socket], [], [], PATIENCE)[0]


def test_a_session_ticket_is_no_death(files: Files) -> None:
    with TLSPeer(files.server) as peer:
        connection = open_connection(peer, files)
        wait_until_readable(connection)  # the ticket: nothing has been asked yet
        assert connection.is_alive()
        assert connection.call([PUT(b"k", b"v")], time.monotonic() + PATIENCE) == [Reply(SUCCESS)]
        assert connection.is_alive()
        connection.close()


@pytest.mark.parametrize("orderly", [True, False])
def test_the_death_behind_a_session_ticket_is_seen(files: Files, orderly: bool) -> None:
    with pair(files, tickets=2) as (connection, server, there):
        wait_until_readable(connection)
        if orderly:
            server.end()
            there.sendall(server.outgoing())
        else:
            there.shutdown(socket.SHUT_RDWR)
        assert not connection.is_alive()


def test_an_answer_to_nothing_is_a_death(files: Files) -> None:
    with TLSPeer(files.server) as peer, client_of(peer.address, files) as client:
        client.call(PUT(b"k", b"v"))
        peer.push(b"\0")
        (connection,) = client.pool._idle
        wait_until_readable(connection)
        assert client.call(GET(b"k")).value == b"v"
        assert peer.connections == 2


def test_a_server_that_was_restarted_is_found_again(files: Files) -> None:
    with TLSPeer(files.server) as peer, client_of(peer.address, files) as client:
        client.call(ADDINT(b"k", 1))
        peer.stop()
        peer.start()
        client.call(ADDINT(b"k", 1))


def test_a_connection_ends_in_order_and_at_once(files: Files) -> None:
    with TLSPeer(files.server) as peer:
        connection = open_connection(peer, files)
        connection.call([PUT(b"k", b"v")], time.monotonic() + PATIENCE)
        connection.close()
        connection.close()
        assert peer.wait_for_end() == "in order"


def test_a_child_leaves_its_parents_connections_alone(files: Files) -> None:
    with TLSPeer(files.server) as peer, client_of(peer.address, files) as client:
        client.call(PUT(b"k", b"v"))

        def in_child() -> object:
            value = client.call(GET(b"k")).value
            client.close()
            return value

        assert fork(in_child) == b"v"
        assert peer.connections == 2
        assert client.call(GET(b"k")).value == b"v"
        assert peer.connections == 2  # the parent's own, still


def test_a_child_that_closes_an_inherited_connection_says_nothing_on_it(files: Files) -> None:
    with TLSPeer(files.server) as peer:
        connection = open_connection(peer, files)
        connection.call([PUT(b"k", b"v")], time.monotonic() + PATIENCE)
        fork(connection.close)
        assert connection.call([GET(b"k")], time.monotonic() + PATIENCE) == [Reply(SUCCESS, b"v")]
        connection.close()
        assert peer.wait_for_end() == "in order"


# -- what a break leaves


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "RETRY_PAUSE", (0.0, 0.0))


@pytest.mark.usefixtures("no_pause")
@pytest.mark.parametrize("way", ["request", "reply"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_cut_at_any_byte_of_a_record_is_told_as_what_it_is(
    files: Files, way: Literal["request", "reply"], reset: bool
) -> None:
    count = 0

    def script(request: Request, connection: int, number: int) -> bytes:
        nonlocal count
        if request.command is ADDINT:
            count += 1
            return encode_reply(ADDINT, Reply(SUCCESS, count))
        return encode_reply(GET, Reply(SUCCESS, b"value"))

    get = GET(b"longer")  # so that each is longer than what is cut of the other
    with (
        TLSPeer(files.server, script) as peer,
        Proxy(peer.address.port) as proxy,
        client_of(Address(port=proxy.port), files) as client,
    ):
        client.call(get)
        proxy.mark()
        client.call(ADDINT(b"k", 1))
        (exchange,) = proxy.exchanges
        length = len(getattr(exchange, way))
        assert 20 < length < 100, "one record"
        for after in (*range(0, length - 1, 6), length - 1):
            before = count
            client.call(get)  # so that there is a connection that has been used
            proxy.cut(1, way, after, reset=reset)
            with pytest.raises(OutcomeUnknown, match="addint was answered"):
                client.call(ADDINT(b"k", 1))
            assert proxy.has_cut
            peer.wait_until_open(0)
            # A record that has come in part has told the server nothing.
            assert count == before + (way == "reply")
            client.call(get)
            proxy.cut(1, way, after, reset=reset)
            assert client.call(get).value == b"value"
            assert proxy.has_cut


@contextlib.contextmanager
def pair(files: Files, *, tickets: int = 0) -> Iterator[tuple[Connection, Channel, socket.socket]]:
    """A connection that has shaken hands and has little room to send, and its server's end, which reads nothing."""
    here, there = socket.socketpair()
    here.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's least
    there.settimeout(PATIENCE)
    context = tls.server_context(files.server)
    context.num_tickets = tickets
    server = Channel(context, server_side=True)

    def shake_hands() -> None:
        while not server.established:
            server.receive(there.recv(65536))
            there.sendall(server.outgoing())

    thread = threading.Thread(target=shake_hands)
    thread.start()
    transport = TLSTransport(here, TLS(tls.client_context(ca=files.ca)).channel("localhost"))
    transport.shake_hands(time.monotonic() + PATIENCE)
    thread.join(PATIENCE)
    connection = Connection(transport, Address("localhost"))
    with there:
        yield connection, server, there
    connection.close()


def test_a_record_of_which_the_end_has_not_left_was_not_sent(files: Files) -> None:
    """The peer cannot understand a part of one, so nothing has been carried out, and the call may be made again."""
    with pair(files) as (connection, server, there):
        with pytest.raises(NotSentError, match="putcat in time; nothing had been sent"):
            connection.call([PUTCAT(b"k", bytes(RECORD))], time.monotonic() + 0.2)
        assert connection.closed
        data = until_closed(there)
        assert len(data) > 0
        assert server.receive(data) == b""


@pytest.mark.parametrize("end", ["in order", "forged"])
def test_an_end_that_came_with_the_last_bytes_is_not_waited_for(files: Files, end: str) -> None:
    with pair(files) as (connection, server, there):
        server.send(encode_reply(GET, Reply(SUCCESS, b"first")))
        if end == "in order":
            server.end()
        there.sendall(server.outgoing() + (b"" if end == "in order" else bytes(40)))
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="broke before get was answered"):
            connection.call([GET(b"1"), GET(b"2")], time.monotonic() + PATIENCE)
        assert time.monotonic() - began < PATIENCE / 2


def test_a_request_of_which_a_record_has_left_may_have_been_carried_out(files: Files) -> None:
    stalled = threading.Event()

    def script(*_: object) -> Answer:
        stalled.set()
        return Answer(b"", "stall")

    with TLSPeer(files.server, script) as peer, client_of(peer.address, files, timeout=0.5) as client:
        with pytest.raises(OutcomeUnknown, match="did not answer putcat in time"):
            client.call(PUTCAT(b"k", bytes(100_000)))
        assert stalled.wait(PATIENCE)


def test_a_forged_byte_breaks_the_connection(files: Files) -> None:
    """Of a reply that somebody on the way has changed, nothing is believed."""
    server = Channel(tls.server_context(files.server), server_side=True)
    client = TLS(tls.client_context(ca=files.ca)).channel("localhost")
    while not (client.established and server.established):
        server.receive(shaken(client))
        client.receive(server.outgoing())
    server.send(b"good")
    good = server.outgoing()
    server.send(b"evil")
    forged = bytearray(server.outgoing())
    forged[-1] ^= 1
    assert client.receive(good + forged) == b"good"
    assert client.error is not None
    assert client.receive(good) == b""


def shaken(client: Channel) -> bytes:
    client.receive()
    return client.outgoing()


# -- a real server


def serving(files: Files, *more: str) -> ServerProcess:
    return ServerProcess("memory:", arguments=["--tls-cert", files.server, *more])


def raw(server: ServerProcess) -> socket.socket:
    address = Address.parse(server.url)
    return socket.create_connection((address.host, address.port), PATIENCE)


def encrypted(server: ServerProcess, files: Files) -> ssl.SSLSocket:
    context = tls.client_context(ca=files.ca)
    return context.wrap_socket(raw(server), server_hostname="localhost", suppress_ragged_eofs=False)


@pytest.fixture(scope="module")
def tls_server(files: Files) -> Iterator[ServerProcess]:
    with serving(files, "--patience", "1", "--verbose") as server:
        yield server


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        assert part, f"it ended after {len(data)} bytes"
        data += part
    return data


def until_closed(sock: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while part := sock.recv(65536):
            data += part
    return data


def test_our_client_and_our_server(tls_server: ServerProcess, files: Files, counted: Counter[str]) -> None:
    with open_store(url_of(Address.parse(tls_server.url), files)) as store:
        for size in (0, RECORD, 3_000_000):
            assert store.compare_and_swap(b"key", None, bytes(size))
            assert store.get(b"key") == bytes(size)
            assert store.scan(b"key") == ([b"key"], None)
            assert store.delete(b"key")
    assert counted["tyrant.connections"] == 1


def test_our_server_sends_no_tickets(tls_server: ServerProcess, files: Files, version: ssl.TLSVersion) -> None:
    context = tls.client_context(ca=files.ca)
    context.minimum_version = context.maximum_version = version
    with context.wrap_socket(raw(tls_server), server_hostname="localhost") as sock:
        sock.sendall(encode_request(GET(b"none")))
        assert receive(sock, 1) == b"\1"
        assert sock.session is None or not sock.session.has_ticket


@pytest.mark.parametrize(
    "opening", [b"", b"\x16\x03\x01\x02\x00\x01", encode_request(GET(b"k")), b"get k\r\n", b"GET / HTTP/1.1\r\n\r\n"]
)
def test_whoever_shakes_no_hands_is_closed(tls_server: ServerProcess, opening: bytes) -> None:
    with raw(tls_server) as sock:
        sock.sendall(opening)
        assert b"\xc8" not in until_closed(sock)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (RNUM(), r"whether the server demands TLS \(tyrants://\)"),
        # The rest of it may meet a reset, which the reason may not outrun.
        (PUT(b"k", bytes(100_000)), r"whether the server demands TLS \(tyrants://\)|broke before"),
    ],
    ids=["short", "long"],
)
def test_a_client_in_the_clear_hears_of_tls(tls_server: ServerProcess, request_: Request, said: str) -> None:
    with (
        Client(Pool(Address.parse(tls_server.url)), timeout=PATIENCE) as client,
        pytest.raises(StoreUnavailable, match=said),
    ):
        client.call(request_)


def test_handshakes_that_are_not_finished_count_as_connections(files: Files) -> None:
    with serving(files, "--max-connections", "5", "--patience", "60") as server:
        with contextlib.ExitStack() as opened:
            silent = [opened.enter_context(raw(server)) for _ in range(5)]
            with raw(server) as one_more:
                assert until_closed(one_more) == b""
            assert not select.select(silent, [], [], 0)[0], "they are still open"
        deadline = time.monotonic() + PATIENCE
        while True:  # until the server has seen that they are gone
            with contextlib.suppress(OSError), encrypted(server, files) as sock:
                sock.sendall(encode_request(GET(b"none")))
                assert receive(sock, 1) == b"\1"
                break
            assert time.monotonic() < deadline


def test_what_was_asked_before_the_end_is_answered(tls_server: ServerProcess, files: Files) -> None:
    with encrypted(tls_server, files) as sock:
        sock.sendall(encode_request(PUT(b"half", b"v")) * 200)
        socket.socket.shutdown(sock, socket.SHUT_WR)
        assert receive(sock, 200) == bytes(200)
        assert sock.recv(1) == b"", "an end in order"


class RawTLS:
    """A client that has shaken hands, and does with TLS what it is told."""

    def __init__(self, address: Address, files: Files) -> None:
        self.socket = socket.create_connection((address.host, address.port), PATIENCE)
        self.channel = TLS(tls.client_context(ca=files.ca)).channel("localhost")
        self.channel.receive()
        while not self.channel.established:
            self.flush()
            self.channel.receive(self.socket.recv(65536))
        self.flush()

    def flush(self) -> None:
        self.socket.sendall(self.channel.outgoing())

    def receive_to_end(self) -> bytes:
        """The plain text until the server has closed."""
        data = until_closed(self.socket)
        return self.channel.receive(data)

    def __enter__(self) -> RawTLS:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


@pytest.fixture(params=list(LOOPS))
def tls_thread(request: pytest.FixtureRequest, files: Files) -> Iterator[ServerThread]:
    """A server in a thread of this process, on each loop."""
    options = ServerOptions(tls=tls.server_context(files.server))
    with ServerThread(MemoryStore(), loop=request.param, options=options) as server:
        yield server


def test_a_clients_goodbye_leaves_it_its_answers(tls_thread: ServerThread, files: Files) -> None:
    with RawTLS(tls_thread.address, files) as client:
        client.channel.send(encode_request(PUT(b"k", bytes(10_000))))
        client.channel.send(encode_request(GET(b"k")) * 100)
        client.channel.end()
        client.flush()
        assert len(until_closed(client.socket)) > 1_000_000


def test_answers_are_encrypted_and_end_in_order(tls_thread: ServerThread, files: Files) -> None:
    with RawTLS(tls_thread.address, files) as client:
        client.channel.send(encode_request(PUT(b"k", b"secret")) + encode_request(GET(b"k")))
        client.flush()
        client.socket.shutdown(socket.SHUT_WR)
        data = until_closed(client.socket)
        assert b"secret" not in data
        assert client.channel.receive(data) == b"\0" + encode_reply(GET, Reply(SUCCESS, b"secret"))
        assert client.channel.ended


def test_behind_a_forged_record_nothing_is_carried_out(tls_thread: ServerThread, files: Files) -> None:
    with RawTLS(tls_thread.address, files) as client:
        client.channel.send(encode_request(PUT(b"good", b"v")))
        good = client.channel.outgoing()
        client.channel.send(encode_request(PUT(b"evil", b"v")))
        forged = bytearray(client.channel.outgoing())
        forged[-1] ^= 1
        client.channel.send(encode_request(PUT(b"later", b"v")))
        client.socket.sendall(good + forged + client.channel.outgoing())
        until_closed(client.socket)
    with open_store(url_of(tls_thread.address, files)) as store:
        assert set(store.get_many([b"good", b"evil", b"later"])) <= {b"good"}


def test_a_server_that_stops_hangs_up_on_handshakes(tls_thread: ServerThread, files: Files) -> None:
    address = tls_thread.address
    with (
        socket.create_connection((address.host, address.port), PATIENCE) as silent,
        RawTLS(address, files) as client,
    ):
        client.channel.send(encode_request(GET(b"none")))
        client.flush()
        assert client.channel.receive(client.socket.recv(65536)) == b"\1"
        tls_thread.stop()
        assert until_closed(silent) == b""
        assert client.receive_to_end() == b""
        assert client.channel.ended, "told in order"


def test_a_slow_reader_is_closed(tls_server: ServerProcess, files: Files) -> None:
    with encrypted(tls_server, files) as sock:
        sock.sendall(encode_request(PUT(b"big", bytes(1 << 20))))
        receive(sock, 1)
        sock.sendall(encode_request(GET(b"big")) * 30)
        deadline = time.monotonic() + PATIENCE
        while "does not read its replies" not in tls_server.output:
            assert time.monotonic() < deadline, tls_server.output
            time.sleep(0.02)


def test_a_server_stops_at_once_whatever_its_clients_keep(files: Files) -> None:
    with serving(files, "--verbose") as server, encrypted(server, files) as sock:
        sock.sendall(encode_request(GET(b"none")))
        receive(sock, 1)
        server.stop()
        assert sock.recv(1) == b"", "an end in order"
        assert "closing" not in server.output, "it waited for a client that says no goodbye"


def test_our_server_demands_certificates(files: Files) -> None:
    with serving(files, "--tls-ca", files.ca) as server:
        address = Address.parse(server.url)
        with open_store(url_of(address, files, cert=files.client)) as store:
            store.put(b"key", b"value")
        assert "demands a certificate" in why(url_of(address, files))
        assert "does not accept our certificate" in why(url_of(address, files, cert=files.other_client))


@pytest.mark.parametrize(
    ("made", "weakness"),
    [
        ({}, None),
        ({"begins": -9, "ends": -1}, "has expired"),
        ({"begins": 1}, "is not valid yet"),
        ({"client": True}, "is not one for servers"),
    ],
)
def test_a_certificate_that_no_client_will_accept_is_told(
    authority: Authority, made: dict[str, int], weakness: str | None
) -> None:
    file = authority.sign("judged", **made)  # type: ignore[arg-type]  # a bool is one of the numbers
    found = tls.weakness(file)
    assert (found is None) == (weakness is None)
    assert found is None or weakness is None or weakness in found


def test_it_is_told_at_the_start_and_when_it_is_read_anew(authority: Authority, tmp_path: Path) -> None:
    file, log = authority.sign("aging", begins=-9, ends=-1), tmp_path / "log"
    told = f"no client will accept the certificate in {file} (--tls-cert): it, or one that signed it, has expired"
    arguments = ["--tls-cert", file, "--log", str(log), "--listen", f"unix:{tmp_path}/s"]
    with ServerProcess("memory:", arguments=arguments) as server:
        eventually(lambda: " serves memory: at " in log.read_text(), "it has started")
        assert f"{server.url} (TLS), unix:{tmp_path}/s\n" in log.read_text()
        assert log.read_text().count(told) == 1
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: "SIGHUP: opened anew: the log, the certificate" in log.read_text(), "a renewal")
        assert log.read_text().count(told) == 2
        authority.sign("aging")
        os.kill(server.pid, signal.SIGHUP)
        eventually(lambda: log.read_text().count("opened anew") == 2, "another renewal")
        assert log.read_text().count(told) == 2


def test_without_a_port_for_it_there_is_no_tls(files: Files) -> None:
    with pytest.raises(AssertionError, match=r"--tls-cert is for TCP, and every --listen is a Unix socket"):
        ServerProcess("memory:", unix="/nowhere", arguments=["--tls-cert", files.server]).start()


def test_who_lets_everybody_in_is_warned(files: Files) -> None:
    with serving(files, "--allow-remote") as server:
        assert "--allow-remote without --tls-ca: everybody who reaches the port may come in\n" in server.output
    with serving(files, "--allow-remote", "--tls-ca", files.ca) as server:
        assert "without --tls-ca" not in server.output


def test_a_certificate_that_cannot_be_used_stops_the_start(files: Files) -> None:
    with pytest.raises(AssertionError, match=r"exit code 1(.|\n)*there is no file '/none' \(--tls-cert\)"):
        ServerProcess("memory:", arguments=["--tls-cert", "/none"]).start()
