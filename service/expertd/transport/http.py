"""HTTP: the application, with the questions as JSON, health, metrics and docs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from expertd import __version__
from expertd.capability.explain import explain_request
from expertd.errors import DeadlineExceeded, ExpertdError, InvalidArgument, NotFound, TooLarge
from expertd.transport import messages
from expertd.transport.calls import Desk
from expertd.transport.http_docs import QUESTION, add_docs, reads
from expertd.transport.http_forward import add_forward, read_body
from expertd.transport.ingress import Ingress
from expertd.transport.interceptors import http_error, on_any_error, on_expertd_error

Question = Callable[[], Message]

MAX_QUESTION_BYTES = 1 << 20
QUESTION_SECONDS = 10.0
WIDE_INTEGERS = ("shape", "expert_rows")
"""Lists of 64-bit integers, which protobuf's JSON writes as strings."""


def build_http(desk: Desk, ingress: Ingress, capabilities: Question) -> FastAPI:
    """The HTTP application of a process."""
    app = FastAPI(title="expertd", version=__version__, docs_url=None, redoc_url=None)
    app.add_exception_handler(ExpertdError, on_expertd_error)
    app.add_exception_handler(RequestValidationError, _on_bad_value)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, on_any_error)
    add_forward(app, desk, ingress)
    _add_questions(app, desk, capabilities)
    _add_health(app, desk)
    add_docs(app)
    return app


def _add_questions(app: FastAPI, desk: Desk, capabilities: Question) -> None:
    residents = desk.engine.residents

    @app.get("/v1/layers")
    def list_layers(model: str = "") -> dict[str, Any]:
        found = messages.list_layers(residents, model).layers
        return {"layers": [to_json(layer) for layer in found]}

    @app.get("/v1/layers/{model:path}/{layer}")
    def get_layer(model: str, layer: int) -> dict[str, Any]:
        return to_json(messages.layer_info(residents.get(model, layer)))

    @app.get("/v1/capabilities")
    def get_capabilities() -> dict[str, Any]:
        return to_json(capabilities())

    @app.post("/v1/explain", openapi_extra=reads(QUESTION))
    async def post_explain(request: Request) -> dict[str, Any]:
        """Which plans a layer would have, and why every other row has none; see expertd explain."""
        return await run_in_threadpool(explain_request, await _json_body(request))


def _add_health(app: FastAPI, desk: Desk) -> None:
    @app.head("/healthz", include_in_schema=False)
    @app.get("/healthz", responses={503: {"description": "It cannot"}})
    async def healthz() -> JSONResponse:
        """Whether this process can still work; 503 asks its supervisor to restart it."""
        healthy = desk.engine.healthy
        return JSONResponse({"healthy": healthy}, status_code=200 if healthy else 503)

    @app.head("/readyz", include_in_schema=False)
    @app.get("/readyz", responses={503: {"description": "Not ready"}})
    async def readyz() -> JSONResponse:
        """Whether calls are answered, and what is missing until they are."""
        missing = desk.engine.missing()
        body = {"ready": not missing, "missing": missing}
        return JSONResponse(body, status_code=503 if missing else 200)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(
            desk.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )


def to_json(message: Message) -> dict[str, Any]:
    """A message as JSON, with the names of the .proto and with defaults written out."""
    body: dict[str, Any] = MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
    numbered: dict[str, Any] = _with_numbers(body)
    return numbered


def _with_numbers(value: Any) -> Any:
    """Numbers as numbers, in the lists that are WIDE_INTEGERS, and in order where they are keys."""
    if isinstance(value, list):
        return [_with_numbers(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = sorted(value.items(), key=_number) if all(map(str.isdecimal, value)) else value.items()
    return {
        key: [int(size) for size in item] if key in WIDE_INTEGERS else _with_numbers(item)
        for key, item in items
    }


def _number(item: tuple[str, Any]) -> int:
    return int(item[0])


async def _json_body(request: Request) -> Any:
    """A small JSON body; raises TooLarge, DeadlineExceeded, InvalidArgument."""

    def check(size: int) -> None:
        if size > MAX_QUESTION_BYTES:
            raise TooLarge(f"more than {MAX_QUESTION_BYTES} bytes of JSON are not accepted")

    try:
        async with asyncio.timeout(QUESTION_SECONDS):
            found = json.loads(await read_body(request, check))
        # Half of a surrogate pair is no text: no answer could repeat it.
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except TimeoutError:
        raise DeadlineExceeded(f"no whole body within {QUESTION_SECONDS:g} s") from None
    except (ValueError, RecursionError):
        raise InvalidArgument("body: this is no JSON") from None


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
