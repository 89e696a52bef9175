"""Rows → fp8 on the device, a scale for each row or for each group of neighbours in it."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from expertd.backends.triton.chain import chained, follow, release, wait
from expertd.backends.triton.dot import rounded, widened

WIDE = 1024
"""How many columns a program takes where a row has a scale for each group."""


@triton.jit
def to_e4m3(values):
    """float32 → e4m3, saturating; what is not finite becomes NaN, e4m3 having no infinity."""
    values = tl.where(tl.abs(values) == float("inf"), float("nan"), values)
    values = tl.where(values > 448.0, 448.0, values)
    values = tl.where(values < -448.0, -448.0, values)
    return rounded(values, tl.float8e4nv)


@triton.jit
def e4m3_scale(values):
    """The multiplier [M] that lets each row of values [M, K] reach e4m3's largest; 1 for zeros."""
    largest = tl.max(tl.abs(values), 1)
    return tl.where(largest > 0.0, largest / 448.0, 1.0)


@triton.jit
def quantized(values):
    """values [M, K] as e4m3 codes and one multiplier for each row [M]."""
    scale = e4m3_scale(values)
    return to_e4m3(values / scale[:, None]), scale


@triton.jit
def through_mxfp8(values):
    """values [M, 32] rounded to what mxfp8 can hold: e4m3 with a power of two for each row."""
    bits = e4m3_scale(values).to(tl.uint32, bitcast=True)
    exponent = (bits >> 23) + tl.where((bits & 0x7FFFFF) != 0, 1, 0)
    exponent = tl.where(exponent < 1, 1, exponent)
    # Rows that are not finite have an exponent beyond the last: they stay so.
    power = tl.where(exponent < 255, exponent << 23, 0x7FC00000)
    scale = power.to(tl.uint32).to(tl.float32, bitcast=True)
    return widened(to_e4m3(values / scale[:, None])) * scale[:, None]


@triton.jit
def _quantize(
    rows_ptr,
    codes_ptr,
    scale_ptr,
    count_ptr,
    width,
    groups,
    FORM: tl.constexpr,
    COUNTED: tl.constexpr,
    GROUP: tl.constexpr,
    GROUPS: tl.constexpr,
    BESIDE: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """One row's GROUPS x GROUP columns. FORM: "scaled", each group by its own largest; "fixed", all
    by the one scale in scale_ptr; "mxfp8", rounded to what it can hold. COUNTED: only so many rows
    as count_ptr says are there. BESIDE: at the same time as the kernel before, whatever that is."""
    if BESIDE:
        release(CHAINED)
    else:
        follow(CHAINED)
    row = tl.program_id(0).to(tl.int64)
    if COUNTED and row >= tl.load(count_ptr):
        return
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    column = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    there = column < width
    values = tl.load(rows_ptr + row * width + column, mask=there, other=0.0).to(tl.float32)
    if FORM == "fixed":
        codes = to_e4m3(values / tl.load(scale_ptr))
    elif FORM == "mxfp8":
        codes = rounded(through_mxfp8(values), codes_ptr.dtype.element_ty)
    else:
        codes, scale = quantized(values)
        tl.store(scale_ptr + row * groups + group, scale, mask=group < groups)
    tl.store(codes_ptr + row * width + column, codes, mask=there)
    if BESIDE:
        wait(CHAINED)


def quantize_groups(rows: Tensor, codes: Tensor, scale: Tensor, beside: bool = False) -> None:
    """rows [R, K] → codes [R, K] e4m3 and scale [R, K / 128, rounded up]."""
    _launch(rows, codes, scale, "scaled", 128, beside)


def quantize_rows(
    rows: Tensor, codes: Tensor, scale: Tensor, beside: bool = False, count: Tensor | None = None
) -> None:
    """rows [R, K] → codes [R, K] e4m3 and scale [R, 1]; count [1]: how many rows there are."""
    _launch(rows, codes, scale, "scaled", triton.next_power_of_2(rows.shape[1]), beside, count)


def quantize_fixed(rows: Tensor, codes: Tensor, scale: Tensor, beside: bool = False) -> None:
    """rows [R, K] → codes [R, K] e4m3, all divided by scale []."""
    _launch(rows, codes, scale, "fixed", WIDE, beside)


def round_mxfp8(rows: Tensor, out: Tensor, beside: bool = False) -> None:
    """rows [R, K] → out [R, K], rounded to mxfp8's values."""
    _launch(rows, out, rows, "mxfp8", 32, beside)


def _launch(
    rows: Tensor,
    codes: Tensor,
    scale: Tensor,
    form: str,
    group: int,
    beside: bool,
    count: Tensor | None = None,
) -> None:
    """A program for each row's WIDE columns, or for each group that is wider."""
    width, columns = rows.shape[1], max(WIDE, group)
    _quantize[(len(rows), triton.cdiv(width, columns))](
        rows,
        codes,
        scale,
        scale if count is None else count,
        width,
        triton.cdiv(width, group),
        FORM=form,
        COUNTED=count is not None,
        GROUP=group,
        GROUPS=columns // group,
        BESIDE=beside,
        num_warps=8 if columns > WIDE else 4,
        **chained(rows.device),
    )
