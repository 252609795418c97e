"""``statestore queue``."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import Envelope
from click.testing import CliRunner, Result
from salmon import mail

from beaker_statestore.cli import main
from beaker_statestore.mailqueue import MailQueue
from beaker_statestore.testing import free_port

MAIL = b"From: Zed <zed@example.com>\nTo: news@localhost\nSubject: =?utf-8?q?g=C3=BC=1B[1m?=\n\nbody\x1b[2J\tend\n"


@pytest.fixture
def options(options: dict[str, Any]) -> dict[str, Any]:
    return {**options, "store_key": "0123456789abcdef" * 4}


@pytest.fixture
def ini(options: dict[str, Any], tmp_path: Path) -> str:
    path = tmp_path / "app.ini"
    path.write_text("\n".join(["[app:main]", *(f"beaker.session.{n} = {v}" for n, v in options.items()), ""]))
    return str(path)


@pytest.fixture
def mails(ini: str) -> MailQueue:
    return MailQueue.from_settings(ini, "undeliverable")


def request(data: bytes = MAIL) -> Any:
    return mail.MailRequest("localhost", "zed@example.com", "news@localhost", data)


class Inbox:
    """Another host's mail server, which takes nothing for ``no@localhost``."""

    def __init__(self) -> None:
        self.taken: list[tuple[str | None, list[str], bytes]] = []

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Envelope, address: str, _options: Any) -> str:  # noqa: N802
        if address == "no@localhost":
            return "550 no such address"
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Envelope) -> str:  # noqa: N802
        assert isinstance(envelope.content, bytes)
        self.taken.append((envelope.mail_from, envelope.rcpt_tos, envelope.content))
        return "250 OK"


@pytest.fixture
def inbox() -> Iterator[tuple[Inbox, str]]:
    handler, port = Inbox(), free_port()
    controller = Controller(handler, hostname="127.0.0.1", port=port)
    controller.start()
    yield handler, f"127.0.0.1:{port}"
    controller.stop()


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["queue", *arguments])


def lines(result: Result) -> list[Any]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_list(mails: MailQueue, ini: str) -> None:
    keys = [mails.push(request()), mails.push(b"Subject: second\n\n")]
    first, second = lines(run("list", "undeliverable", "--ini", ini))
    assert [first["key"], second["key"]] == keys
    assert first["at"].endswith("Z")
    assert (first["from"], first["to"], first["bytes"]) == ("Zed <zed@example.com>", "news@localhost", len(MAIL))
    assert first["subject"] == "gü\x1b[1m"
    assert second["subject"] == "second"


def test_list_no_more_than_wanted(mails: MailQueue, ini: str) -> None:
    keys = [mails.push(MAIL) for _ in range(3)]
    some = run("list", "undeliverable", "--limit", "2", "--ini", ini)
    assert [told["key"] for told in lines(some)] == keys[:2]
    assert "more than these 2" in some.stderr
    assert run("list", "undeliverable", "--limit", "3", "--ini", ini).stderr == ""


def test_list_the_queues(mails: MailQueue, ini: str) -> None:
    assert "there is no queue" in run("list", "--ini", ini, "--no-json").output
    mails.push(MAIL)
    MailQueue.from_settings(ini, "a:b").push(MAIL)
    assert lines(run("list", "--ini", ini)) == [{"queue": "a:b", "mails": 1}, {"queue": "undeliverable", "mails": 1}]
    assert "undeliverable" in run("list", "--ini", ini, "--no-json").output


@pytest.mark.parametrize("wrong", [AttributeError("a bug in a parser"), RecursionError()])
def test_whatever_is_wrong_with_one_the_others_are_sent(
    mails: MailQueue, ini: str, monkeypatch: pytest.MonkeyPatch, wrong: Exception
) -> None:
    bad, good = mails.push(request()), mails.push(request())

    def redeliver(_self: MailQueue, key: str, *_rest: Any) -> bool:
        if key == bad:
            raise wrong
        return True

    monkeypatch.setattr(MailQueue, "redeliver", redeliver)
    result = run("redeliver", "undeliverable", "--all", "--smtp", "127.0.0.1:25", "--ini", ini)
    told = [json.loads(line) for line in result.stdout.splitlines()[:2]]
    assert [(each["key"], each["sent"]) for each in told] == [(bad, False), (good, True)]
    assert told[0]["error"]


def test_for_reading_nothing_is_obeyed(mails: MailQueue, ini: str) -> None:
    assert "there is no mail in undeliverable" in run("list", "undeliverable", "--ini", ini, "--no-json").output
    key = mails.push(request())
    for printed in (
        run("list", "undeliverable", "--ini", ini, "--no-json").output,
        run("show", "undeliverable", key, "--ini", ini, "--no-json").output,
    ):
        assert "gü\\u001b[1m" in printed
        assert "\x1b" not in printed
    assert "body\\u001b[2J" in printed
    assert "to be sent from <zed@example.com> to news@localhost" in printed


