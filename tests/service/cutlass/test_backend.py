"""What the CUTLASS backend passes, computed by an emulation and compared with the reference."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.service.cutlass.emulated import Emulated
from tests.strategies import generator, layer_spec, random_topk, random_weights, relative

from expertd.backends.base import Batch
from expertd.backends.build import build
from expertd.backends.flashinfer.library import stand_in
from expertd.backends.flashinfer.tied import tied_fp8
from expertd.backends.flashinfer_cutlass.rows import fp8_rows
from expertd.capability.row import Row
from expertd.capability.rows.flashinfer_cutlass import ROWS
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights

CPU = torch.device("cpu")
COMPUTED = {quant: row for row in ROWS for quant in row.quants if quant is not QuantScheme.MXFP4}
TOLERANCE = {QuantScheme.FP8_TENSOR: 8e-2, QuantScheme.FP8_BLOCK128: 1e-2}
AS_IT_IS = (
    QuantScheme.BF16,
    QuantScheme.FP16,
    QuantScheme.FP8_TENSOR,
    QuantScheme.FP8_BLOCK128,
)
"""Schemes whose canonical tensors are the kernel's own."""
LIMITED = [
    Activation(ActivationKind.SWIGLU, limit=0.5),
    Activation(ActivationKind.SWIGLU_OAI, alpha=1.3, beta=0.5, limit=0.5),
    Activation(ActivationKind.SWIGLU_STEP, limit=0.25),
    Activation(ActivationKind.SITU, alpha=2.0, beta=3.0),
]
ACTIVATIONS = [*(Activation(kind) for kind in ActivationKind), *LIMITED]


@pytest.fixture
def emulated() -> Iterator[Emulated]:
    found = Emulated()
    stand_in(found)
    yield found
    stand_in(None)


def spec_of(quant: QuantScheme, **changes: Any) -> LayerSpec:
    return layer_spec(hidden=128, intermediate=128, quant=quant, **changes)


def run(row: Row, spec: LayerSpec, weights: ExpertWeights, batch: Batch) -> torch.Tensor:
    batch = replace(batch, out=torch.full_like(batch.out, torch.nan))
    build(row, spec, weights, None, CPU).forward(batch)
    return batch.out


def expected(spec: LayerSpec, weights: ExpertWeights, batch: Batch) -> torch.Tensor:
    return run(REFERENCE[0], spec, weights, replace(batch, out=batch.out.float()))


def batch_of(spec: LayerSpec, seed: int, tokens: int = 9, top_k: int = 2) -> Batch:
    random = generator(seed)
    rows = torch.randn(tokens, spec.hidden, generator=random).bfloat16()
    ids, weights = random_topk(tokens, spec.num_experts, top_k, random)
    return Batch(rows, torch.empty_like(rows), ids=ids, weights=weights)


def difference(spec: LayerSpec, weights: ExpertWeights, batch: Batch) -> float:
    found = run(COMPUTED[spec.quant], spec, weights, batch)
    return relative(found, expected(spec, weights, batch))


@pytest.mark.parametrize("quant", COMPUTED)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_the_arguments_mean_the_layer(
    emulated: Emulated, quant: QuantScheme, activation: Activation
) -> None:
    spec = spec_of(quant, activation=activation)
    weights = random_weights(spec, generator(1))
    assert difference(spec, weights, batch_of(spec, 2)) < TOLERANCE.get(quant, 1e-2)


def test_without_a_limit_nothing_is_clamped(emulated: Emulated) -> None:
    """Left alone, the kernel clamps SwiGLU-step at 7."""
    spec = spec_of(QuantScheme.BF16, activation=Activation(ActivationKind.SWIGLU_STEP))
    batch = batch_of(spec, 18)
    batch.rows.mul_(30)
    assert difference(spec, random_weights(spec, generator(19)), batch) < 1e-2


@pytest.mark.parametrize("quant", COMPUTED)
def test_biases_a_range_and_masked_ids(emulated: Emulated, quant: QuantScheme) -> None:
    spec = spec_of(quant, expert_bias=True, expert_begin=2, expert_end=4)
    weights = random_weights(spec, generator(3))
    batch = batch_of(spec, 4, tokens=12, top_k=3)
    assert batch.ids is not None and batch.weights is not None
    batch.ids[::2, 1] = -1
    batch.ids[3] = -1
    batch.weights[batch.ids < 0] = torch.nan
    assert difference(spec, weights, batch) < TOLERANCE.get(quant, 1e-2)
    call = emulated.calls[-1]
    assert (call["ep_size"], call["ep_rank"]) == (3, 1)
    assert call["token_final_scales"].isfinite().all()


