"""A carrier without a network: a function answers. For tests, yours and ours."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from expertd_client.errors import ExpertdError
from expertd_client.transport.base import AsyncTransport, ByteStream, Transport
from expertd_wire.codec import decode_forward_call, encode_forward_reply
from expertd_wire.messages import ForwardReply
from expertd_wire.methods import FORWARD
from expertd_wire.status import pack_status

Handler = Callable[[str, bytes], bytes]
"""Takes a method's path and a request, gives the reply or raises an ExpertdError."""


class InProcessTransport(Transport):
    """Hands every request to handler, in the caller's thread; timeouts do not apply."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    def forward(self, request: bytes, timeout: float | None) -> bytes:
        return self._handler(FORWARD, request)

    def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        return self._handler(path, request)

    def close(self) -> None:
        """Nothing is held."""


class InProcessByteStream(ByteStream):
    """Answers each request as it is sent; an error becomes the status of its reply."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler
        self._replies: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def send(self, request: bytes) -> None:
        try:
            reply = self._handler(FORWARD, request)
        except ExpertdError as error:
            request_id = decode_forward_call(request).request_id
            status = pack_status(error.reason, str(error), error.reasons)
            reply = encode_forward_reply(ForwardReply(request_id=request_id, status=status))
        await self._replies.put(reply)

    async def receive(self) -> bytes | None:
        return await self._replies.get()

    async def close(self) -> None:
        await self._replies.put(None)


class AsyncInProcessTransport(AsyncTransport):
    """Hands every request to handler, on the event loop; timeouts do not apply."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        return self._handler(FORWARD, request)

    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        return self._handler(path, request)

    def stream(self) -> ByteStream:
        return InProcessByteStream(self._handler)

    async def close(self) -> None:
        """Nothing is held."""
