"""The form of a call: all of it that decides which plans may run it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class RoutingForm(StrEnum):
    """How a call says which experts its rows want."""

    LOGITS = "logits"
    TOPK = "topk"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class CallForm:
    """Calls of equal form can share a batch and a cached admission.

    rows_format is "" for plain rows; top_k is K of a top-k call, 0 otherwise; backend is the pin.
    """

    routing: RoutingForm
    rows_dtype: str
    rows_format: str = ""
    logits_dtype: str = ""
    ids_dtype: str = ""
    weights_dtype: str = ""
    top_k: int = 0
    partial: bool = False
    backend: str = ""
    reply_dtype: str = ""
