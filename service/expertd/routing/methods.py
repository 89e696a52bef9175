"""What every routing method reads and what it means, as one table; no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from expertd.core import RoutingMethod
from expertd.core.routing import Scoring
from expertd.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class Traits:
    """What a method does with its settings.

    renormalize "asked" means that the method reads the setting of that name; eps is the default of
    the sum that it divides by.
    """

    scoring: Scoring
    renormalize: Literal["always", "never", "asked"]
    biased: bool = False
    grouped: bool = False
    eps: float = 0.0


# The epsilons are the kernels' own (or, where no kernel has the method, its family's).
TRAITS: dict[RoutingMethod, Traits] = {
    RoutingMethod.DEFAULT: Traits("softmax", "never"),
    RoutingMethod.RENORMALIZE: Traits("softmax", "always"),
    RoutingMethod.RENORMALIZE_NAIVE: Traits("softmax", "always"),
    RoutingMethod.GROUPED_SOFTMAX: Traits("softmax", "asked", grouped=True, eps=1e-20),
    RoutingMethod.SOFTMAX_BIAS: Traits("softmax", "asked", biased=True, eps=1e-12),
    RoutingMethod.DEEPSEEK_V3: Traits("sigmoid", "asked", biased=True, grouped=True, eps=1e-20),
    RoutingMethod.MINIMAX2: Traits("sigmoid", "always", biased=True, eps=1e-20),
    RoutingMethod.SIGMOID_RENORM: Traits("sigmoid", "asked", eps=1e-20),
    RoutingMethod.SIGMOID: Traits("sigmoid", "never"),
    RoutingMethod.TOPK_SIGMOID: Traits("sigmoid", "never"),
    RoutingMethod.LLAMA4: Traits("sigmoid", "never"),
    RoutingMethod.DEEPSEEK_V4: Traits("sqrtsoftplus", "asked", biased=True, eps=1e-20),
    RoutingMethod.TOPK: Traits("none", "never"),
}

UNKNOWABLE = (
    "only the caller knows what it computes; route in the caller and send topk_ids and "
    "topk_weights, or declare one of: "
)


def method_named(name: str) -> RoutingMethod:
    """The method of that name; raises InvalidArgument listing the names there are."""
    try:
        return RoutingMethod(name)
    except ValueError:
        known = ", ".join(RoutingMethod)
        raise InvalidArgument(f"method {name!r} is unknown; accepted: {known}") from None


def traits_of(method: RoutingMethod) -> Traits:
    """What the method does; raises InvalidArgument for those whose maths expertd cannot know."""
    if method not in TRAITS:
        raise InvalidArgument(f"method {method}: {UNKNOWABLE}{', '.join(TRAITS)}")
    return TRAITS[method]
