"""Whatever bytes clients and servers send: the oracle over the corpus and over mutations, then over real sockets."""

from __future__ import annotations

import contextlib
import random
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from beaker_statestore import documents, tagged
from beaker_statestore.exceptions import DocumentError, ProtocolError
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.tyrant import commands, http, memcached, paging, verbs, wire
from beaker_statestore.tyrant.calls import Call
from beaker_statestore.tyrant.commands import GET, PUT, Reply, Request
from beaker_statestore.tyrant.protocols import CallDecoder
from beaker_statestore.tyrant.wire import Decoder, ReplyDecoder, encode_request
from tests.fuzz import oracle
from tests.fuzz.bulk import Report, bombard, server_for
from tests.fuzz.frames import damaged, frame, reply_to, request
from tests.fuzz.inputs import check, mutated
from tests.fuzz.make_corpus import CORPUS
from tests.fuzz.oracle import Defect, check_client, check_server
from tests.serving import LOOPS, ServerThread

SEEDS = sorted(CORPUS.iterdir())
MIB = 1024 * 1024
#: Machines pause; inputs that take long are found by libFuzzer, which looks at nothing else meanwhile.
unhurried = settings(deadline=None)


# -- one by one, in this process


def test_the_corpus_is_there_and_small() -> None:
    assert 100 < len(SEEDS) < 200
    assert sum(path.stat().st_size for path in SEEDS) < 200_000


@pytest.mark.parametrize("path", SEEDS, ids=[path.name for path in SEEDS])
def test_what_is_in_the_corpus_holds(path: Path) -> None:
    check(path.read_bytes())


@unhurried
@given(st.lists(st.booleans(), min_size=1, max_size=5), st.lists(st.integers(0, 80), max_size=6), st.integers(0))
def test_any_frames_whole_and_damaged(pattern: list[bool], cuts: list[int], seed: int) -> None:
    draw = random.Random(seed)
    data = b"".join(damaged(draw, frame(draw)) if damage else frame(draw) for damage in pattern)
    check_server(data, cuts)
    check_server(data, cuts, policy=None)


@unhurried
@given(st.lists(st.booleans(), min_size=1, max_size=5), st.lists(st.integers(0, 80), max_size=6), st.integers(0))
def test_any_replies_whole_and_damaged(pattern: list[bool], cuts: list[int], seed: int) -> None:
    draw = random.Random(seed)
    asked = [asked for asked in (request(draw) for _ in pattern) if asked.command is not commands.REPL]
    replies = [reply_to(draw, asked) for asked in asked]
    check_client(
        asked, b"".join(damaged(draw, one) if bad else one for one, bad in zip(replies, pattern, strict=False)), cuts
    )


@unhurried
@given(st.sampled_from(SEEDS), st.integers(1, 4), st.integers(0))
def test_any_mutation_of_the_corpus(path: Path, times: int, seed: int) -> None:
    draw = random.Random(seed)
    raw = path.read_bytes()
    for _ in range(times):
        raw = mutated(raw, draw)
    check(raw)


@unhurried
@given(st.binary(max_size=120))
def test_any_bytes(raw: bytes) -> None:
    check(raw)


@pytest.mark.long
@settings(max_examples=30_000, deadline=None)
@given(st.lists(st.sampled_from(SEEDS), min_size=1, max_size=3), st.integers(1, 6), st.integers(0))
def test_very_many_mutations_of_the_corpus(paths: list[Path], times: int, seed: int) -> None:
    draw = random.Random(seed)
    raw = b"".join(path.read_bytes() for path in paths)
    for _ in range(times):
        raw = mutated(raw, draw)
    check(raw)


PAGE = paging.pack_page([b"", b"key", b"session:a"], b"cursor")
DOCUMENTS = [
    b'{"a":[1,-2.5e3,"\\u00e9\\n",null,true,{}],"_expires":1700000000.5,"_accessed_time":1,"_serializer":"json"}',
    b'{"when":{"$datetime":"2024-02-29T12:00:00.000001+01:00"},"n":{"$decimal":"1.10"},"s":{"$set":[1,"b",{"$tuple":[]}]}}',
    b'{"b":{"$bytes":"AAEC"},"d":{"$date":"2024-02-29"},"t":{"$time":"23:59"},"l":{"$timedelta":[1,2,3]}}',
]


