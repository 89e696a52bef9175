"""A batch between its launch and its answers."""

from __future__ import annotations

import time
from collections.abc import Sequence

from torch import Tensor

from expertd.backends.base import Backend
from expertd.engine.checks import fault_error
from expertd.engine.observer import BatchReport, BatchTimes
from expertd.engine.staging import Staging
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError
from expertd_wire.messages import ForwardReply
from expertd_wire.tensors import WireTensor

Answer = ForwardReply | ExpertdError


class Flight:
    """Calls of one key on their way; leave(), then land()."""

    __slots__ = (
        "_backend",
        "_codes_T",
        "_nonfinite",
        "_out_TH",
        "_sources",
        "_started_ns",
        "staging",
        "tickets",
    )

    def __init__(self, staging: Staging, backend: Backend, tickets: Sequence[Ticket]) -> None:
        self.staging = staging
        self.tickets = tickets
        self._backend = backend
        self._started_ns = time.monotonic_ns()

    def leave(self, out_TH: Tensor, codes_T: Tensor | None, nonfinite: int | Tensor) -> None:
        """Computing is under way: what it leaves on the device is brought out."""
        count = nonfinite if isinstance(nonfinite, Tensor) else None
        self._sources = (out_TH, codes_T, count)
        out, self._codes_T, brought = self.staging.bring_out(self._sources)
        assert out is not None
        self._out_TH = out
        self._nonfinite = nonfinite if brought is None else brought

    def land(self) -> tuple[list[Answer], BatchReport]:
        """Waits for the results; a faulty call gets its error, others their replies."""
        self.staging.wait_out()
        times, tickets = self.staging.times(), self.tickets
        waited = [self._started_ns - ticket.arrived_ns for ticket in tickets]
        resident = tickets[0].resident
        report = BatchReport(
            resident.model,
            resident.layer,
            len(tickets),
            self._out_TH.shape[0],
            int(self._nonfinite),
            waited,
            times,
        )
        return self._answers(times, waited), report

    def _answers(self, times: BatchTimes, waited: Sequence[int]) -> list[Answer]:
        row = self._backend.row
        staged_ns, computed_ns = times.stage_in + times.stage_out, times.route + times.kernel
        data = self.staging.host_bytes(self._out_TH)
        row_bytes = len(data) // self._out_TH.shape[0]
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
            )
            answers.append(self._first_fault(ticket, begin, end) or reply)
            begin = end
        return answers

    def _first_fault(self, ticket: Ticket, begin: int, end: int) -> ExpertdError | None:
        if self._codes_T is None:
            return None
        faulty = self._codes_T[begin:end].nonzero()
        if not len(faulty):
            return None
        row = int(faulty[0])
        code = int(self._codes_T[begin + row])
        return fault_error(code, ticket.first_row + row, ticket.resident.spec)
