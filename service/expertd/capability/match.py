"""Why a row cannot run a call: every reason, never only the first."""

from __future__ import annotations

from expertd.capability.checks import call, layer
from expertd.capability.checks.fault import Ask, Check, Fault
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Row
from expertd.core import CallForm, LayerSpec, RoutingForm
from expertd_wire.errors import Refusal

CHECKS: tuple[Check, ...] = (*layer.CHECKS, *call.CHECKS)
NO_CALL = CallForm(RoutingForm.NONE, "")


def layer_refusals(row: Row, spec: LayerSpec, device: DeviceInfo) -> tuple[Refusal, ...]:
    """All reasons that no call can change: the device's and the layer's."""
    ask = Ask(spec, NO_CALL, device)
    return tuple(refusal(row, fault) for check in layer.CHECKS for fault in check(row, ask))


def refusals(
    row: Row, spec: LayerSpec, form: CallForm, device: DeviceInfo, *, exact_routing: bool = False
) -> tuple[Refusal, ...]:
    """All reasons against this row; empty if it can run such calls."""
    ask = Ask(spec, form, device, exact_routing)
    return tuple(refusal(row, fault) for check in CHECKS for fault in check(row, ask))


def layer_refusals(row: Row, spec: LayerSpec, device: DeviceInfo) -> tuple[Refusal, ...]:
    """The reasons that hold whatever the call: a backend is built for a layer only without any."""
    ask = Ask(spec, CallForm(RoutingForm.TOPK, row.rows[0]), device, exact_routing=False)
    return tuple(refusal(row, fault) for check in layer.CHECKS for fault in check(row, ask))


def refusal(row: Row, fault: Fault) -> Refusal:
    """A fault of this row as the value that travels to the caller."""
    text = f"{fault.why}: {fault.field} is {fault.given}, accepted: {fault.accepted}"
    return Refusal(
        backend=row.backend,
        mode=row.mode,
        entry=row.entry,
        code=fault.code,
        text=text,
        field=fault.field,
        given=fault.given,
        accepted=fault.accepted,
    )
