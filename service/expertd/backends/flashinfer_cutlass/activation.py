"""The arguments by which the kernel learns an activation's constants: [L] float32 each."""

from __future__ import annotations

import torch
from torch import Tensor

from expertd.core import Activation, ActivationKind

UNCLAMPED = torch.finfo(torch.float32).max
"""A clamp that never clamps, where the kernel would put a limit of its own in place of none."""


def constants(activation: Activation, held: int, device: torch.device) -> dict[str, Tensor]:
    """What an activation passes; SwiGLU with a limit is SwiGLU-OAI with alpha 1 and beta 0."""
    return {
        name: torch.full((held,), value, dtype=torch.float32, device=device)
        for name, value in _values(activation).items()
    }


def _values(activation: Activation) -> dict[str, float]:
    kind = activation.kind
    limit = UNCLAMPED if activation.limit is None else activation.limit
    if kind is ActivationKind.SWIGLU and activation.limit is not None:
        return {"swiglu_alpha": 1.0, "swiglu_beta": 0.0, "swiglu_limit": limit}
    if kind is ActivationKind.SWIGLU_STEP:
        return {"swiglu_limit": limit}
    if kind is ActivationKind.SWIGLU_OAI:
        alpha, beta = _or(activation.alpha, 1.702), _or(activation.beta, 1.0)
        return {"swiglu_alpha": alpha, "swiglu_beta": beta, "swiglu_limit": limit}
    if kind is ActivationKind.SITU:
        alpha, beta = _or(activation.alpha, 4.0), _or(activation.beta, 25.0)
        return {"situ_beta": alpha, "situ_linear_beta": beta}
    return {}


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
