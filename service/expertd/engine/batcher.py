"""The queue between the carriers' threads and the executor's."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

from expertd.engine.drain import DrainRate
from expertd.engine.ledger import Budget, Full, Ledger
from expertd.engine.policy import Rules, choose
from expertd.engine.ticket import Ticket
from expertd.errors import Cancelled, DeadlineExceeded, ExpertdError, Overloaded, Unavailable


class Batcher:
    """Takes tickets from any thread, gives batches to one; never waits while the device is idle.

    A ticket with pieces is admitted as a whole and queued as its pieces. With overlap a batch may
    be taken while the one before it still computes, but only if it is as large as that: a smaller
    one grows until computed() is called.
    """

    def __init__(self, budget: Budget, rules: Rules, overlap: bool = False) -> None:
        self._rules = rules
        self._queue: dict[Ticket, None] = {}
        self._ledger = Ledger(budget)
        self._rate = DrainRate()
        self._overlap = overlap
        self._ahead: Sequence[Ticket] = ()
        self._overtaken = 0
        self._first_deadline = math.inf
        self._closed = ""
        self._changed = threading.Condition()

    def submit(self, ticket: Ticket) -> None:
        """Queues a ticket; raises Overloaded, or Unavailable after close()."""
        with self._changed:
            if self._closed:
                raise unavailable(self._closed)
            self._make_room(ticket)
            for part in ticket.parts:
                self._queue[part] = None
                self._ledger.enter(part)
                part.resident.queued_tokens += part.tokens
            if ticket.deadline is not None and ticket.deadline < self._first_deadline:
                self._first_deadline = ticket.deadline
            self._changed.notify()

    def cancel(self, ticket: Ticket) -> None:
        """Forgets a ticket that nobody waits for; what already runs is left to run."""
        with self._changed:
            for part in ticket.parts:
                if part in self._queue:
                    late = part.expired(time.monotonic())
                    self._drop(part, _late(part) if late else Cancelled("the caller left"))

    def next_batch(self) -> list[Ticket]:
        """Waits for work; an empty list means that the batcher is closed and drained."""
        with self._changed:
            while True:
                wait_ns = 0
                if self._queue:
                    self._drop_expired()
                    batch, wait_ns = self._take()
                    if batch:
                        return batch
                if not self._queue:
                    if self._closed:
                        return []
                    self._rate.idle()
                self._changed.wait(wait_ns / 1e9 if wait_ns else None)

    def computed(self, batch: Sequence[Ticket]) -> None:
        """The device has computed a batch; if it was the last one taken, it is idle now."""
        if self._ahead is batch:
            with self._changed:
                self._ahead = ()
                self._changed.notify()

    def close(self, why: str) -> None:
        """Refuses new tickets, saying why; those already queued run without further delay."""
        with self._changed:
            self._closed = why
            self._rules = replace(self._rules, delay_ns=0)
            self._changed.notify_all()

    def fail_all(self, why: str) -> None:
        """Closes and fails everything that waits: the executor is gone."""
        with self._changed:
            self._closed = why
            for ticket in list(self._queue):
                self._drop(ticket, unavailable(why))
            self._changed.notify_all()

    def _make_room(self, ticket: Ticket) -> None:
        try:
            victims = self._ledger.make_room(ticket, self._queue)
        except Full as full:
            raise self._overloaded(str(full), full.tokens) from None
        for victim in victims:
            why = "this call was queued beyond its client's share, and others need the room"
            self._drop(victim, self._overloaded(why, victim.tokens))

    def _overloaded(self, why: str, tokens: int) -> Overloaded:
        seconds = self._rate.seconds(tokens)
        text = f"{why}; retry in {seconds:.3g} s or elsewhere"
        return Overloaded(text, retry_seconds=seconds)

    def _take(self) -> tuple[list[Ticket], int]:
        """The next batch without those whose callers have left; from here on none can cancel."""
        while True:
            now_ns = time.monotonic_ns()
            least = sum(ticket.tokens for ticket in self._ahead) if self._ahead else 0
            rules, queue = self._rules, tuple(self._queue)
            choice = choose(queue, now_ns, rules, self._overtaken, least)
            self._overtaken = choice.overtaken
            for ticket in choice.batch:
                self._remove(ticket)
            batch = [t for t in choice.batch if t.future.set_running_or_notify_cancel()]
            if batch:
                self._rate.took(sum(ticket.tokens for ticket in batch), now_ns)
                self._ahead = batch if self._overlap else ()
            if batch or not choice.batch:
                return batch, choice.wait_ns

    def _drop_expired(self) -> None:
        now = time.monotonic()
        if now < self._first_deadline:
            return
        for ticket in [t for t in self._queue if t.expired(now)]:
            self._drop(ticket, _late(ticket))
        deadlines = (t.deadline for t in self._queue if t.deadline is not None)
        self._first_deadline = min(deadlines, default=math.inf)

    def _drop(self, ticket: Ticket, error: ExpertdError) -> None:
        """Fails a ticket if it still waits; the pieces of one call drag each other along."""
        if ticket in self._queue:
            self._remove(ticket)
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(error)

    def _remove(self, ticket: Ticket) -> None:
        del self._queue[ticket]
        self._ledger.leave(ticket)
        ticket.resident.queued_tokens -= ticket.tokens


def _late(ticket: Ticket) -> DeadlineExceeded:
    waited = (time.monotonic_ns() - ticket.arrived_ns) / 1e6
    return DeadlineExceeded(f"the deadline passed after {waited:.0f} ms in the queue")


def unavailable(why: str) -> Unavailable:
    """The error of an engine that takes no more calls."""
    return Unavailable(f"the server is {why}; retry elsewhere")
