"""What is found out about the rows of a batch on a card: one kernel for each question.

torch's many small operations would cost more than the experts. One program a row; whatever K and
the number of rows are, the kernels are the same, so that no request compiles one. What they find
they write into the host's own memory, so that nothing small has to be copied out.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from expertd.core import LayerSpec
from expertd.engine.checks import BAD_LOGITS, BAD_WEIGHT, DUPLICATE, NOT_HELD, OK, OUT_OF_RANGE

LANES = 32
"""Ids of a row that are looked at together."""
WIDE = 4096
"""Numbers of a result's row that are looked at together."""

_OUTSIDE, _TWICE, _BAD, _AWAY = (tl.constexpr(1 << bit) for bit in range(4))
_CODE_OF_OUTSIDE, _CODE_OF_TWICE = tl.constexpr(OUT_OF_RANGE), tl.constexpr(DUPLICATE)
_CODE_OF_BAD, _CODE_OF_AWAY = tl.constexpr(BAD_WEIGHT), tl.constexpr(NOT_HELD)
_CODE_OF_LOGITS = tl.constexpr(BAD_LOGITS)
_OK = tl.constexpr(OK)


class CardChecks:
    """The checks of one batch at a time; see checks.RowChecks.

    A byte of pinned memory for each row and question, growing; codes() and nonfinite() are for
    whoever knows that the kernels have ended.
    """

    def __init__(self) -> None:
        self._keep(_pinned(1024))
        self._coded = self._written = 0

    def begin(self) -> None:
        self._coded = self._written = 0

    def topk(self, ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool) -> Tensor:
        tokens, top_k = ids_TK.shape
        harmless_TK = torch.empty_like(ids_TK, dtype=torch.int32)
        _check_topk[(tokens,)](
            ids_TK,
            weights_TK,
            harmless_TK,
            self._codes_of(tokens),
            top_k,
            EXPERTS=spec.num_experts,
            BEGIN=0 if partial else spec.expert_begin,
            END=spec.num_experts if partial else spec.expert_end,
            LANES=LANES,
            num_warps=1,
        )
        return harmless_TK

    def logits(self, logits_TE: Tensor, top_k: int) -> Tensor:
        tokens, experts = logits_TE.shape
        harmless_TE = torch.empty_like(logits_TE)
        _check_logits[(tokens,)](
            logits_TE,
            harmless_TE,
            self._codes_of(tokens),
            TOP_K=top_k,
            EXPERTS=experts,
            WIDTH=triton.next_power_of_2(experts),
            num_warps=1,
        )
        return harmless_TE

    def output(self, out_TH: Tensor) -> None:
        tokens, hidden = out_TH.shape
        width = min(WIDE, triton.next_power_of_2(hidden))
        _check_output[(tokens,)](out_TH, self._room(tokens)[1], HIDDEN=hidden, WIDTH=width)
        self._written = tokens

    def codes(self) -> memoryview | None:
        return self._arrays[0].data[: self._coded] if self._coded else None

    def nonfinite(self) -> int:
        return int(np.count_nonzero(self._arrays[1][: self._written]))

    def _codes_of(self, tokens: int) -> Tensor:
        self._coded = tokens
        return self._room(tokens)[0]

    def _room(self, tokens: int) -> tuple[Tensor, ...]:
        """Flags of so many rows: their codes, and whether their results are not finite."""
        if tokens > len(self._flags[0]):
            self._keep(_pinned(triton.next_power_of_2(tokens)))
        return self._flags

    def _keep(self, flags: Tensor) -> None:
        self._flags = flags.unbind()
        self._arrays = [flag.numpy() for flag in self._flags]


def _pinned(tokens: int) -> Tensor:
    return torch.zeros(2, tokens, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


@triton.jit(do_not_specialize=["K"])
def _check_topk(
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


@triton.jit
def _check_logits(
    logits_ptr,
    harmless_ptr,
    codes_ptr,
    TOP_K: tl.constexpr,
    EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    place, inside = row * EXPERTS + column, column < EXPERTS
    logits = tl.load(logits_ptr + place, mask=inside, other=0.0)
    value = logits.to(tl.float32)
    finite = inside & (tl.abs(value) < float("inf"))
    # NaN and +inf are neither finite nor a mask.
    strange = inside & ~finite & ~(value == -float("inf"))
    bad = (tl.max(strange.to(tl.int32), 0) > 0) | (tl.sum(finite.to(tl.int32), 0) < TOP_K)
    tl.store(codes_ptr + row, tl.where(bad, _CODE_OF_LOGITS, _OK).to(tl.uint8))
    tl.store(harmless_ptr + place, tl.where(bad, 0.0, logits), mask=inside)


@triton.jit
def _check_output(out_ptr, flags_ptr, HIDDEN: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    strange = tl.zeros([WIDTH], tl.int32)
    for begin in range(0, HIDDEN, WIDTH):
        column = begin + tl.arange(0, WIDTH)
        value = tl.load(out_ptr + row * HIDDEN + column, mask=column < HIDDEN, other=0.0)
        strange |= tl.where(tl.abs(value.to(tl.float32)) < float("inf"), 0, 1)
    tl.store(flags_ptr + row, tl.max(strange, 0).to(tl.uint8))
