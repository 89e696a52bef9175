"""Chance decides which rows of an expert are in its short block: they must come out the same there.

So both heights are multiplied by one kind of instruction; two kinds may round otherwise. Told by
what Triton compiles for the card that a tile was measured on, which need not be here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.compiled import CELLS, backend_of, compiled, compiling_for

from expertd.backends.triton.tiles import Measured, table
from expertd.capability.row import Row
from expertd.core import QuantScheme

KINDS = ("wgmma.mma_async", "mma.sync", "tcgen05.mma")
SHORT = [one for one in table() if one.cut.first.short or one.cut.second.short]
NAMES = [f"{one.work.weights}-{one.work.hidden}-{one.pairs}" for one in SHORT]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("one", SHORT, ids=NAMES)
def test_both_heights_are_multiplied_alike(one: Measured) -> None:
    assert [len(kinds) for kinds in instructions(one)] == [1, 1]


def test_what_was_measured_with_two_kinds_is_told() -> None:
    """16 and 8 rows of mxfp4, by four warps."""
    (one,) = [one for one in SHORT if (one.work.weights, one.pairs) == ("mxfp4", 1024)]
    second = replace(one.cut.second, short=8)
    found = instructions(replace(one, cut=replace(one.cut, second=second)))
    assert [len(kinds) for kinds in found] == [1, 2]


def instructions(one: Measured) -> list[set[str]]:
    """Those that multiply, of each GEMM."""
    row, quant = cell_of(one)
    backend = backend_of(row, quant, one.work.gated, torch.device("cpu"))
    with compiling_for(one.work.arch):
        kernels = compiled(backend, one.cut)
    return [{kind for kind in KINDS if kind in kernel.asm["ptx"]} for kernel in kernels]


def cell_of(one: Measured) -> tuple[Row, QuantScheme]:
    named = (one.work.weights, one.work.rows)
    return next(cell for cell in CELLS if (cell[1], cell[0].activation_quant) == named)
