"""The numbers by which a kernel turns its accumulators into values, and constants in its units.

A GEMM of FP8 or NVFP4 operands accumulates raw products. The kernel multiplies the gate half by
scaleGate before the activation and the product of both halves by scaleC after it, so a bias, a
clamp and SwiGLU's beta have to be given in units of the raw accumulator: divided by its scale.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.core import Activation, ActivationKind
from expertd.weights.canonical import ExpertWeights
from expertd.weights.quantize import to_e4m3

UNCLAMPED = torch.finfo(torch.float32).max
"""A clamp that never clamps, for the activation whose kernel would put 7 in place of none."""


@dataclass(frozen=True, slots=True)
class Scalars:
    """[L] float32 each: of the up half, the gate half (all rows if not gated), and the output.

    up and gate turn raw accumulators of the first GEMM into values; first is what the kernel
    multiplies into the activation's result (with the quantisation of the second GEMM's input);
    second turns raw accumulators of the second GEMM into values.
    """

    up: Tensor
    gate: Tensor
    first: Tensor
    second: Tensor


def output_scalars(
    dequant13_LP: Tensor,
    dequant2_L: Tensor,
    input13: Tensor,
    input2_L: Tensor,
    kind: ActivationKind,
) -> Scalars:
    """Scalars of weights with these multipliers, rows with input13 and inner rows with input2."""
    up, gate = dequant13_LP[:, 0] * input13, dequant13_LP[:, -1] * input13
    # Not gated: the whole accumulator went through scaleGate. SiTU: both halves did.
    linear = kind not in (ActivationKind.RELU2, ActivationKind.SITU)
    quantized = 1 / input2_L
    first = up * quantized if linear else quantized
    return Scalars(up, gate, first.contiguous(), (dequant2_L * input2_L).contiguous())


def unit_scalars(like_L: Tensor) -> Scalars:
    """Scalars of weights whose scales are all in their blocks: raw accumulators are values."""
    one = torch.ones(len(like_L), dtype=torch.float32, device=like_L.device)
    return Scalars(one, one, one, one)


def activation_arguments(activation: Activation, scalars: Scalars) -> dict[str, Tensor | None]:
    """gemm1_alpha, gemm1_beta and gemm1_clamp_limit [L] in the kernel's units; None: not used."""
    one = torch.ones_like(scalars.gate)
    alpha, beta = _constants(activation)
    # SiTU squeezes values, not accumulators: the kernel has multiplied both halves before.
    beta_unit = one if activation.kind is ActivationKind.SITU else scalars.up
    return {
        "gemm1_alpha": _filled(alpha, one),
        "gemm1_beta": _filled(beta, beta_unit),
        "gemm1_clamp_limit": _filled(_limit(activation), scalars.gate),
    }


DEFAULTS = {ActivationKind.SWIGLU_OAI: (1.702, 1.0), ActivationKind.SITU: (4.0, 25.0)}
"""alpha and beta of the activations that have them, where the layer does not say."""


def _constants(activation: Activation) -> tuple[float | None, float | None]:
    defaults = DEFAULTS.get(activation.kind)
    if defaults is None:
        return None, None
    alpha, beta = activation.alpha, activation.beta
    return defaults[0] if alpha is None else alpha, defaults[1] if beta is None else beta


def _limit(activation: Activation) -> float | None:
    if activation.limit is None and activation.kind is ActivationKind.SWIGLU_STEP:
        return UNCLAMPED
    return activation.limit


def _filled(value: float | None, unit_L: Tensor) -> Tensor | None:
    """[L] of a value in a unit, or nothing."""
    if value is None:
        return None
    return torch.full_like(unit_L, value).div(unit_L).clamp(max=UNCLAMPED)


def bias_arguments(
    weights: ExpertWeights, scalars: Scalars, gated: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The experts' biases [L, M] and [L, H] in float32 and raw units, rows in canonical order."""
    first, second = weights.bias13, weights.bias2
    if first is not None:
        units = (scalars.up, scalars.gate) if gated else (scalars.gate,)
        halves = first.float().chunk(len(units), dim=1)
        pairs = zip(halves, units, strict=True)
        first = torch.cat([half / unit[:, None] for half, unit in pairs], dim=1)
    if second is not None:
        second = second.float() / scalars.second[:, None]
    return first, second


def tied_nvfp4(weights: ExpertWeights) -> ExpertWeights:
    """nvfp4 weights whose halves share the larger global scale; block scales are rounded again.

    Only a clamp needs it: one raw limit has to mean the same in both halves.
    """
    scale, blocks = weights.global13, weights.scale13
    assert scale is not None and blocks is not None
    shared = scale.amax(dim=1, keepdim=True)
    if bool((scale == shared).all()):
        return weights
    held, count = scale.shape
    halves = blocks.float().view(held, count, -1, blocks.shape[2])
    ratio = (scale / shared)[:, :, None, None]
    rounded = to_e4m3(halves * ratio).flatten(1, 2)
    return replace(weights, scale13=rounded, global13=shared.expand_as(scale).contiguous())
