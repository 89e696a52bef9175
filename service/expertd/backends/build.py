"""From a row of the table to a backend that is ready to run."""

from __future__ import annotations

import importlib
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.backends.base import Backend
from expertd.capability.device import DeviceInfo
from expertd.capability.row import Row
from expertd.core import LayerSpec
from expertd.errors import NoUsablePlan
from expertd.weights.canonical import ExpertWeights
from expertd_wire.errors import Refusal


def torch_device(device: DeviceInfo) -> torch.device:
    """Where the tensors of a device lie."""
    return torch.device("cpu") if device.kind == "cpu" else torch.device("cuda", device.index or 0)


def work_on(device: torch.device) -> None:
    """Makes it the calling thread's own device: Triton and FlashInfer launch on no other."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def build(
    row: Row,
    spec: LayerSpec,
    weights: ExpertWeights | None,
    bias: Tensor | None,
    device: torch.device,
    buckets: Sequence[int] = (1,),
) -> Backend:
    """The row's backend for a layer, warmed up for batches of these sizes.

    Raises NoUsablePlan with what its check refused.
    """
    backend = _made(row, spec, device)
    if refusals := backend.check():
        texts = "; ".join(refusal.text for refusal in refusals)
        raise NoUsablePlan(f"{row.entry} cannot run here: {texts}", refusals)
    backend.prepare_weights(weights, bias)
    backend.warm_up(buckets)
    return backend


def absent(row: Row, spec: LayerSpec, device: torch.device) -> tuple[Refusal, ...]:
    """What the row's backend lacks on this machine for now."""
    return _made(row, spec, device).check()


def _made(row: Row, spec: LayerSpec, device: torch.device) -> Backend:
    module, _, name = row.load.partition(":")
    backend: Backend = getattr(importlib.import_module(module), name)(row, spec, device)
    return backend
