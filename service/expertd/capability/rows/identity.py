"""A layer that copies its rows: what a transport benchmark calls."""

from __future__ import annotations

from expertd.capability.row import ANY_ACTIVATION, Row
from expertd.core import PlanMode, QuantScheme

ROWS = (
    Row(
        backend="identity",
        entry="identity",
        mode=PlanMode.ROUTED,
        archs=(),
        quants=tuple(QuantScheme),
        activation_quant="bf16",
        activations=ANY_ACTIVATION,
        load="expertd.backends.identity.backend:Identity",
        formats=("fp8_group128", "mxfp8"),
        weight_sites=("output", "input"),
        expert_bias=True,
        identity=True,
        needs_proof=False,
    ),
)
