"""expertd plan: which range of experts each replica should serve, from measured load."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from expertd.cli.tables import console
from expertd.errors import InvalidArgument
from expertd.weights.balance import Ranges, balance, even_ranges, imbalance, predicted

Answer = dict[str, Any]
Counts = dict[str, list[int]]
"""Rows per expert of each layer, by the layer's number as JSON has it."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--counts",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="what `expertd counts` wrote of each replica; they are added up",
    )
    parser.add_argument("--replicas", type=int, required=True, metavar="N")
    parser.add_argument(
        "--redundant", type=int, default=0, metavar="R", help="experts held once more (default 0)"
    )
    parser.add_argument(
        "--most", type=int, metavar="K", help="the most experts a replica has room for"
    )
    parser.add_argument("--json", action="store_true", help="for programs")


def run(args: argparse.Namespace) -> int:
    counts = add_up([read_counts(path) for path in args.counts])
    answer = propose(counts, args.replicas, args.redundant, args.most)
    if args.json:
        print(json.dumps(answer, indent=1))
    else:
        show(answer, console())
    return 0


def read_counts(path: Path) -> Counts:
    """The counts in a file; raises InvalidArgument for anything else."""
    try:
        layers = json.loads(path.read_text())["layers"]
        counts = {str(int(layer)): [_count(rows) for rows in row] for layer, row in layers.items()}
    except OSError as error:
        raise InvalidArgument(f"--counts {path}: {error}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidArgument(
            f'--counts {path}: {{"layers": {{"0": [rows of each expert, ...]}}}} is accepted, '
            f"`expertd counts` writes it; {type(error).__name__}: {error}"
        ) from None
    return counts


def _count(rows: Any) -> int:
    if type(rows) is not int or rows < 0:
        raise ValueError(f"{rows!r:.40} is no number of rows")
    return rows


def add_up(files: Sequence[Counts]) -> Counts:
    """The counts of several replicas as one; raises InvalidArgument unless layers are alike."""
    layers: dict[str, list[list[int]]] = {}
    for counts in files:
        for layer, rows in counts.items():
            layers.setdefault(layer, []).append(rows)
    sizes = {len(rows) for several in layers.values() for rows in several}
    if len(sizes) != 1:
        raise InvalidArgument(
            f"--counts: layers with {sorted(sizes) or 'no'} experts; one range is held of every "
            "layer, so all must have equally many"
        )
    return {layer: [sum(e) for e in zip(*rows, strict=True)] for layer, rows in layers.items()}


def propose(counts: Counts, replicas: int, redundant: int, most: int | None) -> Answer:
    """The ranges for the load of all layers together, and what they mean for each layer."""
    loads = [sum(rows) for rows in zip(*counts.values(), strict=True)]
    ranges = balance(loads, replicas, redundant, most)
    shares = predicted(loads, ranges)
    copies = Counter(expert for held in ranges for expert in held)
    return {
        "replicas": [
            {"experts": f"{held.start}-{held.stop - 1}", "count": len(held), "rows": rows}
            for held, rows in zip(ranges, shares, strict=True)
        ],
        "redundant": {str(e): copies[e] - 1 for e in sorted(copies) if copies[e] > 1},
        "max_over_mean": imbalance(shares),
        "even_max_over_mean": imbalance(predicted(loads, even_ranges(len(loads), replicas))),
        "layers": {layer: _ratio(rows, ranges) for layer, rows in counts.items()},
    }


def _ratio(loads: list[int], ranges: Ranges) -> float:
    return imbalance(predicted(loads, ranges))


def show(answer: Answer, console: Console) -> None:
    """The table for a person, and what it is better than."""
    table = Table("replica", "serve with", "experts", "rows predicted")
    for number, replica in enumerate(answer["replicas"]):
        flags = f"--experts {replica['experts']}"
        table.add_row(str(number), flags, str(replica["count"]), str(replica["rows"]))
    console.print(table)
    worst = max(answer["layers"], key=lambda layer: float(answer["layers"][layer]))
    console.print(
        f"predicted max/mean {answer['max_over_mean']:.3f} over all layers, "
        f"{answer['layers'][worst]:.3f} in layer {worst}, the least even; "
        f"equal ranges would have {answer['even_max_over_mean']:.3f}"
    )
    if redundant := answer["redundant"]:
        told = ", ".join(f"{e} (+{more})" for e, more in redundant.items())
        console.print(f"redundant experts: {told}")