@unhurried
@given(st.integers(0))
def test_any_page_of_a_scan_whole_and_damaged(seed: int) -> None:
    with contextlib.suppress(ProtocolError):
        keys, _ = paging.unpack_page(damaged(random.Random(seed), PAGE))
        assert len(b"".join(keys)) <= 2 * len(PAGE) + 400


@unhurried
@given(st.sampled_from(DOCUMENTS), st.integers(0))
def test_any_document_whole_and_damaged(document: bytes, seed: int) -> None:
    data = damaged(random.Random(seed), document)
    with contextlib.suppress(DocumentError):
        documents.expires_at(data)
    with contextlib.suppress(DocumentError):
        tagged.untag(documents.decode(data))


# -- what was found

PUT_LONG = encode_request(PUT(b"k", b"0123456789" * 10))


@pytest.mark.parametrize("length", [90, 100, 110, 113, 114, 120])
def test_a_long_string_that_arrives_in_several_pieces_before_anybody_looks(
    length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "LONG", 8)
    data = PUT_LONG + encode_request(GET(b"behind")) * 4
    decoder = CallDecoder()
    decoder.feed(data[:20])
    assert decoder.next() is None
    for start, end in ((20, length), (length, length + 9), (length + 9, length + 10), (length + 10, len(data))):
        decoder.feed(data[start:end])
    calls = [decoder.next() for _ in range(5)]
    assert [call and call.request for call in calls] == [PUT(b"k", b"0123456789" * 10), *[GET(b"behind")] * 4]
    assert (decoder.next(), decoder.buffered) == (None, 0)


@pytest.mark.parametrize("loop", LOOPS)
def test_long_values_that_arrive_while_the_server_is_busy(loop: str) -> None:
    values = [bytes((number,)) * (number * 100_000 + 7) for number in range(1, 12)]
    with ServerThread(MemoryStore(), loop=loop) as server, server.connect() as client:
        for value in values:
            data = encode_request(PUT(b"k", value)) + encode_request(GET(b"k"))
            client.send(data[:100])
            server.catch_up()
            with server.paused():
                client.send(data[100:1_000_000])
            client.send(data[1_000_000:])
            assert client.receive(1 + 5 + len(value)) == b"\0\0" + len(value).to_bytes(4, "big") + value


# -- the room that is taken

#: Halves of messages, of which more could come: what they take up in memory, as a multiple of what has been sent.
HALVES: dict[str, tuple[float, bytes]] = {
    "a value": (1.25, bytes.fromhex("C810 00000001 03000000") + b"v" * 300_000),
    "a line": (1.25, b"get " + b"ab " * 100_000),
    "data": (1.25, b"set k 0 0 9000000\r\n" + b"v" * 300_000),
    "a body": (1.25, b"PUT /k HTTP/1.1\r\nContent-Length: 9000000\r\n\r\n" + b"v" * 300_000),
    # Each element is an object of its own, of some 40 bytes besides those of its string.
    "a list of short keys": (10, bytes.fromhex("C831 00100000") + b"\0\0\0\2ab" * 30_000),
    "a list of empty keys": (10, bytes.fromhex("C831 00100000") + b"\0\0\0\0" * 30_000),
    "nothing of what it announces": (1.25, bytes.fromhex("C810 10000000 10000000")),
}


@pytest.mark.parametrize("piece", [700, 65_536])
@pytest.mark.parametrize(("multiple", "data"), HALVES.values(), ids=list(HALVES))
def test_half_a_request_takes_little_more_room_than_it_has_bytes(multiple: float, data: bytes, piece: int) -> None:
    decoder = CallDecoder(policy=oracle.POLICY)
    assert room_for(decoder, data, piece) <= multiple * len(data) + 64 * 1024
    assert decoder.buffered == len(data)


@pytest.mark.parametrize(
    ("multiple", "asked", "data"),
    [
        (1.25, GET(b"k"), bytes.fromhex("00 03000000") + b"v" * 300_000),
        (10, commands.MISC(b"getlist", [], 0), bytes.fromhex("00 00100000") + b"\0\0\0\2ab" * 30_000),
        (12, commands.MGET([]), bytes.fromhex("00 00100000") + b"\0\0\0\2\0\0\0\2abcd" * 20_000),
        (1.25, GET(b"k"), bytes.fromhex("00 0FFFFFFF")),
        (1.25, commands.MGET([]), bytes.fromhex("00 00100000 0FFFFFFF 0FFFFFFF")),
    ],
    ids=["a value", "a list", "pairs", "nothing of a value", "nothing of pairs"],
)
def test_so_does_half_a_reply(multiple: float, asked: Request, data: bytes) -> None:
    decoder = ReplyDecoder()
    decoder.expect(asked)
    assert room_for(decoder, data, 700) <= multiple * len(data) + 64 * 1024


