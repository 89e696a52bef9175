"""The check of ids and weights as a kernel, beside torch's operations: in the interpreter
(test_checks.py) as on a card (tests/gpu/test_checks.py)."""

from __future__ import annotations

import math

import pytest
import torch
from tests.strategies import generator, layer_spec
from torch import Tensor

from expertd.backends.triton.dot import INTERPRETED
from expertd.core import LayerSpec
from expertd.engine import checks
from expertd.engine.checks_cuda import check_topk

__all__ = ["test_rows_with_every_fault", "test_a_long_row", "test_wide_ids"]

DEVICE = torch.device("cpu" if INTERPRETED.value else "cuda:0")
EXPERTS = 48
SPECS = [
    layer_spec(num_experts=EXPERTS, expert_begin=begin, expert_end=end)
    for begin, end in ((0, EXPERTS), (8, 24))
]


def compare(ids: Tensor, weights: Tensor, spec: LayerSpec, partial: bool) -> Tensor:
    """The codes, which have to be torch's, as the harmless ids have to be."""
    given = ids.to(DEVICE), weights.to(DEVICE)
    harmless, codes = check_topk(*given, spec, partial)
    wanted_ids, wanted = checks.check_topk(ids, weights, spec, partial)
    assert codes.tolist() == wanted.tolist()
    assert harmless.dtype == torch.int32 and torch.equal(harmless.cpu(), wanted_ids)
    assert torch.equal(given[0].cpu(), ids), "what the caller sent is as it was"
    return codes


def drawn(rows: int, top_k: int, seed: int) -> tuple[Tensor, Tensor]:
    """Distinct ids, of which each row may get one of every fault, -1 among them."""
    random = generator(seed)
    ids = torch.rand(rows, EXPERTS, generator=random).argsort(dim=1)[:, :top_k]
    weights = torch.randn(rows, top_k, generator=random)
    place = torch.randint(top_k, (rows, 1), generator=random)
    strange = torch.tensor([-1, -1, -2, EXPERTS, -(2**31), 2**31 - 1, 0, 7, 47])
    chosen = strange[torch.randint(len(strange), (rows, 1), generator=random)]
    ids = torch.where(
        torch.rand(rows, 1, generator=random) < 0.5, ids.scatter(1, place, chosen), ids
    )
    other = torch.randint(top_k, (rows, 1), generator=random)
    bad = torch.tensor([math.nan, math.inf, -math.inf, 3e38])
    chosen_bad = bad[torch.randint(len(bad), (rows, 1), generator=random)]
    hit = torch.rand(rows, 1, generator=random) < 0.4
    return ids, torch.where(hit, weights.scatter(1, other, chosen_bad), weights)


@pytest.mark.parametrize("spec", SPECS, ids=["all", "a range"])
@pytest.mark.parametrize("partial", [False, True])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("top_k", [1, 3, 8, 33, EXPERTS])
def test_rows_with_every_fault(
    spec: LayerSpec, partial: bool, dtype: torch.dtype, top_k: int, seed: int
) -> None:
    ids, weights = drawn(40, top_k, seed)
    found = set(compare(ids.to(dtype), weights, spec, partial).tolist())
    assert checks.OUT_OF_RANGE in found, "the rows have been drawn to be bad"


def test_a_long_row(seed: int) -> None:
    """Twins that stand far from each other, and the same ids without them."""
    ids = torch.arange(EXPERTS).roll(5)[None]
    weights = torch.randn(1, EXPERTS, generator=generator(seed))
    assert compare(ids, weights, SPECS[0], partial=False).tolist() == [checks.OK]
    ids[0, -1] = ids[0, 0]
    assert compare(ids, weights, SPECS[0], partial=False).tolist() == [checks.DUPLICATE]


@pytest.mark.parametrize("far", [2**31, -(2**31) - 1, 2**32 + 1, 2**63 - 1, -(2**63), 2**32 - 1])
def test_wide_ids(far: int) -> None:
    codes = compare(torch.tensor([[far, 0]]), torch.ones(1, 2), SPECS[0], partial=True)
    assert codes.tolist() == [checks.OUT_OF_RANGE]
