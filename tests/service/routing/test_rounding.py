"""The reference under a kernel's declared rounding."""

from __future__ import annotations

import math

import torch

from expertd.routing import route
from expertd.routing.rounding import Rounding

GROUPS = {"n_group": 2, "topk_group": 2}
BIAS = torch.tensor([1.0, 1.0 + 2**-10, 0.0, 0.0])


def first(rounding: Rounding | None, **groups: int) -> int:
    logits = torch.zeros(1, 4)
    ids, _ = route("DeepSeekV3", logits, bias=BIAS, top_k=1, rounding=rounding, **groups)
    return int(ids.item())


def test_no_rounding_is_the_default(seed: int) -> None:
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed)) * 20
    for method in ("Default", "DeepSeekV3", "Renormalize"):
        plain, same = (route(method, logits, top_k=4, rounding=r) for r in (None, Rounding()))
        assert torch.equal(plain[0], same[0])
        assert torch.equal(plain[1], same[1])


def test_bias_in_bfloat16() -> None:
    """Rounded, two biases tie and the lower index wins; grouped kernels alone may round."""
    assert first(None) == first(None, **GROUPS) == 1
    assert first(Rounding(bias="bfloat16")) == 0
    grouped = Rounding(bias="bfloat16", bias_when="grouped")
    assert (first(grouped), first(grouped, **GROUPS)) == (1, 0)


def test_weights_in_bfloat16(seed: int) -> None:
    logits = torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))
    exact = route("Renormalize", logits, top_k=4)[1]
    stored = route("Renormalize", logits, top_k=4, rounding=Rounding(weights="bfloat16"))[1]
    assert stored.dtype == torch.float32
    assert torch.equal(stored, exact.bfloat16().float())


def test_logits_in_bfloat16() -> None:
    logits = torch.tensor([[1.0, 1.0 + 2**-10]])
    assert route("Renormalize", logits, top_k=1)[0].item() == 1
    coarse = Rounding(logits="bfloat16")
    assert route("Renormalize", logits, top_k=1, rounding=coarse)[0].item() == 0


def test_fast_sigmoid_saturates_at_sixteen() -> None:
    logits = torch.tensor([[16.0, 16.5, -16.0, -17.0, 15.5, -math.inf]])
    fast = Rounding(fast_sigmoid=True)
    weights = route("TopKSigmoid", logits, top_k=5, rounding=fast)[1]
    assert weights[0, :2].tolist() == [1.0, 1.0]
    assert 0.999 < weights[0, 2] < 1.0
    assert weights[0, 3:].tolist() == [0.0, 0.0]
    exact = route("TopKSigmoid", logits, top_k=5)[1]
    assert exact[0, 3] > 0
    torch.testing.assert_close(weights, exact, rtol=0, atol=2e-7)
    assert route("Sigmoid", logits, top_k=2, rounding=fast)[0].tolist() == [[0, 1]]
    low = torch.tensor([[-20.0, -16.0]])
    assert route("Sigmoid", low, top_k=1)[0].item() == 1
    assert route("Sigmoid", low, top_k=1, rounding=fast)[0].item() == 0


def test_sigmoids_that_are_all_zero_give_weights_of_zero() -> None:
    logits = torch.full((1, 8), -30.0)
    for method in ("DeepSeekV3", "SigmoidRenorm", "MiniMax2"):
        weights = route(method, logits, top_k=4, rounding=Rounding(fast_sigmoid=True))[1]
        assert weights.tolist() == [[0.0] * 4]


def test_fast_softmax_flushes_small_probabilities() -> None:
    """Beyond the gap all are 0, and ties go to the lower index."""
    logits = torch.tensor([[-95.0, -90.0, 0.0]])
    assert route("Default", logits, top_k=2)[0].tolist() == [[2, 1]]
    fast = Rounding(fast_softmax=True)
    ids, weights = route("Default", logits, top_k=2, rounding=fast)
    assert (ids.tolist(), weights.tolist()) == ([[2, 0]], [[1.0, 0.0]])
    near = torch.tensor([[-87.0, -86.0, 0.0]])
    assert route("Default", near, top_k=2, rounding=fast)[0].tolist() == [[2, 1]]
