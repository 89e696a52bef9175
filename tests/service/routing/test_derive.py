"""From settings to a method: a test for every branch, every family of the design, every refusal."""

from __future__ import annotations

from typing import Any

import pytest

from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.routing.derive import BRANCHES, derive_method, family_routing
from expertd.routing.families import FAMILIES, rows_of

# scoring, bias, n_group, renormalize -> method; None stands for both or all.
TREE: list[tuple[str, bool | None, int | None, bool | None, str]] = [
    ("softmax", True, 4, None, "Unspecified"),
    ("softmax", True, 1, None, "SoftmaxBias"),
    ("softmax", True, None, None, "SoftmaxBias"),
    ("softmax", False, 4, None, "GroupedSoftmax"),
    ("softmax", False, 1, True, "RenormalizeNaive"),
    ("softmax", False, None, True, "RenormalizeNaive"),
    ("softmax", False, None, False, "Default"),
    ("softmax", False, 1, False, "Default"),
    ("sigmoid", None, 8, None, "DeepSeekV3"),
    ("sigmoid", True, 1, None, "DeepSeekV3"),
    ("sigmoid", True, None, True, "MiniMax2"),
    ("sigmoid", True, None, False, "DeepSeekV3"),
    ("sigmoid", False, None, True, "SigmoidRenorm"),
    ("sigmoid", False, 1, True, "SigmoidRenorm"),
    ("sigmoid", False, None, False, "Sigmoid"),
    ("sqrtsoftplus", None, 4, None, "Unspecified"),
    ("sqrtsoftplus", None, 1, None, "DeepSeekV4"),
    ("sqrtsoftplus", None, None, None, "DeepSeekV4"),
]


def both(value: bool | None) -> tuple[bool, ...]:
    return (True, False) if value is None else (value,)


@pytest.mark.parametrize("branch", TREE, ids=str)
def test_branch(branch: tuple[str, bool | None, int | None, bool | None, str]) -> None:
    scoring, bias, n_group, renormalize, method = branch
    for with_bias in both(bias):
        for renorm in both(renormalize):
            derived = derive_method(scoring, renormalize=renorm, bias=with_bias, n_group=n_group)
            assert derived == method


def test_every_branch_is_reached() -> None:
    reached = set()
    for scoring, bias, n_group, renormalize, _ in TREE:
        groups = "many" if (n_group or 0) > 1 else "one" if n_group == 1 else "none"
        for given in ((scoring, b, groups, r) for b in both(bias) for r in both(renormalize)):
            fits = (
                all(want in (None, have) for want, have in zip(branch[:4], given, strict=True))
                for branch in BRANCHES
            )
            reached.add(list(fits).index(True))
    assert reached == set(range(len(BRANCHES)))


def test_unknown_scoring() -> None:
    with pytest.raises(InvalidArgument, match="accepted: softmax, sigmoid, sqrtsoftplus"):
        derive_method("softmin")


