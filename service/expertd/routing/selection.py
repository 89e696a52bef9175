"""Choosing the K largest, the same on every device: ties go to the lower index."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def descending(key_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] int64 of the largest float32 keys, in descending order; -0 and +0 tie.

    torch.topk leaves the order of ties open and a stable sort of all E is three times slower, so
    the index becomes part of an integer key, which makes every key different.
    """
    bits = (key_TE + 0.0).view(torch.int32)
    ordered = bits.bitwise_xor_((bits >> 31).bitwise_and_(0x7FFFFFFF)).to(torch.int64)
    backwards = torch.arange(key_TE.shape[-1] - 1, -1, -1, device=key_TE.device)
    unique = ordered.bitwise_left_shift_(32).bitwise_or_(backwards)
    return torch.topk(unique, k, dim=-1).indices


def _two_best(key_TGN: Tensor) -> Tensor:
    return key_TGN.topk(2, dim=-1).values.sum(dim=-1)


GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "top2": _two_best,
    "max": lambda key_TGN: key_TGN.amax(dim=-1),
}


def within_groups(
    key_TE: Tensor, n_group: int, topk_group: int, group_score: str, fill: float
) -> Tensor:
    """Keys [T, E] with those outside the best groups replaced by fill; masks stay masks."""
    tokens, experts = key_TE.shape
    key_TGN = key_TE.reshape(tokens, n_group, experts // n_group)
    chosen = descending(GROUP_SCORES[group_score](key_TGN), topk_group)
    keep_TG = torch.zeros(key_TGN.shape[:2], dtype=torch.bool, device=key_TE.device)
    keep_TG.scatter_(1, chosen, True)
    keep_TGN = keep_TG.unsqueeze(-1) | torch.isneginf(key_TGN)
    return torch.where(keep_TGN, key_TGN, fill).flatten(1)
