"""Hypothesis strategies and random layers, calls and weights that several rooms' tests share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from expertd.core import Activation, ActivationKind, LayerSpec, QuantScheme, RoutingSpec
from expertd.core.routing import RoutingMethod
from expertd.weights.canonical import ExpertWeights
from expertd.weights.quantize import quantize
from expertd.weights.tiny import Sizes, Tiny
from expertd_wire.messages import ForwardCall
from expertd_wire.tensors import WireTensor

SWIGLU = Activation(ActivationKind.SWIGLU)
SOFTMAX = RoutingSpec(RoutingMethod.RENORMALIZE_NAIVE, "softmax", top_k=2)


@dataclass(frozen=True)
class Waiting:
    """A queued call as the policy sees it."""

    key: str
    tokens: int
    arrived_ns: int
    priority: int


@st.composite
def queues(draw: st.DrawFn) -> list[Waiting]:
    """Queues in any order; no two calls arrive at the same time."""
    times = draw(st.lists(st.integers(0, 1000), max_size=24, unique=True))
    keys, priorities = st.sampled_from("ab"), st.integers(-1, 1)
    return [Waiting(draw(keys), draw(st.integers(1, 9)), t, draw(priorities)) for t in times]


def generator(seed: int) -> torch.Generator:
    """A generator whose seed is printed, for a test that fails."""
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


def layer_spec(**changes: Any) -> LayerSpec:
    """A small complete layer of 6 experts that routes its top 2 by softmax."""
    plain = LayerSpec(
        hidden=64,
        intermediate=32,
        num_experts=6,
        expert_begin=0,
        expert_end=6,
        activation=SWIGLU,
        quant=QuantScheme.FP32,
        routing=SOFTMAX,
    )
    return replace(plain, **changes)


def random_weights(spec: LayerSpec, random: torch.Generator) -> ExpertWeights:
    """Weights of a layer in its scheme; outputs are of the order of 1 for rows of that order."""
    w13 = torch.randn(spec.held, spec.rows13, spec.hidden, generator=random) / spec.hidden**0.5
    w2 = torch.randn(spec.held, spec.hidden, spec.intermediate, generator=random)
    weights = quantize(
        w13, w2 / spec.intermediate**0.5, spec.quant, gated=spec.activation.gated, tied=False
    )
    if not spec.expert_bias:
        return weights
    bias13 = torch.randn(spec.held, spec.rows13, generator=random)
    bias2 = torch.randn(spec.held, spec.hidden, generator=random)
    return replace(weights, bias13=bias13, bias2=bias2)


def random_topk(
    tokens: int, experts: int, top_k: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids [T, K] int32 without duplicates in a row, and weights [T, K] that sum to 1."""
    keys = torch.rand(tokens, experts, generator=random)
    ids = keys.argsort(dim=1)[:, :top_k].to(torch.int32)
    weights = torch.rand(tokens, top_k, generator=random) + 0.1
    return ids, weights / weights.sum(dim=1, keepdim=True)


def wire(tensor: Tensor) -> WireTensor:
    """A tensor as a carrier hands it on: its bytes, which nobody may write to."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return WireTensor(
        str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), memoryview(data)
    )


def wire_call(**fields: Any) -> ForwardCall:
    """A call to layer 0 of model m; tensors become their wire form."""
    named = {name: wire(v) if isinstance(v, Tensor) else v for name, v in fields.items()}
    return ForwardCall(**{"model": "m", "layer": 0} | named)


def torch_tensor(tensor: WireTensor | None) -> Tensor:
    """What a wire tensor holds, in memory of its own."""
    assert tensor is not None
    out = torch.empty(tensor.shape, dtype=getattr(torch, tensor.dtype))
    out.view(-1).view(torch.uint8).numpy()[:] = np.frombuffer(tensor.data, np.uint8)
    return out


def relative(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected|, in float64."""
    expected = expected.double()
    return float((got.double() - expected).norm() / expected.norm())


SMALL_MODEL = Sizes(hidden=64, width=32, experts=8, top_k=2)
"""The sizes of transformers' models that tests build."""


def saved(model: Tiny, out: Path, **options: Any) -> Path:
    """A tiny random model of transformers, saved as it saves it."""
    model.build(SMALL_MODEL, seed=1).save_pretrained(out, **options)
    return out