def room_for(decoder: CallDecoder | ReplyDecoder, data: bytes, piece: int) -> int:
    """How much memory ``decoder`` has taken when it has heard ``data``."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        for start in range(0, len(data), piece):
            decoder.feed(data[start : start + piece])
            assert decoder.next() is None
        return tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()


# -- over real sockets


def any_seed() -> int:
    """Another one each time; pytest shows it with a failure."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return seed


def assert_unharmed(report: Report, drift: int) -> None:
    assert report.executed > report.frames / 10
    assert report.abandoned > 0
    assert report.smuggled > 0
    assert report.slowest < 5.0
    assert report.memory < drift
    assert report.files == 0
    assert report.defects == 0


def test_a_server_takes_damaged_frames() -> None:
    with server_for() as server:
        # Python's own memory goes on growing a little while after the first hundreds of connections.
        assert_unharmed(bombard(server, 12_000, seed=any_seed()), drift=30 * MIB)


@pytest.mark.long
@pytest.mark.parametrize("db", ["memory:", "lmdb"])
def test_a_server_takes_very_many_damaged_frames(db: str, tmp_path: Path) -> None:
    with server_for(db if db == "memory:" else str(tmp_path / "state.lmdb")) as server:
        assert_unharmed(bombard(server, 150_000, seed=any_seed()), drift=20 * MIB)


# -- the oracle itself: it sees what it is there for


def _reads_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind the last call the decoder goes on."""
    monkeypatch.setattr(CallDecoder, "next", wire.Decoder.next)
    monkeypatch.setattr(CallDecoder, "feed", wire.Decoder.feed)


def _raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is no number of words makes the decoder raise what it must not."""

    def broken(words: list[bytes]) -> Call:
        raise ValueError(words)

    monkeypatch.setitem(memcached._OTHERS, b"version", broken)


def _guesses(monkeypatch: pytest.MonkeyPatch) -> None:
    """HTTP that ignores a body that it does not expect."""
    monkeypatch.setattr(http, "_length", lambda headers: 0)


def _writes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that writes a record that nobody named."""

    def broken(run: verbs.Run, key: bytes, value: bytes) -> Reply:
        run.records.put(key + b"elsewhere", value)
        return verbs.OK

    monkeypatch.setitem(verbs._COMMANDS, commands.PUT, broken)


def _fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command with a defect, which the executor answers and logs."""
    monkeypatch.setitem(verbs._COMMANDS, commands.GET, lambda run, key: 1 / 0)


def _swaps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder takes key and value for each other where one comes in pieces."""
    original = wire.Decoder._take

    def broken(self: Decoder[object], length: int) -> bytes:
        return original(self, length)[::-1] if self._pieces else original(self, length)

    monkeypatch.setattr(wire.Decoder, "_take", broken)


def _refuses_softly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that looks like absence."""
    monkeypatch.setattr(
        Call,
        "refused",
        lambda call: Call(None, lambda _reply: call.encode(Reply(commands.FAILURE)), call.door, call.last),
    )


@pytest.mark.parametrize("defect", [_reads_on, _raises, _guesses, _writes_elsewhere, _fails, _swaps, _refuses_softly])
def test_the_oracle_sees(defect: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    data = [
        b"version\r\n",
        b"quit\r\nget k\r\n",
        b"get k\r\n",
        b"GET /k HTTP/1.1\r\nContent-Length: 9\r\n\r\nversion\r\n",
        b"PUT /k HTTP/1.1\r\nContent-Length: 9\r\n\r\nversion\r\n",
        encode_request(PUT(b"key", b"0123456789")) * 2,
    ]

    def look() -> None:
        for one in data:
            check_server(one, [22, 3])

    look()
    defect(monkeypatch)
    with pytest.raises((Defect, ValueError)):
        look()
