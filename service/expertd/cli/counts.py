"""expertd counts: how many rows each expert of a server was given, for `expertd plan`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from expertd.cli import arguments
from expertd.errors import InvalidArgument
from expertd_client import Client


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.add_target(parser)
    parser.add_argument("--model", default=None, help="needed if the server has several")
    parser.add_argument("--out", type=Path, default=None, metavar="FILE", help="else to stdout")


@arguments.asks
def run(args: argparse.Namespace) -> int:
    with arguments.target(args).client() as client:
        text = json.dumps(counts_of(client, args.model), indent=1) + "\n"
    if args.out is None:
        print(text, end="")
    else:
        args.out.write_text(text)
    return 0


def counts_of(client: Client, model: str | None) -> dict[str, Any]:
    """{"model", "layers": {number: [rows of each expert]}}; raises InvalidArgument."""
    found = [info for info in client.layers(model) if info.num_experts]
    models = sorted({info.model for info in found})
    if len(models) != 1:
        raise InvalidArgument(
            f"--model: one of {', '.join(models)} is accepted"
            if models
            else f"no layer with experts of {model or 'any model'} is served"
        )
    return {
        "model": models[0],
        "layers": {str(info.layer): list(info.expert_rows) for info in found},
    }
