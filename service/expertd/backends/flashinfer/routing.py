"""A batch's routing as FlashInfer's kernels take it, without synchronisation."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.core import LayerSpec


def final_weights(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """float32 weights [T, K]; whatever stands beside id -1 counts as 0, NaN too."""
    return weights_TK.to(torch.float32).masked_fill(ids_TK < 0, 0.0)


def weights_on_rows(batch: Batch, spec: LayerSpec) -> Batch:
    """Weights that belong on an expert's input go onto the rows, which have one expert each."""
    if spec.routing is None or spec.routing.weight_site == "output":
        return batch
    assert batch.ids is not None and batch.weights is not None and batch.ids.shape[1] == 1
    weights = final_weights(batch.ids, batch.weights)
    rows = (batch.rows.float() * weights).to(batch.rows.dtype)
    return replace(batch, rows=rows, weights=torch.ones_like(weights))
