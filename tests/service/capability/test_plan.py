"""The planner over the torch backends: who may run what, and every reason of those that may not."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import pytest
from tests.service.capability.cases import TOPK, TRTLLM, ask, layer, on
from tests.service.capability.cases import codes as reason_codes

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
    PlanMode,
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


@pytest.mark.usefixtures("kernels")
def test_auto_takes_no_fewer_bits_than_the_checkpoint_declares() -> None:
    spec = layer(QuantScheme.MXFP4)
    assert {usable.activation for usable in ask(spec).usable} == {"bf16"}
    pinned = ask(spec, replace(LOGITS, backend=TRTLLM)).usable
    assert [usable.activation for usable in pinned] == ["bf16", "bf16", "mxfp8", "mxfp8"]
    declared = replace(spec, activation_quant="mxfp8")
    assert [usable.activation for usable in ask(declared).usable][:2] == ["mxfp8", "mxfp8"]
    weights_only = replace(layer(QuantScheme.NVFP4), activation_quant="bf16")
    assert {usable.activation for usable in ask(weights_only).usable} == {"bf16"}


@pytest.mark.usefixtures("kernels")
def test_input_side_weights_are_applied_once_wherever_they_can_be() -> None:
    per_tensor = layer(QuantScheme.FP8_TENSOR, RoutingMethod.LLAMA4)
    sites = {(p.backend, p.mode): p.weights_on for p in ask(per_tensor).usable}
    assert sites[TRTLLM, PlanMode.MONOLITHIC] == "input"
    assert sites[TRTLLM, PlanMode.ROUTED] == "rows", "a routed kernel weighs its outputs"
    assert sites["triton", PlanMode.ROUTED] == "input"
    bf16 = layer(QuantScheme.BF16, RoutingMethod.LLAMA4)
    assert codes_of(bf16, TRTLLM) == {"weight_site"}
    two = replace(TOPK, top_k=2)
    routed = {p.backend for p in ask(per_tensor, two).usable}
    assert TRTLLM not in routed and "triton" in routed


@pytest.mark.usefixtures("kernels")
def test_llama4_with_a_range_of_experts_runs_routed_only() -> None:
    spec = layer(QuantScheme.FP8_TENSOR, RoutingMethod.LLAMA4, expert_begin=64)
    assert codes_of(spec, TRTLLM) == {"routing_range"}
    assert (TRTLLM, PlanMode.ROUTED) in {(p.backend, p.mode) for p in ask(spec).usable}


@pytest.mark.usefixtures("kernels")
def test_exact_routing_forces_routed_plans() -> None:
    found = ask(layer(), exact_routing=True)
    assert found.usable and {usable.mode for usable in found.usable} == {PlanMode.ROUTED}


@pytest.mark.parametrize(("version", "repeats"), [("0.6.13", False), ("0.7.2", True)])
def test_who_wants_the_same_bits_gets_no_kernel_that_may_give_others(
    version: str, repeats: bool
) -> None:
    """Only a fused finalize adds in no fixed order; later versions can be told to do without."""
    device, pinned = simulated("sm90", version), replace(LOGITS, backend="flashinfer_cutlass")

    def refused(**wish: bool) -> set[str]:
        found = plan(layer(QuantScheme.BF16), pinned, device, trust_declared=True, **wish)
        return {reason.code for reason in found.refusals if reason.code == "not_deterministic"}

    assert refused(deterministic=True) == (set() if repeats else {"not_deterministic"})
    assert not refused()
    usable = plan(layer(QuantScheme.BF16), pinned, device, trust_declared=True, deterministic=True)
    assert bool(usable.usable) == repeats


def test_a_row_that_repeats_by_an_argument_prefers_it() -> None:
    """Else it would be refused for what the backend never passes."""
    named = [row for row in ROWS if row.repeats_with]
    assert named and all(row.call and row.repeats_with in row.call.prefers for row in named)


def test_nothing_chooses_more_experts_than_there_are() -> None:
    """As a config.json may say that disagrees with itself."""
    greedy = replace(SPEC, routing=replace(ROUTING, top_k=33))
    found = plan(greedy, LOGITS, CPU)
    assert not found.usable
    (why,) = (reason.text for reason in found.refusals if reason.backend == "grouped")
    assert why.endswith("top_k is 33, accepted: <= 32")
    assert plan(replace(SPEC, routing=replace(ROUTING, top_k=32)), LOGITS, CPU).usable


@pytest.mark.usefixtures("kernels")
def test_a_large_epsilon_of_a_family_is_routed() -> None:
    lfm2 = layer(method=RoutingMethod.MINIMAX2, settings={"eps": 1e-6})
    assert codes_of(lfm2, TRTLLM) == {"eps"}
    minimax = layer(method=RoutingMethod.MINIMAX2, settings={"eps": 0.0})
    assert codes_of(minimax, TRTLLM) == set()


@pytest.mark.usefixtures("kernels")
def test_ranges_of_experts_for_cutlass_are_equal_parts() -> None:
    for begin, end, fits in ((64, 128, True), (0, 32, True), (32, 96, False), (0, 100, False)):
        spec = layer(QuantScheme.BF16, expert_begin=begin, expert_end=end)
        backends = {p.backend for p in ask(spec, device=on("sm90")).usable}
        assert ("flashinfer_cutlass" in backends) == fits
        assert "triton" in backends


def test_every_cell_is_named_once_and_every_load_is_a_class() -> None:
    cells = [row.cell(quant) for row in ROWS for quant in row.quants]
    assert len(set(cells)) == len(cells)
    for row in ROWS:
        assert re.fullmatch(rf"expertd\.backends\.{row.backend}\.backend:[A-Z]\w+", row.load)


def codes_of(spec: LayerSpec, backend: str) -> set[str]:
    """The codes against the monolithic rows of a backend that read the layer's format."""
    return reason_codes(ask(spec), backend, PlanMode.MONOLITHIC, spec)
