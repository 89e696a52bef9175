"""expertd explain: which kernels can run a layer, why others cannot, and what to change."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertd.capability.device import DeviceInfo, device_named
from expertd.capability.explain import Absent, explain
from expertd.capability.plan import States
from expertd.capability.spec import call_form, parse_spec
from expertd.cli import NO_PLAN, arguments
from expertd.cli.capabilities import COLOURS, add_device_arguments
from expertd.cli.tables import console, folded
from expertd.core import CallForm, LayerSpec
from expertd.errors import InvalidArgument, NotFound
from expertd.proof.store import proven_shapes, proven_states
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs, ranges

Answer = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", type=Path, metavar="PATH", help="a checkpoint's directory")
    what.add_argument("--spec", metavar="JSON", help="a layer as a JSON object")
    parser.add_argument(
        "--layer", type=arguments.layer, metavar="N", help="only this layer of the model"
    )
    parser.add_argument("--backend", default="", metavar="NAME", help="only this backend")
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    device = device_named(args.device, args.flashinfer)
    backend = "" if args.backend == "auto" else args.backend
    if args.spec is not None:
        answers = [_of_spec(args.spec, device, backend)]
        shown: Answer = answers[0]
    else:
        answers = _of_model(args.model, args.layer, device, backend)
        shown = answers[0] if args.layer is not None else {"layers": answers}
    if args.json:
        print(json.dumps(shown, indent=1))
    else:
        for answer in answers:
            show(answer, device, console())
    return 0 if all(answer["plans"] for answer in answers) else NO_PLAN


def _of_spec(text: str, device: DeviceInfo, backend: str) -> Answer:
    try:
        given = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InvalidArgument(f"--spec is not JSON: {error}") from None
    described = parse_spec(given)
    return _answer(described.spec, described.form(backend), device, proven_states(device))


def _of_model(path: Path, layer: int | None, device: DeviceInfo, backend: str) -> list[Answer]:
    """One answer for each kind of layer, under the numbers of those layers."""
    wanted = None if layer is None else frozenset({layer})
    alike: dict[LayerSpec, list[int]] = {}
    for number, spec in _specs(path, wanted).items():
        alike.setdefault(spec, []).append(number)
    states = proven_states(device)
    answers = {
        ranges(numbers): _answer(spec, call_form(spec, backend=backend), device, states)
        for spec, numbers in alike.items()
    }
    return [{"layers": numbers, **answer} for numbers, answer in answers.items()]


def _specs(path: Path, wanted: frozenset[int] | None) -> dict[int, LayerSpec]:
    try:
        return layer_specs(Checkpoint.open(path), wanted)
    except NotFound as missing:
        raise InvalidArgument(f"--layer: {missing}") from None


def _answer(spec: LayerSpec, form: CallForm, device: DeviceInfo, states: States) -> Answer:
    shape = proven_shapes(device, spec)
    return explain(
        spec, form, device, states=states, shape=shape, absent=_absent_here(spec, device)
    )


def _absent_here(spec: LayerSpec, device: DeviceInfo) -> Absent | None:
    """On a card that is here: which kernels would have to be built or fetched first."""
    if device.kind != "cuda" or device.simulated:
        return None
    from expertd.backends.build import absent, torch_device

    return lambda row: absent(row, spec, torch_device(device))


def show(answer: Answer, device: DeviceInfo, console: Console) -> None:
    """The tables for a person, and the line that says what to change."""
    layers = f"layers {answer['layers']}, " if "layers" in answer else ""
    flashinfer = device.flashinfer or "absent"
    title = f"{layers}routing {answer['routing_method']} on {device.arch}, FlashInfer {flashinfer}"
    console.print(folded(_plans(answer, title)))
    console.print(folded(_rejections(answer)))
    if answer["advice"]:
        console.print(f"[bold red]no plan:[/] {answer['advice']}")


def _plans(answer: Answer, title: str) -> Table:
    table = Table("", "backend", "mode", "entry", "activations", "state", title=title)
    for rank, plan in enumerate(answer["plans"], 1):
        proof = " on this shape" if plan.get("proof") == "shape" else ""
        state = f"[{COLOURS[plan['state']]}]{plan['state']}{proof}[/]"
        names = ("backend", "mode", "entry", "activation")
        table.add_row(str(rank), *(plan[name] for name in names), state)
    return table


def _rejections(answer: Answer) -> Table:
    """The rows that lack least come first; rows with the same reasons share a line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for entry in sorted(answer["rejected"], key=lambda entry: len(entry["reasons"])):
        texts = tuple(reason["text"] for reason in entry["reasons"])
        alike.setdefault((entry["backend"], *texts), []).append(_name(entry))
    table = Table("not usable", "why", show_lines=True)
    for (backend, *why), names in alike.items():
        table.add_row("\n".join((f"[bold]{backend}[/]", *names)), "\n".join(map(_bullet, why)))
    return table


def _name(entry: Answer) -> str:
    twin = f"{entry['entry']}, {entry['activation']} activations"
    return twin if entry["entry"] != entry["backend"] else f"{entry['activation']} activations"


def _bullet(text: str) -> str:
    return f"- {escape(text)}"
