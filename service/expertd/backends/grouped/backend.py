"""The CPU's default: one GEMM per active expert in the rows' own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.backends.grouped.weights import Reordered, linear
from expertd.backends.torch_experts import TorchExperts, bias_of


class Grouped(TorchExperts):
    """Routed experts in the dtype of the rows; fp8 rows compute in bfloat16."""

    def compute_dtype(self, rows: Tensor) -> torch.dtype:
        return torch.bfloat16 if rows.dtype == torch.float8_e4m3fn else rows.dtype

    def _first(self, expert: int, rows_NH: Tensor) -> Tensor:
        reordered = self._reordered(rows_NH)
        if reordered is None:
            return super()._first(expert, rows_NH)
        local = expert - self.spec.expert_begin
        return linear(rows_NH, reordered.w13[local], bias_of(self.weights.bias13, local, rows_NH))

    def _second(self, expert: int, inner_NI: Tensor) -> Tensor:
        reordered = self._reordered(inner_NI)
        if reordered is None:
            return super()._second(expert, inner_NI)
        local = expert - self.spec.expert_begin
        return linear(inner_NI, reordered.w2[local], bias_of(self.weights.bias2, local, inner_NI))

    def _reordered(self, rows: Tensor) -> Reordered | None:
        """The packed weights, if they are there and of the rows' dtype."""
        packed = self.weights.packed
        if isinstance(packed, Reordered) and rows.dtype == self.weights.w13.dtype:
            return packed
        return None
