"""The queue between the carriers' threads and the executor's."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass

from expertd.engine.observer import Observer
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

    def __init__(self, budget: Budget, observer: Observer) -> None:
        self._budget = budget
        self._observer = observer
        self._queue: list[Ticket] = []
        self._tokens = 0
        self._bytes = 0
        self._closed: ExpertdError | None = None
        self._changed = threading.Condition()

    def submit(self, ticket: Ticket) -> None:
        """Queues a ticket; raises Overloaded, or what close() was given."""
        with self._changed:
            if self._closed is not None:
                raise self._closed
            self._admit(ticket)
            self._queue.append(ticket)
            self._count(ticket, +1)
            self._changed.notify()
        self._observer.queued(self._tokens)

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a ticket that nobody waits for; one that already runs is left to run."""
        with self._changed:
            if ticket in self._queue:
                self._remove(ticket)
                self._refuse(ticket, Cancelled("the caller left"), "cancelled")

    def next_batch(self) -> list[Ticket]:
        """Waits for work; an empty list means that the batcher is closed and drained."""
        with self._changed:
            while True:
                self._drop_expired()
                batch = choose(self._queue, self._budget.max_batch_tokens)
                if batch or self._closed is not None:
                    for ticket in batch:
                        self._remove(ticket)
                    return batch
                self._changed.wait()

    def close(self, error: ExpertdError) -> None:
        """Refuses new tickets with error; those already queued still run."""
        with self._changed:
            self._closed = error
            self._changed.notify_all()

    def fail_all(self, error: ExpertdError) -> None:
        """Closes and fails everything that waits: the executor is gone."""
        with self._changed:
            self._closed = error
            for ticket in list(self._queue):
                self._remove(ticket)
                ticket.future.set_exception(error)
            self._changed.notify_all()

    @property
    def idle(self) -> bool:
        return not self._queue

    def _admit(self, ticket: Ticket) -> None:
        over_tokens = self._tokens + ticket.tokens > self._budget.max_queued_tokens
        over_bytes = self._bytes + ticket.nbytes > self._budget.max_queued_bytes
        if self._queue and (over_tokens or over_bytes):
            self._observer.rejected("queue_full")
            limit = "--max-queued-tokens" if over_tokens else "--max-queued-bytes"
            raise Overloaded(
                f"{self._tokens} tokens are queued ({limit}); retry later or elsewhere"
            )

    def _drop_expired(self) -> None:
        now = time.monotonic()
        for ticket in [t for t in self._queue if t.expired(now)]:
            self._remove(ticket)
            waited = (time.monotonic_ns() - ticket.arrived_ns) / 1e6
            error = DeadlineExceeded(f"the deadline passed after {waited:.0f} ms in the queue")
            self._refuse(ticket, error, "deadline")

    def _refuse(self, ticket: Ticket, error: ExpertdError, reason: str) -> None:
        self._observer.rejected(reason)
        ticket.future.set_exception(error)

    def _remove(self, ticket: Ticket) -> None:
        self._queue.remove(ticket)
        self._count(ticket, -1)

    def _count(self, ticket: Ticket, sign: int) -> None:
        self._tokens += sign * ticket.tokens
        self._bytes += sign * ticket.nbytes
        ticket.resident.queued_tokens += sign * ticket.tokens


def unavailable(why: str) -> Unavailable:
    """The error of an engine that takes no more calls."""
    return Unavailable(f"the server is {why}; retry elsewhere")
