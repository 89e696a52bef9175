"""Every family's router against transformers' own block, and its method against the design."""

from __future__ import annotations

import json

import pytest
import torch
from tests.service.routing.blocks import (
    CASES,
    EXPERTS,
    HIDDEN,
    TOKENS,
    TOP_K,
    Case,
    Seen,
    run,
    weighted,
)
from torch import Tensor
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4Router

from expertd.core import RoutingSpec
from expertd.routing import route_for
from expertd.routing.derive import family_routing

SCORES = {
    "softmax": lambda logits: torch.softmax(logits, -1),
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}
COMPARES_LOGITS = ("Renormalize", "TopKSigmoid")


def spec_of(seen: Seen) -> RoutingSpec:
    return family_routing(seen.config.to_dict())


def dense(ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    empty = torch.zeros(ids_TK.shape[0], EXPERTS)
    return empty.scatter(1, ids_TK.long(), weights_TK.float())


def keys(spec: RoutingSpec, seen: Seen) -> Tensor:
    """What is compared, in double precision, by the published formula."""
    logits = seen.logits.double()
    key = logits if spec.method in COMPARES_LOGITS else SCORES[spec.scoring](logits)
    return key if seen.bias is None else key + seen.bias.double()


def groups_tie(spec: RoutingSpec, key_TE: Tensor, tie: float) -> Tensor:
    """Rows in which the last group chosen and the first one left out are as good."""
    if not spec.grouped:
        return torch.zeros(len(key_TE), dtype=torch.bool)
    best = key_TE.unflatten(1, (spec.n_group, -1)).topk(2).values
    scores = (best.sum(-1) if spec.group_score == "top2" else best[..., 0]).sort(descending=True)
    last, first = scores.values[:, spec.topk_group - 1], scores.values[:, spec.topk_group]
    return last - first <= tie * last.abs()


def assert_same_choice(
    ours: Tensor, theirs: Tensor, key_TE: Tensor, tie: float, excused_T: Tensor
) -> Tensor:
    """Rows that chose alike; the others must have met a tie."""
    mine, other = dense(ours, torch.ones(ours.shape)), dense(theirs, torch.ones(theirs.shape))
    for row in ((mine != other).any(dim=1) & ~excused_T).nonzero().flatten().tolist():
        only_mine = key_TE[row][(mine[row] > other[row])].sort().values
        only_other = key_TE[row][(other[row] > mine[row])].sort().values
        torch.testing.assert_close(only_mine, only_other, rtol=tie, atol=tie)
    return (mine == other).all(dim=1)


def assert_same_weights(case: Case, seen: Seen, tie: float, least: float) -> None:
    """route_for has the block's ids, weights and routed sum in at least that part of the rows."""
    spec = spec_of(seen)
    ids, weights = route_for(spec, seen.logits, seen.bias)
    key_TE = keys(spec, seen)
    excused_T = groups_tie(spec, key_TE, tie)
    alike = assert_same_choice(ids, seen.ids, key_TE, tie, excused_T)
    assert alike.float().mean() > least
    on_output = spec.routed_scaling_factor if spec.scale_site == "output" else 1.0
    theirs = seen.weights.float() * on_output * case.output_factor
    exact = seen.output.dtype == torch.float32
    torch.testing.assert_close(
        dense(ids, weights)[alike],
        dense(seen.ids, theirs)[alike],
        rtol=1e-6 if exact else 2.0**-6,
        atol=1e-12,
    )
    if not case.output_normed:
        routed = weighted(seen.answers, ids, weights)
        difference = (routed - seen.output.float())[alike].norm() / routed[alike].norm()
        assert difference < (1e-5 if exact else 2e-2)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_block(case: Case, dtype: torch.dtype, seed: int) -> None:
    seen = run(case, seed, dtype)
    half = dtype == torch.bfloat16
    tie = 2.0**-6 if half and case.scores_in_model_dtype else 1e-6
    assert_same_weights(case, seen, tie, least=0.5 if half else 0.95)


BIASED = [case for case in CASES if case.method in ("DeepSeekV3", "MiniMax2", "DeepSeekV4")]


@pytest.mark.parametrize("case", BIASED, ids=str)
@pytest.mark.parametrize("near", [-50.0, 30.0])
def test_block_far_from_zero(case: Case, near: float, seed: int) -> None:
    """Near -50 the epsilon decides whether the weights sum to the scale or to a fifth of it."""
    seen = run(case, seed, torch.float32, near)
    assert (seen.logits.mean() - near).abs() < 5
    assert_same_weights(case, seen, tie=1e-6, least=0.9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_method_of_settings(case: Case) -> None:
    """The design's table, from the config as it is and as transformers writes it to disk."""
    config = case.config()
    spec = family_routing(config.to_dict())
    assert (spec.method, spec.top_k) == (case.method, TOP_K)
    assert family_routing(json.loads(config.to_json_string(use_diff=True))) == spec


def test_llama4(seed: int) -> None:
    """Its router answers scores for all experts; they multiply the inputs."""
    torch.manual_seed(seed)
    config = Llama4TextConfig(hidden_size=HIDDEN, num_local_experts=EXPERTS, num_experts_per_tok=1)
    spec = family_routing({"model_type": "llama4", "text_config": config.to_dict()})
    assert (spec.method, spec.weight_site) == ("Llama4", "input")
    with torch.no_grad():
        scores, logits = Llama4Router(config)(torch.randn(TOKENS, HIDDEN))
    ids, weights = route_for(spec, logits)
    torch.testing.assert_close(dense(ids, weights), scores, rtol=1e-6, atol=0)
