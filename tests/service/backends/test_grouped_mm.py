"""torch's grouped GEMM as a backend, on the CPU's version of it, beside the fp32 reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.strategies import generator, layer_spec, random_topk, random_weights

from expertd.backends.base import Batch
from expertd.backends.build import build
from expertd.capability.rows.grouped_mm import ROWS
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme
from expertd.proof.run import TOLERANCES, relative_error

CPU = torch.device("cpu")
(ROW,) = ROWS


def layer(**changes: Any) -> LayerSpec:
    return layer_spec(quant=QuantScheme.BF16, **changes)


def error(spec: LayerSpec, batch: Batch, seed: int) -> float:
    """The error of the answer in parts of what it may be."""
    weights = random_weights(spec, generator(seed))
    expected = replace(batch, out=torch.empty_like(batch.out, dtype=torch.float32))
    build(ROW, spec, weights, None, CPU).forward(batch)
    build(REFERENCE[0], spec, weights, None, CPU).forward(expected)
    return relative_error(batch.out, expected.out) / TOLERANCES[ROW.activation_quant]


def batch_of(spec: LayerSpec, tokens: int, top_k: int, seed: int) -> Batch:
    random = generator(seed)
    rows = torch.randn(tokens, spec.hidden, generator=random).bfloat16()
    ids, weights = random_topk(tokens, spec.num_experts, top_k, random)
    return Batch(rows, torch.full_like(rows, torch.nan), ids=ids, weights=weights)


@pytest.mark.parametrize("tokens", [1, 9, 130])
@pytest.mark.parametrize("kind", ActivationKind)
def test_sizes_and_activations(tokens: int, kind: ActivationKind) -> None:
    spec = layer(activation=Activation(kind))
    assert error(spec, batch_of(spec, tokens, 3, tokens), tokens) <= 1


@pytest.mark.parametrize("begin", [0, 2, 5])
def test_a_range_with_biases_and_masked_ids(begin: int) -> None:
    spec = layer(expert_bias=True, expert_begin=begin, expert_end=begin + 1)
    batch = batch_of(spec, 25, 4, begin)
    assert batch.ids is not None and batch.weights is not None
    batch.ids[::2, 1] = -1
    batch.ids[3] = -1
    batch.weights[batch.ids < 0] = torch.nan
    assert error(spec, batch, begin) <= 1
    assert batch.out[3].count_nonzero() == 0


def test_input_side_weights() -> None:
    routing = layer().routing
    assert routing is not None
    spec = layer(routing=replace(routing, top_k=1, weight_site="input"), expert_bias=True)
    batch = batch_of(spec, 19, 1, 7)
    assert batch.weights is not None
    batch.weights.mul_(torch.linspace(0.1, 1, 19)[:, None])
    assert error(spec, batch, 7) <= 1


def test_rows_that_are_not_finite_stay_alone() -> None:
    spec = layer()
    backend = build(ROW, spec, random_weights(spec, generator(1)), None, CPU)
    batch = batch_of(spec, 30, 2, 1)
    backend.forward(batch)
    clean = batch.out.clone()
    batch.rows[5, 7], batch.rows[13, 0] = torch.nan, torch.inf
    backend.forward(batch)
    others = [n for n in range(30) if n not in (5, 13)]
    assert not batch.out[[5, 13]].isfinite().all(dim=1).any()
    assert torch.equal(batch.out[others], clean[others])
