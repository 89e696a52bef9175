"""Tiny whole models with random weights, written as released checkpoints are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.errors import InvalidArgument
from expertd.weights.quantize import quantize_matrix
from expertd.weights.writer import new_directory, write_json, write_shards

HIDDEN, EXPERTS, TOP_K, WIDTH, LAYERS, VOCABULARY = 256, 32, 4, 128, 2, 512

COMMON: dict[str, Any] = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": 512,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": WIDTH,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": TOP_K,
    "num_hidden_layers": LAYERS,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY,
}

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Demo:
    """A family's demo: its config and the tensors of a layer, experts aside."""

    config: dict[str, Any]
    linears: Shapes
    norms: Shapes
    router: Shapes


DEMOS = {
    "qwen3_moe": Demo(
        config={
            "architectures": ["Qwen3MoeForCausalLM"],
            "decoder_sparse_step": 1,
            "head_dim": 64,
            "mlp_only_layers": [],
            "model_type": "qwen3_moe",
            "num_experts": EXPERTS,
            "num_key_value_heads": 2,
        },
        linears={
            "self_attn.q_proj": (256, HIDDEN),
            "self_attn.k_proj": (128, HIDDEN),
            "self_attn.v_proj": (128, HIDDEN),
            "self_attn.o_proj": (HIDDEN, 256),
        },
        norms={"self_attn.q_norm": (64,), "self_attn.k_norm": (64,)},
        router={"mlp.gate.weight": (EXPERTS, HIDDEN)},
    ),
    "deepseek_v3": Demo(
        config={
            "architectures": ["DeepseekV3ForCausalLM"],
            "first_k_dense_replace": 0,
            "kv_lora_rank": 64,
            "model_type": "deepseek_v3",
            "moe_layer_freq": 1,
            "n_group": 4,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "num_key_value_heads": 4,
            "q_lora_rank": 128,
            "qk_nope_head_dim": 32,
            "qk_rope_head_dim": 64,
            "routed_scaling_factor": 2.5,
            "scoring_func": "sigmoid",
            "topk_group": 2,
            "topk_method": "noaux_tc",
            "v_head_dim": 32,
        },
        linears={
            "self_attn.q_a_proj": (128, HIDDEN),
            "self_attn.q_b_proj": (384, 128),
            "self_attn.kv_a_proj_with_mqa": (128, HIDDEN),
            "self_attn.kv_b_proj": (256, 64),
            "self_attn.o_proj": (HIDDEN, 128),
            "mlp.shared_experts.gate_proj": (WIDTH, HIDDEN),
            "mlp.shared_experts.up_proj": (WIDTH, HIDDEN),
            "mlp.shared_experts.down_proj": (HIDDEN, WIDTH),
        },
        norms={"self_attn.q_a_layernorm": (128,), "self_attn.kv_a_layernorm": (64,)},
        router={
            "mlp.gate.weight": (EXPERTS, HIDDEN),
            "mlp.gate.e_score_correction_bias": (EXPERTS,),
        },
    ),
}
"""Every family that a demo can be made of."""

FP8_CONFIG = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "modules_to_not_convert": ["lm_head"],
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}


def write_demo(
    out: Path, family: str = "qwen3_moe", quant: str = "fp8_block128", seed: int = 0
) -> None:
    """Write the demo model of a family; equal arguments give equal bytes.

    Raises InvalidArgument for a family or scheme without a demo, or when out exists.
    """
    demo, linear = _choice("family", DEMOS, family), _choice("quant", LINEARS, quant)
    config = COMMON | demo.config
    if quant == "fp8_block128":
        config["quantization_config"] = FP8_CONFIG
    random = torch.Generator().manual_seed(seed)
    with new_directory(out) as directory:
        shards = [_layer(demo, layer, linear, random) for layer in range(LAYERS)]
        shards[0]["model.embed_tokens.weight"] = _normal((VOCABULARY, HIDDEN), random).bfloat16()
        shards[-1]["lm_head.weight"] = _normal((VOCABULARY, HIDDEN), random).bfloat16()
        shards[-1]["model.norm.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
        write_shards(directory, shards)
        write_json(directory / "config.json", config)


def _choice(what: str, known: dict[str, Any], given: str) -> Any:
    if given not in known:
        raise InvalidArgument(f"{what} {given!r} has no demo; those that have: {', '.join(known)}")
    return known[given]


Linear = Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]


def _layer(demo: Demo, layer: int, linear: Linear, random: torch.Generator) -> dict[str, Tensor]:
    """Every tensor of a layer, by its full name."""
    prefix = f"model.layers.{layer}."
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), **demo.norms}
    tensors = {
        f"{prefix}{name}.weight": torch.ones(shape).bfloat16() for name, shape in norms.items()
    }
    for name, shape in demo.router.items():
        dtype = torch.bfloat16 if name.endswith("weight") else torch.float32
        tensors[prefix + name] = _normal(shape, random).to(dtype)
    for name, shape in (demo.linears | _experts()).items():
        tensors |= dict(linear(prefix + name, _normal(shape, random)))
    return tensors


def _experts() -> Shapes:
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    return {f"mlp.experts.{e}.{name}": shapes[name] for e in range(EXPERTS) for name in shapes}


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Normal numbers that keep a row's size when it is multiplied with them."""
    return torch.randn(shape, generator=random) / math.sqrt(shape[-1])


def _bf16(name: str, w: Tensor) -> Iterator[tuple[str, Tensor]]:
    yield f"{name}.weight", w.bfloat16()


def _fp8_block128(name: str, w: Tensor) -> Iterator[tuple[str, Tensor]]:
    matrix = quantize_matrix(w, QuantScheme.FP8_BLOCK128, w.abs().amax())
    assert matrix.scale is not None
    yield f"{name}.weight", matrix.codes
    yield f"{name}.weight_scale_inv", matrix.scale


LINEARS: dict[str, Linear] = {"fp8_block128": _fp8_block128, "bf16": _bf16}
"""Every scheme that a demo can be written in."""
