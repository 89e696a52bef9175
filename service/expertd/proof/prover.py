"""What a serving process knows of its cells: proofs of earlier runs, or made now."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from expertd.backends.base import Backend
from expertd.backends.flashinfer.library import simulated
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Cell, State
from expertd.core import LayerSpec
from expertd.proof.run import Proof, prove
from expertd.proof.shape import Layer, prove_shape
from expertd.proof.store import ProofStore, shape_of

log = logging.getLogger(__name__)

BUDGET_SECONDS = 20.0


class Prover:
    """Proves the cells that a layer's backends need, once, within a budget for each layer."""

    def __init__(self, store: ProofStore, device: DeviceInfo) -> None:
        self._store = store
        self._device = device
        self._states = store.states()
        self._shapes: dict[str, dict[Cell, State]] = {}

    def states(self, backends: Mapping[Cell, Backend]) -> dict[Cell, State]:
        """The states of these backends' cells, as far as they are known when the budget ends.

        None in a simulation: whatever a twin computes proves nothing about a card.
        """
        if simulated():
            return {}
        end = time.monotonic() + BUDGET_SECONDS
        for cell, backend in backends.items():
            if not backend.row.needs_proof or cell in self._states:
                continue
            if time.monotonic() > end:
                log.warning("no time left to prove %s; run expertd verify", "/".join(cell))
                continue
            self._prove(cell, backend)
        return {cell: self._states[cell] for cell in backends if cell in self._states}

    def shape_states(self, layer: Layer, buckets: Sequence[int]) -> dict[Cell, State]:
        """The states of a layer's backends on its shape; those that need no proof are left out."""
        wanted = {c: b for c, b in layer.backends.items() if b.row.needs_proof}
        known = self._of_shape(layer.spec, len(buckets))
        if new := {cell: b for cell, b in wanted.items() if cell not in known}:
            proofs = prove_shape(replace(layer, backends=new), buckets, BUDGET_SECONDS)
            self._store.keep_shape(layer.spec, proofs.values(), len(buckets))
            known.update({cell: proof.state for cell, proof in proofs.items()})
            for cell, proof in proofs.items():
                _tell(cell, proof)
        return {cell: known[cell] for cell in wanted}

    def _of_shape(self, spec: LayerSpec, buckets: int) -> dict[Cell, State]:
        key = shape_of(spec)
        if key not in self._shapes:
            self._shapes[key] = self._store.shape_states(spec, buckets)
        return self._shapes[key]

    @property
    def known(self) -> dict[Cell, State]:
        """Everything that is proven or failed here so far."""
        return dict(self._states)

    def _prove(self, cell: Cell, backend: Backend) -> None:
        proof = prove(backend.row, cell.quant, self._device)
        if proof.trials:
            self._states[cell] = proof.state
            self._store.keep([proof])
        _tell(cell, proof)


def _tell(cell: Cell, proof: Proof) -> None:
    for failure in proof.failures:
        log.error("%s failed its proof: %s", "/".join(cell), failure)
    if not proof.whole:
        log.warning("no time left to prove %s on its shape; run expertd verify", "/".join(cell))
