"""Canonical weights serve Triton in every format, and CUTLASS where it takes them as they are."""

from __future__ import annotations

import pytest
from tests.strategies import generator, layer_spec, random_weights

from expertd.backends.flashinfer_cutlass.weights import native as cutlass
from expertd.backends.footprint import bytes_beside, tensors_in
from expertd.backends.triton.weights import FORMATS
from expertd.backends.triton.weights import native as triton
from expertd.capability.rows import ROWS
from expertd.core import QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.quantize import quantize

TRITON = {(q, r.activation_quant) for r in ROWS if r.backend == "triton" for q in r.quants}
CUTLASS = [("bf16", "bf16"), ("fp16", "bf16"), ("fp8_block128", "fp8_group128")]
CONSTANTS = 1000
"""Bytes of what is made for each expert beside its matrices and scales."""


@pytest.mark.parametrize(("quant", "rows"), sorted(TRITON))
def test_triton_holds_no_weights_of_its_own(quant: QuantScheme, rows: str) -> None:
    weights = random_weights(layer_spec(quant=quant, hidden=512, intermediate=512), generator(1))
    assert bytes_beside(tensors_in(triton(weights, rows)), weights) < again(weights) + CONSTANTS


def again(weights: ExpertWeights) -> int:
    """Bytes of the scales that lie in an order of their own: those of groups."""
    if FORMATS[weights.quant].group not in (16, 32):
        return 0
    assert weights.scale13 is not None and weights.scale2 is not None
    return weights.scale13.nbytes + weights.scale2.nbytes


@pytest.mark.parametrize("quant", [q for q in FORMATS if FORMATS[q].group in (16, 32)])
def test_triton_reads_weights_as_they_are_and_pads_the_scales(quant: QuantScheme) -> None:
    weights = random_weights(layer_spec(quant=quant, hidden=160, intermediate=96), generator(1))
    matrix = triton(weights, "bf16").first
    assert matrix.weight.data_ptr() == weights.w13.data_ptr()
    assert matrix.scale is not None and weights.scale13 is not None
    assert matrix.scale.nbytes == weights.scale13.nbytes // 160 * 256


@pytest.mark.parametrize(("quant", "rows"), CUTLASS)
def test_cutlass_holds_none_where_it_takes_them_as_they_are(quant: QuantScheme, rows: str) -> None:
    weights = random_weights(layer_spec(quant=quant, hidden=256, intermediate=128), generator(1))
    assert bytes_beside(tensors_in(cutlass(weights, rows)), weights) == 0


def test_cutlass_copies_only_halves_whose_scales_differ() -> None:
    spec = layer_spec(quant=QuantScheme.FP8_TENSOR, hidden=256, intermediate=128)
    plain = random_weights(layer_spec(hidden=256, intermediate=128), generator(1))
    for tied in (True, False):
        weights = quantize(plain.w13, plain.w2, spec.quant, gated=True, tied=tied)
        held = bytes_beside(tensors_in(cutlass(weights, "fp8_tensor")), weights)
        assert held < CONSTANTS if tied else weights.w13.nbytes <= held < weights.nbytes
