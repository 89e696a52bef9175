"""expertd bench: load a server and show what it gives, and where each call's time goes."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertd.bench.load import Cell, Layer, find_layer, make_call
from expertd.bench.plot import plot
from expertd.bench.summary import Summary, summarize
from expertd.bench.workers import Share, Workers, split
from expertd.errors import InvalidArgument
from expertd_client import ExpertdError

CARRIERS = ("grpc",)
MOST_PROCESSES = 32
TABLE_WIDTH = 120


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="the server's gRPC address, HOST:PORT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--tokens", type=_counts, default=(1, 16, 256), help="rows of a call")
    parser.add_argument("--concurrency", type=_counts, default=(1, 8, 32), help="callers")
    parser.add_argument(
        "--rate",
        type=_rates,
        default=(0.0,),
        help="calls a second that arrive at random (open loop); without it each caller calls "
        "again as soon as it is answered (closed loop)",
    )
    parser.add_argument("--routing", choices=("logits", "topk"), default="topk")
    parser.add_argument("--backend", default=None, help="pin a backend")
    parser.add_argument("--carrier", choices=CARRIERS, default="grpc")
    parser.add_argument("--duration", type=float, default=10.0, help="seconds of each cell")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of callers")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency over rate as SVG")


def run(args: argparse.Namespace) -> int:
    if args.duration <= 0 or not 1 <= args.processes <= MOST_PROCESSES:
        raise InvalidArgument(
            f"--duration {args.duration} --processes {args.processes} given; accepted: a positive "
            f"duration, 1 to {MOST_PROCESSES} processes"
        )
    try:
        layer = find_layer(args.target, args.model, args.layer, args.backend)
        summaries = list(_measure(args, layer))
    except ExpertdError as error:
        print(f"expertd: {error}", file=sys.stderr)
        return 1
    title = f"{args.model}/{args.layer} over {args.carrier}"
    if args.plot:
        args.plot.write_text(plot(title, summaries), encoding="utf-8")
    if args.json:
        print(json.dumps({"layer": title, "cells": [cell.as_json() for cell in summaries]}))
    else:
        _show(_table(title, summaries))
    return 0 if all(summary.calls for summary in summaries) else 1


def _measure(args: argparse.Namespace, layer: Layer) -> Iterator[Summary]:
    """Each cell after the other; the progress bar is for terminals only."""
    cells = [Cell(*sizes) for sizes in product(args.tokens, args.concurrency, args.rate)]
    console = Console(stderr=True)
    with (
        Workers(args.processes) as workers,
        Progress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        for cell in progress.track(cells, description="cells"):
            share = Share(layer, cell, args.duration, 0, args.routing)
            outcomes = workers.run(split(share, args.processes))
            call = make_call(layer, cell.tokens, 0, args.routing)
            yield summarize(cell, call.nbytes, outcomes)


def _show(table: Table) -> None:
    """Figures are never cut off: where the terminal is too narrow, lines wrap."""
    console = Console()
    console.width = max(console.width, TABLE_WIDTH)
    console.print(table)


def _table(title: str, summaries: Sequence[Summary]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = "tokens callers rate/s calls/s tokens/s GB/s p50 p90 p99 batch queue stages kernel rpc"
    for name in names.split():
        table.add_column(name, justify="right")
    table.add_column("refused")
    for one in summaries:
        p50, p90, p99, _ = one.latency_ms.values()
        sizes = (str(one.tokens), str(one.concurrency), f"{one.rate:g}" if one.rate else "–")
        rates = (f"{one.calls_per_s:.0f}", f"{one.tokens_per_s:.0f}", f"{one.gb_per_s:.3f}")
        times = (f"{value:.2f}" for value in (p50, p90, p99, one.mean_batch))
        parts = (f"{value:.3f}" for value in one.split_ms.values())
        table.add_row(*sizes, *rates, *times, *parts, _refused(one))
    table.caption = "milliseconds; queue, stages, kernel as the server tells them, rpc the rest"
    return table


def _refused(summary: Summary) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in summary.refused.items())
    return f"{told} (p50 {summary.refused_p50_ms:.2f} ms)" if told else ""


def _counts(text: str) -> tuple[int, ...]:
    values = tuple(int(part) for part in text.split(","))
    if not values or min(values) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted: numbers from 1, as 1,16,256")
    return values


def _rates(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not values or min(values) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} given; accepted: positive numbers, as 50,100")
    return values
