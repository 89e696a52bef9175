"""Which of a layer's backends runs a batch of some form and size."""

from __future__ import annotations

from collections.abc import Sequence

from expertd.backends.base import Backend
from expertd.capability.plan import Plan, PlanSet, plan
from expertd.capability.row import Cell
from expertd.core import CallForm, RoutingForm
from expertd.core.buckets import bucket_index
from expertd.engine.resident import LayerState, Resident
from expertd.errors import NoUsablePlan


def choose_backend(resident: Resident, form: CallForm, tokens: int = 1) -> Backend:
    """The backend of the fastest usable plan for so many tokens, as far as it was measured.

    Raises NoUsablePlan with every reason, InvalidArgument.
    """
    cells = resident.choices.get(form) or _choices(resident, form)
    backend = resident.backends.get(_at(cells, tokens)) if cells else None
    if backend is None:
        raise _refused(resident, form)
    return backend


def _at(cells: Sequence[Cell], tokens: int) -> Cell:
    return cells[min(bucket_index(tokens), len(cells) - 1)]


def _refused(resident: Resident, form: CallForm) -> NoUsablePlan:
    plans = plans_of(resident, form)
    absent = (resident.absent.get(_cell(resident, usable), ()) for usable in plans.usable)
    return NoUsablePlan(
        f"no backend can run this call on layer {resident.name}; see the reasons",
        (*plans.refusals, *(reason for reasons in absent for reason in reasons)),
    )


def _choices(resident: Resident, form: CallForm) -> tuple[Cell, ...]:
    """The plan of each bucket, computed once for each form of call; empty if there is none."""
    choices = resident.choices
    usable = (_cell(resident, entry) for entry in plans_of(resident, form).usable)
    cells = [cell for cell in usable if cell in resident.backends]
    if not form.backend:
        kept = [cell for cell in cells if not resident.backends[cell].spilled]
        cells = kept or cells
    if not cells:
        return ()
    found = resident.timings.choices(cells, form.routing is RoutingForm.LOGITS)
    if len(choices) < 1024:
        choices[form] = found
    return found


def likely_form(resident: Resident) -> CallForm:
    """The commonest call of a layer: bfloat16 rows with float32 logits, or top-k."""
    if resident.spec.routing is None:
        return CallForm(RoutingForm.TOPK, "bfloat16", weights_dtype="float32", top_k=1)
    return CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32")


def likely_backends(resident: Resident, buckets: Sequence[int]) -> set[Backend]:
    """What runs the commonest calls at these buckets; empty if nothing does."""
    form = likely_form(resident)
    cells = resident.choices.get(form) or _choices(resident, form)
    return {resident.backends[_at(cells, tokens)] for tokens in buckets if cells}


def likely_plans(resident: Resident) -> tuple[Plan, ...]:
    """The plans of the commonest call."""
    if resident.state is LayerState.FAILED:
        return ()
    usable = plans_of(resident, likely_form(resident)).usable
    return tuple(entry for entry in usable if _cell(resident, entry) not in resident.absent)


def _cell(resident: Resident, usable: Plan) -> Cell:
    return usable.row.cell(resident.spec.quant)


def plans_of(resident: Resident, form: CallForm) -> PlanSet:
    """The planner's answer, computed once for each form of call."""
    plans = resident.plans
    found = plans.get(form)
    if found is None:
        found = plan(
            resident.spec,
            form,
            resident.device,
            states=resident.states,
            trust_declared=resident.trust.declared,
            exact_routing=resident.trust.exact_routing,
            deterministic=resident.trust.deterministic,
        )
        if len(plans) < 1024:
            plans[form] = found
    return found
