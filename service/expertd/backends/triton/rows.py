"""A call's rows in the form that the first GEMM reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.backends.rows import plain_rows
from expertd.backends.triton.launch import Rows
from expertd.backends.triton.quantize import (
    quantize_fixed,
    quantize_groups,
    quantize_rows,
    round_mxfp8,
)
from expertd.backends.triton.scratch import Shape
from expertd.backends.triton.weights import Kind, Matrix

Buffers = dict[str, Tensor]

FP8 = torch.float8_e4m3fn

PIECE = 32
"""Columns that are put into another order among themselves, that of decode.in_turn."""


def shapes(kind: Kind, rows: int, width: int, compute: torch.dtype) -> dict[str, Shape]:
    """The memory of rows [rows, width] of a kind: codes, and scale where each call has its own."""
    codes = compute if kind in ("plain", "mxfp8") else FP8
    scales = {"rows": 1, "groups": -(-width // 128)}
    memory: dict[str, Shape] = {"codes": (codes, (rows, width))}
    if kind in scales:
        memory["scale"] = (torch.float32, (rows, scales[kind]))
    return memory


def used_as_they_are(matrix: Matrix, in_loop: bool) -> bool:
    """Whether a matrix reads a call's rows where they lie; in_loop: split there, if need be."""
    return matrix.kind == "plain" and (in_loop or matrix.format.packed == 1)


def prepared(batch: Batch, matrix: Matrix, buffers: Buffers, in_loop: bool, beside: bool) -> Rows:
    """The rows for a matrix: as they are where they can be, else in buffers.

    beside: a kernel of this call was launched before, and needs none of these rows.
    """
    rows = batch.rows.contiguous()
    if batch.row_scales is not None:
        return _given(batch, matrix)
    if used_as_they_are(matrix, in_loop):
        # Rows that are split in the loop are read four values a time: these are bfloat16.
        return Rows(rows if matrix.format.packed == 1 else rows.to(torch.bfloat16))
    return PREPARE[matrix.kind](rows, matrix, buffers, beside)


def _given(batch: Batch, matrix: Matrix) -> Rows:
    """Rows that the caller has quantised; mxfp8's values fit bfloat16 exactly."""
    if matrix.kind == "groups":
        assert batch.row_scales is not None
        return Rows(batch.rows.contiguous(), batch.row_scales.contiguous())
    return Rows(plain_rows(batch, torch.bfloat16))


def _split(rows: Tensor, matrix: Matrix, buffers: Buffers, beside: bool) -> Rows:
    """Packed weights come four at a time: a piece is split into columns of one remainder each."""
    codes, words = buffers["codes"], matrix.format.packed
    pieces = rows.view(-1, PIECE // words, words).transpose(1, 2)
    codes.view(pieces.shape).copy_(pieces)
    return Rows(codes, split=True)


def _fixed(rows: Tensor, matrix: Matrix, buffers: Buffers, beside: bool) -> Rows:
    assert matrix.rows_scale is not None
    quantize_fixed(rows, buffers["codes"], matrix.rows_scale, beside)
    return Rows(buffers["codes"])


def _rows(rows: Tensor, matrix: Matrix, buffers: Buffers, beside: bool) -> Rows:
    quantize_rows(rows, buffers["codes"], buffers["scale"], beside)
    return Rows(buffers["codes"], buffers["scale"])


def _groups(rows: Tensor, matrix: Matrix, buffers: Buffers, beside: bool) -> Rows:
    quantize_groups(rows, buffers["codes"], buffers["scale"], beside)
    return Rows(buffers["codes"], buffers["scale"])


def _mxfp8(rows: Tensor, matrix: Matrix, buffers: Buffers, beside: bool) -> Rows:
    round_mxfp8(rows, buffers["codes"], beside)
    return Rows(buffers["codes"])


PREPARE: dict[Kind, Callable[[Tensor, Matrix, Buffers, bool], Rows]] = {
    "plain": _split,
    "fixed": _fixed,
    "rows": _rows,
    "groups": _groups,
    "mxfp8": _mxfp8,
}
