"""Stored bits: row orders, swizzles and quantisers, by other means than the twin's.

Row orders, blocks and some quantisers are FlashInfer's CPU helpers; the swizzle is views and
permutes, the number formats are ml_dtypes.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from flashinfer import shuffle_matrix_a
from flashinfer.fused_moe import core, prepare
from torch import Tensor


def shuffled(rows: Tensor, gated: bool) -> Tensor:
    """[M, K] of bytes in the order of FC1 (gated) or of FC2 and plain FC1."""
    order = core._maybe_get_cached_w3_w1_permute_indices({}, rows, 128, is_gated_act_gemm=gated)
    return rows[order]


def shuffled_bytes(weights: Tensor, gated: bool) -> Tensor:
    """[E, M, K] of any 8-bit dtype."""
    each = [shuffled(expert.view(torch.uint8), gated) for expert in weights]
    return torch.stack(each).view(weights.dtype)


def shuffled_values(values: Tensor, gated: bool) -> Tensor:
    """[E, M] fp32, as wide rows of one column each."""
    order = core._maybe_get_cached_w3_w1_permute_indices(
        {}, torch.zeros(values.shape[1], 4, dtype=torch.uint8), 128, is_gated_act_gemm=gated
    )
    return values[:, order].contiguous()


def swizzled(scales: Tensor) -> Tensor:
    """[R, C] as the 128x4 swizzle lays it out, in the same shape."""
    rows, columns = scales.shape
    tiles = scales.view(rows // 128, 4, 32, columns // 4, 4)
    return tiles.permute(0, 3, 2, 1, 4).contiguous().view(rows, columns)


def shuffled_scales(scales: Tensor, gated: bool) -> Tensor:
    """[E, M, C] in the weights' row order, then swizzled."""
    return torch.stack([swizzled(shuffled(expert, gated)) for expert in scales])


def wide(values: Tensor, scales: Tensor) -> Tensor:
    """[..., K] times [..., K / v]."""
    return values * scales.repeat_interleave(values.shape[-1] // scales.shape[-1], dim=-1)


def mxfp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """[..., K] as e4m3 and [..., K / 32] exponent bytes, scale rounded up."""
    groups = values.float().reshape(*values.shape[:-1], -1, 32)
    exponent = torch.ceil(torch.log2(groups.abs().amax(-1) / 448.0)).clamp(-127, 127)
    quantised = groups / torch.exp2(exponent).unsqueeze(-1)
    stored = quantised.clamp(-448, 448).flatten(-2).to(torch.float8_e4m3fn)
    return stored, (exponent + 127).to(torch.uint8)


def exponents(scales: Tensor) -> Tensor:
    """Exponent bytes as fp32, by ml_dtypes."""
    return torch.from_numpy(scales.numpy().view(ml_dtypes.float8_e8m0fnu).astype(np.float32))


def e2m1_codes(values: Tensor) -> Tensor:
    """One code a byte, by ml_dtypes."""
    stored = values.numpy().astype(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(stored.view(np.uint8) & 15)


def e2m1_values(codes: Tensor) -> Tensor:
    stored = codes.numpy().astype(np.uint8).view(ml_dtypes.float4_e2m1fn)
    return torch.from_numpy(stored.astype(np.float32))


def packed(codes: Tensor) -> Tensor:
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def nvfp4(values: Tensor, multiplier: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, e4m3 scales per 16, and the values they stand for without the multiplier."""
    groups = (values.float() * multiplier).reshape(*values.shape[:-1], -1, 16)
    scale = (groups.abs().amax(-1) / 6.0).clamp(max=448).to(torch.float8_e4m3fn)
    divisor = scale.float().clamp(min=1e-9).unsqueeze(-1)
    codes = e2m1_codes((groups / divisor).clamp(-6, 6).flatten(-2))
    return packed(codes), scale, wide(e2m1_values(codes), scale.float()) / multiplier


def mxfp4(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[E, M, K] by FlashInfer's torch quantiser: packed, exponent bytes, values."""
    pairs = [prepare._quantize_mxfp4_linear(expert) for expert in weights]
    codes = torch.stack([code for code, _ in pairs])
    scales = torch.stack([scale.reshape(weights.shape[1], -1) for _, scale in pairs])
    halves = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    return codes, scales, wide(e2m1_values(halves), exponents(scales))


def by_row(values: Tensor) -> tuple[Tensor, Tensor]:
    scale = values.float().abs().amax(-1, keepdim=True) / 448
    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def tiles(weights: Tensor, scales: Tensor) -> Tensor:
    return wide(weights.float(), scales.repeat_interleave(128, dim=1))


def blocked64(weights: Tensor) -> Tensor:
    rows = shuffle_matrix_a(weights.view(torch.uint8), 64)
    blocks: Tensor = core.convert_to_block_layout(rows, 128)
    return blocks.view(torch.float8_e4m3fn)


def largest_middle(x: Tensor, fc1: Tensor, gated: bool) -> float:
    """Eight times the largest activation output: parameters and biases must not saturate it."""
    raw = torch.einsum("th,emh->etm", x.float(), fc1.float())
    if not gated:
        return 8 * float(torch.relu(raw).square().max())
    up, gate = raw.chunk(2, dim=2)
    return 8 * float((up * torch.nn.functional.silu(gate)).abs().max())
