"""How the work of a GEMM is cut: measured on a card (tiles.json), or by rule where nothing was.

tests/bench/tiles.py makes the table.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from functools import cache
from importlib import resources

from expertd.backends.triton.weights import Matrix


@dataclass(frozen=True, slots=True)
class Tile:
    """m rows, n columns and k deep; so many blocks share a weight tile in turn (together).

    swapped: weights are the left operand. mapped: weights, and rows that are neighbours, are read
    through tensor maps, by the copy engine that cards have from SM90 on. short: blocks of at most
    so many rows are computed as that high; 0: all are m high. grouped: m is two or three groups of
    64 rows, multiplied one after the other, and short one or two. registers: the most that a thread
    may have, so that more programs fit a multiprocessor; 0: as many as there are. more: so many
    rows beyond m a block may have, where weights are packed and swapped, and rows split.
    """

    m: int
    n: int
    k: int
    together: int = 1
    warps: int = 4
    stages: int = 3
    swapped: bool = False
    mapped: bool = False
    short: int = 0
    grouped: bool = False
    registers: int = 0
    more: int = 0

    @property
    def high(self) -> int:
        """How many rows a block has at most."""
        return self.m + self.more


@dataclass(frozen=True, slots=True)
class Cut:
    """The tiles of both GEMMs.

    sorted: pairs are sorted by expert; else each is a block of its own. in_loop: the rows of packed
    weights, which come in words of four, are split likewise inside the first GEMM and not before
    it, and inside the second if its blocks are low.
    """

    sorted: bool
    in_loop: bool
    first: Tile
    second: Tile

    @property
    def heights(self) -> tuple[int, int]:
        """How high the blocks of each GEMM are."""
        return self.first.high, self.second.high


@dataclass(frozen=True, slots=True)
class Work:
    """What decides a cut beside the size of the batch; arch is "" where there is no card."""

    arch: str
    weights: str
    rows: str
    gated: bool
    hidden: int
    intermediate: int
    held: int


@dataclass(frozen=True, slots=True)
class Measured:
    """The fastest cut of a work at so many pairs."""

    work: Work
    pairs: int
    cut: Cut


@cache
def table() -> tuple[Measured, ...]:
    """What was measured."""
    text = (resources.files(__package__) / "tiles.json").read_text()
    return tuple(_measured(entry) for entry in json.loads(text))


def _measured(entry: dict[str, object]) -> Measured:
    fields = dict(entry)
    pairs, work, cut = fields["pairs"], fields["work"], fields["cut"]
    assert isinstance(pairs, int) and isinstance(work, dict) and isinstance(cut, dict)
    tiles = {name: Tile(*cut[name]) for name in ("first", "second")}
    return Measured(Work(**work), pairs, Cut(cut["sorted"], cut["in_loop"], **tiles))


def measured(work: Work, pairs: int) -> Cut | None:
    """The cut of the nearest measurement of this format on this card; None without any.

    The very layer comes first; of others, those with about as many pairs an expert. What was
    measured without a gate is no guide to a gate's two sums, but these are to one.
    """
    same = [one for one in table() if _format(one.work) == _format(work)]
    same = [one for one in same if one.work.gated or not work.gated]
    if not same:
        return None
    return min(same, key=lambda one: _farness(one, work, pairs)).cut


def _format(work: Work) -> tuple[str, str, str]:
    return work.arch, work.weights, work.rows


def _farness(one: Measured, work: Work, pairs: int) -> tuple[bool, bool, float, float]:
    return one.work != work, one.work.gated != work.gated, *_distance(one, work, pairs)


def _distance(one: Measured, work: Work, pairs: int) -> tuple[float, float]:
    """Of the pairs an expert, and of all: few and very few pairs are one an expert alike."""
    all_pairs = abs(math.log2(pairs / one.pairs))
    if one.work == work:
        return 0.0, all_pairs
    each = an_expert(pairs, work.held) / an_expert(one.pairs, one.work.held)
    return abs(math.log2(each)), all_pairs


def an_expert(pairs: int, held: int) -> float:
    """How many pairs an expert with any has, if they are spread evenly."""
    return pairs / min(pairs, held)


def by_rule(pairs: int, held: int, first: Matrix, second: Matrix, tokens: int) -> Cut:
    """A cut that any card can run: its tiles fit 96 KB of shared memory."""
    each = an_expert(pairs, held)
    # Blocks of scales fix the depth: rows of two bytes leave room for 64 of them.
    highest = 64 if first.format.group == 128 and not first.fp8 else 128
    m = next((size for size in (16, 32, 64) if each <= 0.75 * size), highest)
    loose = tokens == 1
    return Cut(not loose, loose, _by_rule(first, m), _by_rule(second, m))


def _by_rule(matrix: Matrix, m: int) -> Tile:
    wide = matrix.fp8 or matrix.format.group == 128
    heavy = wide or (m > 16 and matrix.format.packed == 1)
    return Tile(
        m,
        n=128 if wide or m > 16 else 64,
        k=128 if wide else 64,
        together=1 if m < 64 else 4,
        warps=4 if m < 128 else 8,
        stages=2 if heavy else 3,
    )
