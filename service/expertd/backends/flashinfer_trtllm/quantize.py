"""Rows → the format in which a kernel takes them, on their device, without synchronisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from expertd.weights.dequant import E2M1, e8m0_to_float
from expertd.weights.quantize import E2M1_MAX, E4M3_MAX, pack_nibbles, to_e4m3

Quantized = tuple[Tensor, Tensor | None]
SMALLEST = 1e-12
"""The scale of rows that are all zero, so that nothing is divided by zero."""


def plain(rows_TH: Tensor, input_scale: Tensor | None) -> Quantized:
    """bfloat16 [T, H]."""
    return rows_TH.to(torch.bfloat16), None


def fp8_tensor(rows_TH: Tensor, input_scale: Tensor | None) -> Quantized:
    """e4m3 [T, H] of one static multiplier."""
    assert input_scale is not None
    return to_e4m3(rows_TH.float() / input_scale), None


def fp8_token(rows_TH: Tensor, input_scale: Tensor | None) -> Quantized:
    """e4m3 [T, H] and the multipliers [T, 1] of the rows."""
    rows = rows_TH.float()
    scale = (rows.abs().amax(dim=1, keepdim=True) / E4M3_MAX).clamp(min=SMALLEST)
    return to_e4m3(rows / scale), scale


def fp8_group128(rows_TH: Tensor, input_scale: Tensor | None) -> Quantized:
    """e4m3 [T, H] and the multipliers of groups of 128, transposed: [H/128, T]."""
    groups = _groups(rows_TH, 128)
    scale = (groups.abs().amax(dim=-1) / E4M3_MAX).clamp(min=SMALLEST)
    return to_e4m3(groups / scale[..., None]).flatten(1), scale.T.contiguous()


def mxfp8(rows_TH: Tensor, input_scale: Tensor | None) -> Quantized:
    """e4m3 [T, H] and e8m0 exponents [T, H/32], rounded up so that nothing saturates."""
    groups = _groups(rows_TH, 32)
    exponents = to_e8m0(groups.abs().amax(dim=-1) / E4M3_MAX)
    codes = to_e4m3(groups / e8m0_to_float(exponents)[..., None])
    return codes.flatten(1), exponents


def nvfp4(rows_TH: Tensor, input_scale: Tensor | None) -> Quantized:
    """e2m1 pairs [T, H/2] and e4m3 multipliers [T, H/16], linear, below one static multiplier."""
    assert input_scale is not None
    groups = _groups(rows_TH, 16) / input_scale
    scale = to_e4m3(groups.abs().amax(dim=-1) / E2M1_MAX)
    divisor = scale.float()[..., None]
    values = torch.where(divisor == 0, torch.zeros_like(groups), groups / divisor)
    return pack_nibbles(_e2m1_codes(values.flatten(1))), scale


def group_scales_to_native(scales_TG: Tensor) -> Tensor:
    """The multipliers that a caller sent, as the DeepSeek-FP8 entries want them: [H/128, T]."""
    return scales_TG.T.contiguous()


def to_e8m0(values: Tensor) -> Tensor:
    """float32 ≥ 0 → the exponent bits of the next power of two; infinity and NaN become NaN."""
    bits = values.view(torch.int32)
    exponent = (bits >> 23 & 0xFF) + ((bits & 0x7FFFFF) != 0).int()
    # The smallest e8m0 value lies below float32's normal range, among numbers without an exponent.
    exponent = exponent.masked_fill(values <= 2.0**-127, 0)
    return exponent.clamp(max=255).to(torch.uint8)


def _groups(rows_TH: Tensor, size: int) -> Tensor:
    return rows_TH.float().reshape(len(rows_TH), -1, size)


def _e2m1_codes(values: Tensor) -> Tensor:
    """The nearest e2m1 codes, ties to the even one, saturating."""
    size = values.abs()
    code = torch.zeros_like(size, dtype=torch.uint8)
    # Comparisons with plain numbers: a table would have to travel to the device at every call.
    for lower, (low, high) in enumerate(zip(E2M1, E2M1[1:], strict=False)):
        middle = (low + high) / 2
        code += size > middle if lower % 2 == 0 else size >= middle
    return code | (torch.signbit(values).to(torch.uint8) << 3)


QUANTIZERS: dict[str, Callable[[Tensor, Tensor | None], Quantized]] = {
    "bf16": plain,
    "fp8_tensor": fp8_tensor,
    "fp8_token": fp8_token,
    "fp8_group128": fp8_group128,
    "mxfp8": mxfp8,
    "nvfp4": nvfp4,
}
"""By the row's activation format: what it makes of rows [T, H] and the layer's input multiplier."""

FROM_CALLER: dict[str, Callable[[Tensor], Tensor]] = {
    "fp8_group128": group_scales_to_native,
    "mxfp8": to_e8m0,
}
"""By the format of rows that arrive quantised: float32 multipliers [T, H/G] as the kernel's."""
