"""What a call needs compiled is what the warm-up of its neighbouring buckets has compiled: told
from the constants alone (tests/gpu/test_warm.py watches the compiler on a card)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from tests.compiled import CARDS, CELLS, backend_of

from expertd.backends.triton import align as sorting
from expertd.backends.triton import combine as adding
from expertd.backends.triton.backend import Triton
from expertd.capability.row import Row
from expertd.core import QuantScheme
from expertd.core.buckets import token_buckets

CPU = torch.device("cpu")
LARGEST = 2048
SIZES = [*range(1, 130), *range(130, LARGEST, 37), LARGEST]
KERNELS = ("_align", "_count", "_place_and_cut")


class Recorder:
    """A kernel that is not launched: its name and its constants are noted."""

    def __init__(self, name: str, noted: set[tuple[object, ...]]) -> None:
        self.name, self.noted = name, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Recorder:
        return self

    def __call__(self, *numbers: object, **constants: object) -> None:
        self.noted.add((self.name, *sorted(constants.items())))


def compiled(backend: Triton, tokens: int, top_k: int) -> set[tuple[object, ...]]:
    """The constants of the sort and of both GEMMs at a size; `together` is none of them."""
    cut = backend._cut(tokens, top_k)
    noted: set[tuple[object, ...]] = {
        ("first", cut.sorted, cut.in_loop, replace(cut.first, together=1)),
        ("second", cut.sorted, cut.in_loop, replace(cut.second, together=1)),
    }
    kernels: dict[str, Any] = {name: Recorder(name, noted) for name in KERNELS}
    if cut.sorted:
        held, pairs = backend.spec.held, tokens * top_k
        scratch = torch.empty(
            sum(sorting.scratch_ints(pairs, held, cut.heights)), dtype=torch.int32
        )
        with patch.multiple(sorting, **kernels):
            sorting.align(torch.zeros(tokens, top_k), 0, held, cut.heights, scratch)
    return noted


@pytest.mark.parametrize(("row", "quant"), CELLS, ids=lambda one: str(one)[:12])
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_no_size_needs_what_no_bucket_did(
    row: Row, quant: QuantScheme, arch: str, top_k: int
) -> None:
    backend = backend_of(row, quant, True, CPU)
    backend._card = CARDS[arch]
    backend._work = backend._work_here()
    warm = set().union(*(compiled(backend, size, top_k) for size in token_buckets(LARGEST)))
    for tokens in SIZES:
        assert compiled(backend, tokens, top_k) <= warm, tokens


def test_whatever_k_is_few_kernels_add_up_its_parts() -> None:
    """Any caller chooses K: each kernel more is compiled while all calls wait."""
    noted: set[tuple[object, ...]] = set()
    recorder: Any = Recorder("_combine", noted)
    with patch.object(adding, "_combine", recorder):
        for top_k in range(1, 257):
            ids = torch.zeros(1, top_k, dtype=torch.int32)
            adding.combine(torch.zeros(top_k, 8), ids, torch.zeros(1, 8), 0, 256)
    assert len(noted) == 9
