"""One batch from staged bytes to replies: stage in, check, route, compute, stage out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.core import CallForm, PlanMode
from expertd.engine.checks import check_logits, check_topk, fault_error
from expertd.engine.observer import BatchReport, BatchTimes
from expertd.engine.resident import Resident
from expertd.engine.routers import router_on
from expertd.engine.staging import TORCH_DTYPES, Staging, host_bytes
from expertd.engine.ticket import Ticket
from expertd.errors import ExpertdError
from expertd.weights.dequant import e8m0_to_float
from expertd_wire.messages import ForwardReply
from expertd_wire.tensors import WireTensor

Answer = ForwardReply | ExpertdError


def launch(
    staging: Staging, backend: Backend, tickets: Sequence[Ticket]
) -> tuple[list[Answer], BatchReport]:
    """Runs calls of one key in one launch; a faulty call gets its error, others their replies."""
    started = time.monotonic_ns()
    resident, form = tickets[0].resident, tickets[0].form
    batch, codes_T = _stage_in(staging, tickets, form, resident)
    staged = time.monotonic_ns()
    batch = _route(batch, resident, backend)
    routed = time.monotonic_ns()
    backend.forward(batch)
    bad_T = None if codes_T is None else codes_T.cpu()
    computed = time.monotonic_ns()
    data = host_bytes(batch.out)
    nonfinite = nonfinite_rows(batch.out)
    times = BatchTimes(staged - started, routed - staged, computed - routed)
    times.stage_out = time.monotonic_ns() - computed
    waited = [started - ticket.arrived_ns for ticket in tickets]
    answers = _answers(tickets, backend, form, data, bad_T, times, waited)
    tokens = batch.rows.shape[0]
    report = BatchReport(
        resident.model, resident.layer, len(tickets), tokens, nonfinite, waited, times
    )
    return answers, report


def _stage_in(
    staging: Staging, tickets: Sequence[Ticket], form: CallForm, resident: Resident
) -> tuple[Batch, Tensor | None]:
    rows = staging.stage("rows", tickets)
    assert rows is not None
    scales = staging.stage("scales", tickets)
    out = torch.empty(rows.shape, dtype=TORCH_DTYPES[form.reply_dtype], device=rows.device)
    spec = resident.spec
    if form.rows_format:
        rows, scales = _fp8_rows(rows, scales)
    if not spec.num_experts:
        return Batch(rows, out, scales), None
    logits = staging.stage("logits", tickets)
    if logits is not None:
        assert spec.routing is not None
        logits, codes = check_logits(logits, spec.routing.top_k)
        return Batch(rows, out, scales, logits=logits), codes
    ids, weights = staging.stage("ids", tickets), staging.stage("weights", tickets)
    assert ids is not None and weights is not None
    weights = weights.to(torch.float32)
    ids, codes = check_topk(ids, weights, spec, form.partial)
    return Batch(rows, out, scales, ids, weights), codes


def _fp8_rows(rows: Tensor, scales: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows as float8_e4m3fn with float32 multipliers."""
    assert scales is not None
    if scales.dtype == torch.uint8:
        scales = e8m0_to_float(scales)
    return rows.view(torch.float8_e4m3fn), scales


def _route(batch: Batch, resident: Resident, backend: Backend) -> Batch:
    """Chooses the experts of a logits batch, unless the kernel does it itself."""
    if batch.logits is None or backend.row.mode is PlanMode.MONOLITHIC:
        return batch
    assert resident.spec.routing is not None
    route = router_on(batch.logits.device.type)
    ids, weights = route(resident.spec.routing, batch.logits, resident.bias)
    return Batch(batch.rows, batch.out, batch.row_scales, ids, weights)


def _answers(
    tickets: Sequence[Ticket],
    backend: Backend,
    form: CallForm,
    data: memoryview,
    bad_T: Tensor | None,
    times: BatchTimes,
    waited: Sequence[int],
) -> list[Answer]:
    staged_ns = times.stage_in + times.stage_out
    computed_ns = times.route + times.kernel
    total = sum(ticket.tokens for ticket in tickets)
    row_bytes = len(data) // total
    answers: list[Answer] = []
    begin = 0
    for ticket, queued_ns in zip(tickets, waited, strict=True):
        end = begin + ticket.tokens
        fault = _first_fault(ticket, bad_T, begin, end)
        output = WireTensor(
            form.reply_dtype,
            (ticket.tokens, ticket.resident.spec.hidden),
            data[begin * row_bytes : end * row_bytes],
        )
        answers.append(
            fault
            or ForwardReply(
                output,
                backend.row.backend,
                backend.row.mode,
                backend.row.entry,
                queued_ns,
                staged_ns,
                computed_ns,
                ticket.call.request_id,
            )
        )
        begin = end
    return answers


def nonfinite_rows(out_TH: Tensor) -> int:
    """How many rows hold NaN or infinity.

    A sum is finite only if all it adds is, and costs a tenth of asking each number; one that
    overflows is looked at closely.
    """
    if math.isfinite(out_TH.sum()):
        return 0
    suspects = out_TH[~torch.isfinite(out_TH.sum(dim=1))]
    return int((~torch.isfinite(suspects)).any(dim=1).sum())


def _first_fault(ticket: Ticket, bad_T: Tensor | None, begin: int, end: int) -> ExpertdError | None:
    if bad_T is None:
        return None
    faulty = bad_T[begin:end].nonzero()
    if not len(faulty):
        return None
    row = int(faulty[0])
    return fault_error(int(bad_T[begin + row]), ticket.first_row + row, ticket.resident.spec)
