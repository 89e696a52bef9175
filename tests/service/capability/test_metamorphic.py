"""Changing only the field that a reason names, to an accepted value, removes just that reason."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from tests.service.capability.cases import NEWEST, on, routing

from expertd.capability.device import ARCHS, DeviceInfo
from expertd.capability.library import recorded_versions
from expertd.capability.match import refusals
from expertd.capability.row import Row
from expertd.capability.rows import ROWS
from expertd.core import (
    Activation,
    ActivationKind,
    CallForm,
    LayerSpec,
    QuantScheme,
    RoutingForm,
    RoutingMethod,
)
from expertd_wire.errors import Refusal

pytestmark = pytest.mark.usefixtures("kernels")
Case = tuple[Row, LayerSpec, CallForm, DeviceInfo]

# One field is not enough for these: with another method, version or routing form, the kernel is
# asked other questions.
HANGING = {
    "library_absent",
    "routing_method",
    "method_mismatch",
    "version",
    "no_routing",
    "routing_form",
    "weight_site",
}
SIZES = st.sampled_from([32, 64, 100, 256, 704, 1856, 2048, 2880])
NUMBER = re.compile(r"[0-9.]+")


@st.composite
def layers(draw: st.DrawFn, row: Row) -> LayerSpec:
    """A layer that the row may or may not run, of a weight format that it often reads."""
    experts = draw(st.sampled_from([4, 30, 128, 160, 256, 600, 2048, 2052]))
    method = draw(st.sampled_from([RoutingMethod.DEEPSEEK_V3, *RoutingMethod]))
    grouped = method is RoutingMethod.DEEPSEEK_V3 and experts % 16 == 0 and draw(st.booleans())
    top_k = 1 if method is RoutingMethod.LLAMA4 else draw(st.integers(1, min(experts, 40)))
    own: dict[str, Any] = {"top_k": top_k, "eps": draw(st.sampled_from([None, 0.0, 1e-6]))}
    own["routed_scaling_factor"] = draw(st.sampled_from([1.0, 2.5]))
    if grouped:
        groups = draw(st.sampled_from([2, 4, 8, 16]))
        own |= {"n_group": groups, "topk_group": draw(st.integers(1, groups))}
    held = draw(st.sampled_from([experts, experts // 2, max(1, experts // 3)]))
    begin = draw(st.integers(0, experts - held))
    kind = draw(st.sampled_from(list(ActivationKind)))
    return LayerSpec(
        hidden=draw(SIZES),
        intermediate=draw(SIZES),
        num_experts=experts,
        expert_begin=begin,
        expert_end=begin + held,
        activation=Activation(kind, limit=draw(st.sampled_from([None, 7.0]))),
        quant=draw(st.sampled_from([*row.quants, *row.quants, *QuantScheme])),
        routing=routing(method, **own),
        expert_bias=draw(st.booleans()),
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    row = draw(st.sampled_from(ROWS))
    spec = draw(layers(row))
    pin = draw(st.booleans())
    form = CallForm(
        draw(st.sampled_from([RoutingForm.LOGITS, *RoutingForm])),
        draw(st.sampled_from(["bfloat16", "uint8"])),
        draw(st.sampled_from(["", "", "fp8_group128", "mxfp8"])),
        logits_dtype=draw(st.sampled_from(["float32", "float16"])),
        backend=row.backend if pin else "",
    )
    if form.routing is RoutingForm.TOPK:
        form = replace(form, top_k=draw(st.integers(1, 40)))
    arch = draw(st.sampled_from([*row.archs, *ARCHS]))
    version = draw(st.sampled_from([NEWEST, recorded_versions()[0], *recorded_versions()]))
    device = on(arch, version)
    return row, spec, form, device


def asked(case: Case) -> dict[tuple[str, str], Refusal]:
    row, spec, form, device = case
    return {(r.code, r.field): r for r in refusals(row, spec, form, device)}


def accepted_number(text: str, given: int) -> int:
    """The nearest whole number that "<= 8" or "a multiple of 128" accepts."""
    bound = int(NUMBER.findall(text)[0])
    return max(1, given // bound) * bound if "multiple" in text else bound


def of_experts(spec: LayerSpec, count: int) -> LayerSpec:
    return replace(spec, num_experts=count, expert_begin=0, expert_end=count)


def first(text: str) -> str:
    return text.split(", ")[0]


def changed(case: Case, reason: Refusal) -> Case | None:
    """The case with the reason's field set to a value it accepts; None where that means more."""
    row, spec, form, device = case
    router = spec.routing
    assert router is not None
    field, accepted = reason.field, reason.accepted
    if field == "num_experts":
        count = accepted_number(accepted, spec.num_experts)
        return row, of_experts(spec, count), form, device
    if field == "experts":
        return row, of_experts(spec, spec.num_experts), form, device
    if field == "top_k":
        fewer = accepted_number(accepted, 0)
        if not fewer:
            return None
        narrow = replace(spec, routing=replace(router, top_k=fewer))
        return row, narrow, replace(form, top_k=form.top_k and fewer), device
    plain = {
        "quant": lambda: replace(spec, quant=QuantScheme(first(accepted))),
        "activation": lambda: replace(
            spec, activation=replace(spec.activation, kind=ActivationKind(first(accepted)))
        ),
        "limit": lambda: replace(spec, activation=replace(spec.activation, limit=None)),
        "expert_bias": lambda: replace(spec, expert_bias=False),
        "hidden": lambda: replace(spec, hidden=accepted_number(accepted, spec.hidden)),
        "intermediate": lambda: replace(
            spec, intermediate=accepted_number(accepted, spec.intermediate)
        ),
        "routed_scaling_factor": lambda: replace(
            spec, routing=replace(router, routed_scaling_factor=1.0)
        ),
        "eps": lambda: replace(spec, routing=replace(router, eps=None)),
        "topk_group": lambda: replace(
            spec, routing=replace(router, topk_group=accepted_number(accepted, 1))
        ),
        "n_group": lambda: replace(
            spec, routing=replace(router, n_group=accepted_number(accepted, 1))
        ),
    }
    calls = {
        "hidden_states": lambda: replace(form, rows_dtype=first(accepted)),
        "hidden_states_format": lambda: replace(form, rows_format=""),
        "logits_dtype": lambda: replace(form, logits_dtype=first(accepted)),
        "backend": lambda: replace(form, backend=accepted),
    }
    if field in plain:
        return row, plain[field](), form, device
    if field in calls:
        return row, spec, calls[field](), device
    if field == "device":
        return row, spec, form, replace(device, arch=first(accepted))
    return None


