"""How the work of a GEMM is cut, by the size of the batch."""

from __future__ import annotations

from dataclasses import dataclass

from expertd.backends.triton.weights import Native
from expertd.core import LayerSpec


@dataclass(frozen=True, slots=True)
class Tile:
    """m rows, n columns and k deep; so many blocks share a weight tile in turn (together)."""

    m: int
    n: int
    k: int
    together: int = 1
    warps: int = 4
    stages: int = 3
    swapped: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """The tiles of both GEMMs, which have the same m.

    sorted: pairs are sorted by expert; else each is a block of its own. in_loop: rows are quantised
    to groups inside the first GEMM and not by a kernel before it.
    """

    sorted: bool
    in_loop: bool
    first: Tile
    second: Tile


def cut_for(spec: LayerSpec, native: Native, tokens: int, top_k: int) -> Cut:
    """The cut for a batch."""
    pairs = tokens * top_k
    a_expert = pairs / max(1, min(pairs, spec.held))
    m = 16 if a_expert <= 12 else 32 if a_expert <= 24 else 64 if a_expert <= 96 else 128
    groups = native.first.kind == "groups"
    deep = 64
    warps = 4 if m < 128 else 8
    n = 128 if m > 16 or groups else 64
    k = 128 if native.first.fp8 or native.first.format.group == 128 else deep
    tile = Tile(m, n, k, 1 if m < 64 else 4, warps, 3)
    small = tokens == 1
    return Cut(not small, small and native.first.kind in ("plain", "groups"), tile, tile)
