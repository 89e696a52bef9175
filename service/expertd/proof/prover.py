"""What a serving process knows of its cells: proofs of earlier runs, or made now."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

from expertd.backends.base import Backend
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Cell, State
from expertd.proof.run import prove
from expertd.proof.store import ProofStore

log = logging.getLogger(__name__)

BUDGET_SECONDS = 20.0


class Prover:
    """Proves the cells that a layer's backends need, once, within a budget for each layer."""

    def __init__(self, store: ProofStore, device: DeviceInfo) -> None:
        self._store = store
        self._device = device
        self._states = store.states()

    def states(self, backends: Mapping[Cell, Backend]) -> dict[Cell, State]:
        """The states of these backends' cells, as far as they are known when the budget ends."""
        end = time.monotonic() + BUDGET_SECONDS
        for cell, backend in backends.items():
            if not backend.row.needs_proof or cell in self._states:
                continue
            if time.monotonic() > end:
                log.warning("no time left to prove %s; run expertd verify", "/".join(cell))
                continue
            self._prove(cell, backend)
        return {cell: self._states[cell] for cell in backends if cell in self._states}

    @property
    def known(self) -> dict[Cell, State]:
        """Everything that is proven or failed here so far."""
        return dict(self._states)

    def _prove(self, cell: Cell, backend: Backend) -> None:
        proof = prove(backend.row, cell.quant, self._device)
        if proof.trials:
            self._states[cell] = proof.state
            self._store.keep([proof])
        for failure in proof.failures:
            log.error("%s failed its proof: %s", "/".join(cell), failure)
