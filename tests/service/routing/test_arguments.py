"""What route refuses: every wrong setting by name, all at once."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from expertd.core import RoutingMethod
from expertd.errors import InvalidArgument
from expertd.routing import route
from expertd.routing.checks import check_spec
from expertd.routing.derive import family_routing

GOOD: dict[str, Any] = {"method": "DeepSeekV3", "logits": torch.zeros(2, 16), "top_k": 4}
GROUPS = {"n_group": 4, "topk_group": 2}

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"top_k": 17}, "top_k=17; accepted: 1..16"),
    ({"top_k": 0}, "top_k=0"),
    ({"top_k": -1}, "top_k=-1"),
    ({"top_k": 2.0}, "top_k=2.0"),
    ({"top_k": True}, "top_k=True"),
    ({"top_k": None}, "top_k=None"),
    ({"n_group": 3, "topk_group": 2}, "n_group=3; accepted: a divisor of the 16 experts"),
    ({"n_group": 32, "topk_group": 2}, "n_group=32; accepted: a divisor"),
    ({"n_group": 16, "topk_group": 8}, "n_group=16; accepted: 1..8"),
    ({"n_group": 0}, "n_group=0"),
    ({"n_group": 4}, "topk_group=None; accepted: 1..4"),
    ({"n_group": 4, "topk_group": 5}, "topk_group=5; accepted: 1..4"),
    ({"topk_group": 2}, "topk_group=2; accepted: 1..1"),
    ({**GROUPS, "top_k": 9}, "top_k=9; accepted: 1..8"),
    ({**GROUPS, "method": "Renormalize"}, "n_group=4; accepted: 1 or none"),
    ({**GROUPS, "method": "MiniMax2"}, "grouped: GroupedSoftmax, DeepSeekV3"),
    ({**GROUPS, "group_score": "best"}, "group_score=best; accepted: top2, max"),
    ({**GROUPS, "group_fill": math.nan}, "group_fill=nan"),
    ({"scale": -1.0}, "scale=-1.0"),
    ({"scale": math.nan}, "scale=nan"),
    ({"scale": math.inf}, "scale=inf"),
    ({"scale": "2"}, "scale=2"),
    ({"eps": -1e-20}, "eps=-1e-20"),
    ({"eps": math.inf}, "eps=inf"),
    ({"bias": torch.zeros(15)}, r"bias=float32 \[15\]; accepted: floating point \[16\]"),
    ({"bias": torch.zeros(1, 16)}, r"bias=float32 \[1, 16\]"),
    ({"bias": torch.zeros(16, dtype=torch.int32)}, "bias=int32"),
    ({"method": "Renormalize", "bias": torch.zeros(16)}, "Renormalize has no correction bias"),
    ({"logits": torch.zeros(16)}, r"logits=float32 \[16\]; accepted: \[T, E\]"),
    ({"logits": torch.zeros(2, 16, dtype=torch.int64)}, "logits=int64"),
    ({"logits": torch.zeros(2, 16, dtype=torch.float64)}, "logits=float64"),
    ({"method": "renormalize"}, "method 'renormalize' is unknown; accepted: Default, Renorm"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=lambda value: str(value)[:40])
def test_refused_by_name(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        route(**{**GOOD, **change})


@pytest.mark.parametrize("method", ["Custom", "Simulated", "Unspecified"])
def test_methods_that_only_a_caller_knows(method: str) -> None:
    with pytest.raises(InvalidArgument, match="send topk_ids and topk_weights"):
        route(**{**GOOD, "method": method})


WELL: list[dict[str, Any]] = [
    {},
    {**GROUPS, "bias": torch.zeros(16, dtype=torch.bfloat16)},
    {"method": "MiniMax2", "n_group": 1, "topk_group": 1, "scale": 0},
    {
        "method": RoutingMethod.DEEPSEEK_V3,
        "n_group": 16,
        "topk_group": 4,
        "group_score": "max",
    },
]


@pytest.mark.parametrize("change", WELL, ids=lambda value: str(value)[:40])
def test_good_ones_pass(change: dict[str, Any]) -> None:
    given = {**GOOD, **change}
    ids, weights = route(**given)
    shape = (len(given["logits"]), given["top_k"])
    assert (ids.shape, weights.shape) == (shape, shape)
    assert (ids.dtype, weights.dtype) == (torch.int32, torch.float32)


def test_all_reasons_at_once() -> None:
    with pytest.raises(InvalidArgument) as told:
        route("Sigmoid", torch.zeros(2, 16), top_k=99, n_group=5, scale=-2.0, bias=torch.zeros(16))
    fields = {refusal.field for refusal in told.value.refusals}
    assert fields == {"top_k", "n_group", "topk_group", "scale", "bias"}
    assert all(refusal.text in str(told.value) for refusal in told.value.refusals)


def test_a_layer_is_told_by_its_own_names() -> None:
    spec = family_routing({"model_type": "deepseek_v3", "num_experts_per_tok": 8})
    check_spec(spec, 256)
    with pytest.raises(InvalidArgument, match="n_group=8; accepted: a divisor of the 36 experts"):
        check_spec(spec, 36)
    with pytest.raises(InvalidArgument, match="routed_scaling_factor=-1.0"):
        family_routing(
            {"model_type": "deepseek_v3", "num_experts_per_tok": 8, "routed_scaling_factor": -1.0}
        )
