"""route against the oracle, and what has to hold for any input."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.processes import assert_runs
from tests.service.routing.oracle import SCORES, groups_tie, keys_of, weights_of, within_groups
from torch import Tensor

from expertd.core import RoutingMethod, RoutingSpec
from expertd.errors import InvalidArgument
from expertd.routing import logits_ok, route, route_for

METHODS = tuple(SCORES)
BIASED = ("DeepSeekV3", "MiniMax2", "DeepSeekV4", "SoftmaxBias")
GROUPED = ("DeepSeekV3", "GroupedSoftmax")
BY_LOGIT = ("Renormalize", "RenormalizeNaive", "TopKSigmoid", "Llama4", "TopK")

seeds = st.integers(0, 2**32 - 1)
methods = st.sampled_from(METHODS)
shifts = st.sampled_from([0.0, -5.0, -50.0, 12.0, 3.0])


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def order(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Weights in the order of ids."""
    return weights_TK.gather(1, ids_TK.argsort(dim=1))


@settings(max_examples=150, deadline=None)
@given(methods, seeds, shifts, st.integers(1, 8), st.booleans(), st.booleans(), st.booleans())
def test_oracle(
    method: str, seed: int, shift: float, top_k: int, with_bias: bool, grouped: bool, renorm: bool
) -> None:
    logits = random(seed, 4, 32) * 3 + shift
    bias = random(seed + 1, 32) * 0.3 if with_bias and method in BIASED else None
    n_group, topk_group = (4, 2) if grouped and method in GROUPED else (1, 1)
    ids, weights = route(
        method,
        logits,
        bias=bias,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scale=2.5,
        renormalize=renorm,
    )
    for row, chosen, given_weights in zip(logits.tolist(), ids.tolist(), weights, strict=True):
        key = keys_of(method, row, None if bias is None else bias.tolist())
        if groups_tie(key, n_group, topk_group):
            continue
        key = within_groups(key, n_group, topk_group)
        picked = torch.tensor([key[i] for i in chosen], dtype=torch.float64)
        ranked = torch.tensor(sorted(key, reverse=True)[:top_k], dtype=torch.float64)
        torch.testing.assert_close(picked, ranked, rtol=2e-6, atol=1e-6 if bias is not None else 0)
        expected = torch.tensor(weights_of(method, row, chosen, 2.5, renorm, None))
        torch.testing.assert_close(given_weights, expected, rtol=1e-5, atol=1e-37)


@settings(max_examples=60, deadline=None)
@given(methods, seeds, st.integers(1, 16))
def test_ties_go_to_the_lower_index(method: str, seed: int, top_k: int) -> None:
    levels = (random(seed, 8, 16) * 1.5).round()
    ids, _ = route(method, levels, top_k=top_k)
    for row, chosen in zip(levels.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(16), key=lambda i: (-row[i], i))[:top_k]


@pytest.mark.parametrize("method", METHODS)
def test_zeros_of_both_signs_tie(method: str) -> None:
    ids, _ = route(method, torch.tensor([[-0.0, 0.0, -0.0, 0.0]]), top_k=3)
    assert ids.tolist() == [[0, 1, 2]]


@settings(max_examples=60, deadline=None)
@given(methods, seeds, shifts)
def test_permuting_experts_permutes_ids(method: str, seed: int, shift: float) -> None:
    logits = random(seed, 8, 24) + shift
    bias = random(seed + 1, 24) if method in BIASED else None
    shuffle = torch.randperm(24, generator=torch.Generator().manual_seed(seed))
    shuffled = None if bias is None else bias[shuffle]
    ids, weights = route(method, logits, bias=bias, top_k=6)
    again, same = route(method, logits[:, shuffle], bias=shuffled, top_k=6)
    back = shuffle[again.long()]
    if method in ("Sigmoid", "SigmoidRenorm") and shift > 10:
        return  # Saturated sigmoids tie, and ties go by index.
    assert torch.equal(back.sort(dim=1).values, ids.long().sort(dim=1).values)
    torch.testing.assert_close(order(back, same), order(ids.long(), weights), rtol=1e-5, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(BY_LOGIT), seeds, st.integers(1, 8))
def test_near_ties_of_float32_are_told_apart(method: str, seed: int, top_k: int) -> None:
    """Logits one step of float32 apart: rounding them to bf16 would choose others."""
    steps = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    logits = (torch.full((32,), -3.0).view(torch.int32) + steps.int()).view(torch.float32)
    ids, _ = route(method, logits.unsqueeze(0), top_k=top_k)
    assert ids[0].tolist() == steps.argsort()[:top_k].tolist()


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(("Renormalize", "RenormalizeNaive", "Default")), seeds)
def test_all_negative_logits(method: str, seed: int) -> None:
    logits = -random(seed, 16, 64).abs() - 20.0
    ids, weights = route(method, logits, top_k=8)
    chosen = logits.gather(1, ids.long())
    torch.testing.assert_close(chosen, logits.topk(8).values, rtol=0, atol=1e-5)
    shifted = route(method, logits + 30.0, top_k=8)[1]
    torch.testing.assert_close(weights, shifted, rtol=1e-4, atol=0)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(("DeepSeekV3", "MiniMax2", "DeepSeekV4")), seeds)
