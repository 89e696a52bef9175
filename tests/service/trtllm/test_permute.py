"""The order of rows, columns and scales against FlashInfer's own helpers."""

from __future__ import annotations

import pytest
import torch
from tests.service.trtllm.flashinfer_cpu import core, fp4_quantization, interleave_scales
from tests.service.trtllm.layers import raw

from expertd.backends.flashinfer_trtllm.permute import (
    block_major,
    first_order,
    interleaved,
    shuffled,
    take_rows,
)
from expertd.backends.flashinfer_trtllm.swizzle import swizzle

ROWS = (128, 256, 384, 1024)


@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_shuffled_as_flashinfer_does(rows: int) -> None:
    matrix = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, 16)
    theirs = fp4_quantization.shuffle_matrix_a(matrix, 128)[:, 0]
    assert torch.equal(shuffled(rows).int(), theirs)


@pytest.mark.parametrize("rows", ROWS)
def test_halves_are_interleaved_as_flashinfer_does(rows: int) -> None:
    matrix = torch.arange(rows, dtype=torch.int32)[:, None].expand(rows, 16)
    theirs = core.reorder_rows_for_gated_act_gemm(matrix)[:, 0]
    assert torch.equal(interleaved(rows).int(), theirs)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", [None, 16, 32])
def test_order_of_the_first_matrix(rows: int, gated: bool, group: int | None) -> None:
    matrix = torch.zeros(rows, 16, dtype=torch.uint8)
    theirs = core._maybe_get_cached_w3_w1_permute_indices(
        {}, matrix, 128, num_elts_per_sf=group, is_gated_act_gemm=gated
    )
    assert torch.equal(first_order(rows, gated), theirs)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("group", [None, 16, 32])
def test_order_of_the_second_matrix(rows: int, group: int | None) -> None:
    matrix = torch.zeros(rows, 16, dtype=torch.uint8)
    theirs = core.get_w2_permute_indices_with_cache({}, matrix, 128, num_elts_per_sf=group)
    assert torch.equal(shuffled(rows), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8, torch.float8_e4m3fn])
def test_blocks_of_columns(dtype: torch.dtype) -> None:
    bytes_of = torch.randint(0, 255, (2, 128, 512), dtype=torch.uint8)
    matrix = bytes_of.view(dtype)
    theirs = torch.stack([core.convert_to_block_layout(m, 128) for m in bytes_of]).view(dtype)
    ours = block_major(matrix)
    assert ours.shape == theirs.shape and ours.is_contiguous()
    assert torch.equal(raw(ours), raw(theirs))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8])
@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (384, 8), (256, 92)])
def test_scales_are_swizzled_by_the_published_offsets(
    rows: int, columns: int, dtype: torch.dtype
) -> None:
    scales = torch.randint(0, 255, (2, rows, columns), dtype=torch.uint8)
    theirs = torch.stack([interleave_scales(expert) for expert in scales])
    ours = swizzle(scales.view(dtype))
    assert ours.shape == scales.shape and ours.is_contiguous()
    assert torch.equal(raw(ours).reshape(2, -1), theirs)


def test_rows_of_every_dtype_can_be_taken() -> None:
    order = shuffled(128)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.uint8):
        tensor = torch.randint(0, 100, (2, 128, 8)).to(dtype)
        assert torch.equal(take_rows(tensor, order).float(), tensor.float()[:, order])
