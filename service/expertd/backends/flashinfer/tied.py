"""FP8 weights whose kernels have one multiplier for both halves of an expert's first matrix."""

from __future__ import annotations

from dataclasses import replace

import torch

from expertd.weights.canonical import ExpertWeights
from expertd.weights.quantize import to_e4m3


def tied_fp8(weights: ExpertWeights) -> ExpertWeights:
    """fp8_tensor weights whose halves share the larger scale; the other half is rounded again."""
    scale = weights.scale13
    assert scale is not None
    shared = scale.amax(dim=1, keepdim=True)
    if bool((scale == shared).all()):
        return weights
    ratios, codes = scale / shared, torch.empty_like(weights.w13)
    for expert, source in enumerate(weights.w13):
        halves = source.float().view(scale.shape[1], -1, source.shape[1])
        codes[expert] = to_e4m3(halves * ratios[expert, :, None, None]).flatten(0, 1)
    return replace(weights, w13=codes, scale13=shared.expand_as(scale).contiguous())
