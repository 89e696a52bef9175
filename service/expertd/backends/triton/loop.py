"""The K loop that both GEMMs run: rows times one or two matrices of an expert.

FORMAT  how the weights are stored: "plain" is multiplied as it is (bf16, fp16, or fp8 with fp8
        rows), "e4m3" is decoded, "e2m1" and "int4" too, four values a word
GROUP   how many neighbours along K share a weight scale in the loop: 0 none, 128 blocks (128 rows
        share them too, the sum is scaled), 16 or 32 groups (the values are scaled)
ROWS    what the rows are: "plain" (cast to COMPUTE), "fp8" (scaled after the loop, if at all),
        "fp8_groups" (a scale for 128 neighbours)
SPLIT   rows of packed weights, which come in words of four: whether the first, fifth, … of each 32
        columns lie before the second, sixth, … and so on in memory
MAPPED  whether the weights come as a tensor map, which the copy engine of SM90 and later reads;
ROW_MAP the same of the rows, which then are neighbours in memory
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.decode import decode, decode_scale, decode_words, times_groups
from expertd.backends.triton.dot import multiply, nothing, rounded, scaled

FEW, WIDE = tl.constexpr(16), tl.constexpr(256)
"""Tiles of more rows and of fewer columns have so many threads that each has less than 4 bytes of a
step's group scales, which Triton would wait for in every step: these are read a step ahead."""

TALL, DEEP = tl.constexpr(32), tl.constexpr(256)
"""The scales of so many rows, for so many columns of each, lie together."""


@triton.jit
def accumulate(
    rows_ptr,
    row_scale_ptr,
    row,
    there,
    row_begin,
    weight_ptr,
    scale_ptr,
    top,
    n,
    begin,
    half_rows,
    half_scales,
    width,
    HALVES: tl.constexpr,
    FORMAT: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    EVEN: tl.constexpr,
    SWAPPED: tl.constexpr,
    MAPPED: tl.constexpr,
    ROW_MAP: tl.constexpr,
):
    """rows[row] [M, width] x weights[top + n] [N, width]^T, one total for each half of the matrix.

    top is the expert's first row among all experts', scale_ptr is the expert's own; half_rows and
    half_scales are how far the second half is from the first. row and n are in bounds everywhere;
    row_begin and begin are the first of them; rows that are not there need not be read. EVEN: K
    divides width.
    """
    first = nothing(M, N, SWAPPED)
    second = nothing(M, N, SWAPPED)
    # Read a step ahead: Triton overlaps loads of 4 bytes and more, of what is multiplied, only.
    scale = _scale_ahead(scale_ptr, n, begin, 0, width, GROUP, M, N, K)
    other = _scale_ahead(scale_ptr + half_scales, n, begin, 0, width, GROUP, M, N, K)
    row_scale = _row_scale(row_scale_ptr, row, 0, width, ROWS)
    for k in range(0, width, K):
        ahead = tl.where(k + K < width, k + K, 0)
        next_scale = _scale_ahead(scale_ptr, n, begin, ahead, width, GROUP, M, N, K)
        next_other = _scale_ahead(
            scale_ptr + half_scales, n, begin, ahead, width, GROUP, M, N, K
        )  # fmt: skip
        next_row = _row_scale(row_scale_ptr, row, ahead, width, ROWS)
        rows = _step_rows(
            rows_ptr, row, there, row_begin, k, width,
            FORMAT, GROUP, SPLIT, COMPUTE, K, EVEN, ROW_MAP,
        )  # fmt: skip
        first = _add(
            first, rows, row_scale, weight_ptr, scale_ptr, scale, top, n, begin, k, width,
            FORMAT, GROUP, SCALE, COMPUTE, M, N, K, EVEN, SWAPPED, MAPPED,
        )  # fmt: skip
        if HALVES == 2:
            second = _add(
                second, rows, row_scale, weight_ptr, scale_ptr + half_scales, other,
                top + half_rows, n, begin, k, width,
                FORMAT, GROUP, SCALE, COMPUTE, M, N, K, EVEN, SWAPPED, MAPPED,
            )  # fmt: skip
        scale, other, row_scale = next_scale, next_other, next_row
    return first, second


