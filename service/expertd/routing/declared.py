"""A router that a caller declares: its spec, and what sets it apart from the derived one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertd.core import RoutingMethod, RoutingSpec
from expertd.errors import InvalidArgument
from expertd.routing.checks import check_spec
from expertd.routing.derive import derive_method
from expertd.routing.methods import TRAITS, UNKNOWABLE, method_named


def declared_routing(fields: Mapping[str, Any]) -> RoutingSpec:
    """The router of an explicit spec: routing, or scoring with renormalize and the rest.

    Reads num_experts, top_k, routing, scoring, renormalize, n_group, topk_group, bias, eps,
    routed_scaling_factor, group_fill, group_score. Raises InvalidArgument by field.
    """
    method = _method(fields)
    traits = TRAITS[method]
    _agrees(fields, "scoring", traits.scoring, method)
    renormalize = _flag(fields, "renormalize", traits.renormalize != "never")
    if traits.renormalize != "asked":
        _agrees(fields, "renormalize", traits.renormalize == "always", method)
    spec = RoutingSpec(
        method=method,
        scoring=traits.scoring,
        top_k=_top_k(fields),
        renormalize=renormalize,
        n_group=fields.get("n_group"),
        topk_group=fields.get("topk_group"),
        routed_scaling_factor=fields.get("routed_scaling_factor", 1.0),
        weight_site="input" if method is RoutingMethod.LLAMA4 else "output",
        eps=fields.get("eps"),
        bias=_flag(fields, "bias", False),
        group_fill=fields.get("group_fill"),
        group_score=fields.get("group_score", "top2"),
    )
    check_spec(spec, fields.get("num_experts"))
    return spec


def _method(fields: Mapping[str, Any]) -> RoutingMethod:
    if fields.get("routing") is not None:
        return method_named(str(fields["routing"]))
    if "scoring" not in fields:
        raise InvalidArgument("routing is missing; give a method, or scoring and renormalize")
    return derive_method(
        str(fields["scoring"]),
        renormalize=_flag(fields, "renormalize", True),
        bias=_flag(fields, "bias", False),
        n_group=fields.get("n_group") if isinstance(fields.get("n_group"), int) else None,
    )


def _top_k(fields: Mapping[str, Any]) -> int:
    if "top_k" not in fields:
        raise InvalidArgument("top_k is missing; give the number of experts a row chooses")
    top_k: int = fields["top_k"]
    return top_k


def _flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name, default)
    if not isinstance(value, bool):
        raise InvalidArgument(f"{name}={value!r}; accepted: true, false")
    return value


def _agrees(fields: Mapping[str, Any], name: str, meant: object, method: RoutingMethod) -> None:
    if name in fields and method not in UNKNOWABLE and fields[name] != meant:
        raise InvalidArgument(f"{name}={fields[name]!r}; {method} means {meant!r}, or leave it out")


def compare_declared(declared: RoutingMethod, derived: RoutingMethod) -> str | None:
    """How a declared method differs from the one that the model's own settings mean."""
    if declared == derived:
        return None
    return (
        f"declared {declared} ({TRAITS[declared].words}); the model's settings mean {derived} "
        f"({TRAITS[derived].words}); the declared method is used"
    )