@pytest.mark.parametrize("quant", COMPUTED)
def test_input_side_weights_go_onto_the_rows(emulated: Emulated, quant: QuantScheme) -> None:
    routing = layer_spec().routing
    assert routing is not None
    spec = spec_of(quant, routing=replace(routing, top_k=1, weight_site="input"))
    batch = batch_of(spec, 5, top_k=1)
    assert batch.weights is not None
    batch.weights.copy_(torch.rand(batch.weights.shape, generator=generator(6)) + 0.1)
    weights = random_weights(spec, generator(7))
    assert difference(spec, weights, batch) < TOLERANCE.get(quant, 2e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_dtypes_of_replies(emulated: Emulated, dtype: torch.dtype) -> None:
    spec = spec_of(QuantScheme.BF16)
    weights, batch = random_weights(spec, generator(8)), batch_of(spec, 9)
    batch = replace(batch, out=batch.out.to(dtype))
    found = run(COMPUTED[spec.quant], spec, weights, batch)
    assert found.dtype is dtype
    assert relative(found, expected(spec, weights, batch)) < 1e-2


@pytest.mark.parametrize("quant", AS_IT_IS)
def test_weights_are_not_copied(emulated: Emulated, quant: QuantScheme) -> None:
    spec = spec_of(quant)
    weights = random_weights(spec, generator(10))
    if weights.scale13 is not None and quant is QuantScheme.FP8_TENSOR:
        weights = replace(weights, scale13=torch.full_like(weights.scale13, 1e-3))
    run(COMPUTED[quant], spec, weights, batch_of(spec, 11))
    call = emulated.calls[-1]
    assert call["fc1_expert_weights"].data_ptr() == weights.w13.data_ptr()
    assert call["fc2_expert_weights"].data_ptr() == weights.w2.data_ptr()


def test_halves_with_scales_of_their_own_share_the_larger() -> None:
    spec = spec_of(QuantScheme.FP8_TENSOR)
    weights = random_weights(spec, generator(12))
    assert weights.scale13 is not None
    before = weights.w13.clone()
    ratio = torch.tensor([[1.0, 0.25], [0.5, 1.0]]).repeat(3, 1)
    apart = replace(weights, scale13=weights.scale13 * ratio)
    together = tied_fp8(apart)
    assert together.scale13 is not None and apart.scale13 is not None
    assert torch.equal(together.scale13, apart.scale13.amax(1, keepdim=True).expand(-1, 2))
    for expert in range(spec.held):
        meant, kept = (
            w.w13[expert].float().view(2, -1) * w.scale13[expert, :, None]
            for w in (apart, together)
            if w.scale13 is not None
        )
        assert relative(kept, meant) < 4e-2
    assert torch.equal(weights.w13.view(torch.uint8), before.view(torch.uint8))


def test_static_scales_of_the_checkpoint_are_used(emulated: Emulated) -> None:
    spec = spec_of(QuantScheme.FP8_TENSOR)
    weights = random_weights(spec, generator(13))
    held = torch.arange(1, spec.held + 1, dtype=torch.float32)
    weights = replace(weights, input13=held / 50, input2=held / 100)
    assert difference(spec, weights, batch_of(spec, 14)) < TOLERANCE[spec.quant]
    dequant1, quant2, dequant2, rows = emulated.calls[-1]["quant_scales"]
    assert rows == held[-1] / 50 and torch.equal(quant2, 1 / (held / 100))


def test_rows_that_are_not_finite_stay_alone() -> None:
    rows = torch.randn(5, 64, generator=generator(15))
    clean, scale = fp8_rows(rows, None)
    rows[1, 3], rows[4, 0] = torch.nan, -torch.inf
    spoilt, same = fp8_rows(rows, None)
    assert (
        clean.float()[[0, 2, 3]] == spoilt.float()[[0, 2, 3]] * (same / scale)
    ).float().mean() > 0.9
    assert spoilt.float().isnan().any(dim=1).tolist() == [False, True, False, False, True]
    assert bool(same.isfinite())
    zero, small = fp8_rows(torch.zeros(2, 4), None)
    assert zero.float().eq(0).all() and small > 0


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.quants[0]}-{row.activation_quant}")
def test_every_argument_binds_to_the_installed_function(row: Row) -> None:
    from flashinfer.fused_moe import cutlass_fused_moe, cutlass_fused_moe_workspace_size

    assert row.call is not None
    signature = inspect.signature(cutlass_fused_moe)
    constants = {
        name for use in row.activations.values() for name in (*use.passes, *(use.limit or ()))
    }
    signature.bind(**dict.fromkeys({*row.call.passes, *row.call.prefers, *constants}))
    ours = inspect.signature(Emulated().cutlass_fused_moe_workspace_size).parameters
    theirs = inspect.signature(cutlass_fused_moe_workspace_size).parameters
    assert set(ours) <= set(theirs)


def test_emulation_has_no_argument_of_its_own() -> None:
    from flashinfer.fused_moe import cutlass_fused_moe
    from flashinfer.tllm_enums import ActivationType

    ours = inspect.signature(Emulated().cutlass_fused_moe).parameters
    assert set(ours) <= set(inspect.signature(cutlass_fused_moe).parameters)
    for member in Emulated.ActivationType:
        assert int(ActivationType[member.name]) == member.value


def test_every_size_is_warmed(emulated: Emulated) -> None:
    spec = spec_of(QuantScheme.BF16)
    backend = build(COMPUTED[spec.quant], spec, random_weights(spec, generator(16)), None, CPU)
    emulated.calls.clear()
    backend.warm_up((16, 1, 64))
    assert [len(call["input"]) for call in emulated.calls] == [1, 16, 64]
    assert all(call["use_fused_finalize"] is False for call in emulated.calls)
