"""gRPC: the methods of expertd_wire.v1.Admin, which change the server's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import grpc

from expertd.engine.resident import Resident
from expertd.transport.interceptors import guarded
from expertd.transport.native import parse
from expertd_wire.v1 import experts_pb2 as pb


class Steward(Protocol):
    """What the admin methods ask of the process."""

    def load(self, model: str, layers: list[int]) -> list[Resident]:
        """Begins to load layers of a configured model (all when none are named)."""

    def unload(self, model: str, layers: list[int]) -> list[Resident]:
        """Forgets the weights of layers; calls that run keep theirs until they end."""

    def drain(self) -> list[Resident]:
        """Begins to drain the process."""


class AdminService:
    """The methods of expertd_wire.v1.Admin; each answers the states of the layers it touched."""

    def __init__(self, steward: Steward) -> None:
        self._steward = steward

    def load_layers(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = parse(pb.LoadLayersRequest, request)
        return _states(self._steward.load(asked.model, list(asked.layers)))

    def unload_layers(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        asked = parse(pb.UnloadLayersRequest, request)
        return _states(self._steward.unload(asked.model, list(asked.layers)))

    def drain(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        parse(pb.DrainRequest, request)
        return _states(self._steward.drain())

    def handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        """Method name → handler."""
        methods: dict[str, Callable[[bytes, grpc.ServicerContext], bytes]] = {
            "LoadLayers": self.load_layers,
            "UnloadLayers": self.unload_layers,
            "Drain": self.drain,
        }
        return {
            name: grpc.unary_unary_rpc_method_handler(guarded(method))
            for name, method in methods.items()
        }


def _states(residents: list[Resident]) -> bytes:
    layers = [
        pb.LayerStatus(model=r.model, layer=r.layer, state=r.state, detail=r.detail)
        for r in residents
    ]
    return bytes(pb.LayerStatesReply(layers=layers).SerializeToString())
