"""A capability row: one claim about one kernel entry, as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from expertd.core import ActivationKind, PlanMode, QuantScheme, RoutingMethod
from expertd.routing.rounding import Rounding


@dataclass(frozen=True, slots=True)
class Tier:
    """What one routing method accepts in a monolithic entry; None means no limit of its own."""

    max_experts: int
    max_top_k: int
    grouped: bool = False
    honours_scale: bool = False
    needs_bias: bool = False
    since: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A kernel entry in one mode, for one weight format and one activation format.

    archs holds "cpu" or "smNN"; since and until bound the versions of the kernel library
    ([since, until)); load is the lazy "module:Class" of the backend that runs it.
    """

    backend: str
    entry: str
    mode: PlanMode
    archs: tuple[str, ...]
    quants: tuple[QuantScheme, ...]
    activation_quant: str
    activations: tuple[ActivationKind, ...]
    load: str
    rows: tuple[str, ...] = ("bfloat16", "float16", "float32")
    routing: Mapping[RoutingMethod, Tier] = field(default_factory=dict)
    logits: tuple[str, ...] = ("float32", "bfloat16", "float16")
    rounding: Rounding = Rounding()
    since: str | None = None
    until: str | None = None
    auto: bool = True
