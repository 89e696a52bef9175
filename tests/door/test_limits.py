"""Every limit has a flag and a default, and an error that names the flag."""

from __future__ import annotations

import argparse
import json
import socket
from collections.abc import Iterator
from contextlib import closing
from http.client import HTTPConnection
from typing import Any

import grpc
import httpx
import pytest
import torch
from safetensors.torch import save
from tests.door.probing import connect
from tests.e2e.asking import PROTOCOLS, raw_grpc
from tests.e2e.local import Local
from tests.e2e.servers import in_process
from tests.service.engine.parts import Gate
from tests.strategies import wire_call
from tests.waiting import until

from expertd.config import MOST_MESSAGE_BYTES, SETTINGS, Settings, add_flags, resolve
from expertd.errors import InvalidArgument
from expertd.transport import linger
from expertd_wire.codec import encode_forward_call
from expertd_wire.methods import FORWARD, MESSAGE_SLACK_BYTES
from expertd_wire.tensors import MAX_ELEMENTS, MAX_RANK

DEFAULTS = {
    "max_message_bytes": 256 << 20,
    "max_call_tokens": 65536,
    "max_batch_tokens": 8192,
    "max_queued_tokens": 65536,
    "max_queued_bytes": 1 << 30,
    "max_concurrent_calls": 64,
    "max_stream_calls": 64,
    "max_header_bytes": 16384,
    "header_seconds": 10.0,
    "ingress_bytes": 16 << 30,
    "drain_seconds": 30.0,
}
FLAGS = (
    *("--identity", "echo=8", "--max-message-bytes", "65536", "--max-call-tokens", "100"),
    *("--max-header-bytes", "2048", "--max-queued-tokens", "4"),
)


def parsed(*flags: str) -> Settings:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return resolve(parser.parse_args(flags), {}).settings


def test_the_defaults() -> None:
    defaults = parsed()
    assert {name: getattr(defaults, name) for name in DEFAULTS} == DEFAULTS
    limits = [s.name for s in SETTINGS if s.name.startswith("max_")]
    assert set(limits) <= set(DEFAULTS), "a new limit needs its line here"
    assert defaults.max_concurrent_calls * defaults.max_message_bytes <= defaults.ingress_bytes


def test_grpc_takes_the_largest_limit_of_a_message() -> None:
    with pytest.raises(InvalidArgument, match="1024 to 2146435071"):
        parsed("--max-message-bytes", str(MOST_MESSAGE_BYTES + 1))
    largest = ("--max-message-bytes", str(MOST_MESSAGE_BYTES), "--max-concurrent-calls", "2")
    with in_process("--identity", "echo=8", *largest) as (app, addresses):
        assert app.wait_ready()
        assert Local(app, addresses).ask("grpc").code == "OK"


@pytest.fixture
def local() -> Iterator[Local]:
    with in_process(*FLAGS) as (app, addresses):
        assert app.wait_ready()
        yield Local(app, addresses)


def test_answers_that_nobody_reads_count_as_ingress() -> None:
    most = 20 << 20
    limits = ("--max-message-bytes", str(most), "--max-concurrent-calls", "2")
    rows = torch.ones(1 << 16, 64)  # 16 MiB: more than gRPC takes for a caller that does not read
    call = encode_forward_call(wire_call(model="echo", hidden_states=rows))
    with (
        in_process("--identity", "echo=64", *limits, "--ingress-bytes", str(2 * most)) as served,
        grpc.insecure_channel(served[1].grpc, [("grpc.max_receive_message_length", -1)]) as channel,
    ):
        app = served[0]
        assert app.wait_ready()
        ask = channel.unary_stream(FORWARD)
        unread = []
        for held in (16 << 20, 32 << 20):
            unread.append(ask(call, timeout=60))
            until(lambda held=held: app._ingress.taken > held)
        refused = ask(call, timeout=60).exception()
        assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "--ingress-bytes" in refused.details()
        unread.pop().cancel()
        until(lambda: app._ingress.taken < 32 << 20)
        assert len(next(ask(call, timeout=60))) > 16 << 20
        unread.pop().cancel()
        until(lambda: app._ingress.taken == 0)


def test_http_answers_that_nobody_reads_count_as_well() -> None:
    most = 20 << 20
    limits = ("--max-message-bytes", str(most), "--max-concurrent-calls", "2")
    body = save({"hidden_states": torch.ones(1 << 16, 64)})  # 16 MiB: more than sockets hold
    asked = "POST /v1/forward?model=echo&layer=0 HTTP/1.1\r\nHost: localhost\r\n"
    head = f"{asked}Content-Length: {len(body)}\r\n\r\n".encode()
    with in_process("--identity", "echo=64", *limits, "--ingress-bytes", str(2 * most)) as served:
        app, (http, _) = served
        assert app.wait_ready()
        with socket.socket() as caller:
            caller.settimeout(20)
            caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
            caller.connect((http.split(":")[0], int(http.split(":")[1])))
            caller.sendall(head + body)
            assert caller.recv(13) == b"HTTP/1.1 200 "
            assert app._ingress.taken > 16 << 20
        until(lambda: app._ingress.taken == 0)


