"""Calls of the twin with the layers of native.py."""

from __future__ import annotations

from typing import Any

import torch
from tests.service.twins.native import EXPERTS, TOKENS, Native
from tests.twins.trtllm import library
from torch import Tensor


def call(native: Native, mode: str = "_routed", **changes: Any) -> Tensor:
    """The output of the layer's entry; mode "" takes routing_logits, "_routed" topk_ids."""
    result = getattr(library(), f"{native.entry}{mode}_moe")(**native_arguments(native, **changes))
    assert isinstance(result, list) == native.listed
    output: Tensor = result[0] if native.listed else result
    return output


def native_arguments(native: Native, **changes: Any) -> dict[str, Any]:
    """Every keyword of the call but topk_ids; the bias only where the entry has one."""
    arguments = native.arguments(**changes)
    needs_bias = "bf16" not in native.entry and "mxint4" not in native.entry
    if needs_bias or "routing_logits" in changes:
        arguments.setdefault("routing_bias", None)
    return arguments


def pairs(seed: int) -> tuple[Tensor, Tensor]:
    """Distinct experts per token, with a -1, and weights that bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(EXPERTS, generator=generator) for _ in range(TOKENS)])
    ids = order[:, :2].to(torch.int32).contiguous()
    ids[TOKENS - 1, 0] = -1
    weights = torch.randint(8, 128, (TOKENS, 2), generator=generator) / 64
    return ids, weights


def packed(ids: Tensor, weights: Tensor) -> Tensor:
    bits = weights.bfloat16().view(torch.int16).int() & 0xFFFF
    return (ids << 16) | bits
