"""What has to be known of a model family to find its routed experts; imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from expertd.core import Activation, ActivationKind
from expertd.errors import FailedPrecondition, InvalidArgument
from expertd.routing.family import Config, Key

ROOTS = (
    *("", "model.", "language_model.model.", "model.language_model.", "model.llm."),
    "backbone.",
)
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
        """Matches any part of a down matrix: (what stands before, the layer's number)."""
        roots = "|".join(re.escape(root) for root in ROOTS)
        down = re.escape(self.down).replace(r"\{e\}", r"\d+")
        end = r"\." if self.suffix == "module" else r"(?:_\w+)?$"
        return re.compile(rf"((?:{roots})(?:layers|blocks)\.)([0-9]{{1,6}})\.{down}{end}")


ACTIVATIONS = {
    "silu": ActivationKind.SWIGLU,
    "swish": ActivationKind.SWIGLU,
    "gelu": ActivationKind.GEGLU,
    "gelu_pytorch_tanh": ActivationKind.GEGLU_TANH,
    "relu2": ActivationKind.RELU2,
}
"""hidden_act → what an expert does where its family has no kind of its own."""


SILU = Key("hidden_act", default="silu")


@dataclass(frozen=True, slots=True)
class ActivationRule:
    """An activation and where the config has its parameters; kind None: `act` says it."""

    kind: ActivationKind | None = None
    act: Key = SILU
    alpha: Key | None = None
    beta: Key | None = None
    limit: Key | None = None

    def read(self, config: Config, layer: int) -> Activation:
        """The activation of a layer; raises FailedPrecondition for one that is not known."""
        word = str(self.act.read(config))
        kind = self.kind or ACTIVATIONS.get(word)
        if kind is None:
            raise FailedPrecondition(
                f"config.json: {self.act.names[0]} {word!r} is not one of {', '.join(ACTIVATIONS)}"
            )
        keys = (self.alpha, self.beta, self.limit)
        return Activation(
            kind, *(None if key is None else _number(key, config, layer) for key in keys)
        )


def _number(key: Key, config: Config, layer: int) -> float | None:
    """A parameter of a layer: lists have one for each; 0, null and infinity mean none."""
    value = key.read(config)
    if isinstance(value, list):
        value = value[layer] if layer < len(value) else None
    if value is not None and type(value) not in (int, float):
        raise FailedPrecondition(f"config.json: {key.names[0]} is {value!r}, not a number")
    return float(value) if value and isfinite(value) else None


EXPERTS = Key("n_routed_experts", "num_local_experts", "num_experts", "moe_num_experts")
WIDTH = Key("moe_intermediate_size", "intermediate_size")


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Where the experts of some model types are; other names are those below `layers.N.`.

    Where there are several names the first that a checkpoint has counts. hash_table is a tensor
    that only layers have whose experts are chosen by token id. refusal says why experts of this
    kind cannot be served.
    """

    model_types: tuple[str, ...]
    layouts: tuple[Layout, ...] = ()
    correction_bias: tuple[str, ...] = ()
    activation: ActivationRule = ActivationRule()
    hidden: Key = Key("hidden_size")
    experts: Key = EXPERTS
    width: Key = WIDTH
    expert_bias: bool = False
    hash_table: tuple[str, ...] = ()
    refusal: str | None = None


def positive(key: Key, config: Config, layer: int) -> int:
    """A size of the config; raises InvalidArgument naming its key."""
    value = key.whole(config, layer)
    if not value:
        raise InvalidArgument(
            f"config.json: {' or '.join(key.names)} is {value!r}; accepted: from 1 on"
        )
    return value
