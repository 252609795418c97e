"""``--ext``: functions of the operator's, loaded, called, masked and failing."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from beaker_statestore import extensions, serve
from beaker_statestore.exceptions import ConfigurationError, StoreUnavailable
from beaker_statestore.stores.base import LocalStore, Verbs
from beaker_statestore.stores.lmdb import LMDBStore
from beaker_statestore.stores.memory import MemoryStore
from beaker_statestore.testing import ServerProcess
from beaker_statestore.tyrant import swap
from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import (
    CAS,
    EXT,
    FAILURE,
    FORBIDDEN,
    GET,
    PROBE,
    PUT,
    RNUM,
    STORE_FAILED,
    SUCCESS,
    Reply,
    Request,
)
from beaker_statestore.tyrant.mask import CLOSED, OPEN, Mask
from beaker_statestore.tyrant.server import ServerOptions
from beaker_statestore.tyrant.verbs import Function
from tests.serving import RawClient, ServerThread

OK = Reply(SUCCESS)

MODULE = '''
def take(records, key, value):
    """The record, which is gone then."""
    found = records.get(key)
    records.delete(key)
    return found

def put_and_fail(records, key, value):
    records.put(key, value)
    raise ValueError("a defect in a function")

EXTENSIONS = {"take": take, "put_and_fail": put_and_fail}
'''


def ext(name: bytes, key: bytes = b"k", value: bytes = b"v") -> Request:
    return EXT(name, key, value, 0)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory from which modules are imported, which are forgotten then."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


# -- loading


def test_a_module_is_found_by_its_name_and_by_its_path(place: Path) -> None:
    path = place / "our_functions.py"
    path.write_text(MODULE)
    for module in ("our_functions", str(path)):
        assert set(extensions.load(module)) == {b"take", b"put_and_fail"}


def test_a_module_in_a_package_and_a_path_that_is_no_name_are_found(place: Path) -> None:
    (place / "package").mkdir()
    (place / "package" / "functions.py").write_text(MODULE)
    assert set(extensions.load("package.functions")) == {b"take", b"put_and_fail"}
    path = place / "our functions-2.py"
    path.write_text(MODULE)
    assert set(extensions.load(str(path))) == {b"take", b"put_and_fail"}


def test_a_file_does_not_take_the_place_of_a_module_with_its_name(place: Path) -> None:
    path = place / "json.py"
    path.write_text(MODULE)
    import json

    assert set(extensions.load(str(path))) == {b"take", b"put_and_fail"}
    assert sys.modules["json"] is json


def test_what_a_file_defines_can_be_looked_up_in_its_module(place: Path) -> None:
    # As dataclasses do with their annotations.
    path = place / "with_class.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\n"
        "EXTENSIONS = {'point': lambda records, key, value: b'%d' % Point(5).x}\n"
    )
    assert extensions.load(str(path))[b"point"](MemoryStore(), b"", b"") == b"5"


@pytest.mark.parametrize(
    ("source", "culprit"),
    [
        (None, "cannot be imported: FileNotFoundError"),
        ("EXTENSIONS = ", r"cannot be imported: SyntaxError\("),
        ("import nothing_of_the_kind", "cannot be imported: ModuleNotFoundError.*nothing_of_the_kind"),
        ("1 / 0", "cannot be imported: ZeroDivisionError"),
        ("import sys; sys.exit('no')", "cannot be imported: SystemExit"),
        ("", "it has no mapping EXTENSIONS of names to functions"),
        ("EXTENSIONS = []", "it has no mapping EXTENSIONS"),
        ("EXTENSIONS = {}", "it has no mapping EXTENSIONS"),
        ("EXTENSIONS = {b'x': print}", "b'x' in EXTENSIONS is not a name"),
        ("EXTENSIONS = {'': print}", "'' in EXTENSIONS is not a name"),
        ("EXTENSIONS = {'x' * 1024: print}", "'x+' in EXTENSIONS is not a name"),
        ("EXTENSIONS = {'a b': print}", "'a b' in EXTENSIONS is not a name"),
        (r"EXTENSIONS = {'\udc80': print}", r"'\\udc80' in EXTENSIONS is not a name"),
        ("EXTENSIONS = {'x': 5}", r"'x' in EXTENSIONS is not a name \(ASCII, no blanks\) with a function"),
        ("EXTENSIONS = {'cas': print}", "'cas' is the name of a built-in function; choose another"),
        ("EXTENSIONS = {'statestore': print}", "'statestore' is the name of a built-in"),
    ],
)
def test_what_cannot_be_loaded_is_named(place: Path, source: str | None, culprit: str) -> None:
    path = place / "bad.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ConfigurationError, match=rf"(?s)--ext .*bad\.py:? {culprit}") as refused:
        extensions.load(str(path))
    assert "\n" not in str(refused.value)


def test_a_module_that_is_not_there_is_named(place: Path) -> None:
    for module in ("nothing_of_the_kind", "nothing.of.the.kind", "..", ""):
        with pytest.raises(ConfigurationError, match=f"--ext {module} cannot be imported: "):
            extensions.load(module)


def test_no_two_modules_have_functions_of_one_name(place: Path) -> None:
    for name in ("one", "two"):
        (place / f"{name}.py").write_text(MODULE)
    with pytest.raises(ConfigurationError, match="--ext two: another module has a function 'take' too"):
        serve._functions(["one", "two"])


# -- being called


def serving(store: LocalStore, mask: Mask = OPEN, **functions: Function) -> ServerThread:
    named = {name.encode(): function for name, function in functions.items()}
    return ServerThread(store, options=ServerOptions(tcp_mask=mask, functions=named))


def test_a_function_works_on_the_records_and_answers() -> None:
    def add(records: Verbs, key: bytes, value: bytes) -> bytes | None:
        total = b"%d" % (int(records.get(key) or 0) + int(value))
        records.put(key, total)
        return total

    with serving(MemoryStore(), add=add) as server, server.connect() as client:
        replies = client.ask(ext(b"add", b"k", b"5"), ext(b"add", b"k", b"-7"), GET(b"k"), ext(b"subtract"), ext(PROBE))
    assert replies[:4] == [Reply(SUCCESS, b"5"), Reply(SUCCESS, b"-2"), Reply(SUCCESS, b"-2"), Reply(FAILURE)]
    assert replies[4].value.split()[-1] == b"add"


def test_none_is_failure_and_what_is_no_bytes_is_a_defect(caplog: pytest.LogCaptureFixture) -> None:
    answers: list[Any] = [None, bytearray(b"x"), memoryview(b"y"), b"", "t", 5, True, [1, 2]]

    def answer(records: Verbs, key: bytes, value: bytes) -> Any:
        return answers[int(key)]

    with serving(MemoryStore(), answer=answer) as server, server.connect() as client:
        assert client.ask(*[ext(b"answer", b"%d" % number) for number in range(len(answers))]) == [
            Reply(FAILURE),
            Reply(SUCCESS, b"x"),
            Reply(SUCCESS, b"y"),
            Reply(SUCCESS, b""),
            *4 * [Reply(STORE_FAILED)],
        ]
    assert "answer" in caplog.text


def test_a_function_that_raises_fails_alone_is_undone_and_logged_with_its_place(
    tmp_path: Path, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (place / "failing.py").write_text(MODULE)
    options = ServerOptions(tcp_mask=OPEN, functions=extensions.load("failing"))
    for store in (MemoryStore(), LMDBStore(tmp_path / "state.lmdb")):
        caplog.clear()
        with ServerThread(store, options=options) as server, server.connect() as client:
            assert client.ask(
                PUT(b"before", b"v"),
                ext(b"put_and_fail", b"k", b"halfway"),
                GET(b"k"),
                PUT(b"behind", b"v"),
                ext(b"put_and_fail", b"before", b"halfway"),
                ext(b"take", b"before"),
                RNUM(),
            ) == [
                OK,
                Reply(STORE_FAILED),
                Reply(FAILURE),
                OK,
                Reply(STORE_FAILED),
                Reply(SUCCESS, b"v"),
                Reply(SUCCESS, 1),
            ]
        assert "ValueError: a defect in a function" in caplog.text
        assert 'failing.py", line 10, in put_and_fail' in caplog.text


def test_whatever_a_function_does_is_told_once_with_its_place_and_the_server_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text(
        "import sys\n"
        "def boom(records, key, value):\n    return 1 // 0\n"
        "def leave(records, key, value):\n    sys.exit()\n"
        "def text(records, key, value):\n    return 'text'\n"
        "def wrong(records, key, value):\n    records.put(5, 5)\n"
        "EXTENSIONS = {'boom': boom, 'leave': leave, 'text': text, 'wrong': wrong}\n"
    )
    for db in ("memory:", str(tmp_path / "state.lmdb")):
        with ServerProcess(db, arguments=["--ext", str(path), "--unmask", "functions"]) as server:
            with RawClient(Address.parse(server.url)) as client:
                failed = [ext(b"boom"), ext(b"leave"), ext(b"text"), ext(b"wrong")]
                assert client.ask(*failed, RNUM()) == [*4 * [Reply(STORE_FAILED)], Reply(SUCCESS, 0)]
            said = server.output
        for name, what in (
            ("boom", "raised ZeroDivisionError: integer division or modulo by zero\nTraceback"),
            ("leave", "raised SystemExit\nTraceback"),
            ("text", "answered str, not bytes or None"),
            ("wrong", "raised TypeError: "),
        ):
            assert said.count(f"the function {name!r} of --ext {path} ") == 1, said
            assert f"the function {name!r} of --ext {path} {what}" in said
        assert said.count(f'File "{path}", line 3, in boom') == 1
        assert "uvloop" not in said
        assert "in guarded" not in said


def test_a_loaded_function_is_called_again_when_its_transaction_is_run_again(place: Path) -> None:
    (place / "growing.py").write_text(
        "def grow(records, key, value):\n    records.put(key, bytes(300_000))\n    return b''\n"
        "EXTENSIONS = {'grow': grow}\n"
    )
    functions = extensions.load("growing")
    store = LMDBStore(place / "state.lmdb", map_size=200_000)
    options = ServerOptions(tcp_mask=OPEN, functions=functions)
    with ServerThread(store, options=options) as server, server.connect() as client:
        assert client.ask(*[ext(b"grow", b"%d" % number) for number in range(10)], RNUM())[-1].value == 10


def test_an_outage_in_a_function_is_told_without_a_trace(caplog: pytest.LogCaptureFixture) -> None:
    def unavailable(records: Verbs, key: bytes, value: bytes) -> bytes:
        raise StoreUnavailable("what it asks is out of order")

    with serving(MemoryStore(), unavailable=unavailable) as server, server.connect() as client:
        assert client.ask(ext(b"unavailable")) == [Reply(STORE_FAILED)]
    assert "what it asks is out of order" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_result_that_is_too_long_for_a_reply_harms_no_neighbour() -> None:
    def long(records: Verbs, key: bytes, value: bytes) -> bytes:
        return bytes(3_000_000)

    with serving(MemoryStore(), long=long) as server, server.connect() as client:
        replies = client.ask(*[ext(b"long")] * 5, RNUM())
    assert [status for status, _ in replies] == [SUCCESS] * 6


def test_a_function_is_called_again_when_its_transaction_is_run_again(tmp_path: Path) -> None:
    called = []

    def grow(records: Verbs, key: bytes, value: bytes) -> bytes:
        count = int(records.get(b"count") or 0) + 1
        called.append(count)
        records.put(b"count", b"%d" % count)
        records.put(key, bytes(300_000))
        return b"%d" % count

    # The map has to grow several times meanwhile.
    with serving(LMDBStore(tmp_path / "state.lmdb", map_size=200_000), grow=grow) as server, server.connect() as client:
        replies = client.ask(*[ext(b"grow", b"k%d" % number) for number in range(10)], GET(b"count"))
    assert [value for _, value in replies] == [*[b"%d" % number for number in range(1, 11)], b"10"]
    assert len(called) > 10


# -- who may call them


def test_by_tcp_they_are_closed_until_somebody_opens_them() -> None:
    def yes(records: Verbs, key: bytes, value: bytes) -> bytes:
        return b"yes"

    for unmasked, status in (([], FORBIDDEN), (["functions"], SUCCESS), (["all"], SUCCESS)):
        with serving(MemoryStore(), Mask.of([], unmasked, CLOSED), yes=yes) as server, server.connect() as client:
            ((found, _),) = client.ask(ext(b"yes"))
            assert found == status
            assert client.ask(ext(CAS, b"k", swap.pack(None, b"v"))) == [Reply(SUCCESS, swap.SWAPPED)]


def test_a_server_process_offers_them(tmp_path: Path) -> None:
    path = tmp_path / "functions.py"
    path.write_text(MODULE)
    socket_path = str(tmp_path / "s")
    arguments = ["--ext", str(path), "--listen", f"unix:{socket_path}"]
    with ServerProcess(arguments=arguments) as server, RawClient(Address.parse(server.url)) as by_tcp:
        assert by_tcp.ask(PUT(b"k", b"v"), ext(b"take")) == [OK, Reply(FORBIDDEN)]  # so it listens at both
        with RawClient(Address(path=socket_path)) as by_unix:
            assert by_unix.ask(ext(b"take"), ext(b"take")) == [Reply(SUCCESS, b"v"), Reply(FAILURE)]
    with (
        ServerProcess(arguments=["--ext", str(path), "--unmask", "functions"]) as server,
        RawClient(Address.parse(server.url)) as by_tcp,
    ):
        assert by_tcp.ask(PUT(b"k", b"v"), ext(b"take")) == [OK, Reply(SUCCESS, b"v")]
