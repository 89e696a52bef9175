"""How many rows each expert of a layer was given.

The executor only keeps the ids of each batch; they are counted when somebody asks, or when many
have piled up, on the device and without waiting for it.
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.core import LayerSpec
from expertd.engine.routers import router_on

MOST_BATCHES = 256
MOST_ROWS = 16384
"""How much may pile up: ids of a few hundred kilobytes, or logits of some megabytes."""


class ExpertRows:
    """The counts of one layer; note() is the executor's, counts() anybody's."""

    def __init__(self) -> None:
        self._noted: deque[tuple[Tensor, Tensor | None]] = deque()
        self._rows = 0
        self._counts: Tensor | None = None
        self._counting = threading.Lock()

    def note(self, spec: LayerSpec, batch: Batch, bias: Tensor | None) -> None:
        """Remembers who computes a batch; where the kernel routes, its logits do."""
        routed = batch.logits if batch.ids is None else batch.ids
        if routed is None:
            return
        self._noted.append((routed, bias))
        self._rows += routed.shape[0]
        if self._rows >= MOST_ROWS or len(self._noted) >= MOST_BATCHES:
            self._count(spec)

    def counts(self, spec: LayerSpec) -> list[int]:
        """Rows so far of each expert of the model; 0 for those that are not held here."""
        self._count(spec)
        if self._counts is None:
            return [0] * spec.num_experts
        given: list[int] = self._counts[1:].tolist()
        held = range(spec.expert_begin, spec.expert_end)
        return [rows if expert in held else 0 for expert, rows in enumerate(given)]

    def _count(self, spec: LayerSpec) -> None:
        """Adds what was noted; place 0 takes the ids that mean "no expert"."""
        with self._counting, torch.inference_mode():
            self._rows = 0
            noted = [self._noted.popleft() for _ in range(len(self._noted))]
            if not noted:
                return
            ids = torch.cat([_ids(spec, *each).flatten() for each in noted]).long() + 1
            if self._counts is None:
                size = spec.num_experts + 1
                self._counts = torch.zeros(size, dtype=torch.int64, device=ids.device)
            self._counts.scatter_add_(0, ids, torch.ones_like(ids))


def _ids(spec: LayerSpec, routed: Tensor, bias: Tensor | None) -> Tensor:
    if not routed.is_floating_point():
        return routed
    assert spec.routing is not None, "only layers that route take logits"
    # Whoever asks may have another card, and Triton would launch there.
    with torch.cuda.device_of(routed):  # type: ignore[no-untyped-call]
        return router_on(routed.device.type)(spec.routing, routed, bias)[0]


def balance(counts: list[int]) -> float:
    """The mean over the most: 1 when all experts have the same, 1 / n when one has everything."""
    most = max(counts, default=0)
    return sum(counts) / len(counts) / most if most else 1.0
