"""A layer as somebody describes it in JSON: every wrong field refused by name, all at once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from expertd.core import (
    Activation,
    ActivationKind,
    CallForm,
    LayerSpec,
    QuantScheme,
    RoutingForm,
    RoutingMethod,
)
from expertd.errors import InvalidArgument
from expertd.routing.declared import declared_routing
from expertd.routing.derive import SCORINGS
from expertd.routing.methods import UNKNOWABLE
from expertd_wire.errors import Refusal

LOGITS_DTYPES = ("float32", "bfloat16", "float16")
MANY = 1 << 20


class Wrong(Exception):
    """A value that its field does not accept; str() says what is accepted."""


def _one_of(names: Iterable[str]) -> Callable[[Any], str]:
    known = tuple(names)

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in known:
            raise Wrong("one of " + ", ".join(known))
        return value

    return read


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MANY:
        raise Wrong(f"a whole number from 1 to {MANY}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Wrong("a finite number")
    return float(value)


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Wrong("true or false")
    return value


def _experts(value: Any) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,7})-(\d{1,7})", value) if isinstance(value, str) else None
    if found is None or int(found[1]) > int(found[2]):
        raise Wrong('an inclusive range such as "0-63"')
    return int(found[1]), int(found[2]) + 1


class Field(NamedTuple):
    read: Callable[[Any], Any]
    required: bool = False


FIELDS: Mapping[str, Field] = {
    "num_experts": Field(_count, required=True),
    "top_k": Field(_count, required=True),
    "hidden": Field(_count, required=True),
    "intermediate": Field(_count, required=True),
    "quant": Field(_one_of(QuantScheme), required=True),
    "activation": Field(_one_of(ActivationKind)),
    "alpha": Field(_number),
    "beta": Field(_number),
    "limit": Field(_number),
    "routing": Field(_one_of(RoutingMethod)),
    "scoring": Field(_one_of(SCORINGS)),
    "renormalize": Field(_flag),
    "n_group": Field(_count),
    "topk_group": Field(_count),
    "routed_scaling_factor": Field(_number),
    "bias": Field(_flag),
    "expert_bias": Field(_flag),
    "experts": Field(_experts),
    "logits_dtype": Field(_one_of(LOGITS_DTYPES)),
}

PARAMETERS: Mapping[ActivationKind, Mapping[str, float | None]] = {
    ActivationKind.SWIGLU: {"limit": None},
    ActivationKind.SWIGLU_OAI: {"alpha": 1.702, "beta": 1.0, "limit": None},
    ActivationKind.SWIGLU_STEP: {"limit": 7.0},
    ActivationKind.GEGLU: {},
    ActivationKind.GEGLU_TANH: {},
    ActivationKind.RELU2: {},
    ActivationKind.SITU: {"alpha": 4.0, "beta": 25.0},
}
"""Which parameters an activation has, with what the kernels take when none is given."""


@dataclass(frozen=True, slots=True)
class Described:
    """A layer and the form of the calls that it would get."""

    spec: LayerSpec
    logits_dtype: str

    def form(self, backend: str = "") -> CallForm:
        """Rows of bfloat16 with logits, or with top-k where only the caller can route."""
        return call_form(self.spec, self.logits_dtype, backend)


def call_form(spec: LayerSpec, logits_dtype: str = "float32", backend: str = "") -> CallForm:
    """The call that a layer is made for."""
    routing = spec.routing
    if routing is not None and routing.method not in UNKNOWABLE:
        return CallForm(RoutingForm.LOGITS, "bfloat16", logits_dtype=logits_dtype, backend=backend)
    top_k = routing.top_k if routing else 1
    return CallForm(
        RoutingForm.TOPK, "bfloat16", weights_dtype="float32", top_k=top_k, backend=backend
    )


def parse_spec(given: Any) -> Described:
    """The layer that a JSON object describes, null being the same as nothing.

    Raises InvalidArgument with everything that is wrong.
    """
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"spec: a JSON object is wanted, with {', '.join(FIELDS)}")
    given = {name: value for name, value in given.items() if value is not None}
    faults = list(_names(given))
    values: dict[str, Any] = {}
    for name in FIELDS.keys() & given.keys():
        try:
            values[name] = FIELDS[name].read(given[name])
        except Wrong as error:
            faults.append(_fault(name, given[name], str(error)))
    if not faults:
        faults = list(_contradictions(values))
    if faults:
        raise InvalidArgument("; ".join(fault.text for fault in faults), tuple(faults))
    return Described(_layer(values), values.get("logits_dtype", "float32"))


def _fault(field: str, given: Any, accepted: str) -> Refusal:
    shown = f"{given!r:.60}"
    return Refusal("", "", "", "spec", f"{field}={shown}; accepted: {accepted}", field, shown,
                   accepted)  # fmt: skip


def _names(given: Mapping[Any, Any]) -> Iterable[Refusal]:
    for name in given:
        if name not in FIELDS:
            yield _fault(f"{name!s:.60}", "unknown", "the fields " + ", ".join(FIELDS))
    for name, field in FIELDS.items():
        if field.required and name not in given:
            yield _fault(name, "missing", "a value, it has no default")
    if not {"routing", "scoring"} & given.keys():
        wanted = "routing (" + ", ".join(RoutingMethod) + "), or scoring with renormalize"
        yield _fault("routing", "missing", wanted)


def _contradictions(values: Mapping[str, Any]) -> Iterable[Refusal]:
    kind = ActivationKind(values.get("activation", "swiglu"))
    for name in ("alpha", "beta", "limit"):
        if name in values and name not in PARAMETERS[kind]:
            accepted = f"nothing: {kind} has {', '.join(PARAMETERS[kind]) or 'no parameters'}"
            yield _fault(name, values[name], accepted)
    begin, end = values.get("experts", (0, values["num_experts"]))
    if end > values["num_experts"]:
        yield _fault("experts", f"{begin}-{end - 1}", f"within 0-{values['num_experts'] - 1}")


def _layer(values: Mapping[str, Any]) -> LayerSpec:
    experts = values["num_experts"]
    begin, end = values.get("experts", (0, experts))
    return LayerSpec(
        hidden=values["hidden"],
        intermediate=values["intermediate"],
        num_experts=experts,
        expert_begin=begin,
        expert_end=end,
        activation=_activation(values),
        quant=QuantScheme(values["quant"]),
        routing=declared_routing(values),
        expert_bias=values.get("expert_bias", False),
    )


def _activation(values: Mapping[str, Any]) -> Activation:
    kind = ActivationKind(values.get("activation", "swiglu"))
    return Activation(kind, **{n: values.get(n, d) for n, d in PARAMETERS[kind].items()})
