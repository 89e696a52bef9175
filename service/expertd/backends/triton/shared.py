"""How much of a card's memories a tile needs, and the tiles that fit instead of those that do not.

The needs are upper bounds of what Triton lays out; tests/service/backends/test_triton_shared.py
compares them, and tests/gpu/test_shared.py on a card.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from expertd.backends.triton.tiles import Cut, Tile
from expertd.backends.triton.weights import Matrix

BESIDE = 3 * 1024
"""Barriers of tensor maps, and what warps exchange when they reduce."""
COLUMNS = 512
"""Of tensor memory, where cards have it."""


@dataclass(frozen=True, slots=True)
class Card:
    """arch is "" where there is no card; shared: bytes that one block may have."""

    arch: str
    shared: int

    @property
    def overlaps(self) -> bool:
        """Whether the tensor cores read a step from shared memory while others are being loaded."""
        return self.arch.startswith(("sm9", "sm10"))

    @property
    def sums_apart(self) -> bool:
        """Whether the tensor cores keep their sums in a memory of its own, tensor memory."""
        return self.arch.startswith("sm10")


def fitted(cut: Cut, first: Matrix, second: Matrix, gated: bool, card: Card) -> Cut:
    """The cut, or one that comes nearest to it and fits the card's shared memory."""
    return replace(
        cut,
        first=_fitted(cut.first, first, 2 if gated else 1, card),
        second=_fitted(cut.second, second, 1, card),
    )


def _fitted(tile: Tile, matrix: Matrix, halves: int, card: Card) -> Tile:
    if card.sums_apart:
        tile = _narrowed(tile, matrix, halves)
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
    if tile.more:
        tile = replace(tile, more=0)
        yield tile
    while tile.m > 16:
        tile = _lower(tile)
        yield tile
    while tile.k > 64 and not _of_blocks(matrix):
        tile = replace(tile, k=tile.k // 2)
        yield tile


def _lower(tile: Tile) -> Tile:
    m = tile.m // 2
    return replace(tile, m=m, short=tile.short if tile.short < m else 0)


def _narrowed(tile: Tile, matrix: Matrix, halves: int) -> Tile:
    """The tile, or one whose sums fit tensor memory."""
    while columns(tile, matrix, halves) > COLUMNS:
        tile = replace(tile, more=0) if tile.more else tile
        tile = _lower(tile) if tile.swapped else replace(tile, n=tile.n // 2)
    return tile


def columns(tile: Tile, matrix: Matrix, halves: int) -> int:
    """Columns of tensor memory, at most, that a GEMM takes where its sums lie there."""
    high, wide = (tile.n, tile.high) if tile.swapped else (tile.m, tile.n)
    if high < 64:
        return 0  # too few rows for what has its sums there
    packed = matrix.format.packed
    # Each multiplication of a step has sums of its own: packed weights come as four matrices.
    sums = packed * halves * wide
    if packed > 1 and not tile.swapped:
        return sums if high > 64 else sums // 2
    # What is converted before it is multiplied from the left lies beside them.
    left = tile.k // 2 * (halves if tile.swapped else 1)
    return 1 << (sums + left - 1).bit_length()


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
    rows = tile.high * tile.k * (1 if matrix.fp8 else 2)
    weights = values * matrix.weight.element_size() // form.packed
    if form.group in (0, 128):
        return rows + weights
    assert matrix.scale is not None
    return rows + weights + values // form.group * matrix.scale.element_size()


def _of_blocks(matrix: Matrix) -> bool:
    return matrix.format.group == 128 or matrix.kind == "groups"
