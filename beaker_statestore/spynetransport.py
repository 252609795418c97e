"""Spyne's remote procedure calls over a fan-out queue: a client transport, and a server transport.

::

    queue = Queue("127.0.0.1:1978", "tasks")

    Producer(queue, application).service.greet("Ann", times=3)      # answers the message's number, at once

    Consumer(queue, application, "mailer").serve_forever()          # in another process; or in several

Every consumer does every call, in order, at least once. A message of the queue is ``{"request": text}``, what Spyne's
protocol wrote, or ``{"base64": text}`` where that is not UTF-8.

It must not know which protocol that is, nor any engine.
"""

from __future__ import annotations

import base64
import contextlib
import logging
import sys
import time
from typing import Any, Final, NoReturn

from beaker_statestore.exceptions import MissingDriverError, StoreUnavailable
from beaker_statestore.fanout import LeaseLost, Message, Queue

try:
    from spyne import (
        BODY_STYLE_WRAPPED,
        Application,
        ClientBase,
        Fault,
        MethodContext,
        RemoteProcedureBase,
        RemoteService,
        ServerBase,
        TransportContext,
    )
    from spyne.auxproc import process_contexts
    from spyne.auxproc.sync import SyncAuxProc
    from spyne.protocol.dictdoc import DictDocument
except ImportError as error:
    raise MissingDriverError(
        f'the Spyne transport cannot import Spyne ({error}): pip install "beaker-statestore[spyne]", with Python 3.10 '
        "or 3.11 (Spyne 2.14 does not run on later ones)"
    ) from error

__all__ = ["Consumer", "Producer"]

log = logging.getLogger(__name__)

#: The name of the transport, for both sides.
TRANSPORT: Final = "urn:beaker-statestore:fanout"
#: How long one wait for a message takes at most, and a pause after an outage, in seconds; so long `Consumer.stop` may
#: go unheard.
PAUSE: Final = 1.0
#: How much of an answer is logged, in bytes.
SHOWN: Final = 200


class Producer(ClientBase):
    """Calls the methods of a Spyne application by way of a queue.

    ``producer.service.greet("Ann", times=3)`` writes the request down by the application's *in* protocol, since that is
    how consumers read it, reads it as they will, and pushes it. It answers the message's number: nobody has done
    anything yet, and what the method returns never comes back. A call raises

    - `spyne.Fault` for a method that there is not, or arguments that the application's validator refuses; `TypeError`,
      or what else Spyne meets, for arguments that cannot be written down or are not the method's;
    - what `Queue.push` raises, `StoreUnavailable` above all.

    Safe for threads.

    :param queue: where the calls go.
    :param app: the application whose methods these are. Of its services, only the signatures are needed here.
    """

    def __init__(self, queue: Queue, app: Application) -> None:
        super().__init__(queue, app)
        self.service = RemoteService(_Call, queue, app)


class _Call(RemoteProcedureBase):
    """One method of the remote application; what Spyne calls the URL is the queue."""

    def __init__(self, queue: Queue, app: Application, name: str, out_header: Any = None) -> None:
        # As its base, but for the kind of context.
        self.url = queue
        self.app = app
        ctx = _CallersContext(self, MethodContext.CLIENT)
        ctx.method_request_string = name
        ctx.out_header = out_header
        self.contexts = ctx.out_protocol.generate_method_contexts(ctx)

    def __call__(self, *args: Any, **kwargs: Any) -> int:
        # A copy, for this object may be called again.
        ctx = self.contexts[0].copy()
        try:
            _check_arguments(ctx, args, kwargs)
            # Spyne would write by the out protocol, in which the server answers.
            ctx.out_protocol = self.app.in_protocol
            ctx.outprot_ctx = ctx.protocol = ctx.inprot_ctx
            self.get_out_object(ctx, args, kwargs)
            self.get_out_string(ctx)
            request = b"".join(ctx.out_string)
            self._check(request)
            number = self.url.push(_body(request))
        finally:
            ctx.close()
        log.debug("%s is message %d of the queue %s", ctx.method_name, number, self.url.name)
        return int(number)

    def get_out_string(self, ctx: MethodContext) -> None:
        protocol = ctx.out_protocol
        protocol.serialize(ctx, protocol.REQUEST)
        if protocol.ignore_wrappers and _takes_plain_dictionaries(protocol):
            # Then Spyne's clients leave out the name of the method, without which its servers cannot read it.
            name = protocol.get_class_name(ctx.descriptor.in_message)
            ctx.out_document = [{name: arguments} for arguments in ctx.out_document]
        ctx.fire_event("method_return_document")
        protocol.create_out_string(ctx, "UTF-8")
        ctx.fire_event("method_return_string")

    def _check(self, request: bytes) -> None:
        """Read what was written. Whom should a consumer tell that it cannot? The caller is the one to know."""
        ctx = _CallersContext(self, MethodContext.SERVER)
        try:
            ctx.in_string = [request]
            protocol = self.app.in_protocol
            protocol.create_in_document(ctx)
            protocol.decompose_incoming_envelope(ctx, protocol.REQUEST)
            ctx, *_ = protocol.generate_method_contexts(ctx)
            protocol.deserialize(ctx, protocol.REQUEST)
        finally:
            ctx.close()


