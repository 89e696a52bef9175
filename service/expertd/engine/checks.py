"""Checks of values, on the device, without synchronisation: each row gets a fault code.

A faulty row is made harmless (its ids become -1, its logits 0) so that the batch it shares goes on;
the call it belongs to is refused when the codes come back.
"""

from __future__ import annotations

import importlib
import math
from typing import Protocol

import torch
from torch import Tensor

from expertd.core import LayerSpec
from expertd.errors import ExpertdError, ExpertsNotHeld, InvalidArgument
from expertd.routing.reference import logits_ok

OK, BAD_LOGITS, OUT_OF_RANGE, DUPLICATE, BAD_WEIGHT, NOT_HELD = range(6)

CHECKS = {
    "cpu": "expertd.engine.checks_cpu:HostChecks",
    "cuda": "expertd.engine.checks_cuda:CardChecks",
}
CHECKED_LOGITS = (torch.float32, torch.bfloat16, torch.float16)


class RowChecks(Protocol):
    """What is found out about the rows of one batch at a time, told when the batch is out."""

    def begin(self) -> None:
        """Forgets the batch before."""

    def topk(self, ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool) -> Tensor:
        """Harmless ids [T, K] int32 that are nobody else's; weights are float32."""

    def logits(self, logits_TE: Tensor, top_k: int) -> Tensor:
        """Harmless logits that are nobody else's."""

    def output(self, out_TH: Tensor) -> None:
        """Looks for rows of a result that are not finite."""

    def codes(self) -> memoryview | None:
        """A byte a row that topk() or logits() saw: its fault code; None if all are OK."""

    def nonfinite(self) -> int:
        """How many rows of the result hold NaN or infinity."""


def checks_on(device_type: str) -> RowChecks:
    """The checks of one batch at a time on devices of this type."""
    module, _, name = CHECKS[device_type].partition(":")
    made: RowChecks = getattr(importlib.import_module(module), name)()
    return made


def warm_up_checks(spec: LayerSpec, device: torch.device) -> None:
    """Compiles the checks for every dtype there is, so that no request has to."""
    checks = checks_on(device.type)
    for dtype in CHECKED_LOGITS:
        checks.output(torch.zeros(1, spec.hidden, dtype=dtype, device=device))
        if spec.routing is not None:
            logits = torch.zeros(1, spec.num_experts, dtype=dtype, device=device)
            checks.logits(logits, spec.routing.top_k)
    if not spec.num_experts:
        return
    weights = torch.zeros(1, 1, device=device)
    for dtype in (torch.int32, torch.int64):
        ids = torch.zeros(1, 1, dtype=dtype, device=device)
        for partial in (False, True):
            checks.topk(ids, weights, spec, partial)


def check_logits(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Harmless logits, and the fault code [T] uint8 of each row."""
    good = logits_ok(logits_TE, top_k)
    harmless = torch.where(good.unsqueeze(1), logits_TE, torch.zeros_like(logits_TE))
    return harmless, _code(~good, BAD_LOGITS)


def check_topk(
    ids_TK: Tensor, weights_TK: Tensor, spec: LayerSpec, partial: bool
) -> tuple[Tensor, Tensor]:
    """Harmless ids [T, K] int32, and the fault code [T] uint8 of each row."""
    none = ids_TK == -1
    outside = (~none & ((ids_TK < 0) | (ids_TK >= spec.num_experts))).any(dim=1)
    ordered = ids_TK.sort(dim=1).values
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != -1)).any(dim=1)
    bad_weight = (~none & ~torch.isfinite(weights_TK)).any(dim=1)
    codes = _code(outside, OUT_OF_RANGE)
    for fault, code in ((twice, DUPLICATE), (bad_weight, BAD_WEIGHT)):
        codes = torch.where(codes == OK, _code(fault, code), codes)
    if not (spec.complete or partial):
        held = (ids_TK >= spec.expert_begin) & (ids_TK < spec.expert_end)
        codes = torch.where(codes == OK, _code((~none & ~held).any(dim=1), NOT_HELD), codes)
    faulty = (codes != OK).unsqueeze(1)
    return ids_TK.masked_fill(faulty, -1).to(torch.int32), codes


def _code(fault_T: Tensor, code: int) -> Tensor:
    return fault_T.to(torch.uint8) * code


def nonfinite_rows(out_TH: Tensor) -> int:
    """How many rows hold NaN or infinity.

    A sum is finite only if all it adds is, and costs a tenth of asking each number; one that
    overflows is looked at closely.
    """
    if math.isfinite(out_TH.sum()):
        return 0
    suspects = out_TH[~torch.isfinite(out_TH.sum(dim=1))]
    return int((~torch.isfinite(suspects)).any(dim=1).sum())


def fault_error(code: int, row: int, spec: LayerSpec) -> ExpertdError:
    """The error of a call whose row (counted within the call) has this fault code."""
    held = f"{spec.expert_begin}-{spec.expert_end - 1}"
    top_k = spec.routing.top_k if spec.routing else 0
    texts = {
        BAD_LOGITS: f"router_logits: row {row} has NaN or +inf, or fewer than {top_k} finite "
        "values (-inf masks an expert)",
        OUT_OF_RANGE: f"topk_ids: row {row} has an id outside 0..{spec.num_experts - 1} "
        "(-1 means no expert)",
        DUPLICATE: f"topk_ids: row {row} names an expert twice; add its weights into one entry",
        BAD_WEIGHT: f"topk_weights: row {row} has a weight that is not finite",
        NOT_HELD: f"topk_ids: row {row} needs experts outside {held}, which are held here; "
        "set partial to leave them out, or ask their holder",
    }
    error = ExpertsNotHeld if code == NOT_HELD else InvalidArgument
    return error(texts[code])
