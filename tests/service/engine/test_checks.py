"""Values of ids, weights and logits: each fault is found, by row, and harms no other row."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.strategies import layer_spec, wire

from expertd.core import LayerSpec
from expertd.engine import checks
from expertd.engine.checks import (
    BAD_LOGITS,
    BAD_WEIGHT,
    DUPLICATE,
    NOT_HELD,
    OK,
    OUT_OF_RANGE,
    check_logits,
    check_topk,
    fault_error,
    nonfinite_rows,
)
from expertd.engine.checks_cpu import HostChecks
from expertd.engine.plain_checks import FEW_IDS, plainly_good
from expertd.errors import ExpertsNotHeld, InvalidArgument

SPEC = layer_spec()
PART = layer_spec(expert_begin=2, expert_end=4)
NAN, INF = math.nan, math.inf


def by_the_contract(
    ids: list[int], weights: list[float], spec: LayerSpec, partial: bool
) -> set[int]:
    """Every fault of one row, as interfaces.md words them, in plain Python."""
    named = [(i, w) for i, w in zip(ids, weights, strict=True) if i != -1]
    faults = set()
    if any(not 0 <= i < spec.num_experts for i, _ in named):
        faults.add(OUT_OF_RANGE)
    if len({i for i, _ in named}) < len(named):
        faults.add(DUPLICATE)
    if any(not math.isfinite(w) for _, w in named):
        faults.add(BAD_WEIGHT)
    held = range(spec.expert_begin, spec.expert_end)
    if not partial and any(i not in held for i, _ in named if 0 <= i < spec.num_experts):
        faults.add(NOT_HELD)
    return faults or {OK}


IDS = st.sampled_from([-(2**31), -2, -1, -1, 0, 1, 2, 3, 4, 5, 6, 2**31 - 1])
VALUES = st.sampled_from([0.0, 1.0, -2.0, 6e4, -6e4, NAN, INF, -INF])
WEIGHTS = st.sampled_from([0.0, -1.5, 0.25, 1e38, NAN, INF, -INF])


@given(
    st.lists(st.lists(st.tuples(IDS, WEIGHTS), min_size=3, max_size=3), min_size=1, max_size=6),
    st.sampled_from([SPEC, PART]),
    st.booleans(),
    st.sampled_from([torch.int32, torch.int64]),
)
def test_each_row_gets_a_fault_it_has_and_faulty_rows_become_harmless(
    rows: list[list[tuple[int, float]]], spec: LayerSpec, partial: bool, dtype: torch.dtype
) -> None:
    ids = torch.tensor([[i for i, _ in row] for row in rows], dtype=dtype)
    weights = torch.tensor([[w for _, w in row] for row in rows])
    before = ids.clone(), weights.clone()
    harmless, codes = check_topk(ids, weights, spec, partial)
    assert harmless.dtype == torch.int32
    for row, given_ids, code in zip(rows, harmless.tolist(), codes.tolist(), strict=True):
        own = [i for i, _ in row]
        assert code in by_the_contract(own, [w for _, w in row], spec, partial)
        assert given_ids == (own if code == OK else [-1] * 3)
    told = HostChecks()
    assert torch.equal(told.topk(ids, weights, spec, partial), harmless)
    assert list(told.codes() or []) == codes.tolist()
    if plainly_good([wire(ids)], [wire(weights)], spec, partial):
        assert not codes.any()
    else:
        assert codes.any() or (ids == -1).any()
    assert torch.equal(ids, before[0]) and torch.equal(weights.nan_to_num(), before[1].nan_to_num())


@pytest.mark.parametrize("far", [2**31, -(2**31) - 1, 2**32 + 1, 2**63 - 1, -(2**63), 2**32 - 1])
def test_wide_ids_do_not_wrap_into_range(far: int) -> None:
    ids = torch.tensor([[far, 0]])
    _, codes = check_topk(ids, torch.ones(1, 2), SPEC, partial=True)
    assert codes.tolist() == [OUT_OF_RANGE]


@pytest.mark.parametrize("sizes", [(1,), (FEW_IDS // 4,), (3, FEW_IDS // 4 - 3), (5, 60)])
def test_only_few_ids_are_plain(sizes: tuple[int, ...]) -> None:
    ids = [torch.tensor([[5, 0, 3, 1]] * rows, dtype=torch.int64) for rows in sizes]
    weights = [torch.full((rows, 4), 3e38) for rows in sizes]
    few = 4 * sum(sizes) <= FEW_IDS

    def good() -> bool:
        return plainly_good([*map(wire, ids)], [*map(wire, weights)], SPEC, partial=False)

    assert good() == few
    weights[-1][-1, 2] = NAN
    assert not good(), "a fault in the last row of the last call"
    weights[-1][-1, 2] = 1.0
    ids[-1][-1, 1] = 2**32
    assert not good()


@pytest.mark.parametrize(
    ("ids", "partial", "good"),
    [
        ([0, 5], False, True),
        ([0, 6], False, False),
        ([0, -1], False, False),
        ([2, 3], False, True),
        ([1, 3], False, False),
        ([2, 4], False, False),
        ([0, 5], True, True),
        ([2, 6], True, False),
        ([2, 2], True, False),
    ],
)
def test_who_may_be_named(ids: list[int], partial: bool, good: bool) -> None:
    spec = PART if partial or set(ids) <= {1, 2, 3, 4} else SPEC
    named = [wire(torch.tensor([ids]))], [wire(torch.ones(1, 2))]
    assert plainly_good(*named, spec, partial) == good


def test_weights_that_python_cannot_read_are_not_plain() -> None:
    ids, weights = torch.tensor([[5, 0]]), torch.ones(1, 2)
    assert plainly_good([wire(ids)], [wire(weights)], SPEC, partial=False)
    assert not plainly_good([wire(ids)], [wire(weights.bfloat16())], SPEC, partial=False)


def test_a_batch_that_routes_nothing_has_no_codes_of_the_one_before() -> None:
    told = HostChecks()
    told.topk(torch.tensor([[99]]), torch.ones(1, 1), SPEC, partial=False)
    told.output(torch.tensor([[NAN]]))
    assert list(told.codes() or []) == [OUT_OF_RANGE] and told.nonfinite() == 1
    told.begin()
    assert told.codes() is None and told.nonfinite() == 0


@pytest.mark.parametrize("device", checks.CHECKS)
def test_every_device_has_its_checks(device: str) -> None:
    pytest.importorskip("triton")
    module, _, name = checks.CHECKS[device].partition(":")
    assert isinstance(checks.checks_on(device), getattr(importlib.import_module(module), name))


class Seen(HostChecks):
    """Checks that remember what dtypes they met."""

    def __init__(self) -> None:
        super().__init__()
        self.topks: list[tuple[torch.dtype, bool]] = []
        self.others: list[tuple[str, torch.dtype, int]] = []

    def topk(self, ids, weights, spec, partial):  # type: ignore[no-untyped-def]
        self.topks.append((ids.dtype, partial))

    def logits(self, logits, top_k):  # type: ignore[no-untyped-def]
        self.others.append(("logits", logits.dtype, logits.shape[1]))

    def output(self, out):  # type: ignore[no-untyped-def]
        self.others.append(("output", out.dtype, out.shape[1]))


def test_warm_up_checks_every_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen()
    monkeypatch.setattr(checks, "checks_on", lambda device_type: seen)
    nobody = layer_spec(num_experts=0, expert_begin=0, expert_end=0, routing=None, hidden=9)
    checks.warm_up_checks(nobody, torch.device("cpu"))
    dtypes = {torch.float32, torch.bfloat16, torch.float16}
    assert set(seen.others) == {("output", d, 9) for d in dtypes} and not seen.topks
    checks.warm_up_checks(SPEC, torch.device("cpu"))
    assert seen.topks == [(d, p) for d in (torch.int32, torch.int64) for p in (False, True)]
    widths = {"logits": SPEC.num_experts, "output": SPEC.hidden}
    assert set(seen.others) >= {(name, d, width) for name, width in widths.items() for d in dtypes}


LOGITS: dict[str, tuple[list[float], int]] = {
    "finite": ([0.0, 1.0, -1e30, 3.0], OK),
    "a mask": ([0.0, -INF, 1.0, -INF], OK),
    "too few left": ([0.0, -INF, -INF, -INF], BAD_LOGITS),
    "none left": ([-INF] * 4, BAD_LOGITS),
    "NaN": ([0.0, 1.0, 2.0, NAN], BAD_LOGITS),
    "+inf": ([0.0, 1.0, INF, 2.0], BAD_LOGITS),
    "negative NaN": ([0.0, 1.0, -NAN, 2.0], BAD_LOGITS),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([row for row, _ in LOGITS.values()]).clamp(min=-6e4).to(dtype)
    masks = torch.tensor([row for row, _ in LOGITS.values()]) == -INF
    logits = logits.masked_fill(masks, -INF)
    before = logits.clone()
    harmless, codes = check_logits(logits, 2)
    assert dict(zip(LOGITS, codes.tolist(), strict=True)) == {n: c for n, (_, c) in LOGITS.items()}
    for row, code, given_row in zip(harmless, codes.tolist(), before, strict=True):
        assert torch.equal(row, given_row if code == OK else torch.zeros_like(row))
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        (BAD_LOGITS, InvalidArgument, "router_logits: row 7 has NaN or .inf, or fewer than 2"),
        (OUT_OF_RANGE, InvalidArgument, r"topk_ids: row 7 has an id outside 0\.\.5"),
        (DUPLICATE, InvalidArgument, "topk_ids: row 7 names an expert twice"),
        (BAD_WEIGHT, InvalidArgument, "topk_weights: row 7 has a weight that is not finite"),
        (NOT_HELD, ExpertsNotHeld, "row 7 needs experts outside 2-3.*set partial"),
    ],
)
def test_words(code: int, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        raise fault_error(code, 7, PART)


@given(
    st.lists(
        st.lists(VALUES, min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_that_are_not_finite_are_counted_exactly(
    rows: list[list[float]], dtype: torch.dtype
) -> None:
    """6e4 + 6e4 overflows float16: a sum that is infinite without any number that is."""
    by_hand = sum(any(not math.isfinite(value) for value in row) for row in rows)
    assert nonfinite_rows(torch.tensor(rows).to(dtype)) == by_hand
