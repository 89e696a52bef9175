"""Rows in the kernels' formats: against FlashInfer's own CPU code, and back to the values."""

from __future__ import annotations

import pytest
import torch
from tests.service.trtllm.flashinfer_cpu import prepare
from tests.service.trtllm.layers import raw
from tests.strategies import generator, relative

from expertd.backends.flashinfer_trtllm.quantize import FROM_CALLER, QUANTIZERS, to_e8m0
from expertd.weights.dequant import e2m1_to_float, e8m0_to_float
from expertd.weights.quantize import to_e2m1

ONE = torch.tensor(1.0)


def rows(seed: int, tokens: int = 9, hidden: int = 256) -> torch.Tensor:
    """Rows whose blocks differ much in size; one is zero."""
    random = generator(seed)
    sizes = 2.0 ** torch.randint(-9, 9, (tokens, hidden // 16), generator=random)
    values = torch.randn(tokens, hidden, generator=random) * sizes.repeat_interleave(16, 1)
    values[3] = 0
    return values.bfloat16()


def test_fp8_tensor_is_flashinfers() -> None:
    given = rows(31)
    theirs, _ = prepare.prepare_trtllm_fp8_per_tensor_activations(
        given, hidden_states_scale_global=4.0
    )
    ours, scale = QUANTIZERS["fp8_tensor"](given, torch.tensor(0.25))
    assert scale is None and torch.equal(raw(ours), raw(theirs))


def test_fp8_group128_is_flashinfers() -> None:
    given = rows(32)
    theirs, their_scale = prepare._deepseek_fp8_quantize_activations(given)
    ours, scale = QUANTIZERS["fp8_group128"](given, None)
    assert scale is not None and scale.shape == (2, 9) and scale.is_contiguous()
    assert torch.equal(scale, their_scale) and torch.equal(raw(ours), raw(theirs))


def test_fp8_token() -> None:
    given = rows(33)
    codes, scale = QUANTIZERS["fp8_token"](given, None)
    assert scale is not None and scale.shape == (9, 1) and scale.dtype == torch.float32
    assert relative(codes.float() * scale, given) < 0.04
    assert float(codes.float().abs().amax()) == 448


def test_mxfp8() -> None:
    given = rows(34)
    codes, exponents = QUANTIZERS["mxfp8"](given, None)
    assert exponents is not None and exponents.shape == (9, 8) and exponents.dtype == torch.uint8
    grid = e8m0_to_float(exponents).repeat_interleave(32, 1)
    assert relative(codes.float() * grid, given) < 0.04
    largest = codes.float().abs().view(9, 8, 32).amax(-1)
    # The smallest power of two that does not saturate.
    assert float(largest.max()) <= 448 and bool(((largest >= 224) | (largest == 0)).all())


@pytest.mark.parametrize("scale", [1.0, 0.02])
def test_nvfp4(scale: float) -> None:
    given = rows(35) * 0.05
    packed, blocks = QUANTIZERS["nvfp4"](given, torch.tensor(scale))
    assert blocks is not None and blocks.shape == (9, 16) and packed.shape == (9, 128)
    assert (blocks.dtype, packed.dtype) == (torch.float8_e4m3fn, torch.uint8)
    grid = blocks.float().repeat_interleave(16, 1) * scale
    assert relative(e2m1_to_float(packed) * grid, given) < 0.12
    # Codes: the nearest on the grid of the scales as they were stored.
    blockwise = blocks.float().repeat_interleave(16, 1)
    nearest = to_e2m1(torch.where(blockwise == 0, 0.0, given.float() / scale / blockwise))
    assert torch.equal(packed, nearest)


def test_bf16_rows_stay() -> None:
    given = rows(36)
    assert QUANTIZERS["bf16"](given, None) == (given, None)
    assert QUANTIZERS["bf16"](given.float(), None)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(QUANTIZERS))
def test_nan_rows_stay_nan_and_spoil_no_other(name: str) -> None:
    given = rows(37)
    given[5, 17] = float("nan")
    codes, scale = QUANTIZERS[name](given, ONE)
    clean, clean_scale = QUANTIZERS[name](rows(37), ONE)
    others = [row for row in range(9) if row != 5]
    assert torch.equal(raw(codes)[others], raw(clean)[others])
    bad = codes[5].float().isnan().any() if codes.dtype != torch.uint8 else torch.tensor(False)
    if scale is not None and clean_scale is not None:
        line = scale[:, 5] if name == "fp8_group128" else scale[5]
        bad |= (line == 255).any() if line.dtype == torch.uint8 else line.float().isnan().any()
    assert bool(bad)


def test_e8m0_goes_there_and_back() -> None:
    bits = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    assert torch.equal(to_e8m0(e8m0_to_float(bits)), bits)
    assert to_e8m0(torch.tensor([0.0, float("inf")])).tolist() == [0, 255]
    assert e8m0_to_float(to_e8m0(torch.tensor([1.0, 1.1, 2.0, 3.0]))).tolist() == [1, 2, 2, 4]


def test_scales_from_a_caller() -> None:
    scales = torch.rand(5, 3)
    grouped = FROM_CALLER["fp8_group128"](scales)
    assert grouped.is_contiguous() and torch.equal(grouped, scales.T)
    bits = torch.randint(0, 255, (5, 8)).to(torch.uint8)
    assert torch.equal(FROM_CALLER["mxfp8"](e8m0_to_float(bits)), bits)
