"""What torch backends do with a batch's rows: dequantise them and find each expert's share."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.backends.base import Batch


def plain_rows(batch: Batch, dtype: torch.dtype) -> Tensor:
    """The rows [T, H] in dtype; fp8 rows are multiplied with their scales first."""
    if batch.row_scales is None:
        return batch.rows.to(dtype)
    tokens, hidden = batch.rows.shape
    group = hidden // batch.row_scales.shape[1]
    grouped = batch.rows.to(torch.float32).view(tokens, -1, group)
    return (grouped * batch.row_scales.unsqueeze(-1)).view(tokens, hidden).to(dtype)


def shares(ids: Tensor, begin: int, end: int) -> tuple[Tensor, list[int], list[int]]:
    """Which (row, slot) pairs go to which expert of [begin, end).

    ids [T, K] → order [N] indices into the flattened pairs, sorted by expert; the experts that have
    any; how many pairs each has. Pairs of other experts are left out.
    """
    flat = ids.reshape(-1)
    held = (flat >= begin) & (flat < end)
    pairs = held.nonzero().squeeze(1)
    experts, order = torch.sort(flat[pairs], stable=True)
    active, counts = torch.unique_consecutive(experts, return_counts=True)
    return pairs[order], active.tolist(), counts.tolist()
