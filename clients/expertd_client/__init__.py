"""The Python client of expertd: numpy or torch in, the experts' output back."""

from expertd_client.aio import AsyncClient
from expertd_client.calls import Reply
from expertd_client.client import Client
from expertd_client.errors import (
    DeadlineExceeded,
    ExpertdError,
    ExpertsNotHeld,
    ExpertsUnavailable,
    InvalidArgument,
    LayerFailed,
    NotFound,
    NoUsablePlan,
    Overloaded,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from expertd_client.pool import AsyncExpertPool, ExpertPool, PoolReply

__all__ = [
    "AsyncClient",
    "AsyncExpertPool",
    "Client",
    "DeadlineExceeded",
    "ExpertPool",
    "ExpertdError",
    "ExpertsNotHeld",
    "ExpertsUnavailable",
    "InvalidArgument",
    "LayerFailed",
    "NoUsablePlan",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "PoolReply",
    "Reply",
    "Unauthenticated",
    "Unavailable",
]
