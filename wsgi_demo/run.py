"""`script/demo`: run the whole demo, or play a conversation against it (``--check``)."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from wsgi_demo import check
from wsgi_demo.processes import DEFAULT_PORTS, Demo, ProcessFailed

__all__ = ["main"]

#: How often to look whether all processes still run, in seconds.
WATCH = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Run until Ctrl-C, SIGTERM, or until one of the processes ends; the exit status."""
    options = _parse(arguments)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    try:
        if options.check:
            return check.main()
        _run(Demo(options.var, {name: getattr(options, f"{name}_port") for name in DEFAULT_PORTS}))
    except ProcessFailed as error:
        print(f"script/demo: {error}", file=sys.stderr)
        return 1
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="script/demo", description="Run a web application and a mail application that share one store."
    )
    parser.add_argument(
        "--check", action="store_true", help="play a conversation on free ports and in a new directory; exit 0 or 1"
    )
    for name, port in DEFAULT_PORTS.items():
        parser.add_argument(f"--{name}-port", type=_port, default=port, metavar="PORT", help=f"default: {port}")
    parser.add_argument("--var", type=Path, default=Path("var/demo"), metavar="DIRECTORY", help="default: var/demo")
    options = parser.parse_args(arguments)
    ports = [getattr(options, f"{name}_port") for name in DEFAULT_PORTS]
    if twice := {port for port in ports if ports.count(port) > 1}:
        parser.error(f"two processes cannot both have the port {twice.pop()}")
    return options


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text} is no port: give a number from 1 to 65535")
    return int(text)


def _leave(*_: object) -> NoReturn:
    # Once is enough: a second Ctrl-C must not disturb the stopping.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    raise SystemExit(0)


def _run(demo: Demo) -> None:
    with demo:
        print(_welcome(demo), flush=True)
        try:
            while True:
                demo.check()
                time.sleep(WATCH)
        finally:
            print("\nStopping.", flush=True)


def _welcome(demo: Demo) -> str:
    store, mail, outbox = (f"127.0.0.1:{demo.ports[name]}" for name in ("store", "mail", "outbox"))
    return f"""\
The demo is running:

  web     {demo.base_url}
  mail    {mail}        SMTP, takes mail to news@localhost
  store   {store}        Tyrant protocol, keeps its records in {demo.directory}/state.lmdb
  outbox  {outbox}        SMTP, keeps every mail that is sent

Try this:

  1. Open {demo.base_url}/outbox and send the mail that is written there.
     The answer appears on the same page: now you are CONFIRMING.
  2. Reply to it, or open the link in it: now you are a MEMBER.
  3. Open {demo.base_url}/ and sign in with the link that comes by mail:
     the page shows the state that the mail router keeps, and changes by itself when a mail arrives.
  4. Send a mail with the subject "crash": the handler fails, and you are in ERROR.
     Start again, and have the mail delivered once more: {demo.base_url}/undeliverable
  5. Look at the records: .venv/bin/statestore keys --url {store}
     and at whose they are: .venv/bin/statestore who ann@example.com --url {store} --by address
  6. As a member, open {demo.base_url}/invite and invite others: leave it half done, sign out and in
     again, or go on in another browser; it is all there.
  7. See what the web application has counted: {demo.base_url}/statistics/

Logs are in {demo.directory}. Ctrl-C stops everything."""


if __name__ == "__main__":
    sys.exit(main())
