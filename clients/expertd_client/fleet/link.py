"""A connection to one replica for a pool's event loop: calls, questions, and its health."""

from __future__ import annotations

import asyncio
import threading
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc

from expertd_client.errors import Unavailable
from expertd_client.transport.base import WHOLE
from expertd_client.transport.grpc import MESSAGE_BYTES, GrpcSettings
from expertd_wire.methods import FORWARD, HEALTH_WATCH

SERVING = b"\x08\x01"
"""A grpc.health.v1.HealthCheckResponse whose status is SERVING."""

_RECONNECT_MS = 500
"""A replica that comes back is seen within this time, plus gRPC's own handshake."""


class Link(ABC):
    """What a pool asks of a carrier; every method raises ExpertdError and nothing else.

    message_bytes: rows of more bytes than these travel faster as several messages.
    """

    message_bytes = WHOLE

    @abstractmethod
    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        """The reply to a ForwardRequest; cancelling takes the call back."""

    @abstractmethod
    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        """The answer to a unary method that carries no tensors."""

    @abstractmethod
    def watch(self) -> AsyncIterator[bool]:
        """Whether the server is serving, now and whenever that changes; ends when it is gone."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the link holds."""


Connect = Callable[[str], Link]


class GrpcLink(Link):
    """A channel of gRPC's own threads, which an event loop waits for.

    Not grpc.aio: of that, one process can have one loop only, and that is the caller's.
    """

    message_bytes = MESSAGE_BYTES

    def __init__(self, settings: GrpcSettings) -> None:
        self._settings = settings
        self._metadata = settings.metadata()
        self._channel = _channel(settings)
        self._forward = self._channel.unary_unary(FORWARD)

    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        return await self._call(self._forward, request, timeout)

    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        return await self._call(self._channel.unary_unary(path), request, timeout)

    async def watch(self) -> AsyncIterator[bool]:
        method = self._channel.unary_stream(HEALTH_WATCH)
        call = method(b"", metadata=self._metadata, wait_for_ready=True)
        told: asyncio.Queue[bool | None] = asyncio.Queue()
        tell = _from_thread(told.put_nowait)
        threading.Thread(target=_listen, args=(call, tell), name="watch", daemon=True).start()
        try:
            while (serving := await told.get()) is not None:
                yield serving
        finally:
            call.cancel()

    def close(self) -> None:
        self._channel.close()

    async def _call(self, method: Any, request: bytes, timeout: float | None) -> bytes:
        ended = asyncio.Event()
        try:
            call = method.future(request, timeout=timeout, metadata=self._metadata)
        except ValueError as error:
            raise Unavailable("the connection was closed") from error
        call.add_done_callback(_from_thread(lambda _: ended.set()))
        try:
            await ended.wait()
        except asyncio.CancelledError:
            call.cancel()
            raise
        return self._answer(call)

    def _answer(self, call: Any) -> bytes:
        try:
            reply: bytes = call.result()
        except grpc.RpcError as error:
            raise self._settings.translated(error) from error
        except grpc.FutureCancelledError as error:
            raise Unavailable("the connection was closed") from error
        return reply


def _channel(settings: GrpcSettings) -> Any:
    quick = [
        (name, min(int(value), _RECONNECT_MS) if name.endswith("_backoff_ms") else value)
        for name, value in settings.options()
    ]
    if settings.credentials is None:
        return grpc.insecure_channel(settings.target, quick)
    return grpc.secure_channel(settings.target, settings.credentials, quick)


def _listen(call: Any, tell: Callable[[bool | None], None]) -> None:
    """Tells every message of a health watch, then None."""
    with suppress(grpc.RpcError):
        for message in call:
            tell(message == SERVING)
    tell(None)


def _from_thread(step: Callable[[Any], None]) -> Callable[[Any], None]:
    """step on this loop, called from any thread, or not at all once the loop has ended."""
    loop = asyncio.get_running_loop()

    def call(value: Any) -> None:
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(step, value)

    return call
