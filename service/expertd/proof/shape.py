"""Proves the plans of a layer on its true shape: at every bucket they serve, and in hard cases.

The layer is the first of its shape to be loaded. Its backends are warm and tuned, as they will
serve, and hold its own weights; the reference computes the same rows of the same batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.capability.row import Cell, Row
from expertd.core import LayerSpec, PlanMode
from expertd.proof.batches import random_batch
from expertd.proof.cases import CASES, Case
from expertd.proof.run import TOLERANCES, Proof, Trial, relative_error
from expertd.routing.methods import UNKNOWABLE
from expertd.routing.reference import route_for
from expertd.routing.rounding import Rounding

SAMPLE = 16
"""How many rows of a large batch the reference computes."""

HARD_CASES = tuple(c for c in CASES if not (c.layer or c.routing or c.activation or c.kind))
"""The cases that leave the layer as it is."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A loaded layer: its backends, all warm, the reference beside them, the router's bias [E]."""

    spec: LayerSpec
    backends: Mapping[Cell, Backend]
    reference: Backend
    bias: Tensor | None = None


def prove_shape(
    layer: Layer,
    buckets: Sequence[int],
    seconds: float,
    clock: Callable[[], float] = time.monotonic,
) -> dict[Cell, Proof]:
    """A proof of each backend; those that the seconds did not suffice for are not whole."""
    trials: dict[Cell, list[Trial]] = {cell: [] for cell in layer.backends}
    end, whole = clock() + seconds, True
    with torch.inference_mode():
        for case in _cases(buckets):
            if not (whole := clock() < end):
                break
            for cell, trial in _try_all(layer, case):
                trials[cell].append(trial)
    return {
        cell: Proof(cell, TOLERANCES[cell.activation_quant], tuple(mine), whole)
        for cell, mine in trials.items()
    }


def _cases(buckets: Sequence[int]) -> Iterator[Case]:
    """The largest bucket comes first: what it would show is the worst to learn from a request."""
    yield Case(f"{buckets[-1]} tokens", tokens=buckets[-1])
    yield from HARD_CASES
    yield from (Case(f"{tokens} tokens", tokens=tokens) for tokens in buckets[:-1])


class Routing(NamedTuple):
    """How a plan's rows find their experts; expertd's own router rounds nothing."""

    rounding: Rounding | None = None
    logits: str = "float32"

    @classmethod
    def of(cls, row: Row) -> Routing:
        if row.mode is PlanMode.ROUTED:
            return cls()
        return cls(row.rounding, "float32" if "float32" in row.logits else row.logits[0])


class Posed(NamedTuple):
    """A batch, which of its rows are compared, and what these should become [N, H] float32."""

    batch: Batch
    sample: Tensor
    wanted: Tensor


def _try_all(layer: Layer, case: Case) -> Iterator[tuple[Cell, Trial]]:
    """One case on every backend; those that route alike share what the reference computed."""
    posed: dict[Routing, Posed] = {}
    for cell, backend in layer.backends.items():
        routing = Routing.of(backend.row)
        if routing not in posed:
            posed[routing] = _posed(layer, case, routing)
        yield cell, _trial(backend, case.name, posed[routing])


def _trial(backend: Backend, case: str, posed: Posed) -> Trial:
    batch, entry = posed.batch, str(backend.row.entry)
    batch.out.fill_(torch.nan)
    try:
        backend.forward(batch)
        error = relative_error(batch.out[posed.sample], posed.wanted)
        complete = bool(batch.out.isfinite().all())
    except Exception as fault:  # whatever a kernel raises is the finding of this trial
        return Trial(case, entry, float("nan"), f"{type(fault).__name__}: {fault}"[:300])
    return Trial(case, entry, error, "" if complete else "rows not finite, or not written")


def _posed(layer: Layer, case: Case, routing: Routing) -> Posed:
    batch = _routed(layer, case, routing)
    random = torch.Generator().manual_seed(case.tokens)
    sample = torch.randperm(case.tokens, generator=random)[:SAMPLE].to(batch.rows.device)
    assert batch.ids is not None and batch.weights is not None
    wanted = torch.empty(len(sample), layer.spec.hidden, device=batch.rows.device)
    part = Batch(batch.rows[sample], wanted, None, batch.ids[sample], batch.weights[sample])
    layer.reference.forward(part)
    return Posed(batch, sample, wanted)


def _routed(layer: Layer, case: Case, routing: Routing) -> Batch:
    """The case's batch, routed as the layer's router does from the case's logits, if it has one."""
    batch = random_batch(layer.spec, case.tokens, layer.reference.device)
    if layer.spec.routing is None or layer.spec.routing.method in UNKNOWABLE:
        return batch
    random = torch.Generator().manual_seed(case.tokens)
    drawn = case.logits(case.tokens, layer.spec.num_experts, random)
    logits = drawn.to(batch.rows.device, getattr(torch, routing.logits))
    ids, weights = route_for(layer.spec.routing, logits, layer.bias, routing.rounding)
    return replace(batch, ids=ids, weights=weights, logits=logits)
