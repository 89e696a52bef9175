"""What a bench makes of servers over HTTP, good ones and others."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from expertd.bench.carriers import Http, Times
from expertd.bench.load import Call, Layer, find_layer, make_call
from expertd.bench.target import Target
from expertd_client import ExpertdError, InvalidArgument, Overloaded, Unavailable
from expertd_wire.safetensors import decode_body, encode_body

TIMES = {"queued_ns": "1", "staged_ns": "2", "computed_ns": "3"}
BUSY = b'{"error": {"code": "RESOURCE_EXHAUSTED", "reason": "OVERLOADED", "message": "later"}}'
LAYER = b'{"hidden": 8, "num_experts": 4, "top_k": 2, "expert_end": 4}'


class Handler(BaseHTTPRequestHandler):
    """Answers what its server is to answer; keeps what it was asked."""

    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._answer(200, LAYER)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        token, names = self.headers["authorization"], set(decode_body(body)[0])
        self.server.asked.append((self.client_address, self.path, token, names))
        self._answer(*self.server.answer)

    def _answer(self, status: int, body: bytes) -> None:
        if status == 0:
            self.wfile.write(body)
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Nothing: tests are quiet."""


@contextmanager
def answering(status: int, body: bytes) -> Iterator[Any]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        told: Any = server
        told.answer, told.asked = (status, body), []
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield told
        finally:
            server.shutdown()
            thread.join()


def found(server: Any, **more: Any) -> tuple[Layer, Call]:
    target = Target(f"http://127.0.0.1:{server.server_port}/", **more)
    layer = find_layer(target, "a model", 3, carrier="http")
    return layer, make_call(layer, 2, 0)


def test_calls_of_a_thread_share_a_connection_and_show_the_token() -> None:
    with answering(200, encode_body({}, TIMES)) as server:
        layer, call = found(server, token="secret")
        assert (layer.hidden, layer.num_experts, layer.top_k) == (8, 4, 2)
        with layer.open() as carrier:
            for _ in range(3):
                times = carrier.ask("a model", 3, call.rows, {**call.options, "backend": "x"})
                assert times == Times(1, 2, 3)
    assert len(server.asked) == 3 and len(set(map(str, server.asked))) == 1
    _, path, token, names = server.asked[0]
    assert path == "/v1/forward?model=a+model&layer=3&backend=x" and token == "Bearer secret"
    assert names == {"hidden_states", "topk_ids", "topk_weights"}


@pytest.mark.parametrize(
    ("status", "body", "kind", "told"),
    [
        (429, BUSY, Overloaded, "later"),
        (502, b"<html>", ExpertdError, "HTTP 502"),
        (500, b"[]", ExpertdError, "HTTP 500"),
        (200, b"noise", ExpertdError, "cannot be read"),
        (200, encode_body({}, {"queued_ns": "1"}), ExpertdError, "cannot be read"),
        (0, b"SSH-2.0\r\n\r\n", Unavailable, "speaks no HTTP"),
        (0, b"", Unavailable, "closed connection"),
    ],
)
def test_what_is_no_answer(status: int, body: bytes, kind: type[ExpertdError], told: str) -> None:
    with answering(status, body) as server:
        layer, call = found(server)
        with layer.open() as carrier, pytest.raises(kind, match=told):
            carrier.ask("m", 3, call.rows, call.options)


def test_nobody_there_and_what_is_no_address() -> None:
    with pytest.raises(Unavailable, match="refused"):
        find_layer(Target("127.0.0.1:1"), "m", 0, carrier="http")
    with pytest.raises(InvalidArgument, match="nonnumeric port"):
        find_layer(Target("here:there"), "m", 0, carrier="http")
    with pytest.raises(InvalidArgument, match="--tls-ca"):
        find_layer(Target("127.0.0.1:1", authorities=b"\xff"), "m", 0, carrier="http")
    with pytest.raises(InvalidArgument, match="shows no certificate"):
        Http(Target("127.0.0.1:1", authorities=b"x", certificate=b"x", key=b"x"))
