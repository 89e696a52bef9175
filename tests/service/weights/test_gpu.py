"""Loading onto a card gives the bytes that loading onto the CPU gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.service.weights.stored import STORED
from tests.service.weights.test_formats import write

from expertd.errors import FailedPrecondition
from expertd.weights import reader
from expertd.weights.dequant import dequantize
from expertd.weights.digest import weights_digest
from expertd.weights.layers import layer_specs
from expertd.weights.load import load_layer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("form", STORED)
def test_a_card_holds_the_same_bytes(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "STAGING_BYTES", 1 << 21)  # fewer slots than experts
    _, writer, quantization = STORED[form]
    checkpoint, _ = write(tmp_path / "m", {0: writer}, quantization)
    spec = layer_specs(checkpoint)[0]
    on_cpu, _ = load_layer(checkpoint, 0, spec, "cpu")
    on_card, _ = load_layer(checkpoint, 0, spec, "cuda")
    for name, tensor in on_cpu.tensors.items():
        got = on_card.tensors[name].cpu()
        assert torch.equal(got.view(torch.uint8), tensor.view(torch.uint8)), name
    assert weights_digest(on_cpu) == weights_digest(on_card)
    for matrix, card in zip(dequantize(on_cpu, 1), dequantize(on_card, 1), strict=True):
        assert torch.equal(matrix, card.cpu())


def test_a_scale_that_is_not_finite_is_named_on_a_card_too(tmp_path: Path) -> None:
    _, writer, quantization = STORED["deepseek fp8"]

    def spoilt(w: object) -> object:
        parts, meant = writer(w)  # type: ignore[arg-type]
        parts["weight_scale_inv"][0, 0] = float("nan")
        return parts, meant

    checkpoint, _ = write(tmp_path / "m", {0: spoilt}, quantization)
    with pytest.raises(FailedPrecondition, match="weight_scale_inv.*NaN"):
        load_layer(checkpoint, 0, layer_specs(checkpoint)[0], "cuda")
