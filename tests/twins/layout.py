"""Native weight layouts, undone: section 3.1 read backwards."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Rows per shuffle block, by the epilogue tile of the GEMM that reads the weights.
SHUFFLE_BLOCK = {128: 32, 64: 16}


def prepared_order(rows: int, *, interleaved: bool, epilogue: int | None) -> Tensor:
    """Which canonical row stands at each prepared row; epilogue None means not shuffled."""
    place = torch.arange(rows)
    shuffled = place
    if epilogue is not None:
        block = SHUFFLE_BLOCK[epilogue]
        within = place % block
        shuffled = place - within + (block // 8) * (within % 8) + within // 8
    if not interleaved:
        return shuffled
    pair, is_gate = shuffled // 2, shuffled % 2
    return pair + is_gate * (rows // 2)


def canonical_rows(prepared: Tensor, order: Tensor) -> Tensor:
    """[..., rows, K] with its rows put back into canonical order."""
    return prepared.index_select(-2, torch.argsort(order).to(prepared.device))


def canonical_columns(prepared: Tensor, order: Tensor) -> Tensor:
    """[..., rows] (a bias or channel scales) put back into canonical order."""
    return prepared.index_select(-1, torch.argsort(order).to(prepared.device))


def unblocked(blocks: Tensor) -> Tensor:
    """[K / b, M, b] as [M, K]."""
    count, rows, width = blocks.shape
    return blocks.permute(1, 0, 2).reshape(rows, count * width)


def unswizzled(scales: Tensor) -> Tensor:
    """[R, C] from its 128x4 swizzle; R a multiple of 128 and C of 4, so nothing is padded."""
    return scales.reshape(-1)[_offsets(*scales.shape).to(scales.device)]


@cache
def _offsets(rows: int, columns: int) -> Tensor:
    """[R, C]: where the scale of each row and column stands."""
    r = torch.arange(rows).unsqueeze(1)
    c = torch.arange(columns).unsqueeze(0)
    tile = (r // 128) * (columns // 4) + c // 4
    return tile * 512 + (r % 32) * 16 + (r % 128) // 32 * 4 + c % 4
