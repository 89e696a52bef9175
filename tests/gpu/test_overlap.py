"""Batches on a card: copies run beside computing, nothing waits needlessly, every row is right."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tests.service.engine.parts import Reports, Scripted
from tests.strategies import (
    generator,
    layer_spec,
    random_topk,
    random_weights,
    relative,
    torch_tensor,
    wire_call,
)

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.capability.device import detect
from expertd.capability.match import layer_refusals
from expertd.capability.rows import ROWS
from expertd.core import CallForm, LayerSpec, PlanMode, QuantScheme, RoutingForm
from expertd.engine import expert_rows
from expertd.engine.engine import Engine, EngineOptions
from expertd.engine.flight import Flight
from expertd.engine.launch import launch
from expertd.engine.loader import identity_spec
from expertd.engine.policy import Rules
from expertd.engine.resident import LayerState, Resident, Residents, Trust
from expertd.engine.staging import Mark
from expertd.engine.staging_cuda import CudaStaging, stagings
from expertd.engine.ticket import Ticket
from expertd_wire.messages import ForwardCall

SEED = int(os.environ.get("EXPERTD_SEED", "0"))
DEVICE = torch.device("cuda:0")
WIDE = 7168
SPEC = layer_spec(
    hidden=256, intermediate=384, num_experts=16, expert_end=16, quant=QuantScheme.BF16
)
IDENTITY = next(row for row in ROWS if row.identity)
REFERENCE = next(row for row in ROWS if row.backend == "reference")
BUSY_CYCLES = 500_000_000
"""A quarter of a second: longer than what the host does between two launches (copies of 56 MiB, at
6 GB/s on one machine, comparing and packing), for which fifty milliseconds were too few."""


def layer(spec: LayerSpec, backends: list[Backend], model: str = "m") -> Resident:
    found = Resident(model, 0, spec, detect("cuda:0"), trust=Trust(declared=True))
    found.backends = {backend.row.cell(spec.quant): backend for backend in backends}
    found.state = LayerState.READY
    return found


def echo(kind: type[Backend] | None = None) -> Resident:
    """An identity layer, or what kind makes of it."""
    spec = identity_spec(WIDE)
    backend = build(IDENTITY, spec, None, None, DEVICE)
    if kind is not None:
        backend = kind(IDENTITY, spec, DEVICE)
        backend.check()
        backend.prepare_weights(None, None)
        backend.warm_up((1,))
    return layer(spec, [backend], "echo")


def busy(batch: Batch) -> None:
    torch.cuda._sleep(BUSY_CYCLES)
    batch.out.copy_(batch.rows)


def ticket_of(resident: Resident, call: ForwardCall, form: CallForm) -> Ticket:
    assert call.hidden_states is not None
    tokens = call.hidden_states.shape[0]
    return Ticket(call, resident, form, tokens, call.nbytes, None, "test")


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def before(flight: Flight, mark: Mark, other: Flight, other_mark: Mark) -> float:
    """Milliseconds from one moment to another on the card."""
    one, two = flight.staging, other.staging
    assert isinstance(one, CudaStaging) and isinstance(two, CudaStaging)
    return float(one._events[mark].elapsed_time(two._events[other_mark]))


@pytest.mark.usefixtures("inference")
def test_copies_in_and_out_run_beside_the_neighbours_computing() -> None:
    resident = echo(type("Busy", (Scripted,), {"script": staticmethod(busy)}))
    backend = next(iter(resident.backends.values()))
    form = CallForm(RoutingForm.NONE, "bfloat16", reply_dtype="bfloat16")
    random, ways = generator(SEED), stagings(DEVICE)
    rows = [torch.randn(4096, WIDE, generator=random).bfloat16() for _ in range(8)]
    calls = [wire_call(model="echo", hidden_states=each) for each in rows]
    flights: list[Flight] = []
    for turn, call in enumerate(calls):
        if turn >= 2:
            check(flights.pop(0), rows[turn - 2])
        flights.append(launch(ways[turn % 2], backend, [ticket_of(resident, call, form)]))
    first, second = flights
    check(first, rows[-2])
    check(second, rows[-1])
    copied_in = before(second, Mark.STAGED, first, Mark.COMPUTED)
    copied_out = before(first, Mark.OUT, second, Mark.COMPUTED)
    took = before(second, Mark.BEGIN, second, Mark.STAGED)
    print(f"copy in of {calls[0].nbytes >> 20} MiB: {took:.2f} ms, {copied_in:.2f} ms before its")
    print(f"neighbour had computed; copy out ended {copied_out:.2f} ms before the next had")
    assert copied_in > 0 and copied_out > 0


def check(flight: Flight, rows: torch.Tensor) -> None:
    answers, report = flight.land()
    assert torch.equal(torch_tensor(answers[0].output), rows) and report.nonfinite_rows == 0  # type: ignore[union-attr]


def cards() -> list[Backend]:
    """The reference and every other backend that takes the layer on this card."""
    weights = random_weights(SPEC, generator(SEED))
    on_card = replace(weights, **{n: t.to(DEVICE) for n, t in weights.tensors.items()})
    rows = [
        row
        for row in ROWS
        if not row.identity
        and row.mode is PlanMode.ROUTED
        and not layer_refusals(row, SPEC, detect("cuda:0"))
    ]
    return [build(row, SPEC, on_card, None, DEVICE, buckets=(1, 64)) for row in rows]


def topk_call(random: torch.Generator, tokens: int, **fields: object) -> ForwardCall:
    rows = torch.randn(tokens, SPEC.hidden, generator=random).bfloat16()
    ids, weights = random_topk(tokens, SPEC.num_experts, 2, random)
    return wire_call(hidden_states=rows, topk_ids=ids, topk_weights=weights, **fields)


def logits_call(random: torch.Generator, tokens: int, **fields: object) -> ForwardCall:
    rows = torch.randn(tokens, SPEC.hidden, generator=random).bfloat16()
    logits = torch.randn(tokens, SPEC.num_experts, generator=random)
    return wire_call(hidden_states=rows, router_logits=logits, **fields)


FORMS: dict[str, tuple[Callable[..., ForwardCall], CallForm]] = {
    "topk": (
        topk_call,
        CallForm(
            RoutingForm.TOPK,
            "bfloat16",
            ids_dtype="int32",
            weights_dtype="float32",
            top_k=2,
            reply_dtype="bfloat16",
        ),
    ),
    "logits": (
        logits_call,
        CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32", reply_dtype="bfloat16"),
    ),
}


@pytest.mark.usefixtures("inference")
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("form", FORMS)
def test_a_launch_waits_for_nothing(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises at any operation that would make the host wait for the card."""
    monkeypatch.setattr(expert_rows, "MOST_BATCHES", 1)
    make, call_form = FORMS[form]
    backends = [b for b in cards() if b.row.backend != "reference"]
    assert backends, "this card has a backend of its own"
    resident, random = layer(SPEC, backends), generator(SEED)
    way = stagings(DEVICE)[0]
    for backend in backends:
        for tokens in (64, 1, 40):
            ticket = ticket_of(resident, make(random, tokens), call_form)
            launch(way, backend, [ticket]).land()  # first uses may compile and allocate
            torch.cuda.set_sync_debug_mode("error")
            try:
                flight = launch(way, backend, [ticket])
            finally:
                torch.cuda.set_sync_debug_mode("default")
            answers, _ = flight.land()
            assert not isinstance(answers[0], Exception)


