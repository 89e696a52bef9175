"""Routing methods as the integers of one version of a kernel library; imports none of it.

Integers exist at the call into a kernel and nowhere else: 9 was Unspecified before FlashInfer
0.6.18 and is TopKSigmoid since. They are read from the installed library's own enum, by name.
"""

from __future__ import annotations

from collections.abc import Mapping

from expertd.core import RoutingMethod
from expertd.errors import FailedPrecondition
from expertd_wire.errors import Refusal

# How FlashInfer's RoutingMethodType spells them. Unspecified is a member there and no method.
FLASHINFER_NAMES: dict[RoutingMethod, str] = {
    RoutingMethod.DEFAULT: "Default",
    RoutingMethod.RENORMALIZE: "Renormalize",
    RoutingMethod.DEEPSEEK_V3: "DeepSeekV3",
    RoutingMethod.LLAMA4: "Llama4",
    RoutingMethod.RENORMALIZE_NAIVE: "RenormalizeNaive",
    RoutingMethod.TOPK: "TopK",
    RoutingMethod.SIGMOID_RENORM: "SigmoidRenorm",
    RoutingMethod.MINIMAX2: "MiniMax2",
    RoutingMethod.SIGMOID: "Sigmoid",
    RoutingMethod.TOPK_SIGMOID: "TopKSigmoid",
}


def kernel_refusal(method: RoutingMethod, members: Mapping[str, int]) -> Refusal | None:
    """Why the library with these enum members has no integer for a method."""
    name = FLASHINFER_NAMES.get(method)
    if name is None:
        able = ", ".join(FLASHINFER_NAMES)
        text = f"{method} has no integer in any kernel library; use a routed plan"
        return Refusal("", "", "", "method_internal", text, "routing", method, able)
    if name not in members:
        text = f"the installed kernel library has no routing method {name}"
        return Refusal("", "", "", "method_missing", text, "routing", method, ", ".join(members))
    return None


def kernel_id(method: RoutingMethod, members: Mapping[str, int]) -> int:
    """The method's integer among these enum members; raises FailedPrecondition if it has none."""
    refusal = kernel_refusal(method, members)
    if refusal is not None:
        raise FailedPrecondition(refusal.text, (refusal,))
    return int(members[FLASHINFER_NAMES[method]])
