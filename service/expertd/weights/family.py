"""What has to be known of a model family to find its routed experts; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from expertd.core import Activation, ActivationKind
from expertd.errors import FailedPrecondition

ROOTS = ("", "model.", "language_model.model.", "model.language_model.", "backbone.")
"""What may stand before `layers.`; anything else (mtp., vision towers) is not the model's stack."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of an expert's matrices below `layers.N.`.

    `{e}` is the expert's number; a name without it holds all experts in its first dimension.
    fused: gate and up share one tensor, gate's rows first (halves) or in turns (interleaved).
    transposed: stored [in, out]. suffix: parts are called NAME.weight, NAME.weight_scale (module)
    or NAME, NAME_scale (parameter).
    """

    gate: str
    up: str
    down: str
    fused: Literal["no", "halves", "interleaved"] = "no"
    transposed: bool = False
    suffix: Literal["module", "parameter"] = "module"

    @property
    def stacked(self) -> bool:
        """Whether a tensor holds all experts of the layer."""
        return "{e}" not in self.down

    def part(self, name: str, expert: int, part: str) -> str:
        """The name below `layers.N.` of one part ("weight", "weight_scale", ...) of a matrix."""
        base = name.replace("{e}", str(expert))
        if self.suffix == "module":
            return f"{base}.{part}"
        rest = "" if part == "weight" else part.removeprefix("weight_")
        return f"{base}_{rest}" if rest else base

    def finds(self) -> re.Pattern[str]:
        """Matches any part of a down matrix; groups are the root and the layer's number."""
        roots = "|".join(re.escape(root) for root in ROOTS)
        down = re.escape(self.down).replace(r"\{e\}", r"\d+")
        end = r"\." if self.suffix == "module" else r"(?:_\w+)?$"
        return re.compile(rf"({roots})layers\.(\d+)\.{down}{end}")


@dataclass(frozen=True, slots=True)
class Setting:
    """A number of the config under one of its names, or a default."""

    keys: tuple[str, ...]
    default: float | None = None

    def read(self, config: Mapping[str, Any], layer: int) -> float | None:
        """The number for a layer (lists have one a layer; 0 and null mean none)."""
        value = next((config[key] for key in self.keys if key in config), self.default)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        return float(value) if value else None


ACTIVATIONS = {
    "silu": ActivationKind.SWIGLU,
    "swish": ActivationKind.SWIGLU,
    "gelu": ActivationKind.GEGLU,
    "gelu_pytorch_tanh": ActivationKind.GEGLU_TANH,
    "relu2": ActivationKind.RELU2,
}
"""hidden_act → what an expert does when its family has no rule of its own."""


@dataclass(frozen=True, slots=True)
class ActivationRule:
    """An activation and where the config has its parameters; kind None: hidden_act says it."""

    kind: ActivationKind | None = None
    key: str = "hidden_act"
    alpha: Setting | None = None
    beta: Setting | None = None
    limit: Setting | None = None

    def read(self, config: Mapping[str, Any], layer: int) -> Activation:
        """The activation of a layer; raises FailedPrecondition for one that is not known."""
        kind = self.kind or ACTIVATIONS.get(str(config.get(self.key)))
        if kind is None:
            raise FailedPrecondition(
                f"config.json: {self.key} {config.get(self.key)!r} is not one of "
                f"{', '.join(ACTIVATIONS)}"
            )
        names = ("alpha", "beta", "limit")
        settings = {name: getattr(self, name) for name in names}
        return Activation(
            kind, **{n: s.read(config, layer) for n, s in settings.items() if s is not None}
        )


@dataclass(frozen=True, slots=True)
class Family:
    """A family's entry; correction_bias and hash_table are names below `layers.N.`."""

    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...]
    correction_bias: tuple[str, ...] = ()
    activation: ActivationRule = ActivationRule()
    hidden: tuple[str, ...] = ("hidden_size",)
    experts: tuple[str, ...] = (
        "n_routed_experts",
        "num_local_experts",
        "num_experts",
        "moe_num_experts",
    )
    intermediate: tuple[str, ...] = ("moe_intermediate_size", "intermediate_size")
    expert_bias: bool = False
    hash_table: str | None = None
    refusal: str | None = None

    def number(self, config: Mapping[str, Any], keys: tuple[str, ...], layer: int) -> int:
        """A positive whole number of the config; raises FailedPrecondition naming its keys."""
        value = next((config[key] for key in keys if config.get(key) is not None), None)
        if isinstance(value, list) and layer < len(value):
            value = value[layer]
        if type(value) is not int or value < 1:
            raise FailedPrecondition(
                f"config.json: {' or '.join(keys)} is {value!r}, a positive number is needed"
            )
        return value
