"""What we read of a stored form, and write, is what the library that defines it says.

compressed-tensors and nvidia-modelopt are no dependencies: skipped where they are not installed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tests.service.weights.stored import STORED, Array

from expertd.core import QuantScheme
from expertd.weights.convert import to_matrix
from expertd.weights.dequant import dequantize_matrix
from expertd.weights.export import EXPORTS, stored_parts
from expertd.weights.quantize import quantize_matrix

FORMS = {
    "ct fp8 channel": "float-quantized",
    "ct fp8 tensor": "float-quantized",
    "ct fp8 block": "float-quantized",
    "ct nvfp4": "nvfp4-pack-quantized",
    "ct mxfp4": "mxfp4-pack-quantized",
    "ct int4": "pack-quantized",
}


def matrix(seed: int) -> Array:
    print(f"seed {seed}")
    random = np.random.default_rng(seed)
    return (random.standard_normal((256, 128)) * random.random((256, 1)) * 9).astype(np.float32)


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("form", FORMS)
def test_compressed_tensors_reads_the_same_numbers(form: str) -> None:
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    _, write, config = STORED[form]
    assert config is not None
    parts, meant = write(matrix(1))
    weights: dict[str, Any] = config["config_groups"]["group_0"]["weights"]
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**weights))
    library: Any = BaseCompressor.get_value_from_registry(FORMS[form])
    got = library.decompress({name: part.clone() for name, part in parts.items()}, scheme)
    tolerance = 2**-8  # it answers in bfloat16
    torch.testing.assert_close(
        got["weight"].float(), torch.from_numpy(meant), rtol=tolerance, atol=0
    )


def modelopt_parts(form: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """(the tensors that ModelOpt stores, what it makes of them again)."""
    from modelopt.torch.quantization import qtensor

    if form == "modelopt nvfp4":
        q, scale, scale_2 = qtensor.NVFP4QTensor.quantize(w, 16)
        meant = q.dequantize(scale=scale, double_scale=scale_2, block_sizes={-1: 16})
        parts = {"weight": q._quantized_data, "weight_scale": scale, "weight_scale_2": scale_2}
    elif form == "modelopt mxfp8":
        q, scale = qtensor.MXFP8QTensor.quantize(w)
        meant = q.dequantize(scale=scale)
        parts = {"weight": q._quantized_data, "weight_scale": scale}
    else:
        q, scale = qtensor.FP8QTensor.quantize(w)
        meant = q._quantized_data.float() * scale
        parts = {"weight": q._quantized_data, "weight_scale": scale}
    return parts, meant.float()


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("form", ["modelopt fp8", "modelopt mxfp8", "modelopt nvfp4"])
def test_modelopt_writes_what_we_read_and_what_we_write(form: str) -> None:
    pytest.importorskip("modelopt", reason="nvidia-modelopt is not installed")
    w = torch.from_numpy(matrix(2))
    parts, meant = modelopt_parts(form, w)
    ours = EXPORTS[QuantScheme(STORED[form][0])].format
    loaded = {name: parts[part.suffix] for name, part in ours.parts.items() if not part.optional}
    read = to_matrix(ours, *w.shape, loaded)
    torch.testing.assert_close(dequantize_matrix(read), meant, rtol=1e-6, atol=0)
    written = stored_parts(ours, quantize_matrix(w, ours.quant, w.abs().amax()))
    assert written.keys() == parts.keys()
    for suffix, tensor in parts.items():
        got = written[suffix]
        assert (got.dtype, got.shape) == (tensor.dtype, tensor.shape)
        same = (got.view(torch.uint8) == tensor.view(torch.uint8)) if got.ndim else got == tensor
        assert same.float().mean() > 0.999  # a tie in float32 may fall to the other side
