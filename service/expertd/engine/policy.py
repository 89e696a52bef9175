"""Which waiting calls run next: a pure function of the queue."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol, TypeVar


class Waiting(Protocol):
    """What the policy needs to know of a waiting call."""

    @property
    def key(self) -> Hashable: ...

    @property
    def tokens(self) -> int: ...

    @property
    def arrived_ns(self) -> int: ...

    @property
    def priority(self) -> int: ...


W = TypeVar("W", bound=Waiting)


def choose(queue: Sequence[W], max_batch_tokens: int) -> list[W]:
    """The calls of the next batch, in order of arrival; empty only if the queue is.

    The first of the queue by (priority, age) leads; calls of its key join it, in the same order,
    as long as all fit in max_batch_tokens. A call larger than that runs alone.
    """
    if len(queue) <= 1:
        return list(queue)
    ordered = sorted(queue, key=lambda waiting: (-waiting.priority, waiting.arrived_ns))
    lead, tokens = ordered[0], 0
    batch: list[W] = []
    for waiting in ordered:
        if waiting.key != lead.key:
            continue
        if batch and tokens + waiting.tokens > max_batch_tokens:
            break
        batch.append(waiting)
        tokens += waiting.tokens
    return batch
