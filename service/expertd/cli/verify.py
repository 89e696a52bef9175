"""expertd verify: prove every cell that this machine can run, against the fp32 reference.

With --model the plans of a checkpoint's layers too, each on its true shape and tuned.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertd.backends.build import torch_device, work_on
from expertd.capability.device import DeviceInfo, detect
from expertd.capability.match import device_refusals
from expertd.capability.row import Row, State
from expertd.capability.rows import BACKENDS, ROWS
from expertd.cli import NO_PLAN, arguments, shapes
from expertd.cli.tables import console, folded
from expertd.config import cache_directory
from expertd.core import QuantScheme
from expertd.engine.loader import layer_of
from expertd.engine.resident import Trust
from expertd.engine.tuner import Tuning
from expertd.errors import InvalidArgument
from expertd.proof.run import Proof, prove
from expertd.proof.shape import prove_shape
from expertd.proof.store import ProofStore

SHAPE_SECONDS = 600.0
"""Nobody waits for a server to start here."""

COLOURS = {State.PROVEN: "green", State.FAILED: "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    shapes.add_arguments(parser, required=False)
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda:N")
    parser.add_argument("--backend", default=None, metavar="NAME")
    parser.add_argument("--seed", type=arguments.seed, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 if every cell that ran is proven, 1 if one failed, 3 if none can run here."""
    if args.backend is not None and args.backend not in BACKENDS:
        raise InvalidArgument(f"--backend {args.backend}: accepted: {', '.join(BACKENDS)}")
    device = detect(args.device)
    work_on(torch_device(device))
    cells = list(usable_cells(device, args.backend))
    proofs = list(_proven(cells, device, args.seed))
    ProofStore(cache_directory(), device).keep(proofs)
    on_shapes = dict(_on_shapes(args, device)) if args.model else {}
    if args.json:
        print(json.dumps(report(device, proofs, on_shapes)))
    else:
        _show(f"{device.name}, FlashInfer {device.flashinfer or 'absent'}", proofs)
        for layers, mine in on_shapes.items():
            _show(f"layers {layers} of {args.model}", mine)
    everything = [*proofs, *(proof for mine in on_shapes.values() for proof in mine)]
    if not everything:
        of = f" of {args.backend}" if args.backend else ""
        print(
            f"expertd: nothing is proven: no kernel{of} can run on {device.name}; "
            "expertd capabilities says why",
            file=sys.stderr,
        )
        return NO_PLAN
    return 1 if any(proof.state is State.FAILED for proof in everything) else 0


def _on_shapes(args: argparse.Namespace, device: DeviceInfo) -> Iterator[tuple[str, list[Proof]]]:
    """Proofs of all plans that the layers of each shape may run on, by those layers' numbers."""
    buckets, store = shapes.buckets_of(args), ProofStore(cache_directory(), device)
    tuning = Tuning(buckets, enabled=False)
    for resident, layers in shapes.first_layers(args, device, tuning, Trust(declared=True)):
        if (layer := layer_of(resident)) is None:
            continue
        if args.backend is not None:
            mine = {c: b for c, b in layer.backends.items() if c.backend == args.backend}
            layer = replace(layer, backends=mine)
        proofs = list(prove_shape(layer, buckets, SHAPE_SECONDS).values())
        store.keep_shape(resident.spec, proofs, len(buckets))
        yield layers, proofs


def usable_cells(device: DeviceInfo, backend: str | None) -> Iterator[tuple[Row, QuantScheme]]:
    """The cells that can run on a device; identity has nothing to prove."""
    for row in ROWS:
        if row.identity or backend not in (None, row.backend) or device_refusals(row, device):
            continue
        yield from ((row, quant) for quant in row.quants)


def _proven(cells: list[tuple[Row, QuantScheme]], device: DeviceInfo, seed: int) -> Iterable[Proof]:
    bar = Console(stderr=True)
    with Progress(console=bar, disable=not bar.is_terminal, transient=True) as progress:
        task = progress.add_task("proving", total=len(cells))
        for row, quant in cells:
            progress.update(task, description=f"{row.entry} {quant}")
            yield prove(row, quant, device, seed)
            progress.advance(task)


def report(
    device: DeviceInfo, proofs: list[Proof], on_shapes: dict[str, list[Proof]]
) -> dict[str, Any]:
    """What --json prints."""
    told = [
        {"layers": layers, "cells": [_cell(proof) for proof in mine]}
        for layers, mine in on_shapes.items()
    ]
    return {
        "device": device.name,
        "arch": device.arch,
        "flashinfer": device.flashinfer,
        "cells": [_cell(proof) for proof in proofs],
        "shapes": told,
    }


def _cell(proof: Proof) -> dict[str, Any]:
    failures = [
        {"case": t.case, "layer": t.layer, "error": _number(t.error), "fault": t.fault}
        for t in proof.failures
    ]
    return {
        **proof.cell._asdict(),
        "state": proof.state,
        "absent": list(proof.absent),
        "trials": len(proof.trials),
        "worst": _number(proof.worst),
        "tolerance": proof.tolerance,
        "failures": failures,
    }


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _show(title: str, proofs: list[Proof]) -> None:
    table = Table(title=title)
    for column in ("backend", "entry", "mode", "rows", "weights", "state", "trials", "worst / may"):
        table.add_column(column)
    for proof in proofs:
        colour = COLOURS.get(proof.state, "yellow")
        bound = f"{proof.worst:.1e} / {proof.tolerance:.0e}" if proof.trials else ""
        state = f"[{colour}]{proof.state}[/]"
        table.add_row(*proof.cell, state, str(len(proof.trials)), bound)
    out = console()
    out.print(folded(table))
    for text in dict.fromkeys(text for proof in proofs for text in proof.absent):
        out.print(f"not run: {text}")
    for proof in proofs:
        for trial in proof.failures[:5]:
            what = trial.fault or f"error {trial.error:.2e}"
            out.print(f"{'/'.join(proof.cell)}: {trial.case} ({trial.layer}): {what}")
