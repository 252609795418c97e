"""The wall clock jumps while a server runs: deadlines do not notice, and what has not expired stays.

libfaketime answers the server's questions for the time of day from a file, and leaves its monotonic clock alone, as
`settimeofday` would.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from beaker_statestore.tyrant.address import Address
from beaker_statestore.tyrant.commands import GET, PUT, STAT, SUCCESS, Reply
from beaker_statestore.tyrant.wire import encode_request
from tests.faults.servers import Misled, eventually
from tests.serving import RawClient

HOUR: Final = 3600
TEN_YEARS: Final = 3650 * 24 * HOUR


class Clock:
    """The time of day, as a process started `by` it believes."""

    def __init__(self, directory: Path) -> None:
        self._file = directory / "clock"
        self.jump(0)
        self.by = ["env", f"FAKETIME_TIMESTAMP_FILE={self._file}", "FAKETIME_NO_CACHE=1"]
        self.by += ["FAKETIME_DONT_FAKE_MONOTONIC=1", f"LD_PRELOAD={_library()}"]

    def jump(self, seconds: int) -> None:
        """Be so far from the true time from now on."""
        new = self._file.with_suffix(".new")
        new.write_text(f"{seconds:+d}")
        new.rename(self._file)


def _library() -> Path:
    """The one for programs with threads."""
    found = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
    assert found, "the tests of clocks need libfaketime: apt-get install faketime"
    return found[0]


def _time_of(client: RawClient) -> float:
    ((status, text),) = client.ask(STAT())
    assert status == SUCCESS
    return float(dict(line.split(b"\t") for line in text.splitlines())[b"time"])


@contextmanager
def _jumping_server(tmp_path: Path, *arguments: str) -> Iterator[tuple[Misled, Callable[[int], None]]]:
    """A server, and what makes its clock jump and returns when it has."""
    clock = Clock(tmp_path)
    with Misled(str(tmp_path / "state.lmdb"), by=clock.by, arguments=arguments) as server:

        def jump(seconds: int) -> None:
            clock.jump(seconds)
            with RawClient(Address.parse(server.url)) as client:
                eventually(lambda: abs(_time_of(client) - time.time() - seconds) < 60, "the clock has jumped")

        yield server, jump


def test_a_servers_deadlines_do_not_notice_when_the_clock_jumps(tmp_path: Path) -> None:
    with _jumping_server(tmp_path, "--patience", "0.5") as (server, jump):
        address = Address.parse(server.url)
        with RawClient(address) as idle:
            assert idle.ask(PUT(b"k", b"v")) == [Reply(SUCCESS)]
            for seconds in (HOUR, -HOUR, 0, -TEN_YEARS):
                with RawClient(address) as slow:
                    began = time.monotonic()  # before its patience begins to run
                    slow.send(encode_request(PUT(b"k", b"w"))[:-1])
                    jump(seconds)
                    # Neither at once nor never.
                    assert slow.is_closed()
                    assert time.monotonic() - began > 0.45
                assert idle.ask(GET(b"k")) == [Reply(SUCCESS, b"v")]


def _document(expires: float) -> bytes:
    return json.dumps({"_expires": int(expires)}).encode()


def test_sweeps_go_by_the_clock_of_the_moment_and_on_whatever_it_does(tmp_path: Path) -> None:
    now = time.time()
    documents = {
        b"state:over": _document(now - 2 * HOUR),
        b"state:soon": _document(now + HOUR / 2),
        b"state:later": _document(now + 2 * HOUR),
        b"state:never": b"{}",
    }
    with (
        _jumping_server(tmp_path, "--sweep", "0.1") as (server, jump),
        RawClient(Address.parse(server.url)) as client,
    ):

        def there() -> set[bytes]:
            replies = client.ask(*map(GET, documents))
            return {key for key, (status, _) in zip(documents, replies, strict=True) if status == SUCCESS}

        def swept() -> bool:
            """Whether a sweep has come to the last record, which has expired by any clock."""
            return client.ask(GET(b"state:~"))[0].status != SUCCESS

        def jump_and_sweep(seconds: int) -> set[bytes]:
            jump(seconds)
            for _ in range(2):  # the clock may have jumped amid the first
                assert client.ask(PUT(b"state:~", _document(now - TEN_YEARS - 24 * HOUR))) == [Reply(SUCCESS)]
                eventually(swept, "a sweep")
            return there()

        jump(-TEN_YEARS)
        client.ask(*(PUT(key, value) for key, value in documents.items()))
        # By a clock that is behind, nothing is over yet; nothing is lost.
        assert jump_and_sweep(-TEN_YEARS) == set(documents)
        assert jump_and_sweep(-3 * HOUR) == set(documents)
        # It is right again.
        assert jump_and_sweep(0) == {b"state:soon", b"state:later", b"state:never"}
        # By a clock that is ahead, an hour's worth is over too early: see the documentation of expiry.
        assert jump_and_sweep(HOUR) == {b"state:later", b"state:never"}
        assert jump_and_sweep(0) == {b"state:later", b"state:never"}


#: Prints what a session has, at each line that it reads.
_VISITS = """
import sys
from beaker.session import Session
from beaker_statestore.namespace import register
register()
def session():
    return Session({}, id="0" * 32, use_cookies=False, type="ext:tcjson", url=sys.argv[1], timeout=1800)
first = session()
first["user"] = "ann"
first.save()
print("ready", flush=True)
for line in sys.stdin:
    now = session()
    print(now.get("user"), flush=True)
    if "user" in now:
        now.save()
"""


def test_a_clock_that_is_set_back_logs_nobody_out_and_one_set_on_by_more_than_the_timeout_does(tmp_path: Path) -> None:
    clock = Clock(tmp_path)
    with (
        Misled("memory:") as server,
        subprocess.Popen(
            [*clock.by, sys.executable, "-c", _VISITS, server.url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as visits,
    ):
        try:
            assert visits.stdin is not None
            assert visits.stdout is not None
            assert visits.stdout.readline() == "ready\n"

            def user(seconds: int) -> str:
                clock.jump(seconds)
                print(file=visits.stdin, flush=True)
                return visits.stdout.readline().strip()  # type: ignore[union-attr]

            assert user(0) == "ann"
            assert user(HOUR // 3) == "ann"
            assert user(-HOUR) == "ann"
            assert user(-TEN_YEARS) == "ann"
            assert user(0) == "ann"
            assert user(HOUR) == "None"
        finally:
            visits.kill()
