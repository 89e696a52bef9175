"""Searches the fastest tiles of our Triton kernels on the card that is here.

    python -m tests.bench.tiles --out tiles.json [--shapes …] [--tokens …]

Kernels are compiled by many processes first; then each GEMM of each shape is timed by graph replay
with each candidate, for every height of blocks that may pay, and the fastest is kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path

import torch
from tests.bench.kernels.shapes import SHAPES, TOKENS, Shape
from tests.bench.kernels.timing import time_calls
from tests.bench.kernels.weights import random_batches, random_weights
from torch import Tensor

from expertd.backends.base import Batch
from expertd.backends.triton.backend import Triton, card_of
from expertd.backends.triton.launch import Call
from expertd.backends.triton.shared import need
from expertd.backends.triton.tiles import Cut, Tile, an_expert, by_rule
from expertd.capability.rows.triton import ROWS
from expertd.proof.run import relative_error
from expertd.weights.canonical import ExpertWeights
from expertd.weights.matrix import allocate

DEVICE = torch.device("cuda:0")
HEIGHTS = (8, 16, 32, 64, 128, 192)
SAME = 0.03
"""The most that two tilings of one GEMM differ: roundings to e4m3 may fall elsewhere."""
ACTIVATION = {"fp8_block128": "fp8_group128", "fp8_tensor": "fp8_tensor"}


@dataclass(frozen=True)
class Found:
    """A tile of a GEMM, and its time."""

    tile: Tile
    us: float


def heights(pairs: int, held: int, packed: bool) -> list[int]:
    """Those near to what an expert gets; only decoded weights are multiplied by 8 rows, and only
    others by groups of 64."""
    each = an_expert(pairs, held)
    sizes = HEIGHTS[:-1] if packed else HEIGHTS[1:]
    near = [m for m in sizes if 0.4 * each <= m <= 4 * each]
    return (near or [sizes[0] if each < 16 else 128])[-3:]


@dataclass(frozen=True)
class Kind:
    """What of a GEMM decides which tiles may pay."""

    fp8: bool
    packed: bool
    blocks: bool
    halves: int


def candidates(m: int, kind: Kind) -> Iterator[Tile]:
    """Tiles that may pay at a height."""
    if m >= 128 and not kind.packed:
        yield from in_groups(m, kind)
    if m > 128:
        return
    wide = 128 if kind.fp8 or kind.packed else 64
    depths = (wide,) if kind.blocks or m > 16 else (wide, 2 * wide)
    stages = (2, 3) if kind.packed else (2, 3, 4, 5) if m > 32 else (3, 5)
    # wgmma wants four warps; two multiply decoded weights where they are, as its forerunner does.
    warps = (1, 2, 4) if kind.packed and m <= 32 else (4,) if m <= 32 else (4, 8)
    for n, k, count, deep, (swapped, mapped), short in itertools.product(
        widths(m, kind), depths, warps, stages, ways(m, kind), shorts(m, kind)
    ):
        tile = Tile(m, n, k, 1, count, deep, swapped, mapped, short)
        if fits(tile, kind):
            yield tile
            yield from decoded_once(tile, kind)


def decoded_once(tile: Tile, kind: Kind) -> Iterator[Tile]:
    """Packed weights and many rows: three programs a multiprocessor, or a few rows more."""
    if kind.packed and tile.swapped and tile.m == 64 and tile.warps == 4:
        yield replace(tile, registers=168)
    if kind.packed and tile.swapped and tile.m == 128 and tile.short:
        yield replace(tile, more=16)


def in_groups(m: int, kind: Kind) -> Iterator[Tile]:
    """Rows that are multiplied 64 at a time, where it fits by two programs a multiprocessor."""
    deep = 128 if kind.fp8 else 64
    for n, stages, mapped, short in itertools.product(
        widths(m, kind), (2, 3, 4), (False, True), sorted({64, m - 64})
    ):
        sums = m * n * kind.halves / 256
        tile = Tile(m, n, deep, 1, 8, stages, False, mapped, short, grouped=True)
        if sums <= (160 if kind.blocks else 192):
            yield tile
        if sums <= 64:
            yield replace(tile, registers=128)


def widths(m: int, kind: Kind) -> tuple[int, ...]:
    """Columns; a block of scales bounds them, and its rows' new scales fix them."""
    if kind.blocks:
        return (128,) if kind.halves == 2 else (64, 128)
    # Sums of two halves are twice as wide.
    high = (64, 128) if kind.halves == 2 else (64, 128, 256) if kind.packed else (128, 256)
    return (32, 64, 128) if m <= 32 else high


