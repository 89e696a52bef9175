"""The forms of calls that a card's kernels are compiled for while a layer loads."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch

from expertd.backends.base import Backend
from expertd.proof.batches import random_batch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1, 16)
"""One row has kernels of its own; all others of a form share theirs, but for the sizes of tiles
that warm_up() has seen already."""


def warm_up_forms(backends: Iterable[Backend], device: torch.device) -> None:
    """Runs each backend on rows and replies of every dtype, so that no request compiles.

    The processor compiles nothing.
    """
    if device.type == "cpu":
        return
    with torch.inference_mode():
        for backend in backends:
            for tokens in SIZES:
                _warm_up(backend, tokens)


def _warm_up(backend: Backend, tokens: int) -> None:
    batch = random_batch(backend.spec, tokens, backend.device)
    for rows in DTYPES:
        for out in DTYPES:
            backend.forward(replace(batch, rows=batch.rows.to(rows), out=batch.out.to(out)))