@triton.jit
def _step_rows(
    rows_ptr, row, there, row_begin, k, width,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
    K: tl.constexpr, EVEN: tl.constexpr, ROW_MAP: tl.constexpr,
):  # fmt: skip
    """A step's rows: every fourth of their columns, four times, where weights come in words."""
    if FORMAT == "e2m1" or FORMAT == "int4":
        words = width // GROUP * (GROUP // 4)  # in a row; a multiple of 8 where GROUP is 32
        if SPLIT:
            rows = _planes(rows_ptr, row, there, k, width, K, EVEN)
        else:
            rows = _interleaved(rows_ptr, row, there, k // 4, words, K // 4, EVEN)
    else:
        place = [row_begin, k]
        tile = rows_ptr.load(place) if ROW_MAP else _tile(rows_ptr, row, k, width, K, EVEN)
        rows = (rounded(tile, COMPUTE),)
    return rows


@triton.jit
def _add(
    total, rows, row_scale, weight_ptr, scale_ptr, ahead, top, n, begin, k, width,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, EVEN: tl.constexpr, SWAPPED: tl.constexpr,
    MAPPED: tl.constexpr,
):  # fmt: skip
    """total + one K step of one half."""
    if FORMAT == "e2m1" or FORMAT == "int4":
        words_of_row = width // GROUP * (GROUP // 4)
        words = _weights(weight_ptr, top, n, begin, k // 4, words_of_row, K // 4, EVEN, MAPPED)
        scale = ahead if M > FEW and N < WIDE else _group_scales(scale_ptr, n, k, width, GROUP, K)
        values = decode_words(words, scale, FORMAT, SCALE, COMPUTE)
        for nibble in tl.static_range(4):
            total = multiply(rows[nibble], values[nibble], total, SWAPPED)
    else:
        values = _weights(weight_ptr, top, n, begin, k, width, K, EVEN, MAPPED)
        values = decode(values, FORMAT)
        if GROUP == 128:
            tl.static_assert(K == 128 and N <= 128, "a tile is one block wide and at most one high")
            part = multiply(rows[0], rounded(values, COMPUTE), nothing(M, N, SWAPPED), SWAPPED)
            total += scaled(part, row_scale, ahead, SWAPPED)
        else:
            if GROUP == 32:
                scale = (
                    ahead
                    if M > FEW and N < WIDE
                    else _group_scales(scale_ptr, n, k, width, GROUP, K)
                )
                values = times_groups(values, decode_scale(scale, SCALE))
            total = multiply(rows[0], rounded(values, COMPUTE), total, SWAPPED)
    return total


@triton.jit
def _weights(
    weight_ptr, top, n, begin, k, width,
    K: tl.constexpr, EVEN: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """[N, K] of the weights as stored. A map reads what follows a half that ends within the tile:
    sums of columns that nobody stores."""
    if MAPPED:
        tile = weight_ptr.load([(top + begin).to(tl.int32), k])
    else:
        tile = _tile(weight_ptr, top + n, k, width, K, EVEN)
    return tile


@triton.jit
def _scale_ahead(
    ptr, n, begin, k, width,
    GROUP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """A step's weight scales, of blocks or of groups, if they are read a step ahead; else 1."""
    if GROUP > 0 and GROUP < 128 and M > FEW and N < WIDE:
        scale = _group_scales(ptr, n, k, width, GROUP, K)
    else:
        scale = _block_scale(ptr, begin, k, width, GROUP)
    return scale


@triton.jit
def _block_scale(ptr, begin, k, width, GROUP: tl.constexpr):
    """A step's weight scale, where a block of 128 x 128 shares one."""
    place = begin // 128 * ((width + 127) // 128) + k // 128
    return tl.load(ptr + place) if GROUP == 128 else 1.0


@triton.jit
def _group_scales(ptr, n, k, width, GROUP: tl.constexpr, K: tl.constexpr):
    """A step's weight scales [N, K / GROUP] as stored; those beyond width are of no matter.

    So many of TALL rows lie together as belong to DEEP columns: a step's are read in one go.
    """
    tl.static_assert(K <= DEEP, "a step may end beyond the row, but within its padding")
    tile, piece = place_of_scales(n, k, width, GROUP, K)
    column = piece + tl.arange(0, K // GROUP)
    return tl.load(ptr + tile[:, None] + column[None, :])


@triton.jit
def place_of_scales(n, k, width, GROUP: tl.constexpr, K: tl.constexpr):
    """Where the scales of each row n begin, and how far from there those of step k lie."""
    EACH: tl.constexpr = DEEP // GROUP
    tile = n.to(tl.int64) // TALL * (TALL * scales_of_row(width, GROUP)) + n % TALL * EACH
    piece = k // DEEP * (TALL * EACH) + (k // K - k // DEEP * (DEEP // K)) * (K // GROUP)
    return tile, piece


@triton.jit
def scales_of_row(width, GROUP: tl.constexpr):
    """How many group scales a row has with its padding (weights.py lays them out)."""
    return (width + DEEP - 1) // DEEP * (DEEP // GROUP)


@triton.jit
def _row_scale(ptr, row, k, width, ROWS: tl.constexpr):
    """A step's scales of the rows [M], where 128 columns share one."""
    place = row * ((width + 127) // 128) + k // 128
    return tl.load(ptr + place) if ROWS == "fp8_groups" else 1.0


@triton.jit
def _tile(ptr, row, k, width, K: tl.constexpr, EVEN: tl.constexpr):
    """[rows, K] of a matrix from column k on; beyond its width, zeros."""
    column = k + tl.arange(0, K)
    place = ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    return tl.load(place) if EVEN else tl.load(place, mask=(column < width)[None, :], other=0.0)


@triton.jit
def _planes(ptr, row, there, k, width, K: tl.constexpr, EVEN: tl.constexpr):
    """Four pieces of rows that were split into columns of one remainder each."""
    word = tl.arange(0, K // 4)
    column = k + word // 8 * 32 + word % 8
    place = ptr + row.to(tl.int64)[:, None] * width + column[None, :]
    mask = there[:, None] if EVEN else there[:, None] & (column < width)[None, :]
    first = tl.load(place, mask=mask, other=0.0)
    second = tl.load(place + 8, mask=mask, other=0.0)
    third = tl.load(place + 16, mask=mask, other=0.0)
    fourth = tl.load(place + 24, mask=mask, other=0.0)
    return first, second, third, fourth


@triton.jit
def _interleaved(ptr, row, there, k, words, K: tl.constexpr, EVEN: tl.constexpr):
    """The same of rows as they are, read as integers of four values."""
    four = ptr.to(tl.pointer_type(tl.int64), bitcast=True)
    column = k + tl.arange(0, K)
    place = four + row.to(tl.int64)[:, None] * words + column[None, :]
    mask = there[:, None] if EVEN else there[:, None] & (column < words)[None, :]
    values = tl.load(place, mask=mask, other=0)
    KIND: tl.constexpr = ptr.dtype.element_ty
    first = values.to(tl.int16).to(KIND, bitcast=True)
    second = (values >> 16).to(tl.int16).to(KIND, bitcast=True)
    third = (values >> 32).to(tl.int16).to(KIND, bitcast=True)
    fourth = (values >> 48).to(tl.int16).to(KIND, bitcast=True)
    return first, second, third, fourth
