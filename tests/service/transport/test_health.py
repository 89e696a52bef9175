"""Health belongs to one server: what another of the process does is nothing to it."""

from __future__ import annotations

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.transport.auth import Guard
from expertd.transport.grpc_server import GrpcLimits, GrpcServer

LIMITS = GrpcLimits(max_message_bytes=1000, max_concurrent_calls=3, max_header_bytes=8192)


def started() -> tuple[GrpcServer, int]:
    server = GrpcServer({}, LIMITS, Guard(), None, lambda: None)
    port = server.bind("127.0.0.1", 0)
    server.start()
    return server, port


def test_a_server_is_watched_though_one_made_after_it_has_ended() -> None:
    server, port = started()
    started()[0].stop(0.1)
    asked = health_pb2.HealthCheckRequest()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(asked, timeout=10)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        server.set_serving(True)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        assert stub.Check(asked, timeout=10).status == health_pb2.HealthCheckResponse.SERVING
        watch.cancel()
    server.stop(1)
