"""How a family's config tells its router's settings: the shape of a row; imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from expertd.core import RoutingMethod
from expertd.core.routing import Scoring
from expertd.errors import InvalidArgument

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, init=False)
class Key:
    """A setting under the first of its names that a config has; null counts as absent."""

    names: tuple[str, ...]
    default: Any

    def __init__(self, *names: str, default: Any = None) -> None:
        object.__setattr__(self, "names", names)
        object.__setattr__(self, "default", default)

    def read(self, config: Config) -> Any:
        given = (config[name] for name in self.names if config.get(name) is not None)
        return next(given, self.default)

    def whole(self, config: Config, layer: int | None = None) -> int | None:
        """A number from 0 on, or the layer's own of a list; raises InvalidArgument."""
        value = self.read(config)
        if isinstance(value, list):
            value = self._of_layer(value, layer)
        if value is None or (type(value) is int and value >= 0):
            return value
        raise self._wrong(value, "a whole number")

    def number(self, config: Config) -> float | None:
        """A number; raises InvalidArgument."""
        value = self.read(config)
        if value is None or type(value) in (int, float):
            return None if value is None else float(value)
        raise self._wrong(value, "a number")

    def flag(self, config: Config) -> bool:
        """True or false; raises InvalidArgument."""
        value = self.read(config)
        if isinstance(value, bool):
            return value
        raise self._wrong(value, "true or false")

    def _of_layer(self, values: list[Any], layer: int | None) -> Any:
        if layer is not None and 0 <= layer < len(values):
            return values[layer]
        if layer is None and len({str(value) for value in values}) == 1:
            return values[0]
        raise self._wrong(values, f"a number, or a list that has one for layer {layer}")

    def _wrong(self, value: object, accepted: str) -> InvalidArgument:
        return InvalidArgument(f"config.json: {self.names[0]}={value!r}; accepted: {accepted}")


When = tuple[tuple[Key, Any], ...]
"""Settings that a config must have for a row to be meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyRow:
    """Where the router settings of some model types are, and those that no config tells.

    method is given only where the family computes something else than its settings would say.
    refusal says why router logits cannot be used at all.
    """

    model_types: tuple[str, ...]
    when: When = ()
    refusal: str | None = None
    method: RoutingMethod | None = None
    scoring: Scoring | Key = "softmax"
    top_k: Key = Key("num_experts_per_tok")
    renormalize: bool | Key = True
    bias: bool | Key = False
    n_group: Key | None = None
    topk_group: Key | None = None
    scale: Key | None = None
    scale_site: Literal["router", "output"] = "router"
    weight_site: Literal["output", "input"] = "output"
    eps: float | Key | None = None
    group_fill: float | None = None
    group_score: Literal["top2", "max"] = "top2"

    def means(self, config: Config) -> bool:
        """Whether the config has what this row is for."""
        return all(key.read(config) == value for key, value in self.when)
