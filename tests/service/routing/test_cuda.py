"""The same ids and weights on a GPU, and in a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from expertd.routing import logits_ok, route
from expertd.routing.methods import TRAITS, UNKNOWABLE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA card"),
]
METHODS = [method for method in TRAITS if method not in UNKNOWABLE]


@pytest.mark.parametrize("method", METHODS)
def test_as_on_cpu(method: str, seed: int) -> None:
    """Half the rows are full of exact ties; rounding of scores may swap a near tie."""
    torch.manual_seed(seed)
    logits = torch.randn(4096, 128) * 3
    logits[::2] = logits[::2].round()
    logits[5, :50] = -torch.inf
    bias = (torch.randn(128) * 4).round() / 4 if TRAITS[method].biased else None
    groups = {"n_group": 8, "topk_group": 4} if TRAITS[method].grouped else {}
    on_gpu = None if bias is None else bias.cuda()
    ids, weights = route(method, logits, bias=bias, top_k=8, scale=2.5, **groups)
    same_ids, same = route(method, logits.cuda(), bias=on_gpu, top_k=8, scale=2.5, **groups)
    alike = (ids == same_ids.cpu()).all(dim=1)
    assert alike.float().mean() > 0.98
    torch.testing.assert_close(weights[alike], same.cpu()[alike], rtol=2e-5, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_ties_go_to_the_lower_index(method: str) -> None:
    ids, _ = route(method, torch.tensor([[-0.0, 0.0] * 64] * 512).cuda(), top_k=8)
    assert torch.equal(ids.cpu(), torch.arange(8).expand(512, 8).int())
    assert route(method, torch.zeros(0, 16).cuda(), top_k=8)[0].shape == (0, 8)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_in_a_graph(tokens: int, seed: int) -> None:
    """Nothing synchronises: capture would fail."""
    torch.manual_seed(seed)
    settings = {"top_k": 8, "n_group": 8, "topk_group": 4, "scale": 2.5}
    logits, bias = torch.randn(tokens, 256).cuda(), torch.randn(256).cuda()
    route("DeepSeekV3", logits, bias=bias, **settings)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ids, weights = route("DeepSeekV3", logits, bias=bias, **settings)
        good = logits_ok(logits, 8)
    logits.copy_(torch.randn(tokens, 256))
    graph.replay()
    expected = route("DeepSeekV3", logits, bias=bias, **settings)
    assert torch.equal(ids, expected[0])
    assert torch.equal(weights, expected[1])
    assert good.all()
