"""`expertd demo-model`: write a tiny model to try the service with."""

from __future__ import annotations

import argparse
from pathlib import Path

from expertd.cli import arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    parser.add_argument("--family", default="qwen3_moe", help="default: %(default)s")
    parser.add_argument("--quant", default="fp8_block128", help="default: %(default)s")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Write the model; raises InvalidArgument for what cannot be written."""
    from expertd.weights.demo import write_demo

    write_demo(args.out, args.family, args.quant, args.seed)
    print(f"{args.out}: {args.family} in {args.quant}")
    return 0
