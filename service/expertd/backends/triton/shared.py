"""How much shared memory a tile needs, and the tiles that fit a card instead of those that do not.

The need is an upper bound of what Triton lays out; tests/gpu/test_shared.py compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from expertd.backends.triton.tiles import Cut, Tile
from expertd.backends.triton.weights import Matrix

BESIDE = 3 * 1024
"""Barriers of tensor maps, and what warps exchange when they reduce."""


@dataclass(frozen=True, slots=True)
class Card:
    """arch is "" where there is no card; shared: bytes that one block may have."""

    arch: str
    shared: int

    @property
    def overlaps(self) -> bool:
        """Whether the tensor cores read a step from shared memory while others are being loaded."""
        return self.arch.startswith(("sm9", "sm10"))


def fitted(cut: Cut, first: Matrix, second: Matrix, gated: bool, card: Card) -> Cut:
    """The cut, or one that comes nearest to it and fits the card's shared memory."""
    return replace(
        cut,
        first=_fitted(cut.first, first, 2 if gated else 1, card),
        second=_fitted(cut.second, second, 1, card),
    )


def _fitted(tile: Tile, matrix: Matrix, halves: int, card: Card) -> Tile:
    tried = (tile, *_smaller(tile, matrix))
    fitting = (one for one in tried if need(one, matrix, halves, card) <= card.shared)
    return next(fitting, tried[-1])


def _smaller(tile: Tile, matrix: Matrix) -> Iterator[Tile]:
    """Ever smaller tiles: fewer stages, then lower, then less deep where no block fixes that."""
    while tile.stages > 2:
        tile = replace(tile, stages=tile.stages - 1)
        yield tile
    if tile.grouped:
        tile = replace(tile, m=64, short=0, grouped=False, registers=0)
        yield tile
    while tile.m > 16:
        lower = tile.m // 2
        tile = replace(tile, m=lower, short=tile.short if tile.short < lower else 0)
        yield tile
    while tile.k > 64 and not _of_blocks(matrix):
        tile = replace(tile, k=tile.k // 2)
        yield tile


def need(tile: Tile, matrix: Matrix, halves: int, card: Card) -> int:
    """Bytes of shared memory, at most, of a GEMM over so many halves of a matrix."""
    # What the tensor cores read by themselves is not free before they are done: one more buffer.
    waits = card.overlaps and (tile.m >= 64 or tile.swapped)
    buffers = tile.stages if waits else max(tile.stages - 1, 1)
    # Decoded weights pass through it where the tensor cores do not take them from registers.
    decoded = 0 if matrix.format.name == "plain" else 2 * tile.n * tile.k
    loop = buffers * _step(tile, matrix, halves) + decoded
    # After the loop its memory is free for the sums, on their way to the threads that store them.
    turned = tile.m * tile.n * 9 // 2
    return max(loop, turned) + BESIDE


def _step(tile: Tile, matrix: Matrix, halves: int) -> int:
    """Bytes of rows, of weights and of groups' scales that a step of the loop loads."""
    form, values = matrix.format, halves * tile.n * tile.k
    rows = tile.m * tile.k * (1 if matrix.fp8 else 2)
    weights = values * matrix.weight.element_size() // form.packed
    if form.group in (0, 128):
        return rows + weights
    assert matrix.scale is not None
    return rows + weights + values // form.group * matrix.scale.element_size()


def _of_blocks(matrix: Matrix) -> bool:
    return matrix.format.group == 128 or matrix.kind == "groups"
