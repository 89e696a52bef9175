"""Which waiting calls run next: a pure function of the queue and the clock."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

MOST_OVERTAKINGS = 3
"""How many batches in a row may pass over the oldest call for the sake of higher priorities."""


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


@dataclass(frozen=True, slots=True)
class Rules:
    """How batches are made; without merge every call runs by itself, whatever else waits."""

    max_batch_tokens: int = 8192
    delay_ns: int = 0
    merge: bool = True


class Choice(NamedTuple, Generic[W]):
    """The calls to run now, or how long to wait for more of them.

    overtaken is how many batches in a row have now passed over the oldest call.
    """

    batch: list[W]
    wait_ns: int
    overtaken: int


def choose(
    queue: Sequence[W], now_ns: int, rules: Rules, overtaken: int = 0, least: int = 0
) -> Choice[W]:
    """The next batch, in the order of (priority, age), or none yet and how long to wait for it.

    The first of the queue leads and calls of its key join it, as long as all fit. The oldest call
    leads after MOST_OVERTAKINGS batches without it, so that a call waits for at most that many
    batches, and one, for each call older than itself. A batch that could still grow waits until its
    oldest call is delay_ns old, and lets other keys go first; one of fewer tokens than least waits
    for something to change (0: for as long as that takes).
    """
    if len(queue) <= 1 and not (rules.delay_ns or least):
        return Choice(list(queue), 0, 0)
    oldest = min(queue, key=lambda waiting: waiting.arrived_ns, default=None)
    forced = oldest if overtaken >= MOST_OVERTAKINGS else None
    shortest = 0
    for batch, full in _batches(_ordered(queue, forced), rules):
        if not full and sum(waiting.tokens for waiting in batch) < least:
            continue
        wait_ns = 0 if full else _remaining(batch, now_ns, rules)
        if wait_ns <= 0:
            return Choice(batch, 0, 0 if oldest in batch else overtaken + 1)
        shortest = min(shortest or wait_ns, wait_ns)
    return Choice([], shortest, overtaken)


def _ordered(queue: Sequence[W], first: W | None) -> list[W]:
    """By priority, then age; first, if any, before all others."""
    return sorted(queue, key=lambda w: (w is not first, -w.priority, w.arrived_ns))


def _batches(ordered: Sequence[W], rules: Rules) -> Iterator[tuple[list[W], bool]]:
    """The batch of each key, best key first, and whether it has no room for another call."""
    rest = list(ordered)
    while rest:
        key = rest[0].key
        yield _filled([waiting for waiting in rest if waiting.key == key], rules)
        rest = [waiting for waiting in rest if waiting.key != key]


def _filled(calls: Sequence[W], rules: Rules) -> tuple[list[W], bool]:
    """As many of the first calls of a key as fit, and whether another could not join them."""
    if not rules.merge:
        return [calls[0]], True
    tokens = calls[0].tokens
    for count in range(1, len(calls)):
        tokens += calls[count].tokens
        if tokens > rules.max_batch_tokens:
            return list(calls[:count]), True
    return list(calls), tokens >= rules.max_batch_tokens


def _remaining(batch: Sequence[W], now_ns: int, rules: Rules) -> int:
    return min(waiting.arrived_ns for waiting in batch) + rules.delay_ns - now_ns
