"""Stored weights → numbers, in registers: what dequant.py says, in Triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def decode(codes, FORMAT: tl.constexpr):
    """Codes that hold one value each, as float32 (plain and multiplied as fp8: as they are)."""
    if FORMAT == "e4m3":
        codes = e4m3(codes)
    return codes


@triton.jit
def decode_pair(codes, FORMAT: tl.constexpr):
    """Bytes of two values as float32: the low nibbles, and the high ones."""
    if FORMAT == "e2m1":
        low = _e2m1(codes & 15)
        high = _e2m1(codes >> 4)
    else:
        tl.static_assert(FORMAT == "int4", "a packed format that nobody decodes")
        low = _int4(codes & 15)
        high = _int4(codes >> 4)
    return low, high


@triton.jit
def decode_scale(stored, SCALE: tl.constexpr):
    """The scales of groups as float32."""
    if SCALE == "e8m0":
        bits = stored.to(tl.uint32) << 23
        bits = tl.where(stored == 0, 1 << 22, bits)
        bits = tl.where(stored == 255, 0x7FC00000, bits)
        scale = bits.to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        scale = e4m3(stored)
    else:
        scale = stored.to(tl.float32)
    return scale


@triton.jit
def e4m3(codes):
    """Bits of e4m3: its exponent moved to where float32 has one, and the biases evened."""
    magnitude = (codes & 127).to(tl.uint32)
    bits = (magnitude << 20) | ((codes & 128).to(tl.uint32) << 24)
    bits = tl.where(magnitude == 127, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def _e2m1(nibbles):
    bits = ((nibbles & 7).to(tl.uint32) << 22) | ((nibbles & 8).to(tl.uint32) << 28)
    return bits.to(tl.float32, bitcast=True) * 8.507059173023462e37  # 2 ** 126


@triton.jit
def _int4(nibbles):
    """Two's complement: the upper half of the codes is negative."""
    return nibbles.to(tl.float32) - tl.where(nibbles > 7, 16.0, 0.0)


@triton.jit
def times_groups(values, scale):
    """values [N, K] x scale [N, K / G], each scale for G neighbours of a row."""
    N: tl.constexpr = values.shape[0]
    K: tl.constexpr = values.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    grouped = tl.reshape(values, (N, GROUPS, K // GROUPS)) * scale[:, :, None]
    return tl.reshape(grouped, (N, K))
