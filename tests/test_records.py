"""``statestore get put delete keys states ping``, in a pipe and on a terminal."""

from __future__ import annotations

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
from beaker_statestore.router import RouterStateStorage
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


def test_states_are_a_table_on_a_terminal(options: dict[str, Any], tmp_path: Path) -> None:
    ini = tmp_path / "app.ini"
    ini.write_text(f"[app:main]\nbeaker.session.url = {options['url']}\nbeaker.session.prefix = {options['prefix']}\n")
    storage = RouterStateStorage(**options)
    storage.set("news", "zed@example.com", "MEMBER")
    storage.set("news", "ada@example.com", "ERROR")
    storage.set("jazz", "zed@example.com", "CONFIRMING")
    rows = [line.split() for line in on_a_terminal("states", "--ini", str(ini)).splitlines()]
    assert rows == [
        ["sender", "key", "state"],
        ["ada@example.com", "news", "ERROR"],
        ["zed@example.com", "jazz", "CONFIRMING"],
        ["zed@example.com", "news", "MEMBER"],
    ]
    piped = CliRunner().invoke(main, ["states", "--ini", str(ini), "--state", "ERROR"]).output
    assert json.loads(piped) == {"sender": "ada@example.com", "key": "news", "state": "ERROR"}
    one = CliRunner().invoke(main, ["states", "zed@example.com", "--ini", str(ini)]).output
    assert [json.loads(line)["state"] for line in one.splitlines()] == ["CONFIRMING", "MEMBER"]


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
