"""Whether a kernel that is told a method computes a layer's settings; imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from expertd.core import RoutingMethod, RoutingSpec
from expertd.core.routing import Scoring
from expertd_wire.errors import Refusal

MISMATCH = "method_mismatch"


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a kernel that is told a method does, whatever else it is told."""

    scoring: Scoring
    renormalize: bool
    bias: bool = False
    groups: bool = False
    top_k: int | None = None
    weight_site: Literal["output", "input"] = "output"


MEANINGS: dict[RoutingMethod, Meaning] = {
    RoutingMethod.DEFAULT: Meaning("softmax", False),
    RoutingMethod.RENORMALIZE: Meaning("softmax", True),
    RoutingMethod.RENORMALIZE_NAIVE: Meaning("softmax", True),
    RoutingMethod.DEEPSEEK_V3: Meaning("sigmoid", True, bias=True, groups=True),
    RoutingMethod.MINIMAX2: Meaning("sigmoid", True, bias=True),
    RoutingMethod.SIGMOID_RENORM: Meaning("sigmoid", True),
    RoutingMethod.SIGMOID: Meaning("sigmoid", False),
    RoutingMethod.TOPK_SIGMOID: Meaning("sigmoid", False),
    RoutingMethod.LLAMA4: Meaning("sigmoid", False, top_k=1, weight_site="input"),
}


def reverify(method: RoutingMethod, spec: RoutingSpec) -> tuple[Refusal, ...]:
    """Why a kernel that is told this method would not compute these settings, all reasons.

    Whether a kernel honours routed_scaling_factor differs by kernel: that is for its row to say.
    """
    meaning = MEANINGS.get(method)
    if meaning is None:
        able = ", ".join(MEANINGS)
        return (_mismatch("routing", method, able, f"no kernel computes {method} from logits"),)
    return tuple(refusal for rule in _RULES for refusal in rule(method, meaning, spec))


def _mismatch(field: str, given: object, accepted: object, text: str) -> Refusal:
    return Refusal("", "", "", MISMATCH, text, field, str(given), str(accepted))


Rule = Callable[[RoutingMethod, Meaning, RoutingSpec], Iterator[Refusal]]


def _same(method: RoutingMethod, meaning: Meaning, spec: RoutingSpec) -> Iterator[Refusal]:
    for field in ("scoring", "renormalize", "weight_site"):
        given, accepted = getattr(spec, field), getattr(meaning, field)
        if given != accepted:
            text = f"{method} has {field}={accepted}, the layer {given}"
            yield _mismatch(field, given, accepted, text)


def _bias(method: RoutingMethod, meaning: Meaning, spec: RoutingSpec) -> Iterator[Refusal]:
    if spec.bias and not meaning.bias:
        yield _mismatch("bias", True, False, f"{method} would choose without the correction bias")


def _groups(method: RoutingMethod, meaning: Meaning, spec: RoutingSpec) -> Iterator[Refusal]:
    if not spec.grouped:
        return
    if not meaning.groups:
        text = f"{method} would choose from all groups"
        yield _mismatch("n_group", spec.n_group, "1 or none", text)
        return
    if spec.group_score != "top2":
        text = f"{method} compares groups by the sum of their two best"
        yield _mismatch("group_score", spec.group_score, "top2", text)
    if spec.group_fill not in (None, float("-inf")):
        text = f"{method} never chooses from the other groups"
        yield _mismatch("group_fill", spec.group_fill, "-inf", text)


def _top(method: RoutingMethod, meaning: Meaning, spec: RoutingSpec) -> Iterator[Refusal]:
    if meaning.top_k not in (None, spec.top_k):
        text = f"{method} chooses {meaning.top_k} expert a row"
        yield _mismatch("top_k", spec.top_k, meaning.top_k, text)


_RULES: tuple[Rule, ...] = (_same, _bias, _groups, _top)
