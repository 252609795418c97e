"""Files that something has damaged: whoever reads them gets the data or an error, and never waits for ever.

LMDB keeps no checksums. What is changed within a value is read as it is (`store_key` finds it, see test_sealing), and
some changes within a page's structure end the process: those must not go unexplained, so the reader prints where it
was (faulthandler), and there must be few.
"""

from __future__ import annotations

import faulthandler
import os
import random
import signal
import struct
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from beaker_statestore.exceptions import ConfigurationError, StateStoreError, StoreUnavailable
from beaker_statestore.stores.base import LocalStore
from beaker_statestore.stores.cabinet import CabinetStore
from beaker_statestore.stores.lmdb import LMDBStore

#: How long a reader may take for everything, in seconds. It needs a hundredth of one.
DEADLINE: Final = 20
PAGE: Final = 4096

RECORDS: Final = {b"key %d" % number: b"%d" % number * (10 if number % 3 else 3000) for number in range(80)}

Damage = Callable[[bytearray, random.Random], None]


def _flip_bits(file: bytearray, chance: random.Random) -> None:
    for _ in range(chance.choice((1, 10, 100))):
        file[chance.randrange(len(file))] ^= 1 << chance.randrange(8)


def _cut(file: bytearray, chance: random.Random) -> None:
    del file[chance.randrange(len(file)) :]


def _clear(file: bytearray, chance: random.Random) -> None:
    start = chance.randrange(len(file))
    length = min(chance.choice((16, 512, PAGE)), len(file) - start)
    file[start : start + length] = bytes(length)


