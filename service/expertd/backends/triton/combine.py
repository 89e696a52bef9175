"""The end of a call: each row's sum over its slots, always in the same order."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from expertd.backends.triton.chain import chained, follow
from expertd.backends.triton.dot import rounded

COLUMNS = 1024


def combine(parts: Tensor, ids: Tensor, out: Tensor, first: int, held: int) -> None:
    """parts [T * K, H], ids [T, K] → out [T, H]; parts of experts not held are never read."""
    tokens, top_k = ids.shape
    hidden = out.shape[1]
    columns = min(COLUMNS, triton.next_power_of_2(hidden))
    _combine[(tokens, triton.cdiv(hidden, columns))](
        parts,
        ids,
        out,
        hidden,
        out.stride(0),
        first,
        held,
        top_k,
        # A caller's K may be any: few kernels serve all.
        SLOTS=triton.next_power_of_2(top_k),
        COLUMNS=columns,
        **chained(out.device),
    )


@triton.jit(do_not_specialize=["first", "held", "top_k"])
def _combine(
    parts_ptr,
    ids_ptr,
    out_ptr,
    hidden,
    out_stride,
    first,
    held,
    top_k,
    SLOTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHAINED: tl.constexpr,
):
    follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < hidden
    total = tl.zeros((COLUMNS,), dtype=tl.float32)
    for slot in range(SLOTS):
        pair = row * top_k + slot
        expert = tl.load(ids_ptr + pair, mask=slot < top_k, other=-1) - first
        mine = there & (expert >= 0) & (expert < held)
        # Read once: what the cache still has of the last experts' parts need not give way to it.
        part = tl.load(
            parts_ptr + pair * hidden + column, mask=mine, other=0.0, eviction_policy="evict_first"
        )
        total += part.to(tl.float32)
    tl.store(
        out_ptr + row * out_stride + column, rounded(total, out_ptr.dtype.element_ty), mask=there
    )
