"""Number formats: what stored bits mean, and how the kernels quantise between their two GEMMs."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

E4M3_MAX = 448.0
E2M1_MAX = 6.0
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny
_ROW_SCALE_MIN = 1.0 / (E4M3_MAX * 512.0)


def bf16(values: Tensor) -> Tensor:
    """Rounded to bfloat16, in fp32."""
    return values.to(torch.bfloat16).float()


def e4m3(values: Tensor) -> Tensor:
    """Rounded to e4m3 with saturation, in fp32; NaN stays NaN."""
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


def e2m1(values: Tensor) -> Tensor:
    """Rounded to e2m1, ties to the even code, saturating, in fp32."""
    magnitude = values.abs()
    code = torch.zeros_like(magnitude, dtype=torch.long)
    for low, (below, above) in enumerate(zip(_E2M1, _E2M1[1:], strict=False)):
        middle = (below + above) / 2
        code += (magnitude > middle) if low % 2 == 0 else (magnitude >= middle)
    table = torch.tensor(_E2M1, device=values.device)
    return torch.copysign(table[code], values)


def nibbles(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes as [..., K] codes 0..15, the low nibble first."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).long()


def fp4_values(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes of e2m1 pairs as [..., K] fp32."""
    found = _e2m1_pairs().to(packed.device).index_select(0, packed.flatten().int())
    return torch.view_as_real(found).reshape(*packed.shape[:-1], -1)


@cache
def _e2m1_pairs() -> Tensor:
    """[256]: what the two codes of each byte mean, the low nibble first, as one complex number."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)])
    return torch.view_as_complex(table[nibbles(torch.arange(256, dtype=torch.uint8))].view(256, 2))


def e4m3_values(stored: Tensor) -> Tensor:
    """Stored e4m3 as fp32; torch converts them one by one, slowly, on a CPU."""
    codes = stored.contiguous().view(torch.uint8).flatten().int()
    return _e4m3_codes().to(stored.device).index_select(0, codes).view(stored.shape)


@cache
def _e4m3_codes() -> Tensor:
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def int4_values(packed: Tensor) -> Tensor:
    """[..., K / 2] bytes of two's complement pairs as [..., K] fp32."""
    codes = nibbles(packed)
    return torch.where(codes > 7, codes - 16, codes).float()


def e8m0_values(scales: Tensor) -> Tensor:
    """Exponent bytes, of any 8-bit dtype, as powers of two; 255 is NaN."""
    codes = scales.view(torch.uint8).int()
    powers = torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes - 127)
    return powers.masked_fill(codes == 255, float("nan"))


def scaled(values: Tensor, scales: Tensor) -> Tensor:
    """[M, K] times [M, K / v], each scale over v columns."""
    rows, columns = values.shape
    groups = values.reshape(rows, scales.shape[1], -1)
    return (groups * scales.unsqueeze(-1)).reshape(rows, columns)


def through_groups128(values: Tensor) -> Tensor:
    """[N, K] through e4m3 with one fp32 scale per row and 128 columns (DeepSeekFp8)."""
    groups = values.reshape(values.shape[0], -1, 128)
    scale = (groups.abs().amax(-1, keepdim=True) / E4M3_MAX).clamp(min=_SMALLEST_NORMAL)
    return (e4m3(groups / scale) * scale).reshape_as(values)


def through_mxfp8(values: Tensor) -> Tensor:
    """[N, K] through e4m3 with a power-of-two scale per 32 columns, rounded up."""
    groups = values.reshape(values.shape[0], -1, 32)
    mantissa, exponent = torch.frexp(groups.abs().amax(-1, keepdim=True) / E4M3_MAX)
    power = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp(-127, 127)
    scale = torch.ldexp(torch.ones_like(mantissa), power)
    return (e4m3(groups / scale) * scale).reshape_as(values)


def through_nvfp4(values: Tensor) -> Tensor:
    """[N, K] through e2m1 with an e4m3 scale per 16 columns."""
    groups = values.reshape(values.shape[0], -1, 16)
    scale = e4m3(groups.abs().amax(-1, keepdim=True) / E2M1_MAX)
    inverse = torch.where(scale == 0, torch.zeros_like(scale), 1.0 / scale)
    return (e2m1(groups * inverse) * scale).reshape_as(values)


def through_rows(values: Tensor) -> Tensor:
    """[N, K] rounded to bf16, then through e4m3 with one fp32 scale per row (per-channel FP8)."""
    rounded = bf16(values)
    top = rounded.abs().amax(-1, keepdim=True).clamp(min=float(torch.tensor(1e-6).bfloat16()))
    scale = (top / E4M3_MAX).clamp(min=_ROW_SCALE_MIN)
    return e4m3(rounded * (E4M3_MAX / top).clamp(max=1.0 / _ROW_SCALE_MIN)) * scale
