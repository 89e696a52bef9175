"""A pool's link over real gRPC: answers, errors, being taken back, health."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from tests.clients.servers import Server, refuse
from tests.strategies import wire_call
from torch import ones

from expertd_client.errors import DeadlineExceeded, InvalidArgument, Overloaded, Unavailable
from expertd_client.fleet.link import GrpcLink
from expertd_client.transport.grpc import GrpcSettings
from expertd_wire import methods
from expertd_wire.codec import decode_forward_reply, encode_forward_call
from expertd_wire.status import pack_status

CALL = encode_forward_call(wire_call(hidden_states=ones(2, 4)))


@pytest.fixture
async def link(server: Server) -> AsyncIterator[GrpcLink]:
    opened = GrpcLink(GrpcSettings(target=server.target, token="secret"))
    yield opened
    opened.close()


async def test_calls_and_questions(server: Server, link: GrpcLink) -> None:
    reply = decode_forward_reply(await link.forward(CALL, 10))
    assert reply.output is not None and reply.output.shape == (2, 4)
    assert server.metadata["authorization"] == "Bearer secret"
    assert 0 < (server.deadlines[0] or 0) < 11  # the two ends read their clocks by themselves
    assert await link.query(methods.HEALTH_CHECK, b"", 10) == b"\x08\x01"


async def test_errors_are_ours(server: Server, link: GrpcLink) -> None:
    server.answers[methods.FORWARD] = refuse("INVALID_ARGUMENT", "row 3 is odd")
    with pytest.raises(InvalidArgument, match="row 3 is odd"):
        await link.forward(CALL, 10)


async def test_the_retry_hint_arrives(server: Server, link: GrpcLink) -> None:
    def full(request: bytes, context: Any) -> bytes:
        status = pack_status("OVERLOADED", "full", (), 1.5)
        context.set_trailing_metadata(((methods.STATUS_KEY, status),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        raise AssertionError("abort has raised")

    server.answers[methods.FORWARD] = full
    with pytest.raises(Overloaded) as caught:
        await link.forward(CALL, 10)
    assert caught.value.retry_seconds == 1.5


async def test_a_call_is_taken_back(server: Server, link: GrpcLink) -> None:
    begun, ended = threading.Event(), threading.Event()

    def hang(request: bytes, context: Any) -> bytes:
        context.add_callback(ended.set)
        begun.set()
        ended.wait(10)
        return b""

    server.answers[methods.FORWARD] = hang
    call = asyncio.create_task(link.forward(CALL, 30))
    assert await asyncio.to_thread(begun.wait, 10)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert await asyncio.to_thread(ended.wait, 10)
    ended.clear()
    with pytest.raises(DeadlineExceeded):
        await link.forward(CALL, 0.2)


async def test_nobody_there(server: Server) -> None:
    link = GrpcLink(GrpcSettings(target="127.0.0.1:9"))
    with pytest.raises(Unavailable):
        await link.forward(CALL, 10)
    link.close()
    with pytest.raises(Unavailable, match="closed"):
        await link.forward(CALL, 10)


async def test_health_is_followed() -> None:
    servicer = health.HealthServicer()
    servicer.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    pool = ThreadPoolExecutor(4)
    server = grpc.server(pool)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    link = GrpcLink(GrpcSettings(target=f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"))
    server.start()
    told = []
    async for serving in link.watch():
        told.append(serving)
        if len(told) == 1:
            servicer.set("", health_pb2.HealthCheckResponse.SERVING)
        elif len(told) == 2:
            server.stop(None)
    assert told == [False, True], "a watch ends when its server is gone"
    link.close()
    await asyncio.to_thread(pool.shutdown)


async def test_a_server_without_health_is_not_in_service(server: Server, link: GrpcLink) -> None:
    assert [serving async for serving in link.watch()] == []