def ways(m: int, kind: Kind) -> tuple[tuple[bool, bool], ...]:
    """(swapped, mapped): wgmma wants 64 rows on the left, whatever they are rows of."""
    both = ((False, False), (False, True))
    if kind.packed:
        return (*both[: 1 + (m <= 32)], (True, False), (True, True))
    return (*both, (True, True)) if m <= 64 else both


def shorts(m: int, kind: Kind) -> tuple[int, ...]:
    """Not below 16 rows: those are multiplied by another instruction, which may round otherwise,
    and chance decides which rows of an expert are in its short block."""
    if kind.packed and m >= 32:
        return (0, *(part for part in (m // 2, m // 4) if part >= 16))
    return (0, 64) if m == 128 else (0,)


def fits(tile: Tile, kind: Kind) -> bool:
    """Whether registers suffice, and no warp is idle."""
    sums = tile.m * tile.n * kind.halves / (tile.warps * 32)
    wide = tile.n >= min(64, 16 * tile.warps) or not tile.swapped
    busy = wide and (sums >= 32 or tile.warps <= 4)
    return busy and sums <= 160


class Search:
    """One shape: its backend, and the calls of its GEMMs."""

    def __init__(self, shape: Shape, weights: ExpertWeights) -> None:
        quant = shape.spec.quant
        wanted = ACTIVATION.get(str(quant.value), "bf16")
        row = next(r for r in ROWS if quant in r.quants and r.activation_quant == wanted)
        self.shape = shape
        self.backend = Triton(row, shape.spec, DEVICE)
        self.backend.check()
        self.backend.prepare_weights(weights, None)

    def heights(self, pairs: int) -> list[int]:
        return heights(pairs, self.shape.spec.held, self.backend._native.first.format.packed > 1)

    def tiles(self, m: int, second: bool) -> list[Tile]:
        native = self.backend._native
        matrix = native.second if second else native.first
        blocks = matrix.kind == "groups" or matrix.format.group == 128
        halves = 2 if self.shape.spec.activation.gated and not second else 1
        kind = Kind(matrix.fp8, matrix.format.packed > 1, blocks, halves)
        card = card_of(DEVICE)
        fitting = (t for t in candidates(m, kind) if need(t, matrix, halves, card) <= card.shared)
        return list(fitting)

    def call(self, batch: Batch, cut: Cut, second: bool) -> Call:
        assert batch.ids is not None
        memory = self.backend.memory(cut, *batch.ids.shape)
        return self.backend.calls(batch, cut, memory)[int(second)]

    def right(self, batch: Batch, tile: Tile, second: bool) -> bool:
        """Whether a tile answers what the tiles by rule answer: not all that compiles is right."""
        assert batch.ids is not None
        native, (tokens, top_k) = self.backend._native, batch.ids.shape
        rule = by_rule(tokens * top_k, self.shape.spec.held, native.first, native.second, tokens)
        tried = replace(rule, **{"second" if second else "first": tile})
        expected = self._answer(batch, rule)
        return relative_error(self._answer(batch, tried), expected) <= SAME

    def _answer(self, batch: Batch, cut: Cut) -> Tensor:
        out = torch.full(batch.out.shape, torch.nan, device=DEVICE)
        self.backend.run(replace(batch, out=out), cut)
        return out


def by_time(found: Found) -> float:
    return found.us


def both(loose: bool, tile: Tile) -> Cut:
    """The tile for both GEMMs; loose: blocks of one pair. Few rows are split in the loop, unless
    enough warps multiply that these take the weights from registers."""
    return Cut(not loose, loose or tile.m <= 16 and tile.warps < 4, tile, tile)


def compile_all(shapes: Sequence[str], jobs: int, tokens: Sequence[int]) -> None:
    """Every kernel of the search, compiled into Triton's cache by processes side by side."""
    context = multiprocessing.get_context("spawn")
    work = [(name, tuple(tokens), part, jobs) for name in shapes for part in range(jobs)]
    with context.Pool(jobs) as pool:
        done = sum(pool.starmap(_compile_part, work, chunksize=1))
    print(f"compiled {done}", flush=True)


def _compile_part(name: str, tokens: tuple[int, ...], part: int, parts: int) -> int:
    shape = next(s for s in SHAPES if s.name == name)
    few = replace(shape, spec=replace(shape.spec, num_experts=8, expert_end=8))
    search = Search(few, allocate(few.spec, DEVICE, static_inputs="tensor" in few.spec.quant))
    jobs = sorted(set(_kernels(shape, search, tokens)), key=str)
    for _, loose, second, tile in jobs[part::parts]:
        batch = random_batches(few, 1 if loose else 64, 1, DEVICE)[0]
        call = search.call(batch, both(loose, tile), second)
        try:
            call.compile()
        except Exception as error:  # a tile that this card cannot run is no candidate
            print(f"{name} {tile}: {error}"[:120], flush=True)
    return len(jobs[part::parts])


def _kernels(
    shape: Shape, search: Search, tokens: Sequence[int]
) -> Iterator[tuple[int, bool, bool, Tile]]:
    for count in tokens:
        for m in search.heights(count * shape.top_k):
            for second in (False, True):
                for tile in search.tiles(m, second):
                    yield m, count == 1, second, tile


def timed(calls: Sequence[Call], seconds: float) -> float:
    """Microseconds a call; infinite where the card cannot run it."""
    try:
        return time_calls([call.run for call in calls], seconds).median
    except Exception as error:  # a tile that this card cannot run is no candidate
        print(str(error)[:120], flush=True)
        return float("inf")


def search(shape: Shape, tokens: Sequence[int], seconds: float) -> Iterator[dict[str, object]]:
    """The fastest cut of each size of batch."""
    torch.manual_seed(0)
    found = Search(shape, random_weights(shape.spec, DEVICE))
    for count in tokens:
        batches = random_batches(shape, count, 8 if count < 256 else 2, DEVICE)
        tiles = [_best(found, batches, second, seconds) for second in (False, True)]
        print(shape.name, count, [astuple(tile) for tile in tiles], flush=True)
        cut = replace(both(count == 1, tiles[0]), second=tiles[1])
        yield {
            "work": asdict(found.backend._work),
            "pairs": count * shape.top_k,
            "cut": {
                "sorted": cut.sorted,
                "in_loop": cut.in_loop,
                "first": astuple(cut.first),
                "second": astuple(cut.second),
            },
        }


def _best(search: Search, batches: Sequence[Batch], second: bool, seconds: float) -> Tile:
    """The fastest tile of a GEMM at any height that may pay."""
    assert batches[0].ids is not None
    sizes = search.heights(batches[0].ids.numel())
    found = [_fastest(search, batches, m, second, seconds) for m in sizes]
    return min(found, key=by_time).tile


def _fastest(
    search: Search, batches: Sequence[Batch], m: int, second: bool, seconds: float
) -> Found:
    found = []
    for tile in search.tiles(m, second):
        calls = [search.call(b, both(len(b.rows) == 1, tile), second) for b in batches]
        found.append(Found(tile, timed(calls, seconds)))
    near = sorted(found, key=by_time)[:4]
    print("   ", second, [(astuple(one.tile), round(one.us, 1)) for one in near], flush=True)
    best = next(
        one for one in sorted(found, key=by_time) if search.right(batches[0], one.tile, second)
    )
    if m < 32:
        return best
    grouped = []
    for together in (1, 2, 4, 8, 16):
        tile = replace(best.tile, together=together)
        calls = [search.call(b, both(len(b.rows) == 1, tile), second) for b in batches]
        grouped.append(Found(tile, timed(calls, seconds)))
    return min(grouped, key=by_time)


def as_text(entries: Sequence[dict[str, object]]) -> str:
    """JSON with an entry a line."""
    return "[\n" + ",\n".join(json.dumps(entry) for entry in entries) + "\n]\n"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shapes", nargs="*", default=[s.name for s in SHAPES])
    parser.add_argument("--tokens", nargs="*", type=int, default=list(TOKENS))
    parser.add_argument("--seconds", type=float, default=0.01)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    begin = time.monotonic()
    compile_all(args.shapes, args.jobs, args.tokens)
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    entries: list[dict[str, object]] = []
    for shape in SHAPES:
        if shape.name in args.shapes:
            for entry in search(shape, args.tokens, args.seconds):
                entries.append(entry)
                args.out.write_text(as_text(entries))
            torch.cuda.empty_cache()
            print(f"{shape.name} {time.monotonic() - begin:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
