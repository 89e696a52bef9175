"""Explicit specs, declared methods, and what kernels mean by them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from expertd.core import RoutingMethod, RoutingSpec
from expertd.errors import InvalidArgument
from expertd.routing.declared import compare_declared, declared_routing
from expertd.routing.derive import family_routing
from expertd.routing.methods import TRAITS
from expertd.routing.verify import MEANINGS, reverify

SPEC = {
    "num_experts": 256,
    "top_k": 8,
    "routing": "DeepSeekV3",
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "bias": True,
}


def test_explicit_spec() -> None:
    spec = declared_routing(SPEC)
    assert spec == RoutingSpec(
        method=RoutingMethod.DEEPSEEK_V3,
        scoring="sigmoid",
        top_k=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        bias=True,
    )
    by_scoring = {**SPEC, "routing": None, "scoring": "sigmoid", "renormalize": True}
    assert declared_routing(by_scoring) == spec


@pytest.mark.parametrize("method", list(RoutingMethod))
def test_every_method_can_be_declared(method: RoutingMethod) -> None:
    assert set(TRAITS) == set(RoutingMethod)
    spec = declared_routing({"num_experts": 16, "top_k": 1, "routing": method.value})
    assert (spec.method, spec.scoring) == (method, TRAITS[method].scoring)
    assert spec.weight_site == ("input" if method == "Llama4" else "output")
    assert spec.renormalize == (TRAITS[method].renormalize != "never")


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"routing": "Deepseek"}, "'Deepseek' is unknown; accepted: Default"),
    ({"routing": None}, "routing is missing"),
    ({"top_k": 300}, "top_k=300; accepted: 1..256"),
    ({"top_k": "8"}, "top_k=8"),
    ({"num_experts": "256"}, "num_experts=256; accepted: a whole number"),
    ({"topk_group": 9}, "topk_group=9; accepted: 1..8"),
    ({"n_group": "8"}, "n_group=8"),
    ({"routed_scaling_factor": -2.5}, "routed_scaling_factor=-2.5"),
    ({"routing": "Renormalize"}, "bias=present.*n_group=8"),
    ({"bias": "yes"}, "bias='yes'"),
    ({"scoring": "softmax"}, "scoring='softmax'; DeepSeekV3 means 'sigmoid'"),
    ({"routing": "Default", "renormalize": True}, "renormalize=True; Default means False"),
    ({"routing": "Unspecified", "top_k": 300}, "top_k=300"),
    ({"routing": None, "scoring": "relu"}, "scoring='relu'"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=str)
def test_wrong_fields_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        declared_routing({**SPEC, **change})


def test_top_k_is_needed() -> None:
    with pytest.raises(InvalidArgument, match="top_k is missing"):
        declared_routing({"routing": "Default"})


COHERE = {"model_type": "cohere2_moe", "num_experts_per_tok": 8}


@pytest.mark.parametrize("declared", ["Sigmoid", "RenormalizeNaive", "Default"])
def test_cohere_declared_as_engines_do(declared: str) -> None:
    derived = family_routing({**COHERE, "expert_selection_fn": "softmax"}).method
    told = compare_declared(RoutingMethod(declared), derived)
    assert told is not None
    assert declared in told
    assert "Renormalize (top-k of logits, softmax over the k)" in told


def test_the_same_method_has_no_difference() -> None:
    derived = family_routing({**COHERE, "expert_selection_fn": "sigmoid"}).method
    assert compare_declared(RoutingMethod.SIGMOID_RENORM, derived) is None


# What SGLang's own check lets a kernel route, and each way to fall out of it.
PLAIN = {"top_k": 8}
MEANT: list[tuple[str, RoutingSpec]] = [
    (name, declared_routing({"routing": name, "num_experts": 64, **fields}))
    for name, fields in (
        ("Default", PLAIN), ("Renormalize", PLAIN), ("RenormalizeNaive", PLAIN), ("Sigmoid", PLAIN),
        ("SigmoidRenorm", PLAIN), ("TopKSigmoid", PLAIN), ("Llama4", {"top_k": 1}),
        ("MiniMax2", {"top_k": 8, "bias": True}),
        ("DeepSeekV3", {"top_k": 8, "bias": True, "n_group": 8, "topk_group": 4}),
        ("DeepSeekV3", {"top_k": 8, "bias": True, "n_group": 1}),
    )
]  # fmt: skip


@pytest.mark.parametrize(("name", "spec"), MEANT, ids=lambda v: v if isinstance(v, str) else "")
def test_kernels_mean_what_is_declared(name: str, spec: RoutingSpec) -> None:
    assert reverify(RoutingMethod(name), spec) == ()


@pytest.mark.parametrize(("name", "spec"), MEANT, ids=lambda v: v if isinstance(v, str) else "")
def test_every_contradiction_is_found(name: str, spec: RoutingSpec) -> None:
    """Each changed setting gives exactly its own reason, and its accepted value takes it away."""
    other = "softmax" if spec.scoring == "sigmoid" else "sigmoid"
    changes: dict[str, Any] = {"scoring": other, "renormalize": not spec.renormalize}
    changes["weight_site"] = "output" if spec.weight_site == "input" else "input"
    if not MEANINGS[RoutingMethod(name)].bias:
        changes["bias"] = True
    if name == "Llama4":
        changes["top_k"] = 2
    if spec.grouped:
        changes |= {"group_score": "max", "group_fill": 0.0}
    elif name != "DeepSeekV3":
        changes["n_group"] = 4
    for field, value in changes.items():
        reasons = reverify(RoutingMethod(name), replace(spec, **{field: value}))
        assert [reason.field for reason in reasons] == [field]
        assert reasons[0].given == str(value)
        assert reasons[0].text
    everything = reverify(RoutingMethod(name), replace(spec, **changes))
    assert {reason.field for reason in everything} == set(changes)


NO_KERNEL = [m for m in RoutingMethod if m not in MEANINGS]


@pytest.mark.parametrize("method", NO_KERNEL)
def test_methods_without_a_kernel_never_route_in_one(method: RoutingMethod) -> None:
    spec = declared_routing({"routing": method.value, "num_experts": 64, "top_k": 8})
    reasons = reverify(method, spec)
    assert [reason.field for reason in reasons] == ["routing"]
    assert "DeepSeekV3" in reasons[0].accepted


def test_grouped_softmax_is_not_called_renormalize() -> None:
    """Groups dropped in silence: how vLLM came to route DeepSeek-V2 by a method without groups."""
    spec = family_routing(
        {
            "model_type": "deepseek_v2",
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
        }
    )
    fields = {reason.field for reason in reverify(RoutingMethod.RENORMALIZE_NAIVE, spec)}
    assert fields == {"n_group", "renormalize"}
