"""Which plans a layer has on a device, why every other row has none, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from expertd.capability.device import DeviceInfo, device_named
from expertd.capability.plan import Plan, PlanSet, Rejected, States, plan
from expertd.capability.row import Row, State
from expertd.capability.spec import parse_spec
from expertd.core import CallForm, LayerSpec
from expertd.errors import InvalidArgument
from expertd_wire.errors import Refusal

Absent = Callable[[Row], tuple[Refusal, ...]]

REQUEST = ("spec", "device", "flashinfer", "backend")


def explain(
    spec: LayerSpec,
    form: CallForm,
    device: DeviceInfo,
    *,
    states: States | None = None,
    shape: States | None = None,
    absent: Absent | None = None,
) -> dict[str, Any]:
    """The answer of `expertd explain` and of POST /v1/explain, as JSON.

    A cell without a proof counts as a plan and shows its state; a failed one does not. shape is
    what is proven of this very shape of layer; a plan's proof tells which of the two it has.
    absent tells what a row's kernels lack on a machine that is here.
    """
    known = {**(states or {}), **(shape or {})}
    found = plan(spec, form, device, states=known, trust_declared=True)
    found = found if absent is None else _without(found, absent)
    return {
        "routing_method": spec.routing.method if spec.routing else None,
        **({"routing_refusal": spec.routing_refusal} if spec.routing_refusal else {}),
        "plans": [_plan(usable, spec, shape or {}) for usable in found.usable],
        "rejected": [_rejected(entry) for entry in found.rejected],
        "advice": advice(found),
    }


def explain_request(body: Any, states: States | None = None) -> dict[str, Any]:
    """The same for the body of POST /v1/explain; raises InvalidArgument naming the field."""
    if not isinstance(body, Mapping) or "spec" not in body or not set(body) <= set(REQUEST):
        raise InvalidArgument(f"a JSON object with spec is wanted; fields: {', '.join(REQUEST)}")
    texts = {name: body.get(name) or "" for name in REQUEST[1:]}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InvalidArgument(f"{name}={text!r:.60}; accepted: a string")
    described = parse_spec(body["spec"])
    device = device_named(texts["device"] or "auto", texts["flashinfer"] or None)
    return explain(described.spec, described.form(texts["backend"]), device, states=states)


def advice(found: PlanSet) -> str:
    """One line for a person: the row that lacks least, and what it wants; empty with a plan."""
    if found.usable or not found.rejected:
        return ""
    nearest = min(found.rejected, key=_distance)
    wants = "; ".join(f"{r.field}: {r.accepted} (is {r.given})" for r in nearest.refusals)
    return f"{nearest.row.backend} ({nearest.row.entry}, {nearest.row.mode}) would run with {wants}"


def _without(found: PlanSet, absent: Absent) -> PlanSet:
    """The plans whose kernels are there; the others are rejected for what they lack."""
    judged = [(usable, absent(usable.row)) for usable in found.usable]
    lacking = tuple(Rejected(usable.row, reasons) for usable, reasons in judged if reasons)
    there = tuple(usable for usable, reasons in judged if not reasons)
    return PlanSet(there, (*found.rejected, *lacking))


def _distance(entry: Rejected) -> tuple[bool, int]:
    """Rows that no caller can make usable are farthest; then fewer reasons are nearer."""
    hopeless = any(reason.code in ("backend_absent", "layer_kind") for reason in entry.refusals)
    return hopeless, len(entry.refusals)


def _plan(usable: Plan, spec: LayerSpec, shape: States) -> dict[str, str]:
    proof = "shape" if usable.row.cell(spec.quant) in shape else "cell"
    return {
        "backend": usable.backend,
        "mode": usable.mode,
        "entry": usable.entry,
        "activation": usable.activation,
        "state": usable.state,
        **({"proof": proof} if usable.state is State.PROVEN else {}),
    }


def _rejected(entry: Rejected) -> dict[str, Any]:
    names = ("code", "field", "given", "accepted", "text")
    return {
        "backend": entry.row.backend,
        "mode": entry.row.mode,
        "entry": entry.row.entry,
        "activation": entry.row.activation_quant,
        "reasons": [{name: getattr(reason, name) for name in names} for reason in entry.refusals],
    }
