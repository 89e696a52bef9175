"""Compiles what our Triton kernels of a bench need, by processes side by side.

One by one, at their first calls, they may take longer than all that is timed. A layer of a few
experts, cut as the whole one, needs the same GEMMs.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from tests.bench.kernels.plans import usable_rows
from tests.bench.kernels.shapes import SHAPES, Shape
from tests.bench.kernels.weights import random_batches, random_weights

from expertd.backends.triton.backend import Triton
from expertd.capability.device import detect
from expertd.capability.row import Row

OWN = "triton"
FEW = 32
"""Experts of the small layer, and rows of its calls: more than the largest top-k."""

Work = tuple[str, int, int]
"""A shape's name, which of its rows, and how many tokens."""


def compile_ahead(shapes: Sequence[Shape], tokens: Sequence[int], backends: Sequence[str]) -> int:
    """How many calls' kernels now lie in Triton's cache."""
    if backends and OWN not in backends:
        return 0
    work = [
        (shape.name, which, count)
        for shape in shapes
        for which, count in product(range(len(_rows(shape))), tokens)
    ]
    if work:
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, len(work))) as pool:
            pool.map(_compile, work, chunksize=1)
    return len(work)


def _rows(shape: Shape) -> list[Row]:
    return usable_rows(shape, detect("cuda:0"), [OWN])


def _compile(work: Work) -> None:
    try:
        _run(*work)
    except Exception as error:  # the cell itself will tell it in the table
        print(f"not compiled ahead: {work}: {error}"[:200], flush=True)


def _run(name: str, which: int, tokens: int) -> None:
    """A call of the small layer, as the whole one would cut one of that size."""
    shape, device = next(s for s in SHAPES if s.name == name), torch.device("cuda:0")
    few = replace(shape, spec=replace(shape.spec, num_experts=FEW, expert_end=FEW))
    small = Triton(_rows(shape)[which], few.spec, device)
    small.check()
    with torch.inference_mode():
        small.prepare_weights(random_weights(few.spec, device), None)
        small._work = replace(small._work, held=shape.spec.held)
        batch = random_batches(few, min(tokens, FEW), 1, device)[0]
        small.run(batch, small._cut(tokens, shape.top_k))
        torch.cuda.synchronize()
