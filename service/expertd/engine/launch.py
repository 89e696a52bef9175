"""One batch from staged bytes to the device: stage in, check, route, compute, begin to copy out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.backends.base import Backend, Batch
from expertd.core import CallForm, PlanMode
from expertd.engine.flight import Flight
from expertd.engine.plain_checks import plainly_good
from expertd.engine.resident import Resident
from expertd.engine.routers import router_on
from expertd.engine.staging import TORCH_DTYPES, Mark, Staging
from expertd.engine.ticket import Ticket
from expertd.weights.dequant import e8m0_to_float
from expertd_wire.tensors import WireTensor

ROWS = ("hidden_states", "hidden_states_scale")
ROUTED_ROWS = (*ROWS, "router_logits", "topk_ids", "topk_weights")
"""What of a call goes onto the device; layers without experts ignore its routing."""


def launch(staging: Staging, backend: Backend, tickets: Sequence[Ticket]) -> Flight:
    """Starts calls of one key in one launch; on a card nothing here waits for it."""
    resident, form = tickets[0].resident, tickets[0].form
    flight = Flight(staging, backend, tickets)
    fields = _fields(tickets, ROUTED_ROWS if resident.spec.num_experts else ROWS)
    batch = _route(_batch(staging, fields, form, resident), resident, backend)
    staging.mark(Mark.ROUTED)
    backend.forward(batch)
    staging.check(batch.out)
    staging.mark(Mark.COMPUTED)
    resident.expert_rows.note(resident.spec, batch, resident.bias)
    flight.leave(batch)
    return flight


def _fields(tickets: Sequence[Ticket], names: Sequence[str]) -> dict[str, list[WireTensor]]:
    """Each field that the calls have: calls of one form have the same."""
    first = tickets[0].call
    present = [name for name in names if getattr(first, name) is not None]
    return {name: [getattr(ticket.call, name) for ticket in tickets] for name in present}


def _batch(
    staging: Staging, fields: dict[str, list[WireTensor]], form: CallForm, resident: Resident
) -> Batch:
    """The batch, checked if it routes; calls of rows that are faulty are refused when it is out."""
    staged, spec, checks = staging.stage(fields), resident.spec, staging.checks
    rows, scales = staged["hidden_states"], staged.get("hidden_states_scale")
    tokens, hidden = rows.shape
    out = staging.output(tokens, hidden, TORCH_DTYPES[form.reply_dtype])
    if form.rows_format:
        rows, scales = _fp8_rows(rows, scales)
    checks.begin()
    if (logits := staged.get("router_logits")) is not None:
        assert spec.routing is not None
        return Batch(rows, out, scales, logits=checks.logits(logits, spec.routing.top_k))
    if (ids := staged.get("topk_ids")) is None:
        return Batch(rows, out, scales)
    weights = staged["topk_weights"]
    if weights.dtype is not torch.float32:
        weights = weights.to(torch.float32)
    if plainly_good(fields["topk_ids"], fields["topk_weights"], spec, form.partial):
        # The next batch is staged in the same memory, and these are counted some time later.
        ids = ids.clone() if ids.dtype is torch.int32 else ids.to(torch.int32)
    else:
        ids = checks.topk(ids, weights, spec, form.partial)
    return Batch(rows, out, scales, ids, weights)


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
