"""expertd call: send random rows to a layer and show the plan, the times and the result's norm."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from expertd_client import Client, ExpertdError, Reply
from expertd_client.calls import CallOptions


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="the server's gRPC address, HOST:PORT")
    parser.add_argument("--model", required=True)
    parser.add_argument("--layer", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--routing", choices=("logits", "topk"), default="logits")
    parser.add_argument("--backend", default=None, help="pin a backend")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=30.0)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    try:
        with Client(args.target) as client:
            reply = _call(client, args)
    except ExpertdError as error:
        print(f"expertd: {error}", file=sys.stderr)
        for reason in error.reasons:
            print(f"  {reason.backend}/{reason.mode}: {reason.text}", file=sys.stderr)
        return 1
    report = _report(reply)
    print(json.dumps(report)) if args.json else _show(report)
    return 0


def _call(client: Client, args: argparse.Namespace) -> Reply[NDArray[Any]]:
    layer = client.layer(args.model, args.layer)
    random = np.random.default_rng(args.seed)
    rows = random.standard_normal((args.tokens, layer.hidden)).astype(ml_dtypes.bfloat16)
    routing = _routing(args.routing, random, args.tokens, layer.num_experts, layer.top_k)
    routing["backend"] = args.backend
    return client.call(args.model, args.layer, rows, timeout=args.timeout, **routing)


def _routing(
    form: str, random: np.random.Generator, tokens: int, experts: int, top_k: int
) -> CallOptions:
    """Random routing tensors of the form asked for; none for a layer without experts."""
    if not experts:
        return {}
    logits = random.standard_normal((tokens, experts)).astype(np.float32)
    if form == "logits":
        return {"router_logits": logits}
    ids = np.argsort(-logits, axis=1)[:, : top_k or 1].astype(np.int32)
    weights = np.full(ids.shape, 1.0 / ids.shape[1], dtype=np.float32)
    return {"topk_ids": ids, "topk_weights": weights}


def _report(reply: Reply[NDArray[Any]]) -> dict[str, Any]:
    """ForwardReply's fields without the tensor's bytes, and the norm of the output."""
    fields = {f.name: getattr(reply, f.name) for f in dataclasses.fields(reply)}
    output = fields.pop("output")
    norm = float(np.linalg.norm(output.astype(np.float64)))
    return {
        "output": {"dtype": output.dtype.name, "shape": list(output.shape)},
        **fields,
        "norm": norm,
    }


def _show(report: dict[str, Any]) -> None:
    table = Table(show_header=False)
    for name, value in report.items():
        table.add_row(name, f"{value / 1e6:.3f} ms" if name.endswith("_ns") else str(value))
    Console().print(table)
