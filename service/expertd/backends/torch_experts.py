"""Routed experts in plain torch: all that reference and grouped share, whatever their dtype."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from expertd.backends.activation import activate
from expertd.backends.base import Backend, Batch
from expertd.backends.rows import plain_rows, shares
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import first_to, second_to

MOST_PAIRS = 512
"""How many (row, expert) pairs are activated at once: it bounds the memory that they take."""


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
        for group in _groups(experts, counts):
            end = begin + sum(group.values())
            self._add(total, rows, tokens[begin:end], weights[begin:end], group)
            begin = end
        batch.out.copy_(total)

    def _add(
        self,
        total_TH: Tensor,
        rows_TH: Tensor,
        tokens_N: Tensor,
        weights_N1: Tensor,
        group: dict[int, int],
    ) -> None:
        """Adds some experts' weighted outputs; group is expert → how many of the pairs are its."""
        counts = list(group.values())
        on_input = self.spec.routing is not None and self.spec.routing.weight_site == "input"
        inner = rows_TH[tokens_N]
        if on_input:
            inner = (inner.float() * weights_N1).to(inner.dtype)
        inner = torch.cat(
            [self._first(*one) for one in zip(group, torch.split(inner, counts), strict=True)]
        )
        inner = activate(self.spec.activation, inner)
        parts = (torch.split(x, counts) for x in (inner, tokens_N, weights_N1))
        for expert, inner_N, mine_N, weight_N1 in zip(group, *parts, strict=True):
            out = self._second(expert, inner_N).float()
            total_TH.index_add_(0, mine_N, out if on_input else out * weight_N1)

    def _first(self, expert: int, rows_NH: Tensor) -> Tensor:
        local = expert - self.spec.expert_begin
        w13 = first_to(self.weights, local, rows_NH.dtype)
        return functional.linear(rows_NH, w13, bias_of(self.weights.bias13, local, rows_NH))

    def _second(self, expert: int, inner_NI: Tensor) -> Tensor:
        local = expert - self.spec.expert_begin
        w2 = second_to(self.weights, local, inner_NI.dtype)
        return functional.linear(inner_NI, w2, bias_of(self.weights.bias2, local, inner_NI))


def _groups(experts: Sequence[int], counts: Sequence[int]) -> Iterator[dict[int, int]]:
    """Experts with their counts, as many at a time as MOST_PAIRS allows, but at least one."""
    group: dict[int, int] = {}
    for expert, count in zip(experts, counts, strict=True):
        if group and sum(group.values()) + count > MOST_PAIRS:
            yield group
            group = {}
        group[expert] = count
    if group:
        yield group


def bias_of(bias_LN: Tensor | None, local: int, like: Tensor) -> Tensor | None:
    """One expert's bias in the dtype of the rows that it is added to."""
    return None if bias_LN is None else bias_LN[local].to(like.dtype)
