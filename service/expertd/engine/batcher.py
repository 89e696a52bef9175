"""The queue between the carriers' threads and the executor's."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from expertd.engine.policy import choose
from expertd.engine.ticket import Ticket
from expertd.errors import Cancelled, DeadlineExceeded, ExpertdError, Overloaded, Unavailable


@dataclass(frozen=True, slots=True)
class Budget:
    """What may wait or be merged at most."""

    max_batch_tokens: int = 8192
    max_queued_tokens: int = 65536
    max_queued_bytes: int = 1 << 30


class Batcher:
    """Takes tickets from any thread, gives batches to one; never waits while the device is idle."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._queue: list[Ticket] = []
        self._tokens = 0
        self._bytes = 0
        self._closed = ""
        self._changed = threading.Condition()

    def submit(self, ticket: Ticket) -> None:
        """Queues a ticket; raises Overloaded, or Unavailable after close()."""
        with self._changed:
            if self._closed:
                raise unavailable(self._closed)
            self._admit(ticket)
            self._queue.append(ticket)
            self._count(ticket, +1)
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a ticket that nobody waits for; one that already runs is left to run."""
        with self._changed:
            if ticket in self._queue:
                late = ticket.expired(time.monotonic())
                self._drop(ticket, _late(ticket) if late else Cancelled("the caller left"))

    def next_batch(self) -> list[Ticket]:
        """Waits for work; an empty list means that the batcher is closed and drained."""
        with self._changed:
            while True:
                self._drop_expired()
                if batch := self._take():
                    return batch
                if self._closed and not self._queue:
                    return []
                if not self._queue:
                    self._changed.wait()

    def close(self, why: str) -> None:
        """Refuses new tickets, saying why; those already queued still run."""
        with self._changed:
            self._closed = why
            self._changed.notify_all()

    def fail_all(self, why: str) -> None:
        """Closes and fails everything that waits: the executor is gone."""
        with self._changed:
            self._closed = why
            for ticket in list(self._queue):
                self._drop(ticket, unavailable(why))
            self._changed.notify_all()

    def _admit(self, ticket: Ticket) -> None:
        over_tokens = self._tokens + ticket.tokens > self._budget.max_queued_tokens
        over_bytes = self._bytes + ticket.nbytes > self._budget.max_queued_bytes
        if self._queue and (over_tokens or over_bytes):
            limit = "--max-queued-tokens" if over_tokens else "--max-queued-bytes"
            raise Overloaded(
                f"{self._tokens} tokens are queued ({limit}); retry later or elsewhere"
            )

    def _take(self) -> list[Ticket]:
        """The next batch without those whose callers have left; from here on none can cancel."""
        batch = choose(self._queue, self._budget.max_batch_tokens)
        for ticket in batch:
            self._remove(ticket)
        return [ticket for ticket in batch if ticket.future.set_running_or_notify_cancel()]

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for ticket in [t for t in self._queue if t.expired(now)]:
            self._drop(ticket, _late(ticket))

    def _drop(self, ticket: Ticket, error: ExpertdError) -> None:
        self._remove(ticket)
        if ticket.future.set_running_or_notify_cancel():
            ticket.future.set_exception(error)

    def _remove(self, ticket: Ticket) -> None:
        self._queue.remove(ticket)
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self._tokens += sign * ticket.tokens
        self._bytes += sign * ticket.nbytes
        ticket.resident.queued_tokens += sign * ticket.tokens


def _late(ticket: Ticket) -> DeadlineExceeded:
    waited = (time.monotonic_ns() - ticket.arrived_ns) / 1e6
    return DeadlineExceeded(f"the deadline passed after {waited:.0f} ms in the queue")


def unavailable(why: str) -> Unavailable:
    """The error of an engine that takes no more calls."""
    return Unavailable(f"the server is {why}; retry elsewhere")
