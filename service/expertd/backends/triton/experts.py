"""The two GEMMs of the experts: the activation ends the first, the router weight the second."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.chain import follow, wait
from expertd.backends.triton.ends import end_first, end_second
from expertd.backends.triton.groups import HIGH, first_groups, second_groups
from expertd.backends.triton.loop import accumulate
from expertd.backends.triton.packed import accumulate_packed
from expertd.backends.triton.place import block_of, members, place, scales_of_half

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
    M: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHORT: tl.constexpr,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr,
    CHAINED: tl.constexpr,
):  # fmt: skip
    """rows [T, H] x w13 → inner [N, I], a row for each pair in the blocks' order.

    INNER: how inner is stored: "plain", "split" (by columns modulo 4), "fixed" (e4m3 by one scale
    an expert), "groups" (e4m3, a scale for 128 columns) or "mxfp8" (rounded to what mxfp8 holds).
    A block of at most SHORT rows is computed as one of that height: an expert's last ones are. One
    of more than M rows has MORE, where rows are SPLIT and SWAPPED.
    """
    # The second GEMM's programs would crowd where these leave room: they come when these are done.
    wait(CHAINED)
    block, tile = place(most, (inner + N - 1) // N, together)
    expert, begin, count = block_of(
        block, ids_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held, SORTED, M + MORE
    )
    if expert < 0:
        return
    if GROUPED:
        if count <= SHORT:
            first_groups(
                rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, inner_ptr, inner_scale_ptr, order_ptr, expert, begin, count, tile,
                top_k, width, inner, alpha, beta, limit,
                KIND, GATED, ON_INPUT, INNER, END_SCALE, ROW_SCALED, BIASED,
                GROUP, ROWS, COMPUTE, SHORT // HIGH, N, K, EVEN, MAPPED,
            )  # fmt: skip
        else:
            first_groups(
                rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, inner_ptr, inner_scale_ptr, order_ptr, expert, begin, count, tile,
                top_k, width, inner, alpha, beta, limit,
                KIND, GATED, ON_INPUT, INNER, END_SCALE, ROW_SCALED, BIASED,
                GROUP, ROWS, COMPUTE, M // HIGH, N, K, EVEN, MAPPED,
            )  # fmt: skip
    else:
        if SHORT > 0:  # noqa: SIM102 (the outer one is decided when this is compiled)
            if count <= SHORT:
                _first_tile(
                    rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                    router_ptr, inner_ptr, inner_scale_ptr,
                    order_ptr, expert, begin, count, tile, top_k, width, inner, alpha, beta, limit,
                    KIND, GATED, ON_INPUT, INNER, SORTED, END_SCALE, ROW_SCALED, BIASED,
                    FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
                    SHORT, 0, N, K, EVEN, SWAPPED, MAPPED,
                )  # fmt: skip
                return
        if MORE > 0:  # noqa: SIM102
            if count > M:
                _first_tile(
                    rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                    router_ptr, inner_ptr, inner_scale_ptr,
                    order_ptr, expert, begin, count, tile, top_k, width, inner, alpha, beta, limit,
                    KIND, GATED, ON_INPUT, INNER, SORTED, END_SCALE, ROW_SCALED, BIASED,
                    FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
                    M, MORE, N, K, EVEN, SWAPPED, MAPPED,
                )  # fmt: skip
                return
        _first_tile(
            rows_ptr, row_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
            router_ptr, inner_ptr, inner_scale_ptr, order_ptr, expert, begin, count, tile, top_k,
            width, inner, alpha, beta, limit,
            KIND, GATED, ON_INPUT, INNER, SORTED, END_SCALE, ROW_SCALED, BIASED,
            FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
            M, 0, N, K, EVEN, SWAPPED, MAPPED,
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
    M: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr,
):  # fmt: skip
    """One tile of the first GEMM, its activation and its rows' next form."""
    row, there, pair = members(begin, count, order_ptr, SORTED, M, 0)
    HALVES: tl.constexpr = 2 if GATED else 1
    LITTLE: tl.constexpr = MORE if MORE > 0 else 16
    n = tl.minimum(tile * N + tl.arange(0, N), inner - 1)
    scales = scales_of_half(scale_ptr, inner, width, GROUP)
    token = (pair // top_k).to(tl.int64)
    top = expert * HALVES * inner
    scales_ptr = scale_ptr + expert * HALVES * scales
    if SPLIT and SWAPPED:
        more_row, more_there, more_pair = members(begin, count, order_ptr, SORTED, LITTLE, M)
        more_token = (more_pair // top_k).to(tl.int64)
        up, gate, more_up, more_gate = accumulate_packed(
            rows_ptr, rows_ptr, token, there, 0, more_token, more_there,
            weight_ptr, scales_ptr, top, n, tile * N, inner, scales, width,
            HALVES, FORMAT, GROUP, SCALE, COMPUTE, M, MORE, N, K, EVEN, SWAPPED, MAPPED, False,
        )  # fmt: skip
        if MORE > 0:
            end_first(
                more_up, more_gate, more_row, more_there, more_pair, more_token, row_scale_ptr,
                end_scale_ptr, bias_ptr, router_ptr, inner_ptr, inner_scale_ptr,
                expert, tile, inner, alpha, beta, limit,
                KIND, GATED, ON_INPUT, INNER, END_SCALE, ROW_SCALED, BIASED, MORE, N, SWAPPED,
            )  # fmt: skip
    else:
        up, gate = accumulate(
            rows_ptr, row_scale_ptr, token, there, 0,
            weight_ptr, scales_ptr, top, n, tile * N, inner, scales, width,
            HALVES, FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
            M, N, K, EVEN, SWAPPED, MAPPED, False,
        )  # fmt: skip
    end_first(
        up, gate, row, there, pair, token, row_scale_ptr, end_scale_ptr, bias_ptr, router_ptr,
        inner_ptr, inner_scale_ptr, expert, tile, inner, alpha, beta, limit,
        KIND, GATED, ON_INPUT, INNER, END_SCALE, ROW_SCALED, BIASED, M, N, SWAPPED,
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
    M: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SHORT: tl.constexpr,
    GROUPED: tl.constexpr, EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr,
    ROW_MAP: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """inner [N, I] x w2 → parts [T * K, H], each pair's weighted part of its row's sum.

    inner_map: inner as a tensor map of tiles M high, where ROW_MAP.
    """
    follow(CHAINED)
    block, tile = place(most, (hidden + N - 1) // N, together)
    expert, begin, count = block_of(
        block, ids_ptr, ends_ptr, expert_ptr, start_ptr, first_expert, held, SORTED, M + MORE
    )
    if expert < 0:
        return
    if GROUPED:
        if count <= SHORT:
            second_groups(
                inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
                ON_INPUT, END_SCALE, ROW_SCALED, BIASED,
                GROUP, ROWS, COMPUTE, SHORT // HIGH, N, K, EVEN, MAPPED,
            )  # fmt: skip
        else:
            second_groups(
                inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
                ON_INPUT, END_SCALE, ROW_SCALED, BIASED,
                GROUP, ROWS, COMPUTE, M // HIGH, N, K, EVEN, MAPPED,
            )  # fmt: skip
    else:
        if SHORT > 0:  # noqa: SIM102 (the outer one is decided when this is compiled)
            if count <= SHORT:
                _second_tile(
                    inner_ptr, inner_ptr, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr,
                    bias_ptr, router_ptr, parts_ptr, order_ptr, expert, begin, count, tile,
                    width, hidden, ON_INPUT, SORTED, END_SCALE, ROW_SCALED, BIASED,
                    FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
                    SHORT, 0, N, K, EVEN, SWAPPED, MAPPED, False,
                )  # fmt: skip
                return
        if MORE > 0:  # noqa: SIM102
            if count > M:
                _second_tile(
                    inner_ptr, inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr,
                    bias_ptr, router_ptr, parts_ptr, order_ptr, expert, begin, count, tile,
                    width, hidden, ON_INPUT, SORTED, END_SCALE, ROW_SCALED, BIASED,
                    FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
                    M, MORE, N, K, EVEN, SWAPPED, MAPPED, ROW_MAP,
                )  # fmt: skip
                return
        _second_tile(
            inner_ptr, inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
            router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
            ON_INPUT, SORTED, END_SCALE, ROW_SCALED, BIASED,
            FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
            M, 0, N, K, EVEN, SWAPPED, MAPPED, ROW_MAP,
        )  # fmt: skip


@triton.jit
def _second_tile(
    inner_ptr, inner_map, inner_scale_ptr, weight_ptr, scale_ptr, end_scale_ptr, bias_ptr,
    router_ptr, parts_ptr, order_ptr, expert, begin, count, tile, width, hidden,
    ON_INPUT: tl.constexpr,
    SORTED: tl.constexpr, END_SCALE: tl.constexpr, ROW_SCALED: tl.constexpr, BIASED: tl.constexpr,
    FORMAT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, ROWS: tl.constexpr,
    SPLIT: tl.constexpr, COMPUTE: tl.constexpr,
    M: tl.constexpr, MORE: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    EVEN: tl.constexpr, SWAPPED: tl.constexpr, MAPPED: tl.constexpr, ROW_MAP: tl.constexpr,
):  # fmt: skip
    """One tile of the second GEMM, weighted."""
    LITTLE: tl.constexpr = MORE if MORE > 0 else 16
    row, there, pair = members(begin, count, order_ptr, SORTED, M, 0)
    n = tl.minimum(tile * N + tl.arange(0, N), hidden - 1)
    scales_ptr = scale_ptr + expert * scales_of_half(scale_ptr, hidden, width, GROUP)
    if SPLIT and SWAPPED:
        more, more_there, more_pair = members(begin, count, order_ptr, SORTED, LITTLE, M)
        total, _, more_total, _ = accumulate_packed(
            inner_ptr, inner_map, row, there, begin, more, more_there,
            weight_ptr, scales_ptr, expert * hidden, n, tile * N, 0, 0, width,
            1, FORMAT, GROUP, SCALE, COMPUTE, M, MORE, N, K, EVEN, SWAPPED, MAPPED, ROW_MAP,
        )  # fmt: skip
        if MORE > 0:
            end_second(
                more_total, more, more_there, more_pair, inner_scale_ptr, end_scale_ptr, bias_ptr,
                router_ptr, parts_ptr, expert, tile, hidden,
                ON_INPUT, END_SCALE, ROW_SCALED, BIASED, MORE, N, SWAPPED,
            )  # fmt: skip
    else:
        total, _ = accumulate(
            inner_map, inner_scale_ptr, row, there, begin,
            weight_ptr, scales_ptr, expert * hidden, n, tile * N, 0, 0, width,
            1, FORMAT, GROUP, SCALE, ROWS, SPLIT, COMPUTE,
            M, N, K, EVEN, SWAPPED, MAPPED, ROW_MAP,
        )  # fmt: skip
    end_second(
        total, row, there, pair, inner_scale_ptr, end_scale_ptr, bias_ptr, router_ptr, parts_ptr,
        expert, tile, hidden, ON_INPUT, END_SCALE, ROW_SCALED, BIASED, M, N, SWAPPED,
    )  # fmt: skip
