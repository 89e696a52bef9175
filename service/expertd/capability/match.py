"""Why a row cannot run a call: every reason, never only the first."""

from __future__ import annotations

from expertd.capability.checks import call, layer
from expertd.capability.checks.fault import Ask, Check, Fault
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Row
from expertd.core import CallForm, LayerSpec
from expertd_wire.errors import Refusal

CHECKS: tuple[Check, ...] = (*layer.CHECKS, *call.CHECKS)


def refusals(
    row: Row, spec: LayerSpec, form: CallForm, device: DeviceInfo, *, exact_routing: bool = False
) -> tuple[Refusal, ...]:
    """All reasons against this row; empty if it can run such calls."""
    ask = Ask(spec, form, device, exact_routing)
    return tuple(refusal(row, fault) for check in CHECKS for fault in check(row, ask))


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
