"""The time of routing: our kernel beside the same in torch's operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from tests.bench.kernels.timing import Timing, time_calls
from torch import Tensor

from expertd.backends.triton.router import route_for as fused
from expertd.core import RoutingMethod, RoutingSpec
from expertd.routing import route_for

CALLS = 20
"""Calls of one graph, so that the gap between two graphs does not count."""

CASES = (
    (256, RoutingSpec(RoutingMethod.DEEPSEEK_V3, "sigmoid", 8, n_group=8, topk_group=4, bias=True)),
    (256, RoutingSpec(RoutingMethod.MINIMAX2, "sigmoid", 8, bias=True)),
    (256, RoutingSpec(RoutingMethod.DEFAULT, "softmax", 8)),
    (128, RoutingSpec(RoutingMethod.RENORMALIZE, "softmax", 4)),
    (512, RoutingSpec(RoutingMethod.DEEPSEEK_V4, "sqrtsoftplus", 22, bias=True)),
)
TOKENS = (1, 64, 1024, 4096)


@dataclass(frozen=True)
class RouterCell:
    """Both times of one case."""

    name: str
    tokens: int
    experts: int
    top_k: int
    ours: Timing
    torch: Timing


def router_cells(device: torch.device, seconds: float) -> Iterator[RouterCell]:
    for experts, spec in CASES:
        bias = torch.randn(experts, device=device) * 0.1 if spec.bias else None
        for tokens in TOKENS:
            logits = torch.randn(tokens, experts, device=device)
            ours = time_calls([_call(fused, spec, logits, bias)] * CALLS, seconds)
            plain = time_calls([_call(route_for, spec, logits, bias)] * CALLS, seconds)
            yield RouterCell(spec.method, tokens, experts, spec.top_k, ours, plain)


def _call(
    route: Callable[..., object], spec: RoutingSpec, logits: Tensor, bias: Tensor | None
) -> Callable[[], object]:
    return lambda: route(spec, logits, bias)
