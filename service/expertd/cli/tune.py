"""expertd tune: measure the plans of a checkpoint's layers anew, for the next start of a server."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from expertd.backends.build import torch_device
from expertd.capability.device import DeviceInfo, detect
from expertd.config import cache_directory, parse_range, parse_ranges
from expertd.core import LayerSpec
from expertd.core.buckets import token_buckets
from expertd.engine.loader import Loader, ModelSource
from expertd.engine.resident import LayerState, Resident, Residents, Trust
from expertd.engine.timing_store import TimingStore
from expertd.engine.tuner import Tuner, Tuning
from expertd.errors import FailedPrecondition, InvalidArgument, NotFound
from expertd.proof.prover import Prover
from expertd.proof.store import ProofStore
from expertd.weights.layers import ranges

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="PATH")
    parser.add_argument("--layers", type=parse_ranges, metavar="3-10,12")
    parser.add_argument("--experts", type=parse_range, metavar="0-63", help="as the server holds")
    parser.add_argument("--device", default="auto", metavar="auto|cpu|cuda:N")
    parser.add_argument("--max-batch-tokens", type=int, default=8192, metavar="ROWS")
    parser.add_argument("--threads", type=int, default=0, help="as the server's, 0: cores - 1")
    parser.add_argument("--trust", choices=("proven", "declared"), default="proven")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """0 when every shape was measured; raises what keeps a layer from loading."""
    device = detect(args.device)
    torch.set_num_threads(args.threads or max(1, (os.cpu_count() or 2) - 1))
    answers = list(tuned(args, device))
    if args.json:
        print(json.dumps({"device": device.name, "shapes": answers}))
    else:
        for answer in answers:
            Console().print(_table(answer))
    return 0


def tuned(args: argparse.Namespace, device: DeviceInfo) -> Iterator[Answer]:
    """Loads and measures the first layer of each shape, one after the other."""
    loader = _loader(args, device)
    experts = None if args.experts is None else (args.experts[0], args.experts[1] + 1)
    numbers = args.layers and frozenset(n for a, b in args.layers for n in range(a, b + 1))
    source = ModelSource(args.model.name, args.model, numbers, experts)
    alike: dict[LayerSpec, list[Resident]] = {}
    for resident in _announced(loader, source):
        alike.setdefault(resident.spec, []).append(resident)
    for residents in alike.values():
        first = residents[0]
        loader.load(source, [first])
        if first.state is LayerState.FAILED:
            raise FailedPrecondition(f"layer {first.name}: {first.detail}")
        yield answer(first, ranges([resident.layer for resident in residents]))
        loader.unload([first])


def _announced(loader: Loader, source: ModelSource) -> list[Resident]:
    try:
        return loader.announce(source)
    except NotFound as missing:
        raise InvalidArgument(f"--layers: {missing}") from None


def _loader(args: argparse.Namespace, device: DeviceInfo) -> Loader:
    home, target = cache_directory(), torch_device(device)
    tuning = Tuning(token_buckets(args.max_batch_tokens), renew=True)
    tuner = Tuner(TimingStore(home, device), target, tuning)
    prover = Prover(ProofStore(home, device), device)
    return Loader(Residents(), device, target, prover, tuner, Trust(args.trust == "declared"))


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
