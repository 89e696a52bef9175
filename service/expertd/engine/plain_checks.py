"""Ids and weights of a small batch, looked at in plain Python before they go anywhere.

That is through before one of torch's many operations, or a kernel, has been launched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from expertd.core import LayerSpec
from expertd_wire.tensors import WireTensor

FEW_IDS = 256
"""Ids of a small batch."""

NATIVE: dict[str, Any] = {"int32": "i", "int64": "q", "float32": "f"}
"""What Python can read, by its names in memoryviews."""


def plainly_good(
    ids: Sequence[WireTensor], weights: Sequence[WireTensor], spec: LayerSpec, partial: bool
) -> bool:
    """Whether they are few, and each row names experts that it may, each once, with finite weights.

    Of what is not plainly good only the checks can say whether it is.
    """
    if ids[0].dtype not in NATIVE or weights[0].dtype not in NATIVE:
        return False
    if sum(tensor.shape[0] for tensor in ids) * ids[0].shape[1] > FEW_IDS:
        return False
    named = (0, spec.num_experts) if partial else (spec.expert_begin, spec.expert_end)
    calls = zip(map(_rows, ids), map(_rows, weights), strict=True)
    return all(
        _good(row, of_row, *named) for call in calls for row, of_row in zip(*call, strict=True)
    )


def _good(ids: list[int], weights: list[float], begin: int, end: int) -> bool:
    within = begin <= min(ids) and max(ids) < end
    # A sum is finite only if all it adds is.
    return within and len(set(ids)) == len(ids) and math.isfinite(sum(weights))


def _rows(tensor: WireTensor) -> list[Any]:
    rows: list[Any] = tensor.data.cast(NATIVE[tensor.dtype], tensor.shape).tolist()
    return rows
