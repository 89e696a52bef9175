"""Pinned host memory for results, handed out again when nobody reads it any more.

It is never given back to the driver: freeing it after the device is lost would abort the process
before it can end as it should.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque

import torch
from torch import Tensor

LEAST_BYTES = 1 << 12


class PinnedPool:
    """Buffers whose sizes are powers of two; for any thread."""

    def __init__(self, pin: bool = True) -> None:
        self._pin = pin
        self._idle: defaultdict[int, deque[Tensor]] = defaultdict(deque)

    def take(self, like: Tensor) -> Tensor:
        """Host memory of like's shape and dtype, taken back when the last view of it is gone.

        Views are what numpy() makes of it, and memoryviews of those; a tensor made from it by
        torch alone does not count.
        """
        size = max(LEAST_BYTES, 1 << (like.nbytes - 1).bit_length())
        buffer = self._buffer(size)
        view = buffer.numpy()
        weakref.finalize(view, self._idle[size].append, buffer)
        found = torch.from_numpy(view)[: like.nbytes]
        return found.view(like.dtype).view(like.shape)

    def _buffer(self, size: int) -> Tensor:
        try:
            return self._idle[size].pop()
        except IndexError:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)


def host_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory."""
    return tensor.view(torch.uint8).numpy().data.cast("B")
