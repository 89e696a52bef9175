"""Proofs on a layer's own shape, for plans whose kernel routes by itself: on the twin."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.service.trtllm.layers import layer, row_of
from tests.strategies import generator, random_weights

from expertd.backends.base import Batch
from expertd.backends.build import build
from expertd.capability.row import State
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import LayerSpec, PlanMode, QuantScheme, RoutingMethod, RoutingSpec
from expertd.proof.shape import Layer, prove_shape

pytestmark = pytest.mark.usefixtures("twin")
CPU = torch.device("cpu")
BUCKETS = (1, 2, 4)
GROUPED = RoutingSpec(
    RoutingMethod.DEEPSEEK_V3, "sigmoid", 2, bias=True, n_group=2, topk_group=1,
    routed_scaling_factor=2.5,
)  # fmt: skip


def built(mode: PlanMode, spec: LayerSpec, bias: torch.Tensor | None) -> Layer:
    row, weights = row_of(spec.quant, mode), random_weights(spec, generator(3))
    backend = build(row, spec, weights, bias, CPU, BUCKETS)
    reference = build(REFERENCE[0], spec, weights, bias, CPU)
    return Layer(spec, {row.cell(spec.quant): backend}, reference, bias)


@pytest.mark.parametrize("mode", list(PlanMode))
@pytest.mark.parametrize("quant", [QuantScheme.BF16, QuantScheme.FP8_BLOCK128])
def test_a_true_kernel_is_proven_whoever_routes(quant: QuantScheme, mode: PlanMode) -> None:
    spec = layer(quant, routing=GROUPED)
    found = built(mode, spec, torch.randn(8, generator=generator(4)))
    (proof,) = prove_shape(found, BUCKETS, 600).values()
    assert proof.state is State.PROVEN, proof.failures


def test_a_kernel_that_forgets_the_bias_is_not() -> None:
    spec, bias = layer(QuantScheme.BF16, routing=GROUPED), torch.tensor([0.0] * 7 + [9.0])
    found = built(PlanMode.MONOLITHIC, spec, torch.zeros(8))
    (proof,) = prove_shape(replace(found, bias=bias), BUCKETS, 600).values()
    assert proof.state is State.FAILED


def test_a_kernel_that_ignores_the_logits_is_not() -> None:
    spec = layer(QuantScheme.BF16, routing=GROUPED)
    found = built(PlanMode.MONOLITHIC, spec, torch.zeros(8))
    (backend,) = found.backends.values()
    forward = backend._forward

    def deaf(batch: Batch) -> None:
        assert batch.logits is not None
        forward(replace(batch, logits=batch.logits.flip(1)))

    backend._forward = deaf  # type: ignore[method-assign]
    (proof,) = prove_shape(found, BUCKETS, 600).values()
    assert proof.state is State.FAILED
