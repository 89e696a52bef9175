"""The demo models: whole, the same each time, of every scheme and family."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.service.weights.test_schemes import TOLERANCE

from expertd.core import QuantScheme
from expertd.errors import ExpertdError, FailedPrecondition, InvalidArgument
from expertd.weights import demo, requantize
from expertd.weights.canonical import ExpertWeights
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.demo import DEMOS, write_demo
from expertd.weights.dequant import dequantize
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.quantize import quantize
from expertd.weights.requantize import quantize_checkpoint
from expertd.weights.tiny import TINY

QUANTIZED = [quant for quant in QuantScheme if quant not in demo.PLAIN_DTYPES]


def load(root: Path, layer: int = 0) -> tuple[Any, ExpertWeights]:
    checkpoint = Checkpoint.open(root)
    spec = layer_specs(checkpoint)[layer]
    return spec, load_layer(checkpoint, layer, spec, "cpu")[0]


def digests(root: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(root.iterdir())}


@pytest.mark.parametrize("quant", ["bf16", "fp8_block128"])
@pytest.mark.parametrize("family", DEMOS)
def test_equal_arguments_give_equal_bytes(family: str, quant: str, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_demo(tmp_path / name, family, quant, seed)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert digests(tmp_path / "a") != digests(tmp_path / "c")


def test_the_default_is_what_the_design_says(tmp_path: Path) -> None:
    write_demo(tmp_path / "m")
    specs = layer_specs(Checkpoint.open(tmp_path / "m"))
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and list(specs) == [0, 1]
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    for spec in specs.values():
        assert (spec.hidden, spec.intermediate, spec.num_experts) == (256, 128, 32)
        assert spec.routing is not None and spec.routing.top_k == 4
    files = {p.name for p in (tmp_path / "m").iterdir()}
    assert "model-00001-of-00003.safetensors" in files
    assert len(list(tmp_path.iterdir())) == 1


def test_deepseek_has_groups_and_a_scale(tmp_path: Path) -> None:
    write_demo(tmp_path / "m", "deepseek_v3", "bf16")
    routing = layer_specs(Checkpoint.open(tmp_path / "m"))[0].routing
    assert routing is not None and routing.method == "DeepSeekV3" and routing.bias
    assert (routing.n_group, routing.topk_group, routing.routed_scaling_factor) == (4, 2, 2.5)


@pytest.mark.parametrize("quant", ["bf16", "fp8_block128"])
@pytest.mark.parametrize("family", DEMOS)
def test_transformers_loads_the_very_same_experts(family: str, quant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_demo(tmp_path / "m", family, quant)
    _, weights = load(tmp_path / "m", 1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    experts = model.model.layers[1].mlp.experts
    tolerance = 0.0 if quant == "bf16" else 2**-8  # it rounds what it dequantises to bfloat16
    for expert in range(32):
        w13, w2 = dequantize(weights, expert)
        gate, up = experts.gate_up_proj[expert].float().chunk(2)
        torch.testing.assert_close(w13, torch.cat([up, gate]), rtol=tolerance, atol=0)
        torch.testing.assert_close(w2, experts.down_proj[expert].float(), rtol=tolerance, atol=0)
    assert model(torch.arange(9)[None]).logits.isfinite().all()


@pytest.mark.parametrize("quant", QUANTIZED)
def test_every_scheme_is_written_and_read_back(quant: QuantScheme, tmp_path: Path) -> None:
    """What the written file means is what the reference quantiser makes of the plain weights."""
    write_demo(tmp_path / "plain", quant="bf16")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "m", quant)
    _, plain = load(tmp_path / "plain")
    spec, weights = load(tmp_path / "m")
    assert spec.quant is quant
    expected = quantize(plain.w13.float(), plain.w2.float(), quant)
    assert weights.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        got = weights.tensors[name]
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)), name
    for expert in (0, 31):
        w13, _ = dequantize(weights, expert)
        given = plain.w13[expert].float()
        assert (w13 - given).abs().max() <= TOLERANCE[quant] * given.abs().max()


def test_gpt_oss_has_its_own_mxfp4(tmp_path: Path) -> None:
    write_demo(tmp_path / "m", "gpt_oss", "mxfp4")
    write_demo(tmp_path / "plain", "gpt_oss", "bf16")
    names = Checkpoint.open(tmp_path / "m").tensors
    assert names["model.layers.0.mlp.experts.gate_up_proj_blocks"].shape == (32, 256, 8, 16)
    assert "model.layers.0.mlp.experts.gate_up_proj" not in names
    spec, weights = load(tmp_path / "m")
    _, plain = load(tmp_path / "plain")
    assert spec.quant == "mxfp4" and spec.expert_bias
    expected = quantize(plain.w13.float(), plain.w2.float(), QuantScheme.MXFP4)
    for name, tensor in expected.tensors.items():
        assert torch.equal(weights.tensors[name], tensor)
    assert weights.bias13 is not None and plain.bias13 is not None
    assert torch.equal(weights.bias13, plain.bias13)


@pytest.mark.parametrize("quant", ["fp8_tensor", "nvfp4"])
def test_modelopts_own_file_says_the_same(quant: str, tmp_path: Path) -> None:
    write_demo(tmp_path / "m", quant=quant)
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    own = json.loads((tmp_path / "m" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quant_method"] == "modelopt" and own["quant_algo"] == config["quant_algo"]
    assert own["exclude_modules"] == config["ignore"]
    assert {"lm_head", "model.layers.0.mlp.gate"} <= set(config["ignore"])
    assert not any("experts" in name for name in config["ignore"])


def test_the_rest_of_a_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    write_demo(tmp_path / "plain", quant="bf16")
    (tmp_path / "plain" / "tokenizer.json").write_text("{}")
    (tmp_path / "plain" / "modeling_own.py").write_text("raise SystemExit")
    quantize_checkpoint(tmp_path / "plain", tmp_path / "m", QuantScheme.NVFP4)
    assert (tmp_path / "m" / "tokenizer.json").exists()
    assert not (tmp_path / "m" / "modeling_own.py").exists()
    before, after = Checkpoint.open(tmp_path / "plain"), Checkpoint.open(tmp_path / "m")
    kept = [name for name in before.tensors if ".experts." not in name]
    assert kept and all(torch.equal(before.read(name), after.read(name)) for name in kept)


def family_quant() -> list[Any]:
    """Every family plain; the fast suite takes a few, and a scheme for some of other layouts."""
    fast = {"gpt_oss", "nemotron_h", "llama4", "mixtral"}
    plain = [
        pytest.param(t.model_type, "bf16", marks=() if t.model_type in fast else pytest.mark.slow)
        for t in TINY
    ]
    others = [("nemotron_h", "fp8_tensor"), ("mixtral", "nvfp4"), ("llama4", "fp8_channel")]
    return plain + others


@pytest.mark.parametrize(("family", "quant"), family_quant())
def test_every_family_has_a_demo(family: str, quant: str, tmp_path: Path) -> None:
    write_demo(tmp_path / "m", family, quant)
    specs = layer_specs(Checkpoint.open(tmp_path / "m"))
    for layer, spec in specs.items():
        assert spec.quant == quant
        load(tmp_path / "m", layer)
    assert specs


REFUSED: dict[str, tuple[dict[str, str], type[ExpertdError], str]] = {
    "family": ({"family": "bert"}, InvalidArgument, "'bert'.*qwen3_moe"),
    "quant": ({"quant": "int3"}, InvalidArgument, "'int3'.*nvfp4"),
    "no layout": ({"family": "granitemoe", "quant": "nvfp4"}, FailedPrecondition, "granitemoe"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_there_is_no_demo_of_is_refused(case: str, tmp_path: Path) -> None:
    arguments, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        write_demo(tmp_path / "m", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "mine").write_text("x")
    with pytest.raises(InvalidArgument, match="exists already"):
        write_demo(tmp_path / "m")
    assert (tmp_path / "m" / "mine").read_text() == "x"


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(requantize, "_settle", fail)
    with pytest.raises(OSError, match="disk full"):
        write_demo(tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_a_quantised_checkpoint_is_not_quantised_again(tmp_path: Path) -> None:
    write_demo(tmp_path / "m")
    with pytest.raises(FailedPrecondition, match="quantised already"):
        quantize_checkpoint(tmp_path / "m", tmp_path / "n", QuantScheme.NVFP4)


def test_transformers_reads_gpt_oss_blocks_the_same(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, Mxfp4Config

    write_demo(tmp_path / "m", "gpt_oss", "mxfp4")
    _, weights = load(tmp_path / "m")
    plain = Mxfp4Config(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.bfloat16, quantization_config=plain
    )
    experts = model.model.layers[0].mlp.experts
    for expert in range(32):
        w13, w2 = dequantize(weights, expert)
        turns = experts.gate_up_proj[expert].float().T
        assert torch.equal(w13, torch.cat([turns[1::2], turns[::2]]))
        assert torch.equal(w2, experts.down_proj[expert].float().T)
