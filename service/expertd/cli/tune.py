"""expertd tune: measure the plans of a checkpoint's layers anew, for the next start of a server."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from rich.table import Table

from expertd.backends.build import torch_device, work_on
from expertd.capability.device import DeviceInfo, detect
from expertd.cli import shapes
from expertd.cli.tables import console, folded
from expertd.engine.resident import Resident, Trust
from expertd.engine.tuner import Tuning

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes.add_arguments(parser, required=True)
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda:N")
    parser.add_argument("--trust", choices=("proven", "declared"), default="proven")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 when every shape was measured; raises what keeps a layer from loading."""
    device = detect(args.device)
    work_on(torch_device(device))
    answers = list(tuned(args, device))
    if args.json:
        print(json.dumps({"device": device.name, "shapes": answers}))
    else:
        for answer in answers:
            console().print(folded(_table(answer)))
    return 0


def tuned(args: argparse.Namespace, device: DeviceInfo) -> Iterator[Answer]:
    """What was measured of each shape."""
    tuning = Tuning(shapes.buckets_of(args), renew=True)
    trust = Trust(args.trust == "declared")
    for resident, layers in shapes.first_layers(args, device, tuning, trust):
        yield answer(resident, layers)


def answer(resident: Resident, layers: str) -> Answer:
    """The times of a layer's plans, which of them each bucket runs on, and what that loses.

    loss is the chosen plan's time over the fastest measured one's: more than 1 only where the
    fastest needs a weight layout that is not kept.
    """
    timings = resident.timings
    kept = [cell for cell in timings.plans if cell in resident.backends]
    chosen = timings.choices(kept, from_logits=True) if kept else ()
    buckets: list[Answer] = []
    for index, cell in enumerate(chosen):
        times = {c: t[index] for c, t in timings.totals(from_logits=True).items() if len(t) > index}
        loss = times[cell] / min(times.values())
        buckets.append({"tokens": 1 << index, "plan": "/".join(cell[:4]), "loss": loss})
    return {
        "layers": layers,
        "plans": {"/".join(cell[:4]): list(times) for cell, times in timings.plans.items()},
        "router": list(timings.router),
        "buckets": buckets,
    }


def _table(found: Answer) -> Table:
    title = f"layers {found['layers']}: microseconds by tokens of a batch"
    table = Table("tokens", *found["plans"], "chosen / fastest", title=title)
    for index, bucket in enumerate(found["buckets"]):
        times = (
            _time(times, index, chosen=name == bucket["plan"])
            for name, times in found["plans"].items()
        )
        table.add_row(str(bucket["tokens"]), *times, f"{bucket['loss']:.3f}")
    return table


def _time(times: list[float], index: int, chosen: bool) -> str:
    text = f"{times[index]:.1f}" if index < len(times) else "-"
    return f"[bold green]{text}[/]" if chosen else text
