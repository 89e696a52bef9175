"""The authority for numbers: everything in float32, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.backends.torch_experts import TorchExperts


class Reference(TorchExperts):
    """Routed experts in float32, whatever the rows and the weights are."""

    def compute_dtype(self, rows: Tensor) -> torch.dtype:
        return torch.float32
