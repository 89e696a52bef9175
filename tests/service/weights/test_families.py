"""Every family: what is read is what the saved model's own experts hold and compute."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from expertd.backends.activation import activate
from expertd.core import LayerSpec
from expertd.routing import route_for
from expertd.weights.canonical import ExpertWeights
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.dequant import dequantize
from expertd.weights.families import FAMILIES
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.tiny import TINY, Sizes, Tiny

HIDDEN, EXPERTS, TOP_K = 64, 8, 2
SIZES = Sizes(hidden=HIDDEN, width=32, experts=EXPERTS, top_k=TOP_K)

# Saved under the names of the released checkpoint, or of the module.
FORMS = {"released": {}, "module": {"save_original_format": False}}

# What families say of their activations when a config does not.
DEFAULTED = {
    name
    for rule in (family.activation for family in FAMILIES)
    for key in (rule.act, rule.alpha, rule.beta, rule.limit)
    if key is not None and key.default is not None
    for name in key.names
}

# Their experts take every row of every expert instead of ids.
DENSE = ("llama4",)


@pytest.mark.parametrize("form", ["released", pytest.param("module", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", TINY, ids=str)
def test_a_saved_model_is_read_as_it_was(model: Tiny, form: str, tmp_path: Path) -> None:
    built = model.build(SIZES, seed=1)
    built.save_pretrained(tmp_path / "m", **FORMS[form])
    checkpoint = Checkpoint.open(tmp_path / "m")
    specs = layer_specs(checkpoint)
    modules = dict(experts_of(built))
    assert specs.keys() == modules.keys() != set()
    for layer, spec in specs.items():
        weights, bias = load_layer(checkpoint, layer, spec, "cpu")
        if spec.routing is not None:
            assert_same_bias(bias, layer, built)
        if spec.routing is not None and model.model_type not in DENSE:
            assert_same_routing(spec, bias, modules[layer], built)
        assert_same_weights(weights, modules[layer])
        if model.model_type not in DENSE:
            assert_same_results(spec, weights, modules[layer])
    assert_defaults_are_theirs(tmp_path / "m", specs)


def test_no_family_of_transformers_is_forgotten() -> None:
    """Every module of it that has routed experts is in TINY, or its family says why not."""
    models = Path(transformers.__file__).parent / "models"
    found = {
        file.parent.name
        for file in models.glob("*/modeling_*.py")
        if re.search(r"^class \w*Experts\(", file.read_text(), re.MULTILINE)
    }
    served = {tiny.package or tiny.model_type for tiny in TINY}
    refused = {name.replace("-", "_") for f in FAMILIES if f.refusal for name in f.model_types}
    assert len(found) > 50 and found - served <= refused


def experts_of(model: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The stacked experts of each MoE layer, by the layer's number."""
    for name, module in model.named_modules():
        stacked = isinstance(getattr(module, "down_proj", None), nn.Parameter)
        if stacked and "shared" not in name:
            yield int(name.split("layers.")[1].split(".")[0]), module


def assert_defaults_are_theirs(root: Path, specs: dict[int, LayerSpec]) -> None:
    """An activation that config.json leaves out is the one that transformers' config fills in."""
    config = json.loads((root / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in DEFAULTED}
    (root / "config.json").write_text(json.dumps(kept))
    for layer, spec in layer_specs(Checkpoint.open(root)).items():
        assert spec.activation == specs[layer].activation


def assert_same_bias(bias: Tensor | None, layer: int, model: nn.Module) -> None:
    """The buffer that the model's router adds for its choice, if it has one."""
    held = {
        name: tensor.flatten()
        for name, tensor in model.state_dict().items()
        if f"layers.{layer}." in name and name.endswith(("correction_bias", "expert_bias"))
    }
    assert (bias is None) == (not held), held.keys()
    for tensor in held.values():
        assert bias is not None and torch.equal(bias, tensor)


def assert_same_routing(
    spec: LayerSpec, bias: Tensor | None, experts: nn.Module, model: nn.Module
) -> None:
    """What the block gives its experts for random rows, against the route of the saved config."""
    block = next(m for m in model.modules() if any(child is experts for child in m.children()))
    seen: dict[str, Any] = {}
    hooks = [experts.register_forward_pre_hook(lambda _, args: seen.update(experts=args))]
    for child in block.modules():
        if type(child).__name__.endswith(("Router", "Gate")):
            hooks.append(child.register_forward_hook(lambda _m, _a, out: seen.update(router=out)))
    with torch.no_grad():
        block(torch.randn(1, 64, HIDDEN))
    for hook in hooks:
        hook.remove()
    assert spec.routing is not None
    logits = next(part for part in seen["router"] if part.shape[-1] == EXPERTS)
    ids, weights = route_for(spec.routing, logits.float(), bias)
    _, their_ids, theirs = seen["experts"]
    scale = spec.routing.routed_scaling_factor if spec.routing.scale_site == "output" else 1.0
    if "PrivacyFilter" in type(block).__name__:  # it divides by K here and multiplies behind
        scale = TOP_K
    torch.testing.assert_close(dense(ids, weights), dense(their_ids, theirs) * scale)


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros(len(ids), EXPERTS).scatter(1, ids.long(), weights.float())


def assert_same_weights(weights: ExpertWeights, module: Any) -> None:
    """Bit for bit, expert by expert."""
    for expert in range(EXPERTS):
        w13, w2 = dequantize(weights, expert)
        assert torch.equal(w13, first(module, expert))
        assert torch.equal(w2, oriented(module, module.down_proj[expert]))
    if getattr(module, "has_bias", False):
        assert weights.bias13 is not None and weights.bias2 is not None
        gate, up = split(module, module.gate_up_proj_bias.T)
        assert torch.equal(weights.bias13, torch.cat([up, gate]).T)
        assert torch.equal(weights.bias2, module.down_proj_bias)


def first(module: Any, expert: int) -> Tensor:
    if not hasattr(module, "gate_up_proj"):
        return oriented(module, module.up_proj[expert])
    gate, up = split(module, oriented(module, module.gate_up_proj[expert]))
    return torch.cat([up, gate])


def oriented(module: Any, matrix: Tensor) -> Tensor:
    """[out, in]; Llama4's module does not say that it holds [in, out]."""
    said = getattr(module, "is_transposed", "Llama4" in type(module).__name__)
    return matrix.T if said else matrix


def split(module: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(gate, up) of the rows of a fused matrix."""
    if getattr(module, "is_concatenated", True):
        gate, up = rows.chunk(2)
        return gate, up
    return rows[::2], rows[1::2]


def assert_same_results(spec: LayerSpec, weights: ExpertWeights, module: nn.Module) -> None:
    """The module's own forward against the canonical weights and the spec's activation."""
    rows = torch.randn(16, HIDDEN)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in rows])
    shares = torch.rand(16, TOP_K)
    with torch.no_grad():
        expected = module(rows, ids, shares)
    got = torch.zeros_like(rows)
    for row, (chosen, share) in enumerate(zip(ids, shares, strict=True)):
        for expert, factor in zip(chosen.tolist(), share, strict=True):
            got[row] += factor * one(spec, weights, expert, rows[row])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def one(spec: LayerSpec, weights: ExpertWeights, expert: int, row: Tensor) -> Tensor:
    w13, w2 = dequantize(weights, expert)
    inner = w13 @ row
    if weights.bias13 is not None:
        inner = inner + weights.bias13[expert]
    out = w2 @ activate(spec.activation, inner[None])[0]
    return out if weights.bias2 is None else out + weights.bias2[expert]
