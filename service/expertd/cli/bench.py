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

from expertd.bench.carriers import CARRIERS
from expertd.bench.load import Cell, Layer, find_layer, make_call, try_call
from expertd.bench.plot import plot
from expertd.bench.summary import Summary, summarize
from expertd.bench.workers import Share, Workers, split
from expertd.cli import arguments
from expertd.cli.arguments import accepted, listed
from expertd.cli.tables import console, folded
from expertd.config import number
from expertd.errors import InvalidArgument

MOST_PROCESSES = 32
TOKENS = listed(number(1, 1 << 24))
CALLERS = listed(number(1, 4096))
RATES = listed(number(0.001, 1e6, float))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_target(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=arguments.layer, required=True)
    parser.add_argument(
        "--tokens", type=TOKENS, default=(1, 16, 256), help="rows of a call (default 1,16,256)"
    )
    parser.add_argument(
        "--concurrency", type=CALLERS, default=(1, 8, 32), help="callers (default 1,8,32)"
    )
    parser.add_argument(
        "--rate",
        type=RATES,
        default=(0.0,),
        help="calls a second that arrive at random (open loop); without it each caller calls "
        "again as soon as it is answered (closed loop)",
    )
    parser.add_argument("--routing", choices=("logits", "topk"), default="topk")
    parser.add_argument(
        "--backend", type=arguments.backend, metavar="auto|NAME", help="pin a backend"
    )
    parser.add_argument(
        "--carrier",
        choices=tuple(CARRIERS),
        default="grpc",
        help="how calls travel (default grpc); for http, TARGET is the server's HTTP address",
    )
    parser.add_argument(
        "--duration",
        type=arguments.seconds,
        default=10.0,
        help="seconds of each cell (default 10)",
    )
    parser.add_argument(
        "--processes",
        type=accepted(number(1, MOST_PROCESSES)),
        default=min(os.cpu_count() or 1, MOST_PROCESSES),
        help="of callers (default: one for each core)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw latency over rate as SVG")


@arguments.asks
def run(args: argparse.Namespace) -> int:
    if args.plot and not args.plot.parent.is_dir():
        raise InvalidArgument(f"--plot {args.plot}: {args.plot.parent} is not a directory")
    target = arguments.target(args)
    layer = find_layer(target, args.model, args.layer, args.backend, carrier=args.carrier)
    try_call(layer, args.routing)
    summaries: list[Summary] = []
    try:
        for summary in _measure(args, layer):
            summaries.append(summary)
    finally:  # Ctrl-C, or a caller who was killed, takes nothing away of what is known
        if summaries:
            _tell(args, summaries)
    problems = [_problem(summary) for summary in summaries if summary.failed or not summary.calls]
    for problem in problems:
        print(f"expertd: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _tell(args: argparse.Namespace, summaries: Sequence[Summary]) -> None:
    title = f"{args.model}/{args.layer} over {args.carrier}"
    if args.json:
        print(json.dumps({"layer": title, "cells": [cell.as_json() for cell in summaries]}))
    else:
        console().print(folded(_table(title, summaries)))
    if args.plot:  # last: where it cannot be written, the figures are there
        args.plot.write_text(plot(title, summaries), encoding="utf-8")


def _problem(summary: Summary) -> str:
    """What is wrong with a cell, in a line."""
    told = ", ".join(f"{count} {reason}" for reason, count in summary.refused.items())
    what = f"failed: {told}" if summary.failed else f"were all refused: {told or 'there were none'}"
    return f"calls of {summary.tokens} tokens by {summary.concurrency} callers {what}"


def _measure(args: argparse.Namespace, layer: Layer) -> Iterator[Summary]:
    """Each cell after the other; the progress bar is for terminals only."""
    cells = [Cell(*sizes) for sizes in product(args.tokens, args.concurrency, args.rate)]
    bar = Console(stderr=True)
    with (
        Workers(args.processes) as workers,
        Progress(console=bar, transient=True, disable=not bar.is_terminal) as progress,
    ):
        for cell in progress.track(cells, description="cells"):
            share = Share(layer, cell, args.duration, 0, args.routing)
            outcomes = workers.run(split(share, args.processes))
            call = make_call(layer, cell.tokens, 0, args.routing)
            yield (summary := summarize(cell, call.nbytes, outcomes))
            if summary.failed and not summary.calls:
                return  # nobody is there any more


def _table(title: str, summaries: Sequence[Summary]) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    names = "tokens callers rate/s calls/s tokens/s GB/s p50 p90 p99 batch queue stages kernel rpc"
    for name in names.split():
        table.add_column(name, justify="right")
    table.add_column("refused")
    for one in summaries:
        p50, p90, p99, _ = one.latency_ms.values()
        sizes = (str(one.tokens), str(one.concurrency), f"{one.rate:g}" if one.rate else "–")
        rates = map(_figures, (one.calls_per_s, one.tokens_per_s, one.gb_per_s))
        times = (f"{value:.2f}" for value in (p50, p90, p99, one.mean_batch))
        parts = (f"{value:.3f}" for value in one.split_ms.values())
        table.add_row(*sizes, *rates, *times, *parts, _refused(one))
    table.caption = "milliseconds; queue, stages, kernel as the server tells them, rpc the rest"
    return table


def _figures(value: float) -> str:
    """At least three of them."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _refused(summary: Summary) -> str:
    told = ", ".join(f"{count} {reason}" for reason, count in summary.refused.items())
    return f"{told} (p50 {summary.refused_p50_ms:.2f} ms)" if told else ""
