"""A batch between its launch and its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from expertd.backends.base import Backend, Batch
from expertd.engine.checks import OK, fault_error
from expertd.engine.observer import BatchReport, BatchTimes
from expertd.engine.staging import Staging
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError
from expertd_wire.messages import ForwardReply
from expertd_wire.tensors import WireTensor

Answer = ForwardReply | ExpertdError


class Flight:
    """Calls of one key on their way; leave(), then land()."""

    __slots__ = ("_backend", "_batch", "_started_ns", "staging", "tickets")

    def __init__(self, staging: Staging, backend: Backend, tickets: Sequence[Ticket]) -> None:
        self.staging = staging
        self.tickets = tickets
        self._backend = backend
        self._started_ns = time.monotonic_ns()

    def leave(self, batch: Batch) -> None:
        """Computing is under way: its result is brought out, for which the batch has to stay."""
        self._batch = batch
        self.staging.bring_out(batch.out)

    def land(self) -> tuple[list[Answer], BatchReport]:
        """Waits for the results; a faulty call gets its error, others their replies."""
        staging, tickets = self.staging, self.tickets
        staging.wait_out()
        times = staging.times()
        waited = [self._started_ns - ticket.arrived_ns for ticket in tickets]
        resident = tickets[0].resident
        report = BatchReport(
            resident.model,
            resident.layer,
            len(tickets),
            len(self._batch.out),
            staging.nonfinite(),
            waited,
            times,
        )
        return self._answers(times, waited), report

    def _answers(self, times: BatchTimes, waited: Sequence[int]) -> list[Answer]:
        row = self._backend.row
        staged_ns, computed_ns = times.stage_in + times.stage_out, times.route + times.kernel
        data, codes = self.staging.result(), self.staging.checks.codes()
        row_bytes = len(data) // len(self._batch.out)
        answers: list[Answer] = []
        begin = 0
        for ticket, queued_ns in zip(self.tickets, waited, strict=True):
            end = begin + ticket.tokens
            output = WireTensor(
                ticket.form.reply_dtype,
                (ticket.tokens, ticket.resident.spec.hidden),
                data[begin * row_bytes : end * row_bytes],
            )
            request_id = ticket.call.request_id
            reply = ForwardReply(
                output,
                row.backend,
                row.mode,
                row.entry,
                queued_ns,
                staged_ns,
                computed_ns,
                request_id,
                generation=ticket.resident.generation,
                weights_digest=ticket.resident.digest,
            )
            fault = None if codes is None else _first_fault(ticket, codes[begin:end])
            answers.append(fault or reply)
            begin = end
        return answers


def _first_fault(ticket: Ticket, codes: memoryview) -> ExpertdError | None:
    """The error of a call's first row that has one."""
    faulty = bytes(codes).lstrip(bytes([OK]))
    if not faulty:
        return None
    row = ticket.first_row + len(codes) - len(faulty)
    return fault_error(faulty[0], row, ticket.resident.spec)
