"""Bad, huge, slow and vanishing callers: each gets its documented code and costs others nothing."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
import torch
from tests.door.probing import (
    MIB,
    Fields,
    answers,
    connect,
    demo_call,
    read_to_end,
    state,
    unharmed,
)
from tests.e2e.asking import PROTOCOLS, Answer, raw_grpc, told_in
from tests.e2e.servers import Server, serving
from tests.waiting import until

from expertd_wire.methods import FORWARD
from expertd_wire.v1 import experts_pb2 as pb

HEADER_SECONDS = 2


@pytest.fixture(scope="module")
def server(home: Path) -> Iterator[Server]:
    flags = ("--header-seconds", str(HEADER_SECONDS), "--max-message-bytes", str(MIB))
    with (
        serving(home, "--demo", "--identity", "echo=64", *flags) as running,
        unharmed(running, more_mib=96),
    ):
        yield running


def tensor(dtype: str, shape: tuple[int, ...], data: bytes) -> pb.Tensor:
    return pb.Tensor(dtype=dtype, shape=shape, data=data)


ROW = bytes(256 * 4)
BAD_TENSORS: dict[str, tuple[str, tuple[int, ...], bytes]] = {
    "too short": ("float32", (1, 256), ROW[:-1]),
    "too long": ("float32", (1, 256), ROW + b"x"),
    "rank 1": ("float32", (256,), ROW),
    "rank 3": ("float32", (1, 1, 256), ROW),
    "rank 0": ("float32", (), ROW[:4]),
    "rank 5": ("float32", (1, 1, 1, 1, 256), ROW),
    "unknown dtype": ("float12", (1, 256), ROW),
    "complex": ("complex64", (1, 128), ROW),
    "negative": ("float32", (-1, -256), ROW),
    "2^64 elements": ("float32", (1 << 32, 1 << 32), b""),
    "2^63 - 1": ("float32", (1, (1 << 63) - 1), b""),
    "overflow to 0": ("float32", (1 << 62, 1 << 62, 16), b""),
    "1 GiB in few bytes": ("float32", (1 << 20, 256), b""),
    "0 wide": ("float32", (1, 0), b""),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_tensor_over_grpc(server: Server, case: str) -> None:
    message = pb.ForwardRequest(model="demo", hidden_states=tensor(*BAD_TENSORS[case]))
    message.router_logits.CopyFrom(tensor("float32", (1, 32), bytes(128)))
    with grpc.insecure_channel(server.grpc) as channel:
        answer = raw_grpc(channel, message.SerializeToString(), timeout=10)
    assert_refused(answer, "INVALID_ARGUMENT")


def test_a_gibibyte_announced_in_ten_bytes(server: Server) -> None:
    """Lengths that promise more than there is are refused without allocating it."""
    before = state(server)
    with grpc.insecure_channel(server.grpc) as channel:
        for data in (b"\x1a\x80\x80\x80\x80\x04", b"\x1a\xff\xff\xff\xff\x0f", b"\x0a\xff\xff\x7f"):
            assert_refused(raw_grpc(channel, data, timeout=10), "INVALID_ARGUMENT")
    head = b'{"hidden_states":{"dtype":"F32","shape":[1048576,256],"data_offsets":[0,1073741824]}}'
    for body in (struct.pack("<Q", len(head)) + head, struct.pack("<Q", 1 << 30) + b"{}"):
        assert_refused(post(server, body), "INVALID_ARGUMENT")
    assert state(server).resident_mib < before.resident_mib + 64


def post(server: Server, body: bytes, **query: Any) -> Answer:
    query = {"model": "demo", "layer": 0} | query
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as web:
        return told_in(web.post("/v1/forward", params=query, content=body))


DTYPES = {"float32": "F32", "float12": "F12", "complex64": "C64"}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_a_bad_tensor_over_http(server: Server, case: str) -> None:
    dtype, shape, data = BAD_TENSORS[case]
    entry = f'"dtype":"{DTYPES[dtype]}","shape":{list(shape)},"data_offsets":[0,{len(data)}]'
    head = f'{{"hidden_states":{{{entry}}}}}'.encode()
    answer = post(server, struct.pack("<Q", len(head)) + head + data)
    assert_refused(answer, "INVALID_ARGUMENT")


def ids(*values: int, dtype: torch.dtype = torch.int32) -> Fields:
    """A call of one row with these experts."""
    fields = demo_call(tokens=1) | {"router_logits": None}
    weights = torch.ones(1, len(values))
    return fields | {"topk_ids": torch.tensor([values], dtype=dtype), "topk_weights": weights}


def with_logits(value: float, column: slice) -> Fields:
    fields = demo_call()
    fields["router_logits"][1, column] = value
    return fields


INF = float("inf")
BAD_CALLS: dict[str, tuple[Fields, str]] = {
    "id too large": (ids(0, 32), "INVALID_ARGUMENT"),
    "id far too large": (ids(0, 1 << 40, dtype=torch.int64), "INVALID_ARGUMENT"),
    "id -2": (ids(0, -2), "INVALID_ARGUMENT"),
    "an expert twice": (ids(3, 3), "INVALID_ARGUMENT"),
    "float ids": (ids(0, 1, dtype=torch.float32), "INVALID_ARGUMENT"),
    "more ids than experts": (ids(*range(33)), "INVALID_ARGUMENT"),
    "no ids": (ids(), "INVALID_ARGUMENT"),
    "ids alone": (ids(0, 1) | {"topk_weights": None}, "INVALID_ARGUMENT"),
    "weights of other shape": (ids(0, 1) | {"topk_weights": torch.ones(1, 3)}, "INVALID_ARGUMENT"),
    "rows differ": (
        demo_call() | {"router_logits": torch.zeros(6, 32)},
        "INVALID_ARGUMENT",
    ),
    "experts differ": (demo_call() | {"router_logits": torch.zeros(5, 31)}, "INVALID_ARGUMENT"),
    "both": (ids(0, 1) | {"router_logits": torch.zeros(1, 32)}, "INVALID_ARGUMENT"),
    "neither": (demo_call() | {"router_logits": None}, "INVALID_ARGUMENT"),
    "NaN logit": (with_logits(float("nan"), slice(0, 1)), "INVALID_ARGUMENT"),
    "+inf logit": (with_logits(INF, slice(4, 5)), "INVALID_ARGUMENT"),
    "all masked": (with_logits(-INF, slice(None)), "INVALID_ARGUMENT"),
    "unknown model": (demo_call() | {"model": "dmeo"}, "NOT_FOUND"),
    "unknown layer": (demo_call() | {"layer": 99}, "NOT_FOUND"),
    "negative layer": (demo_call() | {"layer": -(1 << 31)}, "NOT_FOUND"),
    "unknown backend": (demo_call() | {"backend": "cutlas"}, "INVALID_ARGUMENT"),
    "unusable backend": (demo_call() | {"backend": "identity"}, "FAILED_PRECONDITION"),
    "unknown reply": (demo_call() | {"reply_dtype": "float12"}, "INVALID_ARGUMENT"),
    "scale without a format": (
        demo_call() | {"hidden_states_scale": torch.ones(5, 2)},
        "INVALID_ARGUMENT",
    ),
    "over the limit": (demo_call(tokens=1100), "INVALID_ARGUMENT"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_bad_calls_get_their_codes(server: Server, protocol: str) -> None:
    ask, address = PROTOCOLS[protocol], getattr(server, protocol)
    for case, (fields, code) in BAD_CALLS.items():
        answer = ask(address, dict(fields), timeout=10)
        assert answer.code == code, (case, answer)
        assert_refused(answer, code)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_masks_pass_and_nan_rows_are_answered_and_counted(server: Server, protocol: str) -> None:
    ask, address = PROTOCOLS[protocol], getattr(server, protocol)
    masked = ask(address, with_logits(-INF, slice(0, 24)))
    assert masked.output is not None and masked.output.isfinite().all()
    before = nonfinite(server)
    fields = demo_call()
    good = ask(address, demo_call()).output
    fields["hidden_states"][2, 7] = float("nan")
    answer = ask(address, fields)
    assert answer.output is not None and answer.output[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(answer.output[others], good[others])
    assert nonfinite(server) == before + 1
    empty = ask(address, demo_call(tokens=0))
    assert empty.output is not None and empty.output.shape == (0, 256)


def nonfinite(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    name = 'expertd_nonfinite_outputs_total{model="demo"} '
    return next((float(line[len(name) :]) for line in text.splitlines() if name in line), 0.0)


HTTP_BODIES = {
    "empty": b"",
    "short": b"abc",
    "not JSON": struct.pack("<Q", 8) + b"{{{{{{{{",
    "no object": struct.pack("<Q", 2) + b"[]",
    "deep": struct.pack("<Q", 60_000) + b"[" * 60_000,
    "huge number": struct.pack("<Q", 9_000) + b"9" * 9_000,
    "not UTF-8": struct.pack("<Q", 4) + b"\xff\xff\xff\xff",
}


@pytest.mark.parametrize("case", HTTP_BODIES)
def test_bodies_that_are_no_safetensors(server: Server, case: str) -> None:
    assert_refused(post(server, HTTP_BODIES[case]), "INVALID_ARGUMENT")


@pytest.mark.parametrize("query", [{"layer": "x"}, {"timeout": "-1"}, {"priority": "1e9"}])
def test_bad_queries(server: Server, query: dict[str, str]) -> None:
    assert_refused(post(server, b"", **query), "INVALID_ARGUMENT")


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[" * 100_000, b"9" * 10_000, b"\xff", b"3", b"{}"),
        *(b'{"spec": {"\xed\xa6\xa0": 1}}', b'{"spec": {"\\ud9a0": 1}}', b'{"\\ud9a0": 1}'),
    ],
)
def test_bad_questions(server: Server, body: bytes) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as web:
        assert_refused(told_in(web.post("/v1/explain", content=body)), "INVALID_ARGUMENT")


def test_a_huge_question_is_cut_off(server: Server) -> None:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=20) as web:
        answer = told_in(web.post("/v1/explain", content=b" " * (2 * MIB)))
    assert (answer.code, answer.reason) == ("INVALID_ARGUMENT", "TOO_LARGE")


def test_slow_headers_are_cut_off(server: Server) -> None:
    """Neither silence, nor a head that never ends, nor a second one on the same connection."""
    request = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
    starts = (b"", b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-Slow: ", request)
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server.http)) for _ in starts]
        for connection, start in zip(connections, starts, strict=True):
            connection.sendall(start)
        assert connections[2].recv(4096).startswith(b"HTTP/1.1 200")
        connections[2].sendall(b"GET /he")
        told = [read_to_end(connection) for connection in connections]  # ends: none times out
    # The rest of the first answer may come after its head.
    assert told[:2] == [b"", b""] and told[2] in (b"", b'{"healthy":true}')


@pytest.mark.parametrize("start", [b"GET /", b"GET / HTTP/1.1\r\nX: ", b"GET / HTTP/1.1\r\nX"])
def test_an_endless_head_is_cut_off(server: Server, start: bytes) -> None:
    sent = 0
    with connect(server.http) as connection:
        connection.sendall(start)
        with suppress(ConnectionError):  # being cut off is what this waits for
            while sent < 64 * MIB:
                sent += connection.send(b"x" * 4096)
        assert sent < 16 * MIB


def test_a_slow_body_has_its_deadline(server: Server) -> None:
    head = "POST /v1/forward?model=demo&layer=0&timeout=0.5 HTTP/1.1\r\nHost: localhost\r\n"
    with connect(server.http) as connection:
        connection.sendall(f"{head}Content-Length: 5000\r\n\r\nabc".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 504")


def test_a_thousand_idle_connections(server: Server) -> None:
    before = state(server)
    for address in (server.http, server.grpc):
        with ExitStack() as stack:
            for _ in range(1000):
                stack.enter_context(connect(address))
            answers(server)
    until(lambda: state(server).descriptors <= before.descriptors + 8)
    assert state(server).threads <= before.threads + 64


def test_callers_that_leave_mid_call(server: Server) -> None:
    fields = demo_call(tokens=400)
    message = pb.ForwardRequest(model="demo", hidden_states=wire(fields["hidden_states"]))
    message.router_logits.CopyFrom(wire(fields["router_logits"]))
    request = message.SerializeToString()
    for _ in range(20):
        with grpc.insecure_channel(server.grpc) as channel:
            channel.unary_unary(FORWARD).future(request, timeout=10)  # the channel closes at once
        with connect(server.http) as connection:
            head = "POST /v1/forward?model=demo&layer=0 HTTP/1.1\r\nHost: localhost\r\n"
            connection.sendall(f"{head}Content-Length: 50000\r\n\r\nabc".encode())
    until(lambda: inflight(server) == 0)
    answers(server)


def wire(values: torch.Tensor) -> pb.Tensor:
    return tensor("float32", tuple(values.shape), values.numpy().tobytes())


def inflight(server: Server) -> float:
    text = httpx.get(f"{server.url}/metrics", trust_env=False).text
    (value,) = [line for line in text.splitlines() if line.startswith("expertd_inflight_requests ")]
    return float(value.split()[1])


def assert_refused(answer: Answer, code: str) -> None:
    """The documented code, words for a person, nothing of the inside."""
    assert answer.code == code, answer
    assert answer.reason and 10 < len(answer.message) < 2000
    assert "Traceback" not in answer.message and ".py" not in answer.message