# A changed value may meet a bound of its own: the format of a row whose dtype was hidden by it.
REVEALS: dict[str, set[str]] = {
    "num_experts": {"top_k", "experts_multiple", "expert_range"},
    "n_group": {"num_experts", "top_k", "method_mismatch"},
    "quant": {"activation_format"},
    "activation": {"limit", "version", "enum_missing", "argument_missing"},
    "limit": set(),
    "hidden_states_format": {"rows_dtype"},
}
REMOVES: dict[str, set[str]] = {
    "num_experts": {"top_k", "experts_multiple", "expert_range", "routing_range", "layer_kind"},
    "n_group": {"num_experts", "top_k"},
    "topk_group": {"top_k"},
    "limit": {"argument_missing"},
    "activation": {"version", "enum_missing", "argument_missing", "limit"},
    "hidden_states_format": {"weight_site"},
    "backend": {"not_automatic", "activation_format"},
    "quant": {"activation_format"},
}


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_an_accepted_value_removes_exactly_its_reason(case: Case) -> None:
    before = asked(case)
    for key, reason in before.items():
        if reason.code in HANGING or (after_case := changed(case, reason)) is None:
            continue
        event(f"{reason.code} by {reason.field}")
        after = asked(after_case)
        assert key not in after, reason
        gone = {code for code, _ in before.keys() - after.keys()} - {reason.code}
        new = {code for code, _ in after.keys() - before.keys()}
        assert gone <= REMOVES.get(reason.field, set()), (reason, gone)
        assert new <= REVEALS.get(reason.field, set()), (reason, new)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases())
def test_no_two_reasons_are_the_same(case: Case) -> None:
    row, spec, form, device = case
    found = refusals(row, spec, form, device)
    assert len(set(found)) == len(found)
    for reason in found:
        assert (reason.backend, reason.entry, reason.mode) == (row.backend, row.entry, row.mode)
