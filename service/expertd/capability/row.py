"""A capability row: one claim about one kernel entry, as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from expertd.core import ActivationKind, PlanMode, QuantScheme, RoutingMethod
from expertd.routing.rounding import Rounding


class State(StrEnum):
    """How much is known about a cell on this device; each step includes the one before."""

    DECLARED = "declared"
    PRESENT = "present"
    PROVEN = "proven"
    FAILED = "failed"


class Cell(NamedTuple):
    """The smallest thing that is present, proven or failed: a row for one weight format."""

    backend: str
    entry: str
    mode: PlanMode
    activation_quant: str
    quant: QuantScheme


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
    """A kernel entry in one mode, for one activation format and the weight formats it reads alike.

    archs holds "cpu" or "smNN", () means any; load is the lazy "module:Class" of the backend.
    rows are the dtypes of plain rows, formats the pre-quantised ones. identity rows run layers
    without experts and nothing else. needs_proof: whether traffic waits for a proof on the device.
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
    formats: tuple[str, ...] = ("fp8_group128", "mxfp8")
    routing: Mapping[RoutingMethod, Tier] = field(default_factory=dict, hash=False)
    logits: tuple[str, ...] = ("float32", "bfloat16", "float16")
    weight_sites: tuple[Literal["output", "input"], ...] = ("output",)
    rounding: Rounding = Rounding()
    since: str | None = None
    until: str | None = None
    auto: bool = True
    identity: bool = False
    needs_proof: bool = True

    def cell(self, quant: QuantScheme) -> Cell:
        return Cell(self.backend, self.entry, self.mode, self.activation_quant, quant)
