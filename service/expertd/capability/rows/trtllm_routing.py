"""What the routing kernels inside the TRT-LLM entries accept, method by method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from expertd.capability.row import Tier
from expertd.capability.sources import MINIMAX2_SCALE
from expertd.core import RoutingMethod
from expertd.routing.rounding import Rounding

SMALL = Tier(256, 8, since="0.6.8")
# Before 0.6.8 all-negative logits under Renormalize chose wrong experts, and logits had to have
# the one dtype that the method wanted.
LARGE = Tier(2048, 32, since="0.6.8")
# Until 0.6.18 the score was recovered as (score + bias) - bias, which a large bias makes 0.
BIASED = Tier(1024, 32, scale=True, needs_bias=True, since="0.6.18")

ROUTING: Mapping[RoutingMethod, tuple[Tier, ...]] = {
    RoutingMethod.DEFAULT: (SMALL,),
    RoutingMethod.RENORMALIZE: (LARGE,),
    RoutingMethod.RENORMALIZE_NAIVE: (LARGE,),
    RoutingMethod.DEEPSEEK_V3: (
        BIASED,
        # Until 0.6.17 a row whose chosen scores all underflow became 0/0.
        Tier(512, 22, grouped=True, scale=True, since="0.6.17"),
    ),
    # With a range of experts and few tokens, the kernel takes global ids for local ones.
    RoutingMethod.LLAMA4: (Tier(128, 1, whole=True, since="0.6.8"),),
    RoutingMethod.SIGMOID_RENORM: (SMALL,),
    # Until FlashInfer's fix 3499 the scale was ignored: a fact of the kernels' own text.
    RoutingMethod.MINIMAX2: (replace(BIASED, scale_fact=MINIMAX2_SCALE),),
    RoutingMethod.SIGMOID: (Tier(256, 8, since="0.6.11"),),
    RoutingMethod.TOPK_SIGMOID: (Tier(256, 8, since="0.6.18"),),
}

ROUNDING = Rounding(
    bias="bfloat16",
    bias_when="grouped",
    weights="bfloat16",
    fast_sigmoid=True,
    fast_softmax=True,
)

MAX_GROUPS = 8
MAX_TOPK_GROUP = 4
MAX_EXPERTS_A_GROUP = 32
"""The grouped kernel's own bounds, whatever the entry."""
