"""Many calls at once on one stream; replies find their calls by request id."""

from __future__ import annotations

import asyncio
import itertools
from types import TracebackType
from typing import Self, Unpack

from expertd_client.calls import ArrayT, CallOptions, Reply, decode_reply, encode_call, spelled_out
from expertd_client.errors import (
    DeadlineExceeded,
    ExpertdError,
    InvalidArgument,
    Unavailable,
    error_for,
)
from expertd_client.timeouts import limit
from expertd_client.transport.base import ByteStream
from expertd_wire.codec import decode_forward_reply
from expertd_wire.status import unpack_status
from expertd_wire.tensors import WireError


class CallStream:
    """A stream of calls; a failed call raises its error and leaves the stream to the others."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._ids = itertools.count(1)
        self._waiting: dict[str, asyncio.Future[bytes]] = {}
        self._sending = asyncio.Lock()
        self._ended: ExpertdError | None = None
        self._reader: asyncio.Task[None] | None = None

    @spelled_out
    async def call(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> Reply[ArrayT]:
        """One call, as AsyncClient.call; calls of one stream may be awaited in any order."""
        request_id = options.get("request_id") or f"stream-{next(self._ids)}"
        options["request_id"] = request_id
        if self._ended is not None:
            raise self._ended
        if request_id in self._waiting:
            raise InvalidArgument(f"request_id {request_id!r} is already under way on this stream")
        request = encode_call(model, layer, hidden_states, **options)
        reply: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[request_id] = reply
        try:
            async with asyncio.timeout(limit(timeout)):
                await self._send(request)
                return decode_reply(await reply, hidden_states)
        except TimeoutError:
            raise DeadlineExceeded(f"no reply within {timeout} s") from None
        finally:
            self._waiting.pop(request_id, None)
            if reply.done() and not reply.cancelled():
                reply.exception()  # counts as seen, also where sending was what failed

    @spelled_out
    async def forward(
        self,
        model: str,
        layer: int,
        hidden_states: ArrayT,
        *,
        timeout: float | None = 30.0,
        **options: Unpack[CallOptions],
    ) -> ArrayT:
        """The experts' output alone."""
        reply = await self.call(model, layer, hidden_states, timeout=timeout, **options)
        return reply.output

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
        await self._stream.close()
        self._end(Unavailable("the stream was closed"))

    async def _send(self, request: bytes) -> None:
        """Hands over a request once it is its turn; one that has begun is never broken off.

        A caller may leave in the middle, but half a message would be the end of the stream.
        """
        await self._sending.acquire()
        writing = asyncio.ensure_future(self._stream.send(request))
        writing.add_done_callback(self._sent)
        await asyncio.shield(writing)

    def _sent(self, writing: asyncio.Future[None]) -> None:
        self._sending.release()
        if not writing.cancelled():
            writing.exception()  # of a caller who has left it is nobody's

    async def _read(self) -> None:
        try:
            while (data := await self._stream.receive()) is not None:
                self._deliver(data)
            self._end(Unavailable("the server ended the stream"))
        except WireError as problem:
            self._end(ExpertdError(f"the server's reply cannot be read: {problem}"))
        except ExpertdError as error:
            self._end(error)

    def _deliver(self, data: bytes) -> None:
        """Hands a reply, or the error it carries, to the call that waits; raises WireError."""
        reply = decode_forward_reply(data)
        error = error_for(*unpack_status(reply.status)) if reply.status else None
        waiting = self._waiting.get(reply.request_id)
        if waiting is None or waiting.done():
            return
        if error is None:
            waiting.set_result(data)
        else:
            waiting.set_exception(error)

    def _end(self, error: ExpertdError) -> None:
        """Tells those who wait, and those who come later, why there will be no more replies."""
        self._ended = self._ended or error
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
