"""Layers, rows of the table and weights that the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from tests.strategies import random_topk, random_weights
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.backends.flashinfer_trtllm import backend as trtllm
from expertd.capability.row import Row
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import (
    Activation,
    ActivationKind,
    LayerSpec,
    PlanMode,
    QuantScheme,
    RoutingMethod,
    RoutingSpec,
)
from expertd.weights.canonical import ExpertWeights

ACTIVATIONS = {
    ActivationKind.SWIGLU: Activation(ActivationKind.SWIGLU),
    ActivationKind.SWIGLU_OAI: Activation(ActivationKind.SWIGLU_OAI, 1.5, 0.75, 7.0),
    ActivationKind.SWIGLU_STEP: Activation(ActivationKind.SWIGLU_STEP, limit=5.0),
    ActivationKind.GEGLU: Activation(ActivationKind.GEGLU),
    ActivationKind.SITU: Activation(ActivationKind.SITU, 3.0, 20.0),
    ActivationKind.RELU2: Activation(ActivationKind.RELU2),
}
RENORMALIZE = RoutingSpec(RoutingMethod.RENORMALIZE, "softmax", top_k=2)


def layer(quant: QuantScheme, **changes: Any) -> LayerSpec:
    """A small layer of 8 experts whose sizes every entry takes as they are."""
    plain = LayerSpec(
        hidden=256,
        intermediate=256,
        num_experts=8,
        expert_begin=0,
        expert_end=8,
        activation=ACTIVATIONS[ActivationKind.SWIGLU],
        quant=quant,
        routing=RENORMALIZE,
    )
    return replace(plain, **changes)


def row_of(quant: QuantScheme, mode: PlanMode, activation_quant: str = "") -> Row:
    """The row of a scheme in a mode."""
    return next(
        row
        for row in ROWS
        if row.mode is mode
        and quant in row.quants
        and activation_quant in ("", row.activation_quant)
    )


def with_inputs(weights: ExpertWeights, random: torch.Generator) -> ExpertWeights:
    """The same weights with static activation scales that differ between experts."""
    held = len(weights.w13)
    input13, input2 = 0.5 + torch.rand(2, held, generator=random)
    return replace(weights, input13=input13 / 30, input2=input2 / 20)


def raw(tensor: Tensor) -> Tensor:
    """The bytes, for comparisons that know no tolerance."""
    return tensor.contiguous().view(torch.uint8)


def backend_of(
    row: Row, spec: LayerSpec, bias: Tensor | None = None, *, inputs: bool = True
) -> Backend:
    """The row's backend on random weights, warmed up."""
    random = torch.Generator().manual_seed(5)
    weights = random_weights(spec, random)
    weights = with_inputs(weights, random) if inputs else weights
    name = row.load.partition(":")[2]
    backend: Backend = getattr(trtllm, name)(row, spec, torch.device("cpu"))
    assert backend.check() == ()
    backend.prepare_weights(weights, bias)
    backend.warm_up((3,))
    return backend


def batch_of(row: Row, spec: LayerSpec, tokens: int = 5, **changes: Any) -> Batch:
    """Random rows with the form of routing that the row takes."""
    random = torch.Generator().manual_seed(6)
    rows = torch.randn(tokens, spec.hidden, generator=random).bfloat16()
    if row.mode is PlanMode.MONOLITHIC:
        logits = torch.randn(tokens, spec.num_experts, generator=random)
        plain = Batch(rows, torch.zeros_like(rows), logits=logits)
    else:
        ids, weights = random_topk(tokens, spec.num_experts, 2, random)
        plain = Batch(rows, torch.zeros_like(rows), ids=ids, weights=weights)
    return replace(plain, **changes)
