"""Routing inside a kernel: whether it computes what the layer's family computes."""

from __future__ import annotations

from collections.abc import Iterator

from expertd.capability.checks.fault import Ask, Check, Fault, at_most, listed
from expertd.capability.checks.library import missing_member, too_old
from expertd.capability.row import Row, Tier
from expertd.capability.rows.trtllm_routing import MAX_GROUPS, MAX_TOPK_GROUP
from expertd.core import PlanMode, RoutingForm, RoutingSpec
from expertd.routing.kernel_ids import FLASHINFER_NAMES
from expertd.routing.verify import reverify

Faults = Iterator[Fault]

KERNEL_EPS = 1e-12
"""Kernels add 1e-20 to a sum whose smallest terms are 1e-7: less than this is the same to them."""


def exact(row: Row, ask: Ask) -> Faults:
    if ask.exact and row.mode is PlanMode.MONOLITHIC:
        why = "--exact-routing is on and the kernel routes with roundings of its own"
        yield Fault("exact_routing", "exact_routing", "true", "false", why)


def method(row: Row, ask: Ask) -> Faults:
    routing = routed_by_kernel(row, ask)
    if routing is None:
        return
    if routing.method not in row.routing:
        why = "the kernel cannot route by that method"
        yield Fault("routing_method", "routing", routing.method, listed(row.routing), why)
    elif ask.library is not None:
        yield from missing_member(
            ask.library, "RoutingMethodType", FLASHINFER_NAMES[routing.method]
        )


def settings(row: Row, ask: Ask) -> Faults:
    """Whether a kernel that is told the declared method computes these settings."""
    routing = routed_by_kernel(row, ask)
    if routing is None or routing.method not in row.routing:
        return
    for reason in reverify(routing.method, routing):
        yield Fault(reason.code, reason.field, reason.given, reason.accepted, reason.text)


def version(row: Row, ask: Ask) -> Faults:
    found = tier_of(row, ask)
    if found is not None and ask.library is not None:
        why = "routing by this method is right only from there on"
        yield from too_old(ask.library, found.since, why)


def whole_layer(row: Row, ask: Ask) -> Faults:
    found = tier_of(row, ask)
    if found is not None and found.whole and not ask.spec.complete:
        why = "with a range of experts the kernel takes global ids for local ones"
        given = f"{ask.spec.expert_begin}-{ask.spec.expert_end - 1}"
        yield Fault("routing_range", "experts", given, f"0-{ask.spec.num_experts - 1}", why)


def scale(row: Row, ask: Ask) -> Faults:
    found, routing = tier_of(row, ask), routed_by_kernel(row, ask)
    if found is None or routing is None or routing.routed_scaling_factor == 1.0:
        return
    facts = ask.library.facts if ask.library else frozenset()
    if found.scale and (found.scale_fact is None or found.scale_fact in facts):
        return
    why = f"the kernel ignores the scale under {routing.method}; a routed plan applies it"
    given = str(routing.routed_scaling_factor)
    yield Fault("scale_ignored", "routed_scaling_factor", given, "1.0", why)


def eps(row: Row, ask: Ask) -> Faults:
    routing = routed_by_kernel(row, ask)
    if routing is not None and routing.eps is not None and routing.eps > KERNEL_EPS:
        why = "the kernel's own epsilon gives other weights when all scores are small"
        yield Fault("eps", "eps", str(routing.eps), f"<= {KERNEL_EPS}", why)


def groups(row: Row, ask: Ask) -> Faults:
    """What the grouped kernel bounds."""
    found, routing = tier_of(row, ask), routed_by_kernel(row, ask)
    if found is None or not found.grouped or routing is None:
        return
    why = "the grouped kernel has no more"
    if (routing.n_group or 1) > MAX_GROUPS:
        yield Fault("n_group", "n_group", str(routing.n_group), at_most(MAX_GROUPS), why)
    if (routing.topk_group or 1) > MAX_TOPK_GROUP:
        bound = at_most(MAX_TOPK_GROUP)
        yield Fault("topk_group", "topk_group", str(routing.topk_group), bound, why)


def routed_by_kernel(row: Row, ask: Ask) -> RoutingSpec | None:
    """The layer's routing if this row would route such a call by itself."""
    if row.mode is not PlanMode.MONOLITHIC or ask.form.routing is not RoutingForm.LOGITS:
        return None
    return ask.spec.routing


def tier_of(row: Row, ask: Ask) -> Tier | None:
    """The tier for the layer's method, the grouped one for groups if there is one."""
    routing = routed_by_kernel(row, ask)
    tiers = row.routing.get(routing.method, ()) if routing else ()
    grouped = routing is not None and routing.grouped
    return next((one for one in tiers if one.grouped == grouped), tiers[0] if tiers else None)


CHECKS: tuple[Check, ...] = (
    exact,
    method,
    settings,
    version,
    whole_layer,
    scale,
    eps,
    groups,
)
