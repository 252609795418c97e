"""`statestore copy`: what is in one store comes to another, whole or with a word on what is missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import simplejson
from click.testing import CliRunner

from beaker_statestore.cli import main
from beaker_statestore.stores import open_store
from beaker_statestore.stores.cabinet import CabinetStore
from beaker_statestore.testing import ServerProcess

#: More than one page of keys, and more than one group of bytes.
RECORDS = {b"session:%04d" % number: os.urandom(number * 10) for number in range(1000)} | {b"": b"", b"\xff\0": b"\0"}


def copied(*arguments: str) -> Any:
    done = CliRunner().invoke(main, ["copy", *arguments])
    assert done.exit_code == 0, done.output
    return simplejson.loads(done.output)


def refused(*arguments: str) -> str:
    done = CliRunner().invoke(main, ["copy", *arguments])
    assert done.exit_code == 1, done.output
    return done.output


@pytest.mark.parametrize("file", ["casket.tch#bnum=1000", "casket.tcb"])
def test_what_an_original_server_has_left_comes_to_lmdb_and_back(tmp_path: Path, file: str) -> None:
    old, new = f"{tmp_path}/{file}", f"{tmp_path}/state.lmdb"
    with CabinetStore(old, sync="os") as store:
        store.put_many(RECORDS)
    assert copied(old, new) == {"copied": len(RECORDS), "source": len(RECORDS)}
    with open_store(f"lmdb://{new}") as store:
        assert store.get_many(RECORDS) == RECORDS
        assert store.count() == len(RECORDS)
    assert copied(new, f"{tmp_path}/again.tcb")["copied"] == len(RECORDS)


def test_it_goes_from_server_to_server(tmp_path: Path) -> None:
    with ServerProcess("memory:") as here, ServerProcess(f"{tmp_path}/state.lmdb") as there:
        with open_store(here.url) as store:
            store.put_many(RECORDS)
        assert copied(here.url, there.url, "--prefix", "session:000") == {"copied": 10, "source": len(RECORDS)}
        with open_store(there.url) as store:
            assert store.get_many(RECORDS) == {key: RECORDS[key] for key in RECORDS if key.startswith(b"session:000")}


def test_a_store_that_has_records_is_written_to_only_if_that_is_meant(tmp_path: Path) -> None:
    old, new = f"{tmp_path}/old.lmdb", f"{tmp_path}/new.lmdb"
    with open_store(f"lmdb://{old}") as store:
        store.put_many({b"a": b"1", b"b": b"2"})
    with open_store(f"lmdb://{new}") as store:
        store.put_many({b"b": b"theirs", b"c": b"3"})
    assert "has 2 records already; give --overwrite" in refused(old, new)
    with open_store(f"lmdb://{new}") as store:
        assert store.get(b"b") == b"theirs"
    assert copied(old, new, "--overwrite")["copied"] == 2
    with open_store(f"lmdb://{new}") as store:
        assert store.get_many([b"a", b"b", b"c"]) == {b"a": b"1", b"b": b"2", b"c": b"3"}


def test_of_a_key_with_several_values_the_first_comes_and_the_difference_is_shown(tmp_path: Path) -> None:
    with CabinetStore(f"{tmp_path}/casket.tcb") as store:
        store.apply([lambda verbs: verbs.native["misc"](b"putlist", [b"k", b"1", b"k", b"2"], 0)])
    assert copied(f"{tmp_path}/casket.tcb", f"{tmp_path}/state.lmdb") == {"copied": 1, "source": 2}


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("state.lmdb", "./state.lmdb", "are both lmdb:"),
        ("casket.tct", "state.lmdb", "casket.tct"),
        ("none.tch", "state.lmdb", "there is no file"),
        ("none.lmdb", "state.lmdb", "there is no file"),
        ("nowhere:", "state.lmdb", "unknown scheme 'nowhere'"),
        ("127.0.0.1:1", "state.lmdb", "no Tyrant server answers at 127.0.0.1:1"),
    ],
)
def test_what_cannot_be_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert said in refused(source, target)
