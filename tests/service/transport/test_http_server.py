"""The HTTP server's socket."""

from __future__ import annotations

import json
import socket
from http.client import HTTPResponse
from typing import Any

import pytest

from expertd.transport.http_server import HttpLimits, HttpServer


async def nothing(scope: Any, receive: Any, send: Any) -> None:
    """An application that answers nothing; uvicorn makes that a 500."""


def test_a_port_is_ours_alone_as_soon_as_it_is_bound() -> None:
    """Else two servers that start at once both have it, and one ends while it says it is ready."""
    server = HttpServer(nothing, HttpLimits(16384, 10), None)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        assert server.bind("127.0.0.1", port) == port
        with pytest.raises(OSError, match="in use"):
            other.listen()
    server.start()
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert connection.recv(9) == b"HTTP/1.1 "
    server.stop()


@pytest.mark.parametrize(
    ("head", "reason", "says"),
    [
        (b"NONSENSE\r\n\r\n", "INVALID_ARGUMENT", "Invalid HTTP request"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 2000 + b"\r\n\r\n", "TOO_LARGE", "--max-header-bytes"),
        (b"GET /" + b"y" * 2000, "TOO_LARGE", "--max-header-bytes"),
    ],
)
def test_what_is_no_request_is_refused_as_every_other_error(
    head: bytes, reason: str, says: str
) -> None:
    server = HttpServer(nothing, HttpLimits(1024, 10), None)
    port = server.bind("127.0.0.1", 0)
    server.start()
    with socket.create_connection(("127.0.0.1", port), 10) as connection:
        connection.sendall(head)
        answer = HTTPResponse(connection)
        answer.begin()
        error = json.loads(answer.read())["error"]
    server.stop()
    assert (answer.status, answer.getheader("content-type")) == (400, "application/json")
    assert (error["code"], error["reason"]) == ("INVALID_ARGUMENT", reason)
    assert says in error["message"]
