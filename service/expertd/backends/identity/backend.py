"""A layer without experts: it copies its rows, so that a benchmark measures everything else."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.backends.rows import plain_rows
from expertd.weights.canonical import ExpertWeights


class Identity(Backend):
    """out = rows."""

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        """There are none."""

    def _warm_up(self, tokens: Sequence[int]) -> None:
        """Nothing is compiled or cached."""

    def _forward(self, batch: Batch) -> None:
        scaled = batch.row_scales is not None
        batch.out.copy_(plain_rows(batch, batch.out.dtype) if scaled else batch.rows)
