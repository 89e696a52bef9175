"""The fused router in Triton's interpreter, beside routing.reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.triton.router_cases import (
    BIASED,
    GROUPED,
    LOGITS,
    METHODS,
    bias_of,
    compare,
    plain,
    spec_of,
)

from expertd.backends.triton.router import FORMULAS, route_for
from expertd.core import RoutingMethod
from expertd.errors import InvalidArgument
from expertd.routing import route_for as reference

methods = pytest.mark.parametrize("method", METHODS)


@methods
@pytest.mark.parametrize("logits_of", LOGITS)
def test_hard_logits(method: RoutingMethod, logits_of, seed: int) -> None:  # type: ignore[no-untyped-def]
    random = torch.Generator().manual_seed(seed)
    spec = spec_of(method, top_k=6)
    logits, bias = logits_of(6, 40, random), bias_of(spec, 40, 0.3, random)
    compare(route_for, spec, logits, bias, strict=False)


@methods
@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (3, 3), (160, 8), (512, 22), (896, 16)])
def test_sizes(method: RoutingMethod, experts: int, top_k: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    spec = spec_of(method, top_k)
    bias = bias_of(spec, experts, 0.1, random)
    compare(route_for, spec, plain(1, experts, random), bias, strict=False)


@pytest.mark.parametrize("method", GROUPED)
@pytest.mark.parametrize("score", ["top2", "max"])
@pytest.mark.parametrize("fill", [None, 0.0, -3.0])
@pytest.mark.parametrize(("experts", "groups", "kept"), [(160, 8, 3), (256, 8, 4), (30, 5, 1)])
def test_groups(
    method: RoutingMethod, score: str, fill: float | None, experts: int, groups: int, kept: int,
    seed: int,
) -> None:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    spec = spec_of(method, 6, n_group=groups, topk_group=kept, group_score=score, group_fill=fill)
    for logits_of in LOGITS:
        bias = bias_of(spec, experts, 0.1, random)
        compare(route_for, spec, logits_of(3, experts, random), bias, strict=False)


@pytest.mark.parametrize("method", BIASED)
def test_a_large_bias(method: RoutingMethod, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    spec = spec_of(method, 8)
    for size in (30.0, 1e4):
        compare(
            route_for, spec, plain(4, 64, random), bias_of(spec, 64, size, random), strict=False
        )


@methods
@settings(max_examples=8)
@given(
    numbers=st.integers(0, 2**32 - 1),
    renormalize=st.booleans(),
    eps=st.sampled_from([None, 0.0, 1e-6]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scale=st.sampled_from([0.0, 1.0, 16.0]),
)
def test_settings(  # type: ignore[no-untyped-def]
    method: RoutingMethod, numbers: int, renormalize: bool, eps, dtype, scale: float
) -> None:
    random = torch.Generator().manual_seed(numbers)
    spec = spec_of(method, 5, renormalize=renormalize, eps=eps, routed_scaling_factor=scale)
    logits, bias = plain(2, 24, random).to(dtype), bias_of(spec, 24, 0.1, random)
    compare(route_for, spec, logits, None if bias is None else bias.to(dtype), strict=False)


@pytest.mark.parametrize("size", [24.0, 90.0, -24.0, -110.0])
@pytest.mark.parametrize("method", METHODS)
def test_exact_ties_go_to_the_lower_index(method: RoutingMethod, size: float) -> None:
    spec = spec_of(method, 7, bias=False) if method not in BIASED else spec_of(method, 7)
    bias = torch.zeros(50) if spec.bias else None
    ids, _ = route_for(spec, torch.full((2, 50), size), bias)
    assert ids.tolist() == [list(range(7))] * 2


@methods
def test_scores_of_almost_nothing(method: RoutingMethod) -> None:
    """Each chosen score is 0 or nearly: what is added to their sum, or clamps it, counts."""
    spec = spec_of(method, 4)
    logits = torch.full((2, 12), -80.0)
    logits[1, 0] = 100.0
    bias = torch.arange(12.0) if spec.bias else None
    compare(route_for, spec, logits, bias, strict=True)


def test_square_roots_of_denormal_numbers_keep_their_digits(seed: int) -> None:
    """torch's own has a few bits left there, so the truth is taken in double precision."""
    random = torch.Generator().manual_seed(seed)
    spec = spec_of(RoutingMethod.DEEPSEEK_V4, 4, bias=False, eps=0.0)
    logits = -80 - 20 * torch.rand(3, 12, generator=random)
    ids, weights = route_for(spec, logits)
    score = logits.double().exp().log1p().sqrt().gather(1, ids.long())
    expected = 2.5 * score / score.sum(dim=1, keepdim=True)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=0)


@methods
def test_no_rows(method: RoutingMethod) -> None:
    spec = spec_of(method, 4)
    ids, weights = route_for(spec, torch.zeros(0, 16), torch.zeros(16) if spec.bias else None)
    assert ids.shape == weights.shape == (0, 4)


def test_every_method_has_a_formula() -> None:
    assert tuple(FORMULAS) == METHODS


def test_wrong_settings_are_refused_as_the_reference_refuses_them() -> None:
    logits, bias = torch.zeros(1, 8), torch.zeros(8)
    wrong = [
        (spec_of(RoutingMethod.DEFAULT, 9), None),
        (spec_of(RoutingMethod.DEFAULT, 2), bias),
        (spec_of(RoutingMethod.MINIMAX2, 2), None),
        (spec_of(RoutingMethod.CUSTOM, 2, bias=False), None),
        (spec_of(RoutingMethod.DEEPSEEK_V3, 2, n_group=3, topk_group=1), bias),
    ]
    for spec, given_bias in wrong:
        texts = []
        for route in (route_for, reference):
            with pytest.raises(InvalidArgument) as raised:
                route(spec, logits, given_bias)
            texts.append(str(raised.value))
        assert texts[0] == texts[1]
