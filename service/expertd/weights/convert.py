"""Stored parts of a matrix → its canonical form, on the device the parts are on."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from expertd.weights.dequant import e8m0_to_float
from expertd.weights.formats import Format
from expertd.weights.matrix import Matrix
from expertd.weights.storage import STORAGE


def to_matrix(format_: Format, n: int, k: int, parts: Mapping[str, Tensor]) -> Matrix:
    """The canonical matrix [N, K] of stored parts."""
    storage = STORAGE[format_.quant]
    scale, global_scale = parts.get("scale"), parts.get("global")
    return Matrix(
        format_.quant,
        _codes(format_, parts["weight"], n),
        None if scale is None else _scale(scale, storage.scale).reshape(storage.scale_shape(n, k)),
        None if global_scale is None else global_scale.float().reshape(1),
    )


def _codes(format_: Format, weight: Tensor, n: int) -> Tensor:
    if format_.codes == "same":
        return weight
    data = weight.contiguous().view(torch.uint8).reshape(n, -1)
    # Flipping a nibble's upper bit takes 8 off and leaves two's complement.
    return data ^ 0x88 if format_.codes == "offset_words" else data


def _scale(scale: Tensor, dtype: str | None) -> Tensor:
    """Multipliers in the scheme's dtype; e8m0 bits become numbers where it wants float32."""
    if dtype == "float32":
        return e8m0_to_float(scale) if scale.dtype == torch.uint8 else scale.float()
    return scale
