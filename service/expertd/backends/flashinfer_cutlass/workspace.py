"""The kernel's scratch memory, as large as the kernel says or larger.

FlashInfer's own answer is too small for a few rows of fp8 blocks, so what the widest call of a
warm-up got, every stream gets.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from expertd.backends.flashinfer.library import library
from expertd.backends.scratch import Scratch

SIZE_FUNCTION = "cutlass_fused_moe_workspace_size"

_MEMORY = Scratch()


def workspace(size: int, device: torch.device) -> Tensor:
    """At least size bytes of uint8 for a call on the current stream."""
    return _MEMORY.take(max(size, _MEMORY.widest(device)), device)


def workspace_bytes(sizes: Mapping[str, Any]) -> int:
    """How many bytes a call of these sizes needs; sizes may hold more than is asked for."""
    function = getattr(library(), SIZE_FUNCTION)
    accepted = inspect.signature(function).parameters
    return int(function(**{name: value for name, value in sizes.items() if name in accepted}))
