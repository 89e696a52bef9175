"""The door of both servers: who comes in is decided here, before anything is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

import grpc

from expertd.errors import ExpertdError, PermissionDenied
from expertd.transport.auth import GRPC_SCOPES, HTTP_SCOPES, Guard, scope_for
from expertd.transport.callers import TOKEN
from expertd.transport.interceptors import http_error
from expertd.transport.workers import Refuser

ASGIMessage = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[ASGIMessage]]
Send = Callable[[ASGIMessage], Awaitable[None]]
ASGIApp = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


class GrpcDoor(grpc.ServerInterceptor):  # type: ignore[misc]
    """Refuses gRPC calls whose token does not reach."""

    def __init__(self, guard: Guard, refuser: Refuser) -> None:
        self._guard = guard
        self._refuser = refuser

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        headers = dict(details.invocation_metadata or ())
        presented = headers.get("authorization", "")
        try:
            TOKEN.set(self._guard.allow(scope_for(GRPC_SCOPES, details.method), str(presented)))
        except ExpertdError as error:
            return self._refuser.handler(error)
        return continuation(details)


class HttpDoor:
    """Refuses HTTP requests whose token, Host or Origin does not reach."""

    def __init__(self, app: ASGIApp, guard: Guard, hosts: frozenset[str]) -> None:
        self._app = app
        self._guard = guard
        self._hosts = hosts

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {name.decode("latin-1"): value for name, value in scope["headers"]}
        try:
            presented = headers.get("authorization", b"").decode("latin-1")
            TOKEN.set(self._guard.allow(scope_for(HTTP_SCOPES, scope["path"]), presented))
            if scope["method"] not in SAFE_METHODS:
                self._check_origin(headers, _reached(scope))
        except ExpertdError as error:
            return await http_error(error)(scope, receive, send)
        return await self._app(scope, receive, send)

    def _check_origin(self, headers: dict[str, bytes], reached: str) -> None:
        """A page of another site must not be able to post here through its visitor's browser.

        Such a page may give its own name our address, but not be at the address itself.
        """
        hosts = self._hosts | {reached}
        host = headers.get("host", b"").decode("latin-1")
        if _name(f"//{host}") not in hosts:
            raise PermissionDenied(
                f"Host {host[:100]!r} is not this server; accepted: {', '.join(sorted(hosts))}, "
                "and names that it was started with (--allow-host)"
            )
        origin = headers.get("origin", b"").decode("latin-1")
        if origin and _name(origin) not in hosts:
            raise PermissionDenied(f"Origin {origin[:100]!r} may not change anything here")


def _reached(scope: MutableMapping[str, Any]) -> str:
    """The address of ours that the caller came to."""
    address, _ = scope.get("server") or ("", None)
    return str(address)


def _name(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
