"""``statestore reseal``: after it, an older key can be given up."""

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
from beaker_statestore.sessions import Sessions
from beaker_statestore.settings import Settings
from beaker_statestore.stores import open_store
from beaker_statestore.stores.base import Store
from beaker_statestore.stores.memory import MemoryStore

OLD, NEW = "old0" * 8, "new1" * 8


class Site:
    """An application whose ``store_key`` changes."""

    def __init__(self, options: dict[str, Any], directory: Path) -> None:
        self.options = {**options, "index": "user"}
        self.ini = directory / "app.ini"

    def with_key(self, key: str) -> dict[str, Any]:
        return {**self.options, "store_key": key}

    def reseal(self, key: str, *arguments: str) -> Result:
        lines = [f"beaker.session.{name} = {value}" for name, value in self.with_key(key).items()]
        self.ini.write_text("\n".join(["[app:main]", *lines, ""]))
        return CliRunner().invoke(main, ["reseal", str(self.ini), *arguments])

    def session(self, key: str, session_id: str) -> Session:
        return Session({}, id=session_id, use_cookies=False, type="ext:tcjson", **self.with_key(key))

    def fill(self, key: str) -> str:
        session = self.session(key, uuid.uuid4().hex)
        session["user"] = "zed"
        session.save()
        RouterStateStorage(**self.with_key(key)).set("app.news", "zed", "MEMBER")
        return str(session.id)

    def is_whole(self, key: str, session_id: str) -> bool:
        states = RouterStateStorage(**self.with_key(key)).states_of("zed")
        listed = Sessions(Settings.from_options(self.with_key(key))).of("zed")
        return self.session(key, session_id)["user"] == "zed" and states == {"app.news": "MEMBER"} and len(listed) == 1


@pytest.fixture
def site(options: dict[str, Any], tmp_path: Path) -> Site:
    return Site(options, tmp_path)


@pytest.mark.parametrize(
    ("before", "between", "after"),
    [(OLD, f"{NEW} {OLD}", NEW), ("", f"{NEW} plaintext", NEW), (OLD, f"plaintext {OLD}", "")],
)
def test_afterwards_the_older_key_can_be_given_up(site: Site, before: str, between: str, after: str) -> None:
    session_id = site.fill(before)
    first = site.reseal(between)
    assert json.loads(first.stdout) == {"seen": 3, "written": 3, "locked": []}
    assert site.is_whole(after, session_id)
    assert json.loads(site.reseal(between).stdout)["written"] == 0


def test_a_dry_run_only_counts(site: Site, store: Store) -> None:
    session_id = site.fill(OLD)
    before = {key: store.get(key) for key in store.keys(site.options["prefix"].encode())}
    result = site.reseal(f"{NEW} {OLD}", "--dry-run", "--no-json")
    assert result.stdout == "3 of 3 records would be written anew\n"
    assert {key: store.get(key) for key in store.keys(site.options["prefix"].encode())} == before
    assert site.is_whole(OLD, session_id)


def test_what_cannot_be_opened_is_named_and_left(site: Site) -> None:
    session_id = site.fill(OLD)
    result = site.reseal(NEW, "--no-json")
    assert result.exit_code == 1
    assert "there is no key here for" in result.stdout
    assert "index:user:zed" in result.stdout
    assert session_id not in result.stdout
    assert site.is_whole(OLD, session_id)


def test_what_is_changed_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"memory:{uuid.uuid4().hex}"
    site = Site({"url": url}, tmp_path)
    session_id = site.fill(OLD)
    slow = site.session(f"{NEW} {OLD}", session_id)
    modify = MemoryStore.modify

    def after_a_change(self: MemoryStore, key: bytes, *arguments: Any, **options: Any) -> Any:
        monkeypatch.undo()
        if b"session:" in key:
            slow["n"] = 1
            slow.save()
        else:
            monkeypatch.setattr(MemoryStore, "modify", after_a_change)
        return modify(self, key, *arguments, **options)

    monkeypatch.setattr(MemoryStore, "modify", after_a_change)
    assert site.reseal(f"{NEW} {OLD}").exit_code == 0
    assert site.session(NEW, session_id)["n"] == 1
    assert open_store(url).get(f"session:{session_id}".encode())


def test_size_and_expiry_keep_nothing_under_the_older_key(site: Site, store: Store) -> None:
    session_id = site.fill(OLD)
    session = site.session(OLD, session_id)
    session["text"] = "x" * 5000
    session.save()
    site.options["max_value"] = 1000
    expired = site.session(f"{OLD}", uuid.uuid4().hex)
    expired.namespace.store.put(
        f"{site.options['prefix']}session:{expired.id}".encode(), b'{"_expires":1700000000,"_sealed":"AQ=="}'
    )
    assert json.loads(site.reseal(f"{NEW} {OLD}").stdout) == {"seen": 4, "written": 3, "locked": []}
    del site.options["max_value"]
    assert site.is_whole(NEW, session_id)
