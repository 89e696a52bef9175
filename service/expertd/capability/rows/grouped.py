"""The CPU default: rows sorted by expert, one GEMM per active expert, weights dequantised."""

from __future__ import annotations

from expertd.capability.row import Row
from expertd.core import ActivationKind, PlanMode, QuantScheme

ROWS = (
    Row(
        backend="grouped",
        entry="grouped",
        mode=PlanMode.ROUTED,
        archs=("cpu",),
        quants=tuple(QuantScheme),
        activation_quant="bf16",
        activations=tuple(ActivationKind),
        load="expertd.backends.grouped.backend:Grouped",
        weight_sites=("output", "input"),
        needs_proof=False,
    ),
)
