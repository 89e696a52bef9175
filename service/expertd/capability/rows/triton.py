"""Our own Triton kernels: every NVIDIA card from SM80 on, whatever else is installed."""

from __future__ import annotations

from dataclasses import replace

from expertd.capability.row import ANY_ACTIVATION, Limits, Row
from expertd.core import PlanMode, QuantScheme

# Not sm107: LLVM ends the process where Triton up to 3.7.1 compiles for it.
ARCHS = ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121")
FP8_ARCHS = tuple(arch for arch in ARCHS if arch not in ("sm80", "sm86"))

_BF16 = Row(
    backend="triton",
    entry="triton",
    mode=PlanMode.ROUTED,
    archs=ARCHS,
    quants=(QuantScheme.BF16, QuantScheme.FP16),
    activation_quant="bf16",
    activations=ANY_ACTIVATION,
    load="expertd.backends.triton.backend:Triton",
    weight_sites=("output", "input"),
    expert_bias=True,
    library="triton",
)


def _fp8(quant: QuantScheme, activation_quant: str, formats: tuple[str, ...] = ()) -> Row:
    return replace(
        _BF16,
        archs=FP8_ARCHS,
        quants=(quant,),
        activation_quant=activation_quant,
        formats=formats,
    )


# A block of 32 (two of 16) shares a scale along K: both K sizes are whole blocks.
_GROUPS = Limits(hidden_multiple=32, intermediate_multiple=32)

_WEIGHT_ONLY = replace(
    _BF16,
    quants=(
        QuantScheme.FP8_TENSOR,
        QuantScheme.FP8_CHANNEL,
        QuantScheme.FP8_BLOCK128,
        QuantScheme.MXFP8,
        QuantScheme.MXFP4,
        QuantScheme.NVFP4,
        QuantScheme.MXINT4,
    ),
    limits=_GROUPS,
)

ROWS = (
    _fp8(QuantScheme.FP8_TENSOR, "fp8_tensor"),
    _fp8(QuantScheme.FP8_CHANNEL, "fp8_token"),
    _fp8(QuantScheme.FP8_BLOCK128, "fp8_group128", ("fp8_group128",)),
    replace(_fp8(QuantScheme.MXFP8, "mxfp8", ("mxfp8",)), limits=_GROUPS),
    _BF16,
    _WEIGHT_ONLY,
)
