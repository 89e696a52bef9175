"""expertd capabilities: every kernel cell with its state and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from expertd.capability.device import ARCHS, device_named
from expertd.capability.report import capabilities

COLOURS = {"proven": "green", "present": "green", "declared": "yellow", "failed": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    names = f"auto, cuda:N, {', '.join(ARCHS)}"
    parser.add_argument("--device", default="auto", help=f"one of {names} (default auto)")
    parser.add_argument("--flashinfer", metavar="VERSION", help="as if that version were installed")


def run(args: argparse.Namespace) -> int:
    found = capabilities(device_named(args.device, args.flashinfer))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, Console())
    return 0


def show(found: dict[str, Any], console: Console) -> None:
    """The table for a person."""
    title = f"{found['device']}, FlashInfer {found['flashinfer'] or 'absent'}"
    table = Table("backend", "entry", "mode", "activations", "weights", "state", "why", title=title)
    for cell in found["cells"]:
        colour = COLOURS[cell["state"]]
        names = ("backend", "entry", "mode", "activation_quant", "quant")
        state = f"[{colour}]{cell['state']}[/]"
        table.add_row(*(cell[name] for name in names), state, cell["why"])
    console.print(table)
    for line in found["drift"]:
        console.print(f"[yellow]drift[/] {line}")
