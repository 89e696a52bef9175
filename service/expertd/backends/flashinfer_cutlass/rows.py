"""A batch's rows and routing as the kernel takes them, without synchronisation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.weights.quantize import E4M3_MAX, to_e4m3

SMALLEST = 1e-12
"""The scale of rows that are all zero, so that nothing is divided by zero."""


def weights_on_rows(batch: Batch) -> Batch:
    """Weights that belong on an expert's input go onto the rows, which have one expert each."""
    assert batch.ids is not None and batch.weights is not None and batch.ids.shape[1] == 1
    weights = batch.weights.masked_fill(batch.ids < 0, 0.0)
    rows = (batch.rows.float() * weights).to(batch.rows.dtype)
    return replace(batch, rows=rows, weights=torch.ones_like(weights))


def final_weights(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """float32 weights [T, K]; whatever stands beside id -1 is ignored, NaN too."""
    return weights_TK.to(torch.float32).masked_fill(ids_TK < 0, 0.0)


def fp8_rows(rows_TH: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """e4m3 rows and their one multiplier []: the given one, or that of the largest finite value.

    A value that is not finite becomes NaN, e4m3 having no infinity, and spoils its own row only.
    """
    rows = rows_TH.float()
    finite = rows.isfinite()
    if scale is None:
        largest = torch.where(finite, rows, 0.0).abs().amax()
        scale = (largest / E4M3_MAX).clamp(min=SMALLEST)
    return to_e4m3(torch.where(finite, rows / scale, torch.nan)), scale
