"""What transformers' own MoE block answers for a layer of a checkpoint on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CONFIG_MAPPING
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

BLOCKS: dict[str, Any] = {"qwen3_moe": Qwen3MoeSparseMoeBlock, "deepseek_v3": DeepseekV3MoE}


class Nothing(nn.Module):
    """Stands for the shared experts, which are the caller's."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)


def block_output(path: Path, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The block's float32 output for rows [T, H], and its router's logits [T, E]."""
    settings = json.loads((path / "config.json").read_text())
    settings.pop("quantization_config", None)
    config = CONFIG_MAPPING[settings["model_type"]](**settings)
    config._experts_implementation = "eager"
    block = BLOCKS[config.model_type](config)
    if hasattr(block, "shared_experts"):
        block.shared_experts = Nothing()
    block.load_state_dict(state_of(tensors_of(path), f"model.layers.{layer}.mlp."))
    with torch.inference_mode():
        return block(rows[None])[0], block.gate(rows)[0]


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Every tensor in float32; fp8 ones multiplied with the scale of their 128x128 block."""
    raw: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        raw |= load_file(file)
    plain = {name: tensor.float() for name, tensor in raw.items() if "scale_inv" not in name}
    for name in plain:
        scale = raw.get(f"{name}_scale_inv")
        if scale is not None:
            rows, columns = plain[name].shape
            wide = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
            plain[name] = plain[name] * wide
    return plain


def state_of(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The routed block's state: experts stacked, gate above up, as transformers holds them."""
    own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    count = 1 + max(int(name.split(".")[1]) for name in own if name.startswith("experts."))

    def stacked(name: str) -> Tensor:
        return torch.stack([own[f"experts.{e}.{name}.weight"] for e in range(count)])

    state = {name: tensor for name, tensor in own.items() if name.startswith("gate.")}
    state["experts.gate_up_proj"] = torch.cat([stacked("gate_proj"), stacked("up_proj")], dim=1)
    state["experts.down_proj"] = stacked("down_proj")
    return state
