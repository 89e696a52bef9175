"""What a call can end with, other than an answer.

ExpertdError
├── InvalidArgument     the request itself is wrong, or too large
├── NotFound            no such model or layer
├── NoUsablePlan        well formed, but this layer cannot do it; .reasons says why, per backend
│   ├── ExpertsNotHeld  experts that this server does not hold
│   └── LayerFailed     the layer's load or proof failed
├── Overloaded          try later, or elsewhere
├── Unavailable         not reachable, loading or draining
│   └── ExpertsUnavailable  no replica is left for some of the experts
├── DeadlineExceeded
├── Unauthenticated
└── PermissionDenied
"""

from __future__ import annotations

from expertd_wire.errors import Refusal


class ExpertdError(Exception):
    """An unanswered call: .reason in UPPER_SNAKE, .reasons with one Refusal per plan left out.

    .retry_seconds is when the server expects to have room again; None if it did not say.
    """

    reason: str = "INTERNAL"
    reasons: tuple[Refusal, ...] = ()
    retry_seconds: float | None = None

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        reasons: tuple[Refusal, ...] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason or type(self).reason
        self.reasons = reasons
        self.retry_seconds = retry_seconds

    def __str__(self) -> str:
        message = str(self.args[0])
        untold = [refusal for refusal in self.reasons if refusal.text not in message]
        return "\n".join([message, *map(_line, untold)])


class InvalidArgument(ExpertdError):
    reason = "INVALID_ARGUMENT"


class NotFound(ExpertdError):
    reason = "NOT_FOUND"


class NoUsablePlan(ExpertdError):
    reason = "NO_USABLE_PLAN"


class ExpertsNotHeld(NoUsablePlan):
    reason = "EXPERTS_NOT_HELD"


class LayerFailed(NoUsablePlan):
    reason = "LAYER_FAILED"


class Overloaded(ExpertdError):
    reason = "OVERLOADED"


class Unavailable(ExpertdError):
    reason = "UNAVAILABLE"


class ExpertsUnavailable(Unavailable):
    reason = "EXPERTS_UNAVAILABLE"


class DeadlineExceeded(ExpertdError):
    reason = "DEADLINE_EXCEEDED"


class Unauthenticated(ExpertdError):
    reason = "UNAUTHENTICATED"


class PermissionDenied(ExpertdError):
    reason = "PERMISSION_DENIED"


# A reason is looked up first, its gRPC code second; what is in neither is an ExpertdError.
_CLASSES: dict[str, type[ExpertdError]] = {
    "EXPERTS_NOT_HELD": ExpertsNotHeld,
    "LAYER_FAILED": LayerFailed,
    "INVALID_ARGUMENT": InvalidArgument,
    "NOT_FOUND": NotFound,
    "FAILED_PRECONDITION": NoUsablePlan,
    "RESOURCE_EXHAUSTED": Overloaded,
    "UNAVAILABLE": Unavailable,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
    "UNAUTHENTICATED": Unauthenticated,
    "PERMISSION_DENIED": PermissionDenied,
}


def error_for(
    code: str,
    reason: str,
    message: str,
    reasons: tuple[Refusal, ...] = (),
    retry_seconds: float | None = None,
) -> ExpertdError:
    """The error of a gRPC code name and, when the server is an expertd, its reason."""
    kind = _CLASSES.get(reason) or _CLASSES.get(code) or ExpertdError
    return kind(
        message or code, reason=reason or code, reasons=reasons, retry_seconds=retry_seconds
    )


def _line(refusal: Refusal) -> str:
    return f"  {refusal.backend}/{refusal.mode}/{refusal.entry}: {refusal.text}"
