"""The plain fp32 answer: original weights, no layout, one token at a time, rounded only on wish."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.service.twins.native import Native
from torch import Tensor


@dataclass(frozen=True)
class Physical:
    """Activation parameters and biases of every expert, in the units of the model."""

    alpha: Tensor | None = None
    beta: Tensor | None = None
    limit: Tensor | None = None
    bias1: Tensor | None = None
    bias2: Tensor | None = None

    def of(self, name: str, expert: int, default: float) -> float:
        given = getattr(self, name)
        return default if given is None else float(given[expert])


NONE = Physical()
Rounding = Callable[[Tensor], Tensor]


def as_it_is(values: Tensor) -> Tensor:
    return values


@dataclass(frozen=True)
class Roundings:
    """Of FC1's rows before the activation, of what FC2 reads, and of every bf16 result."""

    raw: Rounding = as_it_is
    middle: Rounding = as_it_is
    result: Rounding = as_it_is


EXACT = Roundings()


def output(
    native: Native,
    ids: list[list[int]],
    weights: Tensor,
    physical: Physical = NONE,
    roundings: Roundings = EXACT,
) -> Tensor:
    """[T, H] fp32: sum over the listed experts; -1 and what is not listed contribute nothing."""
    out = torch.zeros(native.x.shape[0], native.fc2.shape[1])
    for token, experts in enumerate(ids):
        for slot, expert in enumerate(experts):
            if expert >= 0:
                row = expert_output(native, token, expert, physical, roundings)
                out[token] += weights[token, slot] * row
    return roundings.result(out)


def expert_output(
    native: Native, token: int, expert: int, physical: Physical, roundings: Roundings
) -> Tensor:
    raw = native.fc1[expert] @ native.x[token]
    if physical.bias1 is not None:
        raw = raw + physical.bias1[expert]
    middle = ACTIVATIONS[native.activation](roundings.raw(raw), expert, physical)
    out = native.fc2[expert] @ roundings.middle(middle)
    return roundings.result(out if physical.bias2 is None else out + physical.bias2[expert])


def _swiglu(raw: Tensor, expert: int, with_: Physical) -> Tensor:
    limit = with_.of("limit", expert, float("inf"))
    up, gate = raw.chunk(2)
    up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
    alpha, beta = with_.of("alpha", expert, 1.0), with_.of("beta", expert, 0.0)
    return gate / (1 + torch.exp(-alpha * gate)) * (up + beta)


def _step(raw: Tensor, expert: int, with_: Physical) -> Tensor:
    limit = with_.of("limit", expert, 7.0)
    up, gate = raw.chunk(2)
    return up.clamp(-limit, limit) * torch.nn.functional.silu(gate).clamp(max=limit)


def _geglu(raw: Tensor, expert: int, with_: Physical) -> Tensor:
    up, gate = raw.chunk(2)
    return up * torch.nn.functional.gelu(gate)


def _situ(raw: Tensor, expert: int, with_: Physical) -> Tensor:
    up, gate = raw.chunk(2)
    alpha, beta = with_.of("alpha", expert, 1.0), with_.of("beta", expert, 1.0)
    bent = alpha * torch.tanh(gate / alpha) / (1 + torch.exp(-gate))
    return beta * torch.tanh(up / beta) * bent


def _relu2(raw: Tensor, expert: int, with_: Physical) -> Tensor:
    return raw.clamp(min=0) ** 2


ACTIVATIONS: dict[str, Callable[[Tensor, int, Physical], Tensor]] = {
    "Swiglu": _swiglu,
    "SwigluStep": _step,
    "Geglu": _geglu,
    "Situ": _situ,
    "Relu2": _relu2,
}


def error(got: Tensor, wanted: Tensor) -> float:
    """Relative error in the L2 norm."""
    return float((got.float() - wanted).norm() / wanted.norm())
