"""The checks of a batch's rows as kernels, beside torch's operations: in the interpreter
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
from expertd.engine.checks_cuda import WIDE, CardChecks

__all__ = [
    "test_a_long_row",
    "test_one_batch_after_the_other",
    "test_results",
    "test_rows_of_logits",
    "test_rows_with_every_fault",
    "test_wide_ids",
]

DEVICE = torch.device("cpu" if INTERPRETED.value else "cuda:0")
EXPERTS = 48
SPECS = [
    layer_spec(num_experts=EXPERTS, expert_begin=begin, expert_end=end)
    for begin, end in ((0, EXPERTS), (8, 24))
]


def compare(ids: Tensor, weights: Tensor, spec: LayerSpec, partial: bool) -> list[int]:
    """The codes, which have to be torch's, as the harmless ids have to be."""
    given = ids.to(DEVICE), weights.to(DEVICE)
    told = CardChecks()
    harmless = told.topk(*given, spec, partial)
    codes = found_by(told)
    wanted_ids, wanted = checks.check_topk(ids, weights, spec, partial)
    assert codes == wanted.tolist()
    assert harmless.dtype == torch.int32 and torch.equal(harmless.cpu(), wanted_ids)
    assert torch.equal(given[0].cpu(), ids), "what the caller sent is as it was"
    return codes


def found_by(told: CardChecks) -> list[int]:
    """The codes, once the card has written them."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return list(told.codes() or [])


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
    found = set(compare(ids.to(dtype), weights, spec, partial))
    assert checks.OUT_OF_RANGE in found, "the rows have been drawn to be bad"


def test_a_long_row(seed: int) -> None:
    """Twins that stand far from each other, and the same ids without them."""
    ids = torch.arange(EXPERTS).roll(5)[None]
    weights = torch.randn(1, EXPERTS, generator=generator(seed))
    assert compare(ids, weights, SPECS[0], partial=False) == [checks.OK]
    ids[0, -1] = ids[0, 0]
    assert compare(ids, weights, SPECS[0], partial=False) == [checks.DUPLICATE]


@pytest.mark.parametrize("far", [2**31, -(2**31) - 1, 2**32 + 1, 2**63 - 1, -(2**63), 2**32 - 1])
def test_wide_ids(far: int) -> None:
    codes = compare(torch.tensor([[far, 0]]), torch.ones(1, 2), SPECS[0], partial=True)
    assert codes == [checks.OUT_OF_RANGE]


FLOATS = [torch.float32, torch.bfloat16, torch.float16]
STRANGE = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 6e4, 0.0])


def strange_rows(rows: int, columns: int, dtype: torch.dtype, seed: int, share: float) -> Tensor:
    """Numbers of which so large a share is strange."""
    random = generator(seed)
    values = torch.randn(rows, columns, generator=random)
    strange = STRANGE[torch.randint(len(STRANGE), values.shape, generator=random)]
    return torch.where(torch.rand(values.shape, generator=random) < share, strange, values).to(
        dtype
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("experts", [4, EXPERTS, 257])
@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_rows_of_logits(dtype: torch.dtype, experts: int, masked: float, seed: int) -> None:
    logits = strange_rows(24, experts, dtype, seed, 0.5 / experts)
    mask = torch.rand(logits.shape, generator=generator(seed + 1)) < masked
    logits = logits.masked_fill(mask, -math.inf)
    logits[0], logits[1] = 1.0, -math.inf
    logits[2], logits[3, :] = math.nan, -math.inf
    logits[3, :2] = 0.5
    given, told = logits.to(DEVICE), CardChecks()
    harmless = told.logits(given, 2)
    wanted, codes = checks.check_logits(logits, 2)
    assert found_by(told) == codes.tolist() and {*codes.tolist()} == {checks.OK, checks.BAD_LOGITS}
    assert harmless.dtype == dtype and torch.equal(harmless.cpu(), wanted)
    assert torch.equal(given.cpu().nan_to_num(), logits.nan_to_num()), "the caller's are as sent"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("hidden", [1, 97, WIDE, WIDE + 1])
def test_results(dtype: torch.dtype, hidden: int, seed: int) -> None:
    out, told = strange_rows(30, hidden, dtype, seed, 0.5 / hidden), CardChecks()
    out[0], out[1, -1] = 1.0, math.nan
    told.output(out.to(DEVICE))
    assert found_by(told) == [] and told.codes() is None
    assert told.nonfinite() == checks.nonfinite_rows(out) > 0


def test_one_batch_after_the_other(seed: int) -> None:
    """Sizes that grow and shrink; nothing of a batch is told of the next."""
    told = CardChecks()
    for rows in (1200, 3, 2100, 1):
        told.begin()
        ids, weights = drawn(rows, 3, seed + rows)
        told.topk(ids.to(DEVICE), weights.to(DEVICE), SPECS[0], partial=False)
        out = strange_rows(rows, 5, torch.float32, seed + rows, 0.1)
        told.output(out.to(DEVICE))
        wanted = checks.check_topk(ids, weights, SPECS[0], partial=False)[1].tolist()
        assert found_by(told) == wanted and told.nonfinite() == checks.nonfinite_rows(out)
    told.begin()
    assert told.codes() is None and told.nonfinite() == 0
