"""A carrier without a network: a function answers. For tests, yours and ours."""

from __future__ import annotations

from collections.abc import Callable

from expertd_client.transport.base import AsyncTransport, Transport
from expertd_wire.methods import FORWARD

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


class AsyncInProcessTransport(AsyncTransport):
    """Hands every request to handler, on the event loop; timeouts do not apply."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def forward(self, request: bytes, timeout: float | None) -> bytes:
        return self._handler(FORWARD, request)

    async def query(self, path: str, request: bytes, timeout: float | None) -> bytes:
        return self._handler(path, request)

    async def close(self) -> None:
        """Nothing is held."""
