"""What a kernel rounds on its way from logits to weights; the reference follows it when asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Rounding:
    """dtype names; "float32" rounds nothing.

    logits, bias and weights are stored in that dtype, bias perhaps only where groups are chosen.
    fast_sigmoid: 0.5 * tanh(0.5 x) + 0.5, exactly 0 and 1 from |x| = 16 on.
    fast_softmax: probabilities more than e^87.3 below the largest are exactly 0.
    """

    bias: str = "float32"
    weights: str = "float32"
    fast_sigmoid: bool = False
    logits: str = "float32"
    bias_when: Literal["always", "grouped"] = "always"
    fast_softmax: bool = False
