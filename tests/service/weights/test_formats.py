"""Every stored form, written by the tests' own code, is read as the numbers that it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.service.weights.files import qwen_config
from tests.service.weights.stored import (
    FP8,
    STORED,
    Array,
    compressed,
    modelopt,
    nvfp4,
    oai_mxfp4,
    per_channel,
    per_tensor,
    plain,
)
from torch import Tensor

from expertd.core import Activation, ActivationKind, QuantScheme
from expertd.errors import FailedPrecondition
from expertd.weights.canonical import ExpertWeights
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.dequant import dequantize
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.writer import write_json, write_shards

EXPERTS, HIDDEN, WIDTH = 4, 320, 192  # ragged against 128, whole against 32


def random_matrices(seed: int) -> dict[tuple[int, str], Array]:
    """gate, up and down of each expert, of different magnitudes and no symmetry."""
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    factors = {"gate_proj": 1.0, "up_proj": 7.0, "down_proj": 0.1}
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    return {
        (e, name): (random.standard_normal(shape) * factors[name] * (e + 1)).astype(np.float32)
        for e in range(EXPERTS)
        for name, shape in shapes.items()
    }


def save(out: Path, tensors: dict[str, Tensor], **config: Any) -> Checkpoint:
    out.mkdir()
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_hidden_layers": 1}
    write_json(out / "config.json", qwen_config(**sizes | config))
    write_shards(out, [tensors])
    return Checkpoint.open(out)


def write(
    out: Path, writers: dict[int, Any], quantization: dict[str, Any] | None, **config: Any
) -> tuple[Checkpoint, dict[tuple[int, int, str], Array]]:
    """A checkpoint with a writer for each layer, and what (layer, expert, matrix) means."""
    tensors, meant = {}, {}
    for layer, writer in writers.items():
        for (expert, name), w in random_matrices(layer).items():
            parts, meant[layer, expert, name] = writer(w)
            prefix = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            tensors |= {f"{prefix}.{suffix}": part for suffix, part in parts.items()}
    if quantization is not None:
        config["quantization_config"] = quantization
    return save(out, tensors, num_hidden_layers=len(writers), **config), meant


def assert_means(weights: ExpertWeights, meant: Any, layer: int = 0) -> None:
    for expert in range(EXPERTS):
        w13, w2 = dequantize(weights, expert)
        up_gate = [meant[layer, expert, name] for name in ("up_proj", "gate_proj")]
        np.testing.assert_allclose(w13.numpy(), np.concatenate(up_gate), rtol=1e-6)
        np.testing.assert_allclose(w2.numpy(), meant[layer, expert, "down_proj"], rtol=1e-6)


@pytest.mark.parametrize("form", STORED)
def test_every_form_is_read_as_it_is_meant(form: str, tmp_path: Path) -> None:
    scheme, writer, quantization = STORED[form]
    checkpoint, meant = write(tmp_path / "m", {0: writer}, quantization)
    spec = layer_specs(checkpoint)[0]
    assert spec.quant == scheme
    weights, _ = load_layer(checkpoint, 0, spec, "cpu")
    assert_means(weights, meant)


@pytest.mark.parametrize("form", ["modelopt nvfp4", "ct nvfp4"])
def test_input_scales_multiply_and_are_the_larger_of_gate_and_up(form: str, tmp_path: Path) -> None:
    _, writer, quantization = STORED[form]
    checkpoint, _ = write(tmp_path / "m", {0: writer}, quantization)
    weights, _ = load_layer(checkpoint, 0, layer_specs(checkpoint)[0], "cpu")
    amax = {key: float(np.abs(w).max()) for key, w in random_matrices(0).items()}
    for slot, scale in (
        (("gate_proj", "up_proj"), weights.input13),
        (("down_proj",), weights.input2),
    ):
        expected = [3 * max(amax[e, n] for n in slot) / (6 * 448) for e in range(EXPERTS)]
        assert scale is not None
        torch.testing.assert_close(scale, torch.tensor(expected))


def test_layers_of_different_schemes_live_in_one_checkpoint(tmp_path: Path) -> None:
    quantization = {
        "quant_method": "modelopt",
        "quant_algo": "MIXED_PRECISION",
        "quantized_layers": {
            "model.layers.0.mlp.experts*": {"quant_algo": "NVFP4"},
            "model.layers.2.mlp.experts.0.down_proj": {"quant_algo": "FP8"},
        },
    }
    writers = {0: nvfp4, 1: plain(torch.bfloat16), 2: per_tensor}
    checkpoint, meant = write(tmp_path / "m", writers, quantization)
    specs = layer_specs(checkpoint)
    assert [specs[n].quant for n in range(3)] == ["nvfp4", "bf16", "fp8_tensor"]
    for layer, spec in specs.items():
        assert_means(load_layer(checkpoint, layer, spec, "cpu")[0], meant, layer)


@pytest.mark.parametrize(
    "ignored",
    [
        FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.1.mlp.experts"]},
        FP8 | {"modules_to_not_convert": ["model.layers.1"]},
        modelopt("FP8") | {"ignore": ["model.layers.1*"]},
        compressed(num_bits=8, type="float", strategy="tensor")
        | {"ignore": [r"re:.*layers\.1\..*"]},
    ],
)
def test_ignored_layers_are_plain(ignored: dict[str, Any], tmp_path: Path) -> None:
    quantized = STORED["deepseek fp8"][1] if ignored["quant_method"] == "fp8" else per_tensor
    checkpoint, meant = write(tmp_path / "m", {0: quantized, 1: plain(torch.bfloat16)}, ignored)
    specs = layer_specs(checkpoint)
    assert specs[0].quant != QuantScheme.BF16 and specs[1].quant == QuantScheme.BF16
    assert_means(load_layer(checkpoint, 1, specs[1], "cpu")[0], meant, 1)


def test_modelopts_own_file_declares_too(tmp_path: Path) -> None:
    checkpoint, meant = write(tmp_path / "m", {0: per_tensor}, None)
    declared = {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    write_json(checkpoint.root / "hf_quant_config.json", {"quantization": declared})
    spec = layer_specs(checkpoint)[0]
    assert_means(load_layer(checkpoint, 0, spec, "cpu")[0], meant)


def test_gpt_oss_blocks_with_biases(tmp_path: Path) -> None:
    """gate and up rows take turns in one tensor of all experts."""
    fused: dict[str, list[Tensor]] = {}
    meant: dict[tuple[int, int, str], Array] = {}
    random = np.random.default_rng(7)
    biases = random.standard_normal((EXPERTS, 2 * WIDTH)).astype(np.float32)
    for expert in range(EXPERTS):
        gate_up = random.standard_normal((2 * WIDTH, HIDDEN)).astype(np.float32)
        down = random.standard_normal((HIDDEN, WIDTH)).astype(np.float32)
        for name, w in (("gate_up_proj", gate_up), ("down_proj", down)):
            parts, value = oai_mxfp4(w)
            for suffix, part in parts.items():
                fused.setdefault(f"model.layers.0.mlp.experts.{name}_{suffix}", []).append(part)
            meant[0, expert, name] = value
        both = meant.pop((0, expert, "gate_up_proj"))
        meant[0, expert, "gate_proj"], meant[0, expert, "up_proj"] = both[::2], both[1::2]
    tensors = {name: torch.stack(parts) for name, parts in fused.items()}
    tensors["model.layers.0.mlp.experts.gate_up_proj_bias"] = torch.from_numpy(biases).bfloat16()
    tensors["model.layers.0.mlp.experts.down_proj_bias"] = torch.ones(EXPERTS, HIDDEN).bfloat16()
    checkpoint = save(
        tmp_path / "m",
        tensors,
        model_type="gpt_oss",
        intermediate_size=WIDTH,
        num_local_experts=EXPERTS,
        quantization_config={
            "quant_method": "mxfp4",
            "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
        },
    )
    spec = layer_specs(checkpoint)[0]
    assert spec.quant == "mxfp4" and spec.expert_bias
    assert spec.activation == Activation(ActivationKind.SWIGLU_OAI, 1.702, 1.0, 7.0)
    weights, _ = load_layer(checkpoint, 0, spec, "cpu")
    assert_means(weights, meant)
    rounded = torch.from_numpy(biases).bfloat16().float()
    expected = torch.cat([rounded[:, 1::2], rounded[:, ::2]], 1)
    assert weights.bias13 is not None and torch.equal(weights.bias13, expected)


def test_llama4_fused_fp8_is_stored_in_out(tmp_path: Path) -> None:
    tensors: dict[str, list[Tensor]] = {}
    meant: dict[tuple[int, int, str], Array] = {}
    matrices = random_matrices(8)
    for expert in range(EXPERTS):
        both = np.concatenate([matrices[expert, "gate_proj"], matrices[expert, "up_proj"]])
        for name, w in (("gate_up_proj", both), ("down_proj", matrices[expert, "down_proj"])):
            parts, value = per_channel(w)
            prefix = f"language_model.model.layers.1.feed_forward.experts.{name}"
            tensors.setdefault(prefix, []).append(parts["weight"].T.contiguous())
            tensors.setdefault(f"{prefix}_scale", []).append(parts["weight_scale"].T.contiguous())
            meant[0, expert, name] = value
        both = meant.pop((0, expert, "gate_up_proj"))
        meant[0, expert, "gate_proj"], meant[0, expert, "up_proj"] = both[:WIDTH], both[WIDTH:]
    text = {
        "model_type": "llama4_text",
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 2,
        "hidden_act": "silu",
    }
    checkpoint = save(
        tmp_path / "m",
        {name: torch.stack(parts) for name, parts in tensors.items()},
        model_type="llama4",
        text_config=text,
        quantization_config=compressed(num_bits=8, type="float", strategy="channel"),
    )
    specs = layer_specs(checkpoint)
    assert list(specs) == [1] and specs[1].routing and specs[1].routing.weight_site == "input"
    assert_means(load_layer(checkpoint, 1, specs[1], "cpu")[0], meant)


def test_the_range_of_experts_asked_is_what_is_loaded(tmp_path: Path) -> None:
    checkpoint, meant = write(tmp_path / "m", {0: nvfp4}, modelopt("NVFP4"))
    spec = layer_specs(checkpoint, experts=(1, 3))[0]
    weights, _ = load_layer(checkpoint, 0, spec, "cpu")
    assert weights.w13.shape[0] == spec.held == 2 and not spec.complete
    w13, _ = dequantize(weights, 1)
    np.testing.assert_allclose(w13[:WIDTH].numpy(), meant[0, 2, "up_proj"], rtol=1e-6)


UNREADABLE = {
    "awq": ({"quant_method": "awq", "bits": 4}, "quant_method 'awq'"),
    "gptq": ({"quant_method": "gptq", "bits": 4}, "quant_method 'gptq'"),
    "other blocks": (FP8 | {"weight_block_size": [64, 64]}, r"weight_block_size \[64, 64\]"),
    "modelopt W4A8": (modelopt("W4A8_AWQ"), "quant_algo 'W4A8_AWQ'"),
    "int4 g128": (
        compressed(num_bits=4, type="int", strategy="group", group_size=128),
        "'group_size': 128",
    ),
    "int4 with zero points": (
        compressed(num_bits=4, type="int", strategy="group", group_size=32, symmetric=False),
        "'symmetric': False",
    ),
    "a broken pattern": (FP8 | {"ignore": ["re:("]}, r"re:\("),
    "ignore is no list": (FP8 | {"ignore": "lm_head"}, "not a list of names"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_by_name(case: str, tmp_path: Path) -> None:
    quantization, text = UNREADABLE[case]
    checkpoint, _ = write(tmp_path / "m", {0: per_tensor}, quantization)
    with pytest.raises(FailedPrecondition, match=text):
        layer_specs(checkpoint)
