"""`expertd quantize`: a plain checkpoint with its routed experts quantised."""

from __future__ import annotations

import argparse
from pathlib import Path

SCHEMES = ("fp8_block128", "fp8_tensor", "fp8_channel", "mxfp8", "nvfp4", "mxfp4", "mxint4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, metavar="PATH", help="a checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="the directory to create")
    parser.add_argument("--quant", required=True, choices=SCHEMES)


def run(args: argparse.Namespace) -> int:
    """Write the checkpoint; raises InvalidArgument and FailedPrecondition for what cannot be."""
    from expertd.core import QuantScheme
    from expertd.weights.requantize import quantize_checkpoint

    written: list[int] = []
    quantize_checkpoint(args.model, args.out, QuantScheme(args.quant), written.append)
    print(f"{args.out}: {len(written)} layers, {sum(written)} bytes of experts in {args.quant}")
    return 0
