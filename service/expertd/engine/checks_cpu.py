"""What is found out about the rows of a batch on the processor."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expertd.core import LayerSpec
from expertd.engine.checks import check_logits, check_topk, nonfinite_rows

FEW_IDS = 256
"""Up to so many, plain Python is through before torch's many operations have been called."""


class HostChecks:
    """The checks of one batch at a time; see checks.RowChecks."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._codes: memoryview | None = None
        self._nonfinite = 0

    def topk(self, ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool) -> Tensor:
        if ids_TK.numel() <= FEW_IDS and _plainly_good(ids_TK, weights_TK, spec, partial):
            return ids_TK.clone() if ids_TK.dtype is torch.int32 else ids_TK.to(torch.int32)
        return self._coded(*check_topk(ids_TK, weights_TK, spec, partial))

    def logits(self, logits_TE: Tensor, top_k: int) -> Tensor:
        return self._coded(*check_logits(logits_TE, top_k))

    def output(self, out_TH: Tensor) -> None:
        self._nonfinite = nonfinite_rows(out_TH)

    def codes(self) -> memoryview | None:
        return self._codes

    def nonfinite(self) -> int:
        return self._nonfinite

    def _coded(self, harmless: Tensor, codes_T: Tensor) -> Tensor:
        self._codes = codes_T.numpy().data
        return harmless


def _plainly_good(ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool) -> bool:
    """Whether every id is one of an expert that may be named, and named once."""
    begin, end = (0, spec.num_experts) if partial else (spec.expert_begin, spec.expert_end)
    rows = zip(ids_TK.tolist(), weights_TK.tolist(), strict=True)
    return all(
        begin <= min(ids)
        and max(ids) < end
        and len(set(ids)) == len(ids)
        # A sum is finite only if all it adds is.
        and math.isfinite(sum(weights))
        for ids, weights in rows
    )
