"""The CPU default: rows sorted by expert, one GEMM per active expert, weights dequantised."""

from __future__ import annotations

from expertd.capability.row import ANY_ACTIVATION, Row
from expertd.core import PlanMode, QuantScheme

ROWS = (
    Row(
        backend="grouped",
        entry="grouped",
        mode=PlanMode.ROUTED,
        archs=("cpu",),
        quants=tuple(QuantScheme),
        activation_quant="bf16",
        activations=ANY_ACTIVATION,
        load="expertd.backends.grouped.backend:Grouped",
        formats=("fp8_group128", "mxfp8"),
        weight_sites=("output", "input"),
        expert_bias=True,
        needs_proof=False,
    ),
)
