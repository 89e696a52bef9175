"""expertd capabilities: every kernel cell with its state and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from expertd.capability.device import ARCHS, device_named
from expertd.capability.report import capabilities
from expertd.cli.tables import console, folded
from expertd.proof.store import proven_states

COLOURS = {"proven": "green", "present": "green", "declared": "yellow", "failed": "red"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_device_arguments(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    names = f"auto, cuda:N, {', '.join(ARCHS)}"
    parser.add_argument("--device", default="auto", help=f"one of {names} (default auto)")
    parser.add_argument("--flashinfer", metavar="VERSION", help="as if that version were installed")


def run(args: argparse.Namespace) -> int:
    device = device_named(args.device, args.flashinfer)
    found = capabilities(device, proven_states(device))
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        show(found, console())
    return 0


def show(found: dict[str, Any], console: Console) -> None:
    """The table for a person: cells of one entry that share a state and a reason share a line."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for cell in found["cells"]:
        key = tuple(cell[name] for name in ("backend", "entry", "mode", "state", "why"))
        alike.setdefault(key, []).append(f"{cell['activation_quant']} x {cell['quant']}")
    title = f"{found['device']}, FlashInfer {found['flashinfer'] or 'absent'}"
    table = Table("entry", "activations x weights", "state", "why", title=title, show_lines=True)
    for (backend, entry, mode, state, why), formats in alike.items():
        name = f"[bold]{backend}[/]\n{entry}\n{mode}"
        table.add_row(name, "\n".join(formats), f"[{COLOURS[state]}]{state}[/]", escape(why))
    console.print(folded(table))
    for line in found["drift"]:
        console.print(f"[yellow]drift[/] {escape(line)}")
