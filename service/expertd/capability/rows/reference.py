"""The fp32 authority: any layer on any device, never chosen by itself."""

from __future__ import annotations

from expertd.capability.row import ANY_ACTIVATION, Row
from expertd.core import PlanMode, QuantScheme

ROWS = (
    Row(
        backend="reference",
        entry="reference",
        mode=PlanMode.ROUTED,
        archs=(),
        quants=tuple(QuantScheme),
        activation_quant="bf16",
        activations=ANY_ACTIVATION,
        load="expertd.backends.reference.backend:Reference",
        formats=("fp8_group128", "mxfp8"),
        weight_sites=("output", "input"),
        expert_bias=True,
        auto=False,
        needs_proof=False,
    ),
)
