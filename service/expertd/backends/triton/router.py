"""expertd's own router on a GPU: route_for of routing.reference as one kernel.

One launch, no synchronisation, so that it can be part of a CUDA graph.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from expertd.backends.triton.router_kernel import route_kernel
from expertd.core import RoutingMethod, RoutingSpec
from expertd.errors import InvalidArgument
from expertd.routing.checks import check_spec
from expertd.routing.methods import TRAITS, computable

ONE_WARP_KEYS = 512
"""Keys that one warp holds in registers: it compares them without going through shared memory."""


class Formula(NamedTuple):
    """As routing.reference's: the score, whether it (or the raw logit) decides, the finish."""

    score: str
    by_score: bool
    finish: str


FORMULAS: dict[RoutingMethod, Formula] = {
    RoutingMethod.DEFAULT: Formula("softmax", True, "as_is"),
    RoutingMethod.RENORMALIZE: Formula("none", False, "over_chosen"),
    RoutingMethod.RENORMALIZE_NAIVE: Formula("none", False, "over_chosen"),
    RoutingMethod.GROUPED_SOFTMAX: Formula("softmax", True, "over_sum"),
    RoutingMethod.SOFTMAX_BIAS: Formula("softmax", True, "over_clamped_sum"),
    RoutingMethod.DEEPSEEK_V3: Formula("sigmoid", True, "over_sum"),
    RoutingMethod.MINIMAX2: Formula("sigmoid", True, "over_sum"),
    RoutingMethod.SIGMOID_RENORM: Formula("sigmoid", True, "over_clamped_sum"),
    RoutingMethod.SIGMOID: Formula("sigmoid", True, "as_is"),
    RoutingMethod.TOPK_SIGMOID: Formula("sigmoid", False, "as_is"),
    RoutingMethod.LLAMA4: Formula("sigmoid", False, "as_is"),
    RoutingMethod.DEEPSEEK_V4: Formula("sqrtsoftplus", True, "over_sum"),
    RoutingMethod.TOPK: Formula("none", False, "as_is"),
}


@dataclass(frozen=True, slots=True)
class _Program:
    """What every launch for a layer passes."""

    scale: float
    eps: float
    fill: float
    constants: dict[str, Any]


def route_for(
    spec: RoutingSpec, logits: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Experts of each row, best first, and their weights: (ids [T, K] int32, weights float32).

    logits [T, E] float32, bfloat16 or float16 on a GPU; bias [E]. Ids, weights and what is raised
    are those of routing.route_for; sums are added in another order.
    """
    if spec.bias and bias is None:
        raise InvalidArgument("bias=None; accepted: the layer's correction bias [E]")
    tokens, experts = logits.shape
    assert bias is None or bias.shape == (experts,), "the kernel reads one bias for each expert"
    program = _program(spec, experts, bias is not None)
    ids = torch.empty(tokens, spec.top_k, dtype=torch.int32, device=logits.device)
    weights = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
    if tokens:
        route_kernel[(tokens,)](
            logits.contiguous(),
            bias if bias is None else bias.contiguous(),
            ids,
            weights,
            program.scale,
            program.eps,
            program.fill,
            **program.constants,
        )
    return ids, weights


@lru_cache(maxsize=256)
def _program(spec: RoutingSpec, experts: int, biased: bool) -> _Program:
    """The kernel's constants for a layer; raises InvalidArgument naming every wrong setting."""
    formula, traits = FORMULAS[computable(spec.method)], TRAITS[spec.method]
    check_spec(replace(spec, bias=biased), experts)
    as_is = traits.renormalize == "asked" and not spec.renormalize
    groups = spec.n_group or 1
    widths = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    return _Program(
        scale=float(spec.routed_scaling_factor),
        eps=float(traits.eps if spec.eps is None else spec.eps),
        fill=float("-inf") if spec.group_fill is None else float(spec.group_fill),
        constants={
            "EXPERTS": experts,
            "K": spec.top_k,
            "GROUPS": groups,
            "TOPK_GROUP": spec.topk_group or groups,
            "GROUP_SCORE": spec.group_score,
            "SCORE": formula.score,
            "BY_SCORE": formula.by_score,
            "FINISH": "as_is" if as_is else formula.finish,
            "BIASED": biased,
            "G_PAD": widths[0],
            "N_PAD": widths[1],
            "K_PAD": triton.next_power_of_2(spec.top_k),
            "num_warps": 1 if widths[0] * widths[1] <= ONE_WARP_KEYS else 4,
        },
    )
