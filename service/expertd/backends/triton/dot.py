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
        rows = rows.to(tl.float32)
        weights = weights.to(tl.float32)
    if SWAPPED:
        total = tl.dot(weights, tl.trans(rows), total)
    else:
        total = tl.dot(rows, tl.trans(weights), total)
    return total


@triton.jit
def rounded(values, DTYPE: tl.constexpr):
    """values in a dtype, to the nearest; the interpreter alone would cut off what is too fine."""
    if INTERPRETED:
        values = values.to(tl.float32)
        if DTYPE is tl.bfloat16:
            values = _nearest(values, 16)
        elif DTYPE is tl.float8e4nv:
            # Below 2 ** -6 its steps are 2 ** -9: those of float32 between 2 ** 14 and 2 ** 15.
            small = (values + 24576.0) - 24576.0
            values = tl.where(tl.abs(values) < 0.015625, small, _nearest(values, 20))
    return values.to(DTYPE)


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
