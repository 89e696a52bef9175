"""checks.check_topk as one kernel: on a card its many small operations cost more than the experts.

One program a row; whatever K is, the kernel is the same, so that no request compiles one.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd.core import LayerSpec
from expertd.engine.checks import BAD_WEIGHT, DUPLICATE, NOT_HELD, OK, OUT_OF_RANGE

LANES = 32
"""Ids of a row that are looked at together."""

_OUTSIDE, _TWICE, _BAD, _AWAY = (tl.constexpr(1 << bit) for bit in range(4))
_CODE_OF_OUTSIDE, _CODE_OF_TWICE = tl.constexpr(OUT_OF_RANGE), tl.constexpr(DUPLICATE)
_CODE_OF_BAD, _CODE_OF_AWAY = tl.constexpr(BAD_WEIGHT), tl.constexpr(NOT_HELD)
_OK = tl.constexpr(OK)


def check_topk(
    ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool
) -> tuple[Tensor, Tensor]:
    """Harmless ids [T, K] int32, and the fault code [T] uint8 of each row; all are contiguous."""
    tokens, top_k = ids_TK.shape
    harmless_TK = torch.empty(tokens, top_k, dtype=torch.int32, device=ids_TK.device)
    codes_T = torch.empty(tokens, dtype=torch.uint8, device=ids_TK.device)
    _check[(tokens,)](
        ids_TK,
        weights_TK,
        harmless_TK,
        codes_T,
        top_k,
        EXPERTS=spec.num_experts,
        BEGIN=0 if partial else spec.expert_begin,
        END=spec.num_experts if partial else spec.expert_end,
        LANES=LANES,
        num_warps=1,
    )
    return harmless_TK, codes_T


@triton.jit(do_not_specialize=["K"])
def _check(
    ids_ptr,
    weights_ptr,
    harmless_ptr,
    codes_ptr,
    K,
    EXPERTS: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    LANES: tl.constexpr,
):
    """BEGIN and END: the experts that may be named without being missed here."""
    row = tl.program_id(0).to(tl.int64)
    ids_ptr += row * K
    faults = tl.zeros([LANES], tl.int32)
    for begin in range(0, K, LANES):
        column = begin + tl.arange(0, LANES)
        ids = tl.load(ids_ptr + column, mask=column < K, other=-1)
        weights = tl.load(weights_ptr + row * K + column, mask=column < K, other=0.0)
        named = ids != -1
        faults |= tl.where(named & ((ids < 0) | (ids >= EXPERTS)), _OUTSIDE, 0)
        faults |= tl.where(named & ((ids < BEGIN) | (ids >= END)), _AWAY, 0)
        faults |= tl.where(named & ~(tl.abs(weights) < float("inf")), _BAD, 0)
        for other in range(K):
            same = ids == tl.load(ids_ptr + other)
            faults |= tl.where(named & same & (column != other), _TWICE, 0)
    code = tl.where(tl.max(faults & _AWAY, 0) > 0, _CODE_OF_AWAY, _OK)
    code = tl.where(tl.max(faults & _BAD, 0) > 0, _CODE_OF_BAD, code)
    code = tl.where(tl.max(faults & _TWICE, 0) > 0, _CODE_OF_TWICE, code)
    code = tl.where(tl.max(faults & _OUTSIDE, 0) > 0, _CODE_OF_OUTSIDE, code)
    tl.store(codes_ptr + row, code.to(tl.uint8))
    for begin in range(0, K, LANES):
        column = begin + tl.arange(0, LANES)
        ids = tl.load(ids_ptr + column, mask=column < K, other=-1)
        harmless = tl.where(code == _OK, ids, -1).to(tl.int32)
        tl.store(harmless_ptr + row * K + column, harmless, mask=column < K)
