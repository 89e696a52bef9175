"""The instructions that decode four nibbles at once, executed one by one on the CPU: Triton's
interpreter decodes in another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from expertd.backends.triton.decode import E2M1_ASM, INT4_ASM

TEXTS = {"e2m1": E2M1_ASM.value, "int4": INT4_ASM.value}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = {"e2m1": (*E2M1, *(-one for one in E2M1)), "int4": (*range(8), *range(-8, 0))}
TIMES = {"e2m1": 2.0**126, "int4": 1.0}
SCALES = [
    *(("e2m1", times) for times in (2.0**127, 2.0**126, 1.625 * 2.0**120, 2.0**10)),
    *(("int4", times) for times in (1.0, 0.3, -7.5, 2e-30)),
]
WORDS = torch.arange(1 << 16)


def bits_of(values: Tensor) -> Tensor:
    return values.bfloat16().view(torch.int16).long() & 0xFFFF


def values_of(bits: Tensor) -> Tensor:
    """bfloat16 in the low half → float64, exactly."""
    return (bits << 16).int().view(torch.float32).double()


def fma_bf16x2(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    halves = []
    for shift in (0, 16):
        x, y, z = (values_of(v >> shift & 0xFFFF) for v in (a, b, c))
        halves.append(bits_of((x * y + z).float()))
    return halves[0] | halves[1] << 16


def lop3(a: Tensor, b: Tensor, c: Tensor, table: Tensor) -> Tensor:
    assert int(table) == 0x6A
    return (a & b) ^ c


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b & 0xFFFFFFFF,
    "lop3.b32": lop3,
    "fma.rn.bf16x2": fma_bf16x2,
}


def executed(text: str, words: Tensor, scale: Tensor) -> list[Tensor]:
    """What the four outputs of a program hold at its end."""
    registers = {"$4": words, "$5": scale}
    for line in text.strip("{}").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        operation, operands = line.split(maxsplit=1)
        target, *sources = (one.strip() for one in operands.split(","))
        inputs = (registers[s] if s in registers else torch.tensor(int(s, 0)) for s in sources)
        registers[target] = OPERATIONS[operation](*inputs)
    return [registers[f"${n}"] for n in range(4)]


@pytest.mark.parametrize(("form", "times"), SCALES)
def test_every_word_becomes_four_scaled_values(form: str, times: float) -> None:
    """All words in the lower half, others above; scales as bfloat16, of e2m1 2 ** 126 times."""
    words = WORDS | WORDS.flip(0).roll(12345) << 16
    scale = bits_of(torch.tensor(times))
    found = executed(TEXTS[form], words, scale | scale << 16)
    for shift in (0, 16):
        for nibble, bits in enumerate(found):
            values = torch.tensor(VALUES[form])[words >> shift + 4 * nibble & 15]
            expected = values * (values_of(scale) / TIMES[form])
            assert torch.equal(bits_of(expected.float()), bits >> shift & 0xFFFF)