TOO_MUCH: dict[str, tuple[dict[str, Any], str]] = {
    "message": ({"hidden_states": torch.ones(1 << 12, 8)}, "--max-message-bytes"),
    "rows": ({"hidden_states": torch.ones(101, 8)}, "--max-call-tokens"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", TOO_MUCH)
def test_one_call_too_large_names_the_flag(local: Local, protocol: str, case: str) -> None:
    fields, flag = TOO_MUCH[case]
    answer = local.ask(protocol, **fields)
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "TOO_LARGE")
    assert flag in answer.message


REFUSED = {
    "too large": ("/v1/forward?model=echo&layer=0", "TOO_LARGE"),
    "a bad value": ("/v1/forward?model=echo&layer=none", "INVALID_ARGUMENT"),
    "no such route": ("/v1/nothing", "NOT_FOUND"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_who_sends_all_before_reading_is_told_why(local: Local, case: str) -> None:
    """As urllib does, whose connections close after one answer."""
    path, reason = REFUSED[case]
    body = bytes(16 << 20)  # more than sockets hold
    with closing(HTTPConnection(local.addresses.http, timeout=20)) as caller:
        caller.request("POST", path, body, {"Connection": "close"})
        assert json.loads(caller.getresponse().read())["error"]["reason"] == reason


def test_who_stops_sending_is_told_at_once_and_left_soon(
    local: Local, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linger, "LINGER_SECONDS", 0.1)
    host, port = local.addresses.http.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as caller:
        head = "POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        caller.sendall(f"{head}Content-Length: 1000000\r\n\r\nbegun".encode())
        told = b"".join(iter(lambda: caller.recv(1 << 16), b""))  # until it is closed
    assert told.startswith(b"HTTP/1.1 404 ") and b"NOT_FOUND" in told


def test_rank_and_elements_are_limits_of_the_wire(local: Local) -> None:
    assert (MAX_RANK, MAX_ELEMENTS) == (4, 1 << 40)
    rank5 = wire_call(model="echo", hidden_states=torch.ones(1, 1, 1, 2, 8))
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        answer = raw_grpc(channel, encode_forward_call(rank5))
    assert answer.code == "INVALID_ARGUMENT" and "more than 4 sizes" in answer.message


def test_far_above_the_limit_grpc_itself_refuses(local: Local) -> None:
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        answer = raw_grpc(channel, b"x" * (65536 + MESSAGE_SLACK_BYTES + 1))
        assert answer.code == "RESOURCE_EXHAUSTED"
        edge = raw_grpc(channel, b"x" * 65537)
    assert edge.reason == "TOO_LARGE" and "--max-message-bytes" in edge.message


def test_large_headers_are_refused(local: Local) -> None:
    url = f"http://{local.addresses.http}"
    with httpx.Client(base_url=url, trust_env=False) as web:
        response = web.get("/healthz", headers={"x-large": "x" * 2048})
        assert response.status_code == 400 and "--max-header-bytes" in response.text
        response = web.get(f"/healthz?{'x' * 2048}")
        assert response.status_code == 400 and "--max-header-bytes" in response.text
        assert web.get("/healthz", headers={"x-large": "x" * 1024}).status_code == 200
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        call = channel.unary_unary("/expertd_wire.v1.Experts/ListLayers")
        call(b"", timeout=10, metadata=(("x-large", "x" * 1024),))
        with pytest.raises(grpc.RpcError) as caught:
            call(b"", timeout=10, metadata=(("x-large", "x" * 8192),))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED  # type: ignore[attr-defined]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_full_queue_names_its_flag(local: Local, protocol: str) -> None:
    local.script(gate := Gate())
    waiting = local.in_background(1)
    assert gate.entered.wait(10)
    waiting += local.in_background(2)
    until(lambda: local.echo.queued_tokens == 4)
    answer = local.ask(protocol)
    assert answer.code == "RESOURCE_EXHAUSTED" and "--max-queued-tokens" in answer.message
    gate.opened.set()
    for thread in waiting:
        thread.join(10)


def test_bodies_together_name_the_ingress() -> None:
    """Announced bytes are taken before they arrive, so that slow bodies cannot pile up."""
    limits = ("--max-message-bytes", "524288", "--max-concurrent-calls", "2")
    with in_process("--identity", "echo=8", *limits, "--ingress-bytes", "1048576") as (app, at):
        assert app.wait_ready()
        head = "POST /v1/forward?model=echo&layer=0 HTTP/1.1\r\nHost: localhost\r\n"
        with connect(at.http) as one, connect(at.http) as other:
            for connection in (one, other):
                connection.sendall(f"{head}Content-Length: 524288\r\n\r\n".encode())
            until(lambda: app._ingress.taken == 1 << 20)
            answer = Local(app, at).ask("http")
            assert answer.code == "RESOURCE_EXHAUSTED" and "--ingress-bytes" in answer.message
        until(lambda: app._ingress.taken == 0)
        assert Local(app, at).ask("http").code == "OK"


def test_a_body_without_a_length_counts_as_the_longest(local: Local) -> None:
    url = f"http://{local.addresses.http}/v1/forward?model=echo&layer=0"
    with httpx.Client(trust_env=False) as web:
        response = web.post(url, content=iter([b"x" * 65536, b"x"]))
    assert response.status_code == 400 and "--max-message-bytes" in response.text


def test_what_could_not_be_held_does_not_start() -> None:
    with (
        pytest.raises(Exception, match=r"--max-concurrent-calls.*--ingress-bytes"),
        in_process("--identity", "echo=8", "--ingress-bytes", "1048576"),
    ):
        pass
