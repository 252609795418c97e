"""``statestore who`` and ``statestore revoke``."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import pytest
from beaker.session import Session
from click.testing import CliRunner, Result

from beaker_statestore.cli import main
from beaker_statestore.router import RouterStateStorage
from beaker_statestore.settings import Settings
from beaker_statestore.slates import Slates


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "index": "user", "store_key": "0123456789abcdef" * 4}


@pytest.fixture
def ini(options: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "app.ini"
    lines = [f"beaker.session.{name} = {value}" for name, value in options.items()]
    path.write_text("\n".join(["[app:main]", *lines, ""]))
    return str(path)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def lines(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture
def zed(options: dict[str, Any]) -> Session:
    session = Session({}, id=uuid.uuid4().hex, use_cookies=False, type="ext:tcjson", **options)
    session["user"] = "zed@example.com"
    session.save()
    storage = RouterStateStorage(url=options["url"], prefix=options["prefix"], store_key=options["store_key"])
    storage.set("app.news", "zed@example.com", "MEMBER")
    return session


def test_a_persons_sessions_and_states(zed: Session, ini: str) -> None:
    session, state = lines(run("who", "zed@example.com", "--ini", ini))
    assert session.keys() == {"session", "begun", "used"}
    assert session["session"] == f"{zed.id[:8]}…"
    assert session["begun"].endswith("Z")
    assert state == {"key": "app.news", "state": "MEMBER"}


def test_for_reading(zed: Session, ini: str) -> None:
    printed = run("who", "zed@example.com", "--ini", ini, "--no-json").output
    assert zed.id[:8] in printed
    assert zed.id not in printed
    assert "MEMBER" in printed
    assert "nothing is known of nobody" in run("who", "nobody", "--ini", ini, "--no-json").output


def test_revoke_ends_logins_to_slates(ini: str) -> None:
    auth = Slates(Settings.of(ini)).auth
    tokens = [auth.issue("zed@example.com") for _ in range(2)]
    other = auth.issue("ann@example.com")
    assert lines(run("revoke", "zed@example.com", "--ini", ini)) == [{"ended": 0, "logins": 2}]
    assert [auth.check(token) for token in (*tokens, other)] == [None, None, "ann@example.com"]
    text = Path(ini).read_text()
    Path(ini).write_text(text.replace("beaker.session.index = user", ""))
    assert lines(run("revoke", "ann@example.com", "--ini", ini)) == [{"ended": 0, "logins": 1}]


def test_revoke_ends_sessions_and_leaves_states(zed: Session, ini: str, options: dict[str, Any]) -> None:
    assert lines(run("revoke", "zed@example.com", "--ini", ini)) == [{"ended": 1, "logins": 0}]
    zed["late"] = True
    zed.save()
    assert lines(run("who", "zed@example.com", "--ini", ini)) == [{"key": "app.news", "state": "MEMBER"}]
    assert "ended 0 sessions and 0 logins of" in run("revoke", "zed@example.com", "--ini", ini, "--no-json").output


def test_without_an_index_the_states_are_shown_and_the_remedy(zed: Session, options: dict[str, Any], ini: str) -> None:
    Path(ini).write_text(Path(ini).read_text().replace("beaker.session.index = user\n", ""))
    result = run("who", "zed@example.com", "--ini", ini)
    assert lines(result) == [{"key": "app.news", "state": "MEMBER"}]
    assert f"set beaker.session.index in {ini}, or give --by" in result.stderr
    assert len(lines(run("who", "zed@example.com", "--ini", ini, "--by", "user"))) == 2
    result = run("revoke", "zed@example.com", "--ini", ini)
    assert result.exit_code == 1
    assert "beaker.session.index = user" in result.stderr


@pytest.mark.parametrize("created", [1e20, -1e20, 1e300, 253402300800])
def test_times_that_no_calendar_has_are_left_out(zed: Session, ini: str, created: float) -> None:
    zed["_creation_time"] = created
    zed.save()
    session, _ = lines(run("who", "zed@example.com", "--ini", ini))
    assert session["begun"] is None
    assert session["used"].endswith("Z")
    assert run("who", "zed@example.com", "--ini", ini, "--no-json").exit_code == 0
