"""How fast the card could be: its copy bandwidth, its GEMM peaks, and the roof they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tests.bench.kernels.shapes import Shape
from tests.bench.kernels.timing import Call, time_calls
from torch import Tensor

from expertd.backends.base import Batch
from expertd.weights.storage import layer_bytes

COPY_BYTES = 1 << 32
GEMM_SIZE = 8192
BURST_SECONDS = 0.015
"""How long GEMMs are timed: after a tenth of a second the card lowers its clocks by a tenth."""


@dataclass(frozen=True)
class Card:
    """Measured rates: bytes/s read and written by a copy, FLOP/s of a GEMM by dtype."""

    bandwidth: float
    peaks: dict[str, float]


@dataclass(frozen=True)
class Roof:
    """The least time of a call in microseconds, and what bounds it."""

    us: float
    bound: str


def measure_card(device: torch.device, seconds: float) -> Card:
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device) for _ in range(2))
    calls = {"bf16": _bf16(a, b)}
    if torch.cuda.get_device_capability(device) >= (8, 9):
        calls["fp8"] = _fp8(a, b)
    flops = 2 * GEMM_SIZE**3
    peaks = {d: flops / time_calls([c], BURST_SECONDS).median * 1e6 for d, c in calls.items()}
    return Card(_bandwidth(device, seconds), peaks)


def _bandwidth(device: torch.device, seconds: float) -> float:
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    # Not as a graph: there, a copy is a node of its own kind, which moves a third less.
    copied = time_calls([lambda: target.copy_(source)], seconds, graph=False)
    return 2 * COPY_BYTES / copied.median * 1e6


def _bf16(a: Tensor, b: Tensor) -> Call:
    left, right = a.bfloat16(), b.bfloat16()
    out = torch.empty_like(left)
    return lambda: torch.matmul(left, right, out=out)


def _fp8(a: Tensor, b: Tensor) -> Call:
    left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=a.device)
    return lambda: torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16)


def multiplied(activation_quant: str) -> str:
    """The dtype that the GEMMs multiply, for rows that enter them in this format."""
    return "fp8" if "fp8" in activation_quant else "bf16"


def roof(card: Card, shape: Shape, batches: list[Batch], dtype: str) -> Roof:
    """max(bytes of the activated experts / bandwidth, FLOPs / peak), the mean of the batches."""
    spec = shape.spec
    active = sum(len(batch.ids.unique()) for batch in batches if batch.ids is not None)
    each = layer_bytes(spec) / spec.held
    read = active / len(batches) * each / card.bandwidth
    pairs = batches[0].rows.shape[0] * shape.top_k
    flops = 2 * pairs * (spec.rows13 + spec.intermediate) * spec.hidden
    computed = flops / card.peaks[dtype]
    return Roof(max(read, computed) * 1e6, "memory" if read >= computed else "compute")
