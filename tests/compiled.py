"""What Triton lays out for our kernels on a card that need not be here: it compiles without one."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
import triton
from tests.strategies import generator, layer_spec, random_topk, random_weights
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from expertd.backends.base import Batch
from expertd.backends.triton import align, combine, launch, quantize
from expertd.backends.triton.align import Blocks
from expertd.backends.triton.backend import Triton
from expertd.backends.triton.shared import Card
from expertd.backends.triton.tiles import Cut, Tile
from expertd.capability.row import Row
from expertd.capability.rows.triton import ROWS
from expertd.core import Activation, ActivationKind, QuantScheme

CELLS = [(row, quant) for row in ROWS for quant in row.quants]
SMALL, LARGE = 99 * 1024, 227 * 1024
CARDS = {
    "sm80": Card("sm80", 163 * 1024),
    "sm86": Card("sm86", SMALL),
    "sm89": Card("sm89", SMALL),
    "sm90": Card("sm90", LARGE),
    "sm100": Card("sm100", LARGE),
    "sm103": Card("sm103", LARGE),
    "sm120": Card("sm120", SMALL),
    "sm121": Card("sm121", SMALL),
}
TOKENS = 32


class _Absent:
    """Triton's driver of a card that is not here; each has a number, and a cache, of its own."""

    def __init__(self, arch: str) -> None:
        self.number = int(arch.removeprefix("sm"))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.number, 32)

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def compiling_for(arch: str) -> Iterator[None]:
    """Kernels are compiled for a card of this architecture, on the CPU's tensors."""
    with patch.object(driver, "_active", _Absent(arch)):
        yield


@contextmanager
def launches_compile(arch: str) -> Iterator[list[Any]]:
    """Whatever is launched is compiled for such a card, as it would be there, and does not run."""
    seen: list[Any] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **constants: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **constants)
        if not any(kernel is one for one in seen):
            seen.append(kernel)
        return kernel

    later = int(arch.removeprefix("sm")) >= 90
    close = {"CHAINED": True, "launch_pdl": True} if later else {"CHAINED": False}
    with compiling_for(arch), ExitStack() as patches:
        patches.enter_context(patch.object(triton.JITFunction, "run", compile_only))
        for module in (align, combine, launch, quantize):
            patches.enter_context(patch.object(module, "chained", lambda device: close))
        yield seen


def backend_of(row: Row, quant: QuantScheme, gated: bool, device: torch.device) -> Triton:
    """A small layer, ready for its kernels to be compiled."""
    kind = ActivationKind.SWIGLU if gated else ActivationKind.RELU2
    spec = layer_spec(hidden=256, intermediate=256, quant=quant, activation=Activation(kind))
    weights = random_weights(spec, generator(0))
    moved = {name: tensor.to(device) for name, tensor in weights.tensors.items()}
    backend = Triton(row, spec, device)
    with patch.object(Triton, "_check", lambda self: ()):
        backend.check()
    backend.prepare_weights(replace(weights, **moved), None)
    return backend


def laid_out(backend: Triton, cut: Cut) -> list[int]:
    """Bytes of shared memory of each GEMM as compiled; nothing is launched."""
    return [int(kernel.metadata.shared) for kernel in compiled(backend, cut)]


def sums_apart(backend: Triton, cut: Cut) -> list[int]:
    """Columns of tensor memory of each GEMM, likewise."""
    return [int(kernel.metadata.tmem_size) for kernel in compiled(backend, cut)]


def compiled(backend: Triton, cut: Cut) -> list[Any]:
    """Both GEMMs as Triton compiles them."""
    spec, device = backend.spec, backend.device
    ids, weights = (t.to(device) for t in random_topk(TOKENS, spec.num_experts, 2, generator(0)))
    rows = torch.zeros(TOKENS, spec.hidden, dtype=torch.bfloat16, device=device)
    batch = Batch(rows, torch.empty_like(rows), ids=ids, weights=weights)
    memory = backend.memory(cut, TOKENS, 2)
    room = "expertd.backends.triton"
    with patch(f"{room}.backend.align", _unaligned), patch(f"{room}.quantize._launch"):
        calls = backend.calls(batch, cut, memory)
    return [_compiled(call.kernel, call.grid, call.arguments) for call in calls]


def _unaligned(ids: Any, first: int, held: int, heights: Any, scratch: Any) -> tuple[Blocks, ...]:
    return tuple(Blocks(ids, first, 8, scratch, scratch, scratch, scratch) for _ in heights)


def _compiled(kernel: Any, grid: tuple[int], arguments: dict[str, Any]) -> Any:
    assert isinstance(kernel, triton.JITFunction)
    return kernel.warmup(grid=grid, **arguments)


def random_cut(row: Row, quant: QuantScheme, arch: str, chance: random.Random) -> Cut:
    """Any tile that compiles, of two stages and more, for both GEMMs."""
    blocks = "block128" in quant or "group128" in row.activation_quant
    n, k = (128, 128) if blocks else (chance.choice((64, 128)), chance.choice((64, 128, 256)))
    packed = quant in (QuantScheme.MXFP4, QuantScheme.NVFP4, QuantScheme.MXINT4)
    m = chance.choice((8, 16, 32, 64, 128) if packed else (16, 32, 64, 128))
    loose = m <= 16 and chance.random() < 0.3
    in_loop = loose or (m <= 16 and chance.random() < 0.5)
    swapped = m < 128 and chance.random() < 0.4
    tile = Tile(
        m,
        n,
        k,
        warps=8 if m == 128 else 2 if in_loop and packed else 4,
        stages=chance.choice((2, 3, 4)),
        swapped=swapped,
        mapped=arch not in ("sm80", "sm86", "sm89") and chance.random() < 0.5,
        short=chance.choice((0, m // 2)) if m > 16 else 0,
        more=chance.choice((0, 16)) if packed and swapped and not in_loop else 0,
    )
    return Cut(not loose, in_loop, tile, tile)
