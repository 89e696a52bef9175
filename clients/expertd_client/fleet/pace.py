"""How fast a replica is, how long to wait for it, and how often to try again."""

from __future__ import annotations

import random
from collections import defaultdict, deque
from dataclasses import dataclass, field

FIRST_SPEED = 10_000.0
"""Rows a second that replicas are thought to do until one of them has been measured."""

HOPE = 1.1
"""How much faster than the fastest a replica is thought to be that has not been measured."""

FRESH_SECONDS = 5.0
"""A measure older than this is forgotten, so that a replica that was slow is tried again."""

SETTLE_SECONDS = 0.5
"""So long after its first answer a replica is not measured yet.

A first message alone says how long the way is, not how many rows a second are done: believed at
once, it would leave the replica with so few calls that it could never show more.
"""

MOST_HINT_SECONDS = 10.0
"""No replica's own wish to be left alone is obeyed for longer: it may be the only one there is."""

_FADE = 0.9
_LEAST_SAMPLES = 16


@dataclass(slots=True)
class Pace:
    """Rows under way at a replica, and how many it has done a second of late."""

    rows: int = 0
    first_end: float = 0.0
    last_end: float = 0.0
    done: float = 0.0
    busy: float = 0.0

    def speed(self, now: float) -> float | None:
        """Rows a second; None if it has not been measured of late."""
        known = self.done and self._fresh(now) and now - self.first_end >= SETTLE_SECONDS
        return self.done / self.busy if known else None

    def finished(self, rows: int, begin: float, now: float) -> None:
        """An attempt has been answered; what it waited for others is not counted as its own."""
        spent = max(1e-6, now - max(begin, self.last_end))
        if not (self.done and self._fresh(now)):
            self.first_end, self.done, self.busy = now, 0.0, 0.0
        self.done, self.busy = _FADE * self.done + rows, _FADE * self.busy + spent
        self.last_end = now

    def _fresh(self, now: float) -> bool:
        return now - self.last_end < FRESH_SECONDS


class Latencies:
    """How long answers take, by the size of their call."""

    def __init__(self) -> None:
        self._seconds: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=256))

    def add(self, rows: int, seconds: float) -> None:
        self._seconds[rows.bit_length()].append(seconds)

    def p95(self, rows: int) -> float | None:
        """The time that 95 of 100 such calls take; None until enough of them are known."""
        known = sorted(self._seconds[rows.bit_length()])
        return known[len(known) * 95 // 100] if len(known) >= _LEAST_SAMPLES else None


@dataclass(slots=True)
class Allowance:
    """Tokens that come with time and with work done; who takes one may do something extra."""

    most: float
    per_second: float = 0.0
    per_answer: float = 0.0
    tokens: float = field(init=False)
    _counted: float = 0.0

    def __post_init__(self) -> None:
        self.tokens = self.most

    def earn(self) -> None:
        """A call has been answered."""
        self.tokens = min(self.most, self.tokens + self.per_answer)

    def take(self, now: float) -> bool:
        """Takes a token if there is one."""
        self.tokens = min(self.most, self.tokens + (now - self._counted) * self.per_second)
        self._counted = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


@dataclass(slots=True)
class Pause:
    """A circuit breaker: after each failure a replica is left alone for longer."""

    first: float = 0.05
    longest: float = 2.0
    failures: int = 0
    until: float = 0.0

    def failed(self, now: float, hint: float | None = None) -> None:
        """Leave it alone; hint is the time that the replica itself asks for."""
        backoff = min(self.longest, self.first * 2**self.failures) * random.uniform(0.5, 1.0)
        self.failures = min(self.failures + 1, 16)
        wished = backoff if hint is None else min(hint, MOST_HINT_SECONDS)
        self.until = max(self.until, now + wished)

    def succeeded(self) -> None:
        self.failures, self.until = 0, 0.0

    def over(self, now: float) -> bool:
        """Whether it may be asked."""
        return now >= self.until
