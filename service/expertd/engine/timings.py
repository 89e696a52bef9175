"""What the tuner measured of a layer's plans, and which of them it makes the best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from expertd.capability.row import Cell
from expertd.core import PlanMode

Times = tuple[float, ...]
"""Microseconds at buckets 0, 1, 2, …: 1, 2, 4, … tokens; it ends where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Timings:
    """The times of each plan, and of the router that runs before a routed one from logits.

    buckets is how many were asked for: times are shorter where the budget ended before.
    """

    plans: Mapping[Cell, Times] = field(default_factory=dict)
    router: Times = ()
    buckets: int = 0

    def covers(self, cells: Iterable[Cell], buckets: int) -> bool:
        """Whether these plans were measured together at so many buckets."""
        return set(cells) <= set(self.plans) and buckets <= self.buckets

    def choices(self, cells: Sequence[Cell], from_logits: bool) -> tuple[Cell, ...]:
        """The fastest of cells at each bucket, the last entry standing for all larger ones.

        cells come in the table's order: its first is the choice where nothing was measured.
        """
        totals = self.totals(from_logits)
        times = {cell: totals[cell] for cell in cells if cell in totals}
        length = max(map(len, times.values()), default=0)
        if not length:
            return (cells[0],)
        return tuple(min(times, key=lambda c: _at(times[c], index)) for index in range(length))

    def loss(self, cells: Iterable[Cell]) -> float:
        """How much slower the best of cells are than the best of all, as a mean over buckets."""
        totals, kept = self.totals(from_logits=True), set(cells)
        best = _fastest(totals.values())
        among = _fastest(times for cell, times in totals.items() if cell in kept)
        if len(among) < len(best):
            return math.inf
        logs = [math.log(mine / least) for mine, least in zip(among, best, strict=True)]
        return math.exp(sum(logs) / len(logs)) if logs else 1.0

    def totals(self, from_logits: bool) -> dict[Cell, Times]:
        """The whole time of each plan: with the router's, where that would run first."""
        return {cell: self._total(cell, from_logits) for cell in self.plans}

    def _total(self, cell: Cell, from_logits: bool) -> Times:
        times = self.plans[cell]
        if not from_logits or cell.mode is PlanMode.MONOLITHIC or not self.router:
            return times
        return tuple(a + b for a, b in zip(times, self.router, strict=False))


def kept_layout(timings: Timings, layouts: Mapping[Cell, str], gain: float) -> str:
    """The weight layout to keep beside the canonical one ("" for none).

    One copy of the weights is what the device holds, so a second layout has to make the layer
    faster by more than gain.
    """
    canonical = [cell for cell, layout in layouts.items() if not layout]
    losses = {"": timings.loss(canonical)}
    for layout in sorted(set(layouts.values()) - {""}):
        losses[layout] = timings.loss(c for c, own in layouts.items() if own in ("", layout))
    best = min(losses, key=losses.__getitem__)
    return best if losses[""] > gain * losses[best] else ""


def _fastest(totals: Iterable[Times]) -> Times:
    listed = list(totals)
    length = max(map(len, listed), default=0)
    return tuple(min(_at(times, index) for times in listed) for index in range(length))


def _at(times: Times, index: int) -> float:
    return times[index] if index < len(times) else math.inf
