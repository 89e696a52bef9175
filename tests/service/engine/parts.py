"""An engine of known parts: layers without checkpoints, backends that do what a test says."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from tests.strategies import random_weights

from expertd.backends.base import Backend, Batch
from expertd.backends.grouped.backend import Grouped
from expertd.backends.identity.backend import Identity
from expertd.backends.reference.backend import Reference
from expertd.capability.device import detect
from expertd.capability.rows import grouped, identity, reference
from expertd.core import LayerSpec
from expertd.engine.engine import Engine, EngineOptions
from expertd.engine.ledger import Budget
from expertd.engine.loader import identity_spec
from expertd.engine.observer import BatchReport
from expertd.engine.policy import Rules
from expertd.engine.resident import LayerState, Resident, Residents
from expertd.engine.staging import Staging

CPU = torch.device("cpu")
Forward = Callable[[Batch], None]


class Scripted(Backend):
    """A backend whose forward is the test's own function."""

    script: Forward

    def _prepare_weights(self, weights: Any, bias: Any) -> None: ...

    def _warm_up(self, tokens: Any) -> None: ...

    def _forward(self, batch: Batch) -> None:
        type(self).script(batch)


class Reports:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.ran_batches: list[BatchReport] = []

    def ran(self, report: BatchReport) -> None:
        self.ran_batches.append(report)


def warm(backend: Backend, weights: Any = None, bias: Any = None) -> Backend:
    """A backend after its whole start-up."""
    assert backend.check() == ()
    backend.prepare_weights(weights, bias)
    backend.warm_up((1,))
    return backend


def resident(
    spec: LayerSpec, random: torch.Generator, script: Forward | None = None, **names: Any
) -> Resident:
    """A ready layer m/0 with random weights; script replaces what grouped computes."""
    found = Resident(**{"model": "m", "layer": 0} | names, spec=spec, device=detect("cpu"))
    row = grouped.ROWS[0]
    found.weights = random_weights(spec, random)
    kind = Grouped if script is None else type("Scripted", (Scripted,), {"script": script})
    found.backends[row.cell(spec.quant)] = warm(kind(row, spec, CPU), found.weights)
    row = reference.ROWS[0]
    found.backends[row.cell(spec.quant)] = warm(Reference(row, spec, CPU), found.weights)
    found.state = LayerState.READY
    return found


@contextmanager
def running(
    *layers: Resident,
    reports: Reports | None = None,
    start: bool = True,
    ways: Sequence[Staging] = (),
    on_lost: Callable[[], None] = lambda: None,
    **options: Any,
) -> Iterator[Engine]:
    """An engine over these layers; drained at the end.

    start=False leaves the start to the test, so that calls can queue up before it; ways are the
    stagings of its executor.
    """
    residents = Residents()
    for layer in layers:
        residents.add(layer)
    made = {
        name: kind(**{k: options.pop(k) for k in list(options) if k in kind.__slots__})
        for name, kind in (("budget", Budget), ("rules", Rules))
    }
    chosen = EngineOptions(**options, **made)
    with patch("expertd.engine.engine.stagings", lambda device: list(ways) or [Staging()]):
        engine = Engine(residents, CPU, chosen, reports or Reports(), on_lost)
    if start:
        engine.start()
    try:
        yield engine
    finally:
        engine.drain(10)


def echo(hidden: int) -> Resident:
    """A ready identity layer echo/0."""
    found = Resident("echo", 0, identity_spec(hidden), detect("cpu"))
    row = identity.ROWS[0]
    found.backends[row.cell(found.spec.quant)] = warm(Identity(row, found.spec, CPU))
    found.state = LayerState.READY
    return found


class Gate:
    """A forward that waits until the test opens it, so that calls queue up behind it."""

    def __init__(self, then: Forward | None = None) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()
        self.batches: list[int] = []
        self._then = then

    def __call__(self, batch: Batch) -> None:
        self.batches.append(batch.rows.shape[0])
        self.entered.set()
        assert self.opened.wait(10)
        batch.out.copy_(batch.rows)
        if self._then is not None:
            self._then(batch)
