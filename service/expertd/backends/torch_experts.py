"""Routed experts in plain torch: all that reference and grouped share, whatever their dtype."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from expertd.backends.activation import activate
from expertd.backends.base import Backend, Batch
from expertd.backends.rows import plain_rows, shares
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import dequantize_to


class TorchExperts(Backend):
    """Rows sorted by expert, one GEMM per matrix of each active expert, weights as stored."""

    weights: ExpertWeights

    @abstractmethod
    def compute_dtype(self, rows: Tensor) -> torch.dtype:
        """The dtype of the GEMMs for these rows."""

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        assert weights is not None
        self.weights = weights

    def _warm_up(self, tokens: Sequence[int]) -> None:
        """Nothing is compiled or cached."""

    def _forward(self, batch: Batch) -> None:
        assert batch.ids is not None and batch.weights is not None
        dtype = self.compute_dtype(batch.rows)
        rows = plain_rows(batch, dtype)
        pairs, experts, counts = shares(batch.ids, self.spec.expert_begin, self.spec.expert_end)
        tokens = pairs // batch.ids.shape[1]
        weights = batch.weights.reshape(-1)[pairs].to(torch.float32).unsqueeze(1)
        total = torch.zeros(batch.out.shape, dtype=torch.float32, device=rows.device)
        begin = 0
        for expert, count in zip(experts, counts, strict=True):
            mine = slice(begin, begin + count)
            total.index_add_(
                0, tokens[mine], self._expert(expert, rows[tokens[mine]], weights[mine])
            )
            begin += count
        batch.out.copy_(total)

    def _expert(self, expert: int, rows_NH: Tensor, weights_N1: Tensor) -> Tensor:
        """One expert's weighted output [N, H] in float32."""
        local = expert - self.spec.expert_begin
        w13, w2 = dequantize_to(self.weights, local, rows_NH.dtype)
        on_input = self.spec.routing is not None and self.spec.routing.weight_site == "input"
        if on_input:
            rows_NH = (rows_NH.float() * weights_N1).to(rows_NH.dtype)
        inner = functional.linear(rows_NH, w13, self._bias(self.weights.bias13, local, rows_NH))
        inner = activate(self.spec.activation, inner)
        out = functional.linear(inner, w2, self._bias(self.weights.bias2, local, rows_NH)).float()
        return out if on_input else out * weights_N1

    @staticmethod
    def _bias(bias_LN: Tensor | None, local: int, like: Tensor) -> Tensor | None:
        return None if bias_LN is None else bias_LN[local].to(like.dtype)
