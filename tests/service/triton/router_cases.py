"""What a router has to get right, and how it is compared: for the interpreter and for a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.core import RoutingMethod, RoutingSpec
from expertd.routing import route_for
from expertd.routing.methods import TRAITS, UNKNOWABLE
from expertd.routing.reference import EXACT, FORMULAS
from expertd.routing.selection import GROUP_SCORES, within_groups

METHODS = tuple(method for method in TRAITS if method not in UNKNOWABLE)
BIASED = tuple(method for method in METHODS if TRAITS[method].biased)
GROUPED = tuple(method for method in METHODS if TRAITS[method].grouped)

Route = Callable[[RoutingSpec, Tensor, Tensor | None], tuple[Tensor, Tensor]]

ULPS = 4 * 2.0**-23
"""Scores may differ this much, relatively: exp and the order of a sum are not torch's own."""

SMALLEST = {"softmax": 1e-25}
"""Weights below which exp was denormal (and divided by at least 1e-12): torch keeps a few bits of
such numbers, the kernel flushes them."""


def plain(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    return 3 * torch.randn(tokens, experts, generator=random)


def all_negative(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    return -20 - 30 * torch.rand(tokens, experts, generator=random)


def ties(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Few levels, zeros of both signs among them."""
    levels = (1.5 * torch.randn(tokens, experts, generator=random)).round()
    return torch.where(torch.rand(tokens, experts, generator=random) < 0.5, levels, -0.0 * levels)


def near_ties(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Neighbours differ by less than bfloat16 resolves."""
    orders = [torch.randperm(experts, generator=random) for _ in range(tokens)]
    return 1 + torch.stack(orders) * 2.0**-13


def saturated(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Beyond what a float32 sigmoid resolves, on one side or the other."""
    return 24 * torch.randn(tokens, experts, generator=random).sign() + torch.rand(
        tokens, experts, generator=random
    )


def far_apart(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Probabilities that softmax makes 0, and sigmoids of all sizes but denormal ones."""
    return (60 * torch.randn(tokens, experts, generator=random)).clamp(min=-85)


def masked(tokens: int, experts: int, random: torch.Generator) -> Tensor:
    """Some experts masked; in the last row, so many that masked ones are chosen."""
    logits = plain(tokens, experts, random)
    logits[torch.rand(tokens, experts, generator=random) < 0.3] = -torch.inf
    logits[-1, 1:] = -torch.inf
    return logits


LOGITS = (plain, all_negative, ties, near_ties, saturated, far_apart, masked)


def spec_of(method: RoutingMethod, top_k: int, **changes: object) -> RoutingSpec:
    """Settings of a method, with a bias wherever it has one."""
    traits = TRAITS[method]
    plain = RoutingSpec(
        method, traits.scoring, top_k, routed_scaling_factor=2.5, bias=traits.biased
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def bias_of(spec: RoutingSpec, experts: int, size: float, random: torch.Generator) -> Tensor | None:
    return size * torch.randn(experts, generator=random) if spec.bias else None


@dataclass(frozen=True)
class Keys:
    """What the reference compares: experts' keys [T, E] and, of grouped methods, groups' [T, G]."""

    experts: Tensor
    groups: Tensor | None


def keys(spec: RoutingSpec, logits: Tensor, bias: Tensor | None) -> Keys:
    formula, logits = FORMULAS[spec.method], logits.float()
    key = formula.score(logits, EXACT) if formula.by_score else logits
    key = key if bias is None else key + bias.float()
    key = key.masked_fill(torch.isneginf(logits), -torch.inf)
    if not spec.grouped:
        return Keys(key, None)
    assert spec.n_group is not None and spec.topk_group is not None
    fill = -torch.inf if spec.group_fill is None else spec.group_fill
    groups = GROUP_SCORES[spec.group_score](key.unflatten(1, (spec.n_group, -1)))
    return Keys(within_groups(key, spec.n_group, spec.topk_group, spec.group_score, fill), groups)


def group_near_tie(spec: RoutingSpec, groups: Tensor | None, size: Tensor) -> Tensor:
    """Rows [T] in which rounding decides which is the last group chosen."""
    if groups is None or spec.topk_group == spec.n_group:
        return torch.zeros_like(size, dtype=torch.bool)
    assert spec.topk_group is not None
    ranked = groups.sort(dim=1, descending=True).values
    gap = ranked[:, spec.topk_group - 1] - ranked[:, spec.topk_group]
    return gap <= ULPS * size


def compare(
    route: Route,
    spec: RoutingSpec,
    logits: Tensor,
    bias: Tensor | None,
    *,
    strict: bool,
    alike: float = 0.9,
) -> None:
    """Ids and weights beside the reference's on the same device.

    Where ids differ, the reference's own keys of both choices must be the same to a few units in
    the last place, and only in a few rows (alike are to be the same); strict allows none at all.
    """
    ids, weights = route(spec, logits, bias)
    expected_ids, expected = route_for(spec, logits, bias)
    assert ids.dtype == torch.int32 and weights.dtype == torch.float32
    same = (ids == expected_ids).all(dim=1)
    assert same.all() or not strict, f"{int((~same).sum())} rows differ"
    key = keys(spec, logits, bias)
    chosen, wanted = (key.experts.gather(1, i.long()) for i in (ids, expected_ids))
    size = wanted.abs().nan_to_num(posinf=0.0) + (0 if bias is None else bias.float().abs().amax())
    close = (chosen == wanted) | ((chosen - wanted).abs() <= ULPS * size)
    open_rows = group_near_tie(spec, key.groups, size.amax(dim=1))
    assert (close.all(dim=1) | open_rows)[~same].all()
    found = (same | open_rows).float().mean()
    assert found >= alike, f"{found:.0%} of {len(same)} rows are the same"
    atol = SMALLEST.get(spec.scoring, 1e-37)
    torch.testing.assert_close(weights[same], expected[same], rtol=1e-6, atol=atol)
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
