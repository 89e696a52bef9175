"""Stored weights → numbers, in registers: what dequant.py says, in Triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.dot import INTERPRETED, e4m3, rounded

# $4: four bytes; $5, $7: the scale of the first two and of the last two, in both halves of a word
# ($6 and $8 are copies: neighbours in a register have one scale, but a thread's next two bytes may
# be of another row); $0, $1: the scaled values of the low nibbles; $2, $3: of the high ones.
_CONSTANTS = """
        .reg .b32 t, a, s, z, o, m;
        mov.b32 z, 0x80008000;
        mov.b32 o, 0x3F803F80;
        mov.b32 m, 0xC308C308;
"""
# Two bytes become the upper halves of two 16-bit lanes. A high nibble has its sign in place, its
# magnitude, moved down by 6, is that of a bfloat16 2 ** 126 times smaller. The scale makes up for
# that (times_126) and takes the sign along: the product is exact. Low nibbles are 4 further down.
_E2M1_HALF = """
        prmt.b32 t, $4, 0, {select};
        shr.u32 a, t, 6;
        and.b32 a, a, 0x01C001C0;
        lop3.b32 s, t, z, ${scale}, 0xEA;
        fma.rn.bf16x2 ${high}, a, s, z;
        shr.u32 a, t, 2;
        and.b32 a, a, 0x01C001C0;
        shl.b32 s, t, 4;
        lop3.b32 s, s, z, ${scale}, 0xEA;
        fma.rn.bf16x2 ${low}, a, s, z;
"""
# Two bytes become the lower halves. A nibble with its sign bit flipped, put into the mantissa of
# 128, makes 136 plus its value.
_INT4_HALF = """
        prmt.b32 t, $4, 0, {select};
        lop3.b32 a, t, 0x000F000F, 0x43084308, 0x6A;
        fma.rn.bf16x2 a, a, o, m;
        fma.rn.bf16x2 ${low}, a, ${scale}, z;
        shr.u32 t, t, 4;
        lop3.b32 a, t, 0x000F000F, 0x43084308, 0x6A;
        fma.rn.bf16x2 a, a, o, m;
        fma.rn.bf16x2 ${high}, a, ${scale}, z;
"""


TIMES_126 = tl.constexpr(2.0**126)
E4M3_SHRUNK = tl.constexpr(2.0**-9)
"""What scales of e4m3 are multiplied with, so that 2 ** 126 times 448 is finite; the scale after
the loop has its inverse (weights.py)."""


def _asm(half: str, *selects: str) -> str:
    halves = (
        half.format(select=select, low=n, high=n + 2, scale=5 + 2 * n)
        for n, select in enumerate(selects)
    )
    return "{" + _CONSTANTS + "".join(halves) + "}"


E2M1_ASM = tl.constexpr(_asm(_E2M1_HALF, "0x1404", "0x3424"))
INT4_ASM = tl.constexpr(_asm(_INT4_HALF, "0x4140", "0x4342"))


@triton.jit
def decode(codes, FORMAT: tl.constexpr):
    """Codes that hold one value each, as float32 (plain and multiplied as fp8: as they are)."""
    if FORMAT == "e4m3":
        codes = e4m3(codes)
    return codes


@triton.jit
def decode_pair(codes, scale, FORMAT: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """Bytes [N, K] of two values, and stored scales [N, K / G]: the scaled values of the low
    nibbles, and of the high ones, in COMPUTE."""
    if INTERPRETED or SCALE == "e8m0":
        low, high = _nibbles(codes, FORMAT)
        scale = decode_scale(scale, SCALE)
        if SCALE == "e4m3":
            scale *= E4M3_SHRUNK
        low = rounded(times_groups(low, scale), COMPUTE)
        high = rounded(times_groups(high, scale), COMPUTE)
    else:
        low, high = _packed(codes, _words(scale, SCALE), FORMAT)
    return low, high


@triton.jit
def _words(scale, SCALE: tl.constexpr):
    """Stored scales as bfloat16 twice in a word; those of e2m1 2 ** 126 times larger."""
    if SCALE == "e8m0_small":
        half = (scale.to(tl.uint32) + 126) << 7
    elif SCALE == "e4m3":
        bits = (e4m3(scale) * (TIMES_126 * E4M3_SHRUNK)).to(tl.uint32, bitcast=True)
        half = bits >> 16
    else:
        half = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
    return half | (half << 16)


@triton.jit
def _nibbles(codes, FORMAT: tl.constexpr):
    if FORMAT == "e2m1":
        low = _e2m1(codes & 15)
        high = _e2m1(codes >> 4)
    else:
        tl.static_assert(FORMAT == "int4", "a packed format that nobody decodes")
        low = _int4(codes & 15)
        high = _int4(codes >> 4)
    return low, high


@triton.jit
def _packed(codes, words, FORMAT: tl.constexpr):
    """The same in a few instructions for four bytes: weights arrive as fast as this lets them."""
    ASM: tl.constexpr = E2M1_ASM if FORMAT == "e2m1" else INT4_ASM
    spread = spread_groups(words, codes)
    return tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [codes, spread],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def decode_scale(stored, SCALE: tl.constexpr):
    """The scales of groups as float32."""
    if SCALE == "e8m0" or SCALE == "e8m0_small":
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
def _e2m1(nibbles):
    bits = ((nibbles & 7).to(tl.uint32) << 22) | ((nibbles & 8).to(tl.uint32) << 28)
    return bits.to(tl.float32, bitcast=True) * TIMES_126


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


@triton.jit
def spread_groups(scale, like):
    """scale [N, K / G] as [N, K], every one for G neighbours; K is that of like."""
    N: tl.constexpr = like.shape[0]
    K: tl.constexpr = like.shape[1]
    GROUPS: tl.constexpr = scale.shape[1]
    grouped = tl.broadcast_to(scale[:, :, None], (N, GROUPS, K // GROUPS))
    return tl.reshape(grouped, (N, K))
