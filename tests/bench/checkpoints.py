"""Checkpoints of one layer with random weights, in the names and formats of released models."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from tests.bench.load_layer import CONFIG

from expertd.weights.writer import write_json, write_shards


class Sizes(NamedTuple):
    """A layer's experts and their widths; every call chooses eight."""

    experts: int
    hidden: int
    width: int


QWEN, DEEPSEEK = Sizes(128, 2048, 768), Sizes(256, 7168, 2048)
QWEN_CONFIG = {
    "model_type": "qwen3_moe",
    "num_experts_per_tok": 8,
    "num_hidden_layers": 1,
    "norm_topk_prob": True,
    "hidden_act": "silu",
}


def write_qwen(out: Path, layer: Sizes) -> None:
    """A layer of random bf16 weights in Qwen3's names."""
    up, down = (layer.width, layer.hidden), (layer.hidden, layer.width)
    tensors = {
        f"model.layers.0.mlp.experts.{n}.{name}.weight": torch.randn(shape).mul(0.02).bfloat16()
        for n in range(layer.experts)
        for name, shape in {"gate_proj": up, "up_proj": up, "down_proj": down}.items()
    }
    sizes = {
        "hidden_size": layer.hidden,
        "moe_intermediate_size": layer.width,
        "num_experts": layer.experts,
    }
    out.mkdir()
    write_json(out / "config.json", QWEN_CONFIG | sizes)
    write_shards(out, [tensors])


def write_deepseek(out: Path, layer: Sizes) -> None:
    """A layer of random codes of both signs: weights of one sign are far from any model's."""
    experts, hidden, width = layer
    codes = torch.randint(0, 120, (hidden * width * 2,), dtype=torch.uint8)
    codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8) << 7
    shapes = {
        "gate_proj": (width, hidden),
        "up_proj": (width, hidden),
        "down_proj": (hidden, width),
    }
    shards: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    for expert in range(experts):
        for name, (n, k) in shapes.items():
            begin = (expert * 4099 + len(name)) % (hidden * width)
            weight = codes[begin : begin + n * k].view(n, k).view(torch.float8_e4m3fn)
            held, name = (
                shards[expert * 4 // experts],
                f"model.layers.0.mlp.experts.{expert}.{name}",
            )
            held[f"{name}.weight"] = weight.clone()
            held[f"{name}.weight_scale_inv"] = torch.full((n // 128, k // 128), 2.0**-12)
    shards[0]["model.layers.0.mlp.gate.e_score_correction_bias"] = torch.zeros(experts)
    out.mkdir()
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "n_routed_experts": experts}
    write_json(out / "config.json", CONFIG | sizes)
    write_shards(out, shards)
