"""Small checkpoints, and ways to spoil them."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from expertd.weights.writer import write_json, write_shards

HIDDEN, WIDTH, EXPERTS = 256, 128, 4


def qwen_config(**changes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_moe",
        "hidden_size": HIDDEN,
        "hidden_act": "silu",
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "norm_topk_prob": True,
    } | changes


def qwen_layer(layer: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    prefix = f"model.layers.{layer}.mlp.experts"
    return {
        f"{prefix}.{e}.{name}.weight": torch.randn(shape, generator=random).to(dtype)
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }


def qwen(out: Path, **config: Any) -> Path:
    """Two MoE layers of four bfloat16 experts, one shard each."""
    out.mkdir(parents=True)
    write_json(out / "config.json", qwen_config(**config))
    write_shards(out, [qwen_layer(0, 10), qwen_layer(1, 11)])
    return out


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite a safetensors file after changing the tensors of it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def edit_header(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the JSON header of a safetensors file, leaving its data as it is."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


PLAIN_PARTS = {"weight": ("BF16", 1)}
NVFP4_PARTS = {
    "weight": ("U8", 2),
    "weight_scale": ("F8_E4M3", 16),
    "weight_scale_2": ("F32", 0),
    "input_scale": ("F32", 0),
}
INT4_PARTS = {"weight_packed": ("I32", 8), "weight_scale": ("BF16", 32)}
ITEM_BYTES = {"BF16": 2, "U8": 1, "F8_E4M3": 1, "F32": 4, "I32": 4}


def large(
    out: Path, experts: int = 64, parts: Mapping[str, tuple[str, int]] = PLAIN_PARTS, **config: Any
) -> Path:
    """One layer of zeros in a sparse file, 600 MB of it by default.

    parts: each part's dtype and how many columns share one of its elements, 0 for all of a matrix.
    """
    hidden, width = 1024, 1536
    header: dict[str, Any] = {}
    end = 0
    for e in range(experts):
        for name in ("gate_proj", "up_proj", "down_proj"):
            n, k = (hidden, width) if name == "down_proj" else (width, hidden)
            for part, (dtype, columns) in parts.items():
                shape = [n, k // columns] if columns else []
                begin, end = end, end + ITEM_BYTES[dtype] * prod(shape)
                key = f"model.layers.0.mlp.experts.{e}.{name}.{part}"
                header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    out.mkdir()
    text = json.dumps(header).encode()
    with open(out / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width, "num_experts": experts}
    write_json(out / "config.json", qwen_config(**sizes, num_hidden_layers=1, **config))
    return out
