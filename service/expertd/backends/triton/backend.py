"""Our own Triton kernels as a backend: routed experts of every weight format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from triton.runtime import driver

from expertd.backends.base import Backend, Batch
from expertd.backends.triton.activation import constants
from expertd.backends.triton.align import align, ends_of, scratch_ints, unsorted
from expertd.backends.triton.combine import combine
from expertd.backends.triton.dot import INTERPRETED
from expertd.backends.triton.launch import Call, Rows, Site, first_call, second_call
from expertd.backends.triton.quantize import quantize_rows
from expertd.backends.triton.rows import prepared, used_as_they_are
from expertd.backends.triton.rows import shapes as row_shapes
from expertd.backends.triton.scratch import Shape, scratch
from expertd.backends.triton.shared import Card, fitted
from expertd.backends.triton.tiles import Cut, Work, by_rule, measured
from expertd.backends.triton.weights import Native, native
from expertd.weights.canonical import ExpertWeights
from expertd_wire.errors import Refusal

PROBE_TOP_K = 8
MOST_SHARED = 227 * 1024

Memory = dict[str, Tensor]


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
        self._card = card_of(self.device)
        self._work = self._work_here()
        routing = self.spec.routing
        self._on_input = routing is not None and routing.weight_site == "input"

    def _warm_up(self, tokens: Sequence[int]) -> None:
        for count in sorted(set(tokens), reverse=True):
            self._forward(self._probe(count))

    def _forward(self, batch: Batch) -> None:
        assert batch.ids is not None
        self.run(batch, self._cut(*batch.ids.shape))

    def run(self, batch: Batch, cut: Cut) -> None:
        """Computes batch.out with these tiles."""
        assert batch.ids is not None
        ids = batch.ids.contiguous()
        memory = self.memory(cut, *ids.shape)
        first, second = self.calls(replace(batch, ids=ids), cut, memory)
        first.run()
        self._quantise_inner(cut, memory)
        second.run()
        combine(memory["parts"], ids, batch.out, self.spec.expert_begin, self.spec.held)

    def memory(self, cut: Cut, tokens: int, top_k: int) -> Memory:
        """What the kernels of a call hand on to each other."""
        return scratch(dict(self._shapes(cut, tokens, top_k)), self.device)

    def calls(self, batch: Batch, cut: Cut, memory: Memory) -> tuple[Call, Call]:
        """Both GEMMs of a batch whose pairs are now sorted and whose rows are prepared."""
        assert batch.ids is not None and batch.weights is not None
        sites = self._sites(batch.ids, batch.weights, cut, memory)
        matrix, second = self._native.first, self._native.second
        rows = prepared(batch, matrix, _of(memory, "rows"), cut.in_loop, cut.sorted)
        inner = self._inner(memory, cut)
        late = second.kind == "rows"
        made = Rows(memory["plain"]) if late else inner
        gated = self.spec.activation.gated
        first = first_call(
            sites[0], matrix, cut.first, rows, made, second.kind, self._activation, gated
        )
        return first, second_call(sites[1], second, cut.second, inner, memory["parts"])

    def _cut(self, tokens: int, top_k: int) -> Cut:
        """How a batch of this size is cut."""
        pairs, first, second = tokens * top_k, self._native.first, self._native.second
        cut = measured(self._work, pairs) or by_rule(pairs, self._work.held, first, second, tokens)
        return fitted(cut, first, second, self.spec.activation.gated, self._card)

    def _quantise_inner(self, cut: Cut, memory: Memory) -> None:
        """Rows that have one scale each cannot be quantised tile by tile, in the first GEMM."""
        if self._native.second.kind != "rows":
            return
        inner = self._inner(memory, cut)
        assert inner.scale is not None
        held = self.spec.held
        count = ends_of(memory["blocks"], memory["plain"].shape[0])[held:] if cut.sorted else None
        quantize_rows(memory["plain"], inner.values, inner.scale, count=count)

    def _inner(self, memory: Memory, cut: Cut) -> Rows:
        """Where the second GEMM's input lies."""
        second, parts = self._native.second, _of(memory, "inner")
        scale = second.rows_scale if second.kind == "fixed" else parts.get("scale")
        # The tensor cores take fewer than 16 rows from registers, where they are split for nothing.
        in_loop = cut.in_loop and cut.second.m < 16
        return Rows(parts["codes"], scale, second.format.packed > 1 and not in_loop)

    def _sites(self, ids: Tensor, router: Tensor, cut: Cut, memory: Memory) -> list[Site]:
        """What both GEMMs are told of the call."""
        spec, compute, router = self.spec, self._native.compute, router.contiguous()
        begin, held = spec.expert_begin, spec.held
        if cut.sorted:
            blocks = align(ids, begin, held, cut.heights, memory["blocks"])
        else:
            blocks = unsorted(ids, begin)
        return [Site(one, cut.sorted, held, router, self._on_input, compute) for one in blocks]

    def _shapes(self, cut: Cut, tokens: int, top_k: int) -> Iterator[tuple[str, Shape]]:
        """All memory of a call between its kernels."""
        spec, compute, pairs = self.spec, self._native.compute, tokens * top_k
        first, second = self._native.first, self._native.second
        if cut.sorted:
            ints = sum(scratch_ints(pairs, spec.held, cut.heights))
            yield "blocks", (torch.int32, (ints,))
        if not used_as_they_are(first, cut.in_loop):
            yield from _named("rows", row_shapes(first.kind, tokens, spec.hidden, compute))
        yield from _named("inner", row_shapes(second.kind, pairs, spec.intermediate, compute))
        if second.kind == "rows":
            yield "plain", (compute, (pairs, spec.intermediate))
        yield "parts", (compute, (pairs, spec.hidden))

    def _work_here(self) -> Work:
        spec = self.spec
        return Work(
            self._card.arch,
            str(spec.quant.value),
            self.row.activation_quant,
            spec.activation.gated,
            spec.hidden,
            spec.intermediate,
            spec.held,
        )

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


def _of(memory: Memory, name: str) -> dict[str, Tensor]:
    """The parts that _named put under a name."""
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in memory.items() if key.startswith(start)}


def card_of(device: torch.device) -> Card:
    """The card, "sm90" and the like; on the CPU, the interpreter has as much memory as any."""
    if device.type != "cuda":
        return Card("", MOST_SHARED)
    major, minor = torch.cuda.get_device_capability(device)
    found: Any = driver.active.utils.get_device_properties(device.index or 0)
    return Card(f"sm{major}{minor}", int(found["max_shared_mem"]))
