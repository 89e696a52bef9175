"""An expert's stored tensors → its slot in the canonical tensors of a layer."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from expertd.errors import FailedPrecondition
from expertd.weights.canonical import ExpertWeights
from expertd.weights.convert import to_matrix
from expertd.weights.matrix import place
from expertd.weights.reader import Staged
from expertd.weights.source import Expert, Source, Stored

Parts = Mapping[str, Tensor]


class Assembler:
    """Fills a layer expert by expert; on a GPU everything but the last check is only queued."""

    def __init__(self, source: Source, weights: ExpertWeights) -> None:
        self._source = source
        self._weights = weights
        self._finite: list[tuple[str, Tensor]] = []

    def add(self, slot: int, expert: Expert, staged: Staged) -> None:
        """Convert an expert on the layer's device and put it into its slot."""
        first = [half for s in expert.first for half in self._halves(self._parts(s, staged))]
        second = self._parts(expert.second, staged)
        format_, down = self._source.format, expert.second
        up_gate = [to_matrix(format_, down.k, down.n, parts) for parts in first]
        place(self._weights, slot, up_gate, to_matrix(format_, down.n, down.k, second))
        self._extras(slot, first, second)

    def check(self) -> None:
        """Raises FailedPrecondition naming the first tensor with a scale that is not finite."""
        if not self._finite:
            return
        flags = torch.stack([flag for _, flag in self._finite]).tolist()
        for (name, _), finite in zip(self._finite, flags, strict=True):
            if not finite:
                file = self._source.checkpoint.entry(name).file.path
                raise FailedPrecondition(f"{file}: tensor {name!r} has NaN or infinite values")

    def _parts(self, stored: Stored, staged: Staged) -> dict[str, Tensor]:
        """The stored parts of a matrix on the device, [out, in] each; reciprocals turned over."""
        parts = {}
        for part, name in stored.tensors.items():
            tensor = staged[name].to(self._weights.device, non_blocking=True)
            if self._source.layout.transposed and tensor.ndim == 2:
                tensor = tensor.T
            if part in self._source.format.reciprocal:
                tensor = 1 / tensor
            if part != "weight":
                self._finite.append((name, _all_finite(tensor)))
            parts[part] = tensor
        return parts

    def _halves(self, parts: Parts) -> list[Parts]:
        """The up and the gate half of a fused matrix; an unfused one as it is."""
        fused = self._source.layout.fused
        if fused == "no":
            return [parts]
        split = _interleaved if fused == "interleaved" else _in_halves
        both = {part: split(tensor) for part, tensor in parts.items()}
        return [{part: halves[side] for part, halves in both.items()} for side in (0, 1)]

    def _extras(self, slot: int, first: list[Parts], second: Parts) -> None:
        """Biases, and the larger activation scale where gate and up have one each."""
        weights = self._weights
        if weights.bias13 is not None and weights.bias2 is not None:
            weights.bias13[slot] = torch.cat([parts["bias"].float() for parts in first])
            weights.bias2[slot] = second["bias"].float()
        if weights.input13 is not None and weights.input2 is not None:
            scales = torch.stack([parts["input"].float().reshape(()) for parts in first])
            weights.input13[slot] = scales.amax()
            weights.input2[slot] = second["input"].float().reshape(())


def _in_halves(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(up, gate) of rows that hold gate first; one value serves both."""
    if tensor.numel() == 1:
        return tensor, tensor
    gate, up = tensor.chunk(2)
    return up, gate


def _interleaved(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """(up, gate) of rows in turns, gate first."""
    return (tensor, tensor) if tensor.numel() == 1 else (tensor[1::2], tensor[::2])


def _all_finite(scale: Tensor) -> Tensor:
    """Whether every value is finite: e8m0 has one NaN, e4m3 one of each sign, no infinity."""
    if scale.dtype == torch.uint8:
        return (scale != 255).all()
    if scale.dtype == torch.float8_e4m3fn:
        return ((scale.view(torch.uint8) & 0x7F) != 0x7F).all()
    return scale.isfinite().all()
