"""``statestore get put delete keys states ping``, in a pipe and on a terminal."""

from __future__ import annotations

import base64
import json
import os
import pty
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from beaker_statestore.cli import main
from beaker_statestore.namespace import TCJSONNamespaceManager
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.stores import open_store
from beaker_statestore.testing import ServerProcess, free_port


@pytest.fixture
def prefix(options: dict[str, Any]) -> str:
    return str(options["prefix"])


@pytest.fixture
def options(tyrant_server: ServerProcess, request: pytest.FixtureRequest) -> dict[str, Any]:
    return {"url": tyrant_server.url, "prefix": f"records/{abs(hash(request.node.name))}."}


@pytest.fixture
def run(tyrant_server: ServerProcess) -> Any:
    """Runs the command with its output in a pipe."""

    def run(*arguments: str, stdin: bytes | None = None, url: str | None = tyrant_server.url) -> Result:
        where = [] if url is None else ["--url", url]
        return CliRunner().invoke(main, [*arguments, *where], input=stdin)

    return run


@pytest.fixture
def ini(options: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "app.ini"
    path.write_text(f"[app:main]\nbeaker.session.url = {options['url']}\nbeaker.session.prefix = {options['prefix']}\n")
    return str(path)


def on_a_terminal(*arguments: str, width: int = 80) -> str:
    """What a real process prints on a real terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "beaker_statestore", *arguments]
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": str(width)}
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, stdin=subprocess.DEVNULL, env=environment) as process:
        os.close(theirs)
        printed = b""
        try:
            while piece := os.read(ours, 65536):
                printed += piece
        except OSError:
            pass  # how Linux says that the other side is closed
        finally:
            os.close(ours)
        process.wait(20)
    return printed.decode().replace("\r\n", "\n")


def test_a_document_is_put_got_and_deleted(run: Any, prefix: str) -> None:
    key = f"{prefix}session:x"
    assert run("put", key, '{"user": "ünï"}').exit_code == 0
    got = run("get", key)
    assert got.output == '{"user": "ünï"}\n'
    assert run("delete", key).exit_code == 0
    missing = run("get", key)
    assert missing.exit_code == 1
    assert missing.output == f"Error: there is no record {key}\n"
    assert run("delete", key).exit_code == 1


def test_a_document_comes_from_standard_input(run: Any, prefix: str) -> None:
    assert run("put", f"{prefix}k", stdin=b'{"a": [1, 2]}').exit_code == 0
    assert json.loads(run("get", f"{prefix}k").output) == {"a": [1, 2]}


@pytest.mark.parametrize("text", ["[1]", "text", '{"a": NaN}', ""])
def test_what_is_no_document_is_not_stored_unless_raw(run: Any, prefix: str, text: str) -> None:
    refused = run("put", f"{prefix}k", stdin=text.encode())
    assert refused.exit_code == 1
    assert "--raw stores it all the same" in refused.output
    assert run("get", f"{prefix}k").exit_code == 1
    assert run("put", "--raw", f"{prefix}k", stdin=text.encode()).exit_code == 0
    unread = run("get", f"{prefix}k")
    assert unread.exit_code == 1
    assert "--raw prints it as it is" in unread.output
    assert run("get", "--raw", f"{prefix}k").stdout_bytes == text.encode()


def test_keys_are_json_in_a_pipe_and_text_on_a_terminal(run: Any, prefix: str, tyrant_server: ServerProcess) -> None:
    for name in ("b", "a", "c"):
        run("put", f"{prefix}{name}", "{}")
    assert [json.loads(line) for line in run("keys", prefix).output.splitlines()] == [prefix + n for n in "abc"]
    assert run("keys", prefix, "--no-json").output.splitlines() == [prefix + name for name in "abc"]
    assert run("keys", prefix, "--limit", "2", "--no-json").output.splitlines() == [prefix + name for name in "ab"]
    printed = on_a_terminal("keys", prefix, "--url", tyrant_server.url)
    assert printed.splitlines() == [prefix + name for name in "abc"]


def test_states_are_a_table_on_a_terminal(options: dict[str, Any], ini: str) -> None:
    storage = RouterStateStorage(**options)
    storage.set("news", "zed@example.com", "MEMBER")
    storage.set("news", "ada@example.com", "ERROR")
    storage.set("jazz", "zed@example.com", "CONFIRMING")
    rows = [line.split() for line in on_a_terminal("states", "--ini", ini).splitlines()]
    assert rows == [
        ["sender", "key", "state"],
        ["ada@example.com", "news", "ERROR"],
        ["zed@example.com", "jazz", "CONFIRMING"],
        ["zed@example.com", "news", "MEMBER"],
    ]
    piped = CliRunner().invoke(main, ["states", "--ini", ini, "--state", "ERROR"]).output
    assert json.loads(piped) == {"sender": "ada@example.com", "key": "news", "state": "ERROR"}
    one = CliRunner().invoke(main, ["states", "zed@example.com", "--ini", ini]).output
    assert [json.loads(line)["state"] for line in one.splitlines()] == ["CONFIRMING", "MEMBER"]


@pytest.mark.parametrize(
    ("sender", "shown"),
    [
        ("mailer [/daemon] <x@y>", "mailer [/daemon] <x@y>"),
        ("[bold]a@b", "[bold]a@b"),
        (":smile:@b", ":smile:@b"),
        ("\x1b]0;owned\x07@x", r"\u001b]0;owned\u0007@x"),
        ("\x9b2J\x7f\u202e@x", r"\u009b2J\u007f\u202e@x"),
    ],
)
def test_no_sender_is_obeyed_by_the_terminal(
    options: dict[str, Any], ini: str, run: Any, prefix: str, sender: str, shown: str
) -> None:
    RouterStateStorage(**options).set("news", sender, "ERROR")
    assert on_a_terminal("states", "--ini", ini).splitlines()[1].split("  ")[0] == shown
    [piped] = run("states", "--ini", ini, url=None).output.splitlines()
    assert piped.isprintable()
    assert json.loads(piped) == {"sender": sender, "key": "news", "state": "ERROR"}

    key = f"{prefix}{sender}"
    open_store(options["url"]).put(key.encode(), json.dumps({"who": sender}).encode())
    assert on_a_terminal("keys", key, "--ini", ini) == f"{prefix}{shown}\n"
    assert json.loads(run("keys", key).output) == key
    assert on_a_terminal("get", key, "--ini", ini) == f'{{\n  "who": "{shown}"\n}}\n'
    assert json.loads(run("get", key).output) == {"who": sender}


def test_a_narrow_terminal_shows_the_whole_address(options: dict[str, Any], ini: str) -> None:
    sender = f"{'a-long-name.' * 5}@lists.example.com"
    RouterStateStorage(**options).set("news", sender, "ERROR")
    rows = on_a_terminal("states", "--ini", ini, width=40).splitlines()[1:]
    assert len(rows) > 1
    assert "".join(row.split()[0] for row in rows) == sender


def test_keys_that_are_not_text_are_told_apart(run: Any, options: dict[str, Any], ini: str) -> None:
    prefix = options["prefix"].encode()
    stored = {prefix + name for name in (b"\xff", b"\\xff", b"\xfe")}
    for key in stored:
        open_store(options["url"]).put(key, b'{"a": 1}')
    printed = [json.loads(line) for line in run("keys", options["prefix"]).output.splitlines()]
    assert {k.encode() if isinstance(k, str) else base64.b64decode(k["base64"]) for k in printed} == stored
    assert len(printed) == len(stored)
    assert '{"base64": "..."}' in run("keys", "--help").output
    assert json.loads(on_a_terminal("get", os.fsdecode(prefix + b"\xff"), "--ini", ini)) == {"a": 1}


def test_a_document_is_indented_on_a_terminal(run: Any, prefix: str, tyrant_server: ServerProcess) -> None:
    run("put", f"{prefix}k", '{"user": "zed"}')
    assert on_a_terminal("get", f"{prefix}k", "--url", tyrant_server.url) == '{\n  "user": "zed"\n}\n'


def test_ping_answers_how_soon(run: Any, tyrant_server: ServerProcess) -> None:
    answer = json.loads(run("ping").output)
    assert answer["url"] == tyrant_server.url
    assert answer["milliseconds"] > 0
    assert "answers in" in on_a_terminal("ping", "--url", tyrant_server.url)


def test_an_outage_is_one_line_and_exit_status_1(run: Any) -> None:
    nobody = f"127.0.0.1:{free_port()}"
    failed = run("ping", url=nobody)
    assert failed.exit_code == 1
    assert failed.output.count("\n") == 1
    assert nobody in failed.output
    assert "statestore serve" in failed.output


def test_two_ways_to_say_which_store_are_one_too_many(run: Any, tmp_path: Path) -> None:
    refused = run("ping", "--ini", str(tmp_path / "app.ini"))
    assert refused.exit_code == 2
    assert "give one of them" in refused.output


def test_the_variable_counts_only_where_nothing_else_says_which_store(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATESTORE_URL", options["url"])
    assert CliRunner().invoke(main, ["ping"]).exit_code == 0
    monkeypatch.setenv("STATESTORE_URL", "127.0.0.1:1")
    ini = tmp_path / "two.ini"
    ini.write_text(f"[app:a]\nbeaker.session.url = {options['url']}\n[app:b]\nbeaker.session.url = 127.0.0.1:1\n")
    assert CliRunner().invoke(main, ["ping", "--ini", str(ini), "--section", "app:a"]).exit_code == 0
    unsure = CliRunner().invoke(main, ["ping", "--ini", str(ini)])
    assert "say which section" in unsure.output


# -- session ids

ID = "0123456789abcdef0123456789abcdef"
HASH = "fedcba9876543210" * 4


def test_listings_show_no_whole_session_id(run: Any, prefix: str, ini: str) -> None:
    for key in (f"session:{ID}", f"session:sha256-{HASH}", f"lock:session:{ID}"):
        run("put", prefix + key, "{}")
    shown = [prefix + key for key in ("lock:session:01234567…", "session:01234567…", "session:sha256-fedcba98…")]
    assert [json.loads(line) for line in run("keys", prefix).output.splitlines()] == shown
    assert on_a_terminal("keys", prefix, "--ini", ini).splitlines() == shown


@pytest.mark.parametrize(
    "abbreviation",
    ["session:01234567…", "session:01234567", "session:0123456789ab", "session:0123456789ab…", f"session:{ID}"],
)
def test_a_session_is_found_by_the_beginning_of_its_id(run: Any, prefix: str, abbreviation: str) -> None:
    for key in (f"session:{ID}", f"session:{ID}:cart", f"session:{'0123456f' * 4}", f"session:sha256-{HASH}"):
        run("put", prefix + key, json.dumps({"key": key}))
    assert json.loads(run("get", prefix + abbreviation).output) == {"key": f"session:{ID}"}
    assert json.loads(run("get", f"{prefix}session:01234567…:cart").output) == {"key": f"session:{ID}:cart"}
    assert json.loads(run("get", f"{prefix}session:sha256-fedcba98…").output) == {"key": f"session:sha256-{HASH}"}
    assert run("delete", prefix + abbreviation).exit_code == 0
    gone = run("get", prefix + abbreviation)
    assert gone.exit_code == 1
    assert gone.output.startswith(f"Error: there is no record {prefix}session:01234567")
    assert ID not in gone.output
    assert len(run("keys", prefix).output.splitlines()) == 3


@pytest.mark.parametrize("command", ["get", "delete"])
def test_an_abbreviation_of_several_is_of_none(run: Any, prefix: str, command: str) -> None:
    for end in "ab":
        run("put", f"{prefix}session:{ID[:-1]}{end}", "{}")
    refused = run(command, f"{prefix}session:0123456789…")
    assert refused.exit_code == 1
    assert refused.output == f"Error: {prefix}session:01234567… stands for 2 records; give more of the id\n"
    assert len(run("keys", prefix).output.splitlines()) == 2


@pytest.mark.parametrize("command", ["delete", "get"])
@pytest.mark.parametrize("key", ["session:tenant-1", "session:0123456789-1", "session:01234567:x"])
def test_a_key_without_the_form_of_an_id_stands_for_itself_alone(
    run: Any, prefix: str, options: dict[str, Any], key: str, command: str
) -> None:
    store = open_store(options["url"])
    others = [f"{prefix}{key}{more}".encode() for more in ("0", "00000000", "…", ":a")]
    store.put_many(dict.fromkeys(others, b"{}"))
    assert run(command, prefix + key).exit_code == 1
    assert run(command, f"{prefix}session:tenant-1…0").exit_code == 1
    assert list(store.keys(prefix.encode())) == sorted(others)


def test_the_beginning_of_an_id_stands_only_for_whole_ids(run: Any, prefix: str, options: dict[str, Any]) -> None:
    store = open_store(options["url"])
    others = [f"{prefix}session:{ID[:9]}{more}".encode() for more in ("", ID, "-x", f"{ID[9:]}0")]
    store.put_many(dict.fromkeys(others, b"{}"))
    for _ in range(2):
        assert run("delete", f"{prefix}session:{ID[:8]}").exit_code == 1
        assert run("delete", f"{prefix}session:{ID[:8]}…").exit_code == 1
    missing = run("get", f"{prefix}session:{ID[:-1]}")
    assert missing.output == f"Error: there is no record {prefix}session:01234567…\n"
    assert list(store.keys(prefix.encode())) == sorted(others)


def test_nothing_is_put_under_an_abbreviation(run: Any, prefix: str) -> None:
    refused = run("put", f"{prefix}session:01234567…", "{}")
    assert refused.exit_code == 1
    assert "give the whole session id" in refused.output
    assert run("keys", prefix).output == ""
    assert run("put", f"{prefix}cache:ns:more…", "{}").exit_code == 0


@pytest.mark.parametrize("key", ["session:0123456…", "session:0123456", "session:sha256-f…", "cache:ns:01234567…"])
def test_too_little_finds_nothing(run: Any, prefix: str, key: str) -> None:
    for there in (f"session:{ID}", f"session:sha256-{HASH}", f"cache:ns:{ID}"):
        run("put", prefix + there, "{}")
    assert run("delete", prefix + key).exit_code == 1
    assert len(run("keys", prefix).output.splitlines()) == 3


def test_an_index_shows_no_whole_session_id_but_raw(run: Any, prefix: str, ini: str) -> None:
    twin = f"01234567{'0' * 24}"
    text = json.dumps({ID: 1.5, twin: 2.5, f"sha256-{HASH}": [ID]})
    run("put", f"{prefix}index:user:zed", text)
    shown = {"01234567…": 1.5, "01234567… (2)": 2.5, "sha256-fedcba98…": ["01234567…"]}
    assert json.loads(run("get", f"{prefix}index:user:zed").output) == shown
    assert json.loads(on_a_terminal("get", f"{prefix}index:user:zed", "--ini", ini)) == shown
    assert json.loads(run("get", "--raw", f"{prefix}index:user:zed").output) == json.loads(text)
    run("put", f"{prefix}cache:ns:zed", text)
    assert json.loads(run("get", f"{prefix}cache:ns:zed").output) == json.loads(text)


# -- store_key

SESSION_KEY = "ab" * 32
CACHE_KEY = "cd" * 32


@pytest.fixture
def sealed_ini(options: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "sealed.ini"
    lines = [f"beaker.{part}.{name} = {value}" for part in ("session", "cache") for name, value in options.items()]
    lines += [f"beaker.session.store_key = {SESSION_KEY}", f"beaker.cache.store_key = {CACHE_KEY}"]
    lines += ["beaker.cache.regions = short", "beaker.cache.short.expire = 60"]
    path.write_text("\n".join(["[app:main]", *lines, ""]))
    return str(path)


def test_a_caches_records_are_read_and_written_by_its_own_key(
    run: Any, prefix: str, options: dict[str, Any], sealed_ini: str
) -> None:
    pages = TCJSONNamespaceManager("pages", **options, store_key=CACHE_KEY)
    pages.set_value("a", (1.0, None, {"x": 1}))
    key = f"{prefix}cache:pages:a"
    document = json.loads(run("get", key, "--ini", sealed_ini, url=None).output)
    assert document["value"] == {"x": 1}
    document["value"] = {"x": 2}
    assert run("put", key, json.dumps(document), "--ini", sealed_ini, url=None).exit_code == 0
    assert pages["a"] == (1.0, None, {"x": 2})
    assert b"_sealed" in (open_store(options["url"]).get(key.encode()) or b"")
    assert run("delete", key, "--ini", sealed_ini, url=None).exit_code == 0
    assert "a" not in pages


def test_a_caches_records_are_where_the_cache_is(tmp_path: Path) -> None:
    path = tmp_path / "two.ini"
    path.write_text(
        f"[app:main]\nbeaker.session.url = lmdb://{tmp_path}/sessions.lmdb\n"
        f"beaker.cache.url = lmdb://{tmp_path}/cache.lmdb\n"
    )
    for key in ("session:x", "cache:a:b"):
        assert CliRunner().invoke(main, ["put", key, "{}", "--ini", str(path)]).exit_code == 0
    assert list(open_store(f"lmdb://{tmp_path}/sessions.lmdb").keys()) == [b"session:x"]
    assert list(open_store(f"lmdb://{tmp_path}/cache.lmdb").keys()) == [b"cache:a:b"]


def test_nothing_is_put_into_a_cache_whose_key_nobody_knows(
    run: Any, prefix: str, options: dict[str, Any], sealed_ini: str
) -> None:
    TCJSONNamespaceManager("pages", **options, store_key=CACHE_KEY).set_value("a", (1.0, None, 1))
    path = Path(sealed_ini)
    path.write_text(path.read_text().replace("beaker.cache.url", "beaker.cache.short.url"))
    key = f"{prefix}cache:pages:a"
    before = open_store(options["url"]).get(key.encode())
    refused = run("put", key, "{}", "--ini", sealed_ini, url=None)
    assert refused.exit_code == 1
    assert "beaker.cache.url is not set" in refused.output
    assert open_store(options["url"]).get(key.encode()) == before
    shown = run("get", key, "--ini", sealed_ini, url=None)
    assert "is sealed" in shown.output


def test_locks_are_read_in_the_clear(run: Any, prefix: str, options: dict[str, Any], sealed_ini: str) -> None:
    pages = TCJSONNamespaceManager("pages", **options, store_key=CACHE_KEY)
    lock = pages.get_creation_lock("a")
    assert lock.acquire()
    try:
        [key] = [json.loads(line) for line in run("keys", f"{prefix}lock:").output.splitlines()]
        got = run("get", key, "--ini", sealed_ini, url=None)
        assert got.exit_code == 0, got.output
        assert "_expires" in json.loads(got.output)
    finally:
        lock.release()
