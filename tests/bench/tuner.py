"""Whether the tuner's choice holds: python -m tests.bench.tuner measures each shape twice.

Prints microseconds of each plan at each bucket as the second table has them, and how much slower
the plan that the first table chose is than the fastest of the second: the goal is 1.03 at most.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from tests.bench.graphs import DEVICE, SHAPES, plans, spec_of

from expertd.capability.device import detect
from expertd.capability.row import State
from expertd.core import LayerSpec
from expertd.core.buckets import token_buckets
from expertd.engine.graphs import graphs_for
from expertd.engine.resident import LayerState, Resident
from expertd.engine.timing_store import TimingStore
from expertd.engine.timings import Timings
from expertd.engine.tuner import Tuner, Tuning, rivals

BUCKETS = token_buckets(8192)
GOAL = 1.03


def layer(name: str, spec: LayerSpec) -> Resident:
    """A layer with every plan of this card, taken as proven."""
    found = Resident(name, 0, spec, detect("cuda:0"), state=LayerState.READY)
    found.backends = {backend.row.cell(spec.quant): backend for backend in plans(spec, BUCKETS)}
    found.states = dict.fromkeys(found.backends, State.PROVEN)
    return found


def measured(found: Resident) -> Timings:
    with tempfile.TemporaryDirectory() as home:
        store = TimingStore(Path(home), detect("cuda:0"))
        tuner = Tuner(store, DEVICE, Tuning(BUCKETS, renew=True))
        graphs = graphs_for(DEVICE, BUCKETS, enabled=True)
        with graphs.apart(rivals(found).values()):
            tuner.tune(found)
    return found.timings


def compare(found: Resident) -> float:
    """Prints the table of a shape; the worst of its losses."""
    first, second = measured(found), measured(found)
    cells = list(second.plans)
    names = [f"{cell.backend}/{cell.activation_quant}" for cell in cells]
    print(f"\n{found.model}: tokens, {', '.join(names)}, chosen / fastest")
    worst = 1.0
    for index, choice in enumerate(first.choices(cells, from_logits=True)):
        times = {c: t[index] for c, t in second.plans.items() if len(t) > index}
        if choice in times:
            loss = times[choice] / min(times.values())
            worst = max(worst, loss)
            listed = "  ".join(f"{times[c]:9.1f}" if c in times else f"{'-':>9}" for c in cells)
            print(f"{1 << index:6} {listed}  {loss:.3f}", flush=True)
    return worst


def main() -> int:
    print(torch.cuda.get_device_name(DEVICE), torch.__version__)
    worst = 1.0
    with torch.inference_mode():
        for name, shape in SHAPES.items():
            worst = max(worst, compare(layer(name, spec_of(*shape))))
            torch.cuda.empty_cache()
    print(f"\nworst {worst:.3f}, goal {GOAL}")
    return int(worst > GOAL)


if __name__ == "__main__":
    sys.exit(main())
