"""How many experts and how many of them a row: of all bounds, the tightest is the reason."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from expertd.capability.checks.fault import Ask, Fault, at_most
from expertd.capability.checks.routing import routed_by_kernel, tier_of
from expertd.capability.row import Row
from expertd.capability.rows.trtllm_routing import MAX_EXPERTS_A_GROUP


class Bound(NamedTuple):
    most: int
    why: str


def num_experts(row: Row, ask: Ask) -> Iterator[Fault]:
    yield from _exceeded("num_experts", ask.spec.num_experts, _experts(row, ask))


def top_k(row: Row, ask: Ask) -> Iterator[Fault]:
    yield from _exceeded("top_k", ask.top_k, _chosen(row, ask))


def _exceeded(field: str, given: int, bounds: Iterator[Bound]) -> Iterator[Fault]:
    tightest = min(bounds, default=None)
    if tightest is not None and given > tightest.most:
        yield Fault(field, field, str(given), at_most(tightest.most), tightest.why)


def _experts(row: Row, ask: Ask) -> Iterator[Bound]:
    tier, routing = tier_of(row, ask), routed_by_kernel(row, ask)
    if row.limits.max_experts is not None:
        yield Bound(row.limits.max_experts, "the kernel's tables of experts end there")
    if tier is not None and routing is not None:
        yield Bound(tier.max_experts, f"the kernel's tiers of {routing.method} end there")
        if tier.grouped:
            most = (routing.n_group or 1) * MAX_EXPERTS_A_GROUP
            yield Bound(most, f"a group of the kernel has at most {MAX_EXPERTS_A_GROUP} experts")


def _chosen(row: Row, ask: Ask) -> Iterator[Bound]:
    tier, routing, experts = tier_of(row, ask), routed_by_kernel(row, ask), ask.spec.num_experts
    if experts:
        yield Bound(experts, "a row cannot choose more experts than there are")
    if row.limits.max_top_k is not None:
        yield Bound(row.limits.max_top_k, "the kernel's lists of experts end there")
    if row.limits.more_experts_than_top_k and experts:
        yield Bound(experts - 1, "the launcher wants more experts than top_k")
    if tier is not None and routing is not None:
        yield Bound(tier.max_top_k, f"the kernel's tiers of {routing.method} end there")
        if tier.grouped:
            most = (routing.topk_group or 1) * experts // (routing.n_group or 1) - 1
            yield Bound(most, "the launcher wants fewer than the chosen groups hold")
