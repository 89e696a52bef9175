"""Checks of values, on the device, without synchronisation: each row gets a fault code.

A faulty row is made harmless (its ids become -1, its logits 0) so that the batch it shares goes on;
the call it belongs to is refused when the codes come back.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from expertd.core import LayerSpec
from expertd.errors import ExpertdError, ExpertsNotHeld, InvalidArgument
from expertd.routing.reference import logits_ok

OK, BAD_LOGITS, OUT_OF_RANGE, DUPLICATE, BAD_WEIGHT, NOT_HELD = range(6)

Check = Callable[[Tensor, Tensor, LayerSpec, bool], tuple[Tensor, Tensor]]

TOPK_CHECKS = {
    "cpu": "expertd.engine.checks:check_topk",
    "cuda": "expertd.engine.checks_cuda:check_topk",
}


@cache
def topk_check_on(device_type: str) -> Check:
    """What checks ids and weights on devices of this type."""
    module, _, name = TOPK_CHECKS[device_type].partition(":")
    check: Check = getattr(importlib.import_module(module), name)
    return check


def warm_up_checks(spec: LayerSpec, device: torch.device) -> None:
    """Compiles the check for every dtype of ids, held or partial, so that no request has to."""
    if not spec.num_experts:
        return
    weights = torch.zeros(1, 1, device=device)
    for dtype in (torch.int32, torch.int64):
        for partial in (False, True):
            ids = torch.zeros(1, 1, dtype=dtype, device=device)
            topk_check_on(device.type)(ids, weights, spec, partial)


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
