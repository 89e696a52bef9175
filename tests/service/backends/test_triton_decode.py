"""The instructions that decode two words of four nibbles at once, executed one by one on the CPU:
Triton's interpreter decodes in another way. And which two words they get, on cards that are not
here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from tests.compiled import CARDS, CELLS, backend_of, compiled, compiling_for
from tests.strategies import generator, layer_spec, random_weights
from torch import Tensor

from expertd.backends.triton.decode import E2M1_ASM, INT4_ASM
from expertd.backends.triton.shared import Card, fitted
from expertd.backends.triton.tiles import by_rule, table
from expertd.backends.triton.weights import native
from expertd.core import QuantScheme

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


CPU = torch.device("cpu")
PAIRS = (1, 64, 200, 100_000)


@pytest.mark.parametrize("arch", ["sm80", "sm100"])
def test_two_words_in_a_register_are_neighbours_of_a_row(arch: str) -> None:
    check_neighbours(QuantScheme.MXFP4, CARDS[arch])


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("quant", [QuantScheme.MXFP4, QuantScheme.NVFP4, QuantScheme.MXINT4])
@pytest.mark.parametrize("arch", CARDS)
def test_they_are_on_every_card(arch: str, quant: QuantScheme) -> None:
    check_neighbours(quant, CARDS[arch])


def check_neighbours(quant: QuantScheme, card: Card) -> None:
    """They share a scale: that of the first is taken."""
    backend = backend_of(next(row for row, found in CELLS if found == quant), quant, True, CPU)
    first, second = backend._native.first, backend._native.second
    cuts = {by_rule(pairs, 6, first, second, pairs) for pairs in PAIRS}
    cuts |= {m.cut for m in table() if (m.work.arch, m.work.weights) == (card.arch, quant)}
    with compiling_for(card.arch):
        for cut in cuts:
            for kernel in compiled(backend, fitted(cut, first, second, True, card)):
                found = [*layouts(kernel.asm["ttgir"])]
                assert found and all(along_k(layout) for layout in found), (cut, found)


def layouts(text: str) -> Iterator[str]:
    """How the words lie in threads and their registers."""
    named = dict(re.findall(r"^(#\w+) = (#ttg.*)$", text, re.MULTILINE))
    for line in text.splitlines():
        if "elementwise_inline_asm" in line:
            layout = line.split("-> tensor<")[1].split(", ", 1)[1]
            name = re.match(r"#\w+(?=>)", layout)
            yield named[name[0]] if name else layout


def along_k(layout: str) -> bool:
    """Whether a thread's first two elements are neighbours in a row."""
    patterns = (
        r"sizePerThread = \[\d+, ([2-9]|\d\d)\].*order = \[1, 0\]",
        r"dot_op<.*kWidth = [2-8]",
        r"register = \[\[0, 1\]",
    )
    return any(re.search(pattern, layout) for pattern in patterns)


def test_words_begin_where_two_can_be_read_at_once() -> None:
    """Else Triton would read them one by one, and put two of different rows into a register."""
    weights = random_weights(layer_spec(quant=QuantScheme.MXFP4), generator(0))
    memory = torch.empty(weights.w13.numel() + 8, dtype=torch.uint8)
    moved = memory[8:].view(weights.w13.shape).copy_(weights.w13)
    with pytest.raises(AssertionError, match="begin"):
        native(replace(weights, w13=moved), "bf16")
