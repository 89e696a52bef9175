"""What a load warms up is all that a call needs: no kernel is compiled after it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
from tests.gpu.test_graphs import CELLS, DEVICE, NAMES, layer
from tests.strategies import generator, random_weights

from expertd.backends.build import build
from expertd.capability.row import Row
from expertd.core import QuantScheme
from expertd.core.buckets import token_buckets
from expertd.engine.forms import DTYPES, warm_up_forms
from expertd.proof.batches import random_batch

LARGEST = 1024
SIZES = (1, 2, 3, 7, 16, 33, 64, 100, 257, 300, 1000, 1024)


@contextmanager
def compiled() -> Iterator[list[str]]:
    """The kernels that Triton compiles, or loads from its cache on disk, meanwhile."""
    names: list[str] = []

    def note(*, fn: Any, **_: Any) -> None:
        names.append(fn.name)

    before = triton.knobs.runtime.jit_post_compile_hook
    triton.knobs.runtime.jit_post_compile_hook = note
    try:
        yield names
    finally:
        triton.knobs.runtime.jit_post_compile_hook = before


@pytest.mark.parametrize(("row", "quant"), CELLS, ids=NAMES)
def test_no_call_compiles(row: Row, quant: QuantScheme) -> None:
    spec = layer(row, quant)
    weights = random_weights(spec, generator(0))
    moved = {name: tensor.to(DEVICE) for name, tensor in weights.tensors.items()}
    with compiled() as names:
        given = (row, spec, replace(weights, **moved), None, DEVICE)
        backend = build(*given, token_buckets(LARGEST))
        warm_up_forms([backend], DEVICE, token_buckets(LARGEST))
    print(len(names), "kernels compiled while loading")
    with compiled() as names:
        for tokens in SIZES:
            batch = random_batch(spec, tokens, DEVICE)
            for rows in DTYPES:
                for out in DTYPES:
                    form = replace(batch, rows=batch.rows.to(rows), out=batch.out.to(out))
                    backend.forward(form)
    torch.cuda.synchronize()
    assert not names
