"""Batches to warm up with, and FlashInfer's tuner around them."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from expertd.backends.base import Batch
from expertd.backends.flashinfer_trtllm import kernels
from expertd.capability.device import installed_flashinfer
from expertd.capability.row import Row
from expertd.config import cache_directory
from expertd.core import LayerSpec, PlanMode

TUNE_TOKENS = 8192
"""The end of the tuner's buckets: one tuned call covers all of them, so it is never less."""


def tuner(device: torch.device) -> AbstractContextManager[Any]:
    """Calls inside are tuned, and the choice is kept in a file for the next start."""
    if kernels.simulated():
        return nullcontext()
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    # A name for each version and card: FlashInfer neither reads nor replaces a file of another one.
    path = cache_directory() / "autotune" / f"flashinfer-{installed_flashinfer()}-{card}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    context: AbstractContextManager[Any] = kernels.library().autotune(True, cache=str(path))
    return context


def probe(row: Row, spec: LayerSpec, tokens: int, device: torch.device) -> Batch:
    """A batch that gives every expert its equal share, so that no tactic is tuned to a skew."""
    random = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, spec.hidden, generator=random).to(device, torch.bfloat16)
    out = torch.empty_like(rows)
    if row.mode is PlanMode.MONOLITHIC:
        logits = torch.randn(tokens, spec.num_experts, generator=random)
        return Batch(rows, out, logits=logits.to(device))
    top_k = spec.routing.top_k if spec.routing else min(8, spec.num_experts)
    turn = torch.arange(tokens * top_k) % spec.num_experts
    ids = turn.view(tokens, top_k).to(device, torch.int32)
    return Batch(rows, out, ids=ids, weights=torch.full(ids.shape, 1 / top_k, device=device))
