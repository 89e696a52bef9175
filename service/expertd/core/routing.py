"""How a layer chooses its experts, by name and by its settings."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal


class RoutingMethod(StrEnum):
    """Names only: integers exist at the call into a kernel library and nowhere else."""

    DEFAULT = "Default"
    RENORMALIZE = "Renormalize"
    DEEPSEEK_V3 = "DeepSeekV3"
    LLAMA4 = "Llama4"
    RENORMALIZE_NAIVE = "RenormalizeNaive"
    TOPK = "TopK"
    SIGMOID_RENORM = "SigmoidRenorm"
    MINIMAX2 = "MiniMax2"
    SIGMOID = "Sigmoid"
    TOPK_SIGMOID = "TopKSigmoid"
    UNSPECIFIED = "Unspecified"
    # Without an integer in any kernel library: they can only run as routed plans.
    DEEPSEEK_V4 = "DeepSeekV4"
    GROUPED_SOFTMAX = "GroupedSoftmax"
    SOFTMAX_BIAS = "SoftmaxBias"
    CUSTOM = "Custom"
    SIMULATED = "Simulated"


Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "none"]


@dataclass(frozen=True, slots=True)
class RoutingSpec:
    """The settings of one layer's router, as its family computes it.

    scale_site says where the family applies routed_scaling_factor, weight_site whether the router
    weight multiplies an expert's output or its input. eps None means the method's own default;
    0.0 means that the family divides by the bare sum.
    """

    method: RoutingMethod
    scoring: Scoring
    top_k: int
    renormalize: bool = True
    n_group: int | None = None
    topk_group: int | None = None
    routed_scaling_factor: float = 1.0
    scale_site: Literal["router", "output"] = "router"
    weight_site: Literal["output", "input"] = "output"
    eps: float | None = None
    bias: bool = False
    group_fill: float | None = None
    group_score: Literal["top2", "max"] = "top2"

    @property
    def grouped(self) -> bool:
        """Whether the choice of groups restricts the choice of experts."""
        return self.n_group is not None and self.n_group > 1
