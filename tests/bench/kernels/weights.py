"""Random canonical weights and batches, made on the device: 11 GB would take minutes on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from tests.bench.kernels.shapes import Shape
from torch import Tensor

from expertd.backends.base import Batch
from expertd.core import LayerSpec, QuantScheme
from expertd.weights.canonical import ExpertWeights
from expertd.weights.matrix import allocate
from expertd.weights.quantize import E4M3_MAX, to_e4m3
from expertd.weights.storage import FIELDS, STORAGE

E4M3_SIZE = 100.0
"""Standard deviation of e4m3 codes: a block's largest of thousands then lies near 448."""

E2M1_SIZE, INT4_SIZE = 2.93, 4.64
"""Root mean square of random nibbles as e2m1 and as signed integers."""

ROWS_SCALE, INNER_SCALE = 6 / E4M3_MAX, 30 / E4M3_MAX
"""Static activation scales that normal rows, and what relu2 makes of them, fit in."""


def random_weights(spec: LayerSpec, device: torch.device) -> ExpertWeights:
    """Experts whose outputs are of order one, with valid bytes in every field."""
    static = spec.quant is QuantScheme.FP8_TENSOR
    weights = allocate(spec, device, static_inputs=static)
    for which, columns in enumerate((spec.hidden, spec.intermediate)):
        fields = {part: getattr(weights, names[which]) for part, names in FIELDS.items()}
        _fill(fields, spec.quant, columns**-0.5)
    for bias in (weights.bias13, weights.bias2):
        if bias is not None:
            bias.normal_(0, 0.1)
    if weights.input13 is not None and weights.input2 is not None:
        weights.input13.fill_(ROWS_SCALE)
        weights.input2.fill_(INNER_SCALE)
    return weights


def _fill(fields: dict[str, Tensor | None], quant: QuantScheme, size: float) -> None:
    """Writes codes and scales of matrices [L, N, K] so that their values have that size."""
    codes, scale, whole = fields["codes"], fields["scale"], fields["global_scale"]
    assert codes is not None
    code_size = _CODES[STORAGE[quant].codes](codes, quant, size)
    if whole is not None:
        whole.fill_(size / code_size)
    if scale is not None:
        _SCALES[scale.dtype](scale, 1.0 if whole is not None else size / code_size)
        if quant is QuantScheme.FP8_TENSOR:
            scale.copy_(scale[:, :1].expand_as(scale).clone())


def _plain(codes: Tensor, quant: QuantScheme, size: float) -> float:
    for expert in codes:
        expert.normal_(0, size)
    return size


def _e4m3(codes: Tensor, quant: QuantScheme, size: float) -> float:
    for expert in codes:
        normal = torch.empty(expert.shape, dtype=torch.float32, device=codes.device)
        expert.copy_(to_e4m3(normal.normal_(0, E4M3_SIZE)))
    return E4M3_SIZE


def _nibbles(codes: Tensor, quant: QuantScheme, size: float) -> float:
    for expert in codes:
        expert.random_(0, 256)
    return INT4_SIZE if quant is QuantScheme.MXINT4 else E2M1_SIZE


def _float_scale(scale: Tensor, size: float) -> None:
    scale.copy_(torch.empty(scale.shape, device=scale.device).uniform_(0.7 * size, 1.4 * size))


def _e8m0_scale(scale: Tensor, size: float) -> None:
    exponent = round(torch.tensor(size).log2().item()) + 127
    scale.random_(exponent - 1, exponent + 2)


_CODES: dict[str, Callable[[Tensor, QuantScheme, float], float]] = {
    "float32": _plain,
    "bfloat16": _plain,
    "float16": _plain,
    "float8_e4m3fn": _e4m3,
    "uint8": _nibbles,
}
_SCALES: dict[torch.dtype, Callable[[Tensor, float], None]] = {
    torch.float32: _float_scale,
    torch.bfloat16: _float_scale,
    torch.float8_e4m3fn: _float_scale,
    torch.uint8: _e8m0_scale,
}


def random_batches(shape: Shape, tokens: int, count: int, device: torch.device) -> list[Batch]:
    """Batches with uniformly chosen experts; those of one token share none with their neighbours,
    so that no expert is still in the L2 cache when its turn comes again."""
    experts, top_k = shape.spec.num_experts, shape.top_k
    if tokens == 1:
        deck = torch.randperm(experts, device=device)[: experts // top_k * top_k]
        chosen = deck.view(-1, 1, top_k).repeat(-(-count * top_k // len(deck)), 1, 1)
    else:
        keys = torch.rand(count, tokens, experts, device=device)
        chosen = keys.topk(top_k, dim=-1).indices
    return [_batch(shape.spec, ids.to(torch.int32), device) for ids in chosen[:count]]


def _batch(spec: LayerSpec, ids: Tensor, device: torch.device) -> Batch:
    tokens, _ = ids.shape
    rows = torch.randn(tokens, spec.hidden, device=device).to(torch.bfloat16)
    weights = torch.rand(ids.shape, device=device) + 0.1
    weights /= weights.sum(dim=1, keepdim=True)
    out = torch.full_like(rows, torch.nan)
    return Batch(rows, out, ids=ids.contiguous(), weights=weights)


def first_rows(batch: Batch, count: int) -> Batch:
    """The same for the first rows alone, with an output of its own in float32."""
    assert batch.ids is not None and batch.weights is not None
    rows = batch.rows[:count]
    out = torch.empty(rows.shape, dtype=torch.float32, device=rows.device)
    return replace(batch, rows=rows, out=out, ids=batch.ids[:count], weights=batch.weights[:count])
