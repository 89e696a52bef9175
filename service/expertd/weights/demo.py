"""Tiny whole models with random weights, written as released checkpoints are."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.weights.requantize import quantize_into
from expertd.weights.tiny import TINY, Sizes
from expertd.weights.writer import draft, new_directory, write_json, write_shards

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
"""The families whose demo needs nothing but torch."""

PLAIN_DTYPES = {
    QuantScheme.BF16: torch.bfloat16,
    QuantScheme.FP16: torch.float16,
    QuantScheme.FP32: torch.float32,
}
SIZES = Sizes(hidden=HIDDEN, width=WIDTH, experts=EXPERTS, top_k=TOP_K)


def write_demo(
    out: Path, family: str = "qwen3_moe", quant: str = "fp8_block128", seed: int = 0
) -> None:
    """Write the demo model of a family; equal arguments give equal bytes.

    Families other than those of DEMOS are built by transformers. Raises InvalidArgument for a
    family or scheme that there is not, or when out exists; FailedPrecondition for a scheme that the
    family has no layout for, or without transformers.
    """
    scheme = _scheme(quant)
    dtype = PLAIN_DTYPES.get(scheme, torch.bfloat16)
    with new_directory(out) as directory:
        if scheme in PLAIN_DTYPES:
            _write_plain(directory, family, dtype, seed)
            return
        with draft(out) as plain:
            _write_plain(plain, family, dtype, seed)
            quantize_into(plain, directory, scheme)


def _scheme(quant: str) -> QuantScheme:
    try:
        return QuantScheme(quant)
    except ValueError:
        known = ", ".join(QuantScheme)
        raise InvalidArgument(f"quant {quant!r} is not one of {known}") from None


def _write_plain(directory: Path, family: str, dtype: torch.dtype, seed: int) -> None:
    if family in DEMOS:
        _write_own(directory, DEMOS[family], dtype, seed)
    else:
        _write_built(directory, family, dtype, seed)


def _write_built(directory: Path, family: str, dtype: torch.dtype, seed: int) -> None:
    """A model that transformers builds and saves."""
    tiny = next((tiny for tiny in TINY if tiny.model_type == family), None)
    if tiny is None:
        known = ", ".join(sorted({*DEMOS, *map(str, TINY)}))
        raise InvalidArgument(f"family {family!r} has no demo; those that have: {known}")
    if importlib.util.find_spec("transformers") is None:
        raise FailedPrecondition(
            f"the demo of {family} is built by transformers, which is not installed: "
            'pip install "expertd[transformers]"'
        )
    model: Any = tiny.build(SIZES, seed).to(dtype)
    model.save_pretrained(directory)


def _write_own(directory: Path, demo: Demo, dtype: torch.dtype, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    shards = [_layer(demo, layer, dtype, random) for layer in range(LAYERS)]
    shards[0]["model.embed_tokens.weight"] = _normal((VOCABULARY, HIDDEN), random).to(dtype)
    shards[-1]["lm_head.weight"] = _normal((VOCABULARY, HIDDEN), random).to(dtype)
    shards[-1]["model.norm.weight"] = torch.ones(HIDDEN, dtype=dtype)
    write_shards(directory, shards)
    name = str(dtype).removeprefix("torch.")
    write_json(directory / "config.json", COMMON | demo.config | {"torch_dtype": name})


def _layer(
    demo: Demo, layer: int, dtype: torch.dtype, random: torch.Generator
) -> dict[str, Tensor]:
    """Every tensor of a layer, by its full name."""
    norms = {"input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,), **demo.norms}
    tensors = {f"{name}.weight": torch.ones(shape, dtype=dtype) for name, shape in norms.items()}
    for name, shape in demo.router.items():
        kept = torch.float32 if name.endswith("bias") else dtype
        tensors[name] = _normal(shape, random).to(kept)
    for name, shape in (demo.linears | _experts()).items():
        tensors[f"{name}.weight"] = _normal(shape, random).to(dtype)
    return {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()}


def _experts() -> Shapes:
    first, second = (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    shapes = {"gate_proj": first, "up_proj": first, "down_proj": second}
    return {f"mlp.experts.{e}.{name}": shapes[name] for e in range(EXPERTS) for name in shapes}


def _normal(shape: tuple[int, ...], random: torch.Generator) -> Tensor:
    """Normal numbers that keep a row's size when it is multiplied with them."""
    return torch.randn(shape, generator=random) / math.sqrt(shape[-1])