def test_many_callers_get_their_own_rows_from_every_backend() -> None:
    backends, reports = cards(), Reports()
    names = sorted({backend.row.backend for backend in backends} - {"reference"})
    residents = Residents()
    residents.add(layer(SPEC, backends))
    residents.add(echo())
    rules = Rules(max_batch_tokens=600)
    engine = Engine(residents, DEVICE, EngineOptions(rules=rules), reports)
    engine.start()
    faults: list[str] = []

    def one(seed: int) -> None:
        random = generator(seed)
        for turn in range(25):
            tokens = int(torch.randint(1, 1500, (1,), generator=random))
            rows = torch.randn(tokens, WIDE, generator=random).bfloat16()
            call = wire_call(model="echo", hidden_states=rows)
            reply = engine.submit(call, "test", None).future.result(30)
            if not torch.equal(torch_tensor(reply.output), rows):
                faults.append(f"seed {seed}, turn {turn}: rows of identity")
            make = (topk_call, logits_call)[turn % 2]
            name = names[turn % len(names)]
            asked = make(random, tokens % 300 + 1, backend=name)
            checked = asked._replace(backend="reference", reply_dtype="float32")
            found, truth = (
                torch_tensor(engine.submit(c, "test", None).future.result(30).output)
                for c in (asked, checked)
            )
            if not relative(found, truth) < 1e-2:
                faults.append(f"seed {seed}, turn {turn}: {name} {relative(found, truth):.1e}")

    threads = [threading.Thread(target=one, args=(SEED + n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert engine.drain(30) and not faults
    print(f"{names}: {len(reports.ran_batches)} batches")
    assert all(
        min(r.times.kernel, r.times.stage_in, r.times.stage_out) >= 0 for r in reports.ran_batches
    )
    counted = residents.get("m", 0).expert_rows.counts(SPEC)
    assert sum(counted) == 2 * sum(r.tokens for r in reports.ran_batches if r.model == "m")
