"""Names of released checkpoints that transformers does not write itself, spelled out one by one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.core import ActivationKind
from expertd.errors import FailedPrecondition
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.writer import write_json, write_shards

EXPERTS, HIDDEN, WIDTH = 4, 64, 32
TEXT = {
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "norm_topk_prob": True,
}
Matrices = dict[str, Tensor]


def matrices(hidden: int = HIDDEN) -> Matrices:
    """gate and up [E, I, H], down [E, H, I]; no two values alike."""
    sizes = {"gate": (WIDTH, hidden), "up": (WIDTH, hidden), "down": (hidden, WIDTH)}
    values = {name: torch.randn(EXPERTS, *size) for name, size in sizes.items()}
    return values


def each(prefix: str, gate: str, up: str, down: str) -> Callable[[Matrices], Matrices]:
    """A tensor for every matrix of every expert."""
    names = {"gate": gate, "up": up, "down": down}
    return lambda held: {
        f"{prefix}.{e}.{names[key]}.weight": held[key][e].clone()
        for key in names
        for e in range(EXPERTS)
    }


def bias(name: str) -> Matrices:
    return {name: torch.linspace(-1, 1, EXPERTS)}


def step(held: Matrices) -> Matrices:
    return {f"model.layers.3.moe.{key}_proj.weight": held[key] for key in held} | bias(
        "model.layers.3.moe.router_bias"
    )


def vl_transposed(held: Matrices) -> Matrices:
    both = torch.cat([held["gate"], held["up"]], 1)
    prefix = "model.language_model.layers.3.mlp.experts"
    return {
        f"{prefix}.gate_up_proj": both.transpose(1, 2).contiguous(),
        f"{prefix}.down_proj": held["down"].transpose(1, 2).contiguous(),
    }


def vl_as_saved(held: Matrices) -> Matrices:
    prefix = "model.language_model.layers.3.mlp.experts"
    both = torch.cat([held["gate"], held["up"]], 1)
    return {f"{prefix}.gate_up_proj": both, f"{prefix}.down_proj": held["down"]}


M3 = "language_model.model.layers.3.block_sparse_moe"
PROJ = ("gate_proj", "up_proj", "down_proj")
DEEPSEEK = {"n_group": 1, "topk_group": 1, "n_routed_experts": EXPERTS}
CASES: dict[str, tuple[dict[str, Any], Callable[[Matrices], Matrices]]] = {
    "step3p7": (
        {"model_type": "step3p7", "text_config": TEXT | {
            "model_type": "step3p5", "moe_num_experts": EXPERTS, "moe_top_k": 2,
            "moe_intermediate_size": WIDTH, "swiglu_limits": [0.0, 0.0, 0.0, 7.0],
        }},
        step,
    ),
    "minimax_m3_vl": (
        {"model_type": "minimax_m3_vl", "text_config": TEXT | {
            "model_type": "minimax_m3_vl_text", "num_local_experts": EXPERTS,
            "intermediate_size": WIDTH,
        }},
        lambda held: each(f"{M3}.experts", "w1", "w3", "w2")(held)
        | bias(f"{M3}.e_score_correction_bias"),
    ),
    "kimi_k25": (
        {"model_type": "kimi_k25", "text_config": TEXT | DEEPSEEK | {
            "model_type": "kimi_k2", "moe_intermediate_size": WIDTH,
        }},
        lambda held: each("language_model.model.layers.3.mlp.experts", *PROJ)(held)
        | bias("language_model.model.layers.3.mlp.gate.e_score_correction_bias"),
    ),
    "kimi_k25 as saved": (
        {"model_type": "kimi_k25", "text_config": TEXT | DEEPSEEK | {
            "model_type": "deepseek_v3", "moe_intermediate_size": WIDTH,
        }},
        lambda held: each("language_model.model.blocks.3.mlp.experts", *PROJ)(held)
        | bias("language_model.model.blocks.3.mlp.gate.e_score_correction_bias"),
    ),
    "llama4 unfused": (
        {"model_type": "llama4", "text_config": TEXT | {
            "model_type": "llama4_text", "num_local_experts": EXPERTS, "intermediate_size": WIDTH,
            "intermediate_size_mlp": 96, "num_experts_per_tok": 1,
        }},
        each("language_model.model.layers.3.feed_forward.experts", *PROJ),
    ),
    "qwen3_vl_moe": (
        {"model_type": "qwen3_vl_moe", "text_config": TEXT | {
            "model_type": "qwen3_vl_moe_text", "num_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
        }},
        vl_transposed,
    ),
    "qwen3_vl_moe as saved": (
        {"model_type": "qwen3_vl_moe", "text_config": TEXT | {
            "model_type": "qwen3_vl_moe_text", "num_local_experts": EXPERTS,
            "moe_intermediate_size": WIDTH,
        }},
        vl_as_saved,
    ),
    "qwen3_next with a layer for further tokens": (
        TEXT | {"model_type": "qwen3_next", "num_experts": EXPERTS, "moe_intermediate_size": WIDTH},
        lambda held: each("model.layers.3.mlp.experts", *PROJ)(held)
        | each("mtp.layers.3.mlp.experts", *PROJ)({key: 0 * held[key] for key in held}),
    ),
}  # fmt: skip


def save(root: Path, config: dict[str, Any], tensors: Matrices) -> Checkpoint:
    root.mkdir()
    write_json(root / "config.json", config)
    write_shards(root, [tensors])
    return Checkpoint.open(root)


@pytest.mark.parametrize("case", CASES)
def test_released_names_are_found(case: str, tmp_path: Path) -> None:
    """HIDDEN is 2 x WIDTH: fused tensors are square, so that shapes alone do not tell rows."""
    config, write = CASES[case]
    held = matrices()
    checkpoint = save(tmp_path / "m", config, write(held))
    specs = layer_specs(checkpoint)
    assert list(specs) == [3]
    weights, correction = load_layer(checkpoint, 3, specs[3], "cpu")
    assert torch.equal(weights.w13, torch.cat([held["up"], held["gate"]], 1))
    assert torch.equal(weights.w2, held["down"])
    routing = specs[3].routing
    assert routing is not None and routing.bias == (correction is not None)
    if correction is not None:
        assert torch.equal(correction, torch.linspace(-1, 1, EXPERTS))


def test_inklings_rows_take_turns_and_its_router_is_the_callers(tmp_path: Path) -> None:
    held = matrices()
    prefix = "model.llm.layers.3.mlp.experts"
    tensors = {
        f"{prefix}.w13_weight": torch.stack([held["gate"], held["up"]], 2).flatten(1, 2),
        f"{prefix}.w2_weight": held["down"],
    }
    text = TEXT | {
        "model_type": "inkling_text",
        "n_routed_experts": EXPERTS,
        "moe_intermediate_size": WIDTH,
    }
    config = {"model_type": "inkling_mm_model", "text_config": text}
    spec = layer_specs(checkpoint := save(tmp_path / "m", config, tensors))[3]
    weights, _ = load_layer(checkpoint, 3, spec, "cpu")
    assert torch.equal(weights.w13, torch.cat([held["up"], held["gate"]], 1))
    assert torch.equal(weights.w2, held["down"])
    assert spec.routing is None and "topk_ids" in str(spec.routing_refusal)


def test_steps_limits_are_each_layers_own(tmp_path: Path) -> None:
    config, write = CASES["step3p7"]
    spec = layer_specs(save(tmp_path / "m", config, write(matrices())))[3]
    assert spec.activation.kind is ActivationKind.SWIGLU_STEP and spec.activation.limit == 7.0


def test_nemotrons_experts_are_as_wide_as_the_latent(tmp_path: Path) -> None:
    held = matrices(hidden=16)
    prefix = "backbone.layers.1.mixer"
    tensors = {
        f"{prefix}.experts.{e}.{key}_proj.weight": held[key][e].clone()
        for key in ("up", "down")
        for e in range(EXPERTS)
    } | bias(f"{prefix}.gate.e_score_correction_bias")
    config = TEXT | DEEPSEEK | {
        "model_type": "nemotron_h", "mlp_hidden_act": "relu2", "moe_intermediate_size": WIDTH,
        "moe_latent_size": 16, "routed_scaling_factor": 5.0,
    }  # fmt: skip
    spec = layer_specs(checkpoint := save(tmp_path / "m", config, tensors))[1]
    assert spec.hidden == 16 and not spec.activation.gated
    weights, _ = load_layer(checkpoint, 1, spec, "cpu")
    assert torch.equal(weights.w13, held["up"]) and torch.equal(weights.w2, held["down"])


def test_infinity_as_transformers_writes_it_is_no_limit(tmp_path: Path) -> None:
    config, write = CASES["step3p7"]
    limits = [{"__float__": "Infinity"}] * 4
    config = config | {"text_config": config["text_config"] | {"swiglu_limits": limits}}
    spec = layer_specs(save(tmp_path / "m", config, write(matrices())))[3]
    assert spec.activation.limit is None


REFUSED = ["longcat_flash", "zaya", "muse_spark", "dbrx", "inkling2", "diffusion_gemma"]


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_served_is_refused_by_name(family: str, tmp_path: Path) -> None:
    checkpoint = save(tmp_path / "m", TEXT | {"model_type": family}, {"x": torch.zeros(1)})
    with pytest.raises(FailedPrecondition, match=family):
        layer_specs(checkpoint)


def test_a_family_of_which_only_the_experts_are_known_takes_topk(tmp_path: Path) -> None:
    config = TEXT | {
        "model_type": "phimoe",
        "num_local_experts": EXPERTS,
        "intermediate_size": WIDTH,
    }
    tensors = each("model.layers.0.block_sparse_moe.experts", "w1", "w3", "w2")(matrices())
    spec = layer_specs(save(tmp_path / "m", config, tensors))[0]
    assert spec.routing is None and spec.routing_refusal is not None
    assert "sparsemixer" in spec.routing_refusal and "topk_ids" in spec.routing_refusal