def test_a_large_bias_chooses_and_never_weighs(method: str, seed: int) -> None:
    logits = random(seed, 16, 32)
    bias = torch.zeros(32)
    loved = torch.randperm(32, generator=torch.Generator().manual_seed(seed))[:4]
    bias[loved] = 1000.0
    ids, weights = route(method, logits, bias=bias, top_k=4, scale=2.5)
    assert torch.equal(ids.long().sort(dim=1).values, loved.sort().values.expand(16, 4))
    score = logits.sigmoid() if method != "DeepSeekV4" else torch.log1p(logits.exp()).sqrt()
    chosen = score.gather(1, ids.long())
    expected = 2.5 * chosen / chosen.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@settings(max_examples=60, deadline=None)
@given(methods, seeds, st.integers(0, 26))
def test_masked_experts_are_not_chosen(method: str, seed: int, masked: int) -> None:
    logits = random(seed, 8, 32)
    mask = torch.rand(8, 32, generator=torch.Generator().manual_seed(seed)).argsort(1) < masked
    bias = torch.where(mask[0], 5.0, 0.0) if method in BIASED else None
    logits = logits.masked_fill(mask, -math.inf)
    ids, weights = route(method, logits, bias=bias, top_k=6)
    assert logits_ok(logits, 6).all()
    assert not mask.gather(1, ids.long()).any()
    assert torch.isfinite(weights).all()


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(GROUPED), seeds, st.sampled_from([None, 0.0]))
def test_masks_in_groups_get_no_weight(method: str, seed: int, fill: float | None) -> None:
    logits = random(seed, 8, 32)
    mask = torch.rand(8, 32, generator=torch.Generator().manual_seed(seed)) < 0.75
    logits = logits.masked_fill(mask, -math.inf)
    ids, weights = route(
        method, logits, top_k=6, n_group=4, topk_group=2, group_fill=fill, scale=2.0
    )
    assert (weights[mask.gather(1, ids.long())] == 0).all()
    assert all(len(set(row)) == 6 for row in ids.tolist())
    some = (~mask).any(dim=1)
    assert torch.isfinite(weights[some]).all()


@pytest.mark.parametrize("method", GROUPED)
def test_fillers_from_other_groups_get_no_weight(method: str) -> None:
    """The best group has two experts that are not masked, three are wanted."""
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0, 5.0, 4.0, -math.inf, -math.inf]])
    ids, weights = route(method, logits, top_k=3, n_group=2, topk_group=1)
    assert ids.tolist() == [[4, 5, 0]]
    assert weights[0, 2] == 0
    assert weights.sum().item() == pytest.approx(1.0)


def test_fill_lifts_other_groups_and_no_masks() -> None:
    """Filled with 0 the other group's experts can be chosen, a masked one among them cannot."""
    logits = torch.tensor([[-math.inf, 0.0, 0.0, 0.0, 5.0, 4.0, -math.inf, -math.inf]])
    ids, weights = route("DeepSeekV3", logits, top_k=3, n_group=2, topk_group=1, group_fill=0.0)
    assert ids.tolist() == [[4, 5, 1]]
    assert weights[0, 2] > 0.1


@pytest.mark.parametrize(("eps", "total"), [(0.0, 1.0), (None, 0.13), (1e-6, 0.0)])
@pytest.mark.parametrize("method", ["DeepSeekV3", "MiniMax2"])
def test_epsilon_decides_near_minus_fifty(method: str, eps: float | None, total: float) -> None:
    weights = route(method, torch.full((1, 16), -50.0), top_k=8, eps=eps)[1]
    assert weights.sum().item() == pytest.approx(total, abs=0.01)


def test_sigmoid_renorm_clamps_the_sum() -> None:
    weights = route("SigmoidRenorm", torch.full((1, 16), -50.0), top_k=8)[1]
    assert weights.sum().item() == pytest.approx(8 * math.exp(-50) / 1e-20, rel=1e-3)


@pytest.mark.parametrize(("eps", "floor"), [(None, 1e-12), (1e-9, 1e-9)])
def test_softmax_bias_clamps_the_sum(eps: float | None, floor: float) -> None:
    """A bias chooses experts whose probabilities are next to nothing."""
    logits, bias = torch.tensor([[0.0, -40.0, -40.0]]), torch.tensor([0.0, 9.0, 9.0])
    ids, weights = route("SoftmaxBias", logits, bias=bias, top_k=2, eps=eps)
    assert ids.tolist() == [[1, 2]]
    assert weights.sum().item() == pytest.approx(2 * math.exp(-40) / floor, rel=1e-3)


