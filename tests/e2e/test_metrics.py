"""What /metrics says after known traffic: exact values, through prometheus_client's own parser."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import grpc
import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import save
from tests.e2e.asking import PROTOCOLS, by_grpc, by_http
from tests.e2e.local import Local
from tests.e2e.servers import Server
from tests.service.engine.parts import Gate
from tests.strategies import wire_call
from tests.waiting import until

from expertd_wire.codec import encode_forward_call
from expertd_wire.methods import FORWARD

Samples = Mapping[tuple[str, frozenset[tuple[str, str]]], float]

ROWS = {"hidden_states": torch.ones(3, 256), "router_logits": torch.zeros(3, 32), "model": "demo"}


def scrape(address: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = httpx.get(f"http://{address}/metrics", trust_env=False)
    assert response.headers["content-type"].startswith("text/plain")
    families = text_string_to_metric_families(response.text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


class Change:
    """How much each series has grown."""

    def __init__(self, before: Samples, after: Samples) -> None:
        self.before, self.after = before, after

    def __call__(self, name: str, **labels: str) -> float:
        return value(self.after, name, **labels) - value(self.before, name, **labels)


def test_every_call_is_counted_with_its_plan(server: Server) -> None:
    before = scrape(server.http)
    for _ in range(3):
        assert by_grpc(server.grpc, dict(ROWS)).code == "OK"
    assert by_http(server.http, dict(ROWS) | {"backend": "reference"}).code == "OK"
    nan = {"hidden_states": torch.full((2, 64), float("nan")), "model": "echo"}
    assert by_grpc(server.grpc, nan).code == "OK"
    assert by_grpc(server.grpc, dict(ROWS) | {"layer": 7}).code == "NOT_FOUND"
    for name in ("x", "y", 'z"\n'):
        assert by_http(server.http, dict(ROWS) | {"model": name}).code == "NOT_FOUND"
    grew = Change(before, scrape(server.http))

    def requests(model: str, carrier: str, backend: str, mode: str, code: str) -> float:
        labels = {"model": model, "carrier": carrier, "backend": backend, "mode": mode}
        return grew("expertd_requests_total", **labels, code=code)

    assert requests("demo", "grpc", "grouped", "routed", "OK") == 3
    assert requests("demo", "http", "reference", "routed", "OK") == 1
    assert requests("echo", "grpc", "identity", "routed", "OK") == 1
    assert requests("demo", "grpc", "none", "none", "NOT_FOUND") == 1
    assert requests("unknown", "http", "none", "none", "NOT_FOUND") == 3
    assert grew("expertd_request_duration_seconds_count", model="demo", carrier="grpc") == 4
    assert grew("expertd_request_duration_seconds_count", model="unknown", carrier="http") == 3
    assert grew("expertd_request_duration_seconds_sum", model="demo", carrier="grpc") > 0
    assert grew("expertd_tokens_total", model="demo") == 12
    assert grew("expertd_tokens_total", model="echo") == 2
    assert grew("expertd_nonfinite_outputs_total", model="echo") == 2
    assert grew("expertd_nonfinite_outputs_total", model="demo") == 0
    assert grew("expertd_queue_duration_seconds_count") == 5
    assert grew("expertd_batch_tokens_count") == grew("expertd_batch_requests_count") == 5
    assert (grew("expertd_batch_tokens_sum"), grew("expertd_batch_requests_sum")) == (14, 5)
    assert grew("expertd_batch_tokens_bucket", le="2.0") == 1
    for stage, count in {"decode": 9, "encode": 5, "stage_in": 5, "route": 5}.items():
        assert grew("expertd_stage_duration_seconds_count", stage=stage) == count, stage
    for stage in ("kernel", "stage_out"):
        assert grew("expertd_stage_duration_seconds_sum", stage=stage) > 0
    assert not [key for key in grew.after if ("model", "x") in key[1]]


def test_gauges_of_an_idle_server(server: Server) -> None:
    now = scrape(server.http)
    for name in ("expertd_inflight_requests", "expertd_queued_tokens", "expertd_draining"):
        assert now[name, frozenset()] == 0
    for model, layers in {"demo": "01", "deep": "01", "echo": "0"}.items():
        for layer in layers:
            for state in ("loading", "proving", "ready", "failed", "unloaded"):
                labels = {"model": model, "layer": layer, "state": state}
                assert now["expertd_layer_state", frozenset(labels.items())] == (state == "ready")
    # codes and one float32 scale for each 128x128 block: 32 experts, 2 layers
    demo = 2 * 32 * (3 * 256 * 128 + 4 * 3 * 2)
    assert value(now, "expertd_weights_bytes", model="demo", device="cpu") == demo
    assert value(now, "expertd_weights_bytes", model="deep", device="cpu") == 2 * 32 * 6 * 256 * 128
    assert value(now, "expertd_weights_bytes", model="echo", device="cpu") == 0
    (info,) = (dict(key[1]) for key in now if key[0] == "expertd_build_info")
    assert set(info) == {"version", "torch", "flashinfer", "device"}
    assert info["torch"] == torch.__version__ and info["device"] == "cpu"
    cells = [v for key, v in now.items() if key[0] == "expertd_capability_cells"]
    told = httpx.get(f"http://{server.http}/v1/capabilities", trust_env=False).json()["cells"]
    assert sum(cells) == len(told)


def test_counters_are_there_before_they_count(server: Server) -> None:
    now = scrape(server.http)
    for reason in ("queue_full", "deadline", "draining", "too_large", "cancelled"):
        assert ("expertd_rejected_total", frozenset({("reason", reason)})) in now
    for model in ("demo", "deep", "echo"):
        for name in ("expertd_tokens_total", "expertd_nonfinite_outputs_total"):
            assert (name, frozenset({("model", model)})) in now
    assert value(now, "expertd_nonfinite_outputs_total", model="deep") == 0


def test_latency_buckets_begin_at_ten_microseconds(server: Server) -> None:
    by_grpc(server.grpc, dict(ROWS))
    for key in scrape(server.http):
        name, labels = key[0], dict(key[1])
        if name == "expertd_request_duration_seconds_bucket" and labels["model"] == "demo":
            assert float(labels["le"]) >= 1e-5
    now = scrape(server.http)
    labels = {"model": "demo", "carrier": "grpc", "le": "1e-05"}
    assert ("expertd_request_duration_seconds_bucket", frozenset(labels.items())) in now


def test_what_runs_and_what_waits(local: Local) -> None:
    local.script(gate := Gate())
    waiting = local.in_background(1)
    assert gate.entered.wait(10)
    waiting += local.in_background(1, "http")
    until(lambda: local.echo.queued_tokens == 2)
    busy = scrape(local.addresses.http)
    assert value(busy, "expertd_inflight_requests") == 2
    assert value(busy, "expertd_queued_tokens") == 2
    gate.opened.set()
    for thread in waiting:
        thread.join(10)
    idle = scrape(local.addresses.http)
    assert value(idle, "expertd_inflight_requests") == value(idle, "expertd_queued_tokens") == 0


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_rejections(local: Local, protocol: str) -> None:
    def rejected(reason: str) -> float:
        return value(scrape(local.addresses.http), "expertd_rejected_total", reason=reason)

    assert local.ask(protocol, hidden_states=torch.ones(101, 8)).reason == "TOO_LARGE"
    assert local.ask(protocol, hidden_states=torch.ones(4096, 8)).reason == "TOO_LARGE"
    assert rejected("too_large") == 2
    local.script(gate := Gate())
    waiting = local.in_background(1)
    assert gate.entered.wait(10)
    assert local.ask(protocol, timeout=0.2).code == "DEADLINE_EXCEEDED"
    until(lambda: rejected("deadline") == 1)
    waiting += local.in_background(2)
    until(lambda: local.echo.queued_tokens == 4)
    assert local.ask(protocol).reason == "OVERLOADED"
    assert rejected("queue_full") == 1
    drain = threading.Thread(target=local.app.stop)
    drain.start()
    until(lambda: local.app.engine.draining)
    assert local.ask(protocol).reason == "UNAVAILABLE"
    assert rejected("draining") == 1
    assert value(scrape(local.addresses.http), "expertd_draining") == 1
    gate.opened.set()
    for thread in (*waiting, drain):
        thread.join(20)


def leave_grpc(local: Local) -> None:
    """A caller that cancels its call while it is queued."""
    call = wire_call(model="echo", hidden_states=torch.ones(1, 8))
    with grpc.insecure_channel(local.addresses.grpc) as channel:
        future: Any = channel.unary_unary(FORWARD).future(encode_forward_call(call))
        until(lambda: local.echo.queued_tokens == 1)
        future.cancel()
        until(lambda: local.echo.queued_tokens == 0)


def leave_http(local: Local) -> None:
    """A caller that closes its connection while its call is queued."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"http://{local.addresses.http}/v1/forward",
            params={"model": "echo", "layer": 0},
            content=save({"hidden_states": torch.ones(1, 8)}),
            timeout=0.3,
            trust_env=False,
        )
    until(lambda: local.echo.queued_tokens == 0)


@pytest.mark.parametrize("leave", [leave_grpc, leave_http])
def test_callers_who_leave(local: Local, leave: Any) -> None:
    local.script(gate := Gate())
    waiting = local.in_background(1)
    assert gate.entered.wait(10)
    leave(local)
    name = "expertd_rejected_total"
    until(lambda: value(scrape(local.addresses.http), name, reason="cancelled") == 1)
    gate.opened.set()
    waiting[0].join(10)
    assert gate.batches == [2] and local.ask("grpc").code == "OK"
    until(lambda: value(scrape(local.addresses.http), "expertd_inflight_requests") == 0)
