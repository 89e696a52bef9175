"""A layer that copies its rows: what a transport benchmark calls."""

from __future__ import annotations

from expertd.capability.row import Row
from expertd.core import ActivationKind, PlanMode, QuantScheme

ROWS = (
    Row(
        backend="identity",
        entry="identity",
        mode=PlanMode.ROUTED,
        archs=(),
        quants=tuple(QuantScheme),
        activation_quant="bf16",
        activations=tuple(ActivationKind),
        load="expertd.backends.identity.backend:Identity",
        weight_sites=("output", "input"),
        identity=True,
        needs_proof=False,
    ),
)