# Keys as the released checkpoints have them -> what the design says.
RELEASED: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (
        {
            "model_type": "deepseek_v3",
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        {
            "method": "DeepSeekV3",
            "n_group": 8,
            "topk_group": 4,
            "routed_scaling_factor": 2.5,
            "bias": True,
            "eps": None,
        },
    ),
    (
        {
            "model_type": "kimi_k2",
            "num_experts_per_tok": 8,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
        },
        {"method": "DeepSeekV3", "n_group": 1, "routed_scaling_factor": 2.827},
    ),
    (
        {
            "model_type": "kimi_k25",
            "text_config": {
                "model_type": "kimi_k2",
                "n_group": 1,
                "topk_group": 1,
                "num_experts_per_tok": 8,
                "routed_scaling_factor": 2.827,
            },
        },
        {"method": "DeepSeekV3", "routed_scaling_factor": 2.827},
    ),
    (
        {
            "model_type": "kimi_linear",
            "num_experts_per_token": 8,
            "num_expert_group": 1,
            "topk_group": 1,
            "moe_renormalize": True,
            "routed_scaling_factor": 2.446,
        },
        {"method": "DeepSeekV3", "top_k": 8, "routed_scaling_factor": 2.446},
    ),
    (
        {
            "model_type": "nemotron_h",
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_groups": 8,
        },
        {"method": "DeepSeekV3", "n_group": 1, "routed_scaling_factor": 2.5},
    ),
    (
        {"model_type": "minimax_m2", "num_experts_per_tok": 8, "scoring_func": "sigmoid"},
        {"method": "MiniMax2", "eps": 0.0, "routed_scaling_factor": 1.0},
    ),
    (
        {
            "model_type": "minimax_m3_vl",
            "text_config": {"num_experts_per_tok": 4, "routed_scaling_factor": 2.0},
        },
        {"method": "MiniMax2", "eps": 0.0, "scale_site": "output", "routed_scaling_factor": 2.0},
    ),
    (
        {"model_type": "step3p5", "moe_top_k": 8, "moe_router_scaling_factor": 3.0},
        {"method": "MiniMax2", "top_k": 8, "routed_scaling_factor": 3.0, "scale_site": "output"},
    ),
    (
        {"model_type": "afmoe", "num_experts_per_tok": 8, "route_scale": 2.826, "n_group": 1},
        {"method": "MiniMax2", "routed_scaling_factor": 2.826, "eps": None, "n_group": None},
    ),
    (
        {"model_type": "hy_v3", "num_experts_per_tok": 8, "router_scaling_factor": 2.826},
        {"method": "MiniMax2", "routed_scaling_factor": 2.826},
    ),
    (
        {
            "model_type": "qwen3_moe",
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        },
        {"method": "RenormalizeNaive", "bias": False},
    ),
    ({"model_type": "qwen3_moe", "num_experts_per_tok": 8}, {"method": "Default"}),
    (
        {
            "model_type": "qwen3_5_moe",
            "text_config": {"model_type": "qwen3_5_moe_text", "num_experts_per_tok": 8},
        },
        {"method": "RenormalizeNaive"},
    ),
    (
        {
            "model_type": "qwen3_omni_moe",
            "thinker_config": {
                "text_config": {
                    "model_type": "qwen3_omni_moe_text",
                    "num_experts_per_tok": 8,
                    "norm_topk_prob": True,
                }
            },
        },
        {"method": "RenormalizeNaive", "top_k": 8},
    ),
    ({"model_type": "mixtral", "num_experts_per_tok": 2}, {"method": "RenormalizeNaive"}),
    ({"model_type": "hunyuan_v1_moe", "moe_topk": [8] * 32}, {"method": "RenormalizeNaive"}),
    ({"model_type": "gpt_oss", "experts_per_token": 4}, {"method": "Renormalize", "bias": False}),
    (
        {
            "model_type": "cohere2_moe",
            "num_experts_per_tok": 8,
            "expert_selection_fn": "sigmoid",
            "norm_topk_prob": True,
        },
        {"method": "SigmoidRenorm", "eps": 0.0},
    ),
    (
        {
            "model_type": "llama4",
            "text_config": {"model_type": "llama4_text", "num_experts_per_tok": 1},
        },
        {"method": "Llama4", "weight_site": "input"},
    ),
    (
        {
            "model_type": "deepseek_v2",
            "num_experts_per_tok": 6,
            "n_group": 8,
            "topk_group": 3,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "norm_topk_prob": True,
        },
        {
            "method": "GroupedSoftmax",
            "renormalize": False,
            "group_fill": 0.0,
            "group_score": "max",
            "routed_scaling_factor": 16.0,
        },
    ),
    (
        {
            "model_type": "deepseek_v2",
            "num_experts_per_tok": 6,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "routed_scaling_factor": 1.0,
        },
        {"method": "Default", "renormalize": False, "n_group": None},
    ),
    (
        {"model_type": "ernie4_5_moe", "moe_k": 6, "moe_norm_min": 1e-9},
        {"method": "SoftmaxBias", "top_k": 6, "eps": 1e-9, "bias": True},
    ),
    (
        {"model_type": "deepseek_v4", "num_experts_per_tok": 6, "scoring_func": "sqrtsoftplus"},
        {"method": "DeepSeekV4", "routed_scaling_factor": 1.5, "scoring": "sqrtsoftplus"},
    ),
    ({"model_type": "lfm2_moe", "num_experts_per_tok": 4}, {"method": "MiniMax2", "eps": 1e-6}),
]


@pytest.mark.parametrize(("config", "told"), RELEASED, ids=lambda v: v.get("model_type", ""))
def test_released_config(config: dict[str, Any], told: dict[str, Any]) -> None:
    spec = family_routing(config)
    assert {field: getattr(spec, field) for field in told} == told


