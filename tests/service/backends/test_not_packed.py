"""Machines whose oneDNN has no bfloat16 GEMM: weights stay as they are, and the log says so."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from tests.strategies import generator, layer_spec, random_weights

from expertd.backends.grouped.weights import packed
from expertd.core import QuantScheme

LAYER = layer_spec(quant=QuantScheme.BF16, hidden=128, intermediate=64)


def test_a_torch_without_onednn(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    weights = random_weights(LAYER, generator(1))
    with caplog.at_level(logging.WARNING):
        assert packed(weights, "m/0") is weights
    assert "layer m/0 stays" in caplog.text and "no oneDNN GEMM for bfloat16" in caplog.text


def test_a_processor_without_bfloat16() -> None:
    """oneDNN told to be an older processor's: it would refuse to pack."""
    program = (
        "import tests.service.backends.test_not_packed as t\n"
        "weights = t.random_weights(t.LAYER, t.generator(1))\n"
        "assert t.packed(weights, 'm/0') is weights\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert "layer m/0 stays" in ran.stderr and "no oneDNN GEMM for bfloat16" in ran.stderr