class _Transport(TransportContext):
    """What the listeners and methods of an application find as ``ctx.transport``; all None where a call is made."""

    #: The consumer's name.
    consumer_id: str | None = None
    #: The message's number in the queue, the same for all consumers.
    task_id: int | None = None
    #: 1 is the first time; more: it has failed, or was not acknowledged.
    attempt: int | None = None
    #: When the call was made, in epoch seconds.
    pushed_at: float | None = None

    def __init__(self, parent: MethodContext, transport: _Call | Consumer) -> None:
        super().__init__(parent, transport, TRANSPORT)


class _CallersContext(MethodContext):
    TransportContext = _Transport


class _Delivery(_Transport):
    def __init__(self, parent: _Context, transport: Consumer) -> None:
        super().__init__(parent, transport)
        self.consumer_id = transport.name
        self.task_id = parent.message.number
        self.attempt = parent.message.attempt
        self.pushed_at = parent.message.pushed_at
        #: What the method raised, before Spyne made a fault of it.
        self.error: BaseException | None = None
        #: To be called now and then by a method that may take longer than the lease; `LeaseLost`: give up.
        self.extend = transport.extend


class _Context(MethodContext):
    TransportContext = _Delivery

    def __init__(self, transport: Consumer, message: Message) -> None:
        self.message = message
        super().__init__(transport, MethodContext.SERVER)


class Consumer(ServerBase):
    """Does the calls that come by a queue: all of them, in order, each at least once.

    A call is acknowledged when it has succeeded. When it fails, that depends on whose fault it is (`spyne.Fault` says
    so by its code, and any other exception is the server's):

    - the client's (``Client...``: it cannot be read, there is no such method, a value is not valid): trying again
      cannot help, so it is a dead letter at once;
    - the server's: it is tried again after a growing pause, and nothing else before it; when it has failed ``retries``
      times and once more, it becomes a dead letter, with the error's text, and the next call is served;
    - nobody's, a `StoreUnavailable`: it is tried again after a pause, and not counted.

    :param queue: where the calls come from.
    :param app: the Spyne application that does them.
    :param name: of the consumer. Of processes with the same name one works, and the others stand by; if it dies,
        another goes on. Each name gets every call.
    :param options: of `Queue.consumer`: ``start`` (``now``: calls from now on, if there was no such consumer yet),
        ``retries``, ``backoff``, ``lease`` (of which a method may not take longer unless it calls
        ``ctx.transport.extend()``) ...
    :raises StoreUnavailable: the store failed.
    """

    transport = TRANSPORT

    def __init__(self, queue: Queue, app: Application, name: str, **options: Any) -> None:
        super().__init__(app)
        self.name = name
        self._consumer = queue.consumer(name, **options)
        self.extend = self._consumer.extend
        # A plain flag, since it is set by signal handlers: those must not wait for a lock that the interrupted holds.
        self._stopping = False
        app.event_manager.add_listener("method_exception_object", _remember)

    def serve_forever(self) -> None:
        """Do calls until `stop`; then give the lease up. Outages of the store are waited for."""
        try:
            while not self._stopping:
                try:
                    message = self._consumer.receive(PAUSE)
                except StoreUnavailable as error:
                    log.warning("%s waits for the store: %s", self._consumer, error)
                    time.sleep(PAUSE)
                    continue
                if message is not None:
                    self._serve(message)
        finally:
            self._consumer.close()

    def stop(self) -> None:
        """Let `serve_forever` end after the present call, or within `PAUSE` seconds. For signal handlers, too."""
        self._stopping = True

    def call(self, message: Message) -> None:
        """Do the call in ``message``; the queue learns nothing of it.

        :raises Exception: what went wrong; a `spyne.Fault` with a code of ``Client`` if that is the client's fault.
        """
        ctx = _Context(self, message)
        contexts: list[MethodContext] = []
        try:
            ctx.in_string = [_request(message.body)]
            contexts = self._contexts(ctx)
            ctx = contexts[0]
            self.get_out_object(ctx)
            if ctx.out_error is not None:
                _raise(ctx)
            # A method that is a generator does its work only now.
            self.get_out_string(ctx)
            answer = b"".join(ctx.out_string)
            process_contexts(self, contexts[1:], ctx)
        finally:
            ctx.close()
            for auxiliary in contexts[1:]:
                # It closes those that succeed. Others, such as those of threads, may still be at work.
                if isinstance(auxiliary.descriptor.aux, SyncAuxProc) and not auxiliary.is_closed:
                    auxiliary.close()
        log.debug("%s did %s, message %d: %r", self.name, ctx.method_name, message.number, answer[:SHOWN])

    def _contexts(self, ctx: _Context) -> list[MethodContext]:
        """The contexts of the method that is called, and of those that Spyne calls auxiliary."""
        try:
            contexts: list[MethodContext] = self.generate_contexts(ctx)
            ctx = contexts[0]
            if ctx.in_error is None:
                self.get_in_object(ctx)
        except StoreUnavailable:
            raise
        except Exception as error:
            # Of some malformed requests Spyne's protocols trip over, instead of raising a fault.
            raise Fault("Client.Unreadable", f"{type(error).__name__}: {error}") from error
        if ctx.in_error is not None:
            raise ctx.in_error
        return contexts

    def _serve(self, message: Message) -> None:
        try:
            try:
                self.call(message)
            except Exception as error:  # noqa: BLE001 - whatever it is, the call has not succeeded
                self._failed(message, error)
            except BaseException as error:
                # It ends the worker, and has to count: or the call would end each of its successors as well.
                with contextlib.suppress(LeaseLost, StoreUnavailable):
                    self._consumer.retry(message, error)
                raise
            else:
                self._consumer.acknowledge(message)
        except (LeaseLost, StoreUnavailable) as error:
            log.warning("%s: message %d may come again: %s", self._consumer, message.number, error)

    def _failed(self, message: Message, error: Exception) -> None:
        if not isinstance(error, Fault):
            self._consumer.retry(message, error)
        elif _is_clients(error):
            self._consumer.give_up(message, _text(error))
        else:
            self._consumer.retry(message, _text(error))


