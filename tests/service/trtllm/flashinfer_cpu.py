"""FlashInfer's own CPU code, which is the authority here for every layout."""

from __future__ import annotations

import os
import tempfile

# FlashInfer writes below this when it is imported; its default is somebody's home.
os.environ.setdefault("FLASHINFER_WORKSPACE_BASE", tempfile.mkdtemp(prefix="flashinfer-"))

import flashinfer.tllm_enums as enums
import torch
from flashinfer import fused_moe
from flashinfer.fused_moe import api, core, prepare
from flashinfer.quantization import fp4_quantization
from torch import Tensor

__all__ = [
    "api",
    "core",
    "enums",
    "fp4_quantization",
    "fused_moe",
    "interleave_scales",
    "prepare",
]


def interleave_scales(scales: Tensor) -> Tensor:
    """block_scale_interleave, which needs a card, by its published byte offsets one by one."""
    rows, columns = scales.shape
    row, column = torch.arange(rows)[:, None], torch.arange(columns)
    tile = row // 128 * -(-columns // 4) + column // 4
    offset = tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4
    out = torch.zeros(-(-rows // 128) * 128 * -(-columns // 4) * 4, dtype=scales.dtype)
    out[offset.reshape(-1)] = scales.reshape(-1)
    return out
