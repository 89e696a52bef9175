"""Every documented error, over both protocols, with its code, its reason and words that help."""

from __future__ import annotations

import re
import threading
from typing import Any

import grpc
import httpx
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.e2e.asking import PROTOCOLS, Answer, raw_grpc
from tests.e2e.local import Local
from tests.e2e.servers import Server
from tests.service.engine.parts import Gate
from tests.waiting import until

from expertd.backends.base import Batch
from expertd.engine.resident import LayerState

ROWS = torch.zeros(2, 256)
DEMO: dict[str, Any] = {
    "model": "demo",
    "hidden_states": ROWS,
    "router_logits": torch.zeros(2, 32),
}
TOPK: dict[str, Any] = {
    "model": "demo",
    "hidden_states": ROWS,
    "topk_ids": torch.tensor([[0, 1], [2, -1]], dtype=torch.int32),
    "topk_weights": torch.ones(2, 2),
}
NAN = torch.full((2, 32), float("nan"))

INVALID: dict[str, tuple[dict[str, Any], str]] = {
    "no rows": (DEMO | {"hidden_states": None}, "hidden_states is missing"),
    "width": (DEMO | {"hidden_states": ROWS[:, :9]}, r"\[2, 9\] given, \[tokens, 256\] accepted"),
    "rows dtype": (DEMO | {"hidden_states": ROWS.int()}, "'int32' given; accepted: bfloat16"),
    "no routing": (DEMO | {"router_logits": None}, "send router_logits, or topk_ids"),
    "both": (DEMO | TOPK, "send one form"),
    "NaN logits": (DEMO | {"router_logits": NAN}, "router_logits: row 0 has NaN"),
    "id": (TOPK | {"topk_ids": TOPK["topk_ids"] + 31}, r"row 0 has an id outside 0\.\.31"),
    "twice": (TOPK | {"topk_ids": TOPK["topk_ids"] * 0}, "row 0 names an expert twice"),
    "weight": (TOPK | {"topk_weights": NAN[:, :2]}, "row 0 has a weight that is not finite"),
    "reply": (DEMO | {"reply_dtype": "int8"}, "reply_dtype 'int8' given; accepted: bfloat16"),
    "format": (DEMO | {"hidden_states_format": "x"}, "'x' given; accepted: fp8_group128, mxfp8"),
    "backend": (DEMO | {"backend": "cutlas"}, "'cutlas' is not one of .*grouped, .*reference"),
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("case", INVALID)
def test_invalid_argument(server: Server, protocol: str, case: str) -> None:
    fields, words = INVALID[case]
    answer = PROTOCOLS[protocol](getattr(server, protocol), fields)
    assert_error(answer, "INVALID_ARGUMENT", "INVALID_ARGUMENT", words)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_not_found_names_what_there_is(server: Server, protocol: str) -> None:
    ask, address = PROTOCOLS[protocol], getattr(server, protocol)
    answer = ask(address, DEMO | {"model": "dmeo"})
    assert_error(answer, "NOT_FOUND", "NOT_FOUND", "'dmeo' is not served; .*demo")
    answer = ask(address, DEMO | {"layer": 2})
    assert_error(answer, "NOT_FOUND", "NOT_FOUND", "'demo' has no layer 2; it has 0, 1")
    answer = ask(address, DEMO | {"layer": -1})
    assert_error(answer, "NOT_FOUND", "NOT_FOUND", "no layer -1")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_no_usable_plan_tells_every_reason(server: Server, protocol: str) -> None:
    ask, address = PROTOCOLS[protocol], getattr(server, protocol)
    answer = ask(address, DEMO | {"backend": "identity"})
    assert_error(answer, "FAILED_PRECONDITION", "NO_USABLE_PLAN", "see the reasons")
    assert [(r.backend, r.mode, r.entry) for r in answer.reasons] == [
        ("identity", "routed", "identity")
    ]
    assert answer.reasons[0].code == "layer_kind"
    assert "computes no experts" in answer.reasons[0].text
    answer = ask(address, DEMO | {"backend": "triton"})
    assert_error(answer, "FAILED_PRECONDITION", "NO_USABLE_PLAN", "see the reasons")
    assert {r.backend for r in answer.reasons} == {"triton"}
    assert any("cpu" in r.text for r in answer.reasons)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_experts_not_held(part: Server, protocol: str) -> None:
    ask, address = PROTOCOLS[protocol], getattr(part, protocol)
    answer = ask(address, TOPK | {"layer": 1})
    assert_error(answer, "FAILED_PRECONDITION", "EXPERTS_NOT_HELD", "outside 8-23.*set partial")
    answer = ask(address, DEMO | {"layer": 1})
    assert_error(answer, "FAILED_PRECONDITION", "EXPERTS_NOT_HELD", "set partial")
    answer = ask(address, DEMO)
    assert_error(answer, "NOT_FOUND", "NOT_FOUND", "no layer 0; it has 1")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_too_large(local: Local, protocol: str) -> None:
    answer = local.ask(protocol, hidden_states=torch.ones(101, 8))
    assert_error(answer, "INVALID_ARGUMENT", "TOO_LARGE", "101 rows .*100.*--max-call-tokens")
    answer = local.ask(protocol, hidden_states=torch.ones(1 << 12, 8))
    assert_error(answer, "INVALID_ARGUMENT", "TOO_LARGE", "at most 65536 .*--max-message-bytes")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_overload(local: Local, protocol: str) -> None:
    local.script(gate := Gate())
    waiting = local.in_background(1)
    assert gate.entered.wait(10)
    waiting += local.in_background(2)
    until(lambda: local.echo.queued_tokens == 4)
    answer = local.ask(protocol)
    assert_error(answer, "RESOURCE_EXHAUSTED", "OVERLOADED", "4 tokens are queued .*retry")
    gate.opened.set()
    for thread in waiting:
        thread.join(10)
    assert local.ask(protocol).code == "OK"


@pytest.mark.parametrize("waits", ["in the queue", "while it runs"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_deadline(local: Local, protocol: str, waits: str) -> None:
    local.script(gate := Gate())
    if waits == "in the queue":
        local.in_background(1)
        assert gate.entered.wait(10)
    answer = local.ask(protocol, timeout=0.3)
    assert answer.code == "DEADLINE_EXCEEDED"
    gate.opened.set()
    assert local.ask(protocol).code == "OK" and local.app.engine.healthy


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_loading_and_failed_layers(local: Local, protocol: str) -> None:
    local.echo.state = LayerState.LOADING
    answer = local.ask(protocol)
    assert_error(answer, "UNAVAILABLE", "UNAVAILABLE", "echo/0 is loading; try again")
    local.echo.state, local.echo.detail = LayerState.FAILED, "tensor 'x' is missing"
    answer = local.ask(protocol)
    assert_error(answer, "FAILED_PRECONDITION", "LAYER_FAILED", "tensor 'x' is missing")
    local.echo.state = LayerState.READY


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_draining(local: Local, protocol: str) -> None:
    local.script(gate := Gate())
    local.in_background(1)
    assert gate.entered.wait(10)
    drain = threading.Thread(target=local.app.engine.drain, args=(10,))
    drain.start()
    until(lambda: local.app.engine.draining)
    answer = local.ask(protocol)
    assert_error(answer, "UNAVAILABLE", "UNAVAILABLE", "draining; retry elsewhere")
    gate.opened.set()
    drain.join(10)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_an_internal_error_tells_nothing_of_the_inside(local: Local, protocol: str) -> None:
    def fail(batch: Batch) -> None:
        raise RuntimeError("/secret/path")

    local.script(fail)
    answer = local.ask(protocol)
    assert_error(answer, "INTERNAL", "INTERNAL", "the server's log says")
    assert "secret" not in answer.message and not answer.reasons


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_dead_executor_is_not_healthy_and_never_a_hang(local: Local, protocol: str) -> None:
    def die(batch: Batch) -> None:
        raise SystemExit

    http = f"http://{local.addresses.http}"
    channel = grpc.insecure_channel(local.addresses.grpc)
    check = health_pb2_grpc.HealthStub(channel).Check
    serving = health_pb2.HealthCheckResponse.SERVING
    until(lambda: check(health_pb2.HealthCheckRequest()).status == serving)
    local.script(die)
    for _ in range(2):
        answer = local.ask(protocol)
        assert_error(answer, "UNAVAILABLE", "UNAVAILABLE", "its executor died")
    until(lambda: check(health_pb2.HealthCheckRequest()).status != serving)
    assert httpx.get(f"{http}/healthz", trust_env=False).status_code == 503
    ready = httpx.get(f"{http}/readyz", trust_env=False)
    assert ready.status_code == 503
    assert ready.json() == {
        "ready": False,
        "missing": ["the executor died; restart this process"],
    }
    channel.close()


def test_bytes_that_are_no_message(server: Server) -> None:
    with grpc.insecure_channel(server.grpc) as channel:
        for data in (b"\xff" * 40, b"\x1a\x7f", b"\x0a\x02\xff\xff", b"x" * 5000):
            answer = raw_grpc(channel, data)
            assert_error(answer, "INVALID_ARGUMENT", "INVALID_ARGUMENT", ".")
        for method in ("ListLayers", "GetLayer", "GetCapabilities"):
            call = channel.unary_unary(f"/expertd_wire.v1.Experts/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(b"\xff\xff\xff", timeout=10)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]


def assert_error(answer: Answer, code: str, reason: str, words: str) -> None:
    assert (answer.code, answer.reason) == (code, reason), answer
    assert re.search(words, answer.message, re.DOTALL), answer.message
