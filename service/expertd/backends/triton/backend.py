"""Our own Triton kernels as a backend: routed experts of every weight format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.backends.triton.activation import constants
from expertd.backends.triton.align import Blocks, align, scratch_ints, unsorted
from expertd.backends.triton.combine import combine
from expertd.backends.triton.dot import INTERPRETED
from expertd.backends.triton.launch import Rows, Site, run_first, run_second
from expertd.backends.triton.quantize import quantize_rows
from expertd.backends.triton.rows import prepared, used_as_they_are
from expertd.backends.triton.rows import shapes as row_shapes
from expertd.backends.triton.scratch import Shape, scratch
from expertd.backends.triton.tiles import Cut, cut_for
from expertd.backends.triton.weights import Native, native
from expertd.weights.canonical import ExpertWeights
from expertd_wire.errors import Refusal

PROBE_TOP_K = 8


class Triton(Backend):
    """One layer; the row says in which format its rows are multiplied."""

    def _check(self) -> tuple[Refusal, ...]:
        if self.device.type == "cuda" or INTERPRETED.value:
            return ()
        row, text = self.row, "it runs on an NVIDIA card only: start with --device cuda:0"
        return (Refusal(row.backend, row.mode, row.entry, "kernels_absent", text, "device"),)

    def _prepare_weights(self, weights: ExpertWeights | None, bias: Tensor | None) -> None:
        assert weights is not None
        self._native: Native = native(weights, self.row.activation_quant)
        self._activation = constants(self.spec.activation)
        routing = self.spec.routing
        self._on_input = routing is not None and routing.weight_site == "input"

    def _warm_up(self, tokens: Sequence[int]) -> None:
        for count in sorted(set(tokens), reverse=True):
            self._forward(self._probe(count))

    def _forward(self, batch: Batch) -> None:
        assert batch.ids is not None and batch.weights is not None
        ids = batch.ids.contiguous()
        cut = cut_for(self.spec, self._native, *ids.shape)
        memory = scratch(dict(self._shapes(cut, *ids.shape)), self.device)
        site = self._site(ids, batch.weights, cut, memory)
        rows = prepared(batch, self._native.first, _of(memory, "rows"), cut.in_loop)
        self._experts(site, cut, rows, memory)
        combine(memory["parts"], ids, batch.out, self.spec.expert_begin, self.spec.held)

    def _experts(self, site: Site, cut: Cut, rows: Rows, memory: dict[str, Tensor]) -> None:
        """Both GEMMs: from rows to the weighted part of every pair."""
        first, second = self._native.first, self._native.second
        quantised = second.kind == "rows"
        plain = Rows(memory["plain"]) if quantised else self._inner(memory)
        gated = self.spec.activation.gated
        run_first(site, first, cut.first, rows, plain, second.kind, self._activation, gated)
        inner = self._inner(memory)
        if quantised:
            assert inner.scale is not None
            count = site.blocks.ends[self.spec.held :] if cut.sorted else None
            quantize_rows(plain.values, inner.values, inner.scale, count)
        run_second(site, second, cut.second, inner, memory["parts"])

    def _inner(self, memory: dict[str, Tensor]) -> Rows:
        """Where the second GEMM's input lies."""
        second, parts = self._native.second, _of(memory, "inner")
        scale = second.rows_scale if second.kind == "fixed" else parts.get("scale")
        return Rows(parts["codes"], scale, split=second.format.packed == 2)

    def _site(self, ids: Tensor, router: Tensor, cut: Cut, memory: dict[str, Tensor]) -> Site:
        spec = self.spec
        blocks: Blocks
        if cut.sorted:
            blocks = align(ids, spec.expert_begin, spec.held, cut.first.m, memory["blocks"])
        else:
            blocks = unsorted(ids, spec.expert_begin)
        return Site(
            blocks, cut.sorted, spec.held, router.contiguous(), self._on_input, self._native.compute
        )

    def _shapes(self, cut: Cut, tokens: int, top_k: int) -> Iterator[tuple[str, Shape]]:
        """All memory of a call between its kernels."""
        spec, compute, pairs = self.spec, self._native.compute, tokens * top_k
        first, second = self._native.first, self._native.second
        if cut.sorted:
            ints = sum(scratch_ints(pairs, spec.held, cut.first.m))
            yield "blocks", (torch.int32, (ints,))
        if not used_as_they_are(first, cut.in_loop):
            yield from _named("rows", row_shapes(first.kind, tokens, spec.hidden, compute))
        yield from _named("inner", row_shapes(second.kind, pairs, spec.intermediate, compute))
        if second.kind == "rows":
            yield "plain", (compute, (pairs, spec.intermediate))
        yield "parts", (compute, (pairs, spec.hidden))

    def _probe(self, tokens: int) -> Batch:
        """A batch that gives every expert its equal share."""
        spec = self.spec
        rows = torch.ones(tokens, spec.hidden, dtype=torch.bfloat16, device=self.device)
        top_k = spec.routing.top_k if spec.routing else min(PROBE_TOP_K, spec.num_experts)
        turn = torch.arange(tokens * top_k, device=self.device) % spec.num_experts
        ids = turn.view(tokens, top_k).to(torch.int32)
        weights = torch.full(ids.shape, 1 / top_k, device=self.device)
        return Batch(rows, torch.empty_like(rows), ids=ids, weights=weights)


def _named(name: str, shapes: dict[str, Shape]) -> Iterator[tuple[str, Shape]]:
    return ((f"{name}.{part}", shape) for part, shape in shapes.items())


def _of(memory: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The parts that _named put under a name."""
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in memory.items() if key.startswith(start)}
