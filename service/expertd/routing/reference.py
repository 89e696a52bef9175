"""Every routing method in torch, as the families compute it and, under a Rounding, as kernels do.

A method is three small functions: what scores are made of the logits, which of the two is compared
when experts are chosen, and what becomes of the chosen experts' scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from expertd.core import RoutingMethod, RoutingSpec
from expertd.errors import InvalidArgument
from expertd.routing.checks import Settings, check_settings
from expertd.routing.methods import TRAITS, computable, method_named
from expertd.routing.rounding import Rounding
from expertd.routing.selection import descending, within_groups

EXACT = Rounding()
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FAST_SIGMOID_END = 16.0
_FAST_SOFTMAX_GAP = 87.3


def route(
    method: RoutingMethod | str,
    logits: Tensor,
    *,
    bias: Tensor | None = None,
    top_k: int,
    n_group: int | None = None,
    topk_group: int | None = None,
    scale: float = 1.0,
    renormalize: bool = True,
    eps: float | None = None,
    group_fill: float | None = None,
    group_score: str = "top2",
    rounding: Rounding | None = None,
) -> tuple[Tensor, Tensor]:
    """Experts of each row, best first, and their weights: (ids [T, K] int32, weights float32).

    logits [T, E] float32, bfloat16 or float16, on any device; -inf masks an expert, whose weight is
    0 should it be chosen for want of others. bias [E] enters the choice only, scale the weights.
    eps, group_fill, group_score and renormalize are read by the methods that have such a step.
    Raises InvalidArgument naming every setting that is wrong. Values are not checked (logits_ok).
    """
    settings = Settings(
        method=computable(method_named(method)),
        num_experts=_experts_of(logits, bias),
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scale=scale,
        eps=eps,
        group_fill=group_fill,
        group_score=group_score,
        bias=bias is not None,
    )
    check_settings(settings)
    return _route(settings, logits, bias, renormalize, rounding or EXACT)


def _route(
    settings: Settings, logits: Tensor, bias: Tensor | None, renormalize: bool, rounding: Rounding
) -> tuple[Tensor, Tensor]:
    formula, traits = FORMULAS[settings.method], TRAITS[settings.method]
    logits_TE = _rounded(logits.float(), rounding.logits)
    score_TE = formula.score(logits_TE, rounding)
    key_TE = score_TE if formula.by_score else logits_TE
    if bias is not None:
        key_TE = key_TE + _rounded_bias(bias, settings.groups > 1, rounding)
    key_TE = _eligible(key_TE.masked_fill(torch.isneginf(logits_TE), -math.inf), settings)
    ids_TK = descending(key_TE, settings.top_k)
    nobody_TK = torch.isneginf(key_TE.gather(1, ids_TK))
    score_TK = score_TE.gather(1, ids_TK).masked_fill(nobody_TK, 0.0)
    finish = formula.finish if renormalize or traits.renormalize != "asked" else _as_is
    weights_TK = finish(score_TK, traits.eps if settings.eps is None else settings.eps)
    return ids_TK.to(torch.int32), _rounded(weights_TK * settings.scale, rounding.weights)


def _eligible(key_TE: Tensor, s: Settings) -> Tensor:
    """Keys with the experts outside the best groups filled."""
    if s.groups == 1 or s.topk_group is None:
        return key_TE
    fill = -math.inf if s.group_fill is None else s.group_fill
    return within_groups(key_TE, s.groups, s.topk_group, s.group_score, fill)


def route_for(
    spec: RoutingSpec, logits: Tensor, bias: Tensor | None = None, rounding: Rounding | None = None
) -> tuple[Tensor, Tensor]:
    """route with a layer's own settings; raises InvalidArgument as route does.

    The routed scale is in the weights wherever the family applies it: the experts' sum is linear in
    its weights, so this is the one place for both scale sites.
    """
    if spec.bias and bias is None:
        raise InvalidArgument("bias=None; accepted: the layer's correction bias [E]")
    return route(
        spec.method,
        logits,
        bias=bias,
        top_k=spec.top_k,
        n_group=spec.n_group,
        topk_group=spec.topk_group,
        scale=spec.routed_scaling_factor,
        renormalize=spec.renormalize,
        eps=spec.eps,
        group_fill=spec.group_fill,
        group_score=spec.group_score,
        rounding=rounding,
    )


def logits_ok(logits: Tensor, top_k: int) -> Tensor:
    """Which rows of logits [T, E] can be routed, [T] bool, without a synchronisation.

    A row with NaN, +inf or fewer than top_k finite values cannot; other -inf are masks.
    """
    finite_TE = torch.isfinite(logits)
    known_TE = finite_TE | torch.isneginf(logits)
    return known_TE.all(dim=1) & (finite_TE.sum(dim=1) >= top_k)


def _experts_of(logits: Tensor, bias: Tensor | None) -> int:
    """E, from tensors of the right form."""
    if logits.dim() != 2 or logits.dtype not in _DTYPES.values():
        accepted = f"[T, E] in {', '.join(_DTYPES)}"
        raise InvalidArgument(f"logits={_form(logits)}; accepted: {accepted}")
    experts = logits.shape[1]
    if bias is not None and (tuple(bias.shape) != (experts,) or not bias.is_floating_point()):
        raise InvalidArgument(f"bias={_form(bias)}; accepted: floating point [{experts}]")
    return experts


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _rounded(values: Tensor, dtype: str) -> Tensor:
    return values if dtype == "float32" else values.to(_DTYPES[dtype]).float()


def _rounded_bias(bias_E: Tensor, grouped: bool, rounding: Rounding) -> Tensor:
    applies = grouped or rounding.bias_when == "always"
    return _rounded(bias_E.float(), rounding.bias if applies else "float32")


def _raw(logits_TE: Tensor, _: Rounding) -> Tensor:
    return logits_TE


def _softmax(logits_TE: Tensor, rounding: Rounding) -> Tensor:
    score_TE = torch.softmax(logits_TE, dim=-1)
    if not rounding.fast_softmax:
        return score_TE
    gap_TE = logits_TE.amax(dim=-1, keepdim=True) - logits_TE
    return score_TE.masked_fill(gap_TE > _FAST_SOFTMAX_GAP, 0.0)


def _sigmoid(logits_TE: Tensor, rounding: Rounding) -> Tensor:
    if not rounding.fast_sigmoid:
        return torch.sigmoid(logits_TE)
    score_TE = 0.5 * torch.tanh(0.5 * logits_TE) + 0.5
    high, low = logits_TE >= _FAST_SIGMOID_END, logits_TE <= -_FAST_SIGMOID_END
    return score_TE.masked_fill(high, 1.0).masked_fill(low, 0.0)


def _sqrt_softplus(logits_TE: Tensor, _: Rounding) -> Tensor:
    return torch.nn.functional.softplus(logits_TE).sqrt()


def _as_is(score_TK: Tensor, _: float) -> Tensor:
    return score_TK


def _over_sum(score_TK: Tensor, eps: float) -> Tensor:
    return score_TK / (score_TK.sum(dim=-1, keepdim=True) + eps)


def _over_clamped_sum(score_TK: Tensor, eps: float) -> Tensor:
    return score_TK / score_TK.sum(dim=-1, keepdim=True).clamp(min=eps)


def _over_chosen(score_TK: Tensor, _: float) -> Tensor:
    return torch.softmax(score_TK, dim=-1)


class Formula(NamedTuple):
    """score [T, E] of the logits, whether it (or the raw logit) decides, weights of the chosen."""

    score: Callable[[Tensor, Rounding], Tensor]
    by_score: bool
    finish: Callable[[Tensor, float], Tensor]


# RenormalizeNaive (softmax, choose, divide by the sum) is Renormalize (choose, softmax): softmax
# keeps the order, and its normaliser cancels. Kernels have one implementation for both as well.
FORMULAS: dict[RoutingMethod, Formula] = {
    RoutingMethod.DEFAULT: Formula(_softmax, True, _as_is),
    RoutingMethod.RENORMALIZE: Formula(_raw, False, _over_chosen),
    RoutingMethod.RENORMALIZE_NAIVE: Formula(_raw, False, _over_chosen),
    RoutingMethod.GROUPED_SOFTMAX: Formula(_softmax, True, _over_sum),
    RoutingMethod.SOFTMAX_BIAS: Formula(_softmax, True, _over_clamped_sum),
    RoutingMethod.DEEPSEEK_V3: Formula(_sigmoid, True, _over_sum),
    RoutingMethod.MINIMAX2: Formula(_sigmoid, True, _over_sum),
    RoutingMethod.SIGMOID_RENORM: Formula(_sigmoid, True, _over_clamped_sum),
    RoutingMethod.SIGMOID: Formula(_sigmoid, True, _as_is),
    RoutingMethod.TOPK_SIGMOID: Formula(_sigmoid, False, _as_is),
    RoutingMethod.LLAMA4: Formula(_sigmoid, False, _as_is),
    RoutingMethod.DEEPSEEK_V4: Formula(_sqrt_softplus, True, _over_sum),
    RoutingMethod.TOPK: Formula(_raw, False, _as_is),
}
