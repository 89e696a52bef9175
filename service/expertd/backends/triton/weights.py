"""Canonical weights → what the kernels take: the same memory, seen as its format wants.

Only scales are new tensors, where they must be; nothing of a weight's size is copied.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from expertd.backends.triton.decode import E4M3_SHRUNK
from expertd.backends.triton.loop import DEEP, TALL
from expertd.core import QuantScheme
from expertd.weights.canonical import ExpertWeights

Kind = Literal["plain", "fixed", "rows", "groups", "mxfp8"]
"""How a GEMM's rows are: unquantised, or e4m3 with one scale for all, for each row or for each
group of 128 columns, or rounded to mxfp8's values."""


@dataclass(frozen=True, slots=True)
class Format:
    """How the kernels read a scheme; loop.py says what the words mean.

    end: scales after the loop, one for each half of a matrix or one for each of its rows.
    """

    name: str = "plain"
    group: int = 0
    scale: str = "float"
    end: Literal["none", "half", "row"] = "none"

    @property
    def packed(self) -> int:
        """Values in an element of the weights."""
        return 4 if self.name in ("e2m1", "int4") else 1


FORMATS = {
    QuantScheme.BF16: Format(),
    QuantScheme.FP16: Format(),
    QuantScheme.FP8_TENSOR: Format("e4m3", end="half"),
    QuantScheme.FP8_CHANNEL: Format("e4m3", end="row"),
    QuantScheme.FP8_BLOCK128: Format("e4m3", 128),
    QuantScheme.MXFP8: Format("e4m3", 32, "e8m0"),
    QuantScheme.NVFP4: Format("e2m1", 16, "e4m3", end="half"),
    QuantScheme.MXFP4: Format("e2m1", 32, "e8m0"),
    QuantScheme.MXINT4: Format("int4", 32),
}

LARGEST_SMALL = 128
"""The e8m0 code of 2: larger scales overflow when they are multiplied by 2 ** 126."""

KINDS: dict[str, Kind] = {
    "bf16": "plain",
    "fp8_tensor": "rows",
    "fp8_token": "rows",
    "fp8_group128": "groups",
    "mxfp8": "mxfp8",
}
"""A row's activation format → its kind; fp8_tensor with static scales is "fixed" instead.

Without static scales, fp8_tensor rows have a scale each: no coarser, and no pass over the batch.
"""


@dataclass(frozen=True, slots=True)
class Matrix:
    """One GEMM's weights [L, rows, columns]; rows_scale [L or 1]: the fixed scale of its input."""

    weight: Tensor
    format: Format
    kind: Kind
    scale: Tensor | None = None
    end_scale: Tensor | None = None
    bias: Tensor | None = None
    rows_scale: Tensor | None = None

    @property
    def fp8(self) -> bool:
        """Whether fp8 is what the tensor cores multiply."""
        return self.kind in ("fixed", "rows", "groups")


@dataclass(frozen=True, slots=True)
class Native:
    first: Matrix
    second: Matrix
    compute: torch.dtype


def native(weights: ExpertWeights, activation_quant: str) -> Native:
    """The weights of a layer for rows of that activation format."""
    of, kind = weights, KINDS[activation_quant]
    first = _matrix(of, kind, of.w13, of.scale13, of.global13, of.bias13)
    second = _matrix(of, kind, of.w2, of.scale2, of.global2, of.bias2)
    if activation_quant == "fp8_tensor":
        # Any expert may get a row: one scale for all of them, as the row is quantised once.
        first = _fixed(first, None if of.input13 is None else of.input13.amax().reshape(1))
        second = _fixed(second, of.input2)
    compute = torch.float16 if weights.quant is QuantScheme.FP16 else torch.bfloat16
    return Native(first, second, compute)


def _matrix(
    weights: ExpertWeights,
    kind: Kind,
    codes: Tensor,
    scale: Tensor | None,
    global_scale: Tensor | None,
    bias: Tensor | None,
) -> Matrix:
    form = FORMATS[weights.quant]
    in_loop, at_end = (scale, global_scale) if form.group else (None, scale)
    matrix = _decodable(
        Matrix(_elements(codes, form), form, kind, _laid_out(form, _bits(in_loop)), at_end, bias)
    )
    if matrix.fp8:
        return replace(matrix, weight=codes, format=replace(form, name="plain"))
    return matrix


def _decodable(matrix: Matrix) -> Matrix:
    """The matrix with scales that decode.py multiplies while it decodes, where they allow it."""
    form = matrix.format
    if form.name == "e2m1" and form.scale == "e8m0":
        assert matrix.scale is not None
        if int(matrix.scale.amax()) <= LARGEST_SMALL:
            return replace(matrix, format=replace(form, scale="e8m0_small"))
    if form.name == "e2m1" and form.scale == "e4m3":
        assert matrix.end_scale is not None
        return replace(matrix, end_scale=matrix.end_scale / E4M3_SHRUNK.value)
    return matrix


def _laid_out(form: Format, scale: Tensor | None) -> Tensor | None:
    """Scales of groups as loop.py reads them: those of a step's rows lie together."""
    if scale is None or form.group == 128:
        return scale
    each, tall = DEEP.value // form.group, TALL.value
    padded = pad(scale, (0, -scale.shape[-1] % each)).view(
        -1, tall, -(-scale.shape[-1] // each), each
    )
    return padded.transpose(1, 2).contiguous().view(*scale.shape[:-1], -1)


def _elements(codes: Tensor, form: Format) -> Tensor:
    """Weights as the kernels load them: packed ones as words of four."""
    # Elsewhere Triton may decode words of two rows, which differ in scale, at once.
    assert form.packed == 1 or codes.data_ptr() % 16 == 0, "words begin at multiples of 16 bytes"
    return codes.view(torch.int16) if form.packed > 1 else _bits(codes)


def _bits(stored: Any) -> Any:
    """fp8 as bytes, which every card can read."""
    fp8 = stored is not None and stored.dtype == torch.float8_e4m3fn
    return stored.view(torch.uint8) if fp8 else stored


def _fixed(matrix: Matrix, rows_scale: Tensor | None) -> Matrix:
    """The matrix for rows divided by rows_scale, which its own scales then give back."""
    if rows_scale is None:
        return matrix
    assert matrix.end_scale is not None
    scale = rows_scale.float().contiguous()
    end = (matrix.end_scale * scale[:, None]).contiguous()
    return replace(matrix, kind="fixed", rows_scale=scale, end_scale=end)
