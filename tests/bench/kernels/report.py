"""What was measured, as JSON and as Markdown tables with goals and marks beside."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from tests.bench.kernels.cells import Cell
from tests.bench.kernels.roof import Card
from tests.bench.kernels.router import RouterCell
from tests.bench.kernels.shapes import GOALS, Shape

OWN, LARGE = "triton", 256

PACKAGES = ("torch", "triton", "flashinfer-python")


def circumstances(device: torch.device, card: Card) -> dict[str, Any]:
    """Card, versions, command and measured rates."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "card": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "versions": {name: _version(name) for name in PACKAGES},
        "command": " ".join(["python -m tests.bench.kernels", *sys.argv[1:]]),
        "bandwidth": card.bandwidth,
        "peaks": card.peaks,
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def as_json(
    facts: dict[str, Any], cells: Iterable[Cell], routers: Iterable[RouterCell]
) -> dict[str, Any]:
    return facts | {
        "cells": [asdict(cell) for cell in cells],
        "router": [asdict(cell) for cell in routers],
    }


def as_markdown(
    facts: dict[str, Any],
    shapes: Sequence[Shape],
    cells: Sequence[Cell],
    routers: Sequence[RouterCell],
) -> str:
    """The tables of one run."""
    lines = [*_head(facts), *_summary(cells)]
    for shape in shapes:
        mine = [cell for cell in cells if cell.shape == shape.name]
        lines += _table(shape, mine)
    if routers:
        lines += _router_table(routers)
    return "\n".join(lines) + "\n"


def _head(facts: dict[str, Any]) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    rates = ", ".join(f"{d} GEMM {peak / 1e12:.0f} TFLOP/s" for d, peak in facts["peaks"].items())
    yield f"{facts['date']}, {facts['card']}, driver {facts['driver']}, CUDA {facts['cuda']}, "
    yield f"{versions}. Copy {facts['bandwidth'] / 1e12:.2f} TB/s, {rates}."
    yield ""
    yield f"    {facts['command']}"
    yield ""
    yield "Each cell: µs of a whole routed call (interquartile range), times of the roof, relative"
    yield "error against fp32. E: measured eagerly, no graph. WRONG: more than its format may err."
    yield "Bold: the fastest plan that is right."


def fastest(cells: Iterable[Cell]) -> dict[tuple[str, int], Cell]:
    """The cell of the fastest plan that is right, by shape and number of tokens."""
    best: dict[tuple[str, int], Cell] = {}
    for cell in cells:
        key = (cell.shape, cell.tokens)
        if cell.timing and cell.right and (key not in best or _median(cell) < _median(best[key])):
            best[key] = cell
    return best


def _summary(cells: Sequence[Cell]) -> Iterator[str]:
    """How many goals are met, and how often our own kernels are the fastest."""
    best = fastest(cells).values()
    asked = {(cell.shape, cell.tokens) for cell in cells if cell.timing}
    aimed = [key for key in asked if key[1] in GOALS]
    met = [cell for cell in best if cell.goal is not None and cell.ratio <= cell.goal]
    large = [key for key in asked if key[1] >= LARGE]
    ours = [c for c in best if c.tokens >= LARGE and c.plan.startswith(f"{OWN} ")]
    yield ""
    yield f"Goals met: {len(met)} of {len(aimed)}. Fastest in cells of {LARGE} tokens and more: our"
    yield f"own Triton kernels in {len(ours)} of {len(large)} (goal: half)."


def _table(shape: Shape, cells: list[Cell]) -> Iterator[str]:
    yield from ("", f"## {shape.name}", "")
    timed = [cell for cell in cells if cell.timing]
    tokens = sorted({cell.tokens for cell in timed})
    found = {n: cell for (_, n), cell in fastest(timed).items()}
    best = [found.get(n) for n in tokens]
    if timed:
        yield _line("tokens", [str(n) for n in tokens])
        yield "|---" * (len(tokens) + 1) + "|"
    for plan in dict.fromkeys(cell.plan for cell in timed):
        mine = {cell.tokens: cell for cell in timed if cell.plan == plan}
        yield _line(plan, [_shown(mine.get(n), found.get(n)) for n in tokens])
    if timed:
        yield _line("roof of the fastest, µs", [_roof(cell) for cell in best])
        yield _line("goal", [_goal(cell) for cell in best])
    for name, marks in shape.marks.items():
        if timed:
            yield _line(name, [f"{marks[n]:.2f}" if n in marks else "" for n in tokens])
    faults = dict.fromkeys(f"{c.plan}, {c.tokens or 'all'} tokens: {c.fault}" for c in cells
                           if c.fault)  # fmt: skip
    yield from (f"\n- {fault}" for fault in faults)
    if not cells:
        yield "No plan of the backends asked for can run it here."


def _line(head: str, cells: Iterable[str]) -> str:
    return "| " + " | ".join((head, *cells)) + " |"


def _median(cell: Cell) -> float:
    assert cell.timing is not None
    return cell.timing.median


def _shown(cell: Cell | None, best: Cell | None) -> str:
    if cell is None or cell.timing is None:
        return "-"
    t = cell.timing
    notes = ("" if t.graph else " E") + ("" if cell.right else " WRONG")
    text = f"{t.median:.1f} ({t.high - t.low:.1f}) {cell.ratio:.2f}×"
    return (f"**{text}**" if cell is best else text) + f" {cell.error:.0e}{notes}"


def _roof(best: Cell | None) -> str:
    if best is None or best.roof is None:
        return "-"
    return f"{best.roof.us:.1f} {best.roof.bound} ({best.dtype})"


def _goal(best: Cell | None) -> str:
    if best is None or best.goal is None:
        return "-"
    return f"{best.goal:.2f}× {'met' if best.ratio <= best.goal else 'missed'}"


def _router_table(routers: Sequence[RouterCell]) -> Iterator[str]:
    yield from ("", "## The router", "", "µs (interquartile range); the goal at 64 × 256 is 10 µs.")
    yield ""
    yield _line("method", ["tokens × experts", "K", "Triton", "torch operations"])
    yield "|---|---|---|---|---|"
    for cell in routers:
        pair = (cell.ours, cell.torch)
        times = [f"{t.median:.1f} ({t.high - t.low:.1f}){'' if t.graph else ' E'}" for t in pair]
        yield _line(cell.name, [f"{cell.tokens} × {cell.experts}", str(cell.top_k), *times])
