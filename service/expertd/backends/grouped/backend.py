"""The CPU's default: one GEMM per active expert in the rows' own dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.backends.torch_experts import TorchExperts


class Grouped(TorchExperts):
    """Routed experts in the dtype of the rows; fp8 rows compute in bfloat16."""

    def compute_dtype(self, rows: Tensor) -> torch.dtype:
        return torch.bfloat16 if rows.dtype == torch.float8_e4m3fn else rows.dtype
