"""gRPC: the methods of expertd_wire.v1.Experts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

from expertd.errors import Cancelled, DeadlineExceeded, ExpertdError, Internal, InvalidArgument
from expertd.transport import messages
from expertd.transport.callers import grpc_caller
from expertd.transport.calls import Desk, Record, note_plan
from expertd.transport.halves import Halves, Ready
from expertd.transport.ingress import Ingress
from expertd.transport.interceptors import INTERNAL, guarded
from expertd.transport.streams import Entry, Stream
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.status import pack_status
from expertd_wire.v1 import experts_pb2 as pb

log = logging.getLogger(__name__)

M = TypeVar("M", bound=Message)
Question = Callable[[], Message]

QUICK_BYTES = 1 << 18
"""Replies up to this size are sent by the thread that computed them, and not counted."""


class ExpertsService:
    """The methods of expertd_wire.v1.Experts, all on raw bytes."""

    def __init__(
        self, desk: Desk, ingress: Ingress, max_stream_calls: int, capabilities: Question
    ) -> None:
        self._desk = desk
        self._ingress = ingress
        self._max_stream_calls = max_stream_calls
        self._capabilities = capabilities

    def begin_forward(self, request: bytes, context: grpc.ServicerContext, ready: Ready) -> None:
        """Submits a call; ready() is told when it has its answer, or its caller has left."""
        entry = self._enter(request, 0, _deadline(context), grpc_caller(context))
        ticket = entry.ticket
        if ticket is None:
            return ready(entry, True)

        # Whoever takes it out is the one to say so: a future keeps its callbacks for ever, and gRPC
        # keeps left() until the answer has been read.
        waiting = [(ticket, entry)]

        def over(quick: bool) -> None:
            with suppress(IndexError):
                ready(waiting.pop()[1], quick)

        def left() -> None:
            for unanswered, _ in tuple(waiting):
                self._desk.engine.cancel(unanswered)
                over(True)

        ticket.future.add_done_callback(lambda future: over(_is_quick(future)))
        if not context.add_callback(left):
            left()  # before anybody could be told

    def finish_forward(self, entry: Entry, context: grpc.ServicerContext) -> bytes:
        """The reply to a call that begin_forward() submitted; raises what became of it."""
        with self._desk.recorded(entry.record) as record:
            reply = note_plan(record, _outcome(entry))
            data = self._desk.timed(record, "encode", encode_forward_reply, reply)
            self._count(len(data), context)
            return data

    def _count(self, size: int, context: grpc.ServicerContext) -> None:
        """A large answer is this process's until its caller has read it; raises Overloaded."""
        if size > QUICK_BYTES:
            self._ingress.take(size)
            if not context.add_callback(partial(self._ingress.give, size)):
                self._ingress.give(size)  # the caller has left

    def forward_stream(
        self, requests: Iterator[bytes], context: grpc.ServicerContext
    ) -> Iterator[bytes]:
        deadline, client = _deadline(context), grpc_caller(context)

        def submit(request: bytes) -> Entry:
            return self._enter(request, len(request), deadline, client)

        engine = self._desk.engine
        stream = Stream(
            submit, engine.cancel, self._render, self._max_stream_calls, lambda: engine.draining
        )
        return stream.run(requests, context)

    def _enter(self, request: bytes, held: int, deadline: float | None, client: str) -> Entry:
        """Submits one message; whatever goes wrong is that message's own error.

        held of its bytes are taken from the account of this process.
        """
        record, taken = self._desk.begin(), 0
        try:
            self._ingress.take(held)
            taken = held
            ticket = self._desk.submit(record, self._decode(record, request), deadline, client)
            return Entry(record, taken, ticket)
        except ExpertdError as error:
            fault = error
        except Exception:
            log.exception("a message failed")
            fault = Internal(INTERNAL)
        # The traceback would keep the message's bytes for as long as the caller does not read.
        return Entry(record, taken, None, fault.with_traceback(None))

    def _render(self, entry: Entry) -> bytes:
        """The reply to one message of a stream: its output, or its error as a status."""
        record = entry.record
        try:
            reply = note_plan(record, _outcome(entry))
        except ExpertdError as error:
            self._desk.fail(record, error.with_traceback(None))
            status = pack_status(error.reason, str(error), error.refusals, error.retry_seconds)
            reply = ForwardReply(request_id=record.request_id, status=status)
        data = self._desk.timed(record, "encode", encode_forward_reply, reply)
        self._desk.end(record)
        self._ingress.give(entry.nbytes)
        return data

    def _decode(self, record: Record, request: bytes) -> ForwardCall:
        self._ingress.check(len(request))
        return self._desk.timed(record, "decode", decode_forward_call, request)

    def list_layers(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = parse(pb.ListLayersRequest, request)
        return _bytes(messages.list_layers(self._desk.engine.residents, asked.model))

    def get_layer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = parse(pb.GetLayerRequest, request)
        return _bytes(
            messages.layer_info(self._desk.engine.residents.get(asked.model, asked.layer))
        )

    def get_capabilities(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        parse(pb.GetCapabilitiesRequest, request)
        return _bytes(self._capabilities())

    def handlers(self) -> dict[str, Any]:
        """Method name → handler; None as (de)serialiser hands on the raw bytes."""
        methods = {
            "ListLayers": self.list_layers,
            "GetLayer": self.get_layer,
            "GetCapabilities": self.get_capabilities,
        }
        unary = {
            name: grpc.unary_unary_rpc_method_handler(guarded(method))
            for name, method in methods.items()
        }
        halves = Halves(self.begin_forward, self.finish_forward)
        unary["Forward"] = grpc.unary_unary_rpc_method_handler(halves)
        return unary | {"ForwardStream": grpc.stream_stream_rpc_method_handler(self.forward_stream)}


def _outcome(entry: Entry) -> ForwardReply:
    """The reply to a message; raises its error, also when nobody waits for its answer any more."""
    if entry.error is not None:
        raise entry.error
    ticket = entry.ticket
    assert ticket is not None, "an entry without an error has a ticket"
    if ticket.future.done():
        return ticket.future.result()
    if ticket.expired(time.monotonic()):
        raise DeadlineExceeded("the call's deadline passed before its answer was ready")
    raise Cancelled("the caller left")


def _is_quick(future: Future[ForwardReply]) -> bool:
    """Whether an answer may be sent by the thread that has it.

    Errors may come from one that holds the queue's lock, and much is long in copying.
    """
    if future.exception() is not None:
        return False
    output = future.result().output
    return output is not None and output.nbytes <= QUICK_BYTES


def parse(kind: type[M], data: bytes) -> M:
    """A message from a caller's bytes; raises InvalidArgument, never INTERNAL."""
    try:
        message: M = kind.FromString(data)
        return message
    except DecodeError:
        raise InvalidArgument(f"these {len(data)} bytes are no {kind.DESCRIPTOR.name}") from None


def _bytes(message: Message) -> bytes:
    return bytes(message.SerializeToString())


def _deadline(context: grpc.ServicerContext) -> float | None:
    remaining = context.time_remaining()
    # A call without a deadline reports a remaining time of some centuries.
    return None if remaining is None or remaining > 1e8 else time.monotonic() + remaining
