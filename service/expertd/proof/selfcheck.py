"""After a load: 16 random rows through a layer's own weights, each backend beside the reference."""

from __future__ import annotations

import torch

from expertd.backends.base import Backend, Batch
from expertd.core import LayerSpec
from expertd.errors import LayerFailed
from expertd.proof.run import TOLERANCES, relative_error

ROWS = 16


def self_check(spec: LayerSpec, reference: Backend, others: list[Backend]) -> None:
    """Raises LayerFailed naming the backend whose answers differ from the reference's."""
    batch = random_batch(spec, reference.device)
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


def random_batch(spec: LayerSpec, device: torch.device) -> Batch:
    """Rows [16, H] and distinct held ids with equal weights, the same for equal shapes."""
    random = torch.Generator().manual_seed(0)
    top_k = min(spec.routing.top_k if spec.routing else 1, spec.held)
    order = torch.rand(ROWS, spec.held, generator=random).argsort(dim=1)[:, :top_k]
    rows = torch.randn(ROWS, spec.hidden, generator=random).bfloat16().to(device)
    return Batch(
        rows,
        torch.empty(ROWS, spec.hidden, dtype=torch.float32, device=device),
        ids=(order + spec.expert_begin).to(torch.int32).to(device),
        weights=torch.full((ROWS, top_k), 1.0 / top_k, device=device),
    )
