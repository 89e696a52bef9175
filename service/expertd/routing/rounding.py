"""What a kernel rounds on its way from logits to weights; the reference follows it when asked."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rounding:
    """dtype names; "float32" rounds nothing. fast_sigmoid: tanh.approx, 0 and 1 beyond |x| = 16."""

    bias: str = "float32"
    weights: str = "float32"
    fast_sigmoid: bool = False
