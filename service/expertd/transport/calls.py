"""Between messages and the engine: what every carrier does with a call besides moving its bytes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from expertd.engine.engine import Engine
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError, InvalidArgument
from expertd.metrics import NO_PLAN, Metrics
from expertd_wire.errors import REASONS
from expertd_wire.messages import ForwardCall, ForwardReply
from expertd_wire.tensors import WireError

T = TypeVar("T")


@dataclass(slots=True)
class Record:
    """What the metrics will say of a call; carriers fill it in as they learn it."""

    model: str = ""
    plan: tuple[str, str] = NO_PLAN
    code: str = "OK"


class Desk:
    """The engine and the metrics, as one carrier uses them."""

    def __init__(self, carrier: str, engine: Engine, metrics: Metrics) -> None:
        self.carrier = carrier
        self.engine = engine
        self.metrics = metrics

    @contextmanager
    def recorded(self) -> Iterator[Record]:
        """Counts and times one call, whatever becomes of it."""
        record, begin = Record(), time.perf_counter_ns()
        self.metrics.started()
        try:
            yield record
        except ExpertdError as error:
            record.code = error.wire.grpc
            raise
        except BaseException:
            record.code = REASONS["INTERNAL"].grpc
            raise
        finally:
            spent = time.perf_counter_ns() - begin
            self.metrics.finished(record.model, self.carrier, record.plan, record.code, spent)

    def submit(self, record: Record, call: ForwardCall, deadline: float | None) -> Ticket:
        """Queues a decoded call; raises what Engine.submit does."""
        record.model = call.model
        return self.engine.submit(call, self.carrier, deadline)

    def timed(self, stage: str, work: Callable[[], T]) -> T:
        """Runs a carrier's own stage (decode, encode); bytes it cannot read are InvalidArgument."""
        begin = time.perf_counter_ns()
        try:
            return work()
        except WireError as error:
            raise InvalidArgument(str(error)) from None
        finally:
            self.metrics.stage(stage, time.perf_counter_ns() - begin)


def note_plan(record: Record, reply: ForwardReply) -> ForwardReply:
    """Remembers which plan ran."""
    record.plan = (reply.backend, reply.mode)
    return reply
