"""How fast a busy queue empties, so that a refused caller can be told when to come back."""

from __future__ import annotations

FADE = 0.9
"""What is left of older batches' weight with each new one."""
UNKNOWN_SECONDS = 0.1
LEAST_SECONDS, MOST_SECONDS = 0.001, 30.0


class DrainRate:
    """Tokens that leave per second while there is always more to take."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._taken: tuple[int, int] | None = None

    def took(self, tokens: int, now_ns: int) -> None:
        """A batch was taken; the time since the one before it is what that one needed."""
        if self._taken is not None:
            before, then_ns = self._taken
            self._tokens = self._tokens * FADE + before
            self._seconds = self._seconds * FADE + (now_ns - then_ns) / 1e9
        self._taken = (tokens, now_ns)

    def idle(self) -> None:
        """Nothing waits: the time until the next batch says nothing."""
        self._taken = None

    def seconds(self, tokens: int) -> float:
        """How long so many tokens will need."""
        if self._seconds <= 0:
            return UNKNOWN_SECONDS
        needed = tokens * self._seconds / self._tokens
        return min(MOST_SECONDS, max(LEAST_SECONDS, needed))
