"""The kernel's scratch memory: one buffer a device and stream, shared by all layers, only growing.

Calls on one stream run one after the other, so they can share. FlashInfer's own answer is too small
for a few rows of fp8 blocks, so what the widest call of a warm-up got, every stream gets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertd.backends.flashinfer.library import library

SIZE_FUNCTION = "cutlass_fused_moe_workspace_size"

_buffers: dict[tuple[torch.device, int], Tensor] = {}


def workspace(size: int, device: torch.device) -> Tensor:
    """At least size bytes of uint8 for a call on the current stream."""
    key = device, _stream(device)
    others = [other.numel() for (where, _), other in list(_buffers.items()) if where == device]
    size = max(size, *others, 0)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # A graph keeps its addresses for as long as it lives, and the shared buffer may go.
        return torch.empty(size, dtype=torch.uint8, device=device)
    found = _buffers.get(key)
    if found is None or found.numel() < size:
        # The old buffer goes first, so that both need not fit.
        _buffers.pop(key, None)
        found = _buffers[key] = torch.empty(size, dtype=torch.uint8, device=device)
    return found


def _stream(device: torch.device) -> int:
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def workspace_bytes(sizes: Mapping[str, Any]) -> int:
    """How many bytes a call of these sizes needs; sizes may hold more than is asked for."""
    function = getattr(library(), SIZE_FUNCTION)
    accepted = inspect.signature(function).parameters
    return int(function(**{name: value for name, value in sizes.items() if name in accepted}))
