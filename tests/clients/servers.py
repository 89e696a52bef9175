"""A tiny real gRPC server: whatever a test says is the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from expertd_wire import methods
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.errors import REASONS, Refusal
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.status import make_status
from expertd_wire.tensors import WireTensor
from expertd_wire.v1 import experts_pb2 as pb

Answer = Callable[[bytes, Any], bytes]


@dataclass
class Server(grpc.GenericRpcHandler):  # type: ignore[misc]
    """Echoes rows, knows one layer, is SERVING; calls holds each call as it came."""

    target: str = ""
    answers: dict[str, Answer] = field(default_factory=dict)
    calls: list[ForwardCall] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    deadlines: list[float | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.answers |= {
            methods.FORWARD: self.echo,
            methods.LIST_LAYERS: lambda request, context: list_layers(request),
            methods.GET_LAYER: lambda request, context: get_layer(request),
            methods.GET_CAPABILITIES: lambda request, context: capabilities(request),
            methods.HEALTH_CHECK: lambda request, context: b"\x08\x01",
        }

    def service(self, details: Any) -> Any:
        self.metadata = dict(details.invocation_metadata)
        return grpc.unary_unary_rpc_method_handler(self.answers[details.method])

    def echo(self, request: bytes, context: Any) -> bytes:
        self.deadlines.append(context.time_remaining())
        self.calls.append(decode_forward_call(request))
        return echo(request)


def echo(request: bytes) -> bytes:
    """The reply of an identity layer; reply_dtype is honoured by name only, for empty rows."""
    call = decode_forward_call(request)
    assert call.hidden_states is not None
    dtype = call.reply_dtype or call.hidden_states.dtype
    output = WireTensor(dtype, call.hidden_states.shape, call.hidden_states.data)
    reply = ForwardReply(output, "identity", "routed", "identity", 1, 2, 3, call.request_id)
    return encode_forward_reply(reply)


def list_layers(request: bytes) -> bytes:
    model = pb.ListLayersRequest.FromString(request).model
    names = [model] if model else ["a", "b"]
    layers = [pb.LayerInfo(model=name, layer=3, state="ready", hidden=256) for name in names]
    data: bytes = pb.ListLayersReply(layers=layers).SerializeToString()
    return data


def get_layer(request: bytes) -> bytes:
    asked = pb.GetLayerRequest.FromString(request)
    data: bytes = pb.LayerInfo(model=asked.model, layer=asked.layer).SerializeToString()
    return data


def capabilities(request: bytes) -> bytes:
    cells = [pb.Cell(backend="triton", state="proven")]
    data: bytes = pb.GetCapabilitiesReply(device="cpu", cells=cells).SerializeToString()
    return data


def refuse(reason: str, message: str, refusals: tuple[Refusal, ...] = ()) -> Answer:
    """An answer that ends every call as expertd does for this reason."""
    status = make_status(reason, message, refusals)

    def answer(request: bytes, context: Any) -> bytes:
        context.set_trailing_metadata(((methods.STATUS_KEY, status.SerializeToString()),))
        context.abort(grpc.StatusCode[REASONS[reason].grpc], status.message)
        raise AssertionError("abort has raised")

    return answer


@contextmanager
def serving(max_message_bytes: int = 8 << 20) -> Iterator[Server]:
    """A server on a free port that takes messages of up to max_message_bytes."""
    handler = Server()
    options = [("grpc.max_receive_message_length", max_message_bytes)]
    with ThreadPoolExecutor(4) as pool:
        server = grpc.server(pool, handlers=(handler,), options=options)
        handler.target = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        try:
            yield handler
        finally:
            server.stop(None).wait()
