"""One stored matrix of an expert, and how matrices lie in ExpertWeights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.core import LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.storage import FIELDS, STORAGE, layer_parts


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix [N, K] as storage.py says its scheme stores it."""

    quant: QuantScheme
    codes: Tensor
    scale: Tensor | None = None
    global_scale: Tensor | None = None

    @property
    def columns(self) -> int:
        """K, whatever the packing."""
        return self.codes.shape[1] * STORAGE[self.quant].packed

    @property
    def parts(self) -> dict[str, Tensor]:
        """The parts that are present, by name."""
        named = ((part, getattr(self, part)) for part in FIELDS)
        return {part: tensor for part, tensor in named if tensor is not None}


def allocate(
    spec: LayerSpec, device: torch.device | str, *, static_inputs: bool = False
) -> ExpertWeights:
    """Uninitialised canonical tensors for a layer."""
    parts = layer_parts(spec)
    if static_inputs:
        parts |= dict.fromkeys(("input13", "input2"), ("float32", (spec.held,)))
    tensors = {
        field: torch.empty(shape, dtype=getattr(torch, dtype), device=device)
        for field, (dtype, shape) in parts.items()
    }
    return ExpertWeights.of(spec.quant, tensors)


def halves_of(weights: ExpertWeights) -> int:
    """P: 2 when the first matrix has an up and a gate half, else 1."""
    packed = STORAGE[weights.quant].packed
    return weights.w13.shape[1] // (weights.w2.shape[2] * packed)


def first_matrices(weights: ExpertWeights, expert: int) -> list[Matrix]:
    """The up and the gate half of expert's first matrix (up alone when not gated), as views."""
    count = halves_of(weights)
    chunks = {
        part: getattr(weights, field)[expert].chunk(count)
        for part, (field, _) in FIELDS.items()
        if getattr(weights, field) is not None
    }
    return [
        Matrix(weights.quant, **{part: chunk[half] for part, chunk in chunks.items()})
        for half in range(count)
    ]


def second_matrix(weights: ExpertWeights, expert: int) -> Matrix:
    """Expert's second matrix, as views."""
    parts = {part: getattr(weights, field) for part, (_, field) in FIELDS.items()}
    held = {part: tensor[expert] for part, tensor in parts.items() if tensor is not None}
    return Matrix(weights.quant, **held)


def place(weights: ExpertWeights, expert: int, up_gate: Sequence[Matrix], down: Matrix) -> None:
    """Copy an expert's matrices into its slot."""
    for target, source in zip(first_matrices(weights, expert), up_gate, strict=True):
        _copy(target, source)
    _copy(second_matrix(weights, expert), down)


def _copy(target: Matrix, source: Matrix) -> None:
    for part, tensor in target.parts.items():
        tensor.copy_(source.parts[part], non_blocking=True)


def stack(experts: Sequence[tuple[Sequence[Matrix], Matrix]]) -> ExpertWeights:
    """Experts' matrices ([up, gate], down) as one ExpertWeights."""
    tensors: dict[str, Tensor] = {}
    for part, (field13, field2) in FIELDS.items():
        if part in experts[0][1].parts:
            first = [torch.cat([half.parts[part] for half in halves]) for halves, _ in experts]
            tensors[field13] = torch.stack(first)
            tensors[field2] = torch.stack([down.parts[part] for _, down in experts])
    return ExpertWeights.of(experts[0][1].quant, tensors)
