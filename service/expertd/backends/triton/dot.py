"""The one place that multiplies tiles and rounds them: the interpreter does neither in bfloat16."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels of this process run in the interpreter, on the CPU."""


@triton.jit
def multiply(rows, weights, total, SWAPPED: tl.constexpr):
    """total + rows [M, K] x weights [N, K]^T: [M, N], or [N, M] when swapped.

    Swapped, the weights are the left operand, which the tensor cores may read from registers: the
    place for weights that are decoded there.
    """
    if INTERPRETED:
        rows = widened(rows)
        weights = widened(weights)
    if SWAPPED:
        total = tl.dot(weights, tl.trans(rows), total)
    else:
        total = tl.dot(rows, tl.trans(weights), total)
    return total


@triton.jit
def e4m3(codes):
    """Bits of e4m3: its exponent moved to where float32 has one, and the biases evened."""
    magnitude = (codes & 127).to(tl.uint32)
    bits = (magnitude << 20) | ((codes & 128).to(tl.uint32) << 24)
    bits = tl.where(magnitude == 127, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2 ** 120


@triton.jit
def widened(values):
    """values in float32; the interpreter alone would make 480 of e4m3's NaN."""
    if INTERPRETED and values.dtype is tl.float8e4nv:
        values = e4m3(values.to(tl.uint8, bitcast=True))
    return values.to(tl.float32)


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """values in a dtype, to the nearest; the interpreter alone would cut off what is too fine."""
    if INTERPRETED and DTYPE is tl.float8e4nv:
        values = _interpreted_e4m3(values.to(tl.float32))
    elif INTERPRETED and DTYPE is tl.bfloat16:
        values = _nearest(values.to(tl.float32), 16)
    return values.to(DTYPE)


@triton.jit
def _interpreted_e4m3(values):
    """What a card makes of finite values and NaN; the interpreter makes 384 of NaN."""
    # Below 2 ** -6 its steps are 2 ** -9: those of float32 between 2 ** 14 and 2 ** 15.
    small = (values + 24576.0) - 24576.0
    near = tl.where(tl.abs(values) < 0.015625, small, _nearest(values, 20))
    codes = near.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    return tl.where(values == values, codes, 127).to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def _nearest(values, DROPPED: tl.constexpr):
    """float32 without so many bits of its mantissa, to the nearest, ties to even."""
    bits = values.to(tl.uint32, bitcast=True)
    bits += (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    bits = (bits >> DROPPED) << DROPPED
    return tl.where(values == values, bits.to(tl.float32, bitcast=True), values)


@triton.jit
def nothing(M: tl.constexpr, N: tl.constexpr, SWAPPED: tl.constexpr):
    """A total of zeros in the orientation that multiply adds to."""
    return tl.zeros((N, M) if SWAPPED else (M, N), dtype=tl.float32)


@triton.jit
def scaled(part, row_scale, weight_scale, SWAPPED: tl.constexpr):
    """part x row_scale [M] x weight_scale [] in multiply's orientation."""
    factor = row_scale * weight_scale
    return part * (factor[None, :] if SWAPPED else factor[:, None])


@triton.jit
def upright(total, SWAPPED: tl.constexpr):
    """A finished total as [M, N]."""
    if SWAPPED:
        total = tl.trans(total)
    return total
