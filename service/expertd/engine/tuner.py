"""Measures a layer's plans at every bucket, so that each batch runs on the fastest.

The first layer of a shape is measured on its own weights, right after its load and before it takes
calls; the table is kept for layers of the same shape and for the next start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch

from expertd.backends.base import Backend, Batch
from expertd.capability.checks.fault import Fault
from expertd.capability.match import refusal
from expertd.capability.row import Cell, Row
from expertd.core import LayerSpec, PlanMode
from expertd.engine.choice import likely_plans
from expertd.engine.race import race
from expertd.engine.resident import Resident
from expertd.engine.routers import router_on
from expertd.engine.timing_store import TimingStore
from expertd.engine.timings import Timings, kept_layout
from expertd.engine.watch import Watch, watch_for
from expertd.proof.batches import random_batch
from expertd.proof.store import shape_of
from expertd_wire.errors import Refusal

log = logging.getLogger(__name__)

BUDGET_SECONDS = 20.0
"""For one shape with several plans."""

ALONE_SECONDS = 0.1
"""For a shape with one plan: nothing depends on its times, they are for people."""

SECOND_LAYOUT_GAIN = 1.03
"""How much faster a layer must be for a second layout of its weights."""

ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Tuning:
    """Whether to measure, the buckets that batches fall into, and whether old tables count."""

    buckets: tuple[int, ...]
    enabled: bool = True
    renew: bool = False


class Tuner:
    """Gives each resident its timings, and takes from it the backends that are not worth a copy."""

    def __init__(
        self, store: TimingStore, device: torch.device, tuning: Tuning, watch: Watch | None = None
    ) -> None:
        self.buckets = tuning.buckets
        self._tuning = tuning
        self._store = store
        self._device = device
        self._watch = watch or watch_for(device)
        self._left_out: dict[str, dict[Cell, Row]] = {}
        self._fresh: dict[str, Timings] = {}

    def left_out(self, spec: LayerSpec) -> Mapping[Cell, Row]:
        """What layers of this shape do without: it would need a second layout of the weights."""
        return self._left_out.get(shape_of(spec), {})

    def tune(self, resident: Resident) -> None:
        """Measures the layer's plans, or finds what was measured before; keeps the best set."""
        plans = rivals(resident)
        if not self._tuning.enabled or not plans:
            return
        timings = self._known(resident.spec, plans) or self._measured(resident, plans)
        resident.judged(resident.states, timings)
        self._keep_the_best(resident)

    def _known(self, spec: LayerSpec, cells: Iterable[Cell]) -> Timings | None:
        fresh = self._fresh.get(shape_of(spec))
        found = fresh if self._tuning.renew else fresh or self._store.find(spec)
        return found if found and found.covers(cells, len(self.buckets)) else None

    def _measured(self, resident: Resident, plans: dict[Cell, Backend]) -> Timings:
        spec = resident.spec
        runs: dict[Cell | str, Callable[[Batch], None]] = {
            cell: backend.forward for cell, backend in plans.items()
        }
        if any(cell.mode is PlanMode.MONOLITHIC for cell in plans):
            runs[ROUTER] = partial(_route, resident)
        batch_of = partial(random_batch, spec, device=self._device)
        thorough = len(plans) > 1 or self._tuning.renew
        seconds = BUDGET_SECONDS if thorough else ALONE_SECONDS
        with torch.inference_mode():
            times = race(runs, batch_of, self.buckets, self._watch, seconds)
        router = times.pop(ROUTER, ())
        mine = {cell: each for cell, each in times.items() if isinstance(cell, Cell)}
        timings = Timings(mine, router, len(self.buckets))
        self._fresh[shape_of(spec)] = timings
        self._store.keep(spec, timings)
        log.info("layer %s: %d plans measured", resident.name, len(plans))
        return timings

    def _keep_the_best(self, resident: Resident) -> None:
        """Drops the backends whose own layout of the weights does not pay."""
        backends = resident.backends
        layouts = {
            cell: backends[cell].layout for cell in resident.timings.plans if cell in backends
        }
        kept = ("", kept_layout(resident.timings, layouts, SECOND_LAYOUT_GAIN))
        dropped = {cell: b.row for cell, b in backends.items() if b.layout not in kept}
        self._left_out.setdefault(shape_of(resident.spec), {}).update(dropped)
        resident.absent |= {cell: (not_kept(row),) for cell, row in dropped.items()}
        resident.backends = {c: b for c, b in backends.items() if c not in dropped}


def rivals(resident: Resident) -> dict[Cell, Backend]:
    """The backends that may run the commonest calls of a layer with experts."""
    if not resident.spec.num_experts:
        return {}
    cells = (plan.row.cell(resident.spec.quant) for plan in likely_plans(resident))
    return {cell: resident.backends[cell] for cell in cells if cell in resident.backends}


def not_kept(row: Row) -> Refusal:
    """Why a proven plan has no backend."""
    why = "a second copy of the weights in its layout would not make this layer faster"
    return refusal(row, Fault("layout_not_kept", "tune", "auto", "off", why))


def _route(resident: Resident, batch: Batch) -> None:
    assert batch.logits is not None and resident.spec.routing is not None
    route = router_on(batch.logits.device.type)
    route(resident.spec.routing, batch.logits, resident.bias)
