"""Expert weights in canonical order: the one form that loaders make and backends read.

The first matrix holds [up; gate] (up alone when not gated), K is contiguous, P is 2 (gated) or 1.

quant         w13 [L, M, H], w2 [L, H, I]  scale13, scale2                        global13, global2
bf16/16/32    that dtype                   -                                      -
fp8_tensor    float8_e4m3fn                float32 [L, P] (up, gate), [L, 1]      -
fp8_channel   float8_e4m3fn                float32 [L, M], [L, H]                 -
fp8_block128  float8_e4m3fn                float32                                -
                                             [L, P*ceil(I/128), ceil(H/128)],
                                             [L, ceil(H/128), ceil(I/128)]
mxfp8         float8_e4m3fn                uint8 e8m0 [L, M, H/32], [L, H, I/32]  -
nvfp4         uint8, two e2m1 a byte,      float8_e4m3fn                          float32
                low nibble first             [L, M, H/16], [L, H, I/16]             [L, P], [L, 1]
mxfp4         uint8, as nvfp4              uint8 e8m0 [L, M, H/32], [L, H, I/32]  -
mxint4        uint8, two signed 4-bit      bfloat16 [L, M, H/32], [L, H, I/32]    -
                values a byte, low
                nibble first

All scales multiply. Blocks of fp8_block128 never straddle the up and the gate half: each half has
ceil(I/128) scale rows of its own. input13 and input2 [L] float32 are the static activation scales
of checkpoints that have them (multipliers of the quantised value, as ModelOpt's input_scale).

A device's backends may all read the matrices in an order that one of them asks for (packed). Then
w13 and w2 have their dtype and shape but no data (device meta), so that a reader of the canonical
order fails; dequant.py reads both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from expertd.core import QuantScheme


class Packed(Protocol):
    """Both matrices of every expert in an order that loses nothing and takes no more memory."""

    def first(self, expert: int) -> Tensor:
        """w13 [M, H] of one expert as it was stored, bit for bit, in memory of its own."""
        ...

    def second(self, expert: int) -> Tensor:
        """w2 [H, I] of one expert, likewise."""
        ...


@dataclass(frozen=True, slots=True, weakref_slot=True)
class ExpertWeights:
    """The experts held of one layer, on one device."""

    quant: QuantScheme
    w13: Tensor
    w2: Tensor
    scale13: Tensor | None = None
    scale2: Tensor | None = None
    global13: Tensor | None = None
    global2: Tensor | None = None
    input13: Tensor | None = None
    input2: Tensor | None = None
    bias13: Tensor | None = None
    bias2: Tensor | None = None
    packed: Packed | None = None

    @classmethod
    def of(cls, quant: QuantScheme, tensors: Mapping[str, Any]) -> ExpertWeights:
        """From tensors by their fields."""
        return cls(quant, **tensors)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor that is present, by its field."""
        named = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def device(self) -> torch.device:
        """Where the matrices are; meta when they are packed."""
        return self.w13.device
