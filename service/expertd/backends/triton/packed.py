"""The K loop of packed weights, decoded in registers as the left operand, over rows in the order of
their nibbles: one product a step, which the tensor cores compute while more is decoded.

A block may be M rows and MORE: what is decoded for the first is multiplied by both. So an expert
with a few rows above a power of two needs no second block, which would decode all anew.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.decode import decode_words, in_turn
from expertd.backends.triton.dot import multiply, nothing
from expertd.backends.triton.loop import _weights, place_of_scales

STORED = tl.constexpr({8: tl.uint8, 16: tl.uint16})
"""What holds a scale of so many bits."""


@triton.jit
def accumulate_packed(
    rows_ptr, rows_map, row, there, row_begin, more, more_there,
    weight_ptr, scale_ptr, top, n, begin, half_rows, half_scales, width,
    HALVES: tl.constexpr, FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    COMPUTE: tl.constexpr, M: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr, ROW_MAP: tl.constexpr,
):  # fmt: skip
    """loop.accumulate of rows and of more: the totals of both halves, and those of more.

    rows_map is rows_ptr as a tensor map of tiles M high, where ROW_MAP.
    """
    LITTLE: tl.constexpr = MORE if MORE > 0 else 16
    first = nothing(M, N, SWAPPED)
    second = nothing(M, N, SWAPPED)
    more_first = nothing(LITTLE, N, SWAPPED)
    more_second = nothing(LITTLE, N, SWAPPED)
    for k in range(0, width, K):
        if ROW_MAP:
            rows = rows_map.load([row_begin, k])
        else:
            rows = _present(rows_ptr, row, there, k, width, K, EVEN)
        more_rows = rows
        if MORE > 0:
            more_rows = _present(rows_ptr, more, more_there, k, width, K, EVEN)
        values = _decoded(
            weight_ptr, scale_ptr, top, n, begin, k, width,
            FORMAT, GROUP, SCALE, COMPUTE, K, EVEN, MAPPED,
        )  # fmt: skip
        first = multiply(rows, values, first, SWAPPED)
        if MORE > 0:
            more_first = multiply(more_rows, values, more_first, SWAPPED)
        if HALVES == 2:
            values = _decoded(
                weight_ptr, scale_ptr + half_scales, top + half_rows, n, begin, k, width,
                FORMAT, GROUP, SCALE, COMPUTE, K, EVEN, MAPPED,
            )  # fmt: skip
            second = multiply(rows, values, second, SWAPPED)
            if MORE > 0:
                more_second = multiply(more_rows, values, more_second, SWAPPED)
    return first, second, more_first, more_second


@triton.jit
def _decoded(
    weight_ptr, scale_ptr, top, n, begin, k, width,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr,
    K: tl.constexpr, EVEN: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """A step's weights [N, K] in the order of their nibbles."""
    width_in_words = width // GROUP * (GROUP // 4)
    words = _weights(weight_ptr, top, n, begin, k // 4, width_in_words, K // 4, EVEN, MAPPED)
    scale = _group_scales(scale_ptr, n, k, width, GROUP, K)
    return in_turn(decode_words(words, scale, FORMAT, SCALE, COMPUTE))


@triton.jit
def _group_scales(ptr, n, k, width, GROUP: tl.constexpr, K: tl.constexpr):
    """loop._group_scales, read as words of 4 bytes: Triton overlaps nothing smaller."""
    tile, piece = place_of_scales(n, k, width, GROUP, K)
    SIZE: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth
    EACH_WORD: tl.constexpr = 32 // SIZE
    TAKEN: tl.constexpr = min(EACH_WORD, K // GROUP)
    word = ptr.to(tl.pointer_type(tl.uint32), bitcast=True)
    column = piece // EACH_WORD + tl.arange(0, K // GROUP // TAKEN)
    words = tl.load(word + (tile // EACH_WORD)[:, None] + column[None, :])
    if TAKEN < EACH_WORD:
        words = words >> piece % EACH_WORD * SIZE
    if TAKEN == 4:
        words = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    elif TAKEN == 2:
        words = tl.join(words, words >> SIZE)
    scales = tl.reshape(words, (n.shape[0], K // GROUP)).to(STORED[SIZE])
    return scales.to(ptr.dtype.element_ty, bitcast=True)


@triton.jit
def _present(ptr, row, there, k, width, K: tl.constexpr, EVEN: tl.constexpr):
    """[rows, K] from column k on, zeros beyond their width; absent ones are not read."""
    column = k + tl.arange(0, K)
    mask = there[:, None] if EVEN else there[:, None] & (column < width)[None, :]
    place = ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(place, mask=mask, other=0.0)
