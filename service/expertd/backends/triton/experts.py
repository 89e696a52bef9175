"""The two GEMMs of the experts: the activation ends the first, the router weight the second."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.activation import activate
from expertd.backends.triton.chain import follow, wait
from expertd.backends.triton.dot import rounded, upright
from expertd.backends.triton.loop import accumulate, scales_of_row
from expertd.backends.triton.quantize import quantized, through_mxfp8, to_e4m3

ANY = ["first_expert", "held", "top_k", "most", "together"]
"""Numbers that change from call to call, and must not compile anything."""
ANYWHERE = ["router_ptr", "ids_ptr", "order_ptr", "ends_ptr", "expert_ptr", "start_ptr"]
"""Where a call's numbers lie decides nothing either: they are read one by one."""


@triton.jit(do_not_specialize=ANY, do_not_specialize_on_alignment=ANYWHERE)
def first_gemm(
    rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, inner_ptr, inner_scale_ptr,
    ids_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held, top_k, most, together,
    width, inner, alpha, beta, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, ON_INPUT: tl.constexpr, INNER: tl.constexpr,
    SORTED: tl.constexpr, END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHORT: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """rows [T, H] x w13 → inner [N, I], a row for each pair in the blocks' order.

    INNER: how inner is stored: "plain", "split" (by columns modulo 4), "fixed" (e4m3 by one scale
    an expert), "groups" (e4m3, a scale for 128 columns) or "mxfp8" (rounded to what mxfp8 holds).
    A block of at most SHORT rows is computed as one of that height: an expert's last ones are.
    """
    # The second GEMM's programs would crowd where these leave room: they come when these are done.
    wait(CHAINED)
    block, tile = _place(most, (inner + N - 1) // N, together)
    expert, begin, count = _block(
        block, ids_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held, SORTED, M
    )
    if expert < 0:
        return
    if SHORT > 0:  # noqa: SIM102 (the outer one is decided when this is compiled)
        if count <= SHORT:
            _first_tile(
                rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, inner_ptr, inner_scale_ptr,
                order_ptr, expert, begin, count, tile, top_k, width, inner, alpha, beta, limit,
                KIND, GATED, ON_INPUT, INNER, SORTED, END_SCALE, ROW_SCALED, BIASED,
                FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
                SHORT, N, K, EVEN, SWAPPED, MAPPED,
            )  # fmt: skip
            return
    _first_tile(
        rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
        router_ptr, inner_ptr, inner_scale_ptr, order_ptr, expert, begin, count, tile, top_k,
        width, inner, alpha, beta, limit,
        KIND, GATED, ON_INPUT, INNER, SORTED, END_SCALE, ROW_SCALED, BIASED,
        FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
        M, N, K, EVEN, SWAPPED, MAPPED,
    )  # fmt: skip


@triton.jit
def _first_tile(
    rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, inner_ptr, inner_scale_ptr, order_ptr, expert, begin, count, tile, top_k,
    width, inner, alpha, beta, limit,
    KIND: tl.constexpr, GATED: tl.constexpr, ON_INPUT: tl.constexpr, INNER: tl.constexpr,
    SORTED: tl.constexpr, END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """One tile of the first GEMM, its activation and its rows' next form."""
    row, there, pair = _members(begin, count, order_ptr, SORTED, M)
    HALVES: tl.constexpr = 2 if GATED else 1
    column = tile * N + tl.arange(0, N)
    inside = column < inner
    n = tl.where(inside, column, inner - 1)
    scales = _scales_of_half(scale_ptr, inner, width, GROUP)
    token = (pair // top_k).to(tl.int64)
    up, gate = accumulate(
        rows_ptr, row_scale_ptr, token, there, 0,
        weight_ptr, scale_ptr + expert * HALVES * scales,
        expert * HALVES * inner, n, tile * N, inner, scales, width,
        HALVES, FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE, M, N, K, EVEN, SWAPPED, MAPPED, False,
    )  # fmt: skip
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


@triton.jit(do_not_specialize=ANY, do_not_specialize_on_alignment=ANYWHERE)
def second_gemm(
    inner_ptr, inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, parts_ptr,
    ids_ptr, order_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held, top_k, most, together,
    width, hidden,
    ON_INPUT: tl.constexpr,
    SORTED: tl.constexpr, END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHORT: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """inner [N, I] x w2 → parts [T * K, H], each pair's weighted part of its row's sum.

    inner_map: inner as a tensor map of tiles M high, where MAPPED and SORTED.
    """
    follow(CHAINED)
    block, tile = _place(most, (hidden + N - 1) // N, together)
    expert, begin, count = _block(
        block, ids_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held, SORTED, M
    )
    if expert < 0:
        return
    if SHORT > 0:  # noqa: SIM102 (the outer one is decided when this is compiled)
        if count <= SHORT:
            _second_tile(
                inner_ptr, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
                ON_INPUT, SORTED, END_SCALE, ROW_SCALED, BIASED,
                FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
                SHORT, N, K, EVEN, SWAPPED, MAPPED, False,
            )  # fmt: skip
            return
    _second_tile(
        inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
        router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
        ON_INPUT, SORTED, END_SCALE, ROW_SCALED, BIASED,
        FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
        M, N, K, EVEN, SWAPPED, MAPPED, MAPPED and SORTED,
    )  # fmt: skip


@triton.jit
def _second_tile(
    inner_ptr, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
    ON_INPUT: tl.constexpr,
    SORTED: tl.constexpr, END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr, ROW_MAP: tl.constexpr,
):  # fmt: skip
    """One tile of the second GEMM, weighted."""
    row, there, pair = _members(begin, count, order_ptr, SORTED, M)
    column = tile * N + tl.arange(0, N)
    inside = column < hidden
    n = tl.where(inside, column, hidden - 1)
    total, _ = accumulate(
        inner_ptr, inner_scale_ptr, row, there, begin,
        weight_ptr, scale_ptr + expert * _scales_of_half(scale_ptr, hidden, width, GROUP),
        expert * hidden, n, tile * N, 0, 0, width,
        1, FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE, M, N, K, EVEN, SWAPPED, MAPPED, ROW_MAP,
    )  # fmt: skip
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
def _place(most, tiles, together):
    """This program's block and tile; together, blocks in turn share a tile of the weights."""
    program = tl.program_id(0)
    begin = program // (together * tiles) * together
    within = program % (together * tiles)
    blocks = tl.minimum(most - begin, together)
    return begin + within % blocks, within // blocks


@triton.jit
def _block(
    block, ids_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held,
    SORTED: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """A block's expert (-1: none), its first row of inner, and how many it has.

    Not SORTED, a block is one pair.
    """
    if SORTED:
        expert = tl.load(expert_ptr + block)
        begin = tl.load(start_ptr + block)
        count = tl.minimum(tl.load(ends_ptr + tl.maximum(expert, 0) + 1) - begin, M)
    else:
        expert = tl.load(ids_ptr + block) - first_expert
        expert = tl.where((expert >= 0) & (expert < held), expert, -1)
        begin = block
        count = 1
    return expert.to(tl.int64), begin, count


@triton.jit
def _members(begin, count, order_ptr, SORTED: tl.constexpr, M: tl.constexpr):
    """A block's rows of inner, which of them are there (others repeat the first), their pairs."""
    lane = tl.arange(0, M)
    there = lane < count
    row = begin + tl.where(there, lane, 0)
    pair = row
    if SORTED:
        pair = tl.load(order_ptr + row)
    return row.to(tl.int64), there, pair


@triton.jit
def _scales_of_half(ptr, rows, width, GROUP: tl.constexpr):
    """How many scales of the loop a half of so many rows has."""
    if GROUP == 128:
        count = ((rows + 127) // 128) * ((width + 127) // 128)
    elif GROUP > 0:
        count = rows * scales_of_row(ptr, width, GROUP)
    else:
        count = 0
    return count


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
        _store_split(start, there, inner // 4, tile, values, M, N)
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


@triton.jit
def _store_split(start, there, words, tile, values, M: tl.constexpr, N: tl.constexpr):
    """Columns of one remainder by 4 after those of another."""
    even, odd = tl.split(tl.reshape(values, (M, N // 4, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    column = tile * (N // 4) + tl.arange(0, N // 4)
    mask = there[:, None] & (column < words)[None, :]
    place = start + column[None, :]
    KIND: tl.constexpr = start.dtype.element_ty
    tl.store(place, rounded(first, KIND), mask=mask)
    tl.store(place + words, rounded(second, KIND), mask=mask)
    tl.store(place + 2 * words, rounded(third, KIND), mask=mask)
    tl.store(place + 3 * words, rounded(fourth, KIND), mask=mask)
