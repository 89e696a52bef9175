"""Prepared weights, byte for byte what FlashInfer's own preparation makes of the same experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.service.trtllm.flashinfer_cpu import (
    api,
    fp4_quantization,
    interleave_scales,
    prepare,
)
from tests.service.trtllm.layers import ACTIVATIONS, layer, raw
from tests.strategies import generator, random_weights
from torch import Tensor

from expertd.backends.flashinfer_trtllm.pad import Sizes
from expertd.backends.flashinfer_trtllm.weights import Native, native
from expertd.capability.rows.flashinfer_trtllm import ROWS
from expertd.core import ActivationKind, LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights

BYTE_EQUAL = frozenset(
    {
        QuantScheme.BF16,
        QuantScheme.FP8_TENSOR,
        QuantScheme.FP8_CHANNEL,
        QuantScheme.FP8_BLOCK128,
        QuantScheme.MXFP8,
        QuantScheme.NVFP4,
        QuantScheme.MXFP4,
        QuantScheme.MXINT4,
    }
)
"""Schemes that have a test here, each by its name."""
GATED = pytest.mark.parametrize("gated", [True, False])
KINDS = {True: ActivationKind.SWIGLU, False: ActivationKind.RELU2}


def spec_of(quant: QuantScheme, gated: bool, **changes: Any) -> LayerSpec:
    # H and I differ, so that nothing can be taken for the other.
    sizes = {"hidden": 256, "intermediate": 512, "num_experts": 3, "expert_end": 3}
    return layer(quant, activation=ACTIVATIONS[KINDS[gated]], **(sizes | changes))


def prepared(weights: ExpertWeights, spec: LayerSpec) -> Native:
    sizes = (spec.hidden, spec.intermediate)
    return native(weights, spec, Sizes(*sizes, *sizes))


def theirs_of(function: Any, spec: LayerSpec, w13: Tensor, w2: Tensor, **extra: Any) -> Any:
    return function(
        w13,
        w2,
        num_local_experts=spec.held,
        hidden_size=spec.hidden,
        intermediate_size=spec.intermediate,
        activation=api.SwiGLU() if spec.activation.gated else api.ReLU2(),
        **extra,
    )


def same_bytes(ours: Tensor | None, theirs: Tensor) -> bool:
    assert ours is not None
    assert (ours.shape, ours.dtype, ours.is_contiguous()) == (theirs.shape, theirs.dtype, True)
    return torch.equal(raw(ours), raw(theirs))


@GATED
def test_bf16(gated: bool) -> None:
    spec = spec_of(QuantScheme.BF16, gated)
    weights = random_weights(spec, generator(1))
    theirs = theirs_of(prepare.prepare_trtllm_bf16_weights, spec, weights.w13, weights.w2)
    ours = prepared(weights, spec).arguments
    for name in ("gemm1_weights", "gemm2_weights"):
        assert same_bytes(ours[name], theirs[name])


@GATED
def test_fp8_tensor(gated: bool) -> None:
    spec = spec_of(QuantScheme.FP8_TENSOR, gated)
    plain = random_weights(replace(spec, quant=QuantScheme.BF16), generator(2))
    w13, multiplier13 = prepare._quantize_fp8_per_expert(plain.w13)
    w2, multiplier2 = prepare._quantize_fp8_per_expert(plain.w2)
    halves = 2 if gated else 1
    weights = ExpertWeights(
        QuantScheme.FP8_TENSOR,
        w13,
        w2,
        scale13=(1 / multiplier13)[:, None].expand(-1, halves).contiguous(),
        scale2=(1 / multiplier2)[:, None],
        input13=torch.full((3,), 1 / 30.0),
        input2=torch.full((3,), 1 / 12.0),
    )
    theirs = theirs_of(
        prepare.prepare_trtllm_fp8_per_tensor_weights,
        spec,
        plain.w13,
        plain.w2,
        hidden_states_scale_global=30.0,
        intermediate_scale_global=12.0,
    )
    ours = prepared(weights, spec)
    for name in ("gemm1_weights", "gemm2_weights"):
        assert same_bytes(ours.arguments[name], theirs[name])
    for name in (
        "output1_scales_scalar",
        "output1_scales_gate_scalar",
        "output2_scales_scalar",
    ):
        found = ours.arguments[name]
        assert found is not None and found.is_contiguous() and found.dtype == torch.float32
        torch.testing.assert_close(found, theirs[name], rtol=1e-6, atol=0)


def test_fp8_block128_is_the_canonical_tensors_themselves() -> None:
    spec = spec_of(QuantScheme.FP8_BLOCK128, True)
    plain = random_weights(replace(spec, quant=QuantScheme.BF16), generator(3))
    quant = api.QuantConfig(
        weight=api.QuantFormat.DeepSeekFp8, activation=api.QuantFormat.DeepSeekFp8
    )
    theirs = theirs_of(
        prepare.prepare_trtllm_fp8_block_weights, spec, plain.w13, plain.w2, quant=quant
    )
    weights = ExpertWeights(
        QuantScheme.FP8_BLOCK128,
        theirs["gemm1_weights"],
        theirs["gemm2_weights"],
        theirs["gemm1_weights_scale"],
        theirs["gemm2_weights_scale"],
    )
    ours = prepared(weights, spec).arguments
    for name in theirs:
        assert ours[name] is theirs[name]


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer's preparation with its one step that needs a card done by its formula."""
    monkeypatch.setattr(fp4_quantization, "block_scale_interleave", interleave_scales)


