"""Stored weights → the numbers they mean, in float32 on their own device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.matrix import Matrix, first_matrices, second_matrix
from expertd.weights.storage import STORAGE

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of e2m1 by their three lower bits; the fourth is the sign."""


def dequantize(weights: ExpertWeights, expert: int) -> tuple[Tensor, Tensor]:
    """The expert in slot `expert` as float32: w13 [M, H] ([up; gate]) and w2 [H, I]."""
    return dequantize_to(weights, expert, torch.float32)


def dequantize_to(weights: ExpertWeights, expert: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As dequantize, rounded once to dtype; plain weights of that dtype come as views."""
    return first_to(weights, expert, dtype), second_to(weights, expert, dtype)


def first_to(weights: ExpertWeights, expert: int, dtype: torch.dtype) -> Tensor:
    """w13 [M, H] of one expert in dtype; plain weights of that dtype come as a view."""
    if weights.packed is not None:
        return weights.packed.first(expert).to(dtype)
    if weights.w13.dtype == dtype:
        return weights.w13[expert]
    return _dequantized(first_matrices(weights, expert), dtype)


def second_to(weights: ExpertWeights, expert: int, dtype: torch.dtype) -> Tensor:
    """w2 [H, I] of one expert in dtype; plain weights of that dtype come as a view."""
    if weights.packed is not None:
        return weights.packed.second(expert).to(dtype)
    if weights.w2.dtype == dtype:
        return weights.w2[expert]
    return _dequantized([second_matrix(weights, expert)], dtype)


def _dequantized(matrices: Sequence[Matrix], dtype: torch.dtype) -> Tensor:
    """Matrices one below the other; on a CPU by pieces whose float32 stays in its cache."""
    codes = matrices[0].codes
    rows = PIECE_ROWS if codes.device.type == "cpu" else len(codes)
    pieces = [piece for matrix in matrices for piece in _pieces(matrix, rows)]
    heights = [len(piece.codes) for piece in pieces]
    out = torch.empty(sum(heights), matrices[0].columns, dtype=dtype, device=codes.device)
    for piece, target in zip(pieces, torch.split(out, heights), strict=True):
        target.copy_(dequantize_matrix(piece))
    return out


PIECE_ROWS = 64
"""Divides the height of every block of scales. Larger temporaries than a cache are slow, and slower
still where freed memory goes back to the system, as a server's does."""


def _pieces(matrix: Matrix, rows: int) -> Iterator[Matrix]:
    """So many rows at a time, with their scales."""
    height = STORAGE[matrix.quant].block[0]
    for begin in range(0, len(matrix.codes), rows):
        codes, scale = matrix.codes[begin : begin + rows], matrix.scale
        if scale is not None and height:
            scale = scale[begin // height : -(-(begin + len(codes)) // height)]
        yield replace(matrix, codes=codes, scale=scale)


def dequantize_matrix(matrix: Matrix) -> Tensor:
    """The matrix [N, K] in float32."""
    return _DEQUANTIZERS[matrix.quant](matrix)


def _plain(matrix: Matrix) -> Tensor:
    return matrix.codes.float()


def _rowwise(matrix: Matrix) -> Tensor:
    """One scale for the matrix ([1]) or for each row ([N])."""
    return e4m3_to_float(matrix.codes).mul_(_scale(matrix)[:, None])


def _blocks128(matrix: Matrix) -> Tensor:
    """One scale for each 128x128 block; the last blocks may be cut short."""
    values = e4m3_to_float(matrix.codes)
    columns = _scale(matrix).repeat_interleave(128, 1)[:, : values.shape[1]]
    for rows, factors in zip(torch.split(values, 128), columns, strict=True):
        rows.mul_(factors)
    return values


def _grouped(values: Tensor, scale: Tensor) -> Tensor:
    """Multiplies values [N, K] by scale [N, K/G], each scale for G neighbours in a row."""
    n, groups = scale.shape
    values.view(n, groups, -1).mul_(scale[:, :, None])
    return values


def _mxfp8(matrix: Matrix) -> Tensor:
    return _grouped(e4m3_to_float(matrix.codes), e8m0_to_float(_scale(matrix)))


def _mxfp4(matrix: Matrix) -> Tensor:
    return _grouped(e2m1_to_float(matrix.codes), e8m0_to_float(_scale(matrix)))


def _nvfp4(matrix: Matrix) -> Tensor:
    assert matrix.global_scale is not None
    scale = e4m3_to_float(_scale(matrix)) * matrix.global_scale
    return _grouped(e2m1_to_float(matrix.codes), scale)


def _mxint4(matrix: Matrix) -> Tensor:
    return _grouped(int4_to_float(matrix.codes), _scale(matrix).float())


def _scale(matrix: Matrix) -> Tensor:
    assert matrix.scale is not None
    return matrix.scale


def e8m0_to_float(bits: Tensor) -> Tensor:
    """2 ** (bits - 127), exactly; 255 is NaN."""
    as_float32 = bits.int() << 23  # the exponent's place; 0 and 255 need their own patterns
    as_float32 = as_float32.masked_fill(bits == 0, 1 << 22).masked_fill(bits == 255, 0x7FC00000)
    return as_float32.view(torch.float32)


def e4m3_to_float(codes: Tensor) -> Tensor:
    """float8_e4m3fn → float32, in memory of its own."""
    if codes.device.type != "cpu":
        return codes.float()
    return _looked_up(_e4m3_values(), codes.view(torch.uint8))


def e2m1_to_float(packed: Tensor) -> Tensor:
    """Packed e2m1 [N, K/2], the low nibble first → float32 [N, K]."""
    return _pairs_looked_up(E2M1 + tuple(-value for value in E2M1), packed)


def int4_to_float(packed: Tensor) -> Tensor:
    """Packed signed 4-bit values [N, K/2], the low nibble first → float32 [N, K]."""
    return _pairs_looked_up((*range(8), *range(-8, 0)), packed)


@cache
def _e4m3_values() -> Tensor:
    """What torch makes of each code, slowly."""
    return torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()


@cache
def _pairs(values: tuple[float, ...], device: torch.device) -> Tensor:
    """What two nibbles mean, at each of the 256 bytes: two float32 in one int64."""
    pairs = [(values[byte & 15], values[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device).view(torch.int64).view(-1)


def _pairs_looked_up(values: tuple[float, ...], packed: Tensor) -> Tensor:
    return _looked_up(_pairs(values, packed.device), packed).view(torch.float32)


def _looked_up(table: Tensor, codes: Tensor) -> Tensor:
    """The entry of a table [256] for each byte."""
    return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)


_DEQUANTIZERS: dict[QuantScheme, Callable[[Matrix], Tensor]] = {
    QuantScheme.FP32: _plain,
    QuantScheme.BF16: _plain,
    QuantScheme.FP16: _plain,
    QuantScheme.FP8_TENSOR: _rowwise,
    QuantScheme.FP8_CHANNEL: _rowwise,
    QuantScheme.FP8_BLOCK128: _blocks128,
    QuantScheme.MXFP8: _mxfp8,
    QuantScheme.NVFP4: _nvfp4,
    QuantScheme.MXFP4: _mxfp4,
    QuantScheme.MXINT4: _mxint4,
}
