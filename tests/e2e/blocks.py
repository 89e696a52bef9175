"""What transformers' own MoE blocks compute for random rows, and what they give their experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from expertd.weights.tiny import Sizes, Tiny

SIZES = Sizes(hidden=64, width=32, experts=8, top_k=2)
TOKENS = 48
HASH_VOCABULARY = 128


@dataclass(frozen=True)
class Seen:
    """A layer's routed experts at work.

    rows [T, H] are what the experts took; ids and weights [T, K] theirs, routed [T, H] their answer
    to them; logits [T, E] the gate's; output [T, H] the block's, without shared experts.
    """

    rows: Tensor
    ids: Tensor
    weights: Tensor
    routed: Tensor
    logits: Tensor
    output: Tensor


def build(model: Tiny, dtype: torch.dtype, seed: int) -> nn.Module:
    """The tiny model in dtype, its gates drawn so that logits differ."""
    built = model.build(SIZES, seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in (m for m in built.modules() if is_gate(m)):
            for weight in (p for p in gate.parameters() if p.shape[1:] == (SIZES.hidden,)):
                weight.copy_(torch.randn(weight.shape, generator=random) * 0.25)
    return built.to(dtype)


def blocks_of(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """Each MoE layer's number and the module that has its experts."""
    for name, module in model.named_modules():
        stacked = isinstance(getattr(module, "down_proj", None), nn.Parameter)
        if stacked and "shared" not in name:
            layer = int(name.split("layers.")[1].split(".")[0])
            yield layer, model.get_submodule(name.rpartition(".")[0])


def is_gate(module: nn.Module) -> bool:
    return type(module).__name__.endswith(("Router", "Gate"))


def watch(model: str, block: Any, dtype: torch.dtype, seed: int) -> Seen:
    """Run a block once; its shared experts and what follows the routed sum are taken out of it."""
    silence(block)
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(1, TOKENS, SIZES.hidden, generator=random).to(dtype)
    seen: dict[str, Any] = {}
    hooks = [block.experts.register_forward_hook(lambda _m, a, out: seen.update(args=a, out=out))]
    for gate in (m for m in block.modules() if is_gate(m)):
        hooks.append(gate.register_forward_hook(lambda _m, _a, out: seen.update(gate=out)))
    with torch.inference_mode():
        output = RUNS.get(model, plain)(block, rows)
    for hook in hooks:
        hook.remove()
    logits = next(part for part in reversed_for(model, seen["gate"]) if part.shape[-1] == 8)
    if model == "llama4":  # its experts take every row of every expert, weighted before
        ids = logits.topk(SIZES.top_k).indices
        return Seen(rows[0], ids, logits.gather(1, ids).float().sigmoid(), output, logits, output)
    taken, ids, weights = seen["args"]
    routed = seen["out"]
    whole = output.reshape(TOKENS, -1) * (2 if halves(block) else 1)
    # Behind latent experts the block goes back to the model's width, which is the caller's part.
    return Seen(taken, ids, weights, routed, logits, whole if model != "nemotron_h" else routed)


def silence(block: nn.Module) -> None:
    """No shared experts and no norm behind the sum."""
    with torch.no_grad():
        for name, tensor in block.named_parameters():
            if "shared" in name:
                tensor.zero_()
    if hasattr(block, "post_mlp_layernorm"):
        block.post_mlp_layernorm = nn.Identity()


def halves(block: Any) -> bool:
    """Cohere2MoE answers the mean of the routed and the shared experts, if there are any."""
    mean = getattr(block, "shared_expert_combination_strategy", "sum") == "average"
    return mean and block.num_shared_experts > 0


def plain(block: Any, rows: Tensor) -> Tensor:
    output = block(rows)
    return output[0] if isinstance(output, tuple) else output


def by_token(block: Any, rows: Tensor) -> Tensor:
    """DeepSeek-V4's first layers choose by token id."""
    if not block.is_hash:
        return plain(block, rows)
    ids = torch.arange(TOKENS)[None] % HASH_VOCABULARY
    output: Tensor = block(rows, input_ids=ids)
    return output


def within_layer(layer: Any, rows: Tensor) -> Tensor:
    """Gemma4 has router and experts in the decoder layer itself."""
    flat = rows[0]
    _, weights, ids = layer.router(flat)
    output: Tensor = layer.experts(flat, ids, weights)
    return output


def reversed_for(model: str, gate: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Llama4's router has its scores before the logits."""
    return gate[::-1] if model == "llama4" else gate


RUNS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "deepseek_v4": by_token,
    "gemma4": within_layer,
}
