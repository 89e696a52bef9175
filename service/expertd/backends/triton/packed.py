"""The K loop of packed weights over rows in the order of their nibbles (rows.py, or the first GEMM,
puts them into it): one product a step, which the tensor cores compute while more is decoded.

A block may be M rows and MORE: what is decoded for the first is multiplied by both. So an expert
with a few rows above a power of two needs no second block, which would decode all anew.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.decode import decode_words, in_turn
from expertd.backends.triton.dot import multiply, nothing
from expertd.backends.triton.loop import _group_scales, _weights, present


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
            rows = present(rows_ptr, row, there, k, width, K, EVEN)
        more_rows = rows
        if MORE > 0:
            more_rows = present(rows_ptr, more, more_there, k, width, K, EVEN)
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
    scale = _group_scales(scale_ptr, n, k, width, GROUP, K, True)
    return in_turn(decode_words(words, scale, FORMAT, SCALE, COMPUTE))
