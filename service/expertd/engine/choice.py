"""Which of a layer's backends runs a call of some form."""

from __future__ import annotations

from expertd.backends.base import Backend
from expertd.capability.plan import Plan, PlanSet, plan
from expertd.core import CallForm, RoutingForm
from expertd.engine.resident import LayerState, Resident
from expertd.errors import NoUsablePlan


def choose_backend(resident: Resident, form: CallForm) -> Backend:
    """The first usable plan's backend; raises NoUsablePlan with every reason, InvalidArgument."""
    plans = plans_of(resident, form)
    for usable in plans.usable:
        backend = resident.backends.get(usable.row.cell(resident.spec.quant))
        if backend is not None:
            return backend
    raise NoUsablePlan(
        f"no backend can run this call on layer {resident.name}; see the reasons", plans.refusals
    )


def likely_plans(resident: Resident) -> tuple[Plan, ...]:
    """The plans of the commonest call of a layer: bfloat16 rows with float32 logits, or top-k."""
    if resident.state is LayerState.FAILED:
        return ()
    if resident.spec.routing is None:
        form = CallForm(RoutingForm.TOPK, "bfloat16", weights_dtype="float32", top_k=1)
    else:
        form = CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32")
    return plans_of(resident, form).usable


def plans_of(resident: Resident, form: CallForm) -> PlanSet:
    """The planner's answer, computed once for each form of call."""
    found = resident.plans.get(form)
    if found is None:
        found = plan(
            resident.spec,
            form,
            resident.device,
            states=resident.states,
            trust_declared=resident.trust.declared,
            exact_routing=resident.trust.exact_routing,
        )
        if len(resident.plans) < 1024:
            resident.plans[form] = found
    return found
