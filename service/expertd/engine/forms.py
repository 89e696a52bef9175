"""The forms of calls that a card's kernels are compiled for while a layer loads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from expertd.backends.base import Backend
from expertd.proof.batches import random_batch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
REPLIED = (1, 16)
"""Sizes at which every dtype of a reply is tried: one row may have kernels of its own."""


def warm_up_forms(
    backends: Iterable[Backend], device: torch.device, buckets: Sequence[int]
) -> None:
    """Runs each backend on rows and replies of every dtype, so that no request compiles.

    Rows of another dtype meet every tile that a bucket chooses; a reply is only written. The
    processor compiles nothing.
    """
    if device.type == "cpu":
        return
    with torch.inference_mode():
        for backend in backends:
            for tokens in buckets:
                _warm_up(backend, tokens)


def _warm_up(backend: Backend, tokens: int) -> None:
    batch = random_batch(backend.spec, tokens, backend.device)
    for dtype in DTYPES:
        rows = batch.rows.to(dtype)
        for out in DTYPES if tokens in REPLIED else (torch.bfloat16,):
            backend.forward(replace(batch, rows=rows, out=batch.out.to(out)))
