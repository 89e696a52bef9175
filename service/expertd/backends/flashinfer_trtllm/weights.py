"""Canonical expert weights → the tensors that a TRT-LLM entry takes, by its argument names.

The logical first matrix is [up; gate] on both sides; what differs is the order of rows, the order
of bytes and the units. DeepSeek-FP8 weights are passed as they are (MajorK, not shuffled): the
kernels take them, FlashInfer's own preparation does the same, and a layer that other backends hold
too then needs no second copy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from weakref import ReferenceType, WeakValueDictionary, ref

import torch
from torch import Tensor

from expertd.backends.flashinfer.once import warn_once
from expertd.backends.flashinfer.tied import tied_fp8
from expertd.backends.flashinfer_trtllm import permute, scales
from expertd.backends.flashinfer_trtllm.pad import Sizes, pad
from expertd.backends.flashinfer_trtllm.swizzle import swizzle
from expertd.core import Activation, LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights

log = logging.getLogger(__name__)

Arguments = Mapping[str, Tensor | None]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Native:
    """The arguments that stay for a layer's life; input_scale [] is the multiplier of its rows.

    source: the canonical weights that they were made of, which may be gone.
    """

    arguments: Arguments
    input_scale: Tensor | None = None
    source: ReferenceType[ExpertWeights] | None = None


def native(weights: ExpertWeights, spec: LayerSpec, sizes: Sizes) -> Native:
    """The weights of a layer as its scheme's entry takes them; both modes share the one copy."""
    key = (id(weights), spec.activation, sizes)
    found = _IN_USE.get(key)
    # Another layer's weights may have come to have the id of a source that is gone.
    if found is None or found.source is None or found.source() is not weights:
        made = _SCHEMES[spec.quant](pad(weights, spec, sizes), spec.activation)
        found = _IN_USE[key] = replace(made, source=ref(weights))
    return found


_IN_USE: WeakValueDictionary[tuple[int, Activation, Sizes], Native] = WeakValueDictionary()


def _bf16(weights: ExpertWeights, activation: Activation) -> Native:
    w13, w2 = _ordered(weights.w13, weights.w2, activation.gated)
    units = scales.unit_scalars(w13)
    return Native(
        {
            "gemm1_weights": permute.block_major(w13),
            "gemm2_weights": permute.block_major(w2),
            **scales.activation_arguments(activation, units),
        }
    )


def _fp8_tensor(weights: ExpertWeights, activation: Activation) -> Native:
    weights = tied_fp8(weights) if activation.gated else weights
    assert weights.scale13 is not None and weights.scale2 is not None
    input13, input2 = _input_scales(weights)
    out = scales.output_scalars(
        weights.scale13, weights.scale2[:, 0], input13, input2, activation.kind
    )
    w13, w2 = _ordered(weights.w13, weights.w2, activation.gated)
    return Native(
        {
            "gemm1_weights": w13,
            "gemm2_weights": w2,
            "output1_scales_scalar": out.first,
            "output1_scales_gate_scalar": out.gate.contiguous(),
            "output2_scales_scalar": out.second,
            **scales.activation_arguments(activation, out),
        },
        input13,
    )


def _fp8_channel(weights: ExpertWeights, activation: Activation) -> Native:
    assert weights.scale13 is not None and weights.scale2 is not None
    w13, w2 = _ordered(weights.w13, weights.w2, activation.gated)
    s13, s2 = _ordered(weights.scale13, weights.scale2, activation.gated)
    # Rows and channels carry all scales, and the inner rows are quantised by the kernel itself.
    units = scales.unit_scalars(w13)
    return Native(
        {
            "gemm1_weights": w13,
            "gemm2_weights": w2,
            "gemm1_per_channel_weight_scale": s13,
            "gemm2_per_channel_weight_scale": s2,
            **_scalar_arguments(units),
        }
    )


def _fp8_block128(weights: ExpertWeights, activation: Activation) -> Native:
    units = scales.unit_scalars(weights.w13)
    return Native(
        {
            "gemm1_weights": weights.w13,
            "gemm2_weights": weights.w2,
            "gemm1_weights_scale": weights.scale13,
            "gemm2_weights_scale": weights.scale2,
            **scales.activation_arguments(activation, units),
        }
    )


def _mxfp8(weights: ExpertWeights, activation: Activation) -> Native:
    units = scales.unit_scalars(weights.w13)
    return Native(
        {
            **_block_scaled(weights, activation),
            **scales.activation_arguments(activation, units),
        }
    )


