"""HTTP: the same calls with safetensors bodies, the questions as JSON, health and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import FastAPI, Header, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.exceptions import HTTPException
from swagger_ui_bundle import swagger_ui_path

from expertd import __version__
from expertd.errors import (
    Cancelled,
    DeadlineExceeded,
    ExpertdError,
    InvalidArgument,
    NotFound,
    TooLarge,
)
from expertd.transport import messages
from expertd.transport.calls import Desk, note_plan
from expertd.transport.interceptors import http_error, on_any_error, on_expertd_error
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.safetensors import decode_body, encode_body

FIELDS = ("hidden_states", "router_logits", "topk_ids", "topk_weights", "hidden_states_scale")
"""The tensors a body may hold, by their names in ForwardRequest."""

Question = Callable[[], Message]


def build_http(desk: Desk, max_message_bytes: int, capabilities: Question) -> FastAPI:
    """The HTTP application of a process."""
    app = FastAPI(title="expertd", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ExpertdError, on_expertd_error)
    app.add_exception_handler(RequestValidationError, _on_bad_value)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, on_any_error)
    _add_forward(app, desk, max_message_bytes)
    _add_questions(app, desk, capabilities)
    _add_health(app, desk)
    _add_docs(app)
    return app


def _add_forward(app: FastAPI, desk: Desk, max_message_bytes: int) -> None:
    @app.post("/v1/forward")
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
            body = await _body(request, max_message_bytes)
            tensors, _ = desk.timed("decode", lambda: decode_body(body))
            if unknown := sorted(set(tensors) - set(FIELDS)):
                raise InvalidArgument(f"tensors {unknown[:5]} given; accepted: {', '.join(FIELDS)}")
            call = ForwardCall(
                model=model,
                layer=layer,
                partial=partial,
                backend=backend,
                reply_dtype=reply_dtype,
                hidden_states_format=hidden_states_format,
                priority=priority,
                request_id=x_request_id,
                **tensors,
            )
            ticket = desk.submit(record, call, deadline)
            answer = asyncio.wrap_future(ticket.future)
            try:
                reply = await _first(answer, _disconnected(request), deadline - time.monotonic())
            except ExpertdError:
                desk.engine.cancel(ticket)
                raise
            note_plan(record, reply)
            content = desk.timed("encode", lambda: _encode(reply))
        return Response(content, media_type="application/octet-stream")


async def _first(
    answer: asyncio.Future[ForwardReply], left: Awaitable[None], seconds: float
) -> ForwardReply:
    """The answer, unless the deadline passes or the caller leaves before it."""
    gone = asyncio.ensure_future(left)
    try:
        await asyncio.wait((answer, gone), timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if answer.done():
            return answer.result()
        answer.cancel()
        if gone.done():
            raise Cancelled("the caller left")
        raise DeadlineExceeded("the timeout passed before the answer was ready")
    finally:
        gone.cancel()


async def _disconnected(request: Request) -> None:
    """Returns when the caller closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


async def _body(request: Request, limit: int) -> bytes:
    """The whole body; raises TooLarge before it is read, where the caller says how long it is."""
    declared = request.headers.get("content-length", "0")
    if not declared.isdecimal() or int(declared) > limit:
        raise _too_large(declared, limit)
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise _too_large(str(size), limit)
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _too_large(size: str, limit: int) -> TooLarge:
    return TooLarge(f"{size[:20]} bytes given, at most {limit} accepted (--max-message-bytes)")


def _encode(reply: ForwardReply) -> bytes:
    assert reply.output is not None
    names = ("backend", "mode", "entry", "queued_ns", "staged_ns", "computed_ns", "request_id")
    return encode_body(
        {"output": reply.output}, {name: str(getattr(reply, name)) for name in names}
    )


def _add_questions(app: FastAPI, desk: Desk, capabilities: Question) -> None:
    residents = desk.engine.residents

    @app.get("/v1/layers")
    def list_layers(model: str = "") -> dict[str, Any]:
        found = messages.list_layers(residents, model).layers
        return {"layers": [to_json(layer) for layer in found]}

    @app.get("/v1/layers/{model}/{layer}")
    def get_layer(model: str, layer: int) -> dict[str, Any]:
        return to_json(messages.layer_info(residents.get(model, layer)))

    @app.get("/v1/capabilities")
    def get_capabilities() -> dict[str, Any]:
        return to_json(capabilities())


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        """Whether this process can still work; 503 asks its supervisor to restart it."""
        healthy = desk.engine.healthy
        return JSONResponse({"healthy": healthy}, status_code=200 if healthy else 503)

    @app.get("/readyz")
    async def readyz() -> JSONResponse:
        missing = desk.engine.missing()
        body = {"ready": not missing, "missing": missing}
        return JSONResponse(body, status_code=503 if missing else 200)

    @app.get("/metrics")
    def metrics() -> Response:
        return Response(
            desk.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def _add_docs(app: FastAPI) -> None:
    app.mount("/docs/assets", StaticFiles(directory=swagger_ui_path))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="expertd",
            swagger_js_url="/docs/assets/swagger-ui-bundle.js",
            swagger_css_url="/docs/assets/swagger-ui.css",
            swagger_favicon_url="/docs/assets/favicon-32x32.png",
        )


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON, with the names of the .proto and with defaults written out."""
    body: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    return body


async def _on_bad_value(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return http_error(InvalidArgument("; ".join(faults)[:1000]))


async def _on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Starlette's own refusals (no such route, wrong method) in our shape."""
    assert isinstance(error, HTTPException)
    kind = NotFound if error.status_code == 404 else InvalidArgument
    response = http_error(kind(f"{request.method} {request.url.path[:100]}: {error.detail}"))
    response.status_code = error.status_code
    return response
