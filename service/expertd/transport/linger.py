"""HTTP: a caller that is refused while it still sends can read why.

A connection that closes with bytes unread is reset, and the answer is lost with it: callers that
send all of their body first, as urllib does, would see a broken pipe for each refusal.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from contextlib import suppress
from typing import Any

from expertd.transport.door import ASGIApp, ASGIMessage, Receive, Send

LINGER_SECONDS = 5.0
BODY_HEADERS = {b"content-length", b"transfer-encoding"}


class Linger:
    """Answers at once, but ends an answer only when its request was read, or after a while."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if not BODY_HEADERS.isdisjoint(name for name, _ in scope.get("headers", ())):
            exchange = _Exchange(receive, send)
            receive, send = exchange.receive, exchange.send
        await self._app(scope, receive, send)


class _Exchange:
    """One request with a body, and its answer."""

    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._unread = True

    async def receive(self) -> ASGIMessage:
        message = await self._receive()
        self._unread = message.get("more_body", False)  # a caller that left sends no more
        return message

    async def send(self, message: ASGIMessage) -> None:
        last = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not (last and self._unread):
            return await self._send(message)
        await self._send({**message, "more_body": True})
        with suppress(TimeoutError):
            async with asyncio.timeout(LINGER_SECONDS):
                await self._forget_rest()
        await self._send({"type": "http.response.body", "body": b""})

    async def _forget_rest(self) -> None:
        while self._unread:
            await self.receive()
