"""Rows as a kernel reads them that quantises its input: what it lost there is not its error."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import e2m1_to_float
from expertd.weights.quantize import E2M1_MAX, to_e2m1, to_e4m3


def as_read(rows_TH: Tensor, activation_quant: str, weights: ExpertWeights) -> Tensor:
    """The rows [T, H] after a round trip through 4 bits; those of finer formats as they are."""
    round_trip = ROUND_TRIPS.get(activation_quant)
    return rows_TH if round_trip is None else round_trip(rows_TH, weights.input13)


def _nvfp4(rows_TH: Tensor, input13: Tensor | None) -> Tensor:
    """e2m1 below an e4m3 scale for 16 values, and one for the layer: 1 where it has none."""
    whole = 1.0 if input13 is None else float(input13.amax())
    groups = rows_TH.float().view(len(rows_TH), -1, 16) / whole
    scale = to_e4m3(groups.abs().amax(-1, keepdim=True) / E2M1_MAX).float()
    codes = to_e2m1(torch.where(scale == 0, 0.0, groups / scale).flatten(1))
    return (e2m1_to_float(codes).view(groups.shape) * scale * whole).view(rows_TH.shape)


ROUND_TRIPS: dict[str, Callable[[Tensor, Tensor | None], Tensor]] = {"nvfp4": _nvfp4}
