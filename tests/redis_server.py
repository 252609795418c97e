"""A real redis-server, for comparison with Beaker's own back end of that name."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from beaker_statestore.testing import free_port

__all__ = ["running_redis"]

#: How long it may take to start or to stop, in seconds.
PATIENCE = 20.0


@contextlib.contextmanager
def running_redis() -> Iterator[int]:
    """The port of 127.0.0.1 at which a redis-server of our own answers, for the length of a ``with``.

    It keeps nothing on disk beyond a temporary directory.

    :raises AssertionError: it is not installed, or does not start or stop in time; with what it printed.
    """
    program = shutil.which("redis-server")
    assert program, "there is no redis-server to compare with: apt-get install redis-server"
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="redis-server-") as directory:
        output = Path(directory, "output")
        # Without a file of settings, so that the machine's own have no say.
        command = [program, "--port", str(port), "--bind", "127.0.0.1", "--dir", directory]
        command += ["--save", "", "--appendonly", "no"]
        with output.open("wb") as file:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            _wait_until_it_answers(process, port, output)
            yield port
            process.terminate()
            code = process.wait(PATIENCE)
            assert code == 0, f"redis-server stopped with exit code {code}:\n{output.read_text()}"
        finally:
            if process.poll() is None:
                process.kill()
                process.wait(PATIENCE)


def _wait_until_it_answers(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    with redis.Redis(port=port, socket_timeout=1.0) as client:
        while True:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError):
                # Its process id, since somebody else could be the one who answers at our port.
                if client.info("server")["process_id"] == process.pid:
                    return
            code = process.poll()
            assert code is None, f"redis-server ended with exit code {code}:\n{output.read_text()}"
            assert time.monotonic() < deadline, f"redis-server did not answer in {PATIENCE} s:\n{output.read_text()}"
            time.sleep(0.01)
