"""Canonical weights with zeros up to the sizes that a kernel takes; the result stays the same.

A padded column meets a zero of the other operand; a padded expert row gives act(0) = 0. So only
what is added needs to be zero, and scales of added blocks are zero too.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from expertd.core import LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights

OUTPUT_MULTIPLE = 128
"""The second GEMM computes whole tiles of the output; it is told how much of the last is real."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """H and I of a layer, and what they are padded to."""

    hidden: int
    intermediate: int
    native_hidden: int
    native_intermediate: int

    @property
    def padded(self) -> bool:
        return (self.hidden, self.intermediate) != (self.native_hidden, self.native_intermediate)

    @property
    def output_rows(self) -> int:
        """The rows of the second matrix: the kernel rounds the real H up to this by itself."""
        return -(-self.hidden // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE


def pad(weights: ExpertWeights, spec: LayerSpec, sizes: Sizes) -> ExpertWeights:
    """Weights of the native sizes; those that have them already are not copied."""
    if not sizes.padded:
        return weights
    # Blocks of 128 × 128 are whole already: their last one may be cut short in the weights only.
    scales = () if spec.quant is QuantScheme.FP8_BLOCK128 else ("scale13", "scale2")
    named = {
        field: _grown(field, tensor, spec, sizes)
        if field in ("w13", "w2", "bias13", "bias2", *scales)
        else tensor
        for field, tensor in weights.tensors.items()
    }
    return ExpertWeights.of(weights.quant, named)


def _grown(field: str, tensor: Tensor, spec: LayerSpec, sizes: Sizes) -> Tensor:
    if spec.quant is QuantScheme.FP8_TENSOR and field in ("scale13", "scale2"):
        return tensor
    if field.endswith("13"):
        rows, columns = sizes.native_intermediate, (sizes.hidden, sizes.native_hidden)
        halves = tensor.view(len(tensor), -1, sizes.intermediate, *tensor.shape[2:])
        return enlarge(halves, (2, rows), columns).flatten(1, 2)
    columns = (sizes.intermediate, sizes.native_intermediate)
    return enlarge(tensor, (1, sizes.output_rows), columns)


def enlarge(tensor: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Zeros behind the rows (dimension, size) and behind the columns, if there are columns.

    columns (before, after) counts elements; a tensor that packs or groups them grows in proportion.
    """
    dimension, count = rows
    shape = list(tensor.shape)
    shape[dimension] = count
    if tensor.ndim > dimension + 1:
        before, after = columns
        shape[-1] = shape[-1] * after // before
    larger = tensor.new_zeros(shape)
    larger[tuple(slice(size) for size in tensor.shape)] = tensor
    return larger


def pad_columns(tensor_TC: Tensor, before: int, after: int) -> Tensor:
    """Rows [T, C] of width before (elements, however packed) with zeros up to width after."""
    if before == after:
        return tensor_TC
    return enlarge(tensor_TC, (0, tensor_TC.shape[0]), (before, after))
