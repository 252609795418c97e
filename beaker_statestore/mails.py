"""``statestore queue``: the mails of a queue (`mailqueue`): to be listed, read, sent once more, and removed."""

from __future__ import annotations

import re
import sys
from collections import Counter
from datetime import datetime, timezone
from itertools import islice
from typing import Any, Final

import click

from beaker_statestore.console import Output, Seconds, output_option, store_options
from beaker_statestore.mailqueue import LONGEST_ANSWER, MailQueue, QueuedMail, count_by_queue, smtp
from beaker_statestore.settings import Settings

__all__ = ["queue"]

_SERVER: Final = re.compile(r"(?:\[([0-9A-Fa-f:.%]+)\]|([^\s\[\]:]+)):([0-9]{1,5})")


def _server(_ctx: click.Context, _param: click.Parameter, text: str) -> tuple[str, int]:
    match = _SERVER.fullmatch(text)
    if match is None or not 0 < int(match[3]) < 65536:
        raise click.BadParameter(f"{text!r} is no mail server; write HOST:PORT, such as 127.0.0.1:25.")
    return match[1] or match[2], int(match[3])


@click.group()
def queue() -> None:
    """Mails that wait in a queue, such as the router's undeliverable ones.

    A KEY may be the beginning of one, as `list` prints it, if only one mail's key begins so.
    """


@queue.command("list")
@click.argument("name", required=False)
@click.option("--limit", type=click.IntRange(min=1), default=1000, show_default=True, help="No more mails than that.")
@store_options
@output_option
def list_mails(settings: Settings, output: Output, name: str | None, limit: int) -> None:
    """Print the mails of the queue NAME, the oldest first; without a NAME, how many each queue has.

    Every mail is read for it, one after the other.
    """
    if name is None:
        _print_queues(output, count_by_queue(settings))
        return
    mails = [_summary(mail) for mail in islice(MailQueue(settings, name).mails(), limit + 1)]
    more = len(mails) > limit
    del mails[limit:]
    if output.as_json:
        for mail in mails:
            output.value(mail)
    elif mails:
        short = _shortened([mail["key"] for mail in mails])
        columns = ["at", "from", "to", "subject"]
        rows = [[key, *(mail[column] for column in columns)] for key, mail in zip(short, mails, strict=True)]
        output.table(["key", *columns], rows)
    else:
        output.line(f"there is no mail in {name}")
    if more:
        click.echo(f"there are more than these {limit:,}: give --limit", err=True)


def _print_queues(output: Output, counts: dict[str, int]) -> None:
    if output.as_json:
        for name, count in counts.items():
            output.value({"queue": name, "mails": count})
    elif counts:
        output.table(["queue", "mails"], [[name, str(count)] for name, count in counts.items()])
    else:
        output.line("there is no queue of mails")


@queue.command()
@click.argument("name")
@click.argument("key")
@click.option("--raw", is_flag=True, help="The mail as it was received, byte for byte.")
@store_options
@output_option
def show(settings: Settings, output: Output, name: str, key: str, raw: bool) -> None:
    """Print the mail KEY of the queue NAME: its headers and its text."""
    mails = MailQueue(settings, name)
    mail = mails.read(_whole(mails, key))
    if mail is None:
        raise click.ClickException(f"there is no mail {key} in {name}")
    if raw:
        sys.stdout.buffer.write(mail.data)
        return
    sent = {"from": mail.sender, "to": mail.recipients}
    if output.as_json:
        output.value({**_summary(mail), "envelope": sent, "headers": mail.headers(), "text": mail.text()})
        return
    to = ", ".join(mail.recipients) or "whom --to says"
    output.line(f"pushed {_time(mail.at)}, to be sent from <{mail.sender}> to {to}")
    output.line("")
    for header, value in mail.headers():
        output.line(f"{header}: {value}")
    output.line("")
    text = mail.text()
    if text is None:
        output.line("(There is no plain text in it; --raw prints all of it.)")
    for line in (text or "").expandtabs().splitlines():
        output.line(line)


@queue.command()
@click.argument("name")
@click.argument("keys", nargs=-1, metavar="KEY...")
@click.option(
    "--smtp", "server", metavar="HOST:PORT", callback=_server, required=True, help="Send them to this server."
)
@click.option("--all", "everything", is_flag=True, help="All mails of the queue, the oldest first.")
@click.option("--to", multiple=True, metavar="ADDRESS", help="Instead of whom they were for.")
@click.option(
    "--timeout",
    type=Seconds(min_open=True),
    default=LONGEST_ANSWER,
    show_default=True,
    help="For each answer of the server, in seconds; longer than the default is the same as it.",
)
@store_options
@output_option
def redeliver(
    settings: Settings,
    output: Output,
    name: str,
    keys: tuple[str, ...],
    server: tuple[str, int],
    everything: bool,
    to: tuple[str, ...],
    timeout: float,
) -> None:
    """Send mails of the queue NAME once more.

    They keep the sender and the recipient of their envelope; without an envelope, --to has to say to whom, since the
    To header may name anybody. What the server has taken is removed; the exit status is 1 if there is a mail that it
    has not.
    """
    if everything == bool(keys):
        raise click.UsageError("say which mails: give their keys, or --all")
    mails = MailQueue(settings, name)
    deliver = smtp(*server, timeout=timeout)
    failed = 0
    for key in mails.keys() if everything else [_whole(mails, key) for key in keys]:
        error = None
        try:
            sent = mails.redeliver(key, deliver, to)
        except Exception as problem:  # noqa: BLE001 - whatever is wrong with one mail, the others must not wait for it
            sent, error = False, str(problem) or type(problem).__name__
        failed += not sent and not (everything and error is None)
        if output.as_json:
            output.value({"key": key, "sent": sent, "error": error})
        else:
            output.line(f"{key}: {'sent' if sent else error or 'there is no such mail (any more)'}")
    if failed:
        raise click.ClickException(f"{failed} mail{'' if failed == 1 else 's'} could not be sent")


@queue.command()
@click.argument("name")
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@store_options
def remove(settings: Settings, name: str, keys: tuple[str, ...]) -> None:
    """Remove mails of the queue NAME.

    The exit status is 1 if one of them was not there.
    """
    mails = MailQueue(settings, name)
    missing = [key for key in [_whole(mails, key) for key in keys] if not mails.remove(key)]
    if missing:
        raise click.ClickException(f"there was no mail {', '.join(missing)} in {name}")


def _summary(mail: QueuedMail) -> dict[str, Any]:
    return {
        "key": mail.key,
        "at": _time(mail.at),
        "from": mail.from_,
        "to": mail.to,
        "subject": mail.subject,
        "bytes": len(mail.data),
    }


def _shortened(keys: list[str]) -> list[str]:
    """The keys without their random part, where that is enough to tell them apart: lines are short."""
    times = Counter(key.partition("-")[0] for key in keys)
    return [time if times[time := key.partition("-")[0]] == 1 else key for key in keys]


def _whole(mails: MailQueue, beginning: str) -> str:
    """The one key that begins so; what is given itself if there is none."""
    found = [key for key in mails.keys() if key.startswith(beginning)]  # noqa: SIM118 - a queue is no mapping
    if len(found) > 1:
        raise click.ClickException(f"{len(found)} mails have keys that begin with {beginning!r}: give more of it")
    return found[0] if found else beginning


def _time(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return ""  # no time that a calendar has: anybody may have written it
