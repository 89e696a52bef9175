"""Calls through a whole engine: answers, refusals, merging, drain."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.service.engine.parts import CPU, Gate, Reports, Scripted, echo, resident, running, warm
from tests.strategies import (
    generator,
    layer_spec,
    random_topk,
    relative,
    torch_tensor,
    wire_call,
)

from expertd.backends.base import Batch
from expertd.capability.rows import identity
from expertd.engine.engine import Engine
from expertd.engine.resident import LayerState
from expertd.errors import (
    DeadlineExceeded,
    ExpertdError,
    ExpertsNotHeld,
    Internal,
    InvalidArgument,
    LayerFailed,
    NotFound,
    NoUsablePlan,
    Overloaded,
    Unavailable,
)
from expertd_wire.messages import ForwardReply

SPEC = layer_spec()


def logits_call(random: torch.Generator, tokens: int = 3, **fields: Any) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(tokens, SPEC.hidden, generator=random),
        "router_logits": torch.randn(tokens, SPEC.num_experts, generator=random),
    } | fields


def topk_call(random: torch.Generator, tokens: int = 3, **fields: Any) -> dict[str, Any]:
    ids, weights = random_topk(tokens, SPEC.num_experts, 2, random)
    rows = torch.randn(tokens, SPEC.hidden, generator=random)
    return {"hidden_states": rows, "topk_ids": ids, "topk_weights": weights} | fields


def send(engine: Engine, **fields: Any) -> ForwardReply:
    return engine.submit(wire_call(**fields), "test", None).future.result(10)


FAULTS: dict[str, tuple[str, float, type[ExpertdError]]] = {
    "NaN logit": ("router_logits", math.nan, InvalidArgument),
    "+inf logit": ("router_logits", math.inf, InvalidArgument),
    "id too large": ("topk_ids", 6, InvalidArgument),
    "id below -1": ("topk_ids", -2, InvalidArgument),
    "NaN weight": ("topk_weights", math.nan, InvalidArgument),
    "inf weight": ("topk_weights", -math.inf, InvalidArgument),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_of_merged_calls_only_the_faulty_one_fails(fault: str) -> None:
    random = generator(7)
    field, value, kind = FAULTS[fault]
    make = logits_call if field == "router_logits" else topk_call
    calls = [make(random, tokens) for tokens in (3, 4, 1)]
    calls[1][field][2, 0] = value
    reports = Reports()
    layer = resident(SPEC, random)
    with running(layer, reports=reports, start=False) as engine:
        tickets = [engine.submit(wire_call(**call), "test", None) for call in calls]
        engine.start()
        with pytest.raises(kind, match="row 2"):
            tickets[1].future.result(10)
        merged = [tickets[n].future.result(10) for n in (0, 2)]
    assert [(r.requests, r.tokens) for r in reports.ran_batches] == [(3, 8)]
    with running(layer) as engine:
        alone = [send(engine, **calls[n]) for n in (0, 2)]
    for one, other in zip(merged, alone, strict=True):
        assert relative(torch_tensor(one.output), torch_tensor(other.output)) < 1e-6


def test_a_faults_code_is_not_left_to_the_batches_after_it() -> None:
    random = generator(15)
    good, bad = topk_call(random), topk_call(random)
    bad["topk_ids"][1, 0] = 99
    with running(resident(SPEC, random), echo(SPEC.hidden)) as engine:
        for _ in range(2):
            with pytest.raises(InvalidArgument, match="row 1"):
                send(engine, **bad)
            assert send(engine, **good).output
            with pytest.raises(InvalidArgument, match="row 1"):
                send(engine, **bad)
            assert send(engine, model="echo", hidden_states=good["hidden_states"]).output


def test_calls_that_differ_in_form_never_share_a_batch() -> None:
    random, reports = generator(8), Reports()
    call = topk_call(random, 2)
    forms: list[dict[str, Any]] = [
        {},
        {"topk_ids": call["topk_ids"].long()},
        {"topk_weights": call["topk_weights"].bfloat16()},
        {"hidden_states": call["hidden_states"].bfloat16()},
        {"topk_ids": call["topk_ids"][:, :1], "topk_weights": call["topk_weights"][:, :1]},
        {"partial": True},
        {"reply_dtype": "float16"},
        {"backend": "reference"},
    ]
    with running(resident(SPEC, random), reports=reports, start=False) as engine:
        tickets = [engine.submit(wire_call(**call | f), "test", None) for f in forms]
        engine.start()
        outputs = [torch_tensor(t.future.result(10).output) for t in tickets]
    assert len(reports.ran_batches) == len(forms)
    for form, output in zip(forms, outputs, strict=True):
        if "topk_ids" not in form or form["topk_ids"].shape[1] == 2:
            assert relative(output, outputs[0]) < 1e-2


def test_calls_to_two_layers_do_not_mix() -> None:
    random, reports = generator(9), Reports()
    layers = [resident(SPEC, random, layer=n) for n in (0, 1)]
    call = logits_call(random)
    with running(*layers, reports=reports) as engine:
        first, second = (send(engine, **call, layer=n) for n in (0, 1))
    assert relative(torch_tensor(first.output), torch_tensor(second.output)) > 0.5
    assert [r.layer for r in reports.ran_batches] == [0, 1]


def test_the_reply_names_the_plan_and_the_request() -> None:
    random = generator(10)
    with running(resident(SPEC, random)) as engine:
        call = logits_call(random, request_id="r-1")
        reply = send(engine, **call)
        pinned = send(engine, **call, backend="reference")
    assert (reply.backend, reply.mode, reply.entry) == ("grouped", "routed", "grouped")
    assert (pinned.backend, reply.request_id) == ("reference", "r-1")
    assert min(reply.queued_ns, reply.staged_ns, reply.computed_ns) > 0
    assert relative(torch_tensor(reply.output), torch_tensor(pinned.output)) < 1e-6


def test_the_servers_pin_is_for_calls_without_one_and_not_for_identity() -> None:
    random = generator(11)
    layer = echo(8)
    with running(resident(SPEC, random), layer, pin="reference") as engine:
        assert send(engine, **logits_call(random)).backend == "reference"
        assert send(engine, **logits_call(random), backend="grouped").backend == "grouped"
        rows = torch.randn(2, 8, generator=random)
        assert send(engine, model="echo", hidden_states=rows).backend == "identity"


@pytest.mark.parametrize("make", [logits_call, topk_call])
def test_an_empty_call_answers_an_empty_result(make: Any) -> None:
    random, reports = generator(12), Reports()
    with running(resident(SPEC, random), reports=reports) as engine:
        reply = send(engine, **make(random, 0), request_id="e")
        assert torch_tensor(send(engine, **make(random, 0, partial=True)).output).dtype == (
            torch.float32
        )
        with pytest.raises(InvalidArgument, match="not one of .*grouped, "):
            send(engine, **make(random, 0), backend="no-such")
    assert reply.output is not None
    assert (reply.output.dtype, reply.output.shape) == ("float32", (0, SPEC.hidden))
    assert (reply.backend, reply.request_id) == ("grouped", "e")
    assert not reports.ran_batches


def test_nan_rows_answer_nan_rows_and_are_counted() -> None:
    random, reports = generator(13), Reports()
    call = logits_call(random, 5)
    call["hidden_states"][1, 3] = math.nan
    call["hidden_states"][4] = math.inf
    with running(resident(SPEC, random), reports=reports) as engine:
        output = torch_tensor(send(engine, **call).output)
    assert torch.isnan(output[1]).all() and not torch.isfinite(output[4]).any()
    assert torch.isfinite(output[[0, 2, 3]]).all()
    assert reports.ran_batches[0].nonfinite_rows == 2


def test_parts_add_up_to_the_whole() -> None:
    random = generator(14)
    whole = resident(SPEC, random)
    call = topk_call(random, 40)
    call["topk_ids"][3] = -1
    call["topk_weights"][3] = math.nan
    parts = []
    for number, (begin, end) in enumerate(((0, 1), (1, 4), (4, 6)), 1):
        part = resident(layer_spec(expert_begin=begin, expert_end=end), random, layer=number)
        assert part.weights is not None and whole.weights is not None
        part.weights.w13.copy_(whole.weights.w13[begin:end])
        part.weights.w2.copy_(whole.weights.w2[begin:end])
        parts.append(part)
    with running(whole, *parts) as engine:
        expected = torch_tensor(send(engine, **call).output)
        for number in (1, 2, 3):
            with pytest.raises(ExpertsNotHeld, match="set partial"):
                send(engine, **call, layer=number)
        sums = [torch_tensor(send(engine, **call, layer=n, partial=True).output) for n in (1, 2, 3)]
    assert relative(sum(sums[1:], sums[0]), expected) < 1e-6
    assert not expected[3].any()


def test_ids_that_are_held_need_no_partial() -> None:
    random = generator(15)
    part = resident(layer_spec(expert_begin=2, expert_end=4), random)
    ids = torch.tensor([[2, 3], [3, -1], [-1, -1]], dtype=torch.int32)
    with running(part) as engine:
        output = torch_tensor(send(engine, **topk_call(random, 3, topk_ids=ids)).output)
    assert output[:2].any(dim=1).all() and not output[2].any()


def test_what_is_not_there_or_not_ready_says_so() -> None:
    random = generator(16)
    layers = [resident(SPEC, random, layer=n) for n in range(3)]
    layers[1].state = LayerState.LOADING
    layers[2].state, layers[2].detail = LayerState.FAILED, "no such tensor"
    call = logits_call(random)
    with running(*layers) as engine:
        with pytest.raises(NotFound, match="'x' is not served; served: m"):
            send(engine, **call, model="x")
        with pytest.raises(NotFound, match="'m' has no layer 7; it has 0, 1, 2"):
            send(engine, **call, layer=7)
        with pytest.raises(Unavailable, match="m/1 is loading"):
            send(engine, **call, layer=1)
        with pytest.raises(LayerFailed, match="no such tensor"):
            send(engine, **call, layer=2)
        assert engine.missing() == ["layer m/1 is loading", "layer m/2 is failed"]


def test_no_plan_carries_every_reason() -> None:
    random = generator(17)
    with running(resident(SPEC, random)) as engine, pytest.raises(NoUsablePlan) as caught:
        send(engine, **logits_call(random), backend="identity")
    assert {r.backend for r in caught.value.refusals} == {"identity"}
    assert any("computes no experts" in r.text for r in caught.value.refusals)


def test_a_plan_without_its_backend_is_no_plan() -> None:
    random = generator(18)
    layer = resident(SPEC, random)
    layer.backends = {cell: b for cell, b in layer.backends.items() if cell.backend == "reference"}
    with running(layer) as engine, pytest.raises(NoUsablePlan):
        send(engine, **logits_call(random))


def test_an_overloaded_engine_refuses_at_once_and_keeps_what_it_has() -> None:
    random, gate = generator(19), Gate()
    with running(resident(SPEC, random, gate), max_queued_tokens=4) as engine:
        running_one = engine.submit(wire_call(**logits_call(random)), "test", None)
        assert gate.entered.wait(10)
        waits = engine.submit(wire_call(**logits_call(random, 4)), "test", None)
        with pytest.raises(Overloaded):
            engine.submit(wire_call(**logits_call(random, 1)), "test", None)
        gate.opened.set()
        assert running_one.future.result(10) and waits.future.result(10)


def test_while_the_device_is_busy_calls_coalesce() -> None:
    random, gate = generator(20), Gate()
    with running(resident(SPEC, random, gate), max_batch_tokens=6) as engine:
        tickets = [engine.submit(wire_call(**logits_call(random, 2)), "test", None)]
        assert gate.entered.wait(10)
        calls = [wire_call(**logits_call(random, 2)) for _ in range(5)]
        tickets += [engine.submit(call, "test", None) for call in calls]
        gate.opened.set()
        outputs = [torch_tensor(t.future.result(10).output) for t in tickets]
    assert gate.batches == [2, 6, 4]
    for call, output in zip(calls, outputs[1:], strict=True):
        assert torch.equal(output, torch_tensor(call.hidden_states))


def test_a_deadline_that_passes_in_the_queue_ends_the_call_unserved() -> None:
    random, reports = generator(21), Reports()
    with running(resident(SPEC, random), reports=reports, start=False) as engine:
        late = engine.submit(wire_call(**logits_call(random)), "test", 0.0)
        good = engine.submit(wire_call(**logits_call(random)), "test", None)
        engine.start()
        with pytest.raises(DeadlineExceeded):
            late.future.result(10)
        assert good.future.result(10)
    assert [r.requests for r in reports.ran_batches] == [1]


def test_drain_answers_the_accepted_and_refuses_the_new() -> None:
    random, gate = generator(22), Gate()
    with running(resident(SPEC, random, gate)) as engine:
        tickets = [engine.submit(wire_call(**logits_call(random, n)), "t", None) for n in (1, 2)]
        assert gate.entered.wait(10)
        assert not engine.drain(0.0), "a call is still running"
        assert engine.draining and engine.missing()[0] == "draining"
        with pytest.raises(Unavailable, match="draining"):
            send(engine, **logits_call(random))
        gate.opened.set()
        assert engine.drain(10)
        assert all(t.future.result(0) for t in tickets)
        assert engine.healthy


def test_a_failing_kernel_fails_its_batch_and_tells_no_details() -> None:
    random = generator(23)

    def script(batch: Batch) -> None:
        if batch.rows.shape[0] == 2:
            raise RuntimeError("secret path /etc")
        batch.out.zero_()

    with running(resident(SPEC, random, script)) as engine:
        with pytest.raises(Internal) as caught:
            send(engine, **logits_call(random, 2))
        assert "secret" not in str(caught.value)
        assert send(engine, **logits_call(random, 3)).backend == "grouped"
        assert engine.healthy


def test_a_backends_own_refusal_reaches_the_caller() -> None:
    def script(batch: Batch) -> None:
        raise InvalidArgument("not these rows")

    random = generator(24)
    with (
        running(resident(SPEC, random, script)) as engine,
        pytest.raises(InvalidArgument, match="not these rows"),
    ):
        send(engine, **logits_call(random))


def test_identity_copies_rows_of_every_kind() -> None:
    random = generator(25)
    layer = echo(256)
    rows = torch.randn(3, 256, generator=random)
    fp8 = rows.to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=random) + 0.5
    e8m0 = torch.randint(120, 135, (3, 8), generator=random, dtype=torch.uint8)
    wide = {"hidden_states_format": "fp8_group128", "hidden_states_scale": scale}
    mx = {"hidden_states_format": "mxfp8", "hidden_states_scale": e8m0}
    with running(layer) as engine:

        def copied(rows: torch.Tensor, **fields: Any) -> torch.Tensor:
            return torch_tensor(send(engine, model="echo", hidden_states=rows, **fields).output)

        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            assert torch.equal(copied(rows.to(dtype)), rows.to(dtype))
        scaled = fp8.float() * scale.repeat_interleave(128, 1)
        assert torch.equal(copied(fp8, **wide), scaled.bfloat16())
        assert torch.equal(copied(fp8.view(torch.uint8), **wide, reply_dtype="float32"), scaled)
        powers = torch.exp2(e8m0.double() - 127).float().repeat_interleave(32, 1)
        assert torch.equal(copied(fp8, **mx, reply_dtype="float32"), fp8.float() * powers)
        assert torch.equal(copied(rows, topk_ids=torch.tensor(3), partial=True), rows)


def test_backends_keep_their_order() -> None:
    backend = type("Fake", (Scripted,), {"script": lambda batch: None})(identity.ROWS[0], SPEC, CPU)
    batch = Batch(torch.zeros(1, 1), torch.zeros(1, 1))
    for early in (
        lambda: backend.prepare_weights(None, None),
        lambda: backend.warm_up((1,)),
        lambda: backend.forward(batch),
    ):
        with pytest.raises(AssertionError, match="expected"):
            early()
    warm(backend).forward(batch)
    with pytest.raises(AssertionError, match="empty calls"):
        backend.forward(Batch(torch.zeros(0, 1), torch.zeros(0, 1)))
