"""HTTP: POST /v1/forward, whose body and reply are safetensors."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, Header, Query, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from expertd.engine.ticket import Ticket
from expertd.errors import (
    Cancelled,
    DeadlineExceeded,
    ExpertdError,
    InvalidArgument,
)
from expertd.transport.callers import http_caller
from expertd.transport.calls import Desk, note_plan
from expertd.transport.http_docs import SAFETENSORS, reads
from expertd.transport.ingress import Ingress
from expertd.transport.interceptors import request_id_of
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.safetensors import decode_body, encode_body
from expertd_wire.tensors import WireTensor

FIELDS = ("hidden_states", "router_logits", "topk_ids", "topk_weights", "hidden_states_scale")
"""The tensors a body may hold, by their names in ForwardRequest."""

FACTS = ("backend", "mode", "entry", "queued_ns", "staged_ns", "computed_ns", "request_id")
"""What the reply's metadata tells of the plan that ran."""


@asynccontextmanager
async def held_body(ingress: Ingress, request: Request, deadline: float) -> AsyncIterator[bytes]:
    """The whole body; raises TooLarge or Overloaded before anything of it is read."""
    size = _declared(ingress, request)
    ingress.take(size)
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            body = await read_body(request, ingress.check)
        yield body
    except TimeoutError:
        raise DeadlineExceeded("the timeout passed before the body had arrived") from None
    finally:
        ingress.give(size)


def _declared(ingress: Ingress, request: Request) -> int:
    """What the caller says it will send; an unknown length counts as the longest."""
    return ingress.announced(request.headers.get("content-length", str(ingress.max_message_bytes)))


async def read_body(request: Request, check: Callable[[int], None]) -> bytes:
    """A body whose length so far is checked as it grows; raises Cancelled if the caller leaves."""
    parts: list[bytes] = []
    size = 0
    try:
        async for part in request.stream():
            size += len(part)
            check(size)
            parts.append(part)
    except ClientDisconnect:
        raise Cancelled("the caller left before the body had arrived") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def add_forward(app: FastAPI, desk: Desk, ingress: Ingress) -> None:
    """Adds the route to the application."""

    @app.post(
        "/v1/forward",
        openapi_extra=reads(SAFETENSORS),
        response_class=Response,
        responses={200: SAFETENSORS},
    )
    async def forward(
        request: Request,
        model: str,
        layer: int,
        backend: str = "",
        partial: bool = False,
        reply_dtype: str = "",
        hidden_states_format: str = "",
        priority: int = 0,
        timeout: Annotated[float, Query(gt=0, le=3600)] = 30.0,
        x_request_id: Annotated[str, Header()] = "",
    ) -> Response:
        """Body and reply are safetensors; the plan and the times are in the reply's metadata."""
        deadline = time.monotonic() + timeout
        with desk.recorded() as record:
            record.model, record.request_id = model, x_request_id
            async with held_body(ingress, request, deadline) as body:
                call = ForwardCall(
                    model=model,
                    layer=layer,
                    partial=partial,
                    backend=backend,
                    reply_dtype=reply_dtype,
                    hidden_states_format=hidden_states_format,
                    priority=priority,
                    request_id=x_request_id,
                    **desk.timed(record, "decode", _tensors, body),
                )
                ticket = desk.submit(record, call, deadline, http_caller(request))
                reply = note_plan(record, await _answer(desk, request, ticket))
            content = desk.timed(record, "encode", _encode, reply)
            ingress.take(len(content))
        return Answer(content, ingress, request_id_of(request))


class Answer(Response):
    """A reply whose bytes, taken from the account, are given back when its caller has read them."""

    media_type = "application/octet-stream"

    def __init__(self, content: bytes, ingress: Ingress, headers: dict[str, str]) -> None:
        super().__init__(content, headers=headers)
        self._ingress = ingress

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send(
                {
                    "type": "http.response.start",
                    "status": self.status_code,
                    "headers": self.raw_headers,
                }
            )
            await send({"type": "http.response.body", "body": self.body, "more_body": True})
            await send({"type": "http.response.body", "body": b""})  # waits for what was written
        finally:
            self._ingress.give(len(self.body))


def _tensors(body: bytes) -> dict[str, WireTensor]:
    tensors, _ = decode_body(body)
    if unknown := sorted(set(tensors) - set(FIELDS)):
        shown = ", ".join(unknown[:5])[:200]
        raise InvalidArgument(f"tensors {shown!r} given; accepted: {', '.join(FIELDS)}")
    return tensors


async def _answer(desk: Desk, request: Request, ticket: Ticket) -> ForwardReply:
    """The reply; the ticket is taken back when the deadline passes or the caller leaves first."""
    assert ticket.deadline is not None
    answer = asyncio.wrap_future(ticket.future)
    try:
        return await _first(answer, _left(request), ticket.deadline - time.monotonic())
    except ExpertdError:
        desk.engine.cancel(ticket)
        raise


async def _first(
    answer: asyncio.Future[ForwardReply], left: Awaitable[None], seconds: float
) -> ForwardReply:
    gone = asyncio.ensure_future(left)
    try:
        await asyncio.wait((answer, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        if gone.done():
            raise Cancelled("the caller left")
        raise DeadlineExceeded("the timeout passed before the answer was ready")
    finally:
        answer.cancel()
        gone.cancel()


async def _left(request: Request) -> None:
    """Returns when the caller closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _encode(reply: ForwardReply) -> bytes:
    assert reply.output is not None
    return encode_body(
        {"output": reply.output}, {name: str(getattr(reply, name)) for name in FACTS}
    )
