"""The planner over the torch backends: who may run what, and every reason of those that may not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from expertd.capability.device import DeviceInfo, detect, simulated
from expertd.capability.match import layer_refusals
from expertd.capability.plan import plan
from expertd.capability.row import State
from expertd.capability.rows import ROWS
from expertd.core import (
    Activation,
    ActivationKind,
    CallForm,
    LayerSpec,
    QuantScheme,
    RoutingForm,
    RoutingMethod,
    RoutingSpec,
)
from expertd.errors import InvalidArgument

CPU = detect("cpu")
ROUTING = RoutingSpec(RoutingMethod.RENORMALIZE_NAIVE, "softmax", 4)
SPEC = LayerSpec(
    256, 128, 32, 0, 32, Activation(ActivationKind.SWIGLU), QuantScheme.FP8_BLOCK128, ROUTING
)
IDENTITY = LayerSpec(
    256, 0, 0, 0, 0, Activation(ActivationKind.SWIGLU), QuantScheme.BF16, routing=None
)
LOGITS = CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32")


def names(plans: object) -> list[str]:
    return [p.backend for p in plans]  # type: ignore[attr-defined]


def codes(spec: LayerSpec, form: CallForm, device: DeviceInfo = CPU) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for entry in plan(spec, form, device).rejected:
        found.setdefault(entry.row.backend, set()).update(r.code for r in entry.refusals)
    return found


@pytest.mark.parametrize("quant", QuantScheme)
@pytest.mark.parametrize("kind", ActivationKind)
def test_grouped_runs_every_format_and_activation_on_cpu(
    quant: QuantScheme, kind: ActivationKind
) -> None:
    spec = LayerSpec(256, 128, 32, 0, 32, Activation(kind), quant, ROUTING)
    assert names(plan(spec, LOGITS, CPU).usable) == ["grouped"]


def test_reference_runs_only_when_named() -> None:
    assert "not_automatic" in codes(SPEC, LOGITS)["reference"]
    pinned = CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype="float32", backend="reference")
    assert names(plan(SPEC, pinned, CPU).usable) == ["reference"]


def test_unknown_pin_lists_the_backends() -> None:
    form = CallForm(RoutingForm.TOPK, "bfloat16", top_k=4, backend="cutlas")
    with pytest.raises(InvalidArgument, match="grouped.*reference"):
        plan(SPEC, form, CPU)


@pytest.mark.parametrize("routing", RoutingForm)
def test_identity_layer_takes_any_routing_form_and_no_other_backend(routing: RoutingForm) -> None:
    form = CallForm(routing, "bfloat16")
    assert names(plan(IDENTITY, form, CPU).usable) == ["identity"]
    assert "layer_kind" in codes(IDENTITY, form)["grouped"]
    assert "layer_kind" in codes(SPEC, form)["identity"]


def test_logits_on_a_layer_without_routing_say_which_form_works() -> None:
    why = "the first layers route by token id"
    spec = LayerSpec(
        256, 128, 32, 0, 32, SPEC.activation, SPEC.quant, routing=None, routing_refusal=why
    )
    (reason,) = (r for r in plan(spec, LOGITS, CPU).refusals if r.backend == "grouped")
    assert (reason.code, reason.accepted) == ("no_routing", "topk")
    assert why in reason.text


def test_all_reasons_are_given_at_once() -> None:
    form = CallForm(RoutingForm.NONE, "uint8")
    assert codes(IDENTITY, form)["reference"] == {"layer_kind", "rows_dtype", "routing_form",
                                                  "not_automatic"}  # fmt: skip


def test_scale_goes_into_the_weights_only_when_expertd_routes() -> None:
    assert plan(SPEC, LOGITS, CPU).usable[0].scale_in_weights
    topk = CallForm(RoutingForm.TOPK, "bfloat16", weights_dtype="float32", top_k=4)
    assert not plan(SPEC, topk, CPU).usable[0].scale_in_weights


def test_a_failed_cell_is_refused_even_when_declared_is_trusted() -> None:
    states = {row.cell(SPEC.quant): State.FAILED for row in ROWS if row.backend == "grouped"}
    found = plan(SPEC, LOGITS, CPU, states=states, trust_declared=True)
    assert not found.usable
    assert "proof_failed" in {r.code for r in found.refusals}


def test_devices() -> None:
    assert CPU.arch == "cpu" and CPU.index is None and not CPU.simulated
    assert simulated("sm90").kind == "cuda"
    for bad in ("gpu", "cuda:x", "cuda:99"):
        with pytest.raises(InvalidArgument, match="device"):
            detect(bad)
    with pytest.raises(InvalidArgument, match="sm103"):
        simulated("sm42")


def test_planning_on_cpu_imports_no_torch() -> None:
    code = (
        "import sys; from expertd.capability.device import detect; import expertd.capability.plan;"
        "detect('cpu'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_layer_refusals_ask_nothing_of_a_call() -> None:
    accepting = [row.backend for row in ROWS if not layer_refusals(row, SPEC, CPU)]
    assert accepting == ["grouped", "reference"]
