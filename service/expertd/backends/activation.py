"""The activations in torch: from the first matrix's output to the second's input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from expertd.core import Activation, ActivationKind


def activate(activation: Activation, x_TM: Tensor) -> Tensor:
    """[T, M] → [T, I]; gated inputs hold [up; gate]."""
    return _FUNCTIONS[activation.kind](activation, x_TM)


def _halves(x_TM: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = x_TM.chunk(2, dim=-1)
    return up, gate


def _clamped(activation: Activation, x_TM: Tensor) -> tuple[Tensor, Tensor]:
    up, gate = _halves(x_TM)
    limit = activation.limit
    if limit is None:
        return up, gate
    return up.clamp(-limit, limit), gate.clamp(max=limit)


def _swiglu(activation: Activation, x_TM: Tensor) -> Tensor:
    up, gate = _clamped(activation, x_TM)
    return functional.silu(gate) * up


def _swiglu_oai(activation: Activation, x_TM: Tensor) -> Tensor:
    up, gate = _clamped(activation, x_TM)
    alpha = 1.702 if activation.alpha is None else activation.alpha
    beta = 1.0 if activation.beta is None else activation.beta
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _swiglu_step(activation: Activation, x_TM: Tensor) -> Tensor:
    up, gate = _halves(x_TM)
    gated = functional.silu(gate)
    limit = activation.limit
    if limit is None:
        return gated * up
    return gated.clamp(max=limit) * up.clamp(-limit, limit)


def _geglu(_: Activation, x_TM: Tensor) -> Tensor:
    up, gate = _halves(x_TM)
    return functional.gelu(gate) * up


def _geglu_tanh(_: Activation, x_TM: Tensor) -> Tensor:
    up, gate = _halves(x_TM)
    return functional.gelu(gate, approximate="tanh") * up


def _relu2(_: Activation, x_TM: Tensor) -> Tensor:
    return functional.relu(x_TM).square()


def _situ(activation: Activation, x_TM: Tensor) -> Tensor:
    up, gate = _halves(x_TM)
    alpha = 4.0 if activation.alpha is None else activation.alpha
    beta = 25.0 if activation.beta is None else activation.beta
    gated = alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate)
    return gated * beta * torch.tanh(up / beta)


_FUNCTIONS: dict[ActivationKind, Callable[[Activation, Tensor], Tensor]] = {
    ActivationKind.SWIGLU: _swiglu,
    ActivationKind.SWIGLU_OAI: _swiglu_oai,
    ActivationKind.SWIGLU_STEP: _swiglu_step,
    ActivationKind.GEGLU: _geglu,
    ActivationKind.GEGLU_TANH: _geglu_tanh,
    ActivationKind.RELU2: _relu2,
    ActivationKind.SITU: _situ,
}
