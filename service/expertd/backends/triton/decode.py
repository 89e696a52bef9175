"""Stored weights → numbers, in registers: what dequant.py says, in Triton."""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from expertd.backends.triton.dot import INTERPRETED, e4m3, rounded

# $4: two words of four nibbles each, neighbours along K; $5: their scale in both halves of a
# register ($6 is a copy); $0 to $3: the scaled values of their first, second, … nibbles.
_CONSTANTS = """
        .reg .b32 t, a, z, o, m;
        mov.b32 z, 0x80008000;
        mov.b32 o, 0x3F803F80;
        mov.b32 m, 0xC308C308;
        mov.b32 t, $4;
"""
# A nibble's sign belongs to bit 15, its magnitude to bits 6 to 8, where it is that of a bfloat16
# 2 ** 126 times smaller: one multiplication moves both. The scale makes up for that (TIMES_126).
_E2M1_NIBBLE = """
        and.b32 a, t, {here};
        mul.lo.u32 a, a, {moved};
        and.b32 a, a, 0x81C081C0;
        fma.rn.bf16x2 ${low}, a, $5, z;
"""
# A nibble with its sign bit flipped, put into the mantissa of 128, makes 136 plus its value.
_INT4_NIBBLE = """
        lop3.b32 a, t, 0x000F000F, 0x43084308, 0x6A;
        fma.rn.bf16x2 a, a, o, m;
        fma.rn.bf16x2 ${low}, a, $5, z;
"""
TIMES_126 = tl.constexpr(2.0**126)
E4M3_SHRUNK = tl.constexpr(2.0**-9)
"""What scales of e4m3 are multiplied with, so that 2 ** 126 times 448 is finite; the scale after
the loop has its inverse (weights.py)."""


def _asm(*steps: str) -> str:
    return "{" + _CONSTANTS + "".join(steps) + "}"


def _e2m1_asm() -> str:
    """The nibbles of the low bytes, then those of the high ones."""
    steps = []
    for low in (0, 2):
        steps += [
            _E2M1_NIBBLE.format(here="0x000F000F", moved="0x1040", low=low),
            _E2M1_NIBBLE.format(here="0x00F000F0", moved="0x0104", low=low + 1),
            "shr.u32 t, t, 8;",
        ]
    return _asm(*steps[:-1])


def _int4_asm() -> str:
    steps = [_INT4_NIBBLE.format(low=low) for low in range(4)]
    return _asm("shr.u32 t, t, 4;".join(steps))


E2M1_ASM = tl.constexpr(_e2m1_asm())
INT4_ASM = tl.constexpr(_int4_asm())


@triton.jit
def decode(codes, FORMAT: tl.constexpr):
    """Codes that hold one value each, as float32 (plain and multiplied as fp8: as they are)."""
    if FORMAT == "e4m3":
        codes = e4m3(codes)
    return codes


@triton.jit
def decode_words(words, scale, FORMAT: tl.constexpr, SCALE: tl.constexpr, COMPUTE: tl.constexpr):
    """Words [N, K] of four nibbles, and stored scales [N, K / G]: the scaled values of the first
    (lowest) nibbles, of the second, of the third and of the last ones, in COMPUTE."""
    if INTERPRETED or SCALE == "e8m0":
        scale = decode_scale(scale, SCALE)
        if SCALE == "e4m3":
            scale *= E4M3_SHRUNK
        first = rounded(times_groups(_nibbles(words, FORMAT), scale), COMPUTE)
        second = rounded(times_groups(_nibbles(words >> 4, FORMAT), scale), COMPUTE)
        third = rounded(times_groups(_nibbles(words >> 8, FORMAT), scale), COMPUTE)
        fourth = rounded(times_groups(_nibbles(words >> 12, FORMAT), scale), COMPUTE)
    else:
        first, second, third, fourth = _packed(words, _twice(scale, SCALE), FORMAT)
    return first, second, third, fourth


@triton.jit
def in_turn(nibbles):
    """Four [N, K] as one [N, 4 K], a quarter of every 32 columns from each: a thread that has read
    two words at once has what wgmma wants of it, and moves nothing."""
    N: tl.constexpr = nibbles[0].shape[0]
    K: tl.constexpr = nibbles[0].shape[1]
    joined = tl.join(tl.join(nibbles[0], nibbles[1]), tl.join(nibbles[2], nibbles[3]))
    turned = tl.permute(tl.reshape(joined, (N, K // 8, 8, 2, 2)), (0, 1, 4, 3, 2))
    return tl.reshape(turned, (N, 4 * K))


@triton.jit
def _twice(scale, SCALE: tl.constexpr):
    """Stored scales as bfloat16 in both halves of a word; those of e2m1 2 ** 126 times larger."""
    if SCALE == "e8m0_small":
        words = scale.to(tl.uint32) * 0x00800080 + 0x3F003F00
    elif SCALE == "e4m3":
        bits = (e4m3(scale) * (TIMES_126 * E4M3_SHRUNK)).to(tl.uint32, bitcast=True)
        words = (bits >> 16) * 0x00010001
    else:
        words = scale.to(tl.uint16, bitcast=True).to(tl.uint32) * 0x00010001
    return words


@triton.jit
def _nibbles(words, FORMAT: tl.constexpr):
    """The lowest nibbles as float32."""
    nibbles = words & 15
    if FORMAT == "e2m1":
        values = _e2m1(nibbles)
    else:
        tl.static_assert(FORMAT == "int4", "a packed format that nobody decodes")
        values = _int4(nibbles)
    return values


@triton.jit
def _packed(words, scale, FORMAT: tl.constexpr):
    """The same in a few instructions for eight values: weights arrive as fast as this lets them."""
    ASM: tl.constexpr = E2M1_ASM if FORMAT == "e2m1" else INT4_ASM
    return tl.inline_asm_elementwise(
        ASM,
        "=&r,=&r,=&r,=&r,r,r,r",
        [words, spread_groups(scale, words)],
        dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=2,
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
