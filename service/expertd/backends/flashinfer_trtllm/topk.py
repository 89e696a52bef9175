"""Chosen experts and their weights as the routed entries take them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertd.backends.flashinfer.routing import final_weights

TopK = Tensor | tuple[Tensor, Tensor]


def paired(ids_TK: Tensor, weights_TK: Tensor) -> TopK:
    """(ids int32, weights float32) [T, K]."""
    return ids_TK.to(torch.int32).contiguous(), final_weights(ids_TK, weights_TK).contiguous()


def packed(ids_TK: Tensor, weights_TK: Tensor) -> TopK:
    """int32 [T, K]: the id in the upper half, the bits of the bfloat16 weight in the lower."""
    weights = final_weights(ids_TK, weights_TK).to(torch.bfloat16)
    bits = weights.view(torch.int16).to(torch.int32) & 0xFFFF
    return (ids_TK.to(torch.int32) << 16) | bits


def form(pair: bool) -> Callable[[Tensor, Tensor], TopK]:
    return paired if pair else packed
