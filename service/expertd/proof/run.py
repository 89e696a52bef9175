"""Proves a cell on this device: its kernel against the fp32 reference, on every case it takes."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from expertd.backends.base import Batch
from expertd.backends.build import build, torch_device
from expertd.capability.device import DeviceInfo
from expertd.capability.match import refusals
from expertd.capability.row import Cell, Row, State
from expertd.capability.rows.reference import ROWS as REFERENCE_ROWS
from expertd.core import CallForm, LayerSpec, PlanMode, QuantScheme, RoutingForm
from expertd.errors import NoUsablePlan
from expertd.proof.cases import CASES, Case, layers
from expertd.proof.rows import as_read
from expertd.routing.reference import route_for
from expertd.weights.canonical import ExpertWeights
from expertd.weights.quantize import quantize

(REFERENCE,) = REFERENCE_ROWS

TOLERANCES: dict[str, float] = {
    "fp32": 1e-5,
    "bf16": 1e-2,
    "fp16": 1e-2,
    "fp8": 8e-2,
    "fp8_tensor": 8e-2,
    "fp8_token": 8e-2,
    "fp8_group128": 8e-2,
    "mxfp8": 8e-2,
    "nvfp4": 3e-1,
}
"""Relative norm of the error by the format in which the rows enter the GEMMs: e4m3 keeps 3 bits of
mantissa and e2m1 one, so the rounding of rows alone is that large."""

AS_READ: dict[str, float] = {"nvfp4": 0.12}
"""The same against a reference that gets the rows as the kernel reads them (rows.py). What is left
is the rounding of the inner rows: e2m1 in groups of 16 loses 9 % of the norm of normal numbers."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One case on one layer: the error measured, or the fault that kept it from running."""

    case: str
    layer: str
    error: float
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Proof:
    """What is known of a cell after its trials; without any, or all of them, it is not proven.

    absent: why there were none, if kernels have to be built or fetched first.
    """

    cell: Cell
    tolerance: float
    trials: tuple[Trial, ...]
    whole: bool = True
    absent: tuple[str, ...] = ()

    @property
    def state(self) -> State:
        if self.failures:
            return State.FAILED
        return State.PROVEN if self.trials and self.whole else State.PRESENT

    @property
    def failures(self) -> tuple[Trial, ...]:
        # "not <=" so that NaN fails.
        return tuple(t for t in self.trials if t.fault or not t.error <= self.tolerance)

    @property
    def worst(self) -> float:
        """The largest error of the trials that ran; NaN counts as the largest."""
        errors = [trial.error for trial in self.trials if not trial.fault]
        return max(errors, key=lambda error: (error != error, error), default=float("nan"))


def prove(row: Row, quant: QuantScheme, device: DeviceInfo, seed: int = 0) -> Proof:
    """Runs every case that the row accepts."""
    tolerances = TOLERANCES | AS_READ
    cell, tolerance = row.cell(quant), tolerances[row.activation_quant]
    try:
        return Proof(cell, tolerance, tuple(_trials(row, quant, device, seed)))
    except NoUsablePlan as refused:
        # Nothing failed: the next run may find the kernels.
        return Proof(cell, tolerance, (), absent=tuple(r.text for r in refused.refusals))


def _trials(row: Row, quant: QuantScheme, device: DeviceInfo, seed: int) -> Iterator[Trial]:
    for case in CASES:
        for name, spec in layers(row, quant, case):
            form = _form(row, spec)
            if not refusals(replace(row, auto=True), spec, form, device):
                yield _trial(row, case, name, spec, device, seed)


def _form(row: Row, spec: LayerSpec) -> CallForm:
    return CallForm(
        routing=RoutingForm.LOGITS,
        rows_dtype="bfloat16",
        logits_dtype="float32" if "float32" in row.logits else row.logits[0],
        partial=not spec.complete,
        backend=row.backend,
        reply_dtype="bfloat16",
    )


def _trial(
    row: Row, case: Case, name: str, spec: LayerSpec, device: DeviceInfo, seed: int
) -> Trial:
    random = torch.Generator().manual_seed(seed + zlib.crc32(f"{case.name}/{name}".encode()))
    target = torch_device(device)
    weights = _weights_of(replace(spec, routing=None), seed, target)
    bias = torch.randn(spec.num_experts, generator=random) * case.bias_size
    wanted = spec.routing is not None and spec.routing.bias
    batch = _batch(row, case, spec, bias if wanted else None, random, target)
    try:
        backend = build(row, spec, weights, bias.to(target) if wanted else None, target)
        backend.forward(batch)
    except NoUsablePlan:
        raise
    except Exception as error:  # whatever a kernel raises is the finding of this trial
        return Trial(case.name, name, float("nan"), f"{type(error).__name__}: {error}"[:300])
    read = as_read(batch.rows, row.activation_quant, weights)
    expected = _reference(spec, weights, replace(batch, rows=read))
    return Trial(case.name, name, relative_error(batch.out, expected))


@lru_cache(maxsize=8)
def _weights_of(spec: LayerSpec, seed: int, device: torch.device) -> ExpertWeights:
    """The weights that all cases of a shape share: making them takes longer than using them."""
    return random_weights(spec, torch.Generator().manual_seed(seed), device)


def random_weights(spec: LayerSpec, random: torch.Generator, device: torch.device) -> ExpertWeights:
    """Random experts of a layer in its scheme, scaled so that outputs are of order one."""
    w13 = torch.randn(spec.held, spec.rows13, spec.hidden, generator=random) / spec.hidden**0.5
    w2 = torch.randn(spec.held, spec.hidden, spec.intermediate, generator=random)
    weights = quantize(w13, w2 / spec.intermediate**0.5, spec.quant, gated=spec.activation.gated)
    return ExpertWeights.of(weights.quant, {n: t.to(device) for n, t in weights.tensors.items()})


def _batch(
    row: Row,
    case: Case,
    spec: LayerSpec,
    bias: Tensor | None,
    random: torch.Generator,
    device: torch.device,
) -> Batch:
    """A batch with both routing forms; a row's kernel reads the one it takes."""
    assert spec.routing is not None
    drawn = torch.randn(case.tokens, spec.hidden, generator=random)
    rows = (drawn * case.rows_size).bfloat16()
    logits = case.logits(case.tokens, spec.num_experts, random)
    monolithic = row.mode is PlanMode.MONOLITHIC
    rounding = row.rounding if monolithic else None
    ids, weights = route_for(spec.routing, logits, bias, rounding)
    out = torch.full((case.tokens, spec.hidden), float("nan"), dtype=torch.bfloat16, device=device)
    return Batch(
        rows.to(device),
        out,
        ids=ids.to(device),
        weights=weights.to(device),
        logits=logits.to(device) if monolithic else None,
    )


def _reference(spec: LayerSpec, weights: ExpertWeights, batch: Batch) -> Tensor:
    reference = build(REFERENCE, spec, weights, None, batch.rows.device)
    expected = replace(batch, out=torch.empty_like(batch.out, dtype=torch.float32))
    reference.forward(expected)
    return expected.out


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The larger of the whole result's relative error and a fifth of the worst row's.

    One wrong row among many must not hide; rows that should be 0 count with their absolute norm.
    """
    gap = (found.float() - expected.float()).norm(dim=1)
    size = expected.float().norm(dim=1)
    whole = gap.norm() / size.norm().clamp(min=1e-6)
    rows = gap / torch.where(size > 1e-6, size, torch.ones_like(size))
    worst = torch.stack((whole, rows.max() / 5))
    return float("nan") if bool(worst.isnan().any()) else float(worst.max())
