"""Memory that kernels write and forget: one buffer a device and stream, only growing.

Calls on one stream run one after the other, so that all layers of a backend can share it.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Scratch:
    """The buffers of one backend."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}

    def take(self, size: int, device: torch.device) -> Tensor:
        """At least size bytes of uint8, uninitialised, for a call on the current stream."""
        if _capturing(device):
            # A graph keeps its addresses for as long as it lives, and a shared buffer may go.
            return torch.empty(size, dtype=torch.uint8, device=device)
        key = device, _stream(device)
        found = self._buffers.get(key)
        if found is None or found.numel() < size:
            # The old buffer goes first, so that both need not fit.
            self._buffers.pop(key, None)
            found = self._buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
        return found

    def widest(self, device: torch.device) -> int:
        """The bytes of the largest buffer that any stream of the device has."""
        buffers = list(self._buffers.items())
        return max((found.numel() for (where, _), found in buffers if where == device), default=0)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
