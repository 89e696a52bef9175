"""One admitted call on its way through the engine."""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from expertd.core import CallForm
from expertd.engine.resident import Resident
from expertd_wire.messages import ForwardCall, ForwardReply


@dataclass(slots=True, eq=False)
class Ticket:
    """A call, where it goes, and the future that its carrier waits on.

    deadline and arrived_ns are on the monotonic clock; client is whose share of the queue it takes.
    A call too large for one launch has pieces; a piece begins at first_row of its call.
    """

    call: ForwardCall
    resident: Resident
    form: CallForm
    tokens: int
    nbytes: int
    deadline: float | None
    carrier: str
    client: str = ""
    future: Future[ForwardReply] = field(default_factory=Future)
    arrived_ns: int = field(default_factory=time.monotonic_ns)
    pieces: tuple[Ticket, ...] = ()
    first_row: int = 0

    @property
    def key(self) -> tuple[int, CallForm]:
        """Calls of one key may share a batch."""
        return (self.resident.serial, self.form)

    @property
    def parts(self) -> tuple[Ticket, ...]:
        """What is queued for this call: its pieces, or itself."""
        return self.pieces or (self,)

    @property
    def priority(self) -> int:
        return self.call.priority

    def expired(self, now: float) -> bool:
        return self.deadline is not None and now >= self.deadline
