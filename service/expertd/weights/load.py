"""A layer's experts from disk into canonical tensors on a device, expert by expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from expertd.core import LayerSpec
from expertd.errors import FailedPrecondition
from expertd.weights.canonical import ExpertWeights
from expertd.weights.checkpoint import Checkpoint
from expertd.weights.convert import to_matrix
from expertd.weights.layers import Model
from expertd.weights.matrix import Matrix, allocate, place
from expertd.weights.source import Source, Stored, locate
from expertd.weights.storage import STORAGE


def load_layer(
    checkpoint: Checkpoint, layer: int, spec: LayerSpec, device: torch.device | str
) -> tuple[ExpertWeights, Tensor | None]:
    """The layer's experts held, and its correction bias float32 [E] when its router has one.

    At most one expert is in memory beside the layer itself. Raises FailedPrecondition naming
    file, tensor and expectation for anything in the checkpoint that is not as it should be.
    """
    model = Model.of(checkpoint)
    source = locate(model, layer, spec)
    weights = allocate(spec, device)
    for slot, (first, second) in enumerate(source.experts):
        up_gate = [half for stored in first for half in _halves(source, stored)]
        down = _parts(source, second)
        _place(source, weights, slot, up_gate, down)
    return weights, correction_bias(model, layer, spec, device)


def correction_bias(
    model: Model, layer: int, spec: LayerSpec, device: torch.device | str
) -> Tensor | None:
    """The bias [E] that the layer's selection adds; raises FailedPrecondition if it is missing."""
    if spec.routing is None or not spec.routing.bias:
        return None
    checkpoint, prefix = model.checkpoint, model.prefix(layer)
    names = [prefix + name for name in model.family.correction_bias]
    name = next((n for n in names if n in checkpoint.tensors), names[0])
    bias = checkpoint.read(name).float().reshape(-1)
    if bias.shape != (spec.num_experts,) or not bias.isfinite().all():
        raise FailedPrecondition(
            f"{checkpoint.entry(name).file.path}: tensor {name!r} is "
            f"{list(checkpoint.entry(name).shape)}; {spec.num_experts} finite numbers are needed"
        )
    return bias.to(device)


Raw = Mapping[str, Tensor]


def _parts(source: Source, stored: Stored) -> dict[str, Tensor]:
    """The stored parts of a matrix, [out, in] each."""
    parts = {part: _read(source, name, stored.row) for part, name in stored.tensors.items()}
    for part, tensor in parts.items():
        if part != "weight" and not _finite(tensor):
            name = stored.tensors[part]
            file = source.checkpoint.entry(name).file.path
            raise FailedPrecondition(f"{file}: tensor {name!r} has NaN or infinite values")
    return parts


def _finite(tensor: Tensor) -> bool:
    """Whether every number is finite; in e8m0 bits 255 is NaN."""
    return bool(
        (tensor != 255).all() if tensor.dtype == torch.uint8 else tensor.float().isfinite().all()
    )


def _read(source: Source, name: str, row: int | None) -> Tensor:
    if row is None:
        tensor = source.checkpoint.read(name)
    else:
        tensor = source.checkpoint.read(name, row, row + 1)[0]
    return tensor.T if source.layout.transposed and tensor.ndim == 2 else tensor


def _halves(source: Source, stored: Stored) -> list[dict[str, Tensor]]:
    """The up and the gate half of a fused matrix; an unfused one as it is."""
    parts = _parts(source, stored)
    if source.layout.fused == "no":
        return [parts]
    split = {name: _split(source, stored, name, tensor) for name, tensor in parts.items()}
    return [{name: halves[side] for name, halves in split.items()} for side in (0, 1)]


def _split(source: Source, stored: Stored, part: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(up, gate) of one part of a fused matrix; raises FailedPrecondition where it has no seam."""
    if tensor.numel() == 1:
        return tensor, tensor
    if source.layout.fused == "interleaved":
        return tensor[1::2], tensor[::2]
    if part in source.format.parts:
        shape = source.format.parts[part].shape
        if shape(stored.n, stored.k)[0] != 2 * shape(stored.n // 2, stored.k)[0]:
            raise FailedPrecondition(
                f"{source.checkpoint.root}: tensor {stored.tensors[part]!r} has a scale that "
                "belongs to both gate and up; store them apart"
            )
    gate, up = tensor.chunk(2)
    return up, gate


def _place(
    source: Source, weights: ExpertWeights, slot: int, up_gate: Sequence[Raw], down: Raw
) -> None:
    device = weights.device
    width, hidden = weights.w2.shape[2] * STORAGE[weights.quant].packed, weights.w2.shape[1]
    halves = [_matrix(source, width, hidden, parts, device) for parts in up_gate]
    place(weights, slot, halves, _matrix(source, hidden, width, down, device))
    if weights.bias13 is not None and weights.bias2 is not None:
        weights.bias13[slot] = torch.cat([parts["bias"].float() for parts in up_gate])
        weights.bias2[slot] = down["bias"].float()


def _matrix(source: Source, n: int, k: int, parts: Raw, device: torch.device) -> Matrix:
    return to_matrix(source.format, n, k, {name: t.to(device) for name, t in parts.items()})
