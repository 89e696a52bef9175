"""Which activation format goes with which weight format."""

from __future__ import annotations

from expertd.core import LayerSpec, QuantScheme

DECLARED: dict[QuantScheme, str] = {
    QuantScheme.FP32: "bf16",
    QuantScheme.BF16: "bf16",
    QuantScheme.FP16: "bf16",
    QuantScheme.FP8_TENSOR: "fp8_tensor",
    QuantScheme.FP8_CHANNEL: "fp8_token",
    QuantScheme.FP8_BLOCK128: "fp8_group128",
    QuantScheme.MXFP8: "mxfp8",
    QuantScheme.NVFP4: "nvfp4",
    QuantScheme.MXFP4: "bf16",
    QuantScheme.MXINT4: "bf16",
}
"""What a checkpoint of that scheme means when it says nothing else; bf16 is "not quantised"."""


def declared_activation(spec: LayerSpec) -> str:
    """The format in which the checkpoint wants its rows to enter the first GEMM."""
    return spec.activation_quant or DECLARED[spec.quant]
