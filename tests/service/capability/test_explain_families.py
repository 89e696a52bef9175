"""expertd explain names the method of every family, from a checkpoint as transformers saves it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.strategies import saved

from expertd.cli import main
from expertd.core import RoutingMethod
from expertd.weights.tiny import TINY, Tiny

M = RoutingMethod
BY_TYPE = {model.model_type: model for model in TINY}
METHODS: list[tuple[str, dict[str, Any], M]] = [
    ("deepseek_v3", {}, M.DEEPSEEK_V3),
    ("kimi_linear", {}, M.DEEPSEEK_V3),
    ("glm4_moe", {}, M.DEEPSEEK_V3),
    ("nemotron_h", {}, M.DEEPSEEK_V3),
    ("dots1", {}, M.DEEPSEEK_V3),
    ("minimax_m2", {}, M.MINIMAX2),
    ("minimax_m3_vl", {}, M.MINIMAX2),
    ("step3p7", {}, M.MINIMAX2),
    ("afmoe", {}, M.MINIMAX2),
    ("hy_v3", {}, M.MINIMAX2),
    ("qwen3_moe", {"norm_topk_prob": True}, M.RENORMALIZE_NAIVE),
    ("qwen3_next", {"norm_topk_prob": True}, M.RENORMALIZE_NAIVE),
    ("qwen3_5_moe", {}, M.RENORMALIZE_NAIVE),
    ("mixtral", {}, M.RENORMALIZE_NAIVE),
    ("hunyuan_v1_moe", {}, M.RENORMALIZE_NAIVE),
    ("olmoe", {"norm_topk_prob": False}, M.DEFAULT),
    ("qwen2_moe", {"norm_topk_prob": False}, M.DEFAULT),
    ("qwen3_moe", {"norm_topk_prob": False}, M.DEFAULT),
    ("gpt_oss", {}, M.RENORMALIZE),
    ("granitemoe", {}, M.RENORMALIZE),
    ("cohere2_moe", {"expert_selection_fn": "softmax"}, M.RENORMALIZE),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": True}, M.SIGMOID_RENORM),
    ("cohere2_moe", {"expert_selection_fn": "sigmoid", "norm_topk_prob": False}, M.TOPK_SIGMOID),
    ("llama4", {}, M.LLAMA4),
    (
        "deepseek_v2",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
        M.GROUPED_SOFTMAX,
    ),
    ("deepseek_v2", {"topk_method": "greedy"}, M.DEFAULT),
    ("ernie4_5_moe", {}, M.SOFTMAX_BIAS),
    ("deepseek_v4", {"mlp_layer_types": ["moe", "moe", "moe"]}, M.DEEPSEEK_V4),
]


def explained(root: Path, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    capsys.readouterr()
    code = main(["explain", "--model", str(root), "--device", "cpu", "--json"])
    said = capsys.readouterr()
    assert code == 0, said.err or said.out
    layers: list[dict[str, Any]] = json.loads(said.out)["layers"]
    return layers


@pytest.mark.parametrize(("family", "settings", "method"), METHODS, ids=str)
def test_the_method_of_a_family(
    family: str,
    settings: dict[str, Any],
    method: M,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = BY_TYPE[family]
    model = Tiny(family, {**base.settings, **settings}, base.width, base.architecture)
    layers = explained(saved(model, tmp_path / "m"), capsys)
    assert {entry["routing_method"] for entry in layers} == {method}
    assert all(entry["plans"] for entry in layers)


def test_hash_routed_layers_are_explained_by_the_form_that_works(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = saved(BY_TYPE["deepseek_v4"], tmp_path / "m")
    hashed, others = explained(root, capsys)
    assert (hashed["layers"], hashed["routing_method"]) == ("0", None)
    assert "topk_ids" in hashed["routing_refusal"] and hashed["plans"]
    assert (others["layers"], others["routing_method"]) == ("1-2", M.DEEPSEEK_V4)
