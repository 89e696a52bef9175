"""Routing from logits: every method against a token-by-token Python reading of section 4."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.service.twins.calls import call
from tests.service.twins.native import EXPERTS, FORMATS
from tests.twins import limits, routing
from tests.twins.checks import Arguments, ContractError
from tests.twins.enums import ActivationType, RoutingMethodType
from tests.twins.routing import Choice
from tests.twins.sizes import Sizes

M = RoutingMethodType


def sizes(tokens: int, experts: int, top_k: int, offset: int = 0, local: int = 0) -> Sizes:
    return Sizes(
        tokens=tokens,
        hidden=128,
        inter=128,
        experts=experts,
        top_k=top_k,
        offset=offset,
        local=local or experts,
        activation=ActivationType.Swiglu,
        out_rows=128,
        width=128,
        contract_hidden=128,
        contract_inter=128,
    )


def chosen(method: M, logits: torch.Tensor, top_k: int, **changes: Any) -> Choice:
    tokens, experts = logits.shape
    offset, local = changes.pop("offset", 0), changes.pop("local", 0)
    values = {
        "routing_logits": logits,
        "routing_bias": None,
        "hidden_states": logits,
        "routing_method_type": method,
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        "norm_topk_prob": True,
        **changes,
    }
    return routing.choose(
        Arguments("trtllm_bf16_moe", values), sizes(tokens, experts, top_k, offset, local)
    )


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > -700 else 0.0


def best(keys: list[float], count: int) -> list[int]:
    return sorted(range(len(keys)), key=lambda e: (-keys[e], e))[:count]


def by_hand(method: M, row: list[float], top_k: int) -> tuple[list[int], list[float]]:
    """Methods without bias and groups, in Python floats."""
    top = max(row)
    exp = [math.exp(x - top) for x in row]
    soft = [x / sum(exp) for x in exp]
    sig = [sigma(x) for x in row]
    keys = {M.Default: soft, M.SigmoidRenorm: sig, M.Sigmoid: sig}.get(method, row)
    ids = best(keys, top_k)
    if method is M.Default:
        return ids, [soft[e] for e in ids]
    if method in (M.Renormalize, M.RenormalizeNaive):
        total = sum(exp[e] for e in ids)
        return ids, [exp[e] / total for e in ids]
    if method is M.TopK:
        return ids, [row[e] for e in ids]
    total = sum(sig[e] for e in ids) if method is M.SigmoidRenorm else 1.0
    return ids, [sig[e] / total for e in ids]


UNBIASED = [m for m in M if m not in (M.DeepSeekV3, M.MiniMax2, M.Unspecified)]


@pytest.mark.parametrize("method", UNBIASED)
@pytest.mark.parametrize("shift", [0.0, -8.0])
def test_methods_without_a_bias(method: M, shift: float, seed: int) -> None:
    logits = torch.randn(40, 32) * 2 + shift
    top_k = 1 if method is M.Llama4 else 5
    got = chosen(method, logits, top_k)
    for token, row in enumerate(logits.tolist()):
        ids, weights = by_hand(method, row, top_k)
        assert got.ids[token].tolist() == ids
        assert torch.allclose(got.weights[token], torch.tensor(weights), rtol=8e-3, atol=1e-6)
    assert torch.equal(got.weights, got.weights.bfloat16().float())


@pytest.mark.parametrize("method", [M.MiniMax2, M.DeepSeekV3])
@pytest.mark.parametrize("groups", [None, 1])
def test_the_bias_selects_and_the_sigmoid_weighs(method: M, groups: int | None, seed: int) -> None:
    logits, bias = torch.randn(40, 32), torch.randn(32) * 3
    top = None if groups is None else 1
    group = {"n_group": groups, "topk_group": top}
    got = chosen(method, logits, 4, routing_bias=bias, routed_scaling_factor=2.5, **group)
    for token, row in enumerate(logits.tolist()):
        scores = [sigma(x) for x in row]
        ids = best([s + b for s, b in zip(scores, bias.tolist(), strict=True)], 4)
        total = sum(scores[e] for e in ids)
        assert got.ids[token].tolist() == ids
        weights = torch.tensor([2.5 * scores[e] / total for e in ids])
        assert torch.allclose(got.weights[token], weights, rtol=8e-3)


@pytest.mark.parametrize("with_bias", [True, False])
def test_grouped_deepseek(with_bias: bool, seed: int) -> None:
    logits = torch.randn(40, 32)
    bias = torch.randn(32).bfloat16().float() if with_bias else None
    group = {"n_group": 4, "topk_group": 2}
    got = chosen(M.DeepSeekV3, logits, 5, routing_bias=bias, **group)
    for token, row in enumerate(logits.tolist()):
        scores = [sigma(x) for x in row]
        added = [0.0] * 32 if bias is None else bias.tolist()
        keys = [s + b for s, b in zip(scores, added, strict=True)]
        value = [sum(sorted(keys[g * 8 : g * 8 + 8])[-2:]) for g in range(4)]
        kept = best(value, 2)
        masked = [key if e // 8 in kept else -math.inf for e, key in enumerate(keys)]
        assert got.ids[token].tolist() == best(masked, 5)


def test_grouped_deepseek_rounds_its_bias_to_bf16() -> None:
    logits = torch.zeros(1, 8)
    bias = torch.tensor([1.0, 1.0 + 2**-10, 0, 0, 0, 0, 0, 0])
    group = {"n_group": 2, "topk_group": 2}
    assert chosen(M.DeepSeekV3, logits, 1, routing_bias=bias, **group).ids.item() == 0
    assert chosen(M.DeepSeekV3, logits, 1, routing_bias=bias).ids.item() == 1


@pytest.mark.parametrize("method", UNBIASED)
def test_ties_go_to_the_lower_index(method: M) -> None:
    top_k = 1 if method is M.Llama4 else 4
    got = chosen(method, torch.full((3, 16), -40.0), top_k)
    assert got.ids.tolist() == [list(range(top_k))] * 3
    assert not bool(got.weights.isnan().any())


def test_negative_zero_ranks_below_zero_by_logit_alone() -> None:
    logits = torch.tensor([[-0.0, 0.0, -1.0, -1.0]])
    assert chosen(M.Renormalize, logits, 1).ids.item() == 1
    assert chosen(M.Sigmoid, logits, 1).ids.item() == 0


def test_saturated_sigmoids_tie_but_logits_do_not() -> None:
    logits = torch.tensor([[40.0, 50.0, 60.0, -1.0]])
    assert chosen(M.Sigmoid, logits, 1).ids.item() == 0
    assert chosen(M.TopKSigmoid, logits, 1).ids.item() == 2


def test_nan_logits_as_the_kernels_rank_them() -> None:
    logits = torch.tensor([[1.0, math.nan, math.inf, 0.0]])
    assert chosen(M.TopK, logits, 1).ids.item() == 1
    default = chosen(M.Default, logits, 2)
    assert default.ids.tolist() == [[0, 1]] and bool(default.weights.isnan().all())


def test_the_factor_is_ignored_but_for_the_sigmoid_bias(seed: int) -> None:
    logits = torch.randn(4, 8)
    for method in UNBIASED:
        top_k = 1 if method is M.Llama4 else 2
        plain = chosen(method, logits, top_k).weights
        assert torch.equal(chosen(method, logits, top_k, routed_scaling_factor=2.5).weights, plain)


def test_norm_topk_prob_is_read_by_sigmoid_renorm_only(seed: int) -> None:
    logits = torch.randn(4, 8)
    off = chosen(M.SigmoidRenorm, logits, 3, norm_topk_prob=False).weights
    assert torch.equal(off, chosen(M.Sigmoid, logits, 3).weights)
    assert torch.equal(
        chosen(M.Renormalize, logits, 3, norm_topk_prob=False).weights,
        chosen(M.Renormalize, logits, 3).weights,
    )


@pytest.mark.parametrize("tokens", [1, 3, 4, 9])
def test_llama4_with_a_range_and_few_tokens_reads_the_wrong_expert(tokens: int) -> None:
    logits = torch.zeros(tokens, 16)
    logits[:, 10] = 5.0
    got = chosen(M.Llama4, logits, 1, offset=8, local=8).local
    assert set(got.flatten().tolist()) == ({10} if tokens <= 3 else {2})
    whole = chosen(M.Llama4, logits, 1).local
    assert set(whole.flatten().tolist()) == {10}


def test_llama4_bug_reaches_the_output(seed: int) -> None:
    native = FORMATS["bf16"](seed).held(2, 6)
    logits = torch.zeros(6, EXPERTS)
    logits[:, 3] = 5.0
    held = {"local_expert_offset": 2, "local_num_experts": 6, "top_k": 1}
    arguments = {**held, "routing_method_type": M.Llama4}
    right = call(native, "", routing_logits=logits, **arguments)
    few = native.shared["hidden_states"][:3].contiguous()
    wrong = call(native, "", routing_logits=logits[:3], hidden_states=few, **arguments)
    assert not torch.allclose(right[:3].float(), wrong.float(), atol=0.1)
    logits[:, 7] = 9.0  # global 7 is past the six experts held
    assert bool(
        call(native, "", routing_logits=logits[:3], hidden_states=few, **arguments).isnan().all()
    )


def test_replay_holds_the_chosen_ids(seed: int) -> None:
    replay = torch.full((12, 2), -7, dtype=torch.int16)
    native = FORMATS["bf16"](seed)
    logits = torch.randn(6, EXPERTS)
    call(native, "", routing_logits=logits, routing_replay_out=replay)
    assert replay[:6].tolist() == logits.topk(2, dim=1).indices.tolist()
    assert bool((replay[6:] == -7).all())


LIMITS = [
    (M.Default, 256, 8, True),
    (M.Default, 257, 8, False),
    (M.Default, 256, 9, False),
    (M.Renormalize, 2048, 32, True),
    (M.RenormalizeNaive, 2048, 33, False),
    (M.TopK, 260, 1, False),
    (M.SigmoidRenorm, 256, 8, True),
    (M.Sigmoid, 512, 8, False),
    (M.TopKSigmoid, 256, 9, False),
    (M.MiniMax2, 512, 22, True),
    (M.MiniMax2, 1024, 32, True),
    (M.MiniMax2, 1028, 8, False),
    (M.DeepSeekV3, 1024, 32, True),
    (M.DeepSeekV3, 1024, 33, False),
    (M.Llama4, 128, 1, True),
    (M.Llama4, 129, 1, False),
    (M.Llama4, 128, 2, False),
]


@pytest.mark.parametrize(("method", "experts", "top_k", "fits"), LIMITS)
def test_tiers(method: M, experts: int, top_k: int, fits: bool) -> None:
    none = limits.Groups(0, 0)
    size = sizes(1, experts, top_k)
    if fits:
        limits.check_logits(method, size, none)
    else:
        with pytest.raises(ContractError):
            limits.check_logits(method, size, none)


GROUPED = [
    (256, 8, 8, 4, None),
    (256, 8, 8, 5, "topk_group"),
    (256, 8, 9, 4, "n_group"),
    (260, 8, 8, 4, "n_group"),
    (256, 8, 4, 2, "n_group"),  # 64 experts a group
    (256, 9, 8, 4, "top_k"),
    (256, 8, 8, 0, "topk_group"),
    (32, 8, 8, 2, "top_k"),  # 8 of 8
    (30, 4, 2, 2, "num_experts"),
]


@pytest.mark.parametrize(("experts", "top_k", "count", "kept", "argument"), GROUPED)
def test_group_limits(experts: int, top_k: int, count: int, kept: int, argument: str) -> None:
    group, size = limits.Groups(count, kept), sizes(1, experts, top_k)
    if argument is None:
        limits.check_logits(M.DeepSeekV3, size, group)
        return
    with pytest.raises(ContractError) as refused:
        limits.check_logits(M.DeepSeekV3, size, group)
    assert refused.value.argument == argument


@pytest.mark.parametrize("method", [M.MiniMax2, M.DeepSeekV3])
def test_a_null_bias_is_dereferenced(method: M) -> None:
    with pytest.raises(ContractError, match="routing_bias"):
        chosen(method, torch.zeros(1, 8), 1)


@pytest.mark.parametrize("method", sorted(limits.WITHOUT_GROUPS))
def test_groups_are_for_deepseek(method: M) -> None:
    with pytest.raises(ContractError, match="n_group"):
        limits.check_logits(method, sizes(1, 8, 1), limits.Groups(2, 1))
