"""Proofs on disk, so that a cell is proven once on a machine and not at every start; no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertd import __version__
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Cell, State
from expertd.config import cache_directory
from expertd.core import LayerSpec, PlanMode, QuantScheme
from expertd.proof.files import read_entries, replace_entries

if TYPE_CHECKING:
    from expertd.proof.run import Proof

DRIVER = Path("/proc/driver/nvidia/version")


def fingerprint(device: DeviceInfo) -> str:
    """Everything that can change what a kernel computes here: proofs hold for this and no other."""
    facts = {
        "device": device.name,
        "arch": device.arch,
        "simulated": device.simulated,
        "driver": DRIVER.read_text() if DRIVER.exists() else "",
        "torch": _version("torch"),
        "triton": _version("triton"),
        "flashinfer": device.flashinfer,
        "expertd": __version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def proven_states(device: DeviceInfo) -> dict[Cell, State]:
    """What this user's earlier runs proved on a device that is here; nothing for another."""
    return {} if device.simulated else ProofStore(cache_directory(), device).states()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


class ProofStore:
    """A JSON file per fingerprint in a directory; one that cannot be read counts as empty."""

    def __init__(self, directory: Path, device: DeviceInfo) -> None:
        self._path = directory / f"proofs-{fingerprint(device)}.json"

    def states(self) -> dict[Cell, State]:
        """What earlier runs proved or saw fail."""
        return {cell_of(entry): State(entry["state"]) for entry in self._entries()}

    def keep(self, proofs: Iterable[Proof]) -> None:
        """Adds proofs that ran, in place of older ones of their cells."""
        ran = [_entry(proof) for proof in proofs if proof.trials]
        cells = {cell_of(entry) for entry in ran}
        kept = [entry for entry in self._entries() if cell_of(entry) not in cells]
        replace_entries(self._path, "proofs", kept + ran)

    def _entries(self) -> list[dict[str, Any]]:
        return [entry for entry in read_entries(self._path, "proofs") if _readable(entry)]


def _readable(entry: dict[str, Any]) -> bool:
    try:
        return bool(cell_of(entry) and State(entry["state"]))
    except (KeyError, ValueError):
        return False


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
