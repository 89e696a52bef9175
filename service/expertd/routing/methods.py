"""What every routing method reads and what it means, as one table; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertd.core import RoutingMethod
from expertd.core.routing import Scoring
from expertd.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Traits:
    """What a method does with its settings, and in words.

    renormalize "asked" means that the method reads the setting of that name; eps is the default of
    the sum that it divides by.
    """

    scoring: Scoring
    renormalize: Literal["always", "never", "asked"]
    words: str = ""
    biased: bool = False
    grouped: bool = False
    eps: float = 0.0


UNKNOWABLE = (RoutingMethod.CUSTOM, RoutingMethod.SIMULATED, RoutingMethod.UNSPECIFIED)
"""Only a caller's own declaration; such layers take top-k ids and weights alone."""

# The epsilons are the kernels' own (or, where no kernel has the method, its family's).
TRAITS: dict[RoutingMethod, Traits] = {
    RoutingMethod.DEFAULT: Traits("softmax", "never", "top-k of softmax, as it is"),
    RoutingMethod.RENORMALIZE: Traits("softmax", "always", "top-k of logits, softmax over the k"),
    RoutingMethod.RENORMALIZE_NAIVE: Traits(
        "softmax", "always", "top-k of softmax over its sum, which is softmax over the k"
    ),
    RoutingMethod.GROUPED_SOFTMAX: Traits(
        "softmax", "asked", "top-k of softmax in the best groups", grouped=True, eps=1e-20
    ),
    RoutingMethod.SOFTMAX_BIAS: Traits(
        "softmax",
        "asked",
        "top-k of softmax + bias, over their clamped sum",
        biased=True,
        eps=1e-12,
    ),
    RoutingMethod.DEEPSEEK_V3: Traits(
        "sigmoid",
        "asked",
        "top-k of sigmoid + bias in the best groups, over their sum",
        biased=True,
        grouped=True,
        eps=1e-20,
    ),
    RoutingMethod.MINIMAX2: Traits(
        "sigmoid", "always", "top-k of sigmoid + bias, over their sum", biased=True, eps=1e-20
    ),
    RoutingMethod.SIGMOID_RENORM: Traits(
        "sigmoid", "asked", "top-k of sigmoid, over their clamped sum", eps=1e-20
    ),
    RoutingMethod.SIGMOID: Traits("sigmoid", "never", "top-k of sigmoid, as it is"),
    RoutingMethod.TOPK_SIGMOID: Traits("sigmoid", "never", "top-k of logits, sigmoid of each"),
    RoutingMethod.LLAMA4: Traits("sigmoid", "never", "top-k of logits, sigmoid of each, on inputs"),
    RoutingMethod.DEEPSEEK_V4: Traits(
        "sqrtsoftplus",
        "asked",
        "top-k of sqrt(softplus) + bias, over their sum",
        biased=True,
        eps=1e-20,
    ),
    RoutingMethod.TOPK: Traits("none", "never", "top-k of logits, as they are"),
    **{
        method: Traits("none", "asked", "known to the caller alone", biased=True, grouped=True)
        for method in UNKNOWABLE
    },
}


def method_named(name: str) -> RoutingMethod:
    """The method of that name; raises InvalidArgument listing the names there are."""
    try:
        return RoutingMethod(name)
    except ValueError:
        known = ", ".join(RoutingMethod)
        raise InvalidArgument(f"method {name!r} is unknown; accepted: {known}") from None


def computable(method: RoutingMethod) -> RoutingMethod:
    """The method itself; raises InvalidArgument for those whose maths expertd cannot know."""
    if method in UNKNOWABLE:
        able = ", ".join(m for m in TRAITS if m not in UNKNOWABLE)
        raise InvalidArgument(
            f"method {method}: only its caller knows what it computes; route there and send "
            f"topk_ids and topk_weights, or name one of: {able}"
        )
    return method


def methods_with(trait: Literal["biased", "grouped"]) -> str:
    """The names of the methods that have a correction bias, or groups."""
    able = (m for m, traits in TRAITS.items() if getattr(traits, trait) and m not in UNKNOWABLE)
    return ", ".join(able)
