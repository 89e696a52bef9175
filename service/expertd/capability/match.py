"""Why a row cannot run a call: every reason, never only the first."""

from __future__ import annotations

from expertd.capability.checks import call, layer, library, routing, sizes
from expertd.capability.checks.fault import Ask, Check, Fault
from expertd.capability.device import DeviceInfo
from expertd.capability.library import library as library_of
from expertd.capability.row import Row
from expertd.core import (
    Activation,
    ActivationKind,
    CallForm,
    LayerSpec,
    QuantScheme,
    RoutingForm,
)
from expertd_wire.errors import Refusal

NO_LAYER = LayerSpec(
    hidden=0,
    intermediate=0,
    num_experts=0,
    expert_begin=0,
    expert_end=0,
    activation=Activation(ActivationKind.SWIGLU),
    quant=QuantScheme.BF16,
    routing=None,
)
ANY_CALL = CallForm(RoutingForm.TOPK, "bfloat16")
DEVICE_CHECKS: tuple[Check, ...] = (*library.CHECKS, layer.arch)
LAYER_CHECKS: tuple[Check, ...] = (
    *DEVICE_CHECKS,
    *layer.CHECKS,
    library.activation,
    sizes.num_experts,
)
CHECKS: tuple[Check, ...] = (*LAYER_CHECKS, sizes.top_k, *call.CHECKS, *routing.CHECKS)


def refusals(
    row: Row,
    spec: LayerSpec,
    form: CallForm,
    device: DeviceInfo,
    *,
    exact_routing: bool = False,
    deterministic: bool = False,
) -> tuple[Refusal, ...]:
    """All reasons against this row; empty if it can run such calls."""
    ask = Ask(spec, form, device, library_of(device.flashinfer), exact_routing, deterministic)
    return tuple(refusal(row, fault) for check in CHECKS for fault in check(row, ask))


def device_refusals(row: Row, device: DeviceInfo) -> tuple[Refusal, ...]:
    """The reasons that hold whatever the layer: what the device and its libraries lack."""
    ask = Ask(NO_LAYER, ANY_CALL, device, library_of(device.flashinfer))
    return tuple(refusal(row, fault) for check in DEVICE_CHECKS for fault in check(row, ask))


def layer_refusals(row: Row, spec: LayerSpec, device: DeviceInfo) -> tuple[Refusal, ...]:
    """The reasons that hold whatever the call: a backend is built for a layer only without any."""
    ask = Ask(spec, ANY_CALL, device, library_of(device.flashinfer))
    return tuple(refusal(row, fault) for check in LAYER_CHECKS for fault in check(row, ask))


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
