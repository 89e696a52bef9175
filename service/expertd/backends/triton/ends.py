"""What follows the K loop of a GEMM: scales, bias, activation or router weight, and the store."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.activation import activate
from expertd.backends.triton.dot import rounded, upright
from expertd.backends.triton.quantize import quantized, through_mxfp8, to_e4m3


@triton.jit
def end_first(
    up, gate, row, there, pair, token, row_scale_ptr, end_scale_ptr, bias_ptr, router_ptr,
    inner_ptr, inner_scale_ptr, expert, tile, inner, alpha, beta, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, ON_INPUT: tl.constexpr, INNER: tl.constexpr,
    END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """Totals of both halves → rows of inner, in the form that the second GEMM reads."""
    HALVES: tl.constexpr = 2 if GATED else 1
    column = tile * N + tl.arange(0, N)
    inside = column < inner
    n = tl.where(inside, column, inner - 1)
    factor = tl.full((M,), 1.0, dtype=tl.float32)
    if ROW_SCALED:
        factor *= tl.load(row_scale_ptr + token)
    if ON_INPUT:
        factor *= tl.load(router_ptr + pair)
    half = expert * HALVES
    up = _finished(up, factor, end_scale_ptr, bias_ptr, half, inner, n, END_SCALE, BIASED, SWAPPED)
    if GATED:
        gate = _finished(
            gate, factor, end_scale_ptr, bias_ptr, half + 1, inner, n, END_SCALE, BIASED, SWAPPED
        )
    else:
        gate = up
    values = activate(up, gate, alpha, beta, limit, KIND)
    _store_inner(
        inner_ptr, inner_scale_ptr, row, there, column, inside, inner, values, expert, tile,
        INNER, M, N,
    )  # fmt: skip


@triton.jit
def end_second(
    total, row, there, pair, inner_scale_ptr, end_scale_ptr, bias_ptr, router_ptr, parts_ptr,
    expert, tile, hidden,
    ON_INPUT: tl.constexpr, END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr,
    BIASED: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """A total → weighted parts of rows' sums."""
    column = tile * N + tl.arange(0, N)
    inside = column < hidden
    n = tl.where(inside, column, hidden - 1)
    factor = tl.full((M,), 1.0, dtype=tl.float32)
    if ROW_SCALED:
        factor *= tl.load(inner_scale_ptr + row)
    total = _finished(
        total, factor, end_scale_ptr, bias_ptr, expert, hidden, n, END_SCALE, BIASED, SWAPPED
    )
    if not ON_INPUT:
        total *= tl.load(router_ptr + pair)[:, None]
    place = parts_ptr + pair.to(tl.int64)[:, None] * hidden + column[None, :]
    mask = there[:, None] & inside[None, :]
    tl.store(place, rounded(total, parts_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _finished(
    total, factor, end_scale_ptr, bias_ptr, half, rows, n,
    END_SCALE: tl.constexpr, BIASED: tl.constexpr, SWAPPED: tl.constexpr,
):  # fmt: skip
    """A half's total upright, with the scales that follow the loop and the bias."""
    total = upright(total, SWAPPED) * factor[:, None]
    if END_SCALE == "half":
        total *= tl.load(end_scale_ptr + half)
    elif END_SCALE == "row":
        total *= tl.load(end_scale_ptr + half * rows + n)[None, :]
    if BIASED:
        total += tl.load(bias_ptr + half * rows + n).to(tl.float32)[None, :]
    return total


@triton.jit
def _store_inner(
    ptr, scale_ptr, row, there, column, inside, inner, values, expert, tile,
    INNER: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    start = ptr + row[:, None] * inner
    mask = there[:, None] & inside[None, :]
    if INNER == "split":
        words = tl.reshape(values, (M, N // 32, 8, 4))
        values = tl.reshape(tl.permute(words, (0, 1, 3, 2)), (M, N))
        tl.store(start + column[None, :], rounded(values, ptr.dtype.element_ty), mask=mask)
    elif INNER == "groups":
        tl.static_assert(N == 128, "a tile is one group wide")
        codes, scale = quantized(tl.where(mask, values, 0.0))
        tl.store(start + column[None, :], codes, mask=mask)
        tl.store(scale_ptr + row * ((inner + 127) // 128) + tile, scale, mask=there)
    elif INNER == "fixed":
        codes = to_e4m3(values / tl.load(scale_ptr + expert))
        tl.store(start + column[None, :], codes, mask=mask)
    elif INNER == "mxfp8":
        grouped = tl.reshape(values, (M * (N // 32), 32))
        values = rounded(tl.reshape(through_mxfp8(grouped), (M, N)), ptr.dtype.element_ty)
        tl.store(start + column[None, :], values, mask=mask)
    else:
        tl.store(start + column[None, :], rounded(values, ptr.dtype.element_ty), mask=mask)
