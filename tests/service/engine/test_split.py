"""Calls larger than a launch: split by rows, joined in order; one error or one leaver ends all."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.engine.parts import Gate, Reports, echo, resident, running
from tests.strategies import generator, layer_spec, random_topk, relative, torch_tensor, wire_call
from tests.waiting import until

from expertd.engine.engine import Engine
from expertd.errors import Cancelled, DeadlineExceeded, InvalidArgument, Overloaded

SPEC = layer_spec()


def call(random: torch.Generator, tokens: int, form: str, **fields: Any) -> Any:
    rows = torch.randn(tokens, SPEC.hidden, generator=random)
    if form == "logits":
        logits = torch.randn(tokens, SPEC.num_experts, generator=random)
        return wire_call(hidden_states=rows, router_logits=logits, **fields)
    ids, weights = random_topk(tokens, SPEC.num_experts, 2, random)
    return wire_call(hidden_states=rows, topk_ids=ids, topk_weights=weights, **fields)


def wait_for_all(engine: Engine, calls: list[Any]) -> list[Any]:
    tickets = [engine.submit(each, "test", None) for each in calls]
    return [ticket.future.result(10) for ticket in tickets]


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    limit=st.integers(1, 16),
    form=st.sampled_from(("logits", "topk")),
    seed=st.integers(0, 2**30),
)
def test_whatever_the_limit_answers_are_those_of_whole_calls(
    sizes: list[int], limit: int, form: str, seed: int
) -> None:
    random, reports = generator(seed), Reports()
    layer = resident(SPEC, random)
    calls = [call(random, tokens, form) for tokens in sizes]
    with running(layer) as engine:
        whole = wait_for_all(engine, calls)
    with running(layer, reports=reports, max_batch_tokens=limit) as engine:
        split = wait_for_all(engine, calls)
        assert layer.queued_tokens == 0
    assert max(report.tokens for report in reports.ran_batches) <= limit
    assert sum(report.tokens for report in reports.ran_batches) == sum(sizes)
    for one, other in zip(split, whole, strict=True):
        assert one.output.shape == other.output.shape
        assert relative(torch_tensor(one.output), torch_tensor(other.output)) < 1e-6
        assert (one.backend, one.mode, one.request_id) == (other.backend, other.mode, "")
        assert min(one.queued_ns, one.staged_ns, one.computed_ns) > 0


def test_rows_of_every_format_are_split() -> None:
    random = generator(61)
    layer = echo(256)
    rows = torch.randn(7, 256, generator=random).to(torch.float8_e4m3fn)
    scale = torch.rand(7, 2, generator=random) + 0.5
    fields = {"hidden_states_format": "fp8_group128", "hidden_states_scale": scale}
    odd = {"topk_ids": torch.tensor(3), "router_logits": torch.zeros(2, 2)}
    with running(layer, max_batch_tokens=3) as engine:
        sent = wire_call(model="echo", hidden_states=rows, reply_dtype="float32", **fields)
        (reply,) = wait_for_all(engine, [sent])
        scaled = rows.float() * scale.repeat_interleave(128, 1)
        assert torch.equal(torch_tensor(reply.output), scaled)
        plain = torch.randn(8, 256, generator=random)
        ignored = wire_call(model="echo", hidden_states=plain, topk_ids=odd["topk_ids"])
        (reply,) = wait_for_all(engine, [ignored])
        assert torch.equal(torch_tensor(reply.output), plain)


def test_a_fault_in_one_piece_fails_the_call_and_names_its_row() -> None:
    random, gate = generator(62), Gate()
    bad = call(random, 9, "logits")
    rows = torch.randn(9, SPEC.hidden, generator=random)
    logits = torch.randn(9, SPEC.num_experts, generator=random)
    logits[4, 1] = math.nan
    bad = wire_call(hidden_states=rows, router_logits=logits)
    layer = resident(SPEC, random, gate)
    with running(layer, max_batch_tokens=3) as engine:
        ticket = engine.submit(bad, "test", None)
        assert gate.entered.wait(10)
        gate.opened.set()
        with pytest.raises(InvalidArgument, match="row 4"):
            ticket.future.result(10)
        (good,) = wait_for_all(engine, [call(random, 2, "logits")])
        assert good.output.shape == (2, SPEC.hidden)
    assert gate.batches == [3, 3, 2], "what still waited of the bad call was not run"


@pytest.mark.parametrize("good", [True, False])
def test_nothing_of_a_large_call_is_left_for_the_garbage_collector(good: bool) -> None:
    """Its rows and its answer are what takes memory, on a card pinned memory too."""
    random = generator(67)
    rows = torch.randn(9, SPEC.hidden, generator=random)
    logits = torch.full((9, SPEC.num_experts), 0.0 if good else math.nan)
    asked = wire_call(hidden_states=rows, router_logits=logits)
    gc.disable()
    try:
        with running(resident(SPEC, random), max_batch_tokens=3, start=False) as engine:
            ticket = engine.submit(asked, "test", None)
            kept = [weakref.ref(one.future) for one in (ticket, *ticket.pieces)]
            assert len(kept) == 4
            engine.start()
            assert (ticket.future.exception(10) is None) == good
            del ticket
            until(lambda: {ref() for ref in kept} == {None})
    finally:
        gc.enable()


@pytest.mark.parametrize("late", [False, True])
def test_leaving_between_pieces_ends_the_call(late: bool) -> None:
    random, gate = generator(63), Gate()
    layer = resident(SPEC, random, gate)
    with running(layer, max_batch_tokens=3) as engine:
        ticket = engine.submit(call(random, 9, "topk"), "test", None)
        assert gate.entered.wait(10)
        assert layer.queued_tokens == 6
        if late:
            for piece in ticket.pieces:
                piece.deadline = 0.0
        engine.cancel(ticket)
        with pytest.raises(DeadlineExceeded if late else Cancelled):
            ticket.future.result(10)
        assert layer.queued_tokens == 0
        gate.opened.set()
    assert gate.batches == [3]


def test_a_deadline_between_pieces_ends_the_call() -> None:
    random = generator(64)
    layer = resident(SPEC, random)
    with running(layer, max_batch_tokens=3, start=False) as engine:
        ticket = engine.submit(call(random, 9, "topk"), "test", 0.0)
        engine.start()
        with pytest.raises(DeadlineExceeded):
            ticket.future.result(10)
        assert layer.queued_tokens == 0


def test_a_large_call_is_admitted_as_a_whole() -> None:
    random, gate = generator(65), Gate()
    layer = resident(SPEC, random, gate)
    with running(layer, max_batch_tokens=3, max_queued_tokens=10) as engine:
        first = engine.submit(call(random, 3, "topk"), "test", None)
        assert gate.entered.wait(10)
        waits = engine.submit(call(random, 2, "topk"), "test", None)
        with pytest.raises(Overloaded) as caught:
            engine.submit(call(random, 9, "topk"), "test", None)
        assert caught.value.retry_seconds is not None and layer.queued_tokens == 2
        fits = engine.submit(call(random, 8, "topk"), "test", None)
        gate.opened.set()
        for ticket in (first, waits, fits):
            assert ticket.future.result(10)


@pytest.mark.parametrize("backend", ["grouped", "reference"])
def test_batch_invariant_answers_are_bit_equal_however_calls_met(backend: str) -> None:
    random, reports = generator(66), Reports()
    layer = resident(layer_spec(hidden=96, intermediate=80), random)
    calls = []
    for tokens in (1, 5, 33, 2, 64):
        rows = torch.randn(tokens, 96, generator=random)
        logits = torch.randn(tokens, SPEC.num_experts, generator=random)
        calls.append(wire_call(hidden_states=rows, router_logits=logits, backend=backend))
    alone = []
    with running(layer, merge=False) as engine:
        for each in calls:
            alone += wait_for_all(engine, [each])
    with running(layer, reports=reports, merge=False, start=False) as engine:
        tickets = [engine.submit(each, "test", None) for each in calls]
        engine.start()
        together = [ticket.future.result(10) for ticket in tickets]
    assert [report.requests for report in reports.ran_batches] == [1] * len(calls)
    for one, other in zip(alone, together, strict=True):
        assert bytes(one.output.data) == bytes(other.output.data)
