"""gRPC: raw bytes both ways, and the one place where its errors become ours."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import grpc
import grpc.aio

from expertd_client.errors import ExpertdError, InvalidArgument, Unavailable, error_for
from expertd_client.transport.base import AsyncTransport, ByteStream, Transport
from expertd_wire.methods import (
    DEFAULT_MAX_MESSAGE_BYTES,
    FORWARD,
    FORWARD_STREAM,
    MESSAGE_SLACK_BYTES,
    STATUS_KEY,
)
from expertd_wire.status import UnpackedStatus, unpack_status
from expertd_wire.tensors import WireError

MESSAGE_BYTES = 8 << 20
"""Python's gRPC copies a message several times; larger ones always into memory that is new."""

CLOSED = "this client was closed; make another one"

_TOKEN = re.compile(r"[\x21-\x7e]+")
_TARGET = re.compile(r"\S+")
_OVER_LIMIT = re.compile(r"message larger than max", re.IGNORECASE)


def bearer(token: str | None) -> tuple[tuple[str, str], ...]:
    """A token as metadata, if any; raises InvalidArgument without repeating a bad one."""
    if token is None:
        return ()
    if not _TOKEN.fullmatch(token):
        raise InvalidArgument("token: printable ASCII without blanks is accepted")
    return (("authorization", f"Bearer {token}"),)


@dataclass(frozen=True, kw_only=True, slots=True)
class GrpcSettings:
    """How to reach a server; credentials None means no TLS.

    Raises InvalidArgument for what is no target at all.
    """

    target: str
    token: str | None = None
    credentials: grpc.ChannelCredentials | None = None
    max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES

    def __post_init__(self) -> None:
        if not _TARGET.fullmatch(self.target):
            accepted = "HOST:PORT is accepted, and what gRPC resolves, such as dns:///NAME:PORT"
            raise InvalidArgument(f"target {self.target!r}: {accepted}")

    def options(self) -> list[tuple[str, int]]:
        """Channel options: the limit in both directions, and a connection of the client's own."""
        limit = min(self.max_message_bytes + MESSAGE_SLACK_BYTES, 2**31 - 1)
        return [
            ("grpc.max_send_message_length", limit),
            ("grpc.max_receive_message_length", limit),
            ("grpc.use_local_subchannel_pool", 1),
            # A server that has just started is seen soon, not after gRPC's two minutes.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 2000),
        ]

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call; raises as bearer() does."""
        return bearer(self.token)

    def channel(self, library: Any) -> Any:
        """A channel of grpc or grpc.aio."""
        if self.credentials is None:
            return library.insecure_channel(self.target, self.options())
        return library.secure_channel(self.target, self.credentials, self.options())

    def translated(self, error: grpc.RpcError) -> ExpertdError:
        """The error that a server, a proxy or gRPC itself reported."""
        found = _status(error)
        if not found.reason and _OVER_LIMIT.search(found.message):
            return self._too_large(found.message)
        if not found.reason and found.code == "CANCELLED":
            # Nobody here cancelled it: a server that shuts down drops what it has not taken so.
            return Unavailable("the server went away before it took this call; retry elsewhere")
        if not found.reason and found.code == "INTERNAL":
            # A server says its reason: this is of a stream that broke off, or a proxy's.
            return Unavailable(f"no server answered: {found.message}")
        return error_for(*found)

    def _too_large(self, text: str) -> InvalidArgument:
        return InvalidArgument(
            f"{text}. Two limits apply: --max-message-bytes on the server and max_message_bytes "
            f"of this client ({self.max_message_bytes}). Raise the one exceeded, or send fewer "
            "rows in a call",
            reason="TOO_LARGE",
        )


class GrpcTransport(Transport):
    """Client's carrier over one HTTP/2 connection; threads may share it."""

    message_bytes = MESSAGE_BYTES

    def __init__(self, settings: GrpcSettings) -> None:
        self._settings = settings
        self._metadata = settings.metadata()
        self._channel = settings.channel(grpc)
        self._forward = self._channel.unary_unary(FORWARD)
        self._closed = False

    def forward(self, request: bytes, timeout: float | None) -> bytes:
        return self._call(self._forward, request, timeout)

    def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        return self._call(self._channel.unary_unary(path), request, timeout)

    def close(self) -> None:
        self._closed = True
        self._channel.close()

    def _call(self, method: Any, request: bytes, timeout: float | None) -> bytes:
        try:
            reply: bytes = method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._settings.translated(error) from error
        except ValueError as error:  # gRPC's word for a call on a closed channel
            if not self._closed:
                raise
            raise Unavailable(CLOSED) from error
        return reply


class AsyncGrpcTransport(AsyncTransport):
    """AsyncClient's carrier; the connection belongs to the event loop of the first call."""

    message_bytes = MESSAGE_BYTES

    def __init__(self, settings: GrpcSettings) -> None:
        self._settings = settings
        self._metadata = settings.metadata()

    @cached_property
    def _home(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    @cached_property
    def _dialled(self) -> Any:
        return self._settings.channel(grpc.aio)

    @property
    def _channel(self) -> Any:
        """The connection, for the loop that it belongs to; raises InvalidArgument in others."""
        if self._home is not asyncio.get_running_loop():
            raise InvalidArgument(
                "this AsyncClient belongs to the event loop of its first call, and another one is "
                "running; make a client for each loop, inside what asyncio.run() runs, or take "
                "Client, which any thread may use"
            )
        return self._dialled

    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        return await self._call(FORWARD, request, timeout)

    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        return await self._call(path, request, timeout)

    def stream(self) -> ByteStream:
        opened = self._channel.stream_stream(FORWARD_STREAM)
        try:
            return GrpcByteStream(opened(metadata=self._metadata), self._settings)
        except grpc.aio.UsageError as error:
            raise Unavailable(CLOSED) from error

    async def close(self) -> None:
        await self._dialled.close()

    async def _call(self, path: str, request: bytes, timeout: float | None) -> bytes:
        method = self._channel.unary_unary(path)
        try:
            reply: bytes = await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.RpcError as error:
            raise self._settings.translated(error) from error
        except grpc.aio.UsageError as error:
            raise Unavailable(CLOSED) from error
        return reply


class GrpcByteStream(ByteStream):
    """One ForwardStream."""

    def __init__(self, call: Any, settings: GrpcSettings) -> None:
        self._call = call
        self._settings = settings

    async def send(self, request: bytes) -> None:
        await self._translated(self._call.write(request))

    async def receive(self) -> bytes | None:
        reply = await self._translated(self._call.read())
        return reply if isinstance(reply, bytes) else None

    async def close(self) -> None:
        self._call.cancel()

    async def _translated(self, step: Awaitable[Any]) -> Any:
        try:
            return await step
        except grpc.RpcError as error:
            raise self._settings.translated(error) from error
        except asyncio.InvalidStateError as error:
            raise Unavailable("the stream has ended; open another one") from error


def _status(error: Any) -> UnpackedStatus:
    """The rich status if the server sent a readable one, else gRPC's code and text."""
    plain = UnpackedStatus(error.code().name, "", error.details() or "", ())
    packed = dict(error.trailing_metadata() or ()).get(STATUS_KEY)
    if packed is None:
        return plain
    try:
        return unpack_status(packed)
    except WireError:
        return plain
