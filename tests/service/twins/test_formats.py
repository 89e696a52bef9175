"""Number formats and layouts against ml_dtypes and written-out formulas."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from flashinfer.fused_moe import core
from flashinfer.utils import get_shuffle_matrix_a_row_indices
from hypothesis import given
from hypothesis import strategies as st
from tests.service.twins.stored import swizzled
from tests.twins import formats, layout

BYTES = torch.arange(256, dtype=torch.uint8)


def test_fp4_pairs() -> None:
    low = (BYTES & 15).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    high = (BYTES >> 4).numpy().view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    wanted = torch.from_numpy(np.stack((low, high), 1).reshape(-1))
    assert torch.equal(formats.fp4_values(BYTES.reshape(1, -1))[0], wanted)


def test_int4_pairs() -> None:
    values = formats.int4_values(torch.tensor([[0x80, 0x7F]], dtype=torch.uint8))
    assert values.tolist() == [[0.0, -8.0, -1.0, 7.0]]


def test_e8m0() -> None:
    wanted = BYTES.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    got = formats.e8m0_values(BYTES).numpy()
    assert np.array_equal(got, wanted, equal_nan=True)


@given(st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=64))
def test_e2m1_rounds_as_ml_dtypes(values: list[float]) -> None:
    clipped = np.clip(np.array(values, np.float32), -6, 6)
    wanted = clipped.astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert np.array_equal(formats.e2m1(torch.tensor(values)).numpy(), wanted)


@pytest.mark.parametrize("middle", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
def test_e2m1_ties_go_to_even(middle: float) -> None:
    wanted = np.float32(middle).astype(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert formats.e2m1(torch.tensor([middle, -middle])).tolist() == [wanted, -wanted]


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=64))
def test_e4m3_rounds_as_ml_dtypes_and_saturates(values: list[float]) -> None:
    clipped = np.clip(np.array(values, np.float32), -448, 448)
    wanted = clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert np.array_equal(formats.e4m3(torch.tensor(values)).numpy(), wanted)


THROUGH = [
    (formats.through_groups128, 2**-4),
    (formats.through_mxfp8, 2**-4),
    (formats.through_nvfp4, 0.3),
    (formats.through_rows, 2**-4),
]


@pytest.mark.parametrize(("through", "tolerance"), THROUGH)
def test_dynamic_scales_keep_the_largest_values(through, tolerance: float, seed: int) -> None:  # type: ignore[no-untyped-def]
    values = torch.randn(16, 256) * torch.exp(torch.randn(16, 1))
    got = through(values)
    assert float((got - values).norm() / values.norm()) < tolerance
    assert torch.equal(through(torch.zeros(2, 256)), torch.zeros(2, 256))


def test_mxfp8_scale_is_rounded_up_so_that_nothing_saturates() -> None:
    values = torch.zeros(1, 32)
    values[0, 0] = 449.0
    assert formats.through_mxfp8(values)[0, 0] == 448.0  # scale 2: 224.5 -> 224
    values[0, 0] = 448.0
    values[0, 1] = 2**-9
    assert formats.through_mxfp8(values)[0, 1] == 2**-9  # scale 1: the smallest e4m3


@pytest.mark.parametrize("epilogue", [128, 64])
def test_shuffle_is_flashinfers(epilogue: int) -> None:
    real = get_shuffle_matrix_a_row_indices(torch.zeros(256, 128, dtype=torch.uint8), epilogue)
    assert torch.equal(layout.prepared_order(256, interleaved=False, epilogue=epilogue), real)


def test_gated_shuffle_is_flashinfers() -> None:
    rows = torch.zeros(512, 128, dtype=torch.uint8)
    real = core._maybe_get_cached_w3_w1_permute_indices({}, rows, 128)
    ours = layout.prepared_order(512, interleaved=True, epilogue=128)
    assert torch.equal(ours, real)
    known = layout.prepared_order(256, interleaved=True, epilogue=128)[:10].tolist()
    assert known == [0, 2, 4, 6, 8, 10, 12, 14, 128, 130]


def test_rows_come_back() -> None:
    weights = torch.arange(256 * 4).reshape(256, 4)
    order = layout.prepared_order(256, interleaved=True, epilogue=128)
    assert torch.equal(layout.canonical_rows(weights[order], order), weights)
    assert torch.equal(layout.canonical_columns(weights[:, 0][order], order), weights[:, 0])


def test_swizzle_comes_back_byte_by_byte() -> None:
    scales = torch.randint(0, 256, (256, 8), dtype=torch.uint8)
    assert torch.equal(layout.unswizzled(swizzled(scales)), scales)
    by_offset = torch.empty(256 * 8, dtype=torch.uint8)
    for r in range(256):
        for c in range(8):
            tile = (r // 128) * 2 + c // 4
            by_offset[tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4] = scales[r, c]
    assert torch.equal(by_offset.reshape(256, 8), swizzled(scales))


def test_blocks_come_back() -> None:
    weights = torch.arange(64 * 256).reshape(64, 256)
    assert torch.equal(layout.unblocked(core.convert_to_block_layout(weights, 128)), weights)
