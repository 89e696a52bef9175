"""A batch's rows as the kernel takes them, without synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.weights.quantize import E4M3_MAX, to_e4m3

SMALLEST = 1e-12
"""The scale of rows that are all zero, so that nothing is divided by zero."""


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
