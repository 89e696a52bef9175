"""The hard cases that a cell must get right on this device, as data.

A case starts from a plain layer of the cell's format and changes what makes it hard. A row that
does not accept the changed layer or call is not tried on it: the table already says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expertd.capability.row import Row
from expertd.core import (
    Activation,
    ActivationKind,
    LayerSpec,
    PlanMode,
    QuantScheme,
    RoutingMethod,
    RoutingSpec,
)

Logits = Callable[[int, int, torch.Generator], Tensor]

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K, TOKENS = 256, 256, 32, 4, 33


def plain(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    return torch.randn(tokens, experts, generator=random)


def all_negative(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    return -torch.rand(tokens, experts, generator=random) * 8 - 0.5


def near_ties(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Neighbours differ by less than bfloat16 resolves, in an order that is random for each row."""
    steps = torch.arange(experts, dtype=torch.float32) * 2**-13
    orders = [torch.randperm(experts, generator=random) for _ in range(tokens)]
    return 1.0 + torch.stack([steps[order] for order in orders])


def saturated(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Beyond what a sigmoid resolves, but in a strict order."""
    return 20.0 + 4.0 * torch.rand(tokens, experts, generator=random)


def skewed(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Everybody wants the first few experts; the last half gets no row at all."""
    tilt = torch.zeros(experts)
    tilt[:2], tilt[experts // 2 :] = 6.0, -30.0
    return plain(tokens, experts, random) + tilt


@dataclass(frozen=True, slots=True)
class Case:
    """One hard case: what changes in the layer, its routing and its call.

    rows_size multiplies the rows, kind keeps the case to one activation.
    """

    name: str
    logits: Logits = plain
    tokens: int = TOKENS
    layer: dict[str, Any] = field(default_factory=dict)
    routing: dict[str, Any] = field(default_factory=dict)
    activation: dict[str, Any] = field(default_factory=dict)
    bias_size: float = 0.1
    rows_size: float = 1.0
    every_activation: bool = False
    kind: ActivationKind | None = None


CASES: tuple[Case, ...] = (
    Case("random rows", every_activation=True),
    Case("all-negative logits", logits=all_negative),
    Case("near ties", logits=near_ties),
    Case("saturated logits", logits=saturated),
    Case("large bias, scale 2.5", bias_size=30.0, routing={"routed_scaling_factor": 2.5}),
    Case("clamp exceeded", activation={"limit": 0.25}),
    Case("input-side weights", routing={"weight_site": "input", "top_k": 1}),
    Case("one token", tokens=1),
    Case("odd counts", tokens=7, routing={"top_k": 3}),
    Case("padded sizes", layer={"intermediate": 480}, tokens=5),
    Case("padded sizes, not gated", layer={"intermediate": 1856}, kind=ActivationKind.RELU2),
    # Rows of order one see nothing but SiTU's straight middle, whatever alpha and beta are.
    Case("rows that bend SiTU", rows_size=16.0, kind=ActivationKind.SITU),
    Case("skewed routing, experts without rows", logits=skewed),
    Case("an expert range", layer={"expert_begin": 8, "expert_end": 16}),
)

METHODS: dict[str, RoutingSpec] = {
    "DeepSeekV3, grouped": RoutingSpec(
        RoutingMethod.DEEPSEEK_V3, "sigmoid", TOP_K, bias=True, n_group=8, topk_group=4
    ),
    "DeepSeekV3": RoutingSpec(
        RoutingMethod.DEEPSEEK_V3, "sigmoid", TOP_K, bias=True, n_group=1, topk_group=1
    ),
    "MiniMax2": RoutingSpec(RoutingMethod.MINIMAX2, "sigmoid", TOP_K, bias=True),
    "RenormalizeNaive": RoutingSpec(RoutingMethod.RENORMALIZE_NAIVE, "softmax", TOP_K),
    "Renormalize": RoutingSpec(RoutingMethod.RENORMALIZE, "softmax", TOP_K),
    "Default": RoutingSpec(RoutingMethod.DEFAULT, "softmax", TOP_K, renormalize=False),
    "SigmoidRenorm": RoutingSpec(RoutingMethod.SIGMOID_RENORM, "sigmoid", TOP_K),
    "Sigmoid": RoutingSpec(RoutingMethod.SIGMOID, "sigmoid", TOP_K, renormalize=False),
    "TopKSigmoid": RoutingSpec(RoutingMethod.TOPK_SIGMOID, "sigmoid", TOP_K, renormalize=False),
    "Llama4": RoutingSpec(
        RoutingMethod.LLAMA4, "sigmoid", 1, renormalize=False, weight_site="input"
    ),
}
ROUTED_METHODS = ("DeepSeekV3, grouped", "RenormalizeNaive")
"""A routed row never sees the method; one with a bias and one without exercise expertd's router."""


def layers(row: Row, quant: QuantScheme, case: Case) -> Iterator[tuple[str, LayerSpec]]:
    """The layers on which a case is tried for a row, by the name of their method."""
    names = METHODS if row.mode is PlanMode.MONOLITHIC else ROUTED_METHODS
    kinds = [kind for kind in row.activations if case.kind in (None, kind)]
    for name in names:
        routing = replace(METHODS[name], **case.routing)
        for kind in kinds if case.every_activation else kinds[:1]:
            yield (
                f"{name}, {kind}",
                replace(
                    LayerSpec(
                        hidden=HIDDEN,
                        intermediate=INTERMEDIATE,
                        num_experts=EXPERTS,
                        expert_begin=0,
                        expert_end=EXPERTS,
                        activation=Activation(kind, **case.activation),
                        quant=quant,
                        routing=routing,
                    ),
                    **case.layer,
                ),
            )
