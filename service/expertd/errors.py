"""Everything that can go wrong with a caller's request, as one tree.

ExpertdError
├── InvalidArgument      the request itself is wrong
│   └── TooLarge         ... because it exceeds a limit
├── NotFound             no such model or layer
├── FailedPrecondition   well formed, but this layer cannot do it
│   ├── NoUsablePlan     no backend can run it (all reasons attached)
│   ├── ExpertsNotHeld   experts outside the range that is held here
│   └── LayerFailed      the layer's load or proof failed
├── Overloaded           try later, or elsewhere
├── Unavailable          loading, draining, or the engine has died
├── DeadlineExceeded
├── Cancelled            the caller left
├── Unauthenticated / PermissionDenied
└── Internal             a fault of ours, told without details

Each class names its row of the wire's table (expertd_wire.errors), which has the gRPC code and the
HTTP status. Refusals are values: an error carries all of them.
"""

from __future__ import annotations

from typing import ClassVar

from expertd_wire.errors import REASONS, Reason, Refusal


class ExpertdError(Exception):
    """A request that cannot be answered; str() is the message for the caller.

    retry_seconds is when it may be worth asking again, as far as this process can tell.
    """

    reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        refusals: tuple[Refusal, ...] = (),
        retry_seconds: float | None = None,
    ) -> None:
        super().__init__(message)
        self.refusals = refusals
        self.retry_seconds = retry_seconds

    @property
    def wire(self) -> Reason:
        """The row that says how this error travels."""
        return REASONS[self.reason]


class InvalidArgument(ExpertdError):
    reason = "INVALID_ARGUMENT"


class TooLarge(InvalidArgument):
    reason = "TOO_LARGE"


class NotFound(ExpertdError):
    reason = "NOT_FOUND"


class FailedPrecondition(ExpertdError):
    reason = "FAILED_PRECONDITION"


class NoUsablePlan(FailedPrecondition):
    reason = "NO_USABLE_PLAN"


class ExpertsNotHeld(FailedPrecondition):
    reason = "EXPERTS_NOT_HELD"


class LayerFailed(FailedPrecondition):
    reason = "LAYER_FAILED"


class Overloaded(ExpertdError):
    reason = "OVERLOADED"


class Unavailable(ExpertdError):
    reason = "UNAVAILABLE"


class DeadlineExceeded(ExpertdError):
    reason = "DEADLINE_EXCEEDED"


class Cancelled(ExpertdError):
    reason = "CANCELLED"


class Unauthenticated(ExpertdError):
    reason = "UNAUTHENTICATED"


class PermissionDenied(ExpertdError):
    reason = "PERMISSION_DENIED"


class Internal(ExpertdError):
    reason = "INTERNAL"
