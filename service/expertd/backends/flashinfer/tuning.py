"""Batches to warm up with, and FlashInfer's tuner around them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from expertd.backends.base import Batch
from expertd.backends.flashinfer import modules
from expertd.backends.flashinfer.library import alone, library, simulated
from expertd.backends.flashinfer.once import warn_once
from expertd.capability.device import installed_flashinfer
from expertd.capability.row import Row
from expertd.config import cache_directory
from expertd.core import LayerSpec, PlanMode

log = logging.getLogger(__name__)

TUNE_TOKENS = 8192
"""The end of the tuner's buckets. FlashInfer keeps the buckets of the first call that names a new
end, for all layers of the process, so there is only ever this one."""

PROBE_TOP_K = 8


@contextmanager
def tuner(tokens: Sequence[int], device: torch.device) -> Iterator[bool]:
    """Calls inside are tuned for batches up to the largest of tokens; the next start knows them.

    Yields whether they are.
    """
    if not _can_tune():
        yield False
        return
    path = cache_file(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    with alone, library().autotune(True, cache=str(path), tuning_buckets=buckets(tokens)):
        yield True


def buckets(tokens: Sequence[int]) -> tuple[int, ...]:
    """Every size that FlashInfer tunes for itself, up to the one that covers these.

    At run time it rounds a batch up to one of its own sizes; what is tuned between them is lost.
    """
    every: tuple[int, ...] = library().get_hybrid_num_tokens_buckets(TUNE_TOKENS)
    last = next((size for size in every if size >= max(tokens)), TUNE_TOKENS)
    return tuple(size for size in every if size <= last)


def cache_file(device: torch.device) -> Path:
    """One for each version and card: FlashInfer neither reads nor replaces a file of another.

    All backends share it: opening a second file makes FlashInfer forget what the first one said.
    """
    card = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    return cache_directory() / "autotune" / f"flashinfer-{installed_flashinfer()}-{card}.json"


def probe(row: Row, spec: LayerSpec, tokens: int, device: torch.device) -> Batch:
    """A batch that gives every expert its equal share, so that no tactic is tuned to a skew."""
    random = torch.Generator().manual_seed(tokens)
    rows = torch.randn(tokens, spec.hidden, generator=random).to(device, torch.bfloat16)
    out = torch.empty_like(rows)
    if row.mode is PlanMode.MONOLITHIC:
        logits = torch.randn(tokens, spec.num_experts, generator=random)
        return Batch(rows, out, logits=logits.to(device))
    top_k = spec.routing.top_k if spec.routing else min(PROBE_TOP_K, spec.num_experts)
    turn = torch.arange(tokens * top_k) % spec.num_experts
    ids = turn.view(tokens, top_k).to(device, torch.int32)
    return Batch(rows, out, ids=ids, weights=torch.full(ids.shape, 1 / top_k, device=device))


def _can_tune() -> bool:
    """Without its timing module FlashInfer would build one now, or fail every tactic in silence."""
    if simulated():
        return False
    absent = modules.missing(modules.TUNER)
    if absent:
        warn_once(log, f"FlashInfer keeps its untuned tactics: {absent}")
    return not absent
