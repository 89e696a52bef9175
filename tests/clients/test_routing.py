"""The numpy router against the server's reference, for every method and setting."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.core import RoutingMethod
from expertd.routing import reference
from expertd.routing.methods import TRAITS, UNKNOWABLE
from expertd_client.errors import ExpertdError, InvalidArgument, NoUsablePlan
from expertd_client.routing import FORMULAS, Router, route, route_for, router_of
from expertd_wire.v1 import experts_pb2 as pb

EXPERTS = 32
METHODS = tuple(str(method) for method in RoutingMethod if method not in UNKNOWABLE)

routers = st.builds(
    dict,
    method=st.sampled_from(METHODS),
    top_k=st.integers(1, 8),
    grouped=st.booleans(),
    topk_group=st.integers(2, 8),
    biased=st.booleans(),
    scale=st.sampled_from([1.0, 2.5, 0.0]),
    renormalize=st.booleans(),
    eps=st.sampled_from([None, 0.0, 1e-6, 1e-20]),
    group_fill=st.sampled_from([None, 0.0]),
    group_score=st.sampled_from(["top2", "max"]),
)
logits = st.builds(
    dict,
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 1.0, 3.0, 20.0]),
    shift=st.sampled_from([0.0, -50.0, 12.0]),
    masked=st.booleans(),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16]),
)


def settings_of(asked: dict[str, Any], seed: int) -> dict[str, Any]:
    """What route takes; a method is given groups and a bias only if it has such."""
    traits = TRAITS[RoutingMethod(asked["method"])]
    grouped, biased = asked.pop("grouped"), asked.pop("biased")
    groups = 8 if grouped and traits.grouped else 1
    random = np.random.default_rng(seed + 1)
    bias = random.standard_normal(EXPERTS).astype(np.float32) * 0.3
    return asked | {
        "n_group": groups,
        "topk_group": min(asked["topk_group"], groups),
        "bias": bias if biased and traits.biased else None,
    }


def drawn(seed: int, spread: float, shift: float, masked: bool, dtype: Any) -> Any:
    random = np.random.default_rng(seed)
    values = random.standard_normal((6, EXPERTS)) * spread + shift
    if masked:
        values[random.random(values.shape) < 0.4] = -math.inf
        values[:, :8] = np.where(np.isneginf(values[:, :8]), shift, values[:, :8])
    return values.astype(np.float32).astype(dtype)


@settings(max_examples=400, deadline=None)
@given(routers, logits)
def test_equal_to_the_reference(asked: dict[str, Any], given_logits: dict[str, Any]) -> None:
    values = drawn(**given_logits)
    chosen = settings_of(asked, given_logits["seed"])
    fill = chosen.pop("group_fill")
    router = Router(num_experts=EXPERTS, **chosen, group_fill=-math.inf if fill is None else fill)
    ids, weights = route_for(router, values)
    told = dict(chosen, group_fill=fill)
    bias = told.pop("bias")
    plain = torch.from_numpy(values.astype(np.float32))
    expected_ids, expected = reference.route(
        told.pop("method"),
        plain,
        bias=None if bias is None else torch.from_numpy(bias),
        **told,
    )
    assert ids.dtype == np.int32 and weights.dtype == np.float32
    again = route(router.method, values, **drop_method(chosen), group_fill=fill)
    assert (again[0] == ids).all() and again[1].tobytes() == weights.tobytes()
    same = (ids == expected_ids.numpy()).all(axis=1)
    for row in np.flatnonzero(~same):
        assert ties(router, values[row : row + 1], ids[row], expected_ids[row].numpy())
    # What is rounded to a denormal has few digits, and a root makes it large enough to be seen.
    least = 2e-22 if router.method == "DeepSeekV4" else 1e-37
    np.testing.assert_allclose(weights[same], expected.numpy()[same], rtol=1e-6, atol=least)


def drop_method(chosen: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in chosen.items() if name != "method"}


def ties(router: Router, row: Any, ids: Any, expected: Any) -> bool:
    """Whether in double precision the two choices are as good as each other."""
    score = {
        "_softmax": lambda x: np.exp(x - x.max()) / np.exp(x - x.max()).sum(),
        "_sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "_sqrt_softplus": lambda x: np.sqrt(np.log1p(np.exp(np.minimum(x, 700)))),
        "_raw": lambda x: x,
    }
    formula, exact = FORMULAS[router.method], row.astype(np.float64)[0]
    key = score[formula.score.__name__](exact) if formula.by_score else exact
    if router.bias is not None:
        key = key + router.bias
    if router.n_group > 1 and set(ids) != set(expected):
        best = np.sort(key.reshape(router.n_group, -1), axis=1)[:, -2:]
        groups = np.sort(best.sum(axis=1) if router.group_score == "top2" else best[:, -1])
        if np.diff(groups).min() < 1e-5:
            return True
    return bool(np.allclose(key[ids], key[expected], rtol=3e-6, atol=1e-6))


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lower_id(method: str) -> None:
    levels = np.random.default_rng(7).integers(-2, 3, (16, 16)).astype(np.float32)
    levels[0] = [-0.0, 0.0] * 8
    ids, _ = route_for(Router(method=method, num_experts=16, top_k=7), levels)
    for row, chosen in zip(levels.tolist(), ids.tolist(), strict=True):
        assert chosen == sorted(range(16), key=lambda i: (-row[i], i))[:7]


def test_a_masked_expert_stays_masked_where_groups_are_filled_with_zero() -> None:
    """Only two experts of the best group can be had: the third comes from the other, unmasked."""
    values = np.array([[9.0, 9.0, -math.inf, -math.inf, -math.inf, 0.5, 0.6, 0.7]], np.float32)
    router = Router(
        method="DeepSeekV3", num_experts=8, top_k=3, n_group=2, topk_group=1, group_fill=0.0
    )
    ids, weights = route_for(router, values)
    expected, expected_weights = reference.route(
        "DeepSeekV3", torch.from_numpy(values), top_k=3, n_group=2, topk_group=1, group_fill=0.0
    )
    assert ids.tolist() == expected.tolist() == [[0, 1, 5]]
    np.testing.assert_allclose(weights, expected_weights.numpy(), rtol=1e-6)


def test_every_method_of_the_server_is_there() -> None:
    assert set(FORMULAS) == set(METHODS)


def test_no_rows() -> None:
    for method in METHODS:
        ids, weights = route_for(
            Router(method=method, num_experts=8, top_k=2), np.empty((0, 8), np.float32)
        )
        assert ids.shape == weights.shape == (0, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_cannot_be_routed(bad: float) -> None:
    router = Router(method="Default", num_experts=4, top_k=2)
    values = np.zeros((3, 4), np.float32)
    values[1, 2] = bad
    with pytest.raises(InvalidArgument, match="row 1 has NaN"):
        route_for(router, values)
    with pytest.raises(InvalidArgument, match="fewer than 2 finite"):
        route_for(router, np.array([[0.0, -math.inf, -math.inf, -math.inf]], np.float32))
    with pytest.raises(InvalidArgument, match=r"\[tokens, 4\] accepted"):
        route_for(router, np.zeros((3, 5), np.float32))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"top_k": 0}, "top_k"),
        ({"top_k": 9}, "top_k"),
        ({"n_group": 3}, "n_group"),
        ({"n_group": 2, "topk_group": 3}, "topk_group"),
        ({"group_score": "median"}, "group_score"),
        ({"bias": np.zeros(7, np.float32)}, "bias"),
        ({"method": "Quantum"}, "method"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, Any], name: str) -> None:
    chosen: dict[str, Any] = {"method": "DeepSeekV3", "top_k": 2} | changes
    with pytest.raises(InvalidArgument, match=f"no sense: .*{name}"):
        route(logits=np.zeros((1, 8), np.float32), **chosen)


def told(**changes: Any) -> pb.LayerInfo:
    """A layer as a server tells it."""
    bias = np.arange(8, dtype=np.float32)
    routing = pb.RoutingInfo(
        method="DeepSeekV3",
        renormalize=True,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        correction_bias=pb.Tensor(dtype="float32", shape=[8], data=bias.tobytes()),
        group_fill="-inf",
        group_score="top2",
    )
    for name, value in changes.items():
        if isinstance(value, pb.Tensor):
            getattr(routing, name).CopyFrom(value)
        else:
            setattr(routing, name, value)
    return pb.LayerInfo(model="m", layer=3, num_experts=8, top_k=2, routing=routing)


def test_settings_from_a_server() -> None:
    router = router_of(told())
    assert router.bias is not None and router.bias.tolist() == list(range(8))
    plain = replace(router, bias=None)
    assert plain == Router(
        method="DeepSeekV3", num_experts=8, top_k=2, n_group=4, topk_group=2, scale=2.5
    )
    assert router_of(told(eps=0.0)).eps == 0.0
    assert router_of(told(group_fill="0")).group_fill == 0.0


def test_a_method_of_a_newer_server() -> None:
    with pytest.raises(NoUsablePlan, match="topk_ids"):
        router_of(told(method="Quantum"))


@pytest.mark.parametrize(
    "changes",
    [
        {"n_group": 3},
        {"n_group": -4},
        {"topk_group": 9},
        {"group_score": "median"},
        {"group_fill": "many"},
        {"n_group": 8},
        {"correction_bias": pb.Tensor(dtype="float32", shape=[7], data=bytes(28))},
        {"correction_bias": pb.Tensor(dtype="float32", shape=[8], data=bytes(28))},
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any]) -> None:
    with pytest.raises(ExpertdError, match="the server's"):
        router_of(told(**changes))
