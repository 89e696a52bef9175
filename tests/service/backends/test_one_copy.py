"""Canonical weights serve Triton in every format, and CUTLASS where it takes them as they are."""

from __future__ import annotations

import pytest
import torch
from tests.strategies import generator, layer_spec, random_weights

from expertd.backends.flashinfer_cutlass.weights import native as cutlass
from expertd.backends.footprint import bytes_beside, tensors_in
from expertd.backends.triton.weights import native as triton
from expertd.capability.rows import ROWS
from expertd.core import QuantScheme
from expertd.weights.quantize import quantize

TRITON = {(q, r.activation_quant) for r in ROWS if r.backend == "triton" for q in r.quants}
CUTLASS = [("bf16", "bf16"), ("fp16", "bf16"), ("fp8_block128", "fp8_group128")]
CONSTANTS = 1000
"""Bytes of what is made for each expert beside its matrices and scales."""


@pytest.mark.parametrize(("quant", "rows"), sorted(TRITON))
def test_triton_holds_no_weights_of_its_own(quant: QuantScheme, rows: str) -> None:
    weights = random_weights(layer_spec(quant=quant, hidden=512, intermediate=512), generator(1))
    assert bytes_beside(tensors_in(triton(weights, rows)), weights) < CONSTANTS


@pytest.mark.parametrize("quant", [QuantScheme.MXFP4, QuantScheme.NVFP4, QuantScheme.MXINT4])
def test_triton_copies_scales_alone_where_their_rows_begin_anywhere(quant: QuantScheme) -> None:
    weights = random_weights(layer_spec(quant=quant, hidden=160, intermediate=96), generator(1))
    matrix = triton(weights, "bf16").first
    assert matrix.weight.data_ptr() == weights.w13.data_ptr()
    assert matrix.scale is not None and weights.scale13 is not None
    assert matrix.scale.stride(1) * matrix.scale.element_size() % 16 == 0
    given = weights.scale13.view(matrix.scale.dtype)
    assert torch.equal(matrix.scale[..., : given.shape[-1]], given)


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
