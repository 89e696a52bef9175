"""Proofs on disk, so that a cell is proven once on a machine and not at every start; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertd.capability.device import DeviceInfo
from expertd.capability.row import Cell, State
from expertd.config import cache_directory
from expertd.core import LayerSpec, PlanMode, QuantScheme
from expertd.proof.files import read_entries, replace_entries
from expertd.proof.fingerprint import fingerprint

if TYPE_CHECKING:
    from expertd.proof.run import Proof


def proven_states(device: DeviceInfo) -> dict[Cell, State]:
    """What this user's earlier runs proved on a device that is here; nothing for another."""
    return {} if device.simulated else ProofStore(cache_directory(), device).states()


def proven_shapes(device: DeviceInfo, spec: LayerSpec) -> dict[Cell, State]:
    """The same of a layer's shape."""
    return {} if device.simulated else ProofStore(cache_directory(), device).shape_states(spec)


class ProofStore:
    """A JSON file per fingerprint in a directory; one that cannot be read counts as empty.

    A proof is of a cell in general, or of a cell on one shape of layer.
    """

    def __init__(self, directory: Path, device: DeviceInfo) -> None:
        self._path = directory / f"proofs-{fingerprint(device)}.json"

    def states(self) -> dict[Cell, State]:
        """What earlier runs proved of cells in general, or saw fail."""
        return self._states("", 0)

    def shape_states(self, spec: LayerSpec, buckets: int = 0) -> dict[Cell, State]:
        """The same on layers of this shape, at so many buckets of tokens or more."""
        return self._states(shape_of(spec), buckets)

    def keep(self, proofs: Iterable[Proof]) -> None:
        """Adds proofs that ran, in place of older ones of their cells."""
        self._keep([_entry(proof) for proof in proofs if proof.trials])

    def keep_shape(self, spec: LayerSpec, proofs: Iterable[Proof], buckets: int) -> None:
        """Adds proofs on a shape, unless they neither succeeded nor failed."""
        named = {"shape": shape_of(spec), "buckets": buckets}
        ended = (proof for proof in proofs if proof.state is not State.PRESENT)
        self._keep([{**_entry(proof), **named} for proof in ended])

    def _states(self, shape: str, buckets: int) -> dict[Cell, State]:
        return {
            cell_of(entry): State(entry["state"])
            for entry in self._entries()
            if entry.get("shape", "") == shape and entry.get("buckets", 0) >= buckets
        }

    def _keep(self, added: list[dict[str, Any]]) -> None:
        replaced = {_key(entry) for entry in added}
        kept = [entry for entry in self._entries() if _key(entry) not in replaced]
        replace_entries(self._path, "proofs", kept + added)

    def _entries(self) -> list[dict[str, Any]]:
        return [entry for entry in read_entries(self._path, "proofs") if _readable(entry)]


def _readable(entry: dict[str, Any]) -> bool:
    try:
        return bool(_key(entry) and State(entry["state"])) and isinstance(
            entry.get("buckets", 0), int
        )
    except (KeyError, ValueError):
        return False


def _key(entry: dict[str, Any]) -> tuple[str, Cell]:
    return str(entry.get("shape", "")), cell_of(entry)


def _entry(proof: Proof) -> dict[str, Any]:
    return {**proof.cell._asdict(), "state": proof.state, "worst": proof.worst}


def cell_of(entry: dict[str, Any]) -> Cell:
    """The cell that an entry of a file names; raises KeyError or ValueError."""
    return Cell(
        str(entry["backend"]),
        str(entry["entry"]),
        PlanMode(entry["mode"]),
        str(entry["activation_quant"]),
        QuantScheme(entry["quant"]),
    )


def shape_of(spec: LayerSpec) -> str:
    """A name that layers share whose kernels do the same work."""
    facts = asdict(replace(spec, routing_refusal=None))
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
