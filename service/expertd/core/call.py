"""One forward call and its result, independent of the carrier that brought it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from expertd_wire.tensors import WireTensor

from expertd.core.layer import PlanMode


class RoutingForm(StrEnum):
    """How a call says which experts its rows want."""

    LOGITS = "logits"
    TOPK = "topk"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class ForwardCall:
    """A decoded request; tensors are views of the carrier's memory, nothing is checked yet."""

    model: str
    layer: int
    hidden_states: WireTensor | None
    router_logits: WireTensor | None = None
    topk_ids: WireTensor | None = None
    topk_weights: WireTensor | None = None
    hidden_states_format: str = ""
    hidden_states_scale: WireTensor | None = None
    partial: bool = False
    backend: str = ""
    reply_dtype: str = ""
    request_id: str = ""
    priority: int = 0


@dataclass(frozen=True, slots=True)
class CallForm:
    """All of a call that decides which plans may run it; calls of equal form can share a batch."""

    routing: RoutingForm
    rows_dtype: str
    rows_format: str
    logits_dtype: str
    ids_dtype: str
    weights_dtype: str
    top_k: int
    partial: bool
    backend: str
    reply_dtype: str


@dataclass(frozen=True, slots=True)
class ForwardResult:
    """The answer to one call: output [T, H] and what computed it."""

    output: WireTensor
    backend: str
    mode: PlanMode
    entry: str
    queued_ns: int
    staged_ns: int
    computed_ns: int
