"""The fused router on a card: beside routing.reference on the same card, and in a CUDA graph."""

from __future__ import annotations

import os

import pytest
import torch
from tests.e2e.servers import in_process
from tests.service.triton.router_cases import (
    GROUPED,
    LOGITS,
    METHODS,
    bias_of,
    compare,
    plain,
    spec_of,
)
from tests.strategies import generator, relative

from expertd.core import RoutingMethod, RoutingSpec
from expertd.routing import route_for as reference
from expertd.routing.methods import TRAITS
from expertd_client import Client

pytest.importorskip("triton")
from expertd.backends.triton.router import route_for

SEED = int(os.environ.get("EXPERTD_SEED", "0"))
INEXACT = (RoutingMethod.DEFAULT, RoutingMethod.GROUPED_SOFTMAX, RoutingMethod.SOFTMAX_BIAS)
"""They compare softmax, which divides by a sum that torch adds in another order."""

methods = pytest.mark.parametrize("method", METHODS)


def check(
    spec: RoutingSpec, logits: torch.Tensor, bias: torch.Tensor | None, alike: float = 0.9
) -> None:
    print(f"repeat with EXPERTD_SEED={SEED}")
    bias = None if bias is None else bias.cuda()
    strict = spec.method not in INEXACT
    compare(route_for, spec, logits.cuda(), bias, strict=strict, alike=alike)


@methods
@pytest.mark.parametrize("logits_of", LOGITS)
@pytest.mark.parametrize("tokens", [1, 300])
def test_hard_logits(method: RoutingMethod, logits_of, tokens: int) -> None:  # type: ignore[no-untyped-def]
    random = generator(SEED)
    for experts, top_k, size in ((256, 8, 0.1), (100, 3, 30.0), (512, 22, 1e4)):
        spec = spec_of(method, top_k)
        check(spec, logits_of(tokens, experts, random), bias_of(spec, experts, size, random))


@pytest.mark.parametrize("method", GROUPED)
@pytest.mark.parametrize("score", ["top2", "max"])
@pytest.mark.parametrize("fill", [None, 0.0, -3.0])
def test_groups(method: RoutingMethod, score: str, fill: float | None) -> None:
    random = generator(SEED)
    for experts, groups, kept in ((160, 8, 3), (256, 8, 4), (30, 5, 1)):
        spec = spec_of(
            method, 6, n_group=groups, topk_group=kept, group_score=score, group_fill=fill
        )
        for logits_of in LOGITS:
            check(spec, logits_of(64, experts, random), bias_of(spec, experts, 0.1, random))


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_neighbouring_floats(method: RoutingMethod, dtype: torch.dtype) -> None:
    random = generator(SEED)
    spec = spec_of(method, 8)
    bias = bias_of(spec, 256, 0.1, random)
    check(spec, plain(2048, 256, random).to(dtype), bias)
    steps = torch.stack([torch.randperm(256, generator=random) for _ in range(64)]).int()
    next_to_each_other = (torch.full((64, 256), 0.7).view(torch.int32) + steps).view(torch.float32)
    # Two neighbours may have one probability in torch, which then goes by index.
    check(spec, next_to_each_other.to(dtype), bias, alike=0.0)


@methods
@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_in_a_graph(method: RoutingMethod, tokens: int) -> None:
    random = generator(SEED)
    groups = {"n_group": 8, "topk_group": 4} if TRAITS[method].grouped else {}
    spec = spec_of(method, 8, **groups)
    logits, bias = plain(tokens, 256, random).cuda(), bias_of(spec, 256, 0.1, random)
    bias = None if bias is None else bias.cuda()
    route_for(spec, logits, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, weights = route_for(spec, logits, bias)
    logits.copy_(plain(tokens, 256, random))
    graph.replay()
    again = route_for(spec, logits, bias)
    assert torch.equal(ids, again[0]) and torch.equal(weights, again[1])
    expected = reference(spec, logits, bias)[1]
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_server_routes_as_the_reference_does(tokens: int) -> None:
    """Logits answer what the reference's ids and weights do, whatever backend runs them."""
    flags = ("--demo", "--trust", "declared", "--tune", "off", "--cuda-graphs", "off")
    with (
        in_process(*flags, "--device", "cuda:0") as (app, addresses),
        Client(addresses.grpc) as client,
    ):
        assert app.wait_ready()
        resident = app.residents.all()[0]
        spec, random = resident.spec, generator(SEED)
        assert spec.routing is not None
        rows = torch.randn(tokens, spec.hidden, generator=random).bfloat16()
        logits = plain(tokens, spec.num_experts, random)
        bias = None if resident.bias is None else resident.bias.cpu()
        ids, weights = reference(spec.routing, logits, bias)
        where = (resident.model, resident.layer, rows)
        expected = client.forward(*where, topk_ids=ids, topk_weights=weights)
        assert relative(client.forward(*where, router_logits=logits), expected) < 1e-3
