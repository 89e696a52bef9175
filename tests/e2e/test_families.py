"""Every family of transformers, saved and served: outputs, ids and weights are its own block's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.e2e.blocks import SIZES, Seen, blocks_of, build, watch
from tests.e2e.servers import serving
from tests.strategies import relative
from torch import Tensor

from expertd.routing import route
from expertd.weights.tiny import TINY, Tiny
from expertd_client import Client, ExpertdError
from expertd_wire.v1 import experts_pb2 as pb

pytestmark = pytest.mark.slow

MODELS = {str(tiny): tiny for tiny in TINY} | {
    "cohere2_moe shared": Tiny("cohere2_moe", {"num_shared_experts": 2}, "intermediate_size"),
    "nemotron_h latent": Tiny(
        "nemotron_h", {"layers_block_type": ["mamba", "moe", "moe"], "moe_latent_size": 32}
    ),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
SEED = 4100

BY_IDS_ONLY = {"gemma4", "inkling_mm_model", "kolibri1", "phimoe"}
"""Their routers do what no method has; a hash-routed layer of deepseek_v4 is the other case."""

SCORES_IN_BF16 = 0.75
"""The part of rows that must choose alike where a bf16 block rounds its scores, and so ties."""


@dataclass(frozen=True)
class Served:
    """A client of the server that has every model, and what each layer's own block computed."""

    client: Client
    seen: dict[tuple[str, int], Seen]


def served_name(model: str, dtype: str) -> str:
    return f"{model} {dtype}".replace(" ", "-")


@pytest.fixture(scope="module")
def served(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("families")
    seen: dict[tuple[str, int], Seen] = {}
    flags: list[str] = []
    for number, (model, tiny) in enumerate(MODELS.items()):
        for dtype, kind in DTYPES.items():
            name = served_name(model, dtype)
            built: Any = build(tiny, kind, seed=SEED + number)
            built.save_pretrained(root / name)
            flags += ["--model", f"{name}={root / name}"]
            for layer, block in blocks_of(built):
                seen[name, layer] = watch(tiny.model_type, block, kind, seed=SEED + layer)
    with serving(home, *flags) as server, Client(server.grpc) as client:
        yield Served(client, seen)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", MODELS)
def test_a_served_family_is_its_own_block(served: Served, model: str, dtype: str) -> None:
    name = served_name(model, dtype)
    layers = {info.layer: info for info in served.client.layers(name)}
    assert layers.keys() == {layer for owner, layer in served.seen if owner == name} != set()
    for layer, info in layers.items():
        seen = served.seen[name, layer]
        assert info.state == "ready" and info.num_experts == SIZES.experts
        assert_same_by_ids(served.client, info, seen, TOLERANCE[dtype])
        if info.routing.method:
            assert_same_by_logits(served.client, info, seen, dtype)
            continue
        with pytest.raises(ExpertdError, match="topk_ids"):
            served.client.forward(name, layer, seen.rows, router_logits=seen.logits)
    without = {layer for layer, info in layers.items() if not info.routing.method}
    everywhere = MODELS[model].model_type in BY_IDS_ONLY
    assert without == (set(layers) if everywhere else {0} if model == "deepseek_v4" else set())


def assert_same_by_ids(client: Client, info: pb.LayerInfo, seen: Seen, tolerance: float) -> None:
    """The block's own ids and weights give what its experts answered."""
    got = client.forward(
        info.model,
        info.layer,
        seen.rows,
        topk_ids=seen.ids.to(torch.int32),
        topk_weights=seen.weights.float(),
    )
    assert got.dtype == seen.rows.dtype and relative(got, seen.routed) <= tolerance


def assert_same_by_logits(client: Client, info: pb.LayerInfo, seen: Seen, dtype: str) -> None:
    """The block's own logits give its output, by the ids and weights that it gave its experts."""
    ids, weights = told_route(info, seen.logits)
    alike = (ids.long().sort(1).values == seen.ids.sort(1).values).all(1)
    assert alike.float().mean() >= (1.0 if dtype == "fp32" else SCORES_IN_BF16)
    seen = replace(seen, **{name: value[alike] for name, value in vars(seen).items()})
    theirs = dense(seen.ids, seen.weights) * block_scale(info, seen)
    assert relative(dense(ids[alike], weights[alike]), theirs) <= TOLERANCE[dtype]
    got = client.forward(info.model, info.layer, seen.rows, router_logits=seen.logits)
    assert relative(got, seen.output) <= TOLERANCE[dtype]


def told_route(info: pb.LayerInfo, logits: Tensor) -> tuple[Tensor, Tensor]:
    """The ids and weights by nothing but what the server tells of the layer."""
    told = info.routing
    bias = told.correction_bias
    return route(
        told.method,
        logits,
        bias=torch.frombuffer(bytearray(bias.data), dtype=torch.float32) if bias.data else None,
        top_k=info.top_k,
        n_group=told.n_group or None,
        topk_group=told.topk_group or None,
        scale=told.routed_scaling_factor,
        renormalize=told.renormalize,
        eps=told.eps,
        group_fill=float(told.group_fill) if told.group_fill else None,
        group_score=told.group_score,
    )


def block_scale(info: pb.LayerInfo, seen: Seen) -> float:
    """What the block multiplies the experts' sum by after its weights."""
    if info.model.startswith("openai_privacy_filter"):
        return float(info.top_k)
    return info.routing.routed_scaling_factor if info.routing.scale_site == "output" else 1.0


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """[T, E]: each expert's weight."""
    return torch.zeros(len(ids), SIZES.experts).scatter(1, ids.long(), weights.float())