def _nvfp4(weights: ExpertWeights, activation: Activation) -> Native:
    weights = scales.tied_nvfp4(weights) if activation.limit is not None else weights
    assert weights.global13 is not None and weights.global2 is not None
    input13, input2 = _input_scales(weights)
    out = scales.output_scalars(
        weights.global13, weights.global2[:, 0], input13, input2, activation.kind
    )
    return Native(
        {
            **_block_scaled(weights, activation),
            **_scalar_arguments(out),
            **_biases(weights, activation, out),
            **scales.activation_arguments(activation, out),
        },
        input13,
    )


def _mxfp4(weights: ExpertWeights, activation: Activation) -> Native:
    units = scales.unit_scalars(weights.w13)
    parts = _block_scaled(weights, activation)
    return Native(
        {
            **parts,
            # The entry tells MXFP4 from NVFP4 by the number of scales and wants one dtype for both.
            "gemm1_weights_scale": parts["gemm1_weights_scale"].view(torch.float8_e4m3fn),
            "gemm2_weights_scale": parts["gemm2_weights_scale"].view(torch.float8_e4m3fn),
            "output1_scale_scalar": None,
            "output1_scale_gate_scalar": None,
            "output2_scale_scalar": None,
            **_biases(weights, activation, units),
            **scales.activation_arguments(activation, units),
        }
    )


def _mxint4(weights: ExpertWeights, activation: Activation) -> Native:
    units = scales.unit_scalars(weights.w13)
    parts = _block_scaled(weights, activation)
    return Native(
        {
            **parts,
            "gemm1_weights": permute.block_major(parts["gemm1_weights"]),
            "gemm2_weights": permute.block_major(parts["gemm2_weights"]),
            **scales.activation_arguments(activation, units),
        }
    )


def _block_scaled(weights: ExpertWeights, activation: Activation) -> dict[str, Tensor]:
    """Matrices with ordered rows, and their scales with the same order and swizzled."""
    assert weights.scale13 is not None and weights.scale2 is not None
    w13, w2 = _ordered(weights.w13, weights.w2, activation.gated)
    s13, s2 = _ordered(weights.scale13, weights.scale2, activation.gated)
    return {
        "gemm1_weights": w13,
        "gemm2_weights": w2,
        "gemm1_weights_scale": swizzle(s13),
        "gemm2_weights_scale": swizzle(s2),
    }


def _ordered(first: Tensor, second: Tensor, gated: bool) -> tuple[Tensor, Tensor]:
    """Tensors [L, M, …] and [L, H, …] with their rows in the kernels' order."""
    return (
        permute.take_rows(first, permute.first_order(first.shape[1], gated)),
        permute.take_rows(second, permute.shuffled(second.shape[1])),
    )


def _scalar_arguments(out: scales.Scalars) -> Arguments:
    return {
        "output1_scale_scalar": out.first,
        "output1_scale_gate_scalar": out.gate.contiguous(),
        "output2_scale_scalar": out.second,
    }


def _biases(weights: ExpertWeights, activation: Activation, units: scales.Scalars) -> Arguments:
    """Biases in raw units and in the order of the prepared rows."""
    first, second = scales.bias_arguments(weights, units, activation.gated)
    if first is not None:
        order = permute.first_order(first.shape[1], activation.gated)
        first = permute.take_rows(first, order)
    if second is not None:
        second = permute.take_rows(second, permute.shuffled(second.shape[1]))
    return {"gemm1_bias": first, "gemm2_bias": second}


def _input_scales(weights: ExpertWeights) -> tuple[Tensor, Tensor]:
    """The multiplier [] of the rows, which all experts share, and those [L] of the inner rows."""
    if weights.input13 is None or weights.input2 is None:
        told = f"a checkpoint has no activation scales for {weights.quant}: using 1.0"
        warn_once(log, told)
        one = torch.ones(len(weights.w13), dtype=torch.float32, device=weights.device)
        return one[0], one
    return weights.input13.float().amax(), weights.input2.float()


_SCHEMES: dict[QuantScheme, Callable[[ExpertWeights, Activation], Native]] = {
    QuantScheme.BF16: _bf16,
    QuantScheme.FP8_TENSOR: _fp8_tensor,
    QuantScheme.FP8_CHANNEL: _fp8_channel,
    QuantScheme.FP8_BLOCK128: _fp8_block128,
    QuantScheme.MXFP8: _mxfp8,
    QuantScheme.NVFP4: _nvfp4,
    QuantScheme.MXFP4: _mxfp4,
    QuantScheme.MXINT4: _mxint4,
}
