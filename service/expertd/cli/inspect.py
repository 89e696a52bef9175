"""`expertd inspect`: what a checkpoint is, what its experts weigh, and how to place them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from math import ceil
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertd.capability.device import DeviceInfo, device_named
from expertd.capability.explain import explain
from expertd.capability.spec import call_form
from expertd.cli.capabilities import add_device_arguments
from expertd.cli.tables import console, folded
from expertd.core import LayerSpec
from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import Model, Survey, ranges, survey
from expertd.weights.placement import Placement, propose
from expertd.weights.source import locate
from expertd.weights.storage import layer_bytes

Answer = dict[str, Any]
UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
LEAST_BYTES, MOST_BYTES = 1 << 10, 1 << 60
RESERVE = 0.1
"""The part of a card that is left to activations, staging and graphs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=Path, metavar="PATH", help="a checkpoint's directory")
    parser.add_argument("--gpu", type=size, metavar="80GiB", help="memory of one card")
    parser.add_argument("--count", type=int, default=1, metavar="N", help="how many cards")
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    if args.count < 1:
        raise InvalidArgument(f"--count {args.count}: at least one card is needed")
    answer = inspect(args.path, device_named(args.device, args.flashinfer), args.gpu, args.count)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer, console())
    return 1 if answer["refused"] else 0


def size(text: str) -> int:
    """Bytes of "80GiB", "80G" or "80e9"; for argparse."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?) *([KMGT]?)(?:iB|B)?", text)
    nbytes = float(found[1]) * (1 << UNITS[found[2]]) if found else 0.0
    if not LEAST_BYTES <= nbytes <= MOST_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r:.80} is no size like 80GiB")
    return int(nbytes)


def inspect(path: Path, device: DeviceInfo, gpu: int | None, count: int) -> Answer:
    """Everything that headers and config tell; reads no weights.

    Raises FailedPrecondition when no layer can be served.
    """
    checkpoint = Checkpoint.open(path, skip_broken=True)
    found = _located(checkpoint, survey(checkpoint))
    specs = found.specs
    if not specs:
        raise next(iter(found.refused.values()))
    answer: Answer = {
        "path": str(checkpoint.root),
        "model_type": Model.of(checkpoint).config.get("model_type"),
        "layers": [_kind(spec, numbers, device) for spec, numbers in _alike(specs).items()],
        "refused": {str(layer): str(why) for layer, why in found.refused.items()},
        "expert_bytes": sum(map(layer_bytes, specs.values())),
        "checkpoint_bytes": sum(e.end - e.begin for e in checkpoint.tensors.values()),
    }
    if gpu is not None:
        answer["placement"] = _placement(specs, int(gpu * (1 - RESERVE)), count)
    return answer


def _located(checkpoint: Checkpoint, found: Survey) -> Survey:
    """The layers of a survey whose tensors are all there, as config and format say."""
    model, specs, refused = Model.of(checkpoint), dict(found.specs), dict(found.refused)
    for layer, spec in found.specs.items():
        try:
            locate(model, layer, spec)
        except FailedPrecondition as why:
            del specs[layer]
            refused[layer] = why
    return Survey(specs, refused)


def _alike(specs: Mapping[int, LayerSpec]) -> dict[LayerSpec, list[int]]:
    """The layers of each kind."""
    alike: dict[LayerSpec, list[int]] = {}
    for number, spec in specs.items():
        alike.setdefault(spec, []).append(number)
    return alike


def _kind(spec: LayerSpec, numbers: list[int], device: DeviceInfo) -> Answer:
    """What layers of one kind are, and what the oracle says about them."""
    told = explain(spec, call_form(spec), device)
    routing = spec.routing
    return {
        "layers": ranges(numbers),
        "hidden": spec.hidden,
        "intermediate": spec.intermediate,
        "num_experts": spec.num_experts,
        "activation": {key: value for key, value in asdict(spec.activation).items() if value},
        "quant": spec.quant.value,
        "expert_bias": spec.expert_bias,
        "routing": {"refused": spec.routing_refusal} if routing is None else asdict(routing),
        "bytes": layer_bytes(spec),
        "bytes_per_expert": layer_bytes(spec) // spec.held,
        "plans": told["plans"],
        "advice": told["advice"],
    }


def _placement(specs: Mapping[int, LayerSpec], room: int, count: int) -> Answer:
    placements = propose(specs, room, count)
    needed = ceil(sum(map(layer_bytes, specs.values())) / room)
    return {
        "room_bytes": room,
        "count": count,
        "fits": placements is not None,
        "cards_needed": needed,
        "cards": [_card(placement) for placement in placements or ()],
    }


def _card(placement: Placement) -> Answer:
    flags = f"--layers {ranges(placement.layers)}"
    if placement.experts is not None:
        flags += f" --experts {placement.experts[0]}-{placement.experts[1] - 1}"
    return {"flags": flags, "bytes": placement.nbytes}


def show(answer: Answer, console: Console) -> None:
    """The tables for a person."""
    total = answer["expert_bytes"]
    title = f"{answer['model_type']}: routed experts {gib(total)}"
    table = Table("layers", "experts", "shape", "activation", "quant", "routing", "bytes", "plans")
    table.title = title
    for kind in answer["layers"]:
        table.add_row(*_row(kind))
    console.print(folded(table))
    for layer, why in answer["refused"].items():
        console.print(f"layer {layer} cannot be served: {why}")
    if "placement" in answer:
        _show_placement(answer["placement"], console)


def _row(kind: Answer) -> tuple[str, ...]:
    routing = kind["routing"]
    plans = ", ".join(plan["backend"] for plan in kind["plans"]) or f"none: {kind['advice']}"
    return (
        kind["layers"],
        str(kind["num_experts"]),
        f"{kind['hidden']} x {kind['intermediate']}",
        str(kind["activation"]["kind"]),
        kind["quant"],
        str(routing.get("method", "top-k ids only")),
        gib(kind["bytes"]),
        plans,
    )


def _show_placement(placement: Answer, console: Console) -> None:
    room = gib(placement["room_bytes"])
    if not placement["fits"]:
        console.print(
            f"does not fit: {placement['count']} cards of {room} for experts; "
            f"{placement['cards_needed']} or more are needed"
        )
        return
    table = Table("card", "serve with", "bytes", title=f"cards with {room} for experts")
    for number, card in enumerate(placement["cards"]):
        table.add_row(str(number), card["flags"], gib(card["bytes"]))
    console.print(folded(table))


def gib(count: int) -> str:
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 28 else f"{count / (1 << 20):.2f} MiB"
