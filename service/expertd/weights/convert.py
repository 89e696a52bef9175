"""Stored parts of a matrix → its canonical form, on the device the parts are on."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.weights.dequant import e8m0_to_float
from expertd.weights.matrix import Matrix

Parts = Mapping[str, Tensor]


def plain(quant: QuantScheme, parts: Parts) -> Matrix:
    return Matrix(quant, parts["weight"])


def fp8_block128(quant: QuantScheme, parts: Parts) -> Matrix:
    return Matrix(quant, parts["weight"], _multiplier(parts["scale"]))


def _multiplier(scale: Tensor) -> Tensor:
    """float32 scales, which checkpoints also hold as bfloat16 or as e8m0 bits."""
    return e8m0_to_float(scale) if scale.dtype == torch.uint8 else scale.float()


CONVERTERS: dict[str, Callable[[QuantScheme, Parts], Matrix]] = {
    "plain": plain,
    "fp8_block128": fp8_block128,
}
