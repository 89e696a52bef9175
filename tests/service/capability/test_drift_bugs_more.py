"""Capability tables that drifted from kernels: bugs 17 to 32 of the list, one test each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.service.capability.cases import (
    BIASED,
    CUTLASS,
    LOGITS,
    TOPK,
    TRTLLM,
    ask,
    codes,
    layer,
    modes,
    monolithic,
    on,
    reasons,
)

from expertd.backends.activation import activate
from expertd.capability.library import recorded, recorded_versions
from expertd.capability.match import layer_refusals
from expertd.capability.plan import plan
from expertd.capability.row import Row
from expertd.capability.rows import BACKENDS, ROWS
from expertd.capability.spec import PARAMETERS, parse_spec
from expertd.capability.versions import at_least
from expertd.core import Activation, ActivationKind, PlanMode, QuantScheme, RoutingMethod
from expertd.errors import InvalidArgument
from expertd.routing import route
from expertd.routing.derive import derive_method

M, Q, A = RoutingMethod, QuantScheme, ActivationKind
MONO, ROUTED = PlanMode.MONOLITHIC, PlanMode.ROUTED
pytestmark = pytest.mark.usefixtures("kernels")
MONOLITHIC_ROWS = tuple(row for row in ROWS if row.mode is MONO)
FLASHINFER_ROWS = tuple(row for row in ROWS if row.library == "flashinfer")
LIMITED = {Q.BF16, Q.FP8_BLOCK128, Q.MXFP8, Q.NVFP4, Q.MXFP4}


@pytest.mark.parametrize("quant", [q for q in Q if q not in (Q.FP32, Q.FP16)])
def test_17_swiglu_limit_matrix(quant: Q) -> None:
    spec = layer(quant, limit=7.0)
    found = ask(spec)
    expected = {MONO, ROUTED} if quant in LIMITED else set()
    assert modes(found, TRTLLM) == expected
    if quant not in LIMITED:
        assert codes(found, TRTLLM, ROUTED, spec) == {"limit"}
    hopper = ask(spec, device=on("sm90"))
    assert modes(hopper, "triton") == {ROUTED}


def test_18_no_row_accepts_a_limit_without_an_argument_for_it() -> None:
    for row in FLASHINFER_ROWS:
        for kind, use in row.activations.items():
            carried = (*use.passes, *(use.limit or ()))
            assert use.limit is None or any("limit" in name for name in carried), (row.entry, kind)
    x = torch.randn(64, 128) * 20
    for kind in (A.SWIGLU, A.SWIGLU_OAI, A.SWIGLU_STEP):
        parameters = {**PARAMETERS[kind], "limit": None}
        if kind is A.SWIGLU_STEP:
            parameters["limit"] = 1e9
        clamped = activate(Activation(kind, **{**parameters, "limit": 7.0}), x)
        assert not torch.equal(clamped, activate(Activation(kind, **parameters), x))


def test_19_swiglu_step_is_mapped_by_name_and_unknown_names_are_told() -> None:
    spec = layer(Q.BF16, kind=A.SWIGLU_STEP, limit=7.0)
    assert modes(ask(spec), TRTLLM) == {MONO, ROUTED}
    old = ask(spec, device=on("sm100", "0.6.12"))
    assert {"enum_missing", "version"} <= codes(old, TRTLLM, ROUTED, spec)
    with pytest.raises(InvalidArgument, match="activation='swiglu9'.*swiglu_step"):
        parse_spec(_spec(activation="swiglu9"))


def test_20_an_intermediate_of_704_is_padded_or_refused_before_load() -> None:
    spec = layer(Q.NVFP4, intermediate=704)
    for usable in ask(spec).usable:
        if usable.backend == TRTLLM:
            assert usable.row.padded(spec)[1] == 768
    mixed = replace(spec, quant=Q.MXFP4)
    (row,) = (r for r in ROWS if r.backend == CUTLASS and r.activation_quant == "fp8")
    (reason,) = layer_refusals(row, mixed, on("sm90"))
    assert (reason.code, reason.field) == ("intermediate_multiple", "intermediate")


@pytest.mark.parametrize("kind", A)
def test_21_padding_with_zeros_changes_nothing(kind: A) -> None:
    """An expert of 928 padded to 1024: the new columns of the first matrix give exact zeros."""
    activation = Activation(kind, **PARAMETERS[kind])
    halves = 2 if activation.gated else 1
    assert not activate(activation, torch.zeros(4, 64 * halves)).any()
    for row in MONOLITHIC_ROWS:
        step = row.limits.intermediate_multiple
        assert row.padded(layer(intermediate=928))[1] == -(-928 // step) * step


def test_22_nemotrons_1856_runs_padded() -> None:
    spec = layer(Q.FP8_TENSOR, M.DEEPSEEK_V3, kind=A.RELU2, hidden=2688, intermediate=1856)
    found = ask(spec)
    assert modes(found, TRTLLM) == {MONO, ROUTED}
    assert {u.row.padded(spec) for u in found.usable if u.backend == TRTLLM} == {(2688, 1920)}


def test_23_top_k_is_the_calls_own_and_checked() -> None:
    spec = layer(Q.NVFP4)
    assert modes(ask(spec, replace(TOPK, top_k=32)), TRTLLM) == {ROUTED}
    found = ask(spec, replace(TOPK, top_k=33))
    (reason,) = (r for r in reasons(found, TRTLLM, ROUTED, spec))
    assert (reason.code, reason.given, reason.accepted) == ("top_k", "33", "<= 32")


def test_24_a_kernel_that_was_not_proven_here_serves_nothing() -> None:
    found = plan(layer(), TOPK, on("sm90"))
    assert not [usable for usable in found.usable if usable.row.needs_proof]
    assert "not_proven" in codes(found, CUTLASS, ROUTED, layer())


def test_25_every_monolithic_cell_has_a_routed_twin_to_be_compared_with() -> None:
    routed = {(r.backend, r.load, r.activation_quant, r.quants) for r in ROWS if r.mode is ROUTED}
    for row in MONOLITHIC_ROWS:
        assert (row.backend, row.load, row.activation_quant, row.quants) in routed


def test_26_what_cannot_run_is_refused_at_load() -> None:
    spec = layer(Q.FP8_BLOCK128)
    for row in (row for row in ROWS if row.backend == CUTLASS and spec.quant in row.quants):
        assert {r.code for r in layer_refusals(row, spec, on("sm100"))} == {"arch"}


def test_26_a_backend_without_code_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    row = replace(ROWS[0], load="expertd.backends.nowhere.backend:Nothing")
    here = replace(on("sm100"), simulated=False)
    assert "backend_absent" in {r.code for r in layer_refusals(row, layer(), here)}


def test_27_an_empty_batch_routes_to_an_empty_choice() -> None:
    for method in ("Renormalize", "DeepSeekV3", "SigmoidRenorm"):
        ids, weights = route(method, torch.empty(0, 16), top_k=4)
        assert ids.shape == weights.shape == (0, 4)


def test_28_auto_leaves_no_backend_out_without_a_word() -> None:
    found = ask(layer(Q.FP8_BLOCK128))
    said = {usable.backend for usable in found.usable} | {e.row.backend for e in found.rejected}
    assert said == set(BACKENDS)
    assert [b for b in BACKENDS if any(r.backend == b and r.auto for r in ROWS)] == [
        "flashinfer_trtllm",
        "flashinfer_cutlass",
        "triton",
        "grouped_mm",
        "grouped",
        "identity",
    ]


def test_29_every_rejection_says_field_given_and_accepted() -> None:
    found = ask(layer(Q.NVFP4, kind=A.GEGLU_TANH), replace(LOGITS, logits_dtype="float16"))
    assert len(found.rejected) + len(found.usable) == len(ROWS)
    for entry in found.rejected:
        assert entry.refusals
        for reason in entry.refusals:
            assert reason.code and reason.field and reason.given and reason.accepted
            assert reason.given in reason.text and reason.accepted in reason.text


def test_30_grouped_softmax_is_its_own_method_and_no_kernels() -> None:
    assert derive_method("softmax", renormalize=False, n_group=8) is M.GROUPED_SOFTMAX
    assert not any(M.GROUPED_SOFTMAX in row.routing for row in ROWS)
    with pytest.raises(InvalidArgument, match="n_group"):
        parse_spec(_spec(routing="RenormalizeNaive", n_group=8, topk_group=4))


def test_31_every_method_of_a_row_exists_wherever_the_row_does() -> None:
    for version in recorded_versions():
        members = recorded(version).members("RoutingMethodType")
        for row in MONOLITHIC_ROWS:
            for method, tiers in row.routing.items():
                live = [t for t in tiers if at_least(version, t.since)]
                assert not live or method in members, (version, row.entry, method)


def test_32a_every_monolithic_entry_is_given_both_group_counts() -> None:
    for row in MONOLITHIC_ROWS:
        assert row.call is not None
        assert {"n_group", "topk_group"} <= set(row.call.passes)


@pytest.mark.parametrize(
    ("experts", "top_k", "code"),
    [
        (2052, 4, "num_experts"),
        (130, 4, "experts_multiple"),
        (4, 4, "top_k"),
        (128, 33, "top_k"),
    ],
)
def test_32b_the_launchers_own_asserts_are_in_the_table(
    experts: int, top_k: int, code: str
) -> None:
    spec = layer(Q.FP8_BLOCK128, num_experts=experts, settings={"top_k": top_k})
    for mode, form in ((MONO, LOGITS), (ROUTED, replace(TOPK, top_k=top_k))):
        assert code in codes(ask(spec, form), TRTLLM, mode, spec)


def test_32c_groups_are_never_dropped() -> None:
    for renormalize in (True, False):
        assert derive_method("softmax", renormalize=renormalize, n_group=4) is M.GROUPED_SOFTMAX
    grouped = layer(Q.BF16, M.MINIMAX2, settings={"n_group": 4, "topk_group": 2})
    assert "method_mismatch" in codes(ask(grouped), TRTLLM, MONO, grouped)


@pytest.mark.parametrize(
    ("settings", "fields", "code"),
    [
        ({"n_group": 8, "topk_group": 5}, {}, "topk_group"),
        ({"n_group": 16, "topk_group": 4}, {}, "n_group"),
        ({"n_group": 2, "topk_group": 1, "top_k": 16}, {"num_experts": 32}, "top_k"),
        ({"n_group": 4, "topk_group": 2}, {"num_experts": 256}, "num_experts"),
        ({"n_group": 1, "top_k": 33}, {}, "top_k"),
    ],
)
def test_32d_limits_of_the_routing_kernels(
    settings: dict[str, int], fields: dict[str, int], code: str
) -> None:
    spec = layer(Q.BF16, M.DEEPSEEK_V3, settings=settings, **fields)
    found = ask(spec)
    assert code in codes(found, TRTLLM, MONO, spec)
    assert ROUTED in modes(found, TRTLLM) or settings.get("top_k", 0) > 32


def test_32d_hidden_is_checked_ahead_of_launch() -> None:
    spec = layer(Q.FP8_BLOCK128, hidden=2880)
    assert codes(ask(spec), TRTLLM, MONO, spec) == {"hidden_multiple"}
    padded = layer(Q.MXFP4, kind=A.SWIGLU_OAI, hidden=2880, intermediate=2880)
    assert modes(ask(padded), TRTLLM) == {MONO, ROUTED}
    assert not modes(ask(padded, device=on("sm100", "0.6.18")), TRTLLM)


def test_32e_mxint4_refuses_swiglu_oai() -> None:
    spec = layer(Q.MXINT4, kind=A.SWIGLU_OAI)
    assert codes(ask(spec), TRTLLM, ROUTED, spec) == {"activation"}


def test_32f_gelu_and_its_tanh_are_two_kernels() -> None:
    for row in FLASHINFER_ROWS:
        uses = row.activations
        if A.GEGLU in uses and A.GEGLU_TANH in uses:
            assert uses[A.GEGLU].member != uses[A.GEGLU_TANH].member
        assert A.SWIGLU_STEP not in uses or uses[A.SWIGLU_STEP].member == "SwigluStep"
    nvfp4 = layer(Q.NVFP4, kind=A.GEGLU_TANH)
    assert codes(ask(nvfp4), TRTLLM, ROUTED, nvfp4) == {"activation"}


def test_32g_names_never_meet_by_number() -> None:
    moved = {recorded(v).members("RoutingMethodType")["Unspecified"] for v in recorded_versions()}
    assert moved == {6, 8, 9, 10}
    assert all(M(name) for row in MONOLITHIC_ROWS for name in row.routing)


def test_32h_per_tensor_refuses_swiglu_oai() -> None:
    spec = layer(Q.FP8_TENSOR, kind=A.SWIGLU_OAI)
    assert codes(ask(spec), TRTLLM, MONO, spec) == {"activation"}


@pytest.mark.parametrize("method", [m for m in ROWS[0].routing if m not in (*BIASED, M.LLAMA4)])
def test_32i_an_ignored_scale_refuses_monolithic(method: M) -> None:
    spec = layer(Q.FP8_BLOCK128, method, settings={"routed_scaling_factor": 2.5})
    found = ask(spec)
    assert codes(found, TRTLLM, MONO, spec) == {"scale_ignored"}
    assert {u.scale_in_weights for u in found.usable} == {True}
    assert monolithic(ask(layer(Q.FP8_BLOCK128, method)))


@pytest.mark.parametrize("row", FLASHINFER_ROWS, ids=lambda r: f"{r.entry}-{r.activation_quant}")
def test_32j_no_activation_is_ignored(row: Row) -> None:
    assert row.call is not None
    for use in row.activations.values():
        told = {"activation_type"} <= {*row.call.passes, *use.passes}
        assert told or use.member == "Swiglu", f"{use.member} needs activation_type"


def _spec(**fields: object) -> dict[str, object]:
    own = {"num_experts": 64, "top_k": 4, "hidden": 512, "intermediate": 256, "quant": "bf16"}
    return {**own, "routing": "DeepSeekV3", **fields}
