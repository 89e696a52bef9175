"""The ways of a card without one: streams that order nothing, events that know their stream."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from tests.service.engine.parts import Reports, echo, resident, running
from tests.strategies import generator, layer_spec, random_topk, torch_tensor, wire_call

from expertd.capability.device import detect
from expertd.engine import loader, staging_cuda
from expertd.engine.checks_cpu import HostChecks
from expertd.engine.loader import Loader
from expertd.engine.pinned import PinnedPool
from expertd.engine.resident import LayerState, Residents
from expertd.engine.staging import Mark
from expertd.engine.staging_cuda import CudaStaging, PinnedBuffer
from expertd.errors import InvalidArgument

CPU = torch.device("cpu")
SPEC = layer_spec()


class Stream:
    """Remembers which events it was told to wait for."""

    def __init__(self) -> None:
        self.waited: list[Event] = []

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


class Event:
    recorded_on: Stream | None = None

    def record(self, stream: Stream) -> None:
        self.recorded_on = stream

    def synchronize(self) -> None:
        assert self.recorded_on is not None

    def elapsed_time(self, other: Event) -> float:
        assert self.recorded_on and other.recorded_on
        return 0.25


class PlainBuffer(PinnedBuffer):
    """A buffer and a twin that is other memory."""

    def _allocate(self, size: int) -> None:
        host, twin = (torch.zeros(size, dtype=torch.uint8) for _ in range(2))
        self._keep(host, twin)


COMPUTE, INWARD, OUTWARD = Stream(), Stream(), Stream()
ON: list[Any] = []
"""The devices that threads have made their own."""


@pytest.fixture(params=["small", "large"])
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two ways whose batches are all small, or all large."""
    monkeypatch.setattr(staging_cuda, "SMALL", 1 << 30 if request.param == "small" else 0)
    monkeypatch.setattr(staging_cuda, "PinnedBuffer", PlainBuffer)
    monkeypatch.setattr(staging_cuda, "_event", Event)
    monkeypatch.setattr(staging_cuda, "checks_on", lambda device_type: HostChecks())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: COMPUTE)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "set_device", ON.append)
    ON.clear()
    results = PinnedPool(pin=False)
    yield [CudaStaging(CPU, INWARD, OUTWARD, results) for _ in range(2)]


def test_answers_are_those_of_the_processor(ways: Any) -> None:
    random, reports = generator(101), Reports()
    layer = resident(SPEC, random)
    calls = []
    for tokens in (3, 1, 700, 40, 1, 2):
        ids, weights = random_topk(tokens, SPEC.num_experts, 2, random)
        rows = torch.randn(tokens, SPEC.hidden, generator=random)
        rows[-1, 0] = math.nan if tokens == 40 else 0.0
        calls.append(wire_call(hidden_states=rows, topk_ids=ids, topk_weights=weights))
    with running(layer) as engine:
        wanted = [engine.submit(c, "test", None).future.result(10).output for c in calls]
    with running(layer, ways=ways, reports=reports) as engine:
        found = [engine.submit(c, "test", None).future.result(10) for c in calls]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(
            torch_tensor(mine.output).nan_to_num(), torch_tensor(theirs).nan_to_num()
        )
        assert mine.staged_ns == mine.computed_ns == 500_000
    assert [report.nonfinite_rows for report in reports.ran_batches] == [0, 0, 0, 1, 0, 0]


def test_the_engines_threads_make_the_device_their_own(ways: Any) -> None:
    """Else Triton launches on card 0 whatever card the layers are on."""
    with running(echo(8), ways=ways) as engine:
        call = wire_call(model="echo", hidden_states=torch.ones(2, 8))
        assert engine.submit(call, "test", None).future.result(10)
        assert ON == [CPU, CPU], "the executor and the lander"


def test_faults_are_told_and_forgotten(ways: Any) -> None:
    random = generator(102)
    ids, weights = random_topk(4, SPEC.num_experts, 2, random)
    rows = torch.randn(4, SPEC.hidden, generator=random)
    bad = ids.clone()
    bad[2, 1] = 77
    with running(resident(SPEC, random), echo(SPEC.hidden), ways=ways) as engine:
        for _ in range(3):
            call = wire_call(hidden_states=rows, topk_ids=bad, topk_weights=weights)
            with pytest.raises(InvalidArgument, match="row 2"):
                engine.submit(call, "test", None).future.result(10)
            good = wire_call(hidden_states=rows, topk_ids=ids, topk_weights=weights)
            assert engine.submit(good, "test", None).future.result(10)
            same = wire_call(model="echo", hidden_states=rows)
            reply = engine.submit(same, "test", None).future.result(10)
            assert torch.equal(torch_tensor(reply.output), rows)


def test_what_is_read_was_written_before(ways: Any) -> None:
    """Every copy on a stream of its own waits for what it needs, and is waited for."""
    way, other = ways
    small = staging_cuda.SMALL > 0
    with running(echo(8), ways=[way, other]) as engine:
        call = wire_call(model="echo", hidden_states=torch.ones(2, 8))
        assert engine.submit(call, "test", None).future.result(10)
    begin, staged, ready, routed, computed, out = (way._events[mark] for mark in Mark)
    assert {routed.recorded_on, computed.recorded_on} == {COMPUTE}
    if small:
        assert {begin.recorded_on, staged.recorded_on, out.recorded_on} == {COMPUTE}
    else:
        assert begin.recorded_on is staged.recorded_on is INWARD and out.recorded_on is OUTWARD
        assert ready.recorded_on is COMPUTE
        assert staged in COMPUTE.waited and computed in OUTWARD.waited


class Aside:
    """A loader's stream; told: what happened, and whether on it."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def __enter__(self) -> None:
        self._told.append("here")

    def __exit__(self, *_: object) -> None:
        self._told.append("elsewhere")

    def synchronize(self) -> None:
        self._told.append("done")


def loader_aside(told: list[str], monkeypatch: pytest.MonkeyPatch) -> Loader:
    found = Loader.__new__(Loader)
    found._stream, found._device = Aside(told), detect("cpu")  # type: ignore[assignment]
    found._torch_device, found._residents = CPU, Residents()
    monkeypatch.setattr(found, "_build_backends", lambda resident: told.append("built"))
    return found


def test_an_identity_layer_is_made_on_its_card_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the main thread, whose own card is the first: Triton would have warmed up there."""
    told: list[str] = []
    made = loader_aside(told, monkeypatch)
    made.add_identity("echo", 8)
    assert told == ["here", "built", "done", "elsewhere"]
    assert made._residents.get("echo", 0).state is LayerState.READY


def test_weights_are_digested_beside_the_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of launches over all of a layer: calls would have stood in line behind them."""
    told: list[str] = []
    making, layer = loader_aside(told, monkeypatch), resident(SPEC, generator(7))
    weights = layer.weights
    monkeypatch.setattr(loader, "load_layer", lambda *_, **__: (weights, None))
    monkeypatch.setattr(loader, "packed", lambda weights, name: weights)
    monkeypatch.setattr(loader, "checkpoint_digest", lambda *_: "checkpoint")
    monkeypatch.setattr(loader, "weights_digest", lambda *_: told.append("digested") or "weights")
    making._load_one(None, layer)  # type: ignore[arg-type]
    assert told == ["here", "digested", "built", "done", "elsewhere"]
    assert layer.state is LayerState.READY and layer.digest == "weights"
