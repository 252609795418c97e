"""``statestore fanout``: looks into fan-out queues, and does what their operators have to do."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import wraps
from typing import Any, Final

import click
import simplejson

from beaker_statestore.console import Output, Seconds, output_option, store_options
from beaker_statestore.exceptions import StateStoreError, StoreUnavailable
from beaker_statestore.fanout import LIMIT, DeadLetter, Message, Queue, Report
from beaker_statestore.settings import Settings

__all__ = ["fanout"]

#: How long `follow` waits at a time, and after an outage, in seconds.
SLICE: Final = 1.0
#: What shells answer for a program that Ctrl-C has ended.
INTERRUPTED: Final = 130


@click.group()
def fanout() -> None:
    """Look into fan-out queues: who is behind, what is dead; push, follow, trim."""


def _queue_argument(command: Callable[..., None]) -> Callable[..., None]:
    """Give ``command`` the argument NAME and the options that say which store, and what comes of them: ``queue``."""

    @click.argument("name")
    @store_options
    @wraps(command)
    def with_queue(settings: Settings, name: str, limit: int = LIMIT, **arguments: Any) -> None:
        command(queue=Queue(settings, name, limit=limit), **arguments)

    return with_queue


@fanout.command(name="list")
@store_options
@output_option
def list_queues(settings: Settings, output: Output) -> None:
    """Print the names of all queues, how long each is, and who consumes. It looks at every message's key."""
    rows = []
    for queue in Queue.all(settings):
        try:
            report = queue.report()
        except StateStoreError as error:  # one that is damaged, or sealed by another key, hides no other
            reported: dict[str, Any] = {"error": str(error)}
            rows.append([queue.name, "", str(error)])
        else:
            reported = _as_json(report)
            names = sorted(consumer.name for consumer in report.consumers)
            rows.append([queue.name, f"{report.end - report.floor:,}", ", ".join(names)])
        if output.as_json:
            output.value({"name": queue.name, **reported})
    if not output.as_json:
        output.table(["queue", "messages", "consumers"], rows)


@fanout.command()
@_queue_argument
@output_option
def show(queue: Queue, output: Output) -> None:
    """Print how long the queue is, its consumers, and how far each is behind.

    "Held" says when a process of the consumer's was last heard of, if one holds the consumer's lease (or died with it).
    """
    report = queue.report()
    if report.end == 1 and not report.consumers:
        raise click.ClickException(
            f"there is no queue {queue.name}: nothing was ever pushed, and nobody consumes (statestore fanout list)"
        )
    if output.as_json:
        output.value(_as_json(report))
        return
    output.line(f"{report.end - report.floor:,} messages, {report.floor} to {report.end - 1}")
    if not report.consumers:
        output.line("no consumers, so nothing is trimmed")
        return
    rows = [
        [
            consumer.name,
            str(consumer.next),
            f"{consumer.behind:,}",
            f"{consumer.dead:,}",
            f"{consumer.missed:,}",
            _heard_of(consumer.heard_of) if consumer.held else "no",
            "" if consumer.error is None else f"{consumer.tries} times: {consumer.error}",
        ]
        for consumer in report.consumers
    ]
    output.table(["consumer", "next", "behind", "dead", "missed", "held", "failing"], rows)


