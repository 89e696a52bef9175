"""When the next call is due: at once (closed loop), or at random times (open loop)."""

from __future__ import annotations

import random
import threading


class Pace:
    """Gives each caller of a process the time of its next call, in seconds since the start.

    With a rate, calls arrive as a Poisson process whether or not the earlier ones are answered: a
    call's latency counts from when it was due, so that a slow server cannot slow its own judge.
    """

    def __init__(self, seconds: float, rate: float, seed: int) -> None:
        self._seconds = seconds
        self._rate = rate
        self._random = random.Random(seed)
        self._due = 0.0
        self._lock = threading.Lock()

    def next(self, now: float) -> float | None:
        """When the next call is due; None after the end."""
        if not self._rate:
            return now if now < self._seconds else None
        with self._lock:
            self._due += self._random.expovariate(self._rate)
            return self._due if self._due < self._seconds else None
