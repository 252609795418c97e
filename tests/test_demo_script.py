"""``script/demo``: it starts everything, says what is wrong, and leaves nothing behind."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from wsgi_demo import check, run
from wsgi_demo.browser import Browser
from wsgi_demo.processes import DEFAULT_PORTS, Demo, Process, ProcessFailed, free_ports

ROOT = Path(__file__).parent.parent
#: How long anything here may take, in seconds.
PATIENCE = 30.0


def until(condition: Callable[[], Any]) -> Any:
    """What ``condition`` answers as soon as that is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if result := condition():
            return result
        time.sleep(0.02)
    raise AssertionError("it did not happen in time")


class Running:
    """The demo as somebody runs it in a terminal."""

    def __init__(self, var: Path, ports: dict[str, int]) -> None:
        self.ports = ports
        options = [f"--{name}-port={port}" for name, port in ports.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "wsgi_demo.run", "--var", str(var), *options],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_until_up(self) -> str:
        """What it says once everything runs."""
        assert self.process.stdout
        lines = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ctrl-C" in line:
                return "".join(lines)
        raise AssertionError(self.process.communicate())

    def children(self) -> dict[str, int]:
        """Name of the program part -> process id."""
        pids = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = {}
        for pid in pids:
            words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
            # Between fork and exec there is nothing yet.
            found[words[2] if len(words) > 2 else pid] = int(pid)
        return found

    def end(self, number: int) -> tuple[int, str]:
        """Send a signal; the exit status, and what was said on the way out."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, errors


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    demo = Running(tmp_path / "var", free_ports())
    yield demo
    if demo.process.poll() is None:
        demo.end(signal.SIGKILL)


def test_it_starts_real_processes_and_says_what_to_open(running: Running) -> None:
    said = running.wait_until_up()
    url = f"http://127.0.0.1:{running.ports['web']}"
    assert f"{url}/outbox" in said
    assert f"127.0.0.1:{running.ports['mail']} " in said
    assert set(running.children()) == {"beaker_statestore", "wsgi_demo.outbox", "wsgi_demo.mail", "wsgi_demo.web"}
    with urllib.request.urlopen(url, timeout=PATIENCE) as page:
        assert "news@localhost" in page.read().decode()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_everything_and_is_no_error(running: Running, number: int) -> None:
    running.wait_until_up()
    children = running.children().values()
    assert running.end(number) == (0, "")
    assert not [pid for pid in children if alive(pid)]
    for port in running.ports.values():
        socket.create_server(("127.0.0.1", port)).close()


def test_a_signal_during_the_start_leaves_nothing_behind(running: Running) -> None:
    children = until(lambda: running.children().values())
    assert running.end(signal.SIGINT)[0] == 0
    assert not [pid for pid in children if alive(pid)]


def test_kill_9_leaves_nothing_behind(running: Running) -> None:
    running.wait_until_up()
    children = running.children().values()
    running.end(signal.SIGKILL)
    until(lambda: not [pid for pid in children if alive(pid)])


def test_when_a_process_ends_by_itself_it_is_named_and_the_others_are_stopped(running: Running) -> None:
    running.wait_until_up()
    children = running.children()
    os.kill(children["wsgi_demo.mail"], signal.SIGKILL)
    _, errors = running.process.communicate(timeout=PATIENCE)
    assert running.process.returncode == 1
    assert "mail ended with status -9" in errors
    assert not [pid for pid in children.values() if alive(pid)]


@pytest.mark.parametrize("name", DEFAULT_PORTS)
def test_a_taken_port_is_named_with_its_holder_and_the_option_to_change(tmp_path: Path, name: str) -> None:
    ports = free_ports()
    with socket.create_server(("127.0.0.1", ports[name])):
        demo = Running(tmp_path / "var", ports)
        _, errors = demo.process.communicate(timeout=PATIENCE)
    assert demo.process.returncode == 1
    assert f"port {ports[name]}" in errors
    assert f"(process {os.getpid()})" in errors
    assert f"--{name}-port" in errors
    assert "Traceback" not in errors


def test_what_was_stored_is_there_at_the_next_start(tmp_path: Path) -> None:
    for expected in ("START", "CONFIRMING"):
        with Demo(tmp_path, free_ports()) as demo:
            ann = check.Person("ann@example.com", demo)
            assert ann.signs_in().state == expected
            ann.writes(check.NEWS)


def test_a_process_that_cannot_start_shows_the_end_of_its_log(tmp_path: Path) -> None:
    process = Process("web", ["-c", "import sys; sys.exit('no such thing')"], free_ports()["web"], tmp_path / "log")
    process.start()
    with pytest.raises(ProcessFailed, match=r"(?s)web ended with status 1.*no such thing"):
        process.wait_until_up()


def test_the_web_process_can_be_mounted_below_a_path(tmp_path: Path) -> None:
    port = free_ports()["web"]
    base_url = f"http://127.0.0.1:{port}/lists/%C3%BCber"
    options = {"beaker.session.url": "memory:", "demo.web": f"127.0.0.1:{port}", "demo.base_url": base_url}
    words = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    web = Process("web", ["-m", "wsgi_demo.web", str(ROOT / "ini" / "development.ini"), *words], port, tmp_path / "log")
    web.start()
    try:
        web.wait_until_up()
        browser = Browser()
        page = browser.press(browser.open(f"{base_url}/"), "Mail me a link", address="not an address")
        assert page.status == 400, "the form's token came back with the cookie"
        assert page.url == f"{base_url}/sign-in"
    finally:
        web.stop()


def test_check_plays_the_conversation(capfd: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    assert check.main() == 0
    said = capfd.readouterr().out
    for seen in ("kill -9", "503", "451", "CONFIRMING", "MEMBER", "ERROR", "START", "state:ann@example.com"):
        assert seen in said
    steps = [int(number) for number in re.findall(r"(?m)^ *(\d+)\. ", said)]
    assert steps == list(range(1, len(steps) + 1))
    assert time.monotonic() - began < 40


def test_check_fails_when_something_else_is_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(check.Person, "writes", lambda *_: "250 OK, but it went nowhere")
    assert check.main() == 1
    assert "FAILED" in capsys.readouterr().out


def test_every_port_is_an_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--help"])
    said = capsys.readouterr().out
    for name, port in DEFAULT_PORTS.items():
        assert f"--{name}-port" in said
        assert str(port) in said


@pytest.mark.long
def test_a_fresh_clone_needs_nothing_but_the_script(tmp_path: Path) -> None:
    """As a newcomer finds it: no virtual environment, nothing installed. Packages come from the package index."""
    clone = tmp_path / "clone"
    unwanted = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "var", "_build")
    shutil.copytree(ROOT, clone, ignore=unwanted)
    environment = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONPATH")}
    done = subprocess.run(
        [clone / "script" / "demo", "--check"], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as it should be" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--web-port", "99999"], "99999 is no port: give a number from 1 to 65535"),
        (["--web-port", "0"], "0 is no port"),
        (["--web-port", "8823"], "two processes cannot both have the port 8823"),
    ],
)
def test_a_wrong_port_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ProcessFailed, match="choose another with --var"), Demo(tmp_path / "file", free_ports()):
        raise AssertionError("never reached")


def test_the_logs_are_those_of_this_run(tmp_path: Path) -> None:
    (tmp_path / "web.log").write_text("something old")
    with Demo(tmp_path, free_ports()) as demo:
        assert "something old" not in demo.processes["web"].log.read_text()
