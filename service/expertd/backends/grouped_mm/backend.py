"""torch's own grouped GEMM as a backend: bf16 experts, all on the device, for large batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from expertd.backends.activation import activate
from expertd.backends.base import Backend, Batch
from expertd.weights.canonical import ExpertWeights


@dataclass(frozen=True, slots=True)
class Sorted:
    """A call's (row, slot) pairs, those of no expert held here last.

    order [N]: pairs by expert; expert [N]: theirs, counted from the first held; held [N, 1];
    ends [L] int32: where each expert's pairs end; router [N, 1]: their weights.
    """

    order: Tensor
    expert: Tensor
    held: Tensor
    ends: Tensor
    router: Tensor


class GroupedMm(Backend):
    """Rows sorted by expert, two grouped GEMMs, and the sum over slots in a fixed order."""

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        assert weights is not None
        self._weights = weights
        routing = self.spec.routing
        self._on_input = routing is not None and routing.weight_site == "input"

    def _warm_up(self, tokens: Sequence[int]) -> None:
        """Nothing is compiled here: torch brings its kernels."""

    def _forward(self, batch: Batch) -> None:
        assert batch.ids is not None and batch.weights is not None
        pairs = self._sorted(batch.ids, batch.weights)
        rows = batch.rows.to(torch.bfloat16)[pairs.order // batch.ids.shape[1]]
        if self._on_input:
            rows = (rows.float() * pairs.router).to(torch.bfloat16)
        parts = self._experts(rows, pairs).float()
        if not self._on_input:
            parts = parts * pairs.router
        # Rows that no group covers are whatever memory held.
        parts = torch.where(pairs.held, parts, 0.0)
        slots = torch.empty_like(parts).index_copy_(0, pairs.order, parts)
        batch.out.copy_(slots.view(*batch.ids.shape, -1).sum(dim=1))

    def _sorted(self, ids_TK: Tensor, router_TK: Tensor) -> Sorted:
        spec = self.spec
        expert = ids_TK.flatten() - spec.expert_begin
        expert = torch.where((expert >= 0) & (expert < spec.held), expert, spec.held)
        expert, order = expert.sort(stable=True)
        every = torch.arange(spec.held, device=expert.device, dtype=expert.dtype)
        ends = torch.searchsorted(expert, every, right=True, out_int32=True)
        router = router_TK.flatten()[order].float().unsqueeze(1)
        return Sorted(order, expert, (expert < spec.held).unsqueeze(1), ends, router)

    def _experts(self, rows_NH: Tensor, pairs: Sorted) -> Tensor:
        """[N, H] → [N, H]."""
        weights = self._weights
        inner = grouped_mm(rows_NH, weights.w13.transpose(1, 2), offs=pairs.ends)
        inner = activate(self.spec.activation, self._biased(inner, weights.bias13, pairs))
        parts = grouped_mm(inner, weights.w2.transpose(1, 2), offs=pairs.ends)
        return self._biased(parts, weights.bias2, pairs)

    def _biased(self, values_NM: Tensor, bias_LM: Tensor | None, pairs: Sorted) -> Tensor:
        if bias_LM is None:
            return values_NM
        return values_NM + bias_LM.to(values_NM.dtype)[pairs.expert.clamp(max=self.spec.held - 1)]
