"""How long a caller waits: what is accepted as a timeout, and what is left of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import isnan

from expertd_client.errors import InvalidArgument

FOR_EVER_SECONDS = 1e8
"""Three years. gRPC cannot count to a time that is much later: it takes it for one that is past."""


def limit(timeout: float | None) -> float | None:
    """Seconds to wait, None for ever; raises InvalidArgument for NaN."""
    if timeout is None or timeout > FOR_EVER_SECONDS:
        return None
    if isnan(timeout):
        raise InvalidArgument(f"timeout {timeout} given; seconds are accepted, or None for ever")
    return timeout


def countdown(timeout: float | None) -> Callable[[], float | None]:
    """What is left of timeout seconds from now on, whenever it is called; raises as limit does."""
    seconds = limit(timeout)
    if seconds is None:
        return lambda: None
    end = time.monotonic() + seconds
    return lambda: max(0.0, end - time.monotonic())
