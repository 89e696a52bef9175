"""Who goes where: (row, slot) pairs sorted by expert and cut into blocks, all on the device.

A pair is row * K + slot. Pairs of no expert held here are in no block. Sorted pairs lie without
gaps; a block is a run of one expert's, so only its end has to be masked.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd.backends.triton.chain import chained, follow

FEW, CHUNK = 256, 1024
ALONE = 2 * CHUNK
"""Up to so many pairs, one program is faster than three launches."""
TURN = tl.constexpr(32)
ALIGNED = 64

Heights = tuple[int, int]
"""How many rows the blocks of the first and of the second GEMM have."""


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a call's GEMM; `most` bounds their number whatever the ids are.

    ids [T, K] and first, the first expert held; order [N] sorted pairs; ends [L + 1]: where each
    expert's pairs begin, and the last end; expert and start [most], expert -1 for no block.
    """

    ids: Tensor
    first: int
    most: int
    order: Tensor
    ends: Tensor
    expert: Tensor
    start: Tensor


def most_blocks(pairs: int, held: int, size: int) -> int:
    """The most blocks of a size that pairs of so many experts can need."""
    active = min(pairs, held)
    return active + (pairs - active) // size


def scratch_ints(pairs: int, held: int, heights: Heights) -> list[int]:
    """Elements of order, ends, experts' counts, pairs' ranks, and for each GEMM expert, start.

    Where many programs share the work, each chunk of pairs has counts, and its first places take
    that of ranks.
    """
    experts = triton.next_power_of_2(held + 1)
    counts, ranks = experts, pairs
    if pairs > ALONE:
        counts = ranks = triton.cdiv(pairs, CHUNK) * experts
    lengths = [pairs, held + 1, counts, ranks]
    for height in heights:
        lengths += [most_blocks(pairs, held, height)] * 2
    return [-(-length // ALIGNED) * ALIGNED for length in lengths]


def align(
    ids_TK: Tensor, first: int, held: int, heights: Heights, scratch: Tensor
) -> tuple[Blocks, Blocks]:
    """The pairs of ids [T, K], sorted once, in blocks of both GEMMs' heights.

    scratch is int32, as scratch_ints says.
    """
    pairs = ids_TK.numel()
    sizes = scratch_ints(pairs, held, heights)
    order, ends, counts, ranks, *lists = torch.split(scratch[: sum(sizes)], sizes)
    most = [most_blocks(pairs, held, height) for height in heights]
    where = (pairs, held, first)
    blocks = (ends, *lists, *most, *heights)
    experts = triton.next_power_of_2(held + 1)
    if pairs > ALONE:
        shared = {"EXPERTS": experts, "CHUNK": CHUNK} | chained(ids_TK.device)
        chunks = triton.cdiv(pairs, CHUNK)
        _count[(chunks,)](ids_TK, counts, *where, **shared)
        _place_and_cut[(chunks + 1,)](
            ids_TK, order, counts, ranks, chunks, *where, *blocks, num_warps=16, **shared
        )
    else:
        _align[(1,)](
            ids_TK,
            order,
            counts,
            ranks,
            *where,
            *blocks,
            EXPERTS=experts,
            CHUNK=CHUNK if pairs > FEW else FEW,
            num_warps=32 if pairs > FEW else 8,
            **chained(ids_TK.device),
        )
    return (
        Blocks(ids_TK, first, most[0], order, ends, lists[0], lists[1]),
        Blocks(ids_TK, first, most[1], order, ends, lists[2], lists[3]),
    )


NUMBERS = ["pairs", "held", "first", "chunks", "most", "second_most", "size"]
NUMBERS += ["second_size"]
"""They change from call to call, and must not compile anything."""


@triton.jit(do_not_specialize=NUMBERS)
def _align(
    ids_ptr,
    order_ptr,
    counts_ptr,
    ranks_ptr,
    pairs,
    held,
    first,
    ends_ptr,
    expert_ptr,
    start_ptr,
    second_expert_ptr,
    second_start_ptr,
    most,
    second_most,
    size,
    second_size,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One program does it all. A pair's place among its expert's may differ from run to run: its
    numbers do not depend on it, every pair being a row of its own until the sum over slots."""
    follow(CHAINED)
    lane = tl.arange(0, EXPERTS)
    tl.store(counts_ptr + lane, tl.zeros((EXPERTS,), dtype=tl.int32))
    tl.debug_barrier()
    for chunk in range(0, pairs, CHUNK):
        pair, expert, mine = _pairs(ids_ptr, chunk, pairs, held, first, CHUNK)
        rank = tl.atomic_add(counts_ptr + expert, 1, mask=mine, sem="relaxed", scope="cta")
        tl.store(ranks_ptr + pair, rank, mask=mine)
    tl.debug_barrier()
    # Past the first-level cache, where the atomics do not write.
    count = tl.load(counts_ptr + lane, cache_modifier=".cg")
    begin = tl.cumsum(count, 0) - count
    tl.store(ends_ptr + lane, begin, mask=lane <= held)
    _cut(expert_ptr, start_ptr, lane, begin, count, most, size, CHUNK)
    _cut(second_expert_ptr, second_start_ptr, lane, begin, count, second_most, second_size, CHUNK)
    tl.debug_barrier()
    for chunk in range(0, pairs, CHUNK):
        pair, expert, mine = _pairs(ids_ptr, chunk, pairs, held, first, CHUNK)
        place = tl.load(ends_ptr + expert, mask=mine, other=0)
        place += tl.load(ranks_ptr + pair, mask=mine, other=0)
        tl.store(order_ptr + place, pair, mask=mine)


@triton.jit(do_not_specialize=NUMBERS)
def _count(
    ids_ptr, counts_ptr, pairs, held, first,
    EXPERTS: tl.constexpr, CHUNK: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """How many of a chunk's pairs each expert has; behind the last, those of no expert here."""
    follow(CHAINED)
    chunk = tl.program_id(0)
    _, expert, mine = _pairs(ids_ptr, chunk * CHUNK, pairs, held, first, CHUNK)
    count = tl.histogram(tl.where(mine, expert, held), EXPERTS)
    tl.store(counts_ptr + chunk * EXPERTS + tl.arange(0, EXPERTS), count)


@triton.jit(do_not_specialize=NUMBERS)
def _place_and_cut(
    ids_ptr,
    order_ptr,
    counts_ptr,
    next_ptr,
    chunks,
    pairs,
    held,
    first,
    ends_ptr,
    expert_ptr,
    start_ptr,
    second_expert_ptr,
    second_start_ptr,
    most,
    second_most,
    size,
    second_size,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """Each program adds up all chunks' counts by itself, and sends a chunk's pairs to their places;
    the one behind the last chunk writes the experts' blocks."""
    follow(CHAINED)
    mine = tl.program_id(0)
    lane = tl.arange(0, EXPERTS)
    count = tl.zeros((EXPERTS,), dtype=tl.int32)
    before = tl.zeros((EXPERTS,), dtype=tl.int32)
    for begin in range(0, chunks, TURN):
        chunk = begin + tl.arange(0, TURN)[:, None]
        place = counts_ptr + chunk * EXPERTS + lane[None, :]
        found = tl.load(place, mask=chunk < chunks, other=0)
        count += tl.sum(found, 0)
        before += tl.sum(tl.where(chunk < mine, found, 0), 0)
    count = tl.where(lane < held, count, 0)
    begin = tl.cumsum(count, 0) - count
    if mine < chunks:
        own_ptr = next_ptr + mine * EXPERTS
        tl.store(own_ptr + lane, begin + before)
        tl.debug_barrier()
        pair, expert, here = _pairs(ids_ptr, mine * CHUNK, pairs, held, first, CHUNK)
        place = tl.atomic_add(own_ptr + expert, 1, mask=here, sem="relaxed", scope="cta")
        tl.store(order_ptr + place, pair, mask=here)
    else:
        tl.store(ends_ptr + lane, begin, mask=lane <= held)
        _cut(expert_ptr, start_ptr, lane, begin, count, most, size, CHUNK)
        _cut(
            second_expert_ptr, second_start_ptr, lane, begin, count, second_most, second_size, CHUNK
        )


@triton.jit
def _pairs(ids_ptr, begin, pairs, held, first, CHUNK: tl.constexpr):
    """A chunk of pairs, their experts counted from the first held, and which are held here."""
    pair = begin + tl.arange(0, CHUNK)
    expert = tl.load(ids_ptr + pair, mask=pair < pairs, other=-1) - first
    mine = (pair < pairs) & (expert >= 0) & (expert < held)
    return pair, tl.where(mine, expert, 0), mine


@triton.jit
def _cut(expert_ptr, start_ptr, expert, begin, count, most, size, CHUNK: tl.constexpr):
    """Writes the blocks of all experts, a few turns for all at once, and -1 behind the last."""
    blocks = (count + size - 1) // size
    block = tl.cumsum(blocks, 0) - blocks
    for turn in range(tl.max(blocks, 0)):
        has = turn < blocks
        tl.store(expert_ptr + block + turn, expert, mask=has)
        tl.store(start_ptr + block + turn, begin + turn * size, mask=has)
    used = tl.sum(blocks, 0)
    for chunk in range(0, most, CHUNK):
        index = chunk + tl.arange(0, CHUNK)
        tl.store(expert_ptr + index, -1, mask=(index >= used) & (index < most))


def ends_of(scratch: Tensor, pairs: int) -> Tensor:
    """The ends that align has written for so many pairs."""
    return scratch[-(-pairs // ALIGNED) * ALIGNED :]


def unsorted(ids_TK: Tensor, first: int) -> tuple[Blocks, Blocks]:
    """Every pair a block of its own: what a few pairs of different experts are anyway."""
    none = ids_TK
    blocks = Blocks(ids_TK, first, ids_TK.numel(), none, none, none, none)
    return blocks, blocks
