"""Padded layers: gpt-oss's 2880, Nemotron's 1856 without a gate, 704 of a halved 1408."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.service.trtllm.layers import ACTIVATIONS, layer
from tests.strategies import generator, random_weights

from expertd.backends.flashinfer_trtllm.pad import Sizes, pad, pad_columns
from expertd.core import ActivationKind, LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import dequantize

# (hidden, intermediate, activation): one size of a real model each, the other one small.
SIZES = [
    (2880, 96, ActivationKind.SWIGLU_OAI),
    (128, 1856, ActivationKind.RELU2),
    (128, 704, ActivationKind.SWIGLU),
    (160, 160, ActivationKind.SWIGLU),
]
SCHEMES = [quant for quant in QuantScheme if quant not in (QuantScheme.FP32, QuantScheme.FP16)]


def rounded(size: int, step: int) -> int:
    return -(-size // step) * step


@pytest.mark.parametrize("quant", SCHEMES)
@pytest.mark.parametrize(("hidden", "intermediate", "kind"), SIZES)
def test_padding_adds_nothing_but_zeros(
    quant: QuantScheme, hidden: int, intermediate: int, kind: ActivationKind
) -> None:
    spec: LayerSpec = layer(
        quant,
        hidden=hidden,
        intermediate=intermediate,
        num_experts=2,
        expert_end=2,
        activation=ACTIVATIONS[kind],
        expert_bias=True,
    )
    weights = random_weights(spec, generator(21))
    step = 256 if quant is QuantScheme.MXINT4 else 128
    sizes = Sizes(hidden, intermediate, rounded(hidden, step), rounded(intermediate, step))
    if quant is QuantScheme.FP8_BLOCK128:
        # Blocks cut short in H cannot be told to that entry: its rows are never padded.
        spec, weights, sizes = whole_hidden(spec, sizes)
    grown = pad(weights, spec, sizes)
    halves = 2 if spec.activation.gated else 1
    for expert in range(2):
        w13, w2 = dequantize(weights, expert)
        big13, big2 = dequantize(grown, expert)
        assert big13.shape == (halves * sizes.native_intermediate, sizes.native_hidden)
        assert big2.shape == (rounded(sizes.hidden, 128), sizes.native_intermediate)
        for half, big in zip(w13.chunk(halves), big13.chunk(halves), strict=True):
            assert torch.equal(big[:intermediate, : sizes.hidden], half)
            assert not big[intermediate:].any() and not big[:, sizes.hidden :].any()
        assert torch.equal(big2[: sizes.hidden, :intermediate], w2)
        assert not big2[sizes.hidden :].any() and not big2[:, intermediate:].any()
    assert grown.bias13 is not None and weights.bias13 is not None
    bias = grown.bias13.view(2, halves, -1)
    assert torch.equal(bias[..., :intermediate].flatten(1), weights.bias13)
    assert not bias[..., intermediate:].any()


def whole_hidden(spec: LayerSpec, sizes: Sizes) -> tuple[LayerSpec, ExpertWeights, Sizes]:
    spec = replace(spec, hidden=256)
    return (
        spec,
        random_weights(spec, generator(22)),
        replace(sizes, hidden=256, native_hidden=256),
    )


def test_weights_that_fit_are_not_copied() -> None:
    spec = layer(QuantScheme.BF16)
    weights = random_weights(spec, generator(23))
    assert pad(weights, spec, Sizes(256, 256, 256, 256)) is weights


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.uint8])
def test_columns_of_packed_rows_grow_in_proportion(dtype: torch.dtype) -> None:
    rows = torch.randint(1, 100, (3, 80), dtype=torch.uint8).to(dtype)
    grown = pad_columns(rows, 160, 256)
    assert grown.shape == (3, 128)
    assert torch.equal(grown[:, :80].float(), rows.float()) and not grown[:, 80:].float().any()
    assert pad_columns(rows, 160, 160) is rows
