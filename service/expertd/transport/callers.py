"""Who calls: whose share of the queue a call takes."""

from __future__ import annotations

from contextvars import ContextVar

import grpc
from fastapi import Request

TOKEN: ContextVar[str] = ContextVar("token", default="")
"""The name of the token that the door let in, in the context of the call; "" without tokens."""


def grpc_caller(context: grpc.ServicerContext) -> str:
    """The caller's token, or else the host that it calls from."""
    return TOKEN.get() or str(context.peer()).rpartition(":")[0]


def http_caller(request: Request) -> str:
    """The caller's token, or else the host that it calls from, named as gRPC names it."""
    host = request.client.host if request.client else ""
    return TOKEN.get() or (f"ipv6:%5B{host}%5D" if ":" in host else f"ipv4:{host}")
