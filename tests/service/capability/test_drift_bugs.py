"""Capability tables that drifted from kernels: bugs 1 to 16 of the list, one test each."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.service.capability.cases import (
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
)

from expertd.capability import library as libraries
from expertd.capability.device import DeviceInfo
from expertd.capability.library import recorded, recorded_versions
from expertd.capability.match import CHECKS, LAYER_CHECKS, layer_refusals
from expertd.capability.rows import BACKENDS, ROWS
from expertd.capability.sources import MINIMAX2_SCALE
from expertd.core import ActivationKind, CallForm, PlanMode, QuantScheme, RoutingForm, RoutingMethod
from expertd.routing import route

M, Q = RoutingMethod, QuantScheme
MONO, ROUTED = PlanMode.MONOLITHIC, PlanMode.ROUTED
pytestmark = pytest.mark.usefixtures("kernels")
TRTLLM_QUANTS = (
    Q.BF16,
    Q.FP8_TENSOR,
    Q.FP8_CHANNEL,
    Q.FP8_BLOCK128,
    Q.MXFP8,
    Q.NVFP4,
    Q.MXFP4,
    Q.MXINT4,
)


def test_01_a_renamed_enum_member_disables_the_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    known = recorded("0.7.2")
    members = {**known.enums["RoutingMethodType"]}
    members["RenormalizeOther"] = members.pop("Renormalize")
    renamed = replace(known, enums={**known.enums, "RoutingMethodType": members})
    monkeypatch.setattr("expertd.capability.match.library_of", lambda version: renamed)
    found = ask(layer())
    assert "enum_missing" in codes(found, TRTLLM, MONO, layer())
    assert modes(found, TRTLLM) == {ROUTED}


def test_02_nine_is_topk_sigmoid_and_unspecified_reaches_no_kernel() -> None:
    for version in ("0.6.18", "0.7.0", "0.7.2"):
        members = recorded(version).members("RoutingMethodType")
        assert (members["TopKSigmoid"], members["Unspecified"]) == (9, 10)
    assert recorded("0.6.13").members("RoutingMethodType")["Unspecified"] == 9
    assert not any(M.UNSPECIFIED in row.routing for row in ROWS)


def test_03_per_tensor_fp8_with_renormalize_only_where_it_is_right() -> None:
    spec = layer(Q.FP8_TENSOR, M.RENORMALIZE)
    assert monolithic(ask(spec))
    assert "version" in codes(ask(spec, device=on("sm100", "0.6.7")), TRTLLM, MONO, spec)
    logits = torch.randn(64, 128)
    ids, weights = route("Renormalize", logits, top_k=4)
    chosen = logits.gather(1, ids.long())
    assert torch.allclose(weights, torch.softmax(chosen, 1), atol=1e-6)


@pytest.mark.parametrize("quant", TRTLLM_QUANTS)
@pytest.mark.parametrize("method", [m for m in M if m in ROWS[0].routing])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_04_logits_dtype_matrix(quant: Q, method: M, dtype: str) -> None:
    spec = layer(quant, method)
    form = replace(LOGITS, logits_dtype=dtype)
    found = ask(spec, form)
    expected = {"logits_dtype"} if dtype == "float16" else set()
    assert codes(found, TRTLLM, MONO, spec) & {"logits_dtype"} == expected
    assert ROUTED in modes(found, TRTLLM)
    assert not monolithic(ask(spec, form, on("sm100", "0.6.7")))


def test_05_routing_is_never_silently_bf16() -> None:
    logits = torch.zeros(1, 8)
    logits[0, 3], logits[0, 1] = 1.0001, 1.0
    assert logits.bfloat16()[0, 3] == logits.bfloat16()[0, 1], "the two must tie in bf16"
    assert route("Renormalize", logits, top_k=1)[0].item() == 3
    assert route("DeepSeekV3", logits, bias=torch.zeros(8), top_k=1)[0].item() == 3


@pytest.mark.parametrize("method", [M.DEEPSEEK_V3, M.RENORMALIZE, M.DEFAULT])
def test_06_fp32_logits_have_a_plan_in_both_modes(method: M) -> None:
    for quant in (Q.FP8_TENSOR, Q.FP8_BLOCK128, Q.NVFP4):
        assert modes(ask(layer(quant, method)), TRTLLM) == {MONO, ROUTED}


@pytest.mark.parametrize("method", [M.RENORMALIZE, M.RENORMALIZE_NAIVE])
@pytest.mark.parametrize("quant", [Q.BF16, Q.FP8_BLOCK128])
def test_07_all_negative_logits_from_the_version_that_has_them_right(quant: Q, method: M) -> None:
    spec = layer(quant, method)
    assert not monolithic(ask(spec, device=on("sm100", "0.6.7")))
    assert monolithic(ask(spec, device=on("sm100", "0.6.8")))
    logits = -torch.rand(32, 128) * 20 - 1
    ids, _ = route(method, logits, top_k=4)
    assert torch.equal(ids.long(), torch.topk(logits, 4).indices)


def test_08_renormalize_and_its_naive_twin_are_one() -> None:
    logits = torch.randn(64, 128)
    one, other = (route(m, logits, top_k=8) for m in (M.RENORMALIZE, M.RENORMALIZE_NAIVE))
    assert torch.equal(one[0], other[0]) and torch.allclose(one[1], other[1], atol=1e-6)
    table = ROWS[0].routing
    assert table[M.RENORMALIZE] == table[M.RENORMALIZE_NAIVE]


def assert_scale_is_applied_once(quant: Q) -> None:
    honoured = layer(quant, M.DEEPSEEK_V3, settings={"routed_scaling_factor": 2.5})
    dropped = layer(quant, M.SIGMOID_RENORM, settings={"routed_scaling_factor": 2.5})
    for spec, kernel_applies in ((honoured, True), (dropped, False)):
        found = ask(spec)
        assert bool(monolithic(found)) == kernel_applies
        assert all(usable.scale_in_weights == (usable.mode is ROUTED) for usable in found.usable)
        assert ROUTED in modes(found, TRTLLM)
    pinned = ask(dropped, replace(LOGITS, backend=TRTLLM))
    assert codes(pinned, TRTLLM, MONO, dropped) == {"scale_ignored"}
    assert not any(usable.scale_in_weights for usable in ask(dropped, TOPK).usable)


def test_09_bf16_applies_the_scale_exactly_once() -> None:
    assert_scale_is_applied_once(Q.BF16)
    logits = torch.randn(16, 32)
    once, scaled = (route("SigmoidRenorm", logits, top_k=4, scale=s)[1] for s in (1.0, 2.5))
    assert torch.allclose(scaled, once * 2.5)


@pytest.mark.parametrize("quant", [Q.MXFP4, Q.MXINT4])
def test_10_mxfp4_and_mxint4_apply_the_scale_exactly_once(quant: Q) -> None:
    assert_scale_is_applied_once(quant)


def test_11_step_37_under_minimax2_by_version() -> None:
    spec = layer(Q.NVFP4, M.MINIMAX2, settings={"routed_scaling_factor": 3.0, "top_k": 8})
    for version, expected in (
        ("0.6.12", {"scale_ignored", "version"}),
        ("0.6.13", {"version"}),
        ("0.6.18", set()),
        ("0.7.2", set()),
    ):
        found = ask(spec, device=on("sm100", version))
        assert codes(found, TRTLLM, MONO, spec) == expected
        assert ROUTED in modes(found, TRTLLM)


def test_12_the_scale_of_minimax2_is_shown_by_the_kernels_own_text() -> None:
    shown = {v for v in recorded_versions() if MINIMAX2_SCALE in recorded(v).facts}
    assert shown == set(recorded_versions()) - {"0.6.6", "0.6.7", "0.6.8", "0.6.11", "0.6.12"}


def test_13_a_large_bias_changes_the_selection_and_never_the_weights() -> None:
    logits, bias = torch.randn(32, 64), torch.randn(64) * 30
    ids, weights = route("DeepSeekV3", logits, bias=bias, top_k=4, scale=2.5)
    scores = torch.sigmoid(logits)
    assert torch.equal(ids.long(), torch.topk(scores + bias, 4).indices)
    chosen = scores.gather(1, ids.long())
    assert torch.allclose(weights, 2.5 * chosen / chosen.sum(1, keepdim=True), rtol=1e-5)
    spec = layer(Q.FP8_BLOCK128, M.DEEPSEEK_V3, settings={"n_group": 1, "topk_group": 1})
    assert not monolithic(ask(spec, device=on("sm100", "0.6.17")))
    assert monolithic(ask(spec, device=on("sm100", "0.6.18")))


def test_14_every_path_goes_through_one_validator() -> None:
    spec = layer(kind=ActivationKind.RELU2)
    for form in (LOGITS, TOPK):
        found = ask(spec, form)
        judged = [usable.row for usable in found.usable] + [e.row for e in found.rejected]
        assert sorted(map(id, judged)) == sorted(map(id, ROWS))
    assert set(LAYER_CHECKS) < set(CHECKS), "what a load checks, a call checks too"


def test_15_mxfp8_runs_relu2() -> None:
    spec = layer(Q.MXFP8, kind=ActivationKind.RELU2)
    assert modes(ask(spec), TRTLLM) == {MONO, ROUTED}
    elsewhere = layer(Q.FP8_BLOCK128, kind=ActivationKind.RELU2)
    (code,) = codes(ask(elsewhere), TRTLLM, MONO, elsewhere)
    assert code == "activation"


def test_16_no_flashinfer_no_plan_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "installed_flashinfer", lambda: None)
    bare = DeviceInfo("cuda", "sm90", "a card", 0, flashinfer=None)
    for backend in (CUTLASS, TRTLLM):
        found = ask(layer(), replace(TOPK, backend=backend), bare)
        assert not found.usable
        for entry in found.rejected:
            assert "library_absent" in {reason.code for reason in entry.refusals}
            assert layer_refusals(entry.row, layer(), bare)
    assert set(BACKENDS) == {row.backend for row in ROWS}


def test_unroutable_methods_need_the_callers_own_ids() -> None:
    spec = layer(Q.NVFP4, M.SIMULATED)
    assert not ask(spec).usable
    found = ask(spec, TOPK)
    assert found.usable and not monolithic(found)
    assert CallForm(RoutingForm.TOPK, "bfloat16").routing is RoutingForm.TOPK
