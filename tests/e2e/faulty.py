"""A server whose identity layer fails as a card would: the first number of a row says how."""

from __future__ import annotations

import sys
import time

import torch

from expertd.backends.base import Batch
from expertd.backends.identity.backend import Identity
from expertd.cli import main

NO_MEMORY, LOST, SLOW, INTERVAL = 1.0, 2.0, 3.0, 4.0
FAULTS = {
    NO_MEMORY: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB"),
    LOST: torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
}

plain = Identity._forward


def forward(self: Identity, batch: Batch) -> None:
    wanted = float(batch.rows[0, 0])
    if wanted == SLOW:
        time.sleep(1)
    if wanted in FAULTS:
        raise FAULTS[wanted]
    plain(self, batch)
    if wanted == INTERVAL:
        batch.out.fill_(sys.getswitchinterval())


if __name__ == "__main__":
    Identity._forward = forward  # type: ignore[method-assign]
    sys.exit(main())
