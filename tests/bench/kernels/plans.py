"""The plans that can run a layer here, ready to be timed."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from tests.bench.kernels.shapes import Shape
from tests.bench.kernels.weights import first_rows

from expertd.backends.base import Backend, Batch
from expertd.backends.build import build
from expertd.capability.device import DeviceInfo
from expertd.capability.plan import plan
from expertd.capability.row import Row
from expertd.capability.rows import BACKENDS
from expertd.capability.rows.reference import ROWS as REFERENCE
from expertd.core import CallForm, PlanMode, RoutingForm
from expertd.proof.run import relative_error
from expertd.weights.canonical import ExpertWeights

ROWS_COMPARED = 32
"""How many rows the reference computes: it dequantises every expert that they activate."""


def usable_rows(shape: Shape, device: DeviceInfo, backends: Sequence[str]) -> list[Row]:
    """The routed rows that take the layer's calls here, proven or not."""
    form = CallForm(
        RoutingForm.TOPK,
        "bfloat16",
        ids_dtype="int32",
        weights_dtype="float32",
        top_k=shape.top_k,
        reply_dtype="bfloat16",
    )
    asked = backends or BACKENDS
    usable = plan(shape.spec, form, device, trust_declared=True).usable
    return [p.row for p in usable if p.mode is PlanMode.ROUTED and p.backend in asked]


def ready(
    row: Row, shape: Shape, weights: ExpertWeights, tokens: Sequence[int], device: torch.device
) -> Backend:
    """The row's backend, tuned for these batch sizes; raises with what its check refused."""
    module, _, name = row.load.partition(":")
    backend: Backend = getattr(importlib.import_module(module), name)(row, shape.spec, device)
    if refusals := backend.check():
        raise RuntimeError("; ".join(refusal.text for refusal in refusals))
    backend.prepare_weights(weights, None)
    backend.warm_up(tokens)
    return backend


def error_of(backend: Backend, reference: Backend, batch: Batch) -> float:
    """The relative error of a batch whose output is poisoned first."""
    found = replace(batch, out=torch.full_like(batch.out, torch.nan))
    backend.forward(found)
    expected = first_rows(batch, ROWS_COMPARED)
    reference.forward(expected)
    error = relative_error(found.out[:ROWS_COMPARED], expected.out)
    return error if bool(found.out.isfinite().all()) else float("nan")


def reference_of(shape: Shape, weights: ExpertWeights, device: torch.device) -> Backend:
    return build(REFERENCE[0], shape.spec, weights, None, device)


def label(row: Row) -> str:
    """A plan's name in the tables."""
    return f"{row.backend} {row.activation_quant}"


def named(shapes: Sequence[Shape], names: Sequence[str]) -> Iterator[Shape]:
    """The shapes of these names (all, if none is named), in any case and by any part."""
    for shape in shapes:
        if not names or any(name.lower() in shape.name.lower() for name in names):
            yield shape