def _repeat(file: bytearray, chance: random.Random) -> None:
    """A page is where another should be."""
    source, target = (PAGE * chance.randrange(len(file) // PAGE) for _ in range(2))
    file[target : target + PAGE] = file[source : source + PAGE]


def _spoil_beginning(file: bytearray, chance: random.Random) -> None:
    file[chance.randrange(2) * PAGE + chance.randrange(152)] = chance.randrange(256)


def _spoil_structure(file: bytearray, chance: random.Random) -> None:
    """In a page of a tree: its head, its pointers, or the head of a node."""
    trees = [start for start in range(0, len(file), PAGE) if struct.unpack_from("@H", file, start + 10)[0] in (1, 2)]
    start = chance.choice(trees)
    (lower,) = struct.unpack_from("@H", file, start + 12)
    (node,) = struct.unpack_from("@H", file, start + chance.randrange(16, max(18, min(lower, PAGE)), 2))
    at = chance.choice((chance.randrange(lower), min(node, PAGE - 8) + chance.randrange(8)))
    file[start + at] = chance.randrange(256)


ANYWHERE: Final[list[Damage]] = [_flip_bits, _cut, _clear, _repeat]
DAMAGES: Final[list[Damage]] = [*ANYWHERE, _spoil_beginning, _spoil_structure]


def _open(path: Path) -> LocalStore:
    return LMDBStore(path) if path.suffix == ".lmdb" else CabinetStore(str(path), sync="os")


@pytest.fixture(scope="module", params=["lmdb"])
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A file with pages of all kinds, of the engine that its suffix says."""
    path = tmp_path_factory.mktemp("sound") / f"state.{request.param}"
    with _open(path) as store:
        for key, value in RECORDS.items():
            store.put(key, b"earlier " + value)
        for key, value in RECORDS.items():
            store.put(key, value)
    return path.read_bytes()


def _use(path: Path) -> str:
    """What comes of reading everything and then writing, in the worst case of all records."""
    outcomes = set()

    def attempt(work: Callable[[], object]) -> None:
        try:
            outcomes.add("right" if work() else "wrong")
        except StoreUnavailable as error:
            # So it looks when the number of the last page is spoiled.
            outcomes.add("full" if "cannot be made larger" in str(error) else _outage(path, error))
        except StateStoreError as error:
            outcomes.add("damage" if str(path) in str(error) else f"unnamed: {error}")

    try:
        with _open(path) as store:
            store.ping()
            for key, value in RECORDS.items():
                attempt(lambda key=key, value=value: store.get(key) == value)  # type: ignore[misc]
            attempt(lambda: list(store.keys()) == sorted(RECORDS))
            attempt(lambda: store.count() == len(RECORDS))
            attempt(lambda: store.add(b"new", b"n" * 9000))
            attempt(lambda: store.delete(b"key 1"))
    except StoreUnavailable as error:
        return _outage(path, error)
    except StateStoreError as error:
        return "damage" if str(path) in str(error) else f"unnamed: {error}"
    return " ".join(sorted(outcomes))


def _outage(path: Path, error: StoreUnavailable) -> str:
    """Tokyo Cabinet does not always tell damage from a disk that fails, so there it may be either."""
    return "failure" if path.suffix != ".lmdb" and str(path) in str(error) else f"outage: {error}"


def _in_child(work: Callable[[], str]) -> tuple[str, str]:
    """What ``work`` answers in a process of its own, or the signal that has ended it, and what that process said."""
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            try:
                os.dup2(said.fileno(), 2)
                faulthandler.enable(said)
                try:
                    os.write(answer.fileno(), work().encode())
                except BaseException as error:  # noqa: BLE001 - the parent tells
                    os.write(answer.fileno(), repr(error).encode())
            finally:
                os._exit(0)
        end = time.monotonic() + DEADLINE
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.monotonic() > end:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return "hang", ""
            time.sleep(0.001)
        answer.seek(0)
        said.seek(0)
        outcome = signal.Signals(ended[1] & 0x7F).name if ended[1] else answer.read().decode()
        return outcome, said.read().decode(errors="replace")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("variants", [30, pytest.param(500, marks=pytest.mark.long)])
@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_a_damaged_file_is_an_error_or_data_and_never_a_hang(
    tmp_path: Path, sound: bytes, damage: Damage, variants: int
) -> None:
    chance = random.Random(damage.__name__)
    outcomes: Counter[str] = Counter()
    for number in range(variants):
        path = tmp_path / f"{number}.lmdb"
        file = bytearray(sound)
        damage(file, chance)
        path.write_bytes(file)
        outcome, said = _in_child(lambda path=path: _use(path))  # type: ignore[misc]
        outcomes[outcome] += 1
        if outcome.startswith("SIG"):
            assert "Fatal Python error" in said
            assert "lmdbfile.py" in said
        else:
            assert set(outcome.split()) <= {"right", "wrong", "damage", "full"}, outcome
            assert "full" not in outcome or damage is _spoil_beginning
        path.unlink()
    print(damage.__name__, dict(outcomes))
    deaths = sum(count for outcome, count in outcomes.items() if outcome.startswith("SIG"))
    assert deaths <= (variants / 4 if damage is _spoil_structure else variants / 10)
    if damage is _cut:
        assert set(outcomes) == {"damage"}


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("variants", [5, pytest.param(100, marks=pytest.mark.long)])
@pytest.mark.parametrize("damage", ANYWHERE, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("sound", ["tch", "tcb"], indirect=True)
def test_a_damaged_file_of_tokyo_cabinets_is_an_error_or_data_and_never_a_hang(
    request: pytest.FixtureRequest, tmp_path: Path, sound: bytes, damage: Damage, variants: int
) -> None:
    chance = random.Random(damage.__name__)
    suffix = request.node.callspec.params["sound"]
    outcomes: Counter[str] = Counter()
    for number in range(variants):
        path = tmp_path / f"{number}.{suffix}"
        file = bytearray(sound)
        damage(file, chance)
        path.write_bytes(file)
        outcome, _ = _in_child(lambda path=path: _use(path))  # type: ignore[misc]
        outcomes[outcome] += 1
        assert set(outcome.split()) <= {"right", "wrong", "damage", "failure"}, outcome
    print(damage.__name__, dict(outcomes))
    if damage is _cut:
        assert set(outcomes) == {"damage"}


def test_a_format_of_tomorrow_is_no_outage(tmp_path: Path, sound: bytes) -> None:
    path = tmp_path / "state.lmdb"
    for page in (0, PAGE):
        file = bytearray(sound)
        struct.pack_into("@I", file, page + 20, 25)
        path.write_bytes(file)
        with pytest.raises(ConfigurationError, match=f"{path} is .*damaged at its beginning"), LMDBStore(path) as store:
            store.ping()
