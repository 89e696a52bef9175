"""Rows as kernels read them, against the backend's own quantiser, and how much that loses."""

from __future__ import annotations

import pytest
import torch
from tests.strategies import generator

from expertd.backends.flashinfer_trtllm.quantize import nvfp4
from expertd.core import QuantScheme
from expertd.proof.rows import as_read
from expertd.weights.canonical import ExpertWeights
from expertd.weights.dequant import e2m1_to_float


def weights_with(input13: float | None) -> ExpertWeights:
    """Of a layer with this static multiplier of its rows, and nothing else of interest."""
    none = torch.zeros(1, 1, 1)
    scale = None if input13 is None else torch.tensor([input13 / 2, input13])
    return ExpertWeights(QuantScheme.NVFP4, none, none, input13=scale)


@pytest.mark.parametrize("multiplier", [None, 0.013])
def test_it_is_what_the_backend_sends(multiplier: float | None) -> None:
    rows = torch.randn(7, 96, generator=generator(3)).bfloat16()
    rows[2, 16:48] = 0
    whole = 1.0 if multiplier is None else multiplier
    codes, scale = nvfp4(rows, torch.tensor(whole))
    assert scale is not None
    groups = e2m1_to_float(codes).view(7, -1, 16) * scale.float().view(7, -1, 1) * whole
    found = as_read(rows, "nvfp4", weights_with(multiplier))
    torch.testing.assert_close(found, groups.view(7, 96))


def test_four_bits_lose_nine_percent_and_finer_formats_are_left_alone() -> None:
    rows = torch.randn(64, 512, generator=generator(5))
    lost = (as_read(rows, "nvfp4", weights_with(None)) - rows).norm() / rows.norm()
    assert 0.085 < float(lost) < 0.1
    assert as_read(rows, "fp8_group128", weights_with(None)) is rows