def test_layers_with_a_number_of_their_own() -> None:
    config = {"model_type": "hunyuan_v1_moe", "moe_topk": [2, 4, 8]}
    assert family_routing(config, layer=2).top_k == 8
    for layer in (None, 3):
        with pytest.raises(InvalidArgument, match="moe_topk"):
            family_routing(config, layer)


def test_layers_that_choose_by_token_id() -> None:
    config = {
        "model_type": "deepseek_v4",
        "num_experts_per_tok": 6,
        "mlp_layer_types": ["hash_moe", "moe"],
    }
    assert family_routing(config, 1).method == "DeepSeekV4"
    with pytest.raises(FailedPrecondition, match="layer 0 .* send topk_ids and topk_weights"):
        family_routing(config, 0)


REFUSED = ["longcat_flash", "phimoe", "gemma4", "gemma4_text", "kolibri1", "dbrx", "zaya"]


@pytest.mark.parametrize("model_type", REFUSED)
def test_routers_that_no_method_computes(model_type: str) -> None:
    with pytest.raises(FailedPrecondition, match=f"'{model_type}': .* send topk_ids and topk_weig"):
        family_routing({"model_type": model_type, "num_experts_per_tok": 2})


def test_laguna_with_capped_logits() -> None:
    config = {"model_type": "laguna", "num_experts_per_tok": 8}
    assert family_routing(config).method == "MiniMax2"
    assert family_routing({**config, "moe_router_logit_softcapping": 0}).method == "MiniMax2"
    with pytest.raises(FailedPrecondition, match="capped by a tanh"):
        family_routing({**config, "moe_router_logit_softcapping": 30.0})


def test_unknown_architecture_says_what_a_spec_needs() -> None:
    for config in ({"model_type": "llama"}, {}, {"model_type": ["qwen3_moe"]}):
        with pytest.raises(InvalidArgument) as told:
            family_routing(config)
        for field in (
            "routing",
            "scoring",
            "renormalize",
            "top_k",
            "n_group",
            "topk_group",
            "bias",
            "routed_scaling_factor",
            "qwen3_moe",
        ):
            assert field in str(told.value)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"num_experts_per_tok": None}, "num_experts_per_tok is None"),
    ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0"),
    ({"num_experts_per_tok": "8"}, "num_experts_per_tok='8'"),
    ({"num_experts_per_tok": 2.5}, "num_experts_per_tok=2.5"),
    ({"num_experts_per_tok": True}, "num_experts_per_tok=True"),
    ({"norm_topk_prob": "yes"}, "norm_topk_prob='yes'"),
    ({"norm_topk_prob": 1}, "norm_topk_prob=1"),
    ({"n_group": -8}, "n_group=-8"),
    ({"n_group": 8, "topk_group": 9}, "topk_group=9; accepted: 1..8"),
    ({"routed_scaling_factor": "2"}, "routed_scaling_factor='2'"),
    ({"routed_scaling_factor": float("nan")}, "routed_scaling_factor=nan"),
]


@pytest.mark.parametrize(("change", "text"), WRONG, ids=str)
def test_wrong_settings_are_named(change: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidArgument, match=text):
        family_routing({"model_type": "deepseek_v3", "num_experts_per_tok": 8, **change})


def test_no_groups_may_be_written_as_zero() -> None:
    config = {"model_type": "deepseek_v3", "num_experts_per_tok": 8, "n_group": 0, "topk_group": 0}
    spec = family_routing(config)
    assert (spec.n_group, spec.topk_group, spec.method) == (None, None, "MiniMax2")


def test_settings_that_tell_rows_apart() -> None:
    config = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "topk_method": "noaux_tc"}
    text = "topk_method='noaux_tc'; accepted: topk_method='greedy' or topk_method='group_limited"
    with pytest.raises(InvalidArgument, match=text):
        family_routing(config)
    config = {"model_type": "deepseek_v4", "num_experts_per_tok": 6, "scoring_func": "tanh"}
    with pytest.raises(InvalidArgument, match="tanh"):
        family_routing(config)


def test_rows_of_a_type_are_told_apart() -> None:
    """No type is in two tables by mistake: only the last of its rows may have no condition."""
    for model_type in {name for row in FAMILIES for name in row.model_types}:
        rows = rows_of(model_type)
        assert all(row.when for row in rows[:-1]), model_type
