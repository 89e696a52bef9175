"""torch's own grouped GEMM: bf16 on the cards that it has a kernel for."""

from __future__ import annotations

from expertd.capability.row import ANY_ACTIVATION, Limits, Row
from expertd.core import PlanMode, QuantScheme

ROWS = (
    Row(
        backend="grouped_mm",
        entry="grouped_mm",
        mode=PlanMode.ROUTED,
        archs=("sm90", "sm100", "sm103"),
        quants=(QuantScheme.BF16,),
        activation_quant="bf16",
        activations=ANY_ACTIVATION,
        load="expertd.backends.grouped_mm.backend:GroupedMm",
        weight_sites=("output", "input"),
        expert_bias=True,
        # Rows begin at multiples of 16 bytes.
        limits=Limits(hidden_multiple=8, intermediate_multiple=8),
    ),
)
