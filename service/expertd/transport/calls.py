"""Between messages and the engine: what every carrier does with a call besides moving its bytes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from expertd.engine.engine import Engine
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError, InvalidArgument, Unavailable
from expertd.metrics.registry import DRAINING, NO_PLAN, REJECTIONS, CallReport, Metrics
from expertd_wire.errors import REASONS
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import WireError

log = logging.getLogger(__name__)

S = TypeVar("S")
T = TypeVar("T")

MAX_LOGGED = 200
"""Characters of a caller's own text that one log line may hold."""


@dataclass(slots=True)
class Record:
    """What the metrics will say of a call; carriers fill it in as they learn it."""

    model: str = ""
    request_id: str = ""
    plan: tuple[str, str] = NO_PLAN
    code: str = "OK"
    stages: list[tuple[str, int]] = field(default_factory=list)
    begin_ns: int = field(default_factory=time.perf_counter_ns)


class Desk:
    """The engine and the metrics, as one carrier uses them."""

    def __init__(self, carrier: str, engine: Engine, metrics: Metrics) -> None:
        self.carrier = carrier
        self.engine = engine
        self.metrics = metrics

    def begin(self) -> Record:
        """A call has arrived; end() must follow."""
        self.metrics.started()
        return Record()

    def end(self, record: Record) -> None:
        """A call has been answered, well or badly."""
        spent = time.perf_counter_ns() - record.begin_ns
        plan, code = record.plan, record.code
        report = CallReport(record.model, self.carrier, plan, code, spent, record.stages)
        self.metrics.finished(report)

    def fail(self, record: Record, error: ExpertdError) -> None:
        """Notes how a call failed, and whether that was a rejection."""
        record.code = error.wire.grpc
        known = {
            "request_id": record.request_id[:MAX_LOGGED],
            "carrier": self.carrier,
            "code": record.code,
        }
        log.info("a call failed: %s", error.reason, extra=known)
        draining = isinstance(error, Unavailable) and self.engine.draining
        if reason := REJECTIONS.get(error.reason, DRAINING if draining else ""):
            self.metrics.rejected(reason)

    def recorded(self, record: Record | None = None) -> Recorded:
        """Counts and times one call, new or begun, whatever becomes of it, as a context."""
        return Recorded(self, record or self.begin())

    def submit(
        self, record: Record, call: ForwardCall, deadline: float | None, client: str
    ) -> Ticket:
        """Queues a decoded call; raises what Engine.submit does."""
        record.model, record.request_id = call.model, call.request_id
        return self.engine.submit(call, self.carrier, deadline, client)

    def timed(self, record: Record, stage: str, work: Callable[[S], T], given: S) -> T:
        """Runs a carrier's own stage (decode, encode); bytes it cannot read are InvalidArgument."""
        begin = time.perf_counter_ns()
        try:
            return work(given)
        except WireError as error:
            raise InvalidArgument(str(error)) from None
        finally:
            record.stages.append((stage, time.perf_counter_ns() - begin))


class Recorded:
    """One call until its answer, as a context."""

    __slots__ = ("_desk", "_record")

    def __init__(self, desk: Desk, record: Record) -> None:
        self._desk = desk
        self._record = record

    def __enter__(self) -> Record:
        return self._record

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if isinstance(error, ExpertdError):
            self._desk.fail(self._record, error)
        elif error is not None:
            self._record.code = REASONS["INTERNAL"].grpc
        self._desk.end(self._record)


def note_plan(record: Record, reply: ForwardReply) -> ForwardReply:
    """Remembers which plan ran."""
    record.plan = (reply.backend, reply.mode)
    return reply