@fanout.command()
@_queue_argument
@click.option(
    "--from", "start", type=click.IntRange(min=1), metavar="N", help="The first message.  [default: the next]"
)
@click.option("--beginning", is_flag=True, help="From the oldest message on that is there.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="End after so many messages.")
@click.option("--max-seconds", type=Seconds(), metavar="S", help="End after so long.")
@output_option
def follow(
    queue: Queue, output: Output, start: int | None, beginning: bool, count: int | None, max_seconds: float | None
) -> None:
    """Print messages as they come, until Ctrl-C. Consumers do not notice."""
    if start is not None and beginning:
        raise click.UsageError("--from and --beginning contradict each other; give one of them")
    follower = queue.follow(start or ("beginning" if beginning else "now"))
    deadline = None if max_seconds is None else time.monotonic() + max_seconds
    printed = missed = 0
    try:
        while (count is None or printed < count) and (deadline is None or time.monotonic() < deadline):
            left = SLICE if deadline is None else min(SLICE, max(0.0, deadline - time.monotonic()))
            try:
                message = follower.receive(left)
            except StoreUnavailable as error:
                click.echo(f"waiting for the store: {error}", err=True)
                time.sleep(SLICE)
                continue
            if follower.missed > missed:
                click.echo(f"{follower.missed - missed} messages were gone already", err=True)
                missed = follower.missed
            if message is not None:
                printed += 1
                _print_message(output, message)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


@fanout.command()
@_queue_argument
@click.argument("body", metavar="JSON")
@click.option("--limit", type=click.IntRange(min=1), default=LIMIT, show_default=True, help="Refuse beyond so many.")
@output_option
def push(queue: Queue, output: Output, body: str) -> None:
    """Put a message behind all others, and print its number."""
    try:
        value = simplejson.loads(body)
    except ValueError as error:
        raise click.BadParameter(
            f"it is not JSON: {error}; text goes in quotes, '\"text\"'", param_hint="JSON"
        ) from error
    number = queue.push(value)
    if output.as_json:
        output.value({"number": number})
    else:
        output.line(f"message {number}")


@fanout.command()
@_queue_argument
@click.option("--keep", type=click.IntRange(min=0), default=0, metavar="N", help="Leave so many that all have handled.")
@click.option("--before", type=click.IntRange(min=1), metavar="N", help="Remove all below this number, handled or not.")
@output_option
def trim(queue: Queue, output: Output, keep: int, before: int | None) -> None:
    """Remove what all consumers have handled. Producers do so, too, now and then."""
    removed = queue.trim(keep, before=before)
    if output.as_json:
        output.value({"removed": removed})
        return
    output.line(f"removed {removed:,} message{'' if removed == 1 else 's'}")
    consumers = queue.report().consumers
    if consumers and consumers[0].behind:
        output.line(f"{consumers[0].name} is behind by {consumers[0].behind:,}")


@fanout.command()
@_queue_argument
@click.argument("consumer")
@output_option
def forget(queue: Queue, output: Output, consumer: str) -> None:
    """End CONSUMER, with its cursor and its dead letters, so that trimming waits for it no longer."""
    forgotten = queue.forget(consumer)
    if output.as_json:
        output.value({"forgotten": forgotten})
    else:
        output.line(f"{consumer} is forgotten" if forgotten else f"{queue.name} has no consumer {consumer}")


@fanout.command()
@_queue_argument
@click.argument("consumer")
@click.option("--redeliver", type=click.IntRange(min=1), metavar="N", help="Deliver this one to CONSUMER once more.")
@click.option("--discard", type=click.IntRange(min=1), metavar="N", help="Remove this one.")
@output_option
def dead(queue: Queue, output: Output, consumer: str, redeliver: int | None, discard: int | None) -> None:
    """Print the messages that CONSUMER has given up, or deal with one of them."""
    if redeliver is not None and discard is not None:
        raise click.UsageError("--redeliver and --discard contradict each other; give one of them")
    number = redeliver if discard is None else discard
    if number is not None:
        letters = queue.dead_letters(consumer)
        if not (letters.discard(number) if redeliver is None else queue.redeliver(consumer, number)):
            raise click.ClickException(f"{consumer} has no dead letter {number} for which that could be done")
        if output.as_json:
            output.value({"number": number})
        else:
            output.line(f"message {number} {'is removed' if redeliver is None else 'will be delivered once more'}")
        return
    for letter in queue.dead_letters(consumer):
        _print_letter(output, letter)


def _print_message(output: Output, message: Message) -> None:
    if output.as_json:
        output.value({"number": message.number, "pushed": _time(message.pushed_at), "body": message.body})
    else:
        output.line(f"{message.number}  {_time(message.pushed_at)}")
        output.value(message.body)


def _print_letter(output: Output, letter: DeadLetter) -> None:
    if output.as_json:
        times = {"pushed": _time(letter.pushed_at), "given_up": _time(letter.at)}
        output.value(
            {"number": letter.number, **times, "tries": letter.tries, "error": letter.error, "body": letter.body}
        )
    else:
        output.line(f"{letter.number}  given up {_time(letter.at)} after {letter.tries} tries: {letter.error}")
        output.value(letter.body)


def _as_json(report: Report) -> dict[str, Any]:
    consumers = [
        {
            "name": consumer.name,
            "next": consumer.next,
            "behind": consumer.behind,
            "dead": consumer.dead,
            "missed": consumer.missed,
            "held": consumer.held,
            "heard_of": _time(consumer.heard_of),
            "tries": consumer.tries,
            "error": consumer.error,
        }
        for consumer in report.consumers
    ]
    return {"floor": report.floor, "end": report.end, "consumers": consumers}


def _heard_of(seconds: float | None) -> str:
    return f"yes, {_time(seconds)}" if seconds else "yes"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%SZ")
    except (OverflowError, ValueError, OSError):
        return None  # no time that a calendar has: anybody may have written it