def test_group_score_and_fill() -> None:
    """One very good expert wins by max, two good ones by the sum of the best two."""
    logits = torch.tensor([[3.0, -9.0, 2.0, 2.0]])
    both = {"top_k": 1, "n_group": 2, "topk_group": 1}
    assert route("GroupedSoftmax", logits, group_score="max", **both)[0].tolist() == [[0]]
    sums = torch.tensor([[1.1, -9.0, 1.0, 1.0]])
    assert route("GroupedSoftmax", sums, group_score="top2", **both)[0].tolist() == [[2]]
    negative = torch.tensor([-4.0, -4.0, -1.0, -1.0])
    zero = route("DeepSeekV3", logits, bias=negative, group_fill=0.0, **both)[0]
    none = route("DeepSeekV3", logits, bias=negative, **both)[0]
    assert (zero.tolist(), none.tolist()) == ([[0]], [[2]])


@settings(max_examples=30, deadline=None)
@given(seeds)
def test_names_for_the_same_maths(seed: int) -> None:
    logits, bias = random(seed, 16, 32) * 4, random(seed + 1, 32)
    assert_equal(route("Renormalize", logits, top_k=4), route("RenormalizeNaive", logits, top_k=4))
    one = route("DeepSeekV3", logits, bias=bias, top_k=4, n_group=1, topk_group=1, scale=2.5)
    assert_equal(one, route("DeepSeekV3", logits, bias=bias, top_k=4, scale=2.5))
    assert_equal(one, route("MiniMax2", logits, bias=bias, top_k=4, scale=2.5))
    assert_equal(one, route(RoutingMethod.MINIMAX2, logits, bias=bias, top_k=4, scale=2.5))


def assert_equal(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("method", METHODS)
def test_scale_is_always_applied(method: str, seed: int) -> None:
    logits = random(seed, 8, 16)
    plain, scaled = (route(method, logits, top_k=4, scale=scale) for scale in (1.0, 2.5))
    assert torch.equal(plain[0], scaled[0])
    torch.testing.assert_close(scaled[1], plain[1] * 2.5, rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_forms(method: str, seed: int) -> None:
    """No rows, one row, every expert chosen, half-precision logits, types, inputs left alone."""
    logits = random(seed, 5, 16).bfloat16().float()
    kept = logits.clone()
    ids, weights = route(method, logits, top_k=16)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)
    assert torch.equal(ids.sort(dim=1).values, torch.arange(16).expand(5, 16).int())
    assert torch.equal(logits, kept)
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(logits.to(dtype).float(), logits):
            assert_equal(route(method, logits.to(dtype), top_k=16), (ids, weights))
    one = route(method, logits[2:3], top_k=16)
    assert torch.equal(one[0], ids[2:3])
    torch.testing.assert_close(one[1], weights[2:3], rtol=1e-6, atol=0)
    none = route(method, logits[:0], top_k=3)
    assert (none[0].shape, none[1].shape) == ((0, 3), (0, 3))


def test_no_rows_in_groups() -> None:
    ids, weights = route("DeepSeekV3", torch.zeros(0, 16), top_k=3, n_group=4, topk_group=2)
    assert (ids.shape, weights.shape) == ((0, 3), (0, 3))


def test_columns_of_a_wider_tensor(seed: int) -> None:
    wide = random(seed, 8, 32)
    groups = {"top_k": 4, "n_group": 4, "topk_group": 2}
    ids, weights = route("DeepSeekV3", wide[:, ::2], **groups)
    same_ids, same = route("DeepSeekV3", wide[:, ::2].clone(), **groups)
    assert torch.equal(ids, same_ids)
    torch.testing.assert_close(weights, same, rtol=1e-6, atol=0)


def test_logits_ok_tells_rows() -> None:
    inf, nan = math.inf, math.nan
    rows = [[0.0, 1, 2], [-inf, 1, 2], [-inf, -inf, 2], [nan, 1, 2], [inf, 1, 2], [-nan, 1, 2]]
    logits = torch.tensor(rows)
    assert logits_ok(logits, 2).tolist() == [True, True, False, False, False, False]
    assert logits_ok(logits[:0], 2).tolist() == []


def test_route_for_uses_every_setting(seed: int) -> None:
    logits, bias = random(seed, 8, 32) - 20.0, random(seed + 1, 32) - 2.0
    spec = RoutingSpec(
        method=RoutingMethod.DEEPSEEK_V3,
        scoring="sigmoid",
        top_k=4,
        renormalize=True,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        scale_site="output",
        eps=1e-9,
        bias=True,
        group_fill=0.0,
        group_score="max",
    )
    expected = route(
        "DeepSeekV3",
        logits,
        bias=bias,
        top_k=4,
        n_group=4,
        topk_group=2,
        scale=2.5,
        eps=1e-9,
        group_fill=0.0,
        group_score="max",
    )
    assert_equal(route_for(spec, logits, bias), expected)
    with pytest.raises(InvalidArgument, match="bias"):
        route_for(spec, logits)


def test_naming_the_room_loads_no_torch() -> None:
    rooms = "derive, declared, verify, kernel_ids, methods, checks, families, rounding"
    code = (
        f"from expertd.routing import {rooms}\n"
        "import sys\n"
        "assert 'torch' not in sys.modules\n"
        "from expertd.routing import route, route_for, logits_ok\n"
    )
    assert_runs(code)
