"""gRPC: expertd_wire.v1.Experts, health and reflection.

The sync server: with large messages it answers faster than grpc's aio server and spends less
(docs/benchmarks has the numbers), and its handler threads only wait for the executor.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertd.engine.ticket import Ticket
from expertd.errors import DeadlineExceeded, InvalidArgument, TooLarge
from expertd.transport import messages
from expertd.transport.calls import Desk, note_plan
from expertd.transport.interceptors import guarded
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardReply
from expertd_wire.methods import MESSAGE_SLACK_BYTES, SERVICE
from expertd_wire.v1 import experts_pb2 as pb

M = TypeVar("M", bound=Message)

HEALTH_SERVICES = ("", SERVICE)


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """What one server takes at once."""

    max_message_bytes: int
    max_concurrent_calls: int


class ExpertsService:
    """The methods of expertd_wire.v1.Experts, all on raw bytes."""

    def __init__(self, desk: Desk, max_message_bytes: int, capabilities: Callable[[], Message]):
        self._desk = desk
        self._max_message_bytes = max_message_bytes
        self._capabilities = capabilities

    def forward(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._desk.recorded() as record:
            if len(request) > self._max_message_bytes:
                raise TooLarge(
                    f"{len(request)} bytes given, at most {self._max_message_bytes} accepted "
                    "(--max-message-bytes)"
                )
            call = self._desk.timed("decode", lambda: decode_forward_call(request))
            ticket = self._desk.submit(record, call, _deadline(context))
            reply = note_plan(record, self._wait(ticket, context))
            return self._desk.timed("encode", lambda: encode_forward_reply(reply))

    def _wait(self, ticket: Ticket, context: grpc.ServicerContext) -> ForwardReply:
        context.add_callback(lambda: self._desk.engine.cancel(ticket))
        try:
            return ticket.future.result(_remaining(ticket.deadline))
        except TimeoutError:
            self._desk.engine.cancel(ticket)
            raise DeadlineExceeded(
                "the call's deadline passed before its answer was ready"
            ) from None

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
            "Forward": self.forward,
            "ListLayers": self.list_layers,
            "GetLayer": self.get_layer,
            "GetCapabilities": self.get_capabilities,
        }
        return {
            name: grpc.unary_unary_rpc_method_handler(guarded(method))
            for name, method in methods.items()
        }


class GrpcServer:
    """The gRPC server of a process."""

    def __init__(self, service: ExpertsService, limits: GrpcLimits) -> None:
        most = limits.max_message_bytes + MESSAGE_SLACK_BYTES
        self._server = grpc.server(
            ThreadPoolExecutor(limits.max_concurrent_calls, thread_name_prefix="grpc"),
            maximum_concurrent_rpcs=limits.max_concurrent_calls,
            options=[
                ("grpc.max_receive_message_length", most),
                ("grpc.max_send_message_length", most),
                ("grpc.so_reuseport", 0),
            ],
        )
        handler = grpc.method_handlers_generic_handler(SERVICE, service.handlers())
        self._server.add_generic_rpc_handlers((handler,))
        self._health = health.HealthServicer(
            experimental_non_blocking=True, experimental_thread_pool=ThreadPoolExecutor(1)
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.set_serving(False)

    def bind(self, host: str, port: int) -> int:
        """The port that was bound (port 0 chooses); raises RuntimeError if it is taken."""
        return int(self._server.add_insecure_port(f"{host}:{port}"))

    def start(self) -> None:
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 says of the whole server and of each service."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        value = status.Value("SERVING" if serving else "NOT_SERVING")
        for name in HEALTH_SERVICES:
            self._health.set(name, value)

    def stop(self, grace: float) -> None:
        """Refuses new calls and waits up to grace seconds for those that run."""
        self._health.enter_graceful_shutdown()
        self._server.stop(grace).wait()


def parse(kind: type[M], data: bytes) -> M:
    """A message from a caller's bytes; raises InvalidArgument, never INTERNAL."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise InvalidArgument(f"these {len(data)} bytes are no {kind.DESCRIPTOR.name}") from None


def _bytes(message: Message) -> bytes:
    return bytes(message.SerializeToString())


def _deadline(context: grpc.ServicerContext) -> float | None:
    remaining = context.time_remaining()
    # A call without a deadline reports a remaining time of some centuries.
    return None if remaining is None or remaining > 1e8 else time.monotonic() + remaining


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())
