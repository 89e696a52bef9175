"""Random batches of a layer, as its calls would be: for measuring and for proofs."""

from __future__ import annotations

import torch

from expertd.backends.base import Batch
from expertd.core import LayerSpec

ANY_TOP_K = 8
"""K of a layer that has no routing of its own."""


def random_batch(
    spec: LayerSpec, tokens: int, device: torch.device, dtype: torch.dtype = torch.bfloat16
) -> Batch:
    """Rows [T, H], logits [T, E], and distinct held ids with equal weights; the same each time."""
    random = torch.Generator(device).manual_seed(tokens)
    rows = torch.randn(tokens, spec.hidden, generator=random, device=device).bfloat16()
    logits = torch.randn(tokens, spec.num_experts, generator=random, device=device)
    held = logits[:, spec.expert_begin : spec.expert_end]
    top_k = min(spec.routing.top_k if spec.routing else ANY_TOP_K, spec.held)
    ids = held.topk(top_k, dim=1).indices + spec.expert_begin
    return Batch(
        rows,
        torch.full(rows.shape, torch.nan, dtype=dtype, device=device),
        ids=ids.to(torch.int32),
        weights=torch.full(ids.shape, 1.0 / top_k, device=device),
        logits=logits,
    )
