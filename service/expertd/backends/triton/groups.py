"""Tiles of many rows, 64 of which are multiplied at a time: two or three groups a block.

Where blocks of scales want each step's products apart, those of a group are half as many registers
as those of all 128 rows: enough remain for two programs of the second GEMM on a multiprocessor, and
for the first to spill nothing. Three groups are a height between 128 and 256: what an expert with
up to 192 rows needs, reading its weights once.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.dot import multiply, nothing, rounded, scaled
from expertd.backends.triton.ends import end_first, end_second
from expertd.backends.triton.loop import _block_scale, _row_scale, _weights
from expertd.backends.triton.place import members, scales_of_half

HIGH = tl.constexpr(64)
"""Rows of a group: what wgmma takes at once."""


@triton.jit
def first_groups(
    rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, inner_ptr, inner_scale_ptr, order_ptr, expert, begin, count, tile, top_k,
    width, inner, alpha, beta, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, ON_INPUT: tl.constexpr, INNER: tl.constexpr,
    END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """One tile of the first GEMM, so many groups high."""
    HALVES: tl.constexpr = 2 if GATED else 1
    n = tl.minimum(tile * N + tl.arange(0, N), inner - 1)
    scales = scales_of_half(scale_ptr, inner, width, GROUP)
    row0, there0, pair0 = members(begin, count, order_ptr, True, HIGH, 0)
    row1, there1, pair1 = members(begin, count, order_ptr, True, HIGH, HIGH)
    row2, there2, pair2 = members(begin, count, order_ptr, True, HIGH, 2 * HIGH)
    token0 = (pair0 // top_k).to(tl.int64)
    token1 = (pair1 // top_k).to(tl.int64)
    token2 = (pair2 // top_k).to(tl.int64)
    up, gate = _accumulate(
        rows_ptr, row_scale_ptr, token0, token1, token2, there0, there1, there2, 0,
        weight_ptr, scale_ptr + expert * HALVES * scales,
        expert * HALVES * inner, n, tile * N, inner, scales, width,
        GROUPS, HALVES, GROUP, ROWS, COMPUTE, N, K, EVEN, MAPPED, False,
    )  # fmt: skip
    for group in tl.static_range(GROUPS):
        row, there, pair = members(begin, count, order_ptr, True, HIGH, group * HIGH)
        end_first(
            up[group], gate[group], row, there, pair, (pair // top_k).to(tl.int64),
            row_scale_ptr, end_scale_ptr, bias_ptr, router_ptr, inner_ptr, inner_scale_ptr,
            expert, tile, inner, alpha, beta, limit,
            KIND, GATED, ON_INPUT, INNER, END_SCALE, ROW_SCALED, BIASED, HIGH, N, False,
        )  # fmt: skip


@triton.jit
def second_groups(
    inner_ptr, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
    ON_INPUT: tl.constexpr,
    END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, COMPUTE: tl.constexpr, GROUPS: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """One tile of the second GEMM, so many groups high."""
    n = tl.minimum(tile * N + tl.arange(0, N), hidden - 1)
    row0, there0, _ = members(begin, count, order_ptr, True, HIGH, 0)
    row1, there1, _ = members(begin, count, order_ptr, True, HIGH, HIGH)
    row2, there2, _ = members(begin, count, order_ptr, True, HIGH, 2 * HIGH)
    total, _ = _accumulate(
        inner_ptr, inner_scale_ptr, row0, row1, row2, there0, there1, there2, begin,
        weight_ptr, scale_ptr + expert * scales_of_half(scale_ptr, hidden, width, GROUP),
        expert * hidden, n, tile * N, 0, 0, width,
        GROUPS, 1, GROUP, ROWS, COMPUTE, N, K, EVEN, MAPPED, MAPPED,
    )  # fmt: skip
    for group in tl.static_range(GROUPS):
        row, there, pair = members(begin, count, order_ptr, True, HIGH, group * HIGH)
        end_second(
            total[group], row, there, pair, inner_scale_ptr, end_scale_ptr, bias_ptr, router_ptr,
            parts_ptr, expert, tile, hidden,
            ON_INPUT, END_SCALE, ROW_SCALED, BIASED, HIGH, N, False,
        )  # fmt: skip


@triton.jit
def _accumulate(
    rows_ptr, row_scale_ptr, row0, row1, row2, there0, there1, there2, row_begin,
    weight_ptr, scale_ptr, top, n, begin, half_rows, half_scales, width,
    GROUPS: tl.constexpr, HALVES: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr,
    COMPUTE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr,
    MAPPED: tl.constexpr, ROW_MAP: tl.constexpr,
):  # fmt: skip
    """loop.accumulate for weights that are multiplied as they are: the totals of three groups for
    each half, of which GROUPS are computed. Rows that are not there are not read."""
    first0 = nothing(HIGH, N, False)
    first1 = nothing(HIGH, N, False)
    first2 = nothing(HIGH, N, False)
    second0 = nothing(HIGH, N, False)
    second1 = nothing(HIGH, N, False)
    second2 = nothing(HIGH, N, False)
    other_scale_ptr = scale_ptr + half_scales
    block = _block_scale(scale_ptr, begin, 0, width, GROUP)
    other_block = _block_scale(other_scale_ptr, begin, 0, width, GROUP)
    scale0 = _row_scale(row_scale_ptr, row0, 0, width, ROWS)
    scale1 = _row_scale(row_scale_ptr, row1, 0, width, ROWS)
    scale2 = _row_scale(row_scale_ptr, row2, 0, width, ROWS)
    for k in range(0, width, K):
        ahead = tl.where(k + K < width, k + K, 0)
        next_block = _block_scale(scale_ptr, begin, ahead, width, GROUP)
        next_other = _block_scale(other_scale_ptr, begin, ahead, width, GROUP)
        next0 = _row_scale(row_scale_ptr, row0, ahead, width, ROWS)
        next1 = _row_scale(row_scale_ptr, row1, ahead, width, ROWS)
        next2 = _row_scale(row_scale_ptr, row2, ahead, width, ROWS)
        rows0 = _rows(rows_ptr, row0, there0, row_begin, k, width, COMPUTE, K, EVEN, ROW_MAP)
        rows1 = rows0
        rows2 = rows0
        if GROUPS > 1:
            here = row_begin + HIGH
            rows1 = _rows(rows_ptr, row1, there1, here, k, width, COMPUTE, K, EVEN, ROW_MAP)
        if GROUPS > 2:
            here = row_begin + 2 * HIGH
            rows2 = _rows(rows_ptr, row2, there2, here, k, width, COMPUTE, K, EVEN, ROW_MAP)
        values = _weights(weight_ptr, top, n, begin, k, width, K, EVEN, MAPPED)
        first0 = _plus(first0, rows0, values, scale0, block, GROUP, N)
        if GROUPS > 1:
            first1 = _plus(first1, rows1, values, scale1, block, GROUP, N)
        if GROUPS > 2:
            first2 = _plus(first2, rows2, values, scale2, block, GROUP, N)
        if HALVES == 2:
            values = _weights(weight_ptr, top + half_rows, n, begin, k, width, K, EVEN, MAPPED)
            second0 = _plus(second0, rows0, values, scale0, other_block, GROUP, N)
            if GROUPS > 1:
                second1 = _plus(second1, rows1, values, scale1, other_block, GROUP, N)
            if GROUPS > 2:
                second2 = _plus(second2, rows2, values, scale2, other_block, GROUP, N)
        block, other_block = next_block, next_other
        scale0, scale1, scale2 = next0, next1, next2
    return (first0, first1, first2), (second0, second1, second2)


@triton.jit
def _rows(
    ptr, row, there, begin, k, width,
    COMPUTE: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, ROW_MAP: tl.constexpr,
):  # fmt: skip
    """A step's rows [64, K] of a group."""
    if ROW_MAP:
        values = ptr.load([begin, k])
    else:
        column = k + tl.arange(0, K)
        mask = there[:, None] if EVEN else there[:, None] & (column < width)[None, :]
        place = ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        values = tl.load(place, mask=mask, other=0.0)
    return rounded(values, COMPUTE)


@triton.jit
def _plus(total, rows, values, row_scale, block, GROUP: tl.constexpr, N: tl.constexpr):
    """total + a step of one group."""
    if GROUP == 128:
        tl.static_assert(N <= 128, "a tile is at most one block of scales high")
        part = multiply(rows, values, nothing(HIGH, N, False), False)
        total += scaled(part, row_scale, block, False)
    else:
        total = multiply(rows, values, total, False)
    return total
