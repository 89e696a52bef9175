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

    def take(self, nbytes: int) -> tuple[Tensor, memoryview]:
        """So many bytes as a tensor to write and a view to read, which is what keeps them.

        They are taken back when the last view of that view is gone; the tensor does not count.
        """
        size = max(LEAST_BYTES, 1 << (nbytes - 1).bit_length())
        buffer = self._buffer(size)
        whole = buffer.numpy()
        weakref.finalize(whole, self._idle[size].append, buffer)
        part = whole[:nbytes]
        return torch.from_numpy(part), part.data

    def _buffer(self, size: int) -> Tensor:
        try:
            return self._idle[size].pop()
        except IndexError:
            return torch.empty(size, dtype=torch.uint8, pin_memory=self._pin)
