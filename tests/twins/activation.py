"""What the FC1 epilogue does with raw accumulators, in the units that the kernels read.

up and gate are raw accumulators, s the gate scale (what dequantises them), c the output scale:
Swiglu      c (up + beta) * s g sigmoid(alpha s g), up and g clamped raw; alpha alone is physical
SwigluStep  c clamp(up) * min(silu(s g), s L), L raw, physical 7 by default
Geglu       c (up + beta) * s g phi(alpha s g)
Situ        c beta tanh(s up / beta) * alpha tanh(s g / alpha) sigmoid(s g)
Relu2       c relu(s x)^2
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from tests.twins.checks import Arguments, require
from tests.twins.enums import ActivationType
from tests.twins.sizes import Sizes
from torch import Tensor

A = ActivationType
STEP_LIMIT = 7.0


@dataclass(frozen=True)
class Activation:
    """A kind with its per-expert parameters [El], None where the caller gave none."""

    kind: ActivationType
    alpha: Tensor | None = None
    beta: Tensor | None = None
    limit: Tensor | None = None


@dataclass(frozen=True)
class Parameters:
    """One expert's parameters."""

    alpha: Tensor
    beta: Tensor
    limit: Tensor | None


def parameters(args: Arguments, size: Sizes, *, anywhere: bool = False) -> Activation:
    """Checks gemm1_alpha, beta and clamp_limit; anywhere: the launcher does not tie them to Swiglu.

    Raises ContractError where the activation cannot take them.
    """
    given = {
        name: args.optional(name, [torch.float32], [size.local])
        for name in ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
    }
    present = [name for name, value in given.items() if value is not None]
    kind = size.activation
    if kind is A.SwigluStep:
        only = set(present) <= {"gemm1_clamp_limit"}
        require(only, "gemm1_alpha", present, "gemm1_clamp_limit alone for SwigluStep")
    elif not anywhere and kind is not A.Swiglu:
        require(not present, "activation_type", kind.name, f"Swiglu with {present}")
    if kind is A.Situ:
        _positive(given)
    return Activation(kind, *given.values())


def _positive(given: dict[str, Tensor | None]) -> None:
    for name, value in given.items():
        if value is not None:
            fine = bool((torch.isfinite(value) & (value > 0)).all())
            require(fine, name, value.tolist(), "finite and positive values for Situ")


def activate(spec: Activation, raw: Tensor, gate: Tensor, out: Tensor, expert: int) -> Tensor:
    """[N, 2I] ([up; gate]) or [N, I] raw accumulators to [N, I], output scale included."""
    if spec.kind is A.Relu2:
        return torch.relu(raw * gate).square() * out
    up, gated = raw.chunk(2, dim=1)
    middle = _GATED[spec.kind](up, gated, gate, _of(spec, expert, raw))
    return middle * out


def _of(spec: Activation, expert: int, like: Tensor) -> Parameters:
    neutral = 1.0 if spec.kind is A.Situ else 0.0
    return Parameters(
        alpha=like.new_tensor(1.0) if spec.alpha is None else spec.alpha[expert],
        beta=like.new_tensor(neutral) if spec.beta is None else spec.beta[expert],
        limit=None if spec.limit is None else spec.limit[expert],
    )


def _clamped(up: Tensor, gated: Tensor, limit: Tensor | None) -> tuple[Tensor, Tensor]:
    if limit is None:
        return up, gated
    return torch.clamp(up, -limit, limit), torch.minimum(gated, limit)


def _swiglu(up: Tensor, gated: Tensor, gate: Tensor, with_: Parameters) -> Tensor:
    up, gated = _clamped(up, gated, with_.limit)
    physical = gated * gate
    return (up + with_.beta) * physical * torch.sigmoid(with_.alpha * physical)


def _geglu(up: Tensor, gated: Tensor, gate: Tensor, with_: Parameters) -> Tensor:
    up, gated = _clamped(up, gated, with_.limit)
    physical = gated * gate
    phi = 0.5 * (1.0 + torch.erf(with_.alpha * physical * 0.5**0.5))
    return (up + with_.beta) * physical * phi


def _swiglu_step(up: Tensor, gated: Tensor, gate: Tensor, with_: Parameters) -> Tensor:
    raw = STEP_LIMIT / gate if with_.limit is None else with_.limit
    physical = gated * gate
    capped = torch.minimum(physical * torch.sigmoid(physical), raw * gate)
    return torch.clamp(up, -raw, raw) * capped


def _situ(up: Tensor, gated: Tensor, gate: Tensor, with_: Parameters) -> Tensor:
    up, gated = _clamped(up, gated, with_.limit)
    linear, physical = up * gate, gated * gate
    bent = with_.alpha * torch.tanh(physical / with_.alpha) * torch.sigmoid(physical)
    return with_.beta * torch.tanh(linear / with_.beta) * bent


_GATED: dict[ActivationType, Callable[[Tensor, Tensor, Tensor, Parameters], Tensor]] = {
    A.Swiglu: _swiglu,
    A.Geglu: _geglu,
    A.SwigluStep: _swiglu_step,
    A.Situ: _situ,
}
