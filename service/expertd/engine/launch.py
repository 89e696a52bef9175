"""One batch from staged bytes to the device: stage in, check, route, compute, begin to copy out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.core import CallForm, PlanMode
from expertd.engine.checks import check_logits, topk_check_on
from expertd.engine.flight import Flight
from expertd.engine.resident import Resident
from expertd.engine.routers import router_on
from expertd.engine.staging import TORCH_DTYPES, Mark, Staging
from expertd.engine.ticket import Ticket
from expertd.weights.dequant import e8m0_to_float


def launch(staging: Staging, backend: Backend, tickets: Sequence[Ticket]) -> Flight:
    """Starts calls of one key in one launch; on a card nothing here waits for it."""
    resident, form = tickets[0].resident, tickets[0].form
    flight = Flight(staging, backend, tickets)
    staging.mark(Mark.BEGIN)
    batch, codes_T = _stage_in(staging, tickets, form, resident)
    batch = _route(batch, resident, backend)
    staging.mark(Mark.ROUTED)
    backend.forward(batch)
    staging.mark(Mark.COMPUTED)
    resident.expert_rows.note(resident.spec, batch, resident.bias)
    flight.leave(batch.out, codes_T, staging.count_nonfinite(batch.out))
    staging.mark(Mark.OUT)
    return flight


def _stage_in(
    staging: Staging, tickets: Sequence[Ticket], form: CallForm, resident: Resident
) -> tuple[Batch, Tensor | None]:
    """The batch, with the fault codes of its rows if it routes."""
    rows, scales = staging.stage("rows", tickets), staging.stage("scales", tickets)
    assert rows is not None
    routed = resident.spec.num_experts > 0
    logits = staging.stage("logits", tickets) if routed else None
    ids = staging.stage("ids", tickets) if routed else None
    weights = staging.stage("weights", tickets) if routed else None
    staging.staged()
    out = staging.output(rows.shape, TORCH_DTYPES[form.reply_dtype])
    if form.rows_format:
        rows, scales = _fp8_rows(rows, scales)
    if logits is not None:
        assert resident.spec.routing is not None
        logits, codes = check_logits(logits, resident.spec.routing.top_k)
        return Batch(rows, out, scales, logits=logits), codes
    if ids is None:
        return Batch(rows, out, scales), None
    assert weights is not None
    weights = weights.to(torch.float32)
    check = topk_check_on(ids.device.type)
    ids, codes = check(ids, weights, resident.spec, form.partial)
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