def _remember(ctx: MethodContext) -> None:
    """Keep what the method raised. Spyne makes the fault "Internal Error" of it, and tells its listeners meanwhile."""
    if isinstance(ctx.transport, _Delivery):
        ctx.transport.error = sys.exc_info()[1]


def _raise(ctx: MethodContext) -> NoReturn:
    """Raise what best says how the method failed."""
    fault, error = ctx.out_error, ctx.transport.error
    if isinstance(error, StoreUnavailable) or (error is not None and not _is_clients(fault)):
        raise error
    raise fault


def _is_clients(fault: Fault) -> bool:
    return str(fault.faultcode).partition(".")[0] == "Client"


def _text(fault: Fault) -> str:
    said = fault.faultstring
    try:
        # What is wrong by an XML schema, Spyne says in bytes.
        return f"{fault.faultcode}: {said.decode(errors='replace') if isinstance(said, bytes) else said}"
    except Exception:  # noqa: BLE001 - a defect of the method's, and no reason to stop the worker
        return f"{type(fault).__name__}: (it cannot be told)"


def _check_arguments(ctx: MethodContext, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What Spyne's client would leave out without a word.

    :raises TypeError: they are not the method's.
    """
    method = ctx.descriptor
    if method.body_style is not BODY_STYLE_WRAPPED:
        raise TypeError(f"{method.name} takes its argument bare, which Spyne's clients cannot write: omit _body_style")
    names = list(method.in_message.get_flat_type_info(method.in_message))
    if len(args) > len(names):
        raise TypeError(f"{method.name} takes {len(names)} arguments, and got {len(args)}")
    for name in kwargs:
        if name not in names:
            raise TypeError(f"{method.name} has no argument {name!r}; it has {', '.join(names) or 'none'}")
        if name in names[: len(args)]:
            raise TypeError(f"{method.name} got two values for {name!r}")


def _takes_plain_dictionaries(protocol: Any) -> bool:
    """Whether its requests are ``{method: arguments}``, and not an envelope of its own."""
    return getattr(type(protocol), "decompose_incoming_envelope", None) is DictDocument.decompose_incoming_envelope


def _body(request: bytes) -> dict[str, str]:
    """A message's body: text as it is, for people and other programs."""
    try:
        return {"request": request.decode()}
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(request).decode("ascii")}


def _request(body: Any) -> bytes:
    """What `_body` was made of.

    :raises Fault: it was not made by `_body`.
    """
    match body:
        case {"request": str(text)}:
            return text.encode()
        case {"base64": str(text)}:
            try:
                return base64.b64decode(text, validate=True)
            except ValueError as error:
                raise Fault("Client.Unreadable", f"the message is no base64: {error}") from error
    raise Fault("Client.Unreadable", 'the message is no request of Spyne\'s: it has neither "request" nor "base64"')
