"""Whether routing settings can be meant together: every contradiction, told by field; no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from expertd.core import RoutingMethod, RoutingSpec
from expertd.errors import InvalidArgument
from expertd.routing.methods import TRAITS, methods_with
from expertd_wire.errors import Refusal

CODE = "routing_settings"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one router as they were given; num_experts None means not known yet."""

    method: RoutingMethod
    num_experts: int | None
    top_k: int
    n_group: int | None = None
    topk_group: int | None = None
    scale: float = 1.0
    eps: float | None = None
    group_fill: float | None = None
    group_score: str = "top2"
    bias: bool = False

    @property
    def groups(self) -> int:
        return self.n_group or 1


class Fault(NamedTuple):
    """A setting that cannot be meant."""

    field: str
    given: object
    accepted: str
    why: str = ""

    def refusal(self, names: Mapping[str, str]) -> Refusal:
        """The same under the field's name in the caller's language."""
        name = names.get(self.field, self.field)
        tail = f" ({self.why})" if self.why else ""
        text = f"{name}={self.given}; accepted: {self.accepted}{tail}"
        return Refusal("", "", "", CODE, text, name, str(self.given), self.accepted)


Faults = Iterator[Fault]


def check_settings(settings: Settings, names: Mapping[str, str] = MappingProxyType({})) -> None:
    """Raise InvalidArgument with everything that is wrong; names renames fields for the caller."""
    counts = tuple(_counts(settings))
    rules = _VALUES if counts else _VALUES + _RELATIONS
    faults = counts + tuple(fault for rule in rules for fault in rule(settings))
    if faults:
        refusals = tuple(fault.refusal(names) for fault in faults)
        raise InvalidArgument("; ".join(refusal.text for refusal in refusals), refusals)


def check_spec(spec: RoutingSpec, num_experts: int | None) -> None:
    """The same for a layer's routing; raises InvalidArgument."""
    settings = Settings(
        method=spec.method,
        num_experts=num_experts,
        top_k=spec.top_k,
        n_group=spec.n_group,
        topk_group=spec.topk_group,
        scale=spec.routed_scaling_factor,
        eps=spec.eps,
        group_fill=spec.group_fill,
        group_score=spec.group_score,
        bias=spec.bias,
    )
    check_settings(settings, {"scale": "routed_scaling_factor"})


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _counts(s: Settings) -> Faults:
    for field in ("num_experts", "top_k", "n_group", "topk_group"):
        value = getattr(s, field)
        whole = isinstance(value, int) and not isinstance(value, bool) and value > 0
        if not whole and (value is not None or field == "top_k"):
            yield Fault(field, value, "a whole number from 1 on")


def _scale(s: Settings) -> Faults:
    if not (_number(s.scale) and math.isfinite(s.scale) and s.scale >= 0):
        yield Fault("scale", s.scale, "a finite number from 0 on")


def _eps(s: Settings) -> Faults:
    if s.eps is not None and not (_number(s.eps) and math.isfinite(s.eps) and s.eps >= 0):
        yield Fault("eps", s.eps, "a finite number from 0 on", "0 divides by the bare sum")


def _group_words(s: Settings) -> Faults:
    if s.group_fill is not None and not (_number(s.group_fill) and s.group_fill < math.inf):
        yield Fault("group_fill", s.group_fill, "-inf or a finite number")
    if s.group_score not in ("top2", "max"):
        yield Fault("group_score", s.group_score, "top2, max")


def _bias(s: Settings) -> Faults:
    if s.bias and not TRAITS[s.method].biased:
        why = f"{s.method} has no correction bias; these have: {methods_with('biased')}"
        yield Fault("bias", "present", "absent", why)


def _top_k(s: Settings) -> Faults:
    if s.num_experts is not None and s.top_k > s.num_experts:
        yield Fault("top_k", s.top_k, f"1..{s.num_experts}", f"there are {s.num_experts} experts")


def _method_of_groups(s: Settings) -> Faults:
    if s.groups > 1 and not TRAITS[s.method].grouped:
        why = f"{s.method} is ungrouped; grouped: {methods_with('grouped')}"
        yield Fault("n_group", s.n_group, "1 or none", why)


def _chosen_groups(s: Settings) -> Faults:
    if s.topk_group is None and s.groups > 1:
        yield Fault("topk_group", None, f"1..{s.groups}", f"n_group is {s.groups}")
    elif (s.topk_group or 1) > s.groups:
        yield Fault("topk_group", s.topk_group, f"1..{s.groups}", f"n_group is {s.groups}")


def _group_sizes(s: Settings) -> Faults:
    if s.num_experts is None or s.groups == 1 or not TRAITS[s.method].grouped:
        return
    size, rest = divmod(s.num_experts, s.groups)
    chosen = min(s.topk_group or s.groups, s.groups)
    if rest or not size:
        yield Fault("n_group", s.groups, f"a divisor of the {s.num_experts} experts")
    elif size < 2 and s.group_score == "top2":
        yield Fault("n_group", s.groups, f"1..{s.num_experts // 2}", "a group's two best count")
    elif size * chosen < s.top_k <= s.num_experts:
        yield Fault("top_k", s.top_k, f"1..{size * chosen}", f"{chosen} groups of {size} experts")


_VALUES: tuple[Callable[[Settings], Faults], ...] = (_scale, _eps, _group_words, _bias)
_RELATIONS: tuple[Callable[[Settings], Faults], ...] = (
    _top_k,
    _method_of_groups,
    _chosen_groups,
    _group_sizes,
)
