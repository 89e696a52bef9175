"""How errors travel: one row per reason, and the refusals that an error may carry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

DOMAIN = "expertd"


class Reason(NamedTuple):
    """A reason, its gRPC code and its HTTP status."""

    name: str
    grpc: str
    http: int


REASONS: dict[str, Reason] = {
    row.name: row
    for row in (
        Reason("INVALID_ARGUMENT", "INVALID_ARGUMENT", 400),
        Reason("TOO_LARGE", "INVALID_ARGUMENT", 400),
        Reason("NOT_FOUND", "NOT_FOUND", 404),
        Reason("FAILED_PRECONDITION", "FAILED_PRECONDITION", 422),
        Reason("NO_USABLE_PLAN", "FAILED_PRECONDITION", 422),
        Reason("EXPERTS_NOT_HELD", "FAILED_PRECONDITION", 422),
        Reason("LAYER_FAILED", "FAILED_PRECONDITION", 422),
        Reason("OVERLOADED", "RESOURCE_EXHAUSTED", 429),
        Reason("UNAVAILABLE", "UNAVAILABLE", 503),
        Reason("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED", 504),
        Reason("CANCELLED", "CANCELLED", 499),
        Reason("UNAUTHENTICATED", "UNAUTHENTICATED", 401),
        Reason("PERMISSION_DENIED", "PERMISSION_DENIED", 403),
        Reason("INTERNAL", "INTERNAL", 500),
    )
}


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why one plan cannot run: which field, what was given, what is accepted."""

    backend: str
    mode: str
    entry: str
    code: str
    text: str
    field: str = ""
    given: str = ""
    accepted: str = ""
