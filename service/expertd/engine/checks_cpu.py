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
            return ids_TK.to(torch.int32, copy=True)
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
    good = all(
        begin <= min(row) and max(row) < end and len(set(row)) == len(row)
        for row in ids_TK.tolist()
    )
    return good and all(map(math.isfinite, weights_TK.flatten().tolist()))
