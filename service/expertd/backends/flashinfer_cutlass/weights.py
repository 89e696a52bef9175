"""Canonical weights → what cutlass_fused_moe takes; bf16, fp16 and fp8 are used as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.backends.flashinfer.library import library
from expertd.backends.flashinfer.once import warn_once
from expertd.backends.flashinfer.tied import tied_fp8
from expertd.core import QuantScheme
from expertd.weights.canonical import ExpertWeights

log = logging.getLogger(__name__)

HUMMING_COMPENSATION = 64.0
"""The kernel's fp4 → fp8 conversion leaves values this much too small."""


@dataclass(frozen=True, slots=True)
class Native:
    """A layer in the kernel's layout; rows and output are of dtype.

    scales: the quant_scales of every call, or None where the rows' own scale enters them (fp8).
    """

    w13: Tensor
    w2: Tensor
    dtype: torch.dtype = torch.bfloat16
    scales: tuple[Tensor, ...] | None = ()
    fp8: Fp8Scales | None = None


@dataclass(frozen=True, slots=True)
class Fp8Scales:
    """Multipliers of fp8_tensor: weights [L], rows [] (None: of each call), inner rows [L]."""

    first: Tensor
    second: Tensor
    rows: Tensor | None
    inner: Tensor

    def of_call(self, rows_scale: Tensor) -> list[Tensor]:
        """quant_scales of a call whose rows were divided by rows_scale []."""
        return [self.first * rows_scale, 1 / self.inner, self.second * self.inner, rows_scale]


def native(weights: ExpertWeights, activation_quant: str) -> Native:
    """The weights of a layer as the row with these activations takes them."""
    return _LAYOUTS[weights.quant, activation_quant](weights)


def _plain(weights: ExpertWeights) -> Native:
    return Native(weights.w13, weights.w2, dtype=weights.w13.dtype)


def _fp8_tensor(weights: ExpertWeights) -> Native:
    weights = tied_fp8(weights)
    assert weights.scale13 is not None and weights.scale2 is not None
    first, second = weights.scale13[:, 0].contiguous(), weights.scale2[:, 0].contiguous()
    if weights.input2 is None:
        warn_once(log, "a checkpoint has no scale for the rows between the matrices: using 1.0")
    inner = torch.ones_like(second) if weights.input2 is None else weights.input2.float()
    rows = None if weights.input13 is None else weights.input13.float().amax()
    return Native(weights.w13, weights.w2, scales=None, fp8=Fp8Scales(first, second, rows, inner))


def _fp8_block128(weights: ExpertWeights) -> Native:
    assert weights.scale13 is not None and weights.scale2 is not None
    return Native(weights.w13, weights.w2, scales=(weights.scale13, weights.scale2))


def _mxfp4(weights: ExpertWeights) -> Native:
    assert weights.scale13 is not None and weights.scale2 is not None
    weave, fold = _weave_weights(), _fold_scales()
    scales = tuple(fold(scale).view(torch.int32) for scale in (weights.scale13, weights.scale2))
    return Native(weave(weights.w13, "fp4"), weave(weights.w2, "fp4"), scales=scales)


def _humming(weights: ExpertWeights) -> Native:
    assert weights.scale13 is not None and weights.scale2 is not None
    prepare = library().preprocess_moe_weights_for_sm90_mixed_gemm_humming
    w13, scale13, rest13 = prepare(weights.w13, weights.scale13)
    w2, scale2, rest2 = prepare(weights.w2, weights.scale2)
    # The kernel finds each row's own scale; this one is reserved.
    unused = torch.ones((), dtype=torch.float32, device=w13.device)
    first = (scale13.view(torch.int32), (rest13 * HUMMING_COMPENSATION).contiguous())
    second = (scale2.view(torch.int32), (rest2 * HUMMING_COMPENSATION).contiguous())
    return Native(w13, w2, scales=(*first, unused, *second))


def _weave_weights() -> Callable[[Tensor, str], Tensor]:
    weave: Callable[[Tensor, str], Tensor] = library().interleave_moe_weights_for_sm90_mixed_gemm
    return weave


def _fold_scales() -> Callable[[Tensor], Tensor]:
    fold: Callable[[Tensor], Tensor] = library().interleave_moe_scales_for_sm90_mixed_gemm
    return fold


_LAYOUTS: dict[tuple[QuantScheme, str], Callable[[ExpertWeights], Native]] = {
    (QuantScheme.BF16, "bf16"): _plain,
    (QuantScheme.FP16, "bf16"): _plain,
    (QuantScheme.FP8_TENSOR, "fp8_tensor"): _fp8_tensor,
    (QuantScheme.FP8_BLOCK128, "fp8_group128"): _fp8_block128,
    (QuantScheme.MXFP4, "bf16"): _mxfp4,
    (QuantScheme.MXFP4, "fp8"): _humming,
}
