"""Errors become a status here, once for each protocol."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import grpc
from fastapi import Request
from fastapi.responses import JSONResponse

from expertd.errors import ExpertdError, Internal, Unauthenticated
from expertd_wire.methods import STATUS_KEY
from expertd_wire.status import pack_status, unpack_status

log = logging.getLogger(__name__)

REQUEST_ID = "X-Request-Id"

Method = Callable[[bytes, grpc.ServicerContext], bytes]

INTERNAL = "an internal error; the server's log says more"


def guarded(method: Method) -> Method:
    """A gRPC method whose errors leave as status, ErrorInfo and refusals, never as a traceback."""

    def guard(request: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return method(request, context)
        except ExpertdError as error:
            fault = error.with_traceback(None)  # whose frames know the call, which knows the error
        except Exception:
            log.exception("a gRPC method failed")
            fault = Internal(INTERNAL)
        details = pack_status(fault.reason, str(fault), fault.refusals, fault.retry_seconds)
        context.set_trailing_metadata(((STATUS_KEY, details),))
        code = getattr(grpc.StatusCode, fault.wire.grpc)
        context.abort(code, unpack_status(details).message)
        raise AssertionError("abort() raises")

    return guard


def error_body(error: ExpertdError) -> dict[str, Any]:
    """The JSON body of an error."""
    reasons = [
        {"backend": r.backend, "mode": r.mode, "entry": r.entry, "code": r.code, "text": r.text}
        for r in error.refusals
    ]
    return {
        "error": {
            "code": error.wire.grpc,
            "reason": error.reason,
            "message": str(error),
            "reasons": reasons,
        }
    }


def http_error(error: ExpertdError) -> JSONResponse:
    headers = {}
    if (wait := error.retry_seconds) is not None:
        headers["Retry-After"] = str(math.ceil(wait))
    if isinstance(error, Unauthenticated):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status_code=error.wire.http, headers=headers)


async def on_expertd_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for our errors."""
    assert isinstance(error, ExpertdError)
    response = http_error(error)
    response.headers.update(request_id_of(request))
    return response


def request_id_of(request: Request) -> dict[str, str]:
    """The header by which a caller finds its own request again, if it gave one."""
    given = request.headers.get(REQUEST_ID)
    return {REQUEST_ID: given} if given else {}


async def on_any_error(request: Request, error: Exception) -> JSONResponse:
    """FastAPI's handler for everything else: logged here, told without details."""
    log.error("an HTTP route failed", exc_info=error)
    return http_error(Internal(INTERNAL))
