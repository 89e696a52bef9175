"""The order in which the kernels want the rows of a matrix, and blocks of its columns first.

Closed forms: order[j] is the row of the canonical matrix that stands in row j of the native one.
"""

from __future__ import annotations

import torch
from torch import Tensor

SHUFFLE_BLOCK = 32
"""Rows shuffled together for an epilogue tile of 128, the only one that we prepare weights for."""
BLOCK_BYTES = 128
"""BlockMajorK stores this many bytes of each row together."""


def interleaved(rows: int) -> Tensor:
    """[up; gate] in turns: up 0, gate 0, up 1, gate 1, …"""
    half = rows // 2
    row = torch.arange(rows)
    return row // 2 + row % 2 * half


def shuffled(rows: int) -> Tensor:
    """Each block of rows as the MMA reads it."""
    row = torch.arange(rows)
    within, eighth = row % SHUFFLE_BLOCK, SHUFFLE_BLOCK // 8
    return row - within + within % 8 * eighth + within // 8


def first_order(rows: int, gated: bool) -> Tensor:
    """The order of the first matrix: interleaved where it has two halves, then shuffled."""
    order = shuffled(rows)
    return interleaved(rows)[order] if gated else order


def take_rows(tensor: Tensor, order: Tensor) -> Tensor:
    """The rows [L, order, …] of a tensor [L, M, …]."""
    # One-byte floats have no index_select everywhere; their bytes have.
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.index_select(1, order.to(tensor.device)).view(tensor.dtype)


def block_major(matrix_LMK: Tensor) -> Tensor:
    """[L, M, K] → [L, K/b, M, b], b elements being BLOCK_BYTES."""
    held, rows, columns = matrix_LMK.shape
    width = BLOCK_BYTES // matrix_LMK.element_size()
    blocks = matrix_LMK.reshape(held, rows, columns // width, width)
    return blocks.transpose(1, 2).contiguous()