@GATED
@pytest.mark.usefixtures("no_card")
def test_mxint4(gated: bool) -> None:
    spec = spec_of(QuantScheme.MXINT4, gated)
    plain = random_weights(replace(spec, quant=QuantScheme.BF16), generator(4))
    (w13, s13), (w2, s2) = (prepare._mxint4_quantize(w) for w in (plain.w13, plain.w2))
    weights = ExpertWeights(
        QuantScheme.MXINT4,
        w13,
        w2,
        s13.view(*w13.shape[:2], -1),
        s2.view(*w2.shape[:2], -1),
    )
    theirs = theirs_of(prepare.prepare_trtllm_mxint4_weights, spec, plain.w13, plain.w2)
    ours = prepared(weights, spec).arguments
    for name in ("gemm1_weights", "gemm2_weights"):
        assert same_bytes(ours[name], theirs[name])
    for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
        found = ours[name]
        assert found is not None and found.dtype == torch.bfloat16
        assert torch.equal(raw(found).flatten(), raw(theirs[name]).flatten())


@GATED
@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("quant", [QuantScheme.NVFP4, QuantScheme.MXFP4])
def test_fp4(quant: QuantScheme, gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their quantiser needs a card: it is handed our codes, in the order in which it asks."""
    spec = spec_of(quant, gated)
    weights = random_weights(spec, generator(5))
    assert weights.scale13 is not None and weights.scale2 is not None
    answers = iter(
        [
            (weights.w13.flatten(0, 1), raw(weights.scale13)),
            (weights.w2.flatten(0, 1), raw(weights.scale2)),
        ]
    )
    monkeypatch.setattr("flashinfer.fp4_quantization.fp4_quantize", lambda *_, **__: next(answers))
    formats = {QuantScheme.NVFP4: api.QuantFormat.NVFP4, QuantScheme.MXFP4: api.QuantFormat.MXFP4}
    rows = {QuantScheme.NVFP4: api.QuantFormat.NVFP4, QuantScheme.MXFP4: api.QuantFormat.MXFP8}
    plain = random_weights(replace(spec, quant=QuantScheme.BF16), generator(6))
    theirs = theirs_of(
        prepare.prepare_trtllm_fp4_weights,
        spec,
        plain.w13,
        plain.w2,
        quant=api.QuantConfig(weight=formats[quant], activation=rows[quant]),
    )
    ours = prepared(weights, spec).arguments
    names = ("gemm1_weights", "gemm2_weights", "gemm1_weights_scale", "gemm2_weights_scale")
    for name in names:
        assert same_bytes(ours[name], theirs[name]), name


@GATED
@pytest.mark.usefixtures("no_card")
def test_mxfp8(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_of(QuantScheme.MXFP8, gated)
    weights = random_weights(spec, generator(7))
    assert weights.scale13 is not None and weights.scale2 is not None
    matrices = (weights.w13, weights.scale13), (weights.w2, weights.scale2)
    answers = iter([(w[e], s[e]) for e in range(spec.held) for w, s in matrices])
    monkeypatch.setattr(
        "flashinfer.quantization.fp8_quantization.mxfp8_quantize", lambda *_, **__: next(answers)
    )
    plain = random_weights(replace(spec, quant=QuantScheme.BF16), generator(8))
    quant = api.QuantConfig(weight=api.QuantFormat.MXFP8, activation=api.QuantFormat.MXFP8)
    theirs = theirs_of(
        prepare.prepare_trtllm_fp8_block_weights, spec, plain.w13, plain.w2, quant=quant
    )
    ours = prepared(weights, spec).arguments
    for name in ("gemm1_weights", "gemm2_weights", "gemm1_weights_scale", "gemm2_weights_scale"):
        assert same_bytes(ours[name], theirs[name]), name


@GATED
def test_fp8_channel(gated: bool) -> None:
    """FlashInfer has no preparation for it: its helpers, as they make per-tensor weights."""
    from flashinfer import reorder_rows_for_gated_act_gemm, shuffle_matrix_a

    spec = spec_of(QuantScheme.FP8_CHANNEL, gated)
    weights = random_weights(spec, generator(10))
    ours = prepared(weights, spec).arguments
    first, second = raw(weights.w13), raw(weights.w2)
    if gated:
        first = torch.stack([reorder_rows_for_gated_act_gemm(each) for each in first])
    for name, matrix in (("gemm1_weights", first), ("gemm2_weights", second)):
        theirs = torch.stack([shuffle_matrix_a(each, 128) for each in matrix])
        assert same_bytes(ours[name], theirs.view(torch.float8_e4m3fn)), name


@GATED
def test_channel_scales_follow_their_rows(gated: bool) -> None:
    spec = spec_of(QuantScheme.FP8_CHANNEL, gated)
    weights = random_weights(spec, generator(9))
    assert weights.scale13 is not None
    # A row that is its own scale: wherever the rows go, the scales have to be there too.
    marked = replace(
        weights,
        w13=weights.scale13[:, :, None].expand_as(weights.w13).to(torch.float8_e4m3fn),
    )
    ours = prepared(marked, spec).arguments
    rows, scales = ours["gemm1_weights"], ours["gemm1_per_channel_weight_scale"]
    assert rows is not None and scales is not None
    assert torch.equal(rows[:, :, 0].float(), scales.to(torch.float8_e4m3fn).float())
    assert not torch.equal(scales, weights.scale13)
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        assert torch.equal(ours[name], torch.ones(spec.held))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("quant", "limit", "tied"),
    [
        (QuantScheme.FP8_TENSOR, None, True),
        (QuantScheme.NVFP4, None, False),
        (QuantScheme.NVFP4, 2.0, True),
    ],
)
def test_halves_of_different_scales(quant: QuantScheme, limit: float | None, tied: bool) -> None:
    """Tied for FP8; for NVFP4 only where one clamp has to mean the same in both halves."""
    activation = replace(ACTIVATIONS[ActivationKind.SWIGLU], limit=limit)
    spec = replace(spec_of(quant, True), activation=activation)
    weights = random_weights(spec, generator(10))
    weights = replace(weights, input13=torch.ones(3), input2=torch.ones(3))
    infix = "scale" if quant is QuantScheme.NVFP4 else "scales"
    ours = prepared(weights, spec).arguments
    up, gates = ours[f"output1_{infix}_scalar"], ours[f"output1_{infix}_gate_scalar"]
    scale = weights.scale13 if quant is QuantScheme.FP8_TENSOR else weights.global13
    assert up is not None and gates is not None and scale is not None
    assert not torch.equal(scale[:, 0], scale[:, 1])
    expected = scale.amax(1, keepdim=True).expand(-1, 2) if tied else scale
    torch.testing.assert_close(up, expected[:, 0])
    torch.testing.assert_close(gates, expected[:, 1])


def test_every_scheme_of_a_row_has_its_test() -> None:
    tests = " ".join(name for name in globals() if name.startswith("test_"))
    named = {scheme for scheme in QuantScheme if f"test_{scheme}" in tests}
    # test_fp4 is for both.
    assert named | {QuantScheme.NVFP4, QuantScheme.MXFP4} == BYTE_EQUAL
    assert {quant for row in ROWS for quant in row.quants} == BYTE_EQUAL
