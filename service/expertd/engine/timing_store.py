"""The tuner's tables on disk: one file for each device and set of versions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from expertd.capability.device import DeviceInfo
from expertd.core import LayerSpec
from expertd.engine.timings import Times, Timings
from expertd.proof.files import read_entries, replace_entries
from expertd.proof.fingerprint import fingerprint
from expertd.proof.store import cell_of, shape_of


class TimingStore:
    """Timings by the shape of a layer; what cannot be read was not measured."""

    def __init__(self, directory: Path, device: DeviceInfo) -> None:
        self._path = directory / f"timings-{fingerprint(device)}.json"

    def find(self, spec: LayerSpec) -> Timings | None:
        """What was measured on a layer of this shape."""
        shape = shape_of(spec)
        found = (
            entry for entry in read_entries(self._path, "shapes") if entry.get("shape") == shape
        )
        entry = next(found, None)
        try:
            return None if entry is None else _timings(entry)
        except (KeyError, ValueError, TypeError):
            return None

    def keep(self, spec: LayerSpec, timings: Timings) -> None:
        """Adds a table in place of an older one of the same shape."""
        shape = shape_of(spec)
        others = [e for e in read_entries(self._path, "shapes") if e.get("shape") != shape]
        plans = [
            {**cell._asdict(), "microseconds": list(times)} for cell, times in timings.plans.items()
        ]
        size = f"{spec.hidden} x {spec.intermediate} {spec.quant}"
        entry = {
            "shape": shape,
            "layer": f"{spec.held} of {spec.num_experts} experts, {size}",
            "buckets": timings.buckets,
            "plans": plans,
            "router": list(timings.router),
        }
        replace_entries(self._path, "shapes", [*others, entry])


def _timings(entry: dict[str, Any]) -> Timings | None:
    try:
        plans = {cell_of(plan): _times(plan["microseconds"]) for plan in entry["plans"]}
        return Timings(plans, _times(entry["router"]), int(entry["buckets"]))
    except (KeyError, ValueError, TypeError):
        return None


def _times(values: list[float]) -> Times:
    times = tuple(map(float, values))
    if not all(0 < time < float("inf") for time in times):
        raise ValueError(f"{times} are no microseconds")
    return times
