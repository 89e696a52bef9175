"""expertd call: send random rows to a layer and show the plan, the times and the result's norm."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from expertd.bench.load import find_layer, make_call
from expertd.cli import arguments
from expertd.cli.tables import console
from expertd_client import Reply
from expertd_client.calls import CallOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_target(parser)
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=arguments.layer, required=True)
    parser.add_argument("--tokens", type=arguments.rows, default=16, help="rows (default 16)")
    parser.add_argument("--routing", choices=("logits", "topk"), default="logits")
    parser.add_argument(
        "--backend", type=arguments.backend, metavar="auto|NAME", help="pin a backend"
    )
    parser.add_argument("--seed", type=arguments.seed, default=0)
    parser.add_argument(
        "--timeout", type=arguments.seconds, default=30.0, help="seconds (default 30)"
    )
    parser.add_argument("--request-id", default="", metavar="ID", help="to find it in the logs")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


@arguments.asks
def run(args: argparse.Namespace) -> int:
    reply = _call(args)
    report = _report(reply, args.request_id)
    print(json.dumps(report)) if args.json else _show(report)
    return 0


def _call(args: argparse.Namespace) -> Reply[NDArray[Any]]:
    target = arguments.target(args)
    layer = find_layer(target, args.model, args.layer, args.backend, args.timeout)
    call = make_call(layer, args.tokens, args.seed, args.routing)
    options: CallOptions = {**call.options, "request_id": args.request_id or None}
    with target.client() as client:
        return client.call(args.model, args.layer, call.rows, timeout=args.timeout, **options)


def _report(reply: Reply[NDArray[Any]], request_id: str) -> dict[str, Any]:
    """ForwardReply's fields without the tensor's bytes, and the norm of the output."""
    fields = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply)}
    output = fields.pop("output")
    norm = float(np.linalg.norm(output.astype(np.float64)))
    return {
        "output": {"dtype": output.dtype.name, "shape": list(output.shape)},
        **fields,
        "request_id": request_id,
        "norm": norm,
    }


def _show(report: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in report.items():
        table.add_row(name, f"{value / 1e6:.3f} ms" if name.endswith("_ns") else str(value))
    console().print(table)
