"""How many requests a second Beaker's middleware serves, by where it keeps the sessions.

    .venv/bin/python -m benchmarks.sessions

Each round takes every back end in turn, so that whatever else the machine does strikes all alike; what is printed is
the best of all rounds, and its ratio to Beaker's own ``ext:redis`` over a redis-server that keeps everything in memory.
One thread, one visitor after another, no HTTP: what is measured is Beaker and the store.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from beaker.middleware import SessionMiddleware
from rich.console import Console
from rich.table import Table

from beaker_statestore.testing import ServerProcess
from tests.redis_server import running_redis

ROUNDS: Final = 5
REQUESTS: Final = 300
#: About 2 kB, as sessions of web shops are.
CONTENT: Final = {
    "user": "zed@example.com",
    "cart": [{"sku": f"item-{n}", "n": n, "note": "x" * 50} for n in range(20)],
}
PEER: Final = "ext:redis"
KEY: Final = "0123456789abcdef" * 4


def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    """Reads the session; changes it if the path says so."""
    session = environ["beaker.session"]
    session.get("user")
    if environ["PATH_INFO"] == "/write":
        session.update(CONTENT)
        session["n"] = session.get("n", 0) + 1
        session.save()
    start_response("200 OK", [])
    return [b""]


def requests_per_second(app: Any, path: str) -> float:
    """Of one visitor."""
    cookies: list[str] = []

    def start_response(_status: str, headers: list[tuple[str, str]], _exc_info: Any = None) -> None:
        cookies.extend(value.partition(";")[0].strip() for name, value in headers if name == "Set-cookie")

    list(app({"PATH_INFO": "/write"}, start_response))
    cookie = cookies[0]
    began = time.perf_counter()
    for _ in range(REQUESTS):
        list(app({"PATH_INFO": path, "HTTP_COOKIE": cookie}, start_response))
    return REQUESTS / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        servers = {
            "ext:tcjson, server over memory": ServerProcess("memory:"),
            "ext:tcjson, server over LMDB": ServerProcess(str(directory / "state.lmdb")),
            "ext:tcjson, LMDB on a Unix socket": ServerProcess(
                str(directory / "unix.lmdb"), unix=str(directory / "socket")
            ),
        }
        port = stack.enter_context(running_redis())
        backends: dict[str, dict[str, Any]] = {
            PEER: {"type": "ext:redis", "url": f"redis://127.0.0.1:{port}"},
            "file": {"type": "file", "data_dir": str(directory / "file")},
        }
        for name, server in servers.items():
            stack.enter_context(server)
            backends[name] = {"type": "ext:tcjson", "url": server.url}
        backends["the same, with store_key"] = {**backends[name], "store_key": KEY}
        best: dict[tuple[str, str], float] = {}
        for _ in range(ROUNDS):
            for name, options in backends.items():
                config = {f"session.{option}": value for option, value in {"timeout": 86400, **options}.items()}
                app = SessionMiddleware(application, config)
                for path in ("/read", "/write"):
                    best[name, path] = max(best.get((name, path), 0.0), requests_per_second(app, path))
    table = Table("back end", "reading", "ratio", "writing", "ratio", box=None)
    for name in backends:
        cells = [
            cell
            for path in ("/read", "/write")
            for cell in (f"{best[name, path]:,.0f}/s", f"{best[name, path] / best[PEER, path]:.2f}")
        ]
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
