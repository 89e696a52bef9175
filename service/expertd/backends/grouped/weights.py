"""Weights in the order that oneDNN's GEMM wants: made once at a load instead of at each call.

The packed matrices take the place of the canonical ones expert by expert, so that a load never has
two copies of a layer; who needs the canonical order gets it back, bit for bit, one expert at a
time. A machine or a layer for which that does not hold keeps the canonical order.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from expertd.core import QuantScheme
from expertd.weights.canonical import ExpertWeights

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Reordered:
    """Each expert's matrices as oneDNN's own tensors, which only it can read."""

    w13: tuple[Tensor, ...]
    w2: tuple[Tensor, ...]

    def first(self, expert: int) -> Tensor:
        return self.w13[expert].to_dense()

    def second(self, expert: int) -> Tensor:
        return self.w2[expert].to_dense()


def packed(weights: ExpertWeights, layer: str) -> ExpertWeights:
    """The same weights in oneDNN's order, or as they are where the log says why of this layer.

    Uses up the memory of w13 and w2 as it goes: nobody may read them through `weights` any more.
    """
    if weights.quant is not QuantScheme.BF16 or weights.device.type != "cpu":
        return weights
    if why := _refusal(weights):
        log.warning("layer %s stays in canonical order, CPU calls are slower: %s", layer, why)
        return weights
    reordered = Reordered(_reordered(weights.w13), _reordered(weights.w2))
    return replace(weights, w13=weights.w13.to("meta"), w2=weights.w2.to("meta"), packed=reordered)


def linear(rows: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
    """rows [N, K] times a reordered matrix [M, K], plus bias [M] → [N, M]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, matrix, bias, "none", [], "")
    return product


def _refusal(weights: ExpertWeights) -> str:
    """Why these matrices cannot be packed here; "" if they can."""
    if not _supported():
        return "this torch or this processor has no oneDNN GEMM for bfloat16"
    for name, matrix in (("w13", weights.w13[0]), ("w2", weights.w2[0])):
        reordered = _reorder(matrix)
        if torch.ops.mkldnn._nbytes(reordered) > matrix.nbytes:
            return f"{name} {list(matrix.shape)} would be padded"
        if not torch.equal(_bits(reordered.to_dense()), _bits(matrix)):
            return f"{name} {list(matrix.shape)} does not come back from oneDNN's order"
    return ""


def _supported() -> bool:
    built: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return built and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _bits(matrix: Tensor) -> Tensor:
    return matrix.view(torch.int16)


def _reorder(matrix: Tensor) -> Tensor:
    reordered: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix)
    return reordered


def _reordered(matrices: Tensor) -> tuple[Tensor, ...]:
    """Every matrix of [L, N, K], whose memory is given back as soon as it has been read."""
    made = []
    for matrix in matrices:
        made.append(_reorder(matrix))
        _give_back(matrix)
    return tuple(made)


def _give_back(matrix: Tensor) -> None:
    """Gives the system the pages that lie in a matrix; what is left of it is not to be read."""
    page = mmap.PAGESIZE
    begin = -(-matrix.data_ptr() // page) * page
    size = (matrix.data_ptr() + matrix.nbytes) // page * page - begin
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and size > 0:
        # Where it is refused (locked memory), the pages stay until the whole tensor goes.
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
