"""The 128×4 layout of block scales."""

from __future__ import annotations

from torch import Tensor


def swizzle(scales_LRC: Tensor) -> Tensor:
    """Scales [L, R, C] in the order of 128×4 tiles, under the same shape; R % 128 == C % 4 == 0.

    Within a tile, row 32 b + d and column c stand at 16 d + 4 b + c.
    """
    held, rows, columns = scales_LRC.shape
    assert rows % 128 == 0 and columns % 4 == 0, "weights are padded before their scales get here"
    tiles = scales_LRC.reshape(held, rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 1, 4, 3, 2, 5).reshape(held, rows, columns)
