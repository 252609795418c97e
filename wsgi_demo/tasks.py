"""Work that others do: a Spyne application whose calls come by a queue in the store.

::

    python -m wsgi_demo.tasks worker mailer &
    python -m wsgi_demo.tasks worker archive &
    python -m wsgi_demo.tasks call greet Ann 3
    python -m wsgi_demo.tasks call divide 1 0           # fails, is tried again, and ends as a dead letter

Both workers do each call. With ``--protocol soap`` the requests are SOAP envelopes instead of JSON.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from spyne import Application, Fault, Float, Integer, Iterable, MethodContext, Service, Unicode, rpc
from spyne.protocol.json import JsonDocument

from beaker_statestore.exceptions import StateStoreError
from beaker_statestore.fanout import Queue
from beaker_statestore.settings import Settings
from beaker_statestore.spynetransport import Consumer, Producer

__all__ = ["Tasks", "main", "make_application"]

log = logging.getLogger(__name__)

PROTOCOLS = ("json", "soap")

#: An argument that has to be there.
Number = Float(nullable=False, min_occurs=1)


class Tasks(Service):
    """What there is to do."""

    @rpc(Unicode(min_len=1, nullable=False, min_occurs=1), Integer(ge=1, le=100), _returns=Iterable(Unicode))
    def greet(ctx: MethodContext, name: str, times: int | None) -> Iterator[str]:  # noqa: N805 - Spyne's own way
        """Greet somebody, several times."""
        for _ in range(times or 1):
            log.info("%s: Hello, %s!", ctx.transport.consumer_id, name)
            yield f"Hello, {name}!"

    @rpc(Number, Number, _returns=Float)
    def divide(ctx: MethodContext, dividend: float, divisor: float) -> float:  # noqa: N805 - Spyne's own way
        """Divide, which fails by 0."""
        return dividend / divisor


def _log_call(ctx: MethodContext) -> None:
    delivery = ctx.transport
    log.info("%s does task %d, %s (%d)", delivery.consumer_id, delivery.task_id, ctx.method_name, delivery.attempt)


Tasks.event_manager.add_listener("method_call", _log_call)


def make_application(protocol: str = "json") -> Application:
    """The application that both sides need: the one for the signatures, the other to do the work.

    :param protocol: of `PROTOCOLS`.
    """
    if protocol == "soap":
        # Only here, since it needs lxml.
        from spyne.protocol.soap import Soap11

        reads, writes = Soap11(validator="lxml"), Soap11()
    else:
        reads, writes = JsonDocument(validator="soft"), JsonDocument()
    return Application([Tasks], "urn:beaker-statestore:tasks", name="Tasks", in_protocol=reads, out_protocol=writes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a worker until Ctrl-C or SIGTERM, or make one call; the exit status."""
    options = _parse(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    # It logs each error with a traceback; ours has the consumer's name and what becomes of the task.
    logging.getLogger("spyne").setLevel(logging.CRITICAL + 1)
    try:
        settings = Settings.of(options.ini) if options.url is None else Settings.from_options({"url": options.url})
        queue = Queue(settings, f"tasks.{options.protocol}")
        application = make_application(options.protocol)
        if options.command == "worker":
            _work(Consumer(queue, application, options.name, start=options.start, retries=3))
        else:
            values = [_value(text) for text in options.arguments]
            number = getattr(Producer(queue, application).service, options.method)(*values)
            print(f"task {number} is in the queue {queue.name}")
    except (StateStoreError, Fault, TypeError, ValueError) as error:
        print(f"wsgi_demo.tasks: {error}", file=sys.stderr)
        return 1
    return 0


def _work(consumer: Consumer) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: consumer.stop())
    log.info("%s is ready", consumer.name)
    consumer.serve_forever()
    log.info("%s has stopped", consumer.name)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m wsgi_demo.tasks", description="Do tasks that come by a queue.")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--ini", default="ini/development.ini", metavar="FILE", help="default: ini/development.ini")
    where.add_argument("--url", help="of the store, instead of an INI file; for example 127.0.0.1:1978")
    parser.add_argument("--protocol", choices=PROTOCOLS, default="json", help="default: json; each has its own queue")
    commands = parser.add_subparsers(dest="command", required=True)
    worker = commands.add_parser("worker", help="do tasks")
    worker.add_argument("name", help="of the consumer; of the workers of one name, one works and the others stand by")
    worker.add_argument(
        "--start", choices=("now", "beginning"), default="now", help="where a new consumer begins; default: now"
    )
    call = commands.add_parser("call", help="have a task done")
    call.add_argument("method", choices=sorted(Tasks.public_methods))
    call.add_argument("arguments", nargs="*", metavar="ARGUMENT", help="JSON, or else text")
    return parser.parse_args(arguments)


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


if __name__ == "__main__":
    sys.exit(main())
