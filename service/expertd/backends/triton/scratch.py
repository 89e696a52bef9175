"""Memory between the kernels of a call: tensors by name, in the scratch memory of its stream."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

from expertd.backends.scratch import Scratch

ALIGNED = 256
_MEMORY = Scratch()

Shape = tuple[torch.dtype, tuple[int, ...]]


def scratch(shapes: dict[str, Shape], device: torch.device) -> dict[str, Tensor]:
    """Uninitialised tensors by name, in the memory of this stream's calls."""
    sizes = [
        -(-prod(shape) * dtype.itemsize // ALIGNED) * ALIGNED for dtype, shape in shapes.values()
    ]
    parts = torch.split(_MEMORY.take(sum(sizes), device)[: sum(sizes)], sizes)
    return dict(zip(shapes, _viewed(shapes, parts), strict=True))


def _viewed(shapes: dict[str, Shape], parts: tuple[Tensor, ...]) -> Iterator[Tensor]:
    for shape, part in zip(shapes.values(), parts, strict=True):
        yield part[: _bytes(shape)].view(shape[0]).view(shape[1])


def _bytes(shape: Shape) -> int:
    return prod(shape[1]) * shape[0].itemsize
