"""Where a program of a GEMM works: its tile, its block, the rows in it, its expert's scales."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.loop import scales_of_row


@triton.jit
def place(most, tiles, together):
    """This program's block and tile; together, blocks in turn share a tile of the weights."""
    program = tl.program_id(0)
    begin = program // (together * tiles) * together
    within = program % (together * tiles)
    blocks = tl.minimum(most - begin, together)
    return begin + within % blocks, within // blocks


@triton.jit
def block_of(
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
def members(begin, count, order_ptr, SORTED: tl.constexpr, M: tl.constexpr, FROM: tl.constexpr):
    """A block's M rows of inner from its row FROM on, which of them are there (others repeat the
    block's first), and their pairs."""
    lane = FROM + tl.arange(0, M)
    there = lane < count
    row = begin + tl.where(there, lane, 0)
    pair = row
    if SORTED:
        pair = tl.load(order_ptr + row)
    return row.to(tl.int64), there, pair


@triton.jit
def scales_of_half(ptr, rows, width, GROUP: tl.constexpr):
    """How many scales of the loop a half of so many rows has."""
    if GROUP == 128:
        count = ((rows + 127) // 128) * ((width + 127) // 128)
    elif GROUP > 0:
        count = rows * scales_of_row(width, GROUP)
    else:
        count = 0
    return count