def test_show(mails: MailQueue, ini: str) -> None:
    key = mails.push(request())
    (shown,) = lines(run("show", "undeliverable", key, "--ini", ini))
    assert shown["envelope"] == {"from": "zed@example.com", "to": ["news@localhost"]}
    assert ["To", "news@localhost"] in shown["headers"]
    assert shown["text"] == "body\x1b[2J\tend\n"
    assert run("show", "undeliverable", key, "--raw", "--ini", ini).stdout_bytes == MAIL
    missing = run("show", "undeliverable", "nothing", "--ini", ini)
    assert missing.exit_code == 1
    assert "there is no mail nothing in undeliverable" in missing.output


def test_the_beginning_of_a_key_will_do(mails: MailQueue, ini: str) -> None:
    keys = [mails.push(b"Subject: first\n\n"), mails.push(b"Subject: second\n\n")]
    short = keys[1].partition("-")[0]
    assert short in run("list", "undeliverable", "--ini", ini, "--no-json").output
    (shown,) = lines(run("show", "undeliverable", short, "--ini", ini))
    assert shown["subject"] == "second"
    assert "2 mails" in run("remove", "undeliverable", keys[0][:3], "--ini", ini).output
    assert run("remove", "undeliverable", short, "--ini", ini).exit_code == 0
    assert mails.keys() == keys[:1]


def test_a_mail_without_text(mails: MailQueue, ini: str) -> None:
    key = mails.push(b"Content-Type: image/png\n\nx")
    printed = run("show", "undeliverable", key, "--ini", ini, "--no-json").output
    assert "no plain text" in printed
    assert "to whom --to says" in printed


def test_redeliver(mails: MailQueue, ini: str, inbox: tuple[Inbox, str]) -> None:
    handler, server = inbox
    keys = [mails.push(request(MAIL + str(number).encode())) for number in range(3)]
    (told,) = lines(run("redeliver", "undeliverable", keys[0], "--smtp", server, "--ini", ini))
    assert told == {"key": keys[0], "sent": True, "error": None}
    assert [taken[:2] for taken in handler.taken] == [("zed@example.com", ["news@localhost"])]
    sent = handler.taken[0][2]
    assert sent.count(b"\n") == sent.count(b"\r\n")
    assert sent.replace(b"\r\n", b"\n").rstrip() == MAIL + b"0"
    assert mails.keys() == keys[1:]
    told_all = lines(run("redeliver", "undeliverable", "--all", "--smtp", server, "--to", "a@localhost", "--ini", ini))
    assert [told["sent"] for told in told_all] == [True, True]
    assert [taken[1] for taken in handler.taken[1:]] == [["a@localhost"], ["a@localhost"]]
    assert len(mails) == 0


def test_one_that_nobody_takes_does_not_keep_the_others(mails: MailQueue, ini: str, inbox: tuple[Inbox, str]) -> None:
    handler, server = inbox
    refused = mails.push(mail.MailRequest("localhost", "a@localhost", "no@localhost", MAIL))
    nobodys = mails.push(b"From: a@localhost\nTo: " + b"(" * 3000 + b"\n\n")
    mails._mails.store.put(mails._mails.records.record("0-damaged"), b"garbage")
    good = mails.push(request())
    result = run("redeliver", "undeliverable", "--all", "--smtp", server, "--ini", ini)
    assert result.exit_code == 1
    told = {each["key"]: each for each in map(json.loads, result.stdout.splitlines()[:4])}
    assert "550" in told[refused]["error"]
    assert "to whom" in told[nobodys]["error"]
    assert told[good]["sent"]
    assert "3 mails could not be sent" in result.output
    assert len(handler.taken) == 1
    assert mails.keys() == ["0-damaged", refused, nobodys]


def test_what_is_gone_was_not_sent(mails: MailQueue, ini: str, inbox: tuple[Inbox, str]) -> None:
    result = run("redeliver", "undeliverable", "gone", "--smtp", inbox[1], "--ini", ini, "--no-json")
    assert result.exit_code == 1
    assert "gone: there is no such mail" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--smtp", "127.0.0.1:25"], "--all"),
        (["key", "--all", "--smtp", "127.0.0.1:25"], "--all"),
        (["key", "--smtp", "localhost"], "HOST:PORT"),
        (["key", "--smtp", "localhost:0"], "HOST:PORT"),
    ],
)
def test_mistakes_are_told(ini: str, arguments: list[str], said: str) -> None:
    result = run("redeliver", "undeliverable", *arguments, "--ini", ini)
    assert result.exit_code == 2
    assert said in result.output


def test_remove(mails: MailQueue, ini: str) -> None:
    keys = [mails.push(request()) for _ in range(3)]
    assert run("remove", "undeliverable", *keys[:2], "--ini", ini).exit_code == 0
    assert mails.keys() == keys[2:]
    result = run("remove", "undeliverable", keys[0], keys[2], "--ini", ini)
    assert result.exit_code == 1
    assert keys[0] in result.output
    assert keys[2] not in result.output
    assert len(mails) == 0
