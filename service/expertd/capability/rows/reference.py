"""The fp32 authority: any layer on any device, never chosen by itself."""

from __future__ import annotations

from expertd.capability.row import Row
from expertd.core import ActivationKind, PlanMode, QuantScheme

ROWS = (
    Row(
        backend="reference",
        entry="reference",
        mode=PlanMode.ROUTED,
        archs=(),
        quants=tuple(QuantScheme),
        activation_quant="bf16",
        activations=tuple(ActivationKind),
        load="expertd.backends.reference.backend:Reference",
        weight_sites=("output", "input"),
        auto=False,
        needs_proof=False,
    ),
)
