"""Times the kernels of this card: every usable plan of a layer, from rows and routing to output.

The card's copy bandwidth and GEMM peaks are measured first; weights are made on the device, calls
are captured in CUDA graphs and find their weights outside the L2 cache. With --out, the tables are
written anew after each shape: what ends early leaves those before.

Run: python -m tests.bench.kernels [--shapes deepseek qwen] [--tokens 1 64] [--backends triton]
     [--router] [--seconds 0.2] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tests.bench.kernels.ahead import compile_ahead
from tests.bench.kernels.cells import Bench, Cell
from tests.bench.kernels.plans import named
from tests.bench.kernels.report import as_json, as_markdown, circumstances
from tests.bench.kernels.roof import measure_card
from tests.bench.kernels.router import RouterCell, router_cells
from tests.bench.kernels.shapes import SHAPES, TOKENS, Shape

from expertd.capability.device import detect
from expertd.capability.rows import BACKENDS


def tell(cell: Cell) -> None:
    """One line of progress."""
    head = f"{cell.shape:16} {cell.tokens:5} {cell.plan:30}"
    if cell.timing is None or cell.roof is None:
        print(f"{head} {cell.fault}", flush=True)
        return
    t = cell.timing
    spread, how = t.high - t.low, "" if t.graph else f"  eager: {t.why_eager}"
    wrong = "" if cell.right else "  WRONG"
    figures = f"{t.median:9.1f} us  iqr {spread:6.1f}  {cell.ratio:5.2f} x roof"
    print(f"{head} {figures}  error {cell.error:.1e}{wrong}{how}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="*", default=[], help="names or parts of names")
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--backends", nargs="*", default=[], choices=BACKENDS)
    parser.add_argument("--router", action="store_true", help="time the router too")
    parser.add_argument("--no-experts", action="store_true", help="leave the experts out")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each cell")
    parser.add_argument("--out", type=Path, help="a folder for kernels.json and kernels.md")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not torch.cuda.is_available():
        sys.exit("there is no CUDA device here")
    device = torch.device("cuda:0")
    card = measure_card(device, args.seconds)
    facts = circumstances(device, card)
    print(json.dumps(facts), flush=True)
    shapes = [] if args.no_experts else list(named(SHAPES, args.shapes))
    begin = time.monotonic()
    ahead = compile_ahead(shapes, args.tokens, args.backends)
    print(f"compiled for {ahead} calls in {time.monotonic() - begin:.0f} s", flush=True)
    with torch.inference_mode():
        routers = list(router_cells(device, args.seconds)) if args.router else []
        bench = Bench(
            device, detect("cuda:0"), card, args.tokens, args.backends, args.seconds, tell
        )  # fmt: skip
        cells: list[Cell] = []
        for done, shape in enumerate(shapes, 1):
            cells += bench.shape(shape)
            write(args.out, facts, shapes[:done], cells, routers)
            print(f"{shape.name}: {time.monotonic() - begin:.0f} s", flush=True)
    write(args.out, facts, shapes, cells, routers)
    print(as_markdown(facts, shapes, cells, routers))


def write(
    folder: Path | None,
    facts: dict[str, Any],
    shapes: Sequence[Shape],
    cells: Sequence[Cell],
    routers: Sequence[RouterCell],
) -> None:
    """kernels.md and kernels.json of what was measured so far."""
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.md").write_text(as_markdown(facts, shapes, cells, routers))
    (folder / "kernels.json").write_text(json.dumps(as_json(facts, cells, routers), indent=1))


if __name__ == "__main__":
    main()
