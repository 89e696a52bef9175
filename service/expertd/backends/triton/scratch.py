"""Memory between the kernels of a call: one buffer a device and stream, only growing."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

ALIGNED = 256
_buffers: dict[tuple[torch.device, int], Tensor] = {}

Shape = tuple[torch.dtype, tuple[int, ...]]


def scratch(shapes: dict[str, Shape], device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors by name, in the memory of this stream's calls."""
    sizes = [
        -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED for dtype, shape in shapes.values()
    ]
    parts = torch.split(_buffer(sum(sizes), device)[: sum(sizes)], sizes)
    return dict(zip(shapes, _viewed(shapes, parts), strict=True))


def _viewed(shapes: dict[str, Shape], parts: tuple[Tensor, ...]) -> Iterator[Tensor]:
    for shape, part in zip(shapes.values(), parts, strict=True):
        yield part[: _bytes(shape)].view(shape[0]).view(shape[1])


def _bytes(shape: Shape) -> int:
    return prod(shape[1]) * shape[0].itemsize


def _buffer(size: int, device: torch.device) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph keeps its addresses for as long as it lives, and this buffer may be replaced.
        return torch.empty(size, dtype=torch.uint8, device=device)
    key = device, _stream(device)
    found = _buffers.get(key)
    if found is None or found.numel() < size:
        # The old buffer goes first, so that both need not fit.
        _buffers.pop(key, None)
        found = _buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return found


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
