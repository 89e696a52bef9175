"""From a checkpoint that transformers saved to an output: its own MoE block is the authority."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.service.backends.test_torch_experts import KINDS, backend, run
from tests.strategies import SMALL_MODEL, generator, relative
from torch import Tensor, nn

from expertd.routing import route_for
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer
from expertd.weights.tiny import Tiny

MOE = {"num_experts": 16, "num_experts_per_tok": 4}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 0}
MODELS = {
    "qwen3_moe": Tiny("qwen3_moe", MOE | {"norm_topk_prob": True}),
    "qwen3_moe as is": Tiny("qwen3_moe", MOE | {"norm_topk_prob": False}),
    "deepseek_v3": Tiny("deepseek_v3", GROUPS | {"n_routed_experts": 16, "num_experts_per_tok": 4}),
    "deepseek_v3 as is": Tiny(
        "deepseek_v3", GROUPS | {"n_routed_experts": 16, "norm_topk_prob": False}
    ),
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Nothing(nn.Module):
    """Stands for the shared experts, which are the caller's."""

    def forward(self, rows: Tensor) -> Tensor:
        return torch.zeros_like(rows)


def routed_block(model: Any, layer: int) -> Any:
    """A layer's MoE block without its shared experts; its router's weights are drawn anew."""
    block = model.model.layers[layer].mlp
    if hasattr(block, "shared_experts"):
        block.shared_experts = Nothing()
    with torch.no_grad():
        block.gate.weight.normal_(std=0.2)
    return block


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", MODELS)
def test_the_whole_path_equals_the_block(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    random = generator(800)
    model: Any = MODELS[name].build(SMALL_MODEL, seed=800)
    block = routed_block(model, 1)
    model.to(dtype)
    if hasattr(block.gate, "e_score_correction_bias"):
        bias = block.gate.e_score_correction_bias
        block.gate.e_score_correction_bias = bias.float()  # as the released checkpoints have it
    model.save_pretrained(tmp_path / "m")
    checkpoint = Checkpoint.open(tmp_path / "m")
    spec = layer_specs(checkpoint)[1]
    weights, bias = load_layer(checkpoint, 1, spec, "cpu")
    rows = torch.randn(50, spec.hidden, generator=random).to(dtype)
    with torch.inference_mode():
        truth = block(rows[None])[0]
        logits, block_weights, block_ids = block.gate(rows)
    assert spec.routing is not None
    clear = without_ties(logits, spec.routing.top_k)
    assert clear.sum() > 30
    rows, truth, logits = rows[clear], truth[clear], logits[clear]
    block_weights, block_ids = block_weights[clear], block_ids[clear]
    ids, router = route_for(spec.routing, logits, bias)
    assert_same_choice(ids, block_ids)
    assert relative(dense(ids, router), dense(block_ids, block_weights)) <= TOLERANCE[dtype]
    for backend_name in KINDS:
        got = run(backend(backend_name, spec, weights), rows, ids, router, reply=dtype)
        assert not torch.isnan(got).any()
        assert relative(got, truth) <= TOLERANCE[dtype], backend_name


def without_ties(logits: Tensor, top_k: int) -> Tensor:
    """Rows [T] whose last chosen logit is not equal to the first that was left: bf16 ties often."""
    ordered = logits.float().sort(dim=1, descending=True).values
    return ordered[:, top_k - 1] != ordered[:, top_k]


def assert_same_choice(ids: Tensor, theirs: Tensor) -> None:
    """The same experts, in whatever order."""
    assert torch.equal(ids.long().sort(1).values, theirs.sort(1).values)


def dense(ids: Tensor, router: Tensor) -> Tensor:
    """[T, E]: each expert's weight."""
    return torch.zeros(len(ids), 16).scatter(1, ids.long(), router.float())
