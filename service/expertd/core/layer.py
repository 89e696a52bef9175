"""What a layer of routed experts is, before any weight is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from expertd.core.activation import Activation
from expertd.core.quant import QuantScheme
from expertd.core.routing import RoutingSpec


class PlanMode(StrEnum):
    """Who routes: the kernel itself from logits, or expertd (or the caller) before it."""

    MONOLITHIC = "monolithic"
    ROUTED = "routed"


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """A layer's shape and meaning; experts [expert_begin, expert_end) of num_experts are held.

    routing is None when a layer takes top-k ids only (hash-routed layers) or nothing (identity).
    routing_refusal then says why logits cannot be used, with the form that works.
    activation_quant is the format that the checkpoint declares for its rows ("bf16": none); None
    means the usual one of its scheme.
    """

    hidden: int
    intermediate: int
    num_experts: int
    expert_begin: int
    expert_end: int
    activation: Activation
    quant: QuantScheme
    routing: RoutingSpec | None
    expert_bias: bool = False
    routing_refusal: str | None = None
    activation_quant: str | None = None

    @property
    def held(self) -> int:
        """L, the number of experts held here."""
        return self.expert_end - self.expert_begin

    @property
    def complete(self) -> bool:
        """Whether every expert of the layer is held here."""
        return self.held == self.num_experts

    @property
    def rows13(self) -> int:
        """M, the rows of an expert's first matrix."""
        return self.intermediate * (2 if self.activation.gated else 1)
