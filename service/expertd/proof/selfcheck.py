"""After a load: 16 random rows through a layer's own weights, each backend beside the reference."""

from __future__ import annotations

import torch

from expertd.backends.base import Backend
from expertd.core import LayerSpec
from expertd.errors import LayerFailed
from expertd.proof.batches import random_batch
from expertd.proof.run import TOLERANCES, relative_error

ROWS = 16


def self_check(spec: LayerSpec, reference: Backend, others: list[Backend]) -> None:
    """Raises LayerFailed naming the backend whose answers differ from the reference's."""
    batch = random_batch(spec, ROWS, reference.device, torch.float32)
    reference.forward(batch)
    expected = batch.out.clone()
    for backend in others:
        batch.out.fill_(float("nan"))
        backend.forward(batch)
        error = relative_error(batch.out, expected)
        tolerance = TOLERANCES[backend.row.activation_quant]
        if not error <= tolerance:
            raise LayerFailed(
                f"{backend.row.entry} differs from the reference on this layer's own weights: "
                f"relative error {error:.2e}, at most {tolerance:.0e} accepted"
            )
