"""What an expert does between its two matrices."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ActivationKind(StrEnum):
    SWIGLU = "swiglu"
    SWIGLU_OAI = "swiglu_oai"
    SWIGLU_STEP = "swiglu_step"
    GEGLU = "geglu"
    GEGLU_TANH = "geglu_tanh"
    RELU2 = "relu2"
    SITU = "situ"


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation and its parameters; None means "not used by this layer".

    g is the gate half, u the up half:
    swiglu       silu(g) * u; a limit L clamps first: g <= L, |u| <= L (DeepSeek-V4)
    swiglu_oai   g * sigmoid(alpha * g) * (u + beta), g <= L, |u| <= L before
    swiglu_step  min(silu(g), L) * clamp(u, -L, L)
    geglu        gelu(g) * u, exact or with the tanh approximation (geglu_tanh)
    relu2        relu(x) ** 2, not gated
    situ         alpha * tanh(g / alpha) * sigmoid(g) * beta * tanh(u / beta)
    """

    kind: ActivationKind
    alpha: float | None = None
    beta: float | None = None
    limit: float | None = None

    @property
    def gated(self) -> bool:
        """Whether the first matrix has an up half and a gate half."""
        return self.kind is not ActivationKind.RELU2
