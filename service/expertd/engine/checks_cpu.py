"""What is found out about the rows of a batch on the processor."""

from __future__ import annotations

from torch import Tensor

from expertd.core import LayerSpec
from expertd.engine.checks import check_logits, check_topk, nonfinite_rows


class HostChecks:
    """The checks of one batch at a time; see checks.RowChecks."""

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        self._codes: memoryview | None = None
        self._nonfinite = 0

    def topk(self, ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool) -> Tensor:
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
