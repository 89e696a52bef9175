"""One cell: a plan at a number of tokens, timed and compared; and a shape's worth of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from tests.bench.kernels.plans import error_of, label, ready, reference_of, usable_rows
from tests.bench.kernels.roof import Card, Roof, multiplied, roof
from tests.bench.kernels.shapes import Shape, goal
from tests.bench.kernels.timing import Timing, time_calls
from tests.bench.kernels.weights import random_batches, random_weights

from expertd.backends.base import Backend, Batch
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Row
from expertd.proof.run import TOLERANCES

GRAPH_US = 1500.0
LEAST_CALLS, MOST_CALLS = 2, 16
"""A graph holds calls of about GRAPH_US, so that the gap between two graphs does not count."""


@dataclass(frozen=True)
class Cell:
    """What was measured; fault says why nothing was."""

    shape: str
    tokens: int
    plan: str
    dtype: str
    timing: Timing | None = None
    roof: Roof | None = None
    error: float = float("nan")
    tolerance: float = 0.0
    fault: str = ""

    @property
    def right(self) -> bool:
        """Whether it computed what it should: NaN is not."""
        return self.error <= self.tolerance

    @property
    def ratio(self) -> float:
        assert self.timing is not None and self.roof is not None
        return self.timing.median / self.roof.us

    @property
    def goal(self) -> float | None:
        assert self.roof is not None
        return goal(self.tokens, self.dtype == "fp8", self.roof.us)


@dataclass(frozen=True)
class Bench:
    """What every cell is measured with."""

    device: torch.device
    info: DeviceInfo
    card: Card
    tokens: Sequence[int]
    backends: Sequence[str]
    seconds: float
    tell: Callable[[Cell], None]

    def shape(self, shape: Shape) -> list[Cell]:
        """Every plan of a layer at every number of tokens; a plan that fails says why."""
        rows = usable_rows(shape, self.info, self.backends)
        if not rows:
            return []
        torch.manual_seed(0)
        weights = random_weights(shape.spec, self.device)
        reference = reference_of(shape, weights, self.device)
        cells: list[Cell] = []
        for row in rows:
            try:
                backend = ready(row, shape, weights, self.tokens, self.device)
            except Exception as error:  # one plan's failure is a line of the table
                cells.append(self._faulty(shape, row, 0, error))
                continue
            cells.extend(self._cells(shape, row, backend, reference))
            del backend
            torch.cuda.empty_cache()
        return cells

    def _cells(
        self, shape: Shape, row: Row, backend: Backend, reference: Backend
    ) -> Iterator[Cell]:
        for tokens in self.tokens:
            try:
                cell = self._cell(shape, row, tokens, backend, reference)
            except Exception as error:  # one cell's failure is a line of the table
                cell = self._faulty(shape, row, tokens, error)
            self.tell(cell)
            yield cell

    def _cell(
        self, shape: Shape, row: Row, tokens: int, backend: Backend, reference: Backend
    ) -> Cell:
        dtype = multiplied(row.activation_quant)
        torch.manual_seed(tokens)
        batches = random_batches(shape, tokens, MOST_CALLS, self.device)
        batches = batches[: calls_for(roof(self.card, shape, batches, dtype))]
        error = error_of(backend, reference, batches[0])
        timing = time_calls([_call(backend, batch) for batch in batches], self.seconds)
        bound = roof(self.card, shape, batches, dtype)
        tolerance = TOLERANCES[row.activation_quant]
        return Cell(shape.name, tokens, label(row), dtype, timing, bound, error, tolerance)

    def _faulty(self, shape: Shape, row: Row, tokens: int, error: Exception) -> Cell:
        text = f"{type(error).__name__}: {error}"[:300]
        dtype = multiplied(row.activation_quant)
        cell = Cell(shape.name, tokens, label(row), dtype, fault=text)
        self.tell(cell)
        return cell


def calls_for(bound: Roof) -> int:
    """How many calls one graph holds."""
    return min(max(round(GRAPH_US / bound.us), LEAST_CALLS), MOST_CALLS)


def _call(backend: Backend, batch: Batch) -> Callable[[], None]:
    return lambda: backend.forward(batch)
