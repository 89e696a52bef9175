"""The model families that can be served: one entry each; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from expertd.errors import FailedPrecondition
from expertd.weights.family import Family, Layout


def per_expert(block: str, gate: str, up: str, down: str) -> Layout:
    """A tensor for every matrix of every expert."""
    return Layout(*(f"{block}.{{e}}.{name}" for name in (gate, up, down)))


def fused(block: str) -> Layout:
    """transformers' own form: all experts in a tensor, gate above up."""
    gate_up = f"{block}.gate_up_proj"
    return Layout(gate_up, gate_up, f"{block}.down_proj", fused="halves", suffix="parameter")


PROJ = ("gate_proj", "up_proj", "down_proj")
MLP = (per_expert("mlp.experts", *PROJ), fused("mlp.experts"))
SCORE_BIAS = ("mlp.gate.e_score_correction_bias",)

FAMILIES = (
    Family(model_types=("qwen3_moe",), layouts=MLP),
    Family(
        model_types=("deepseek_v3", "kimi_k2", "glm4_moe", "dots1"),
        layouts=MLP,
        correction_bias=SCORE_BIAS,
    ),
)


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of a (text) config; raises FailedPrecondition for one that is not known."""
    model_type = config.get("model_type")
    family = _BY_TYPE.get(str(model_type))
    if family is None:
        raise FailedPrecondition(
            f"config.json: model_type {model_type!r} is not one of {', '.join(sorted(_BY_TYPE))}"
        )
    if family.refusal:
        raise FailedPrecondition(f"config.json: model_type {model_type!r}: {family.refusal}")
    return family


_BY_TYPE = {name: family for family in FAMILIES for name in family.model_types}
