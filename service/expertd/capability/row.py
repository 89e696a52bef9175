"""A capability row: one claim about one kernel entry, as pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal, NamedTuple

from expertd.core import ActivationKind, LayerSpec, PlanMode, QuantScheme, RoutingMethod
from expertd.routing.rounding import Rounding


class State(StrEnum):
    """How much is known about a cell on this device; each of the first three includes the last."""

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
    """What one routing method accepts in a monolithic entry, from version since on.

    scale: the kernel applies routed_scaling_factor, if it shows the fact scale_fact (when named).
    needs_bias: the kernel reads a bias even when the layer has none, so a zero one is passed.
    whole: only for layers that hold all experts.
    """

    max_experts: int
    max_top_k: int
    grouped: bool = False
    scale: bool = False
    scale_fact: str | None = None
    needs_bias: bool = False
    whole: bool = False
    since: str | None = None


class Use(NamedTuple):
    """How an entry runs an activation: the library's name for it and the arguments it takes.

    limit: the arguments that carry a clamp; None where the kernel has no clamp.
    """

    member: str = ""
    passes: tuple[str, ...] = ()
    limit: tuple[str, ...] | None = None
    since: str | None = None


@dataclass(frozen=True, slots=True)
class KernelCall:
    """What a backend passes to a function of FlashInfer, by keyword only.

    passes: always; prefers: wherever the signature has it; members: enum members that are needed.
    padding: the arguments that tell the sizes before a padding of H.
    pair_since: the version from which ids and weights may go in as a pair, None while only packed.
    """

    function: str
    passes: tuple[str, ...]
    prefers: tuple[str, ...] = ()
    padding: tuple[str, ...] = ()
    members: tuple[tuple[str, str], ...] = ()
    pair_since: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """Sizes that an entry accepts; None bounds nothing, padded sizes are rounded up by us."""

    max_experts: int | None = None
    max_top_k: int | None = None
    experts_multiple: int = 1
    more_experts_than_top_k: bool = False
    hidden_multiple: int = 1
    intermediate_multiple: int = 1
    padded: tuple[Literal["hidden", "intermediate"], ...] = ()


ANY_ACTIVATION: Mapping[ActivationKind, Use] = {kind: Use(limit=()) for kind in ActivationKind}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A kernel entry in one mode, for one activation format and the weight formats it reads alike.

    archs holds "cpu" or "smNN", () means any; load is the lazy "module:Class" of the backend.
    rows are the dtypes of plain rows, formats the pre-quantised ones. expert_range: which ranges
    of experts may be held ("equal": those that divide the layer evenly). library and call name the
    package and the function behind the entry. identity rows run layers without experts and nothing
    else. needs_proof: whether traffic waits for a proof on the device. repeats_with: the argument
    of the call without which the same call may give other bits; "" where it never does.
    """

    backend: str
    entry: str
    mode: PlanMode
    archs: tuple[str, ...]
    quants: tuple[QuantScheme, ...]
    activation_quant: str
    load: str
    activations: Mapping[ActivationKind, Use] = field(default_factory=dict, hash=False)
    rows: tuple[str, ...] = ("bfloat16", "float16", "float32")
    formats: tuple[str, ...] = ()
    routing: Mapping[RoutingMethod, tuple[Tier, ...]] = field(default_factory=dict, hash=False)
    logits: tuple[str, ...] = ("float32", "bfloat16", "float16")
    weight_sites: tuple[Literal["output", "input"], ...] = ("output",)
    expert_bias: bool = False
    expert_range: Literal["any", "equal"] = "any"
    limits: Limits = Limits()
    rounding: Rounding = Rounding()
    repeats_with: str = ""
    library: Literal["", "flashinfer", "triton"] = ""
    call: KernelCall | None = None
    since: str | None = None
    auto: bool = True
    identity: bool = False
    needs_proof: bool = True

    def cell(self, quant: QuantScheme) -> Cell:
        return Cell(self.backend, self.entry, self.mode, self.activation_quant, quant)

    def padded(self, spec: LayerSpec) -> tuple[int, int]:
        """H and I of the native weights of such a layer."""
        multiples = (self.limits.hidden_multiple, self.limits.intermediate_multiple)
        sizes = (spec.hidden, spec.intermediate)
        hidden, intermediate = (-(-n // m) * m for n, m in zip(sizes, multiples, strict=True))
        return hidden, intermediate
