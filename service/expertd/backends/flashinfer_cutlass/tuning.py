"""Batches to warm up with, and FlashInfer's tuner around them."""

from __future__ import annotations

import logging
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from expertd.backends.base import Batch
from expertd.backends.flashinfer_cutlass import kernels
from expertd.capability.device import installed_flashinfer
from expertd.config import cache_directory
from expertd.core import LayerSpec

log = logging.getLogger(__name__)

TUNE_TOKENS = 8192
"""The end of the kernel's buckets of sizes. FlashInfer keeps the buckets of the first call that
names a new end, for all layers of the process, so there is only ever this one."""

PROBE_TOP_K = 8


def tuner(tokens: tuple[int, ...], device: torch.device) -> AbstractContextManager[Any]:
    """Calls inside are tuned for these sizes, and the choice is kept for the next start."""
    if os.environ.get("FLASHINFER_DISABLE_JIT"):
        # It then fails every tactic in silence, unless its timing module was built ahead.
        log.warning("FLASHINFER_DISABLE_JIT is set: FlashInfer may keep its untuned tactics")
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    context: AbstractContextManager[Any] = kernels.library().autotune(
        True, cache=str(path), tuning_buckets=tokens
    )
    return context


def cache_file(device: torch.device) -> Path:
    """One for each version and card: FlashInfer neither reads nor replaces a file of another."""
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    name = f"flashinfer-cutlass-{installed_flashinfer()}-{card}.json"
    return cache_directory() / "autotune" / name


def probe(spec: LayerSpec, tokens: int, device: torch.device) -> Batch:
    """A batch that gives every held expert its equal share, so that nothing is tuned to a skew."""
    random = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, spec.hidden, generator=random).to(device, torch.bfloat16)
    top_k = spec.routing.top_k if spec.routing else min(PROBE_TOP_K, spec.num_experts)
    turn = torch.arange(tokens * top_k) % spec.num_experts
    ids = turn.view(tokens, top_k).to(device, torch.int32)
    weights = torch.full(ids.shape, 1 / top_k, device=device)
    return Batch(rows, torch.empty_like(rows), ids=ids, weights=weights)
