"""Layers, calls and questions that the tests of this folder share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from expertd.capability.device import DeviceInfo, simulated
from expertd.capability.plan import Plan, PlanSet, plan
from expertd.core import (
    Activation,
    ActivationKind,
    CallForm,
    LayerSpec,
    PlanMode,
    QuantScheme,
    RoutingForm,
    RoutingMethod,
    RoutingSpec,
)
from expertd.routing.methods import TRAITS
from expertd_wire.errors import Refusal

NEWEST = "0.7.2.post1"
TRTLLM = "flashinfer_trtllm"
CUTLASS = "flashinfer_cutlass"
BIASED = (RoutingMethod.DEEPSEEK_V3, RoutingMethod.MINIMAX2)


def routing(method: RoutingMethod, **settings: Any) -> RoutingSpec:
    """A router of that method with nothing special about it."""
    own: dict[str, Any] = {"top_k": 1 if method is RoutingMethod.LLAMA4 else 4}
    if method is RoutingMethod.LLAMA4:
        own["weight_site"] = "input"
    traits = TRAITS[method]
    own |= {"bias": traits.biased, "renormalize": traits.renormalize != "never"}
    return RoutingSpec(method, traits.scoring, **{**own, **settings})


def layer(
    quant: QuantScheme = QuantScheme.BF16,
    method: RoutingMethod = RoutingMethod.RENORMALIZE,
    *,
    kind: ActivationKind = ActivationKind.SWIGLU,
    limit: float | None = None,
    settings: dict[str, Any] | None = None,
    **fields: Any,
) -> LayerSpec:
    """A layer that every kernel likes unless told otherwise."""
    own = LayerSpec(
        hidden=1024,
        intermediate=512,
        num_experts=128,
        expert_begin=0,
        expert_end=fields.get("num_experts", 128),
        activation=Activation(kind, limit=limit),
        quant=quant,
        routing=routing(method, **(settings or {})),
    )
    return replace(own, **fields)


LOGITS = CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32")
TOPK = CallForm(RoutingForm.TOPK, "bfloat16", weights_dtype="float32", top_k=4)


def on(arch: str, flashinfer: str = NEWEST) -> DeviceInfo:
    return simulated(arch, flashinfer)


def ask(
    spec: LayerSpec, form: CallForm = LOGITS, device: DeviceInfo | None = None, **options: Any
) -> PlanSet:
    return plan(spec, form, device or on("sm100"), **{"trust_declared": True, **options})


def modes(found: PlanSet, backend: str) -> set[PlanMode]:
    return {usable.mode for usable in found.usable if usable.backend == backend}


def monolithic(found: PlanSet) -> tuple[Plan, ...]:
    return tuple(usable for usable in found.usable if usable.mode is PlanMode.MONOLITHIC)


def reasons(
    found: PlanSet, backend: str, mode: PlanMode, spec: LayerSpec | None = None
) -> list[Refusal]:
    """The refusals of a backend's rows in that mode that read the layer's weight format."""
    return [
        reason
        for entry in found.rejected
        if entry.row.backend == backend and entry.row.mode is mode
        for reason in entry.refusals
        if spec is None or spec.quant in entry.row.quants
    ]


def codes(found: PlanSet, backend: str, mode: PlanMode, spec: LayerSpec) -> set[str]:
    return {reason.code for reason in reasons(found, backend, mode, spec)}
