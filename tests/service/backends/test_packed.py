"""Weights in oneDNN's order: the same bits out of them, and never two copies of a layer."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.service.backends.test_torch_experts import ACTIVATIONS, backend, run
from tests.strategies import generator, layer_spec, random_topk, random_weights
from torch import Tensor

from expertd.backends.grouped import weights as grouped_weights
from expertd.backends.grouped.weights import Reordered, packed
from expertd.core import LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import dequantize

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 GEMM of oneDNN: test_not_packed.py has that case",
)

SIZES = {"hidden": 128, "intermediate": 64}


def copy_of(weights: ExpertWeights) -> ExpertWeights:
    return replace(weights, w13=weights.w13.clone(), w2=weights.w2.clone())


def bf16_layer(seed: int, **changes: Any) -> tuple[LayerSpec, ExpertWeights, ExpertWeights]:
    """A layer, its canonical weights, and the same ones packed."""
    spec = layer_spec(quant=QuantScheme.BF16, **SIZES | changes)
    weights = random_weights(spec, generator(seed))
    made = packed(copy_of(weights), "m/0")
    assert isinstance(made.packed, Reordered)
    return spec, weights, made


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.sampled_from((1, 3, 16, 40)),
    rows=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    activation=st.sampled_from(tuple(ACTIVATIONS.values())),
    bias=st.booleans(),
    held=st.sampled_from(((0, 6), (2, 5))),
)
@settings(max_examples=25, deadline=None)
def test_every_bit_of_an_answer_stays(
    seed: int,
    tokens: int,
    rows: torch.dtype,
    activation: Any,
    bias: bool,
    held: tuple[int, int],
) -> None:
    spec, plain, made = bf16_layer(
        seed, activation=activation, expert_bias=bias, expert_begin=held[0], expert_end=held[1]
    )
    random = generator(seed + 1)
    ids, router = random_topk(tokens, spec.num_experts, 3, random)
    given = torch.randn(tokens, spec.hidden, generator=random).to(rows), ids, router
    wanted = ((ids >= held[0]) & (ids < held[1])).any()
    for name in ("reference", "grouped"):
        expected = run(backend(name, spec, plain), *given)
        assert (expected.norm() > 0) == wanted
        assert torch.equal(run(backend(name, spec, made), *given), expected), name


def test_grouped_multiplies_by_the_packed_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would be no faster for them."""
    spec, _, made = bf16_layer(1)
    monkeypatch.setattr(Reordered, "first", None)
    monkeypatch.setattr(Reordered, "second", None)
    ids, router = random_topk(4, spec.num_experts, 2, generator(2))
    out = run(backend("grouped", spec, made), torch.ones(4, spec.hidden).bfloat16(), ids, router)
    assert out.isfinite().all() and out.any()


def test_each_pattern_of_bits_comes_back() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(1, 512, 128)
    weights = ExpertWeights(
        QuantScheme.BF16, w13=patterns.view(torch.bfloat16), w2=patterns.view(torch.bfloat16)
    )
    made = packed(copy_of(weights), "m/0").packed
    assert made is not None
    assert torch.equal(made.first(0).view(torch.int16), patterns[0])
    assert torch.equal(made.second(0).view(torch.int16), patterns[0])


def test_who_reads_the_canonical_order_fails_loudly() -> None:
    spec, plain, made = bf16_layer(3)
    assert made.w13.shape == plain.w13.shape and made.w13.dtype == plain.w13.dtype
    assert made.nbytes == plain.nbytes and list(made.tensors) == list(plain.tensors)
    with pytest.raises((RuntimeError, NotImplementedError)):
        made.w13[0].tolist()
    for got, expected in zip(dequantize(made, 5), dequantize(plain, 5), strict=True):
        assert torch.equal(got, expected)
    assert backend("grouped", spec, made).native_bytes == 0


def test_a_layer_is_never_held_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anonymous memory after each matrix: what was packed has left the canonical tensors."""
    spec = layer_spec(
        quant=QuantScheme.BF16, hidden=1024, intermediate=512, num_experts=32, expert_end=32
    )
    weights = random_weights(spec, generator(4))
    seen: list[int] = []
    reorder = grouped_weights._reorder

    def watched(matrix: Tensor) -> Tensor:
        seen.append(anonymous_bytes())
        return reorder(matrix)

    monkeypatch.setattr(grouped_weights, "_reorder", watched)
    before = anonymous_bytes()
    made = packed(weights, "m/0")
    del weights
    extra = max(*seen, anonymous_bytes()) - before
    print(f"held {made.nbytes >> 20} MiB, at most {extra >> 20} more")
    assert len(seen) == 2 + 2 * spec.held
    assert extra < made.nbytes / 6


def anonymous_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) << 10


def test_a_shape_that_would_be_padded_stays_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    spec = layer_spec(quant=QuantScheme.BF16, hidden=40, intermediate=24)
    weights = random_weights(spec, generator(5))
    with caplog.at_level(logging.WARNING):
        assert packed(weights, "m/0") is weights
    assert "w13 [48, 40] would be padded" in caplog.text


def test_a_matrix_that_does_not_come_back_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights(layer_spec(quant=QuantScheme.BF16, **SIZES), generator(6))
    reorder = grouped_weights._reorder
    monkeypatch.setattr(grouped_weights, "_reorder", lambda matrix: reorder(matrix.flip(0)))
    with caplog.at_level(logging.WARNING):
        assert packed(weights, "m/0") is weights
    assert "does not come back" in caplog.text
    assert weights.w13.any()


@pytest.mark.parametrize("quant", [quant for quant in QuantScheme if quant != QuantScheme.BF16])
def test_other_formats_stay_as_they_are(quant: QuantScheme) -> None:
    weights = random_weights(layer_spec(quant=quant, hidden=256, intermediate=128), generator(7))
    assert packed(weights, "m/0") is weights
