"""The gRPC server: services, health, reflection, limits, the door.

The sync server: small calls of a lone caller cost it less than grpc's aio server (docs/benchmarks).
A Forward call takes none of its threads while it waits for the executor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertd.transport.auth import Guard
from expertd.transport.door import GrpcDoor
from expertd.transport.grpc_tls import grpc_credentials
from expertd.transport.tls import TlsFiles
from expertd.transport.workers import Health, Refuser, Service, Workers
from expertd_wire.methods import MESSAGE_SLACK_BYTES

MOST_REFUSALS = 1024
"""How many calls may be refused at once; beyond that gRPC refuses, in its own words."""


@dataclass(frozen=True, slots=True)
class GrpcLimits:
    """What one server takes at once."""

    max_message_bytes: int
    max_concurrent_calls: int
    max_header_bytes: int


class GrpcServer:
    """The gRPC server of a process; services are name → (method name → handler).

    refused is called for each call beyond max_concurrent_calls.
    """

    def __init__(
        self,
        services: Mapping[str, Mapping[str, grpc.RpcMethodHandler]],
        limits: GrpcLimits,
        guard: Guard,
        tls: TlsFiles | None,
        refused: Callable[[], None],
    ) -> None:
        self._tls = tls
        refuser = Refuser()
        self._workers = workers = Workers(limits.max_concurrent_calls)
        self._server = grpc.server(
            workers,
            maximum_concurrent_rpcs=limits.max_concurrent_calls + MOST_REFUSALS,
            # Without tokens everybody may pass, and a door would cost each call some microseconds.
            interceptors=(GrpcDoor(guard, refuser),) if guard.tokens else (),
            options=_options(limits),
        )
        handlers = [Service(*named, workers, refuser, refused) for named in services.items()]
        self._server.add_generic_rpc_handlers(tuple(handlers))
        self._health = Health()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._names = tuple(services)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)
        self.set_serving(False)

    def bind(self, host: str, port: int) -> int:
        """The port that was bound (port 0 chooses); raises RuntimeError if it is taken."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        if self._tls is None:
            return int(self._server.add_insecure_port(address))
        return int(self._server.add_secure_port(address, grpc_credentials(self._tls)))

    def start(self) -> None:
        self._server.start()

    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 says of the whole server and of each service."""
        status = health_pb2.HealthCheckResponse.ServingStatus
        value = status.Value("SERVING" if serving else "NOT_SERVING")
        for name in ("", *self._names):
            self._health.set(name, value)

    def stop(self, grace: float) -> None:
        """Refuses new calls and waits up to grace seconds for those that run."""
        self._health.enter_graceful_shutdown()
        ended = self._server.stop(grace)
        self._health.end_watches()
        ended.wait()
        self._workers.close()
        self._health.close()


def _options(limits: GrpcLimits) -> list[tuple[str, int]]:
    most = limits.max_message_bytes + MESSAGE_SLACK_BYTES
    return [
        ("grpc.max_receive_message_length", most),
        ("grpc.max_send_message_length", most),
        ("grpc.max_metadata_size", limits.max_header_bytes),
        ("grpc.absolute_max_metadata_size", limits.max_header_bytes),
        # Two servers on one port would share its callers without a word.
        ("grpc.so_reuseport", 0),
    ]
