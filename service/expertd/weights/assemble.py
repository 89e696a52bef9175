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
        # One tensor for all flags: small ones kept between large ones would tear the heap apart.
        self._checked: list[str] = []
        self._finite = torch.ones(_scales_of(source), dtype=torch.bool, device=weights.device)

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
        for name, finite in zip(self._checked, self._finite.tolist(), strict=True):
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
                torch.all(_finite(tensor), out=self._finite[len(self._checked)])
                self._checked.append(name)
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


def _scales_of(source: Source) -> int:
    """How many tensors beside the weights themselves there are."""
    matrices = [stored for expert in source.experts for stored in (*expert.first, expert.second)]
    return sum(part != "weight" for stored in matrices for part in stored.tensors)


def _finite(scale: Tensor) -> Tensor:
    """Which values are finite: e8m0 has one NaN, e4m3 one of each sign, no infinity."""
    if scale.dtype == torch.uint8:
        return scale != 255
    if scale.dtype == torch.float8_e4m3fn:
        return (scale.view(torch.uint8) & 0x7F) != 0x7F
    return scale.isfinite()
