"""The questions a client may ask: where each goes, its bytes, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import index
from typing import Any, Generic, TypeVar

from google.protobuf.message import DecodeError, Message

from expertd_client.errors import ExpertdError, InvalidArgument
from expertd_wire import methods
from expertd_wire.v1 import experts_pb2 as pb

AnswerT = TypeVar("AnswerT")

_SERVING = b"\x08\x01"
"""A grpc.health.v1.HealthCheckResponse whose status is SERVING."""


@dataclass(frozen=True, slots=True)
class Query(Generic[AnswerT]):
    """A unary method, the bytes of its request and the reader of its answer."""

    path: str
    request: bytes
    read: Callable[[bytes], AnswerT]

    def answer(self, data: bytes) -> AnswerT:
        """What data says; raises ExpertdError if it is not the method's answer."""
        try:
            return self.read(data)
        except DecodeError as problem:
            raise ExpertdError(f"the server's answer to {self.path} cannot be read") from problem


def list_layers(model: str | None) -> Query[list[pb.LayerInfo]]:
    """Every layer of model, or of all models."""
    return Query(
        methods.LIST_LAYERS,
        _request(pb.ListLayersRequest, model=model or ""),
        lambda data: list(pb.ListLayersReply.FromString(data).layers),
    )


def get_layer(model: str, layer: int) -> Query[pb.LayerInfo]:
    """One layer."""
    request = _request(pb.GetLayerRequest, model=model, layer=index(layer))
    return Query(methods.GET_LAYER, request, pb.LayerInfo.FromString)


def get_capabilities() -> Query[pb.GetCapabilitiesReply]:
    """Every cell of the capability table with its state."""
    return Query(methods.GET_CAPABILITIES, b"", pb.GetCapabilitiesReply.FromString)


def check_health() -> Query[bool]:
    """Whether the whole server is SERVING; the request is empty because "" names the whole."""
    return Query(methods.HEALTH_CHECK, b"", lambda data: data == _SERVING)


def _request(kind: type[Message], **fields: Any) -> bytes:
    try:
        data: bytes = kind(**fields).SerializeToString()
    except ValueError as problem:
        raise InvalidArgument(f"{fields!r:.100} cannot travel: {problem}") from problem
    return data
